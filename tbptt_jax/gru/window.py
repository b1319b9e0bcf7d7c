"""The GRU whose window is one operation (Cho et al. 2014, *Learning phrase representations using RNN encoder–decoder*).

    r, z = σ(x W_x + h W_h + b),   n = tanh(x W_x + b + r ∘ (h W_h + c)),   h ← (1 − z) n + z h

as cuDNN, PyTorch and Flax have it, the reset gate after the matrix; without c it is before it: n = tanh(x W_x + b + (r h) W_h).

Only what is multiplied by h recurs, as in :mod:`tbptt_jax.lstm.window`: the product with the inputs is one for all steps
before the scan, and in the backward pass the scan computes cotangents alone; every weight's gradient is one product after
it. What the window keeps for its backward pass is the gates, h, and what the reset gate multiplies, if that is not h: five
numbers a unit and step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes
from tbptt_jax.gru.weights import Weights
from tbptt_jax.products import at, dot, over_steps, put, times, zero_where
from tbptt_jax.recurrence import scale_cotangent


def scanned(
    dtype: Any,
    weights: Weights,
    carry: jax.Array,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    edges: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The window as a plain scan: ``carry, x [lanes, time, inputs] -> carry, h [lanes, time, features]``."""
    cell = _cell(dtype, weights, x.shape[0])

    def step(h: jax.Array, at_t: tuple) -> tuple[jax.Array, jax.Array]:
        from_input, reset, is_valid, edge = at_t
        (before,) = zero_where((h if edge is None else scale_cotangent(edge, h),), reset)
        *_, h = cell(from_input, before)
        h = h if is_valid is None else where_lanes(is_valid, h, before)
        return h, h

    from_inputs = dot(dtype, x, weights.input)
    carry, h = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), (from_inputs, resets, valid, edges)))
    return carry, h.swapaxes(0, 1)


def _cell(dtype: Any, weights: Weights, lanes: int) -> Callable[[jax.Array, jax.Array], tuple]:
    """``from_input [lanes, 3 * features], h -> r and z, n, what r multiplies or is multiplied into, h``, for a loop."""
    features = weights.recurrent.shape[0]
    gates, candidate = jnp.split(weights.recurrent, [2 * features], 1)
    of_all, of_gates, of_candidate = (
        functools.partial(times, dtype, w, lanes) for w in (weights.recurrent, gates, candidate)
    )

    if weights.recurrent_bias is None:
        of_gates, of_candidate = of_gates(), of_candidate()
    else:
        of_all = of_all()

    def cell(from_input: jax.Array, h: jax.Array) -> tuple:
        from_input = from_input + weights.bias
        if weights.recurrent_bias is None:
            r_z = _sigmoid(from_input[:, : 2 * features] + of_gates(h))
            r, z = jnp.split(r_z, 2, 1)
            inner = None
            n = jnp.tanh(from_input[:, 2 * features :] + of_candidate(r * h))
        else:
            from_h = of_all(h)
            r_z = _sigmoid(from_input[:, : 2 * features] + from_h[:, : 2 * features])
            r, z = jnp.split(r_z, 2, 1)
            inner = from_h[:, 2 * features :] + weights.recurrent_bias
            n = jnp.tanh(from_input[:, 2 * features :] + r * inner)
        return r_z, n, inner, n + z * (h - n)

    return cell


def _sigmoid(x: jax.Array) -> jax.Array:
    return jnp.tanh(x / 2) / 2 + 0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(
    dtype: Any,
    weights: Weights,
    carry: jax.Array,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`scanned`, with its backward pass written out, around what recurs."""
    return scanned(dtype, weights, carry, x, resets, valid)  # not differentiated: nothing to keep


def _forward(
    dtype: Any,
    weights: Weights,
    carry: jax.Array,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[tuple, tuple]:
    cell = _cell(dtype, weights, x.shape[0])

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        h, gates, inners, hs = state
        (before,) = zero_where((h,), at(resets, t))
        # The gates take the place of the products they come from, and lanes lead as they do outside.
        r_z, n, inner, h = cell(at(gates, t), before)
        h = h if valid is None else where_lanes(at(valid, t), h, before)
        gates = put(gates, jnp.concatenate([r_z, n], 1), t)
        return (h, gates, None if inner is None else put(inners, inner, t), put(hs, h, t)), None

    gates = dot(dtype, x, weights.input)
    blank = jnp.zeros((*x.shape[:2], carry.shape[-1]), gates.dtype)
    start = carry, gates, None if weights.recurrent_bias is None else blank, blank
    after, gates, inners, hs = lax.scan(step, start, jnp.arange(x.shape[1]))[0]
    return (after, hs), (weights, carry, x, resets, valid, gates, inners, hs)


def _backward(dtype: Any, residuals: tuple, cotangents: tuple) -> tuple:
    """Linear in the cotangents by construction, scan and all, so that JAX can transpose it into forward mode."""
    weights, carry, x, resets, valid, gates, inners, hs = residuals
    d_carry, d_hs = cotangents
    features = carry.shape[-1]

    # The cell's derivatives, of all steps at once: only products are left to the loop. Where the carry stands still its
    # cotangent does too, and nothing goes back through a reset.
    after = weights.recurrent_bias is not None
    r, z, n = jnp.split(gates, 3, -1)
    (h_before,) = zero_where((jnp.concatenate([carry[:, None], hs[:, :-1]], 1),), resets)
    by_n = (1 - z) * (1 - n * n)  # dh/d(what tanh is taken of), and so on: before the activations
    by_z = (h_before - n) * z * (1 - z)
    by_r = (by_n * inners if after else h_before) * r * (1 - r)
    by_inner = by_n * r if after else by_n
    kept = z
    if valid is not None:
        by_n, by_z, by_r, by_inner = zero_where((by_n, by_z, by_r, by_inner), ~valid)
        kept = where_lanes(valid, kept, jnp.ones_like(kept))
    into = functools.partial(times, dtype, lanes=x.shape[0])
    if after:
        into_all = into(weights.recurrent.T)
    else:
        into_gates, into_candidate = (into(w.T) for w in jnp.split(weights.recurrent, [2 * features], 1))

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        d_h, d_gates, d_sums = state
        d_h = d_h + at(d_hs, t)
        d_z, d_inner = at(by_z, t) * d_h, at(by_inner, t) * d_h
        if after:
            d_all = jnp.concatenate([at(by_r, t) * d_h, d_z, d_inner], -1)
            d_before = into_all(d_all)
        else:
            d_reset = into_candidate(d_inner)
            d_all = jnp.concatenate([at(by_r, t) * d_reset, d_z, d_inner], -1)
            d_before = into_gates(d_all[:, : 2 * features]) + at(r, t) * d_reset
        (d_before,) = zero_where((d_before + at(kept, t) * d_h,), at(resets, t))
        return (d_before, put(d_gates, d_all, t), put(d_sums, d_h, t) if after else None), None

    # The cotangents take the places of the gates and of what the reset gate multiplies, which the loop does not read.
    d_carry, d_gates, d_sums = lax.scan(step, (d_carry, gates, inners), jnp.arange(x.shape[1]), reverse=True)[0]
    d_r_z, d_inner = jnp.split(d_gates, [2 * features], -1)
    if after:
        d_into = jnp.concatenate([d_r_z, by_n * d_sums], -1)
        d_recurrent = over_steps(dtype, h_before, d_gates)
    else:
        d_into = d_gates
        d_recurrent = jnp.concatenate([over_steps(dtype, h_before, d_r_z), over_steps(dtype, r * h_before, d_inner)], -1)
    d_weights = Weights(
        over_steps(dtype, x, d_into),
        d_recurrent,
        d_into.sum((0, 1)),
        d_inner.sum((0, 1)) if after else None,
    )
    return d_weights, d_carry, dot(dtype, d_into, weights.input.T), None, None


fused.defvjp(_forward, _backward)
