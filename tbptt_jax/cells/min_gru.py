"""The minGRU (Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, *Were RNNs all we needed?*), section 3.1."""

from typing import Any, Unpack

import jax

from tbptt_jax.cells.layers import Options
from tbptt_jax.cells.linear_parts import gated
from tbptt_jax.cells.linear_scan import Implementation
from tbptt_jax.recurrence import Recurrence


def min_gru(
    features: int,
    *,
    positive_candidates: bool = False,
    dtype: Any = None,
    implementation: Implementation = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of minGRU layers: gates that see the inputs alone, so that all steps' coefficients are computed at once.

        z = σ(x W_z + b_z),   n = x W_n + b_n,   h ← (1 − z) ∘ h + z ∘ n

    ``params["cell"]`` is a tuple of :class:`tbptt_jax.cells.linear_parts.Weights` (z, n), one a layer; the carry is a tuple of
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

    def coefficients(z: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = jax.nn.sigmoid(z)
        return 1 - z, z * n

    return gated("minGRU", features, 2, coefficients, positive_candidates, dtype, implementation, **options)
