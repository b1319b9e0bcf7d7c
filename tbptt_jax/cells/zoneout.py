"""Zoneout (Krueger et al. 2017, *Zoneout: regularizing RNNs by randomly preserving hidden activations*, eq. 2 to 5).

    h ← d h_before + (1 − d) h,   d drawn for each unit and step, 1 as likely as the rate says

What stands still is ``[lanes, time, features]`` bool, where it is drawn; ``[1, time, 1]`` floats, how likely it is, where it is
not, as then the step's mean is taken; or None: nothing does.
"""

import jax
import jax.numpy as jnp

from tbptt_jax.noise import LEVELS, level, random_bytes


def stays(rates: tuple[float, ...], widths: tuple[int, ...], x: jax.Array, keys: jax.Array | None) -> list:
    """What stands still in the steps of ``x [lanes, time, ...]``, for each part of a carry.

    Args:
      rates: of each part, from 0 to below 1; those between are taken to the nearest of 1/256, 2/256, ... 255/256.
      widths: features of each part.
      keys: ``[lanes, time]``; None: nothing is drawn.
    """
    levels = [level(rate) for rate in rates]
    if keys is None:
        return [jnp.full((1, x.shape[1], 1), of / LEVELS, x.dtype) if of else None for of in levels]
    drawn = [width if of else 0 for of, width in zip(levels, widths, strict=True)]
    if not any(drawn):
        return [None for _ in levels]
    values = jax.vmap(jax.vmap(lambda key: random_bytes(key, (sum(drawn),))))(keys)
    found = []
    for of, width in zip(levels, drawn, strict=True):
        found.append(values[..., :width] < of if of else None)
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
