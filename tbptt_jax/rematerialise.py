"""Rematerialisation in time: what the backward pass of a window keeps, and what it computes again."""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree, check_whole, quoted

Segment = int | tuple[int, ...] | Literal["sqrt"] | None


def in_segments(segment: Callable, carry: PyTree, per_step: PyTree, time: int, checkpoint: Segment) -> tuple:
    """Scans ``segment`` over stretches of time, keeping for the backward pass only the carry between them.

    Args:
      segment: ``(carry, per_step [lanes, steps, ...]) -> (carry, y [lanes, steps, ...])``, of any number of steps.
      carry: every leaf ``[lanes, ...]``.
      per_step: leaves ``[lanes, time, ...]``.
      time: how many steps there are.
      checkpoint: as for :func:`tbptt_jax.from_step`.

    Raises:
      ValueError: if ``checkpoint`` is not as described.
    """
    if checkpoint is None:
        return segment(carry, per_step)
    if checkpoint == () or isinstance(checkpoint, list) or (isinstance(checkpoint, str) and checkpoint != "sqrt"):
        raise ValueError(
            f"`checkpoint` is {quoted(checkpoint)}; it needs a segment's length in steps, a tuple of lengths such as (64, 8), or 'sqrt'."
        )
    lengths = checkpoint if isinstance(checkpoint, tuple) else (_root(time) if checkpoint == "sqrt" else checkpoint,)
    for length in lengths:
        check_whole("checkpoint", length)
    if any(inner >= outer for outer, inner in itertools.pairwise(lengths)):
        raise ValueError(
            f"`checkpoint` is {lengths}; each segment lies within the one before and needs to be shorter, as in (64, 8)."
        )
    return _nested(segment, carry, per_step, time, lengths)


def _nested(segment: Callable, carry: PyTree, per_step: PyTree, time: int, lengths: tuple[int, ...]) -> tuple:
    length, *shorter = lengths
    if shorter and time <= length:  # a single segment of this length would be computed again for nothing
        return _nested(segment, carry, per_step, time, tuple(shorter))

    def within(steps: int) -> Callable:
        def inner(carry: PyTree, per_step: PyTree) -> tuple:
            return _nested(segment, carry, per_step, steps, tuple(shorter))

        return jax.checkpoint(inner if shorter else segment, prevent_cse=False)

    whole, rest = divmod(time, length)

    def fold(x: jax.Array) -> jax.Array:
        x = x[:, : whole * length]
        return x.reshape(x.shape[0], whole, length, *x.shape[2:]).swapaxes(0, 1)

    def unfold(y: jax.Array) -> jax.Array:
        y = y.swapaxes(0, 1)
        return y.reshape(y.shape[0], whole * length, *y.shape[3:])

    parts = []
    if whole:
        carry, y = lax.scan(within(length), carry, jax.tree.map(fold, per_step))
        parts.append(jax.tree.map(unfold, y))
    if rest:
        carry, y = within(rest)(carry, jax.tree.map(lambda x: x[:, whole * length :], per_step))
        parts.append(y)
    return carry, jax.tree.map(lambda *y: jnp.concatenate(y, 1), *parts)


def _root(time: int) -> int:
    """The square root, rounded up."""
    return math.isqrt(time - 1) + 1
