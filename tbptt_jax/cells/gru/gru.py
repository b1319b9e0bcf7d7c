"""The GRU (Cho et al. 2014, *Learning phrase representations using RNN encoder–decoder*) as a recurrence."""

import functools
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import check_whole
from tbptt_jax.begin import from_first_step
from tbptt_jax.cells.gru.weights import Weights, initial_weights
from tbptt_jax.cells.gru.window import fused, scanned
from tbptt_jax.cells.layers import Options, check_inputs, check_rates, dropped_weights, layered
from tbptt_jax.cells.zoneout import stays
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence


def gru(
    features: int,
    *,
    reset_after: bool = True,
    weight_drop: float = 0.0,
    zoneout: float = 0.0,
    layer_norm: bool = False,
    dtype: Any = None,
    implementation: Literal["fused", "scan"] | None = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of GRU layers, ``encoder`` → layers → ``readout``, each layer's window one fused operation.

        r, z = σ(x W_x + h W_h + b),   n = tanh(x W_x + b + r (h W_h + c)),   h ← (1 − z) n + z h

    ``params["cell"]`` is a tuple of :class:`tbptt_jax.cells.gru.weights.Weights`, one a layer; the carry is a tuple of ``h [lanes,
    features]``, one a layer, zeros at first. The numbers are those of ``nn.GRUCell`` and of PyTorch's ``nn.GRU`` to rounding.
    At a step that is padding the output is the h that stands still.

    Args:
      features: units of each layer.
      reset_after: the reset gate comes after the recurrent matrix, as in cuDNN, PyTorch and Flax. False: before it, as in the
        paper, n = tanh(x W_x + b + (r h) W_h), at two products a step.
      weight_drop: the part of the recurrent weights that is left out in training, drawn once a window for all lanes, the kept
        ones 1 / (1 - weight_drop) larger (Merity, Keskar & Socher 2018, *Regularizing and optimizing LSTM language models*).
        Taken to the nearest of 1/256, 2/256, ... 255/256.
      zoneout: how likely a unit is to keep its h in a step, in training; each step draws anew. Otherwise h is the mean over the
        draws of the step (Krueger et al. 2017, *Zoneout*, eq. 2 to 5). Taken to the nearest of 1/256, 2/256, ... 255/256.
      layer_norm: LN(x W_x) and LN(h W_h), each with its gains, in the place of these products; r and z are normalised
        together, n by itself (Ba et al. 2016, *Layer normalization*, eq. 26 to 28).
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype.
      implementation: None and ``"fused"``: differentiated by hand, reverse mode and, as the transpose of what ``jax.vjp``
        returns, forward mode (which ``uoro`` needs). ``"scan"``: the same window left to JAX to differentiate, for
        ``jax.jvp`` and second derivatives.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`, ``encoder``, ``readout``, ``layers``, ``dropout`` ...

    Raises:
      ValueError: now, if a size is not positive, a rate not from 0 to below 1, the implementation unknown, or layer
        normalisation asked for where the reset gate comes before the matrix; from ``init`` and ``unroll``, as
        :func:`tbptt_jax.lstm`.
    """
    check_whole("features", features)
    check_rates(weight_drop=weight_drop, zoneout=zoneout)
    if implementation not in (None, "fused", "scan"):
        raise ValueError(f"`implementation` is {implementation!r}; it needs to be 'fused', 'scan', or None.")
    if layer_norm and not reset_after:
        raise ValueError(
            "`layer_norm` normalises what the reset gate multiplies, and with `reset_after=False` that is h: leave one of them out."
        )

    def weights(key: jax.Array, inputs: int) -> Weights:
        return initial_weights(key, inputs, features, reset_after, layer_norm)

    def zeros(weights: Weights, lanes: int) -> jax.Array:
        return jnp.zeros((lanes, features), weights.recurrent.dtype)

    def run(
        weights: Weights,
        carry: jax.Array,
        x: jax.Array,
        resets: jax.Array | None,
        valid: jax.Array | None,
        edges: jax.Array | None,
        starts: jax.Array | None,
        keys: Keys,
    ) -> tuple[jax.Array, jax.Array]:
        check_inputs("GRU", x, weights.input.shape[0])
        x = x.astype(weights.input.dtype)
        weights = weights._replace(recurrent=dropped_weights(weights.recurrent, weight_drop, keys))
        (still,) = stays((zoneout,), (features,), x, keys.step)
        left_to_jax = functools.partial(scanned, dtype, weights, carry, x, resets, valid, edges, starts, still)
        if implementation == "scan" or edges is not None:  # reweighted edges are left to JAX too
            return left_to_jax()

        def whole(carry: jax.Array, resets: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            return fused(dtype, weights, carry, x, resets, valid, still)

        return from_first_step(whole, left_to_jax, carry, resets, starts)

    return layered(
        "GRU",
        weights,
        zeros,
        run,
        features,
        draws=weight_drop > 0 or zoneout > 0,
        **options,
    )
