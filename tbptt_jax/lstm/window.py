"""The LSTM whose window is one operation (Hochreiter & Schmidhuber 1997, *Long short-term memory*).

    i, f, o = σ(x W_x + h W_h + b),  g = tanh(…)        c ← f c + i g        h ← o tanh(c)

Only ``h W_h`` and the gates recur, so only they are inside the scan (Appleyard, Kočiský & Blunsom 2016, *Optimizing
performance of recurrent neural networks on GPUs*): the product with the inputs is one for all steps before it, and in the
backward pass the scan computes the cotangents of the gates alone; every weight's gradient is one product after it.
What the window keeps for its backward pass is the gates, the cells and, as its output, h: six numbers a unit and step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes
from tbptt_jax.lstm.gpu import Loops, cudnn
from tbptt_jax.lstm.weights import GATES, Weights
from tbptt_jax.recurrence import scale_cotangent


def scanned(
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    edges: jax.Array | None = None,
) -> tuple[tuple, jax.Array]:
    """The window as a plain scan: ``carry, x [lanes, time, inputs] -> carry, h [lanes, time, outputs]``."""
    dot = functools.partial(_dot, dtype)
    from_inputs = dot(x, weights.input) + weights.bias

    def step(carry: tuple, at_t: tuple) -> tuple[tuple, jax.Array]:
        from_input, reset, is_valid, edge = at_t
        before = c, h = _reset(carry if edge is None else scale_cotangent(edge, carry), reset)
        i, f, g, o = jnp.split(_gates(from_input + dot(h, weights.recurrent)), 4, -1)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        h = h if weights.projection is None else dot(h, weights.projection)
        carry = (c, h) if is_valid is None else where_lanes(is_valid, (c, h), before)
        return carry, carry[1]

    carry, h = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), (from_inputs, resets, valid, edges)))
    return carry, h.swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fused(
    loops: Loops,
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[tuple, jax.Array]:
    """:func:`scanned`, with its backward pass written out, around what recurs."""
    return scanned(dtype, weights, carry, x, resets, valid)  # not differentiated: nothing to keep


def _forward(
    loops: Loops,
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[tuple, tuple]:
    after, gates, cells, hs = loops.forward(dtype, weights, carry, _dot(dtype, x, weights.input), resets, valid)
    return (after, hs), (weights, carry, x, resets, valid, gates, cells, hs)


def _backward(loops: Loops, dtype: Any, residuals: tuple, cotangents: tuple) -> tuple:
    """Linear in the cotangents by construction, scan and all, so that JAX can transpose it into forward mode."""
    weights, carry, x, resets, valid, gates, cells, hs = residuals
    after, d_hs = cotangents

    # The cell's derivatives, of all steps at once: only products are left to the loop. Where the carry stands still its
    # cotangent does too, and nothing goes back through a reset.
    i, f, g, o = jnp.split(gates, 4, -1)
    squashed = jnp.tanh(cells)
    c_before, h_before = (
        jnp.concatenate([start[:, None], each[:, :-1]], 1) for start, each in zip(carry, (cells, hs), strict=True)
    )
    c_before, h_before = _reset((c_before, h_before), resets)
    # dc/di, dc/df, dc/dg and dh/do, before the activations; side by side in one array they would take four times as long
    by_gate = g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), squashed * o * (1 - o)
    by_cell, kept = o * (1 - squashed * squashed), f  # dh/dc, dc/dc_before
    if valid is not None:
        by_gate, by_cell = _reset((by_gate, by_cell), ~valid)
        kept = where_lanes(valid, kept, jnp.ones_like(kept))
    (kept,) = _reset((kept,), resets)

    d_carry, d_gates, d_outputs = loops.backward(
        dtype, weights, after, d_hs, gates, by_gate, by_cell, kept, resets, valid
    )
    d_projection = None if d_outputs is None else _over_steps(dtype, o * squashed, d_outputs)
    d_weights = Weights(
        _over_steps(dtype, x, d_gates), _over_steps(dtype, h_before, d_gates), d_gates.sum((0, 1)), d_projection
    )
    return d_weights, d_carry, _dot(dtype, d_gates, weights.input.T), None, None


fused.defvjp(_forward, _backward)


def _scan_forward(
    dtype: Any, weights: Weights, carry: tuple, gates: jax.Array, resets: jax.Array | None, valid: jax.Array | None
) -> tuple[tuple, jax.Array, jax.Array, jax.Array]:
    dot = functools.partial(_dot, dtype)
    times_recurrent = _times(dtype, weights.recurrent, gates.shape[0])

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        carry, gates, cells, hs = state
        before = c, h = _reset(carry, _at(resets, t))
        # The gates take the place of the products they come from: the largest array of the window exists once. All four
        # are one elementwise pass, and lanes lead as they do outside, so nothing is transposed.
        activated = _gates(_at(gates, t) + (times_recurrent(h) + weights.bias))
        i, f, g, o = jnp.split(activated, 4, -1)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        h = h if weights.projection is None else dot(h, weights.projection)
        carry = c, h = (c, h) if valid is None else where_lanes(_at(valid, t), (c, h), before)
        return (carry, _put(gates, activated, t), _put(cells, c, t), _put(hs, h, t)), None

    cells, hs = (jnp.zeros((*gates.shape[:2], each.shape[-1]), gates.dtype) for each in carry)
    return lax.scan(step, (carry, gates, cells, hs), jnp.arange(gates.shape[1]))[0]


def _scan_backward(
    dtype: Any,
    weights: Weights,
    d_carry: tuple,
    d_hs: jax.Array,
    gates: jax.Array,
    by_gate: tuple,
    by_cell: jax.Array,
    kept: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[tuple, jax.Array, jax.Array | None]:
    dot = functools.partial(_dot, dtype)
    times_transposed = _times(dtype, weights.recurrent.T, d_hs.shape[0])
    down = None if weights.projection is None else weights.projection.T

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        (d_c, d_h), d_gates, d_outputs = state
        d_h = d_output = d_h + _at(d_hs, t)
        if valid is not None:
            (d_output,) = _reset((d_output,), ~_at(valid, t))
        if down is not None:
            d_outputs = _put(d_outputs, d_output, t)
            d_output = dot(d_output, down)
        d_c = d_c + d_output * _at(by_cell, t)
        of_gates = (d_c, d_c, d_c, d_output)
        d_activated = jnp.concatenate([_at(by, t) * d for by, d in zip(by_gate, of_gates, strict=True)], -1)
        d_before = times_transposed(d_activated)
        if valid is not None:
            d_before = where_lanes(_at(valid, t), d_before, d_h)
        (d_before,) = _reset((d_before,), _at(resets, t))
        return ((d_c * _at(kept, t), d_before), _put(d_gates, d_activated, t), d_outputs), None

    # The cotangents of the gates take the place of the gates, whose derivatives are all there is left to know of them.
    start = d_carry, gates, None if down is None else jnp.zeros_like(d_hs)
    return lax.scan(step, start, jnp.arange(d_hs.shape[1]), reverse=True)[0]


SCANS = Loops(_scan_forward, _scan_backward)


def by_cudnn(weights: Weights, carry: tuple, x: jax.Array, resets: jax.Array | None) -> tuple[tuple, jax.Array]:
    """cuDNN knows no resets: one at the window's start is an initial carry, and for others the scan is there."""
    if resets is None:
        return cudnn(weights, carry, x)
    carry = _reset(carry, resets[:, 0])
    within = resets[:, 1:].any()
    scans = functools.partial(fused, SCANS, None)
    return lax.cond(within, lambda: scans(weights, carry, x, resets, None), lambda: cudnn(weights, carry, x))


def _gates(x: jax.Array) -> jax.Array:
    """σ, σ, tanh, σ of four blocks side by side, as one pass: σ(x) = (1 + tanh(x / 2)) / 2."""
    candidate = jnp.arange(x.shape[-1]) // (x.shape[-1] // 4) == GATES.index("g")
    scale = jnp.where(candidate, 1, 0.5).astype(x.dtype)
    return jnp.tanh(x * scale) * scale + (1 - scale)


def _dot(dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """``a [..., k] @ b [k, n]``: operands in ``dtype``, sums and result in that of ``a``."""
    result = a.dtype
    if dtype is not None:
        a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=result)


def _times(dtype: Any, w: jax.Array, lanes: int) -> Callable[[jax.Array], jax.Array]:
    """``x [lanes, k] -> x @ w``, for a loop: ``w [k, n]`` is laid out before it, as the products read it fastest.

    Where the layouts change places was found on two cores with 32 MiB of cache, by products of 8 to 64 rows with the
    weights of 512 to 2048 units; ``python -m benchmarks.speed --parts=window`` has shapes on either side.
    """
    on_cpu = jax.default_backend() == "cpu" and dtype is None and w.dtype == jnp.float32
    return _times_tiles(w) if on_cpu and w.nbytes >= 16 << 20 and lanes <= 32 else _times_rows(dtype, w)


def _times_rows(dtype: Any, w: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Rows filled up to whole vectors of 16: of rows of 1150 floats a product reads a sixth slower than of 1152."""
    n = w.shape[1]
    w = jnp.pad(w if dtype is None else w.astype(dtype), ((0, 0), (0, -n % 16)))
    return lambda x: _dot(dtype, x, w)[:, :n]


def _times_tiles(w: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Tiles of 64 columns, each in one piece of memory.

    A CPU's product of few rows goes through ``w`` 64 columns at a time, from row to row: once ``w`` no longer fits into the
    caches, each row of a wide ``w`` is a jump that no prefetch foresees, and a tile is a straight line. The tiles are a
    batch whose every product has the same x; in quarters of k that are then summed, because XLA hands a sum over to the
    library with the products and the repetition of x before it, and would else write x out again for every tile. Two
    halves of the columns, so that two cores have as much to do.
    """
    k, n = w.shape
    w = jnp.pad(w, ((0, -k % 4), (0, -n % 128)))
    # In this order one pass over w does it: [half, tile, quarter, k / 4, 64].
    tiles = w.reshape(len(w), -1, 64).swapaxes(0, 1).reshape(2, -1, 4, len(w) // 4, 64)

    def times(x: jax.Array) -> jax.Array:
        quarters = jnp.pad(x, ((0, 0), (0, -k % 4))).reshape(len(x), 4, -1).swapaxes(0, 1)
        repeated = jnp.broadcast_to(quarters, (*tiles.shape[:2], *quarters.shape))
        product = lax.dot_general(repeated, tiles, (((4,), (3,)), ((0, 1, 2), (0, 1, 2)))).sum(2)
        return product.transpose(2, 0, 1, 3).reshape(len(x), -1)[:, :n]

    return times


def _over_steps(dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """``[lanes, time, m]``, ``[lanes, time, n]`` → ``[m, n]``, summed over lanes and steps: a weight's gradient."""
    return _dot(dtype, a.reshape(-1, a.shape[-1]).T, b.reshape(-1, b.shape[-1]))


def _reset(tree: tuple, reset: jax.Array | None) -> tuple:
    """Zeros where ``reset``, ``[lanes]`` or ``[lanes, time]``, is True."""
    return tree if reset is None else where_lanes(reset, jax.tree.map(jnp.zeros_like, tree), tree)


def _at(x: jax.Array | None, t: jax.Array) -> Any:
    return None if x is None else lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


def _put(x: jax.Array, value: jax.Array, t: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, t, 1)
