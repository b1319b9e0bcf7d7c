"""An LSTM layer's parameters: at first, and as Flax and PyTorch have them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree

GATES = "ifgo"  # the order along the axis of four times the features, as PyTorch has it


class Weights(NamedTuple):
    """One layer's parameters, the gates side by side in the order input, forget, candidate, output.

    Attributes:
      input: ``[inputs, 4 * features]``.
      recurrent: ``[outputs, 4 * features]``; outputs are the features, or the projection's where there is one.
      bias: ``[4 * features]``.
      projection: ``[features, outputs]``, or None.
    """

    input: jax.Array
    recurrent: jax.Array
    bias: jax.Array
    projection: jax.Array | None = None


def initial_weights(key: jax.Array, inputs: int, features: int, projection: int | None) -> Weights:
    """Flax's initial values: each gate's own LeCun normal and orthogonal matrices, zero biases."""
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
      ValueError: if the weights have a projection.
    """
    if weights.projection is not None:
        raise ValueError("These weights have a projection; Flax's LSTM cells have none.")
    parts = zip(GATES, *(jnp.split(w, 4, -1) for w in (weights.input, weights.recurrent, weights.bias)), strict=True)
    cell: dict[str, Any] = {}
    for gate, input_kernel, kernel, bias in parts:
        cell |= {f"i{gate}": {"kernel": input_kernel}, f"h{gate}": {"kernel": kernel, "bias": bias}}
    return {"params": cell}


def from_torch(state: Mapping[str, Any]) -> tuple[Weights, ...]:
    """The layers of a ``torch.nn.LSTM`` from its ``state_dict()``, or from arrays under the same names.

    PyTorch's two biases only ever appear as their sum, and become one.

    Args:
      state: for each layer, ``weight_ih_l0`` ``[4 * features, inputs]`` and ``weight_hh_l0`` ``[4 * features, outputs]``;
        where there are any, ``bias_ih_l0`` and ``bias_hh_l0`` ``[4 * features]``, ``weight_hr_l0`` ``[outputs, features]``.

    Returns:
      The weights of each layer, in order.

    Raises:
      ValueError: if the LSTM is bidirectional, or there is no ``weight_ih_l0``.
      KeyError: if a layer has ``weight_ih`` without ``weight_hh``.
    """
    if any(name.endswith("_reverse") for name in state):
        raise ValueError("This PyTorch LSTM is bidirectional; a stream is read in one direction only.")
    layers: list[Weights] = []
    while (name := f"_l{len(layers)}") and f"weight_ih{name}" in state:
        recurrent = jnp.asarray(state[f"weight_hh{name}"]).T
        bias = jnp.zeros(recurrent.shape[1:], recurrent.dtype)
        for key in (f"bias_ih{name}", f"bias_hh{name}"):
            bias = bias + jnp.asarray(state[key]) if key in state else bias
        down = jnp.asarray(state[f"weight_hr{name}"]).T if f"weight_hr{name}" in state else None
        layers.append(Weights(jnp.asarray(state[f"weight_ih{name}"]).T, recurrent, bias, down))
    if not layers:
        raise ValueError(f"There is no `weight_ih_l0` among {sorted(state)}: give the `state_dict()` of one nn.LSTM.")
    return tuple(layers)


def to_torch(layers: Sequence[Weights]) -> dict[str, jax.Array]:
    """Arrays under the names of a ``torch.nn.LSTM``'s ``state_dict()``; the second bias of each layer is 0.

    Args:
      layers: the weights of each layer, in order.

    Returns:
      Name → array, in the shapes that :func:`from_torch` reads; no layers, no arrays.
    """
    state = {}
    for n, weights in enumerate(layers):
        state[f"weight_ih_l{n}"] = weights.input.T
        state[f"weight_hh_l{n}"] = weights.recurrent.T
        state[f"bias_ih_l{n}"] = weights.bias
        state[f"bias_hh_l{n}"] = jnp.zeros_like(weights.bias)
        if weights.projection is not None:
            state[f"weight_hr_l{n}"] = weights.projection.T
    return state
