"""The LSTM whose window is one operation (Hochreiter & Schmidhuber 1997, *Long short-term memory*).

    i, f, o = σ(x W_x + h W_h + b),  g = tanh(…)        c ← f c + i g        h ← o tanh(c)

Only ``h W_h`` and the gates recur, so only they are inside the scan (Appleyard, Kočiský & Blunsom 2016, *Optimizing
performance of recurrent neural networks on GPUs*): the product with the inputs is one for all steps before it, and in the
backward pass the scan computes the cotangents of the gates alone; every weight's gradient is one product after it.
What the window keeps for its backward pass is the gates, the cells and, as its output, h: six numbers a unit and step.

With layer normalisation (Ba, Kiros & Hinton 2016, eq. 20 to 22)

    i, f, o = σ(LN(x W_x) + LN(h W_h) + b),  g = tanh(…)        h ← o tanh(LN(c))

the weights are centred, not the products: where the columns of W have a mean of 0, so has every product. Both products are
kept too, eight numbers more.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes
from tbptt_jax.cells.lstm.gpu import Loops, cudnn
from tbptt_jax.cells.lstm.weights import GATES, LayerNorm, Weights
from tbptt_jax.cells.products import at, dot, over_steps, put, times, zero_where
from tbptt_jax.cells.zoneout import blend, with_padding
from tbptt_jax.recurrence import scale_cotangent

EPSILON = 1e-5  # of layer normalisation, added to the variance


class Zoneout(NamedTuple):
    """What stands still in each step, as :mod:`tbptt_jax.cells.zoneout` has it.

    Attributes:
      c: bool ``[lanes, time, features]``, or floats ``[1, time, 1]``, or None.
      h: likewise, bool ``[lanes, time, outputs]``. Its new value is made of the new c, whatever of that stands still.
    """

    c: jax.Array | None
    h: jax.Array | None


NONE = Zoneout(None, None)


def scanned(
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    edges: jax.Array | None = None,
    starts: tuple | None = None,
    zoneout: Zoneout = NONE,
) -> tuple[tuple, jax.Array]:
    """The window as a plain scan: ``carry, x [lanes, time, inputs] -> carry, h [lanes, time, outputs]``.

    ``starts``, a carry ``[lanes, time, ...]``, is what a reset returns to; None: zeros.
    """
    norm = weights.norm
    from_inputs = dot(dtype, x, weights.input)
    from_inputs = from_inputs if norm is None else _scaled(_centred(from_inputs), norm.input)[0]

    def step(carry: tuple, at_t: tuple) -> tuple[tuple, jax.Array]:
        from_input, reset, edge, start, kept = at_t
        carry = carry if edge is None else scale_cotangent(edge, carry)
        before = c, h = zero_where(carry, reset) if start is None or reset is None else where_lanes(reset, start, carry)
        from_h = dot(dtype, h, weights.recurrent)
        from_h = from_h if norm is None else _scaled(_centred(from_h), norm.recurrent)[0]
        i, f, g, o = jnp.split(_gates(from_input + weights.bias + from_h), 4, -1)
        c = f * c + i * g
        read = c if norm is None else _scaled(_centred(c), norm.cell)[0] + norm.cell_bias
        h = o * jnp.tanh(read)
        h = h if weights.projection is None else dot(dtype, h, weights.projection)
        carry = tuple(blend(*each) for each in zip(kept, before, (c, h), strict=True))
        return carry, carry[1]

    per_step = from_inputs, resets, edges, starts, Zoneout(*(with_padding(kept, valid) for kept in zoneout))
    carry, h = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), per_step))
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
    zoneout: Zoneout = NONE,
) -> tuple[tuple, jax.Array]:
    """:func:`scanned`, with its backward pass written out, around what recurs."""
    return scanned(dtype, weights, carry, x, resets, valid, zoneout=zoneout)  # not differentiated: nothing to keep


def _forward(
    loops: Loops,
    dtype: Any,
    weights: Weights,
    carry: tuple,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    zoneout: Zoneout,
) -> tuple[tuple, tuple]:
    products = scale = None
    if weights.norm is None:
        from_inputs = dot(dtype, x, weights.input)
    else:
        products = dot(dtype, x, _centred(weights.input))
        from_inputs, scale = _scaled(products, weights.norm.input)
    after, *kept = loops.forward(dtype, weights, carry, from_inputs, resets, valid, zoneout)
    return (after, kept[2]), (weights, carry, x, resets, valid, zoneout, (products, scale), *kept)


def _backward(loops: Loops, dtype: Any, residuals: tuple, cotangents: tuple) -> tuple:
    """Linear in the cotangents by construction, scan and all, so that JAX can transpose it into forward mode."""
    weights, carry, x, resets, valid, zoneout, of_inputs, gates, cells, hs, of_h = residuals
    after, d_hs = cotangents
    norm = weights.norm

    # The cell's derivatives, of all steps at once: only products are left to the loop. Where the carry stands still its
    # cotangent does too, and nothing goes back through a reset.
    i, f, g, o = jnp.split(gates, 4, -1)
    c_before, h_before = (
        jnp.concatenate([start[:, None], each[:, :-1]], 1) for start, each in zip(carry, (cells, hs), strict=True)
    )
    c_before, h_before = zero_where((c_before, h_before), resets)
    read = cells if zoneout.c is None else f * c_before + i * g  # the new c, before zoneout
    norms = None
    if norm is not None:
        centred = _centred(read)
        read, scale = _scaled(centred, norm.cell)
        norms, read = (of_inputs, of_h, (centred, scale)), read + norm.cell_bias
    squashed = jnp.tanh(read)
    # dc/di, dc/df, dc/dg and dh/do, before the activations; side by side in one array they would take four times as long
    by_gate = g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), squashed * o * (1 - o)
    by_cell, kept = o * (1 - squashed * squashed), f  # dh/dc, dc/dc_before
    if valid is not None:
        by_gate, by_cell = zero_where((by_gate, by_cell), ~valid)
        kept = where_lanes(valid, kept, jnp.ones_like(kept))
    (kept,) = zero_where((kept,), resets)

    d_carry, d_gates, d_outputs, shared, d_norm = loops.backward(
        dtype, weights, after, d_hs, gates, by_gate, by_cell, kept, resets, valid, zoneout, norms
    )
    d_projection = None if d_outputs is None else over_steps(dtype, o * squashed, d_outputs)
    d_from_inputs = d_from_h = d_gates
    if norm is not None:
        d_from_inputs = _scaled_backward(of_inputs, norm.input, d_gates)[0]
        d_from_h = _along(of_h, norm.recurrent, d_gates, shared)
    d_input, d_recurrent = over_steps(dtype, x, d_from_inputs), over_steps(dtype, h_before, d_from_h)
    into = weights.input
    if norm is not None:
        d_input, d_recurrent, into = map(_centred, (d_input, d_recurrent, into))
    d_weights = Weights(d_input, d_recurrent, d_gates.sum((0, 1)), d_projection, d_norm)
    return d_weights, d_carry, dot(dtype, d_from_inputs, into.T), None, None, None


fused.defvjp(_forward, _backward)


def _scan_forward(
    dtype: Any,
    weights: Weights,
    carry: tuple,
    gates: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    zoneout: Zoneout,
) -> tuple[tuple, jax.Array, jax.Array, jax.Array, tuple | None]:
    norm, zoneout = weights.norm, Zoneout(*(with_padding(kept, valid) for kept in zoneout))
    recurrent = weights.recurrent if norm is None else _centred(weights.recurrent)
    times_recurrent = times(dtype, recurrent, gates.shape[0])

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        carry, gates, cells, hs, of_h = state
        before = c, h = zero_where(carry, at(resets, t))
        # The gates take the place of the products they come from: the largest array of the window exists once. All four
        # are one elementwise pass, and lanes lead as they do outside, so nothing is transposed.
        from_h = times_recurrent(h)
        if norm is not None:
            product = from_h
            from_h, scale = _scaled(product, norm.recurrent)
            of_h = put(of_h[0], product, t), put(of_h[1], scale, t)
        activated = _gates(at(gates, t) + (from_h + weights.bias))
        i, f, g, o = jnp.split(activated, 4, -1)
        c = f * c + i * g
        h = o * jnp.tanh(c if norm is None else _scaled(_centred(c), norm.cell)[0] + norm.cell_bias)
        h = h if weights.projection is None else dot(dtype, h, weights.projection)
        carry = c, h = tuple(blend(at(each, t), *of) for each, *of in zip(zoneout, before, (c, h), strict=True))
        return (carry, put(gates, activated, t), put(cells, c, t), put(hs, h, t), of_h), None

    cells, hs = (jnp.zeros((*gates.shape[:2], each.shape[-1]), gates.dtype) for each in carry)
    of_h = None if norm is None else (jnp.zeros_like(gates), jnp.zeros((*gates.shape[:2], 1), gates.dtype))
    return lax.scan(step, (carry, gates, cells, hs, of_h), jnp.arange(gates.shape[1]))[0]


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
    zoneout: Zoneout,
    norms: tuple | None,
) -> tuple[tuple, jax.Array, jax.Array | None, jax.Array | None, LayerNorm | None]:
    norm, zoneout = weights.norm, Zoneout(*(with_padding(kept, valid) for kept in zoneout))
    recurrent = weights.recurrent if norm is None else _centred(weights.recurrent)
    times_transposed = times(dtype, recurrent.T, d_hs.shape[0])
    down = None if weights.projection is None else weights.projection.T

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        (d_c, d_h), d_gates, d_outputs, shared, d_norm = state
        d_h = d_output = d_h + at(d_hs, t)
        c_kept, h_kept = (at(each, t) for each in zoneout)
        d_output = blend(h_kept, jnp.zeros_like(d_output), d_output)
        if down is not None:
            d_outputs = put(d_outputs, d_output, t)
            d_output = dot(dtype, d_output, down)
        d_read = d_output * at(by_cell, t)
        if norm is not None:
            of_inputs, of_h, of_cell = jax.tree.map(lambda x: at(x, t), norms)
            d_bias, d_read = d_read, _centred(_scaled_backward(of_cell, norm.cell, d_read)[0])
        d_new = blend(c_kept, jnp.zeros_like(d_c), d_c) + d_read
        of_gates = (d_new, d_new, d_new, d_output)
        d_activated = jnp.concatenate([at(by, t) * d for by, d in zip(by_gate, of_gates, strict=True)], -1)
        d_product = d_activated
        if norm is not None:
            d_product, along = _scaled_backward(of_h, norm.recurrent, d_activated)
            shared = put(shared, along, t)
            of_all = zip((d_activated, d_activated, d_bias), (of_inputs, of_h, of_cell), strict=True)
            gains = [d * (x * scale) for d, (x, scale) in of_all]
            d_norm = jax.tree.map(jnp.add, d_norm, LayerNorm(gains[0], gains[1], gains[2], d_bias))
        d_before = [d_new * at(kept, t), times_transposed(d_product)]
        for n, (stays, d) in enumerate(zip((c_kept, h_kept), (d_c, d_h), strict=True)):
            if stays is not None:
                d_before[n] += blend(stays, d, jnp.zeros_like(d))
        d_carry = zero_where(tuple(d_before), at(resets, t))
        return (d_carry, put(d_gates, d_activated, t), d_outputs, shared, d_norm), None

    # The cotangents of the gates take the place of the gates, whose derivatives are all there is left to know of them.
    start = d_carry, gates, None if down is None else jnp.zeros_like(d_hs)
    shared = d_norm = None
    if norm is not None:
        shared = jnp.zeros_like(gates[..., :1])
        d_norm = jax.tree.map(lambda gain: jnp.zeros((len(gates), *gain.shape), gates.dtype), norm)
    *found, d_norm = lax.scan(step, (*start, shared, d_norm), jnp.arange(d_hs.shape[1]), reverse=True)[0]
    return (*found, jax.tree.map(lambda d: d.sum(0), d_norm))


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


def _centred(x: jax.Array) -> jax.Array:
    return x - _mean(x)


def _scaled(x: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Layer normalisation of what is centred, ``x [..., n]``, and the factor by which x was scaled, ``[..., 1]``."""
    scale = lax.rsqrt(_mean(x * x) + EPSILON)
    return x * (scale * gain), scale


def _scaled_backward(of: tuple, gain: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cotangent of x, but for its centring, and what its features share in it, ``[..., 1]``; of is x and its factor."""
    x, scale = of
    shared = scale**3 * ((d * x) @ (gain[:, None] / len(gain)))  # as a product, which has vectors to add
    return _along(of, gain, d, shared), shared


def _along(of: tuple, gain: jax.Array, d: jax.Array, shared: jax.Array) -> jax.Array:
    x, scale = of
    return d * (scale * gain) - x * shared


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(-1, keepdims=True)
