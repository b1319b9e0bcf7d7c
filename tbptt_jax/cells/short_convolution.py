"""A causal convolution of each channel by itself over the last few steps, whose carry is the inputs that it reaches back to."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes
from tbptt_jax.cells.linear_scan import Masks
from tbptt_jax.recurrence import scale_cotangent


def initial_kernel(key: jax.Array, width: int, channels: int) -> jax.Array:
    """``[width, channels]``, uniform within ± 1 / √width."""
    return jax.random.uniform(key, (width, channels), minval=-(width**-0.5), maxval=width**-0.5)


def short_convolution(
    kernel: jax.Array, x: jax.Array, carry: jax.Array, starts: jax.Array | None, masks: Masks
) -> tuple[jax.Array, jax.Array]:
    """``(carry, y [lanes, time, channels])`` with y_t = Σ_d kernel[width − 1 − d] ∘ x_{t−d}, d from 0 to width − 1.

    A step that is padding is as if left out: the others reach back over it, and its own y means nothing.

    Args:
      kernel: ``[width, channels]``, that of the present last.
      x: ``[lanes, time, channels]``.
      carry: the inputs before the window, ``[lanes, width - 1, channels]``, the latest last.
      starts: what a reset returns to, a carry of each step ``[lanes, time, width - 1, channels]``; None: zeros.
      masks: of the window.
    """
    x = x.astype(carry.dtype)
    if masks.edges is not None or (starts is not None and masks.resets is not None):
        return _stepped(kernel, x, carry, starts, masks)
    width, time = len(kernel), x.shape[1]
    known = jnp.concatenate([carry, x], 1)
    tap = functools.partial(_taps, known, time, masks.resets, masks.valid)
    taps = tap(width)
    y = sum((taps[d][:, :time] * kernel[width - 1 - d] for d in range(1, width)), x * kernel[-1])
    if masks.resets is masks.valid is None:
        return known[:, time:], y
    # The carry is what a step after the window would reach back to.
    return jnp.stack([taps[d][:, -1] for d in range(width - 1, 0, -1)], 1) if width > 1 else carry, y


def _taps(
    known: jax.Array, time: int, resets: jax.Array | None, valid: jax.Array | None, width: int
) -> list[jax.Array]:
    """What each step of the window, and one after it, reaches back to by 0, 1 … width − 1 steps, ``[lanes, time + 1, channels]``.

    Args:
      known: ``[lanes, width - 1 + time, channels]``, the carry and the inputs.
    """
    back = width - 1
    if valid is None:
        shifted = [jnp.pad(known, ((0, 0), (0, 1), (0, 0)))[:, back - d : back - d + time + 1] for d in range(width)]
        at = [jnp.arange(back - d, back - d + time + 1)[None] for d in range(width)]
    else:
        present = jnp.concatenate([jnp.ones((valid.shape[0], back), bool), valid], 1)
        steps = jnp.arange(present.shape[1])
        latest = lax.cummax(jnp.where(present, steps, -1), axis=1)
        before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-1)  # the latest step before each that is there
        at = [jnp.broadcast_to(jnp.arange(back, back + time + 1), (valid.shape[0], time + 1))]
        for _ in range(back):
            at.append(jnp.take_along_axis(before, at[-1], 1))
        shifted = [jnp.take_along_axis(known, index[..., None], 1, mode="clip") for index in at]
    if resets is None:
        return shifted
    reset = lax.cummax(jnp.where(resets, jnp.arange(back, back + time), -1), axis=1)
    reset = jnp.concatenate([reset, reset[:, -1:]], 1)  # the latest reset at or before each step
    return [where_lanes(index >= reset, x, jnp.zeros_like(x)) for index, x in zip(at, shifted, strict=True)]


def _stepped(
    kernel: jax.Array, x: jax.Array, carry: jax.Array, starts: jax.Array | None, masks: Masks
) -> tuple[jax.Array, jax.Array]:
    """The same step by step: where cotangents are scaled at edges, or lanes begin from other than zeros."""

    def step(carry: jax.Array, at_t: tuple) -> tuple[jax.Array, jax.Array]:
        x, start, (reset, is_valid, edge) = at_t
        carry = carry if edge is None else scale_cotangent(edge, carry)
        if reset is not None:
            carry = where_lanes(reset, jnp.zeros_like(carry) if start is None else start, carry)
        known = jnp.concatenate([carry, x[:, None]], 1)
        carry = known[:, 1:] if is_valid is None else where_lanes(is_valid, known[:, 1:], carry)
        return carry, (known * kernel).sum(1)

    carry, y = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), (x, starts, masks)))
    return carry, y.swapaxes(0, 1)
