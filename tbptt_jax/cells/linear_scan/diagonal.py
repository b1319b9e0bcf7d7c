"""h_t = a_t ∘ h_{t−1} + b_t over a window.

Resets and padding are folded into the coefficients: a step at which a lane is reset multiplies what was by 0, one that is
padding multiplies it by 1 and adds nothing. The gradient of such a recurrence is one too, read backwards,

    g_t = dh_t + a_{t+1} ∘ g_{t+1},    db_t = g_t,    da_t = g_t ∘ h_{t−1},

so that only a and h are kept for it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import pad, where_lanes
from tbptt_jax.cells.linear_scan.choice import Implementation, Masks, run_by
from tbptt_jax.cells.products import at, put

CHUNK = 8


def diagonal(
    a: jax.Array,
    b: jax.Array,
    h: jax.Array,
    start: jax.Array | None,
    masks: Masks,
    implementation: Implementation = None,
) -> jax.Array:
    """h_t = a_t ∘ h_{t−1} + b_t, ``[lanes, time, ...]``, in the dtype of ``h``.

    Args:
      a: ``[lanes, time, ...]``, or what broadcasts to it.
      b: ``[lanes, time, ...]``, or what broadcasts to it.
      h: ``[lanes, ...]``, before the window.
      start: what a reset returns to, ``[lanes, ...]``, or of each step ``[lanes, time, ...]``. None: zeros.
      masks: of the window.
      implementation: how the window is run.
    """
    resets, valid, edges = masks
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    a, b = (jnp.broadcast_to(x.astype(h.dtype), shape) for x in (a, b))
    if valid is not None:
        a, b = where_lanes(valid, a, jnp.ones_like(a)), where_lanes(valid, b, jnp.zeros_like(b))
    if resets is not None:
        if start is not None:
            start = start if start.ndim == len(shape) else start[:, None]
            b = where_lanes(resets, b + a * start, b)
        a = where_lanes(resets, jnp.zeros_like(a), a)
    return _diagonal(implementation, a, b, h, edges)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _diagonal(
    implementation: Implementation, a: jax.Array, b: jax.Array, h: jax.Array, edges: jax.Array | None
) -> jax.Array:
    return _forward(implementation, a, b, h, edges)[0]


def _forward(
    implementation: Implementation, a: jax.Array, b: jax.Array, h: jax.Array, edges: jax.Array | None
) -> tuple:
    ways = {"step": _steps, "associative": _doubling, "chunked": _chunks}
    hs = run_by(implementation, ways, a, b, h, cpu="step", others="chunked")
    return hs, (a, h, hs, edges)


def _backward(implementation: Implementation, kept: tuple, dh: jax.Array) -> tuple:
    a, h, hs, edges = kept
    back = a if edges is None else a * edges.reshape(*edges.shape, *[1] * (a.ndim - 2)).astype(a.dtype)

    def reversed_by(run: Callable) -> Callable:
        def backwards(a: jax.Array, dh: jax.Array) -> jax.Array:
            after = jnp.concatenate([a, jnp.zeros_like(a[:, :1])], 1)[:, 1:]  # a_{t+1}
            return run(after[:, ::-1], dh[:, ::-1], jnp.zeros_like(h))[:, ::-1]

        return backwards

    ways = {"step": _steps_back, "associative": reversed_by(_doubling), "chunked": reversed_by(_chunks)}
    g = run_by(implementation, ways, back, dh, cpu="step", others="chunked")
    before = jnp.concatenate([h[:, None], hs], 1)[:, :-1]
    dh0 = times(back[:, 0], g[:, 0]) if a.shape[1] else jnp.zeros_like(h)
    return g * before, g, dh0, None if edges is None else jnp.zeros_like(edges)


_diagonal.defvjp(_forward, _backward)


def _steps(a: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
    """Where it is read and written in place, nothing is transposed for the loop."""
    decays, into, begin = _parts(a), _parts(b), _parts(h)

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        h, hs = state
        h = [x + at(b, t) for x, b in zip(_product([at(a, t) for a in decays], h), into, strict=True)]
        return (h, [put(xs, x[:, None], t) for xs, x in zip(hs, h, strict=True)]), None

    return _number(lax.scan(step, (begin, [jnp.zeros_like(x) for x in into]), jnp.arange(a.shape[1]))[0][1])


def _steps_back(a: jax.Array, dh: jax.Array) -> jax.Array:
    decays, given = _parts(a), _parts(dh)

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        from_after, gs = state
        g = [at(x, t) + y for x, y in zip(given, from_after, strict=True)]
        return (
            _product([at(a, t) for a in decays], g),
            [put(xs, x[:, None], t) for xs, x in zip(gs, g, strict=True)],
        ), None

    begin = [jnp.zeros_like(x[:, 0]) for x in given], [jnp.zeros_like(x) for x in given]
    return _number(lax.scan(step, begin, jnp.arange(a.shape[1]), reverse=True)[0][1])


def _parts(x: jax.Array) -> list[jax.Array]:
    """A CPU takes nearly three times as long for steps of complex numbers as for those of their real and imaginary parts."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _number(parts: list[jax.Array]) -> jax.Array:
    return lax.complex(*parts) if len(parts) > 1 else parts[0]


def _product(a: list[jax.Array], x: list[jax.Array]) -> list[jax.Array]:
    """``a * x``, and 0 where ``a`` is."""
    if len(a) == 1:
        return [times(a[0], x[0])]
    nothing = (a[0] == 0) & (a[1] == 0)
    return [jnp.where(nothing, 0, y) for y in (a[0] * x[0] - a[1] * x[1], a[0] * x[1] + a[1] * x[0])]


def _doubling(a: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
    """log2(time) passes: after each, a step's a and b are those of twice as many steps.

    Reference: Hillis & Steele 1986, *Data parallel algorithms*. XLA's own associative scan is not used: on a CPU its gradient,
    inside a scan over windows, ends the process (jaxlib 0.10).
    """
    time, d = a.shape[1], 1
    b = _with_carry(a, b, h)
    while d < time:
        b = b + times(a, later(b, d))
        a = a * later(a, d)
        d *= 2
    return b


def _chunks(a: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
    """The steps of all chunks side by side from zeros, then the chunks' last ones, which are such a recurrence, by chunks again;
    a chunk's steps are then joined to what was before it. Each number is read and written a few times, however long the window."""
    lanes, time, *units = a.shape
    if time <= CHUNK:
        return _one_after_another(a, _with_carry(a, b, h))[0]
    more = -time % CHUNK
    a, b = (jnp.asarray(pad(x, 1, more)).reshape(lanes, -1, CHUNK, *units) for x in (a, b))
    local, decay = _one_after_another(a.swapaxes(1, 2), b.swapaxes(1, 2))
    ends = _chunks(decay[:, -1], local[:, -1], h)
    before = jnp.concatenate([h[:, None], ends], 1)[:, :-1]
    hs = local + times(decay, before[:, None])
    return hs.swapaxes(1, 2).reshape(lanes, time + more, *units)[:, :time]


def _one_after_another(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From zeros, and the product of the decays, ``[lanes, time, ...]``; for few steps."""
    hs, products = [b[:, :1]], [a[:, :1]]
    for t in range(1, a.shape[1]):
        of_t = a[:, t : t + 1]
        hs.append(times(of_t, hs[-1]) + b[:, t : t + 1])
        products.append(of_t * products[-1])
    return jnp.concatenate(hs, 1)[:, : a.shape[1]], jnp.concatenate(products, 1)[:, : a.shape[1]]


def _with_carry(a: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
    """``b`` with what the first step makes of ``h``."""
    return jnp.concatenate([b[:, :1] + times(a[:, :1], h[:, None]), b[:, 1:]], 1)


def times(a: jax.Array, x: jax.Array) -> jax.Array:
    """``a * x``, and 0 where ``a`` is: what is not finite ends at a reset."""
    return jnp.where(a == 0, 0, a * x)


def later(x: jax.Array, steps: int, axis: int = 1, value: float = 0.0) -> jax.Array:
    """``x`` so many steps later along its axis of time, ``value`` before it."""
    there = [(steps * (n == axis), -steps * (n == axis), 0) for n in range(x.ndim)]
    return lax.pad(x, jnp.asarray(value, x.dtype), there)
