"""The minLSTM (Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, *Were RNNs all we needed?*), section 3.2."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import check_whole
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_parts import Weights, gates, initial_weights, positive, recur
from tbptt_jax.cells.linear_scan import Implementation, Masks, check_implementation
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence


def min_lstm(
    features: int,
    *,
    positive_candidates: bool = False,
    dtype: Any = None,
    implementation: Implementation = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of minLSTM layers: two gates that see the inputs alone, and share what they let through.

        f, i = σ(x W_f + b_f), σ(x W_i + b_i),   n = x W_n + b_n,   h ← f / (f + i) ∘ h + i / (f + i) ∘ n

    ``params["cell"]`` is a tuple of :class:`tbptt_jax.cells.linear_parts.Weights` (f, i, n), one a layer; the carry is a tuple of
    ``h [lanes, features]``, one a layer, zeros at first. The output is h.

    Args:
      features: units of each layer.
      positive_candidates: n = g(x W_n + b_n) with g(x) = x + 1/2 where x ≥ 0, else σ(x), as in the paper's version in logarithms
        (appendix B.3), whose numbers these then are.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype.
      implementation: how a window is run: see :func:`tbptt_jax.from_linear`.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: as :func:`tbptt_jax.lstm`.
    """
    check_whole("features", features)
    check_implementation(implementation)

    def weights(key: jax.Array, inputs: int) -> Weights:
        return initial_weights(key, inputs, 3 * features)

    def zeros(weights: Weights, lanes: int) -> jax.Array:
        return jnp.zeros((lanes, features), weights.input.dtype)

    def run(
        weights: Weights, h: jax.Array, x: jax.Array, *masks: jax.Array | None, starts: jax.Array | None, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        check_inputs("minLSTM", x, weights.input.shape[0])
        f, i, n = gates(dtype, weights, x, 3)
        odds = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)  # f / (f + i) = σ(log f − log i), also where both are 0
        n = positive(n) if positive_candidates else n
        return recur(jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds) * n, h, starts, Masks(*masks), implementation)

    return layered("minLSTM", weights, zeros, run, features, **options)
