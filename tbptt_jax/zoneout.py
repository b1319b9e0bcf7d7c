"""Zoneout (Krueger et al. 2017, *Zoneout: regularizing RNNs by randomly preserving hidden activations*, eq. 2 to 5).

    h ← d h_before + (1 − d) h,   d drawn for each unit and step, 1 as likely as the rate says

What stands still is ``[lanes, time, features]`` bool, where it is drawn; ``[1, time, 1]`` floats, how likely it is, where it is
not, as then the step's mean is taken; or None: nothing does.
"""

import jax
import jax.numpy as jnp
from jax import lax

LEVELS = 256  # one byte of what is drawn for each unit: 32 bits for each would cost as much as a small window does


def stays(rates: tuple[float, ...], widths: tuple[int, ...], x: jax.Array, keys: jax.Array | None) -> list:
    """What stands still in the steps of ``x [lanes, time, ...]``, for each part of a carry.

    Args:
      rates: of each part, from 0 to below 1; those between are taken to the nearest of 1/256, 2/256, ... 255/256.
      widths: features of each part.
      keys: ``[lanes, time]``; None: nothing is drawn.
    """
    levels = [min(max(round(rate * LEVELS), 1), LEVELS - 1) if rate else 0 for rate in rates]
    if keys is None:
        return [jnp.full((1, x.shape[1], 1), level / LEVELS, x.dtype) if level else None for level in levels]
    drawn = [width if level else 0 for level, width in zip(levels, widths, strict=True)]
    if not any(drawn):
        return [None for _ in levels]

    def draw(key: jax.Array) -> jax.Array:
        words = jax.random.bits(key, (-(-sum(drawn) // 4),), jnp.uint32)
        return lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)

    values, found = jax.vmap(jax.vmap(draw))(keys), []
    for level, width in zip(levels, drawn, strict=True):
        found.append(values[..., :width] < level if level else None)
        values = values[..., width:]
    return found


def with_padding(kept: jax.Array | None, valid: jax.Array | None) -> jax.Array | None:
    """Padding is a step in which every unit stands still."""
    if valid is None:
        return kept
    padding = ~valid[..., None]
    return padding if kept is None else jnp.where(padding, jnp.ones((), kept.dtype), kept)


def blend(kept: jax.Array | None, before: jax.Array, new: jax.Array) -> jax.Array:
    """What stands still from ``before``, the rest from ``new``; or their mean, where ``kept`` is how likely that is."""
    if kept is None:
        return new
    return jnp.where(kept, before, new) if kept.dtype == bool else kept * before + (1 - kept) * new
