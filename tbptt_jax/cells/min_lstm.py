"""The minLSTM (Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, *Were RNNs all we needed?*), section 3.2."""

from typing import Any, Unpack

import jax

from tbptt_jax.cells.layers import Options
from tbptt_jax.cells.linear_parts import gated
from tbptt_jax.cells.linear_scan import Implementation
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

    def coefficients(f: jax.Array, i: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        odds = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)  # f / (f + i) = σ(log f − log i), also where both are 0
        return jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds) * n

    return gated("minLSTM", features, 3, coefficients, positive_candidates, dtype, implementation, **options)
