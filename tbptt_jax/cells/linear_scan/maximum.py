"""m_t = max(m_{t−1} + a_t, b_t) over a window: what is linear where adding is called multiplying, and the larger the sum.

It keeps exponential gates from overflowing (Beck et al. 2024, *xLSTM*, equation 15).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes
from tbptt_jax.cells.linear_scan.choice import Implementation, Masks, run_by
from tbptt_jax.cells.linear_scan.diagonal import later
from tbptt_jax.recurrence import scale_cotangent


def maximum(
    a: jax.Array,
    b: jax.Array,
    m: jax.Array,
    start: jax.Array | None,
    masks: Masks,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """m before each step, after a reset at it, and m after it, each ``[lanes, time, ...]``.

    Args:
      a: ``[lanes, time, ...]``.
      b: ``[lanes, time, ...]``.
      m: ``[lanes, ...]``, before the window.
      start: what a reset returns to, ``[lanes, ...]``, or of each step ``[lanes, time, ...]``. None: zeros.
      masks: of the window.
      implementation: ``"step"``: one step after another, as is needed where the gradient is scaled at edges; the others: by
        platform. A CPU runs a loop over the few numbers of a lane that these are in a tenth of the time of all steps at once, in
        log2(time) passes, as others do.
    """
    resets, valid, edges = masks
    start = jnp.zeros_like(m) if start is None else start
    start = jnp.broadcast_to(start if start.ndim == a.ndim else start[:, None], a.shape)
    if valid is not None:  # what changes nothing
        a, b = where_lanes(valid, (a, b), (jnp.zeros_like(a), jnp.full_like(b, -jnp.inf)))
    way: Implementation = "step" if implementation == "step" or edges is not None else None
    ways: dict[str, Callable] = {"step": _steps, "associative": _at_once}
    return run_by(way, ways, a, b, m, start, resets, edges, cpu="step", others="associative")


def _at_once(
    a: jax.Array, b: jax.Array, m: jax.Array, start: jax.Array, resets: jax.Array | None, edges: None
) -> tuple[jax.Array, jax.Array]:
    if resets is not None:
        b = where_lanes(resets, jnp.maximum(start + a, b), b)
        a = where_lanes(resets, jnp.full_like(a, -jnp.inf), a)
    after = _doubling(a, b, m)
    before = jnp.concatenate([m[:, None], after[:, :-1]], 1)
    return before if resets is None else where_lanes(resets, start, before), after


def _steps(
    a: jax.Array, b: jax.Array, m: jax.Array, start: jax.Array, resets: jax.Array | None, edges: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    def step(m: jax.Array, at_t: tuple) -> tuple[jax.Array, tuple]:
        a, b, start, reset, edge = at_t
        m = m if edge is None else scale_cotangent(edge, m)
        before = m if reset is None else where_lanes(reset, start, m)
        m = jnp.maximum(before + a, b)
        return m, (before, m)

    per_step = jax.tree.map(lambda x: x.swapaxes(0, 1), (a, b, start, resets, edges))
    before, after = lax.scan(step, m, per_step)[1]
    return before.swapaxes(0, 1), after.swapaxes(0, 1)


def _doubling(a: jax.Array, b: jax.Array, m: jax.Array) -> jax.Array:
    time, d = a.shape[1], 1
    b = jnp.concatenate([_larger(a[:, :1], m[:, None], b[:, :1]), b[:, 1:]], 1)
    while d < time:
        b, a = _larger(a, later(b, d, value=-jnp.inf), b), a + later(a, d, value=-jnp.inf)
        d *= 2
    return b


def _larger(a: jax.Array, m: jax.Array, b: jax.Array) -> jax.Array:
    """max(m + a, b), and b where a is -inf: what is not finite ends at a reset."""
    return jnp.maximum(jnp.where(jnp.isneginf(a), a, m + a), b)
