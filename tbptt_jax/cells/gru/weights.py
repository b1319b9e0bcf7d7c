"""The parameters of a GRU layer: drawn, and from and to Flax's cell."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree

GATES = "rzn"  # reset, update, candidate: PyTorch's order, by the letters of Flax


class LayerNorm(NamedTuple):
    """The gains of layer normalisation: see :func:`tbptt_jax.gru`.

    Attributes:
      input: ``[3 * features]``, of what comes from the inputs.
      recurrent: ``[3 * features]``, of what comes from h.
    """

    input: jax.Array
    recurrent: jax.Array


class Weights(NamedTuple):
    """One layer's parameters, the gates side by side in the order reset, update, candidate.

    Attributes:
      input: ``[inputs, 3 * features]``.
      recurrent: ``[features, 3 * features]``.
      bias: ``[3 * features]``.
      recurrent_bias: ``[features]``, the candidate's, inside the product with the reset gate; None where that gate is
        applied before the matrix (``reset_after=False``), and such a bias would be a second one of the candidate.
      norm: gains of layer normalisation, or None.
    """

    input: jax.Array
    recurrent: jax.Array
    bias: jax.Array
    recurrent_bias: jax.Array | None
    norm: LayerNorm | None = None


def initial_weights(
    key: jax.Array, inputs: int, features: int, reset_after: bool = True, layer_norm: bool = False
) -> Weights:
    """Flax's initial values: each gate's own LeCun normal and orthogonal matrices, zero biases; gains of 1."""
    into, again = jax.random.split(key)

    def side_by_side(initial: Any, key: jax.Array, rows: int) -> jax.Array:
        # In a loop: two batched QR factorisations that meet on a CPU can wait for each other for ever (jaxlib 0.10).
        return jnp.concatenate([*lax.map(lambda key: initial(key, (rows, features)), jax.random.split(key, 3))], 1)

    return Weights(
        side_by_side(nn.initializers.lecun_normal(), into, inputs),
        side_by_side(nn.initializers.orthogonal(), again, features),
        jnp.zeros(3 * features),
        jnp.zeros(features) if reset_after else None,
        LayerNorm(jnp.ones(3 * features), jnp.ones(3 * features)) if layer_norm else None,
    )


def from_flax(params: PyTree) -> Weights:
    """The weights of an ``nn.GRUCell``, with or without its outer ``"params"``.

    Args:
      params: for each gate of r, z, n, ``ir`` with kernel ``[inputs, features]`` and bias ``[features]``, and ``hr`` with
        kernel ``[features, features]``; ``hn`` with a bias too.

    Raises:
      KeyError: if one of these is missing.
    """
    params = params.get("params", params)
    return Weights(
        jnp.concatenate([params[f"i{gate}"]["kernel"] for gate in GATES], 1),
        jnp.concatenate([params[f"h{gate}"]["kernel"] for gate in GATES], 1),
        jnp.concatenate([params[f"i{gate}"]["bias"] for gate in GATES]),
        params["hn"]["bias"],
    )


def to_flax(weights: Weights) -> PyTree:
    """The parameters of an ``nn.GRUCell`` with these weights: ``cell.apply(to_flax(weights), carry, x)``.

    Raises:
      ValueError: if the weights are of the form that resets before the matrix, or have layer normalisation.
    """
    if weights.norm is not None:
        raise ValueError("These weights have layer normalisation; Flax's GRU cell has none.")
    if weights.recurrent_bias is None:
        raise ValueError("These weights are of a GRU with `reset_after=False`; Flax's resets after the matrix.")
    parts = zip(GATES, *(jnp.split(w, 3, -1) for w in (weights.input, weights.recurrent, weights.bias)), strict=True)
    cell: dict[str, Any] = {}
    for gate, input_kernel, kernel, bias in parts:
        cell |= {f"i{gate}": {"kernel": input_kernel, "bias": bias}, f"h{gate}": {"kernel": kernel}}
    cell["hn"]["bias"] = weights.recurrent_bias
    return {"params": cell}
