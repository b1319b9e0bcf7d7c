"""The minGRU (Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, *Were RNNs all we needed?*), section 3.1."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import check_whole
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_scan import Implementation, Masks, check_implementation, diagonal
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence


class Weights(NamedTuple):
    """A layer's parameters.

    Attributes:
      input: ``[inputs, 2 * features]``, to z and to the candidate.
      bias: ``[2 * features]``.
    """

    input: jax.Array
    bias: jax.Array


def min_gru(features: int, *, implementation: Implementation = None, **options: Unpack[Options]) -> Recurrence:
    """A recurrence of minGRU layers: gates that see the inputs alone, so that all steps' coefficients are computed at once.

        z = σ(x W_z + b_z),   n = x W_n + b_n,   h ← (1 − z) ∘ h + z ∘ n

    ``params["cell"]`` is a tuple of :class:`Weights`, one a layer; the carry is a tuple of ``h [lanes, features]``, one a
    layer, zeros at first. The output is h.

    Args:
      features: units of each layer.
      implementation: how a window is run: see :func:`tbptt_jax.from_linear`.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: as :func:`tbptt_jax.lstm`.
    """
    check_whole("features", features)
    check_implementation(implementation)

    def weights(key: jax.Array, inputs: int) -> Weights:
        return Weights(jax.nn.initializers.lecun_normal()(key, (inputs, 2 * features)), jnp.zeros(2 * features))

    def zeros(weights: Weights, lanes: int) -> jax.Array:
        return jnp.zeros((lanes, features), weights.input.dtype)

    def run(
        weights: Weights, h: jax.Array, x: jax.Array, *masks: jax.Array | None, starts: jax.Array | None, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        check_inputs("minGRU", x, weights.input.shape[0])
        z, n = jnp.split(x @ weights.input + weights.bias, 2, -1)
        z = jax.nn.sigmoid(z)
        start = jnp.zeros_like(h) if starts is None else starts
        hs = diagonal(1 - z, z * n, h, start, Masks(*masks), implementation)
        return hs[:, -1], hs

    return layered("minGRU", weights, zeros, run, features, **options)
