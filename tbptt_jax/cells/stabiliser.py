"""The stabiliser of exponential gates: m_t = max(log f_t + m_{t−1}, log i_t), over a window.

Reference: Beck et al. 2024, *xLSTM: extended long short-term memory*, eq. 15 and 49.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes
from tbptt_jax.cells.linear_scan import Implementation, Masks, diagonal
from tbptt_jax.cells.linear_scan.choice import run_by


def stabilised(
    log_i: jax.Array, log_f: jax.Array, m: jax.Array, starts: jax.Array | None, masks: Masks, how: Implementation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each step ``[lanes, time, heads]``: m, and the logarithms of the stabilised forget and input gate, at most 0.

    Which of the two is larger is found first. Where that is known m is a sum, and its gradient too.
    """
    resets, valid, edges = masks
    start = jnp.zeros_like(log_i) if starts is None else starts

    def before(ms: jax.Array) -> jax.Array:
        ms = jnp.concatenate([m[:, None], ms[:, :-1]], 1)
        if edges is not None:
            still = lax.stop_gradient(ms)
            ms = still + edges[..., None].astype(ms.dtype) * (ms - still)
        return ms if resets is None else where_lanes(resets, start, ms)

    a, b, never = log_f, log_i, jnp.full_like(log_f, -jnp.inf)
    if valid is not None:
        a, b = where_lanes(valid, (a, b), (jnp.zeros_like(a), never))
    if resets is not None:
        a, b = where_lanes(resets, (never, jnp.maximum(b, a + start)), (a, b))
    ways = {"step": _largest_by_steps, "associative": _largest, "chunked": _largest}
    largest = run_by(how, ways, *lax.stop_gradient((a, b, m)), cpu="step", others="associative")
    keeps = log_f + before(largest) >= log_i
    stabilisers = diagonal(keeps, jnp.where(keeps, log_f, log_i), m, starts, masks, how)
    apart = log_f + before(stabilisers) - log_i
    return stabilisers, jnp.where(keeps, 0, apart), jnp.where(keeps, -apart, 0)


def _largest_by_steps(a: jax.Array, b: jax.Array, m: jax.Array) -> jax.Array:
    """m_t = max(a_t + m_{t−1}, b_t)."""

    def step(m: jax.Array, of_t: tuple) -> tuple[jax.Array, jax.Array]:
        m = jnp.maximum(_sum(of_t[0], m), of_t[1])
        return m, m

    return lax.scan(step, m, (a.swapaxes(0, 1), b.swapaxes(0, 1)))[1].swapaxes(0, 1)


def _largest(a: jax.Array, b: jax.Array, m: jax.Array) -> jax.Array:
    """The same in log2(time) passes: after each, a step's a and b are those of twice as many steps."""
    b, d = b.at[:, 0].max(_sum(a[:, 0], m)), 1
    while d < a.shape[1]:
        of_earlier = [jnp.pad(x[:, :-d], ((0, 0), (d, 0), (0, 0)), constant_values=-jnp.inf) for x in (a, b)]
        a, b, d = _sum(a, of_earlier[0]), jnp.maximum(b, _sum(a, of_earlier[1])), 2 * d
    return b


def _sum(a: jax.Array, x: jax.Array) -> jax.Array:
    """``a + x``, and -inf where ``a`` is: what is not finite ends at a reset."""
    return jnp.where(a == -jnp.inf, a, a + x)
