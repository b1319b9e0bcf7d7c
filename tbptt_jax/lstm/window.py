"""The LSTM whose window is one operation (Hochreiter & Schmidhuber 1997, *Long short-term memory*).

    i, f, o = σ(x W_x + h W_h + b),  g = tanh(…)        c ← f c + i g        h ← o tanh(c)

Only ``h W_h`` and the gates recur, so only they are inside the scan (Appleyard, Kočiský & Blunsom 2016, *Optimizing
performance of recurrent neural networks on GPUs*): the product with the inputs is one for all steps before it, and in the
backward pass the scan computes the cotangents of the gates alone; every weight's gradient is one product after it.
What the window keeps for its backward pass is the gates, the cells and, as its output, h: six numbers a unit and step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes
from tbptt_jax.lstm.gpu import Loops, cudnn
from tbptt_jax.lstm.weights import GATES, Weights
from tbptt_jax.products import at, dot, over_steps, put, times, zero_where
from tbptt_jax.recurrence import scale_cotangent


def scanned(
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    edges: jax.Array | None = None,
    starts: tuple | None = None,
) -> tuple[tuple, jax.Array]:
    """The window as a plain scan: ``carry, x [lanes, time, inputs] -> carry, h [lanes, time, outputs]``.

    ``starts``, a carry ``[lanes, time, ...]``, is what a reset returns to; None: zeros.
    """
    from_inputs = dot(dtype, x, weights.input) + weights.bias

    def step(carry: tuple, at_t: tuple) -> tuple[tuple, jax.Array]:
        from_input, reset, is_valid, edge, start = at_t
        carry = carry if edge is None else scale_cotangent(edge, carry)
        before = c, h = zero_where(carry, reset) if start is None or reset is None else where_lanes(reset, start, carry)
        i, f, g, o = jnp.split(_gates(from_input + dot(dtype, h, weights.recurrent)), 4, -1)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        h = h if weights.projection is None else dot(dtype, h, weights.projection)
        carry = (c, h) if is_valid is None else where_lanes(is_valid, (c, h), before)
        return carry, carry[1]

    carry, h = lax.scan(
        step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), (from_inputs, resets, valid, edges, starts))
    )
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
    after, gates, cells, hs = loops.forward(dtype, weights, carry, dot(dtype, x, weights.input), resets, valid)
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
    c_before, h_before = zero_where((c_before, h_before), resets)
    # dc/di, dc/df, dc/dg and dh/do, before the activations; side by side in one array they would take four times as long
    by_gate = g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), squashed * o * (1 - o)
    by_cell, kept = o * (1 - squashed * squashed), f  # dh/dc, dc/dc_before
    if valid is not None:
        by_gate, by_cell = zero_where((by_gate, by_cell), ~valid)
        kept = where_lanes(valid, kept, jnp.ones_like(kept))
    (kept,) = zero_where((kept,), resets)

    d_carry, d_gates, d_outputs = loops.backward(
        dtype, weights, after, d_hs, gates, by_gate, by_cell, kept, resets, valid
    )
    d_projection = None if d_outputs is None else over_steps(dtype, o * squashed, d_outputs)
    d_weights = Weights(
        over_steps(dtype, x, d_gates), over_steps(dtype, h_before, d_gates), d_gates.sum((0, 1)), d_projection
    )
    return d_weights, d_carry, dot(dtype, d_gates, weights.input.T), None, None


fused.defvjp(_forward, _backward)


def _scan_forward(
    dtype: Any, weights: Weights, carry: tuple, gates: jax.Array, resets: jax.Array | None, valid: jax.Array | None
) -> tuple[tuple, jax.Array, jax.Array, jax.Array]:
    times_recurrent = times(dtype, weights.recurrent, gates.shape[0])

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        carry, gates, cells, hs = state
        before = c, h = zero_where(carry, at(resets, t))
        # The gates take the place of the products they come from: the largest array of the window exists once. All four
        # are one elementwise pass, and lanes lead as they do outside, so nothing is transposed.
        activated = _gates(at(gates, t) + (times_recurrent(h) + weights.bias))
        i, f, g, o = jnp.split(activated, 4, -1)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        h = h if weights.projection is None else dot(dtype, h, weights.projection)
        carry = c, h = (c, h) if valid is None else where_lanes(at(valid, t), (c, h), before)
        return (carry, put(gates, activated, t), put(cells, c, t), put(hs, h, t)), None

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
    times_transposed = times(dtype, weights.recurrent.T, d_hs.shape[0])
    down = None if weights.projection is None else weights.projection.T

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        (d_c, d_h), d_gates, d_outputs = state
        d_h = d_output = d_h + at(d_hs, t)
        if valid is not None:
            (d_output,) = zero_where((d_output,), ~at(valid, t))
        if down is not None:
            d_outputs = put(d_outputs, d_output, t)
            d_output = dot(dtype, d_output, down)
        d_c = d_c + d_output * at(by_cell, t)
        of_gates = (d_c, d_c, d_c, d_output)
        d_activated = jnp.concatenate([at(by, t) * d for by, d in zip(by_gate, of_gates, strict=True)], -1)
        d_before = times_transposed(d_activated)
        if valid is not None:
            d_before = where_lanes(at(valid, t), d_before, d_h)
        (d_before,) = zero_where((d_before,), at(resets, t))
        return ((d_c * at(kept, t), d_before), put(d_gates, d_activated, t), d_outputs), None

    # The cotangents of the gates take the place of the gates, whose derivatives are all there is left to know of them.
    start = d_carry, gates, None if down is None else jnp.zeros_like(d_hs)
    return lax.scan(step, start, jnp.arange(d_hs.shape[1]), reverse=True)[0]


SCANS = Loops(_scan_forward, _scan_backward)


def by_cudnn(weights: Weights, carry: tuple, x: jax.Array, resets: jax.Array | None) -> tuple[tuple, jax.Array]:
    """cuDNN knows no resets: one at the window's start is an initial carry, and for others the scan is there."""
    if resets is None:
        return cudnn(weights, carry, x)
    carry = zero_where(carry, resets[:, 0])
    within = resets[:, 1:].any()
    scans = functools.partial(fused, SCANS, None)
    return lax.cond(within, lambda: scans(weights, carry, x, resets, None), lambda: cudnn(weights, carry, x))


def _gates(x: jax.Array) -> jax.Array:
    """σ, σ, tanh, σ of four blocks side by side, as one pass: σ(x) = (1 + tanh(x / 2)) / 2."""
    candidate = jnp.arange(x.shape[-1]) // (x.shape[-1] // 4) == GATES.index("g")
    scale = jnp.where(candidate, 1, 0.5).astype(x.dtype)
    return jnp.tanh(x * scale) * scale + (1 - scale)
