"""An LSTM layer's parameters: at first, and as Flax has them."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree

GATES = "ifgo"  # the order along the axis of four times the features, as PyTorch has it


class LayerNorm(NamedTuple):
    """What layer normalisation has learned: see :func:`tbptt_jax.lstm`.

    Attributes:
      input: ``[4 * features]``, the gain of what comes from the inputs.
      recurrent: ``[4 * features]``, the gain of what comes from h.
      cell: ``[features]``, the gain of the cell on its way to h.
      cell_bias: ``[features]``.
    """

    input: jax.Array
    recurrent: jax.Array
    cell: jax.Array
    cell_bias: jax.Array


class Weights(NamedTuple):
    """One layer's parameters, the gates side by side in the order input, forget, candidate, output.

    Attributes:
      input: ``[inputs, 4 * features]``.
      recurrent: ``[outputs, 4 * features]``; outputs are the features, or the projection's where there is one.
      bias: ``[4 * features]``.
      projection: ``[features, outputs]``, or None.
      norm: gains of layer normalisation, or None.
    """

    input: jax.Array
    recurrent: jax.Array
    bias: jax.Array
    projection: jax.Array | None = None
    norm: LayerNorm | None = None


def initial_weights(
    key: jax.Array, inputs: int, features: int, projection: int | None, layer_norm: bool = False
) -> Weights:
    """Flax's initial values: each gate's own LeCun normal and orthogonal matrices, zero biases; gains of 1."""
    into, again, down = jax.random.split(key, 3)
    outputs = features if projection is None else projection

    def side_by_side(initial: Any, key: jax.Array, rows: int) -> jax.Array:
        # In a loop: two batched QR factorisations that meet on a CPU can wait for each other for ever (jaxlib 0.10).
        return jnp.concatenate([*lax.map(lambda key: initial(key, (rows, features)), jax.random.split(key, 4))], 1)

    return Weights(
        side_by_side(nn.initializers.lecun_normal(), into, inputs),
        side_by_side(nn.initializers.orthogonal(), again, outputs),
        jnp.zeros(4 * features),
        None if projection is None else nn.initializers.lecun_normal()(down, (features, projection)),
        LayerNorm(jnp.ones(4 * features), jnp.ones(4 * features), jnp.ones(features), jnp.zeros(features))
        if layer_norm
        else None,
    )


def from_flax(params: PyTree) -> Weights:
    """The weights of an ``nn.OptimizedLSTMCell`` or ``nn.LSTMCell``, with or without its outer ``"params"``.

    Args:
      params: for each gate of i, f, g, o, ``ii`` with kernel ``[inputs, features]``, and ``hi`` with kernel
        ``[features, features]`` and bias ``[features]``.

    Raises:
      KeyError: if one of these is missing.
    """
    params = params.get("params", params)
    return Weights(
        jnp.concatenate([params[f"i{gate}"]["kernel"] for gate in GATES], 1),
        jnp.concatenate([params[f"h{gate}"]["kernel"] for gate in GATES], 1),
        jnp.concatenate([params[f"h{gate}"]["bias"] for gate in GATES]),
    )


def to_flax(weights: Weights) -> PyTree:
    """The parameters of an ``nn.OptimizedLSTMCell`` with these weights: ``cell.apply(to_flax(weights), carry, x)``.

    Raises:
      ValueError: if the weights have a projection or layer normalisation.
    """
    if weights.norm is not None:
        raise ValueError("These weights have layer normalisation; Flax's LSTM cells have none.")
    if weights.projection is not None:
        raise ValueError("These weights have a projection; Flax's LSTM cells have none.")
    parts = zip(GATES, *(jnp.split(w, 4, -1) for w in (weights.input, weights.recurrent, weights.bias)), strict=True)
    cell: dict[str, Any] = {}
    for gate, input_kernel, kernel, bias in parts:
        cell |= {f"i{gate}": {"kernel": input_kernel}, f"h{gate}": {"kernel": kernel, "bias": bias}}
    return {"params": cell}
