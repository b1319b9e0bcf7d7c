"""The GRU (Cho et al. 2014) as a recurrence, each layer's window one operation."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree, check_whole
from tbptt_jax.flax_models import linen_parts, of_any_lanes
from tbptt_jax.gru.weights import Weights, initial_weights
from tbptt_jax.gru.window import fused, scanned
from tbptt_jax.recurrence import Recurrence, Segment, recurrence
from tbptt_jax.window import Window, time_shape


def gru(
    features: int,
    *,
    readout: nn.Module | None = None,
    encoder: nn.Module | None = None,
    layers: int = 1,
    reset_after: bool = True,
    dtype: Any = None,
    checkpoint: Segment = None,
    implementation: Literal["fused", "scan"] | None = None,
) -> Recurrence:
    """TEMPORARY."""
    for name, size in {"features": features, "layers": layers}.items():
        check_whole(name, size)
    begin, apply = linen_parts(encoder=encoder, readout=readout)

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        keys = jax.random.split(key, layers + 2)
        params: dict[str, Any] = {}
        x: Any = inputs
        if encoder is not None:
            x, params = begin("encoder", keys[0], params, x)
        widths = [jnp.shape(x)[-1], *[features] * (layers - 1)]
        cell = tuple(initial_weights(k, width, features, reset_after) for k, width in zip(keys[2:], widths, strict=True))
        if readout is not None:
            _, params = begin("readout", keys[1], params, jnp.zeros((lanes, 1, features)))
        return {**params, "cell": cell}

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        return tuple(jnp.zeros((lanes, features), w.recurrent.dtype) for w in params["cell"])

    def scan(params, carry, x, resets, valid, edges):
        after = []
        for weights, before in zip(params["cell"], carry, strict=True):
            x = x.astype(weights.input.dtype)
            if implementation == "scan" or edges is not None:
                state, x = scanned(dtype, weights, before, x, resets, valid, edges)
            else:
                state, x = fused(dtype, weights, before, x, resets, valid, None)
            after.append(state)
        return tuple(after), x

    return recurrence(
        of_any_lanes(init), initial_carry, scan, encoder and apply("encoder"), readout and apply("readout"), checkpoint
    )
