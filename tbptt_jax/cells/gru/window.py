"""The GRU whose window is one operation (Cho et al. 2014, *Learning phrase representations using RNN encoder–decoder*).

    r, z = σ(x W_x + h W_h + b),   n = tanh(x W_x + b + r (h W_h + c)),   h ← (1 − z) n + z h

as cuDNN, PyTorch and Flax have it: the reset gate comes after the matrix. Without c it comes before, n = tanh(x W_x + b +
(r h) W_h). With layer normalisation it is ``LN(x W_x)`` and ``LN(h W_h)`` (Ba et al. 2016, eq. 26 to 28), r and z as one
group, n as another; their centring is done to the weights, whose columns then have a mean of 0 in each group.

Only what is multiplied by h recurs, as in :mod:`tbptt_jax.cells.lstm.window`: the product with the inputs is one for all steps
before the scan, and in the backward pass the scan computes cotangents alone; every weight's gradient is one product after
it. What the window keeps for its backward pass is the gates, h, and what r multiplies, if that is not h: five numbers a
unit and step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes
from tbptt_jax.cells.gru.weights import LayerNorm, Weights
from tbptt_jax.cells.products import at, dot, over_steps, put, times, zero_where
from tbptt_jax.cells.zoneout import blend, with_padding
from tbptt_jax.recurrence import scale_cotangent

EPSILON = 1e-5  # of layer normalisation, added to the variance


def scanned(
    dtype: Any,
    weights: Weights,
    carry: jax.Array,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    edges: jax.Array | None = None,
    starts: jax.Array | None = None,
    zoneout: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The window as a plain scan: ``carry, x [lanes, time, inputs] -> carry, h [lanes, time, features]``.

    Args:
      starts: ``[lanes, time, features]``, what a reset returns to; None: zeros.
      zoneout: what stands still, as :func:`tbptt_jax.cells.zoneout.stays` draws it; None: nothing.
    """
    cell = _cell(dtype, weights, x.shape[0])

    def step(h: jax.Array, at_t: tuple) -> tuple[jax.Array, jax.Array]:
        from_input, reset, edge, start, stays = at_t
        h = h if edge is None else scale_cotangent(edge, h)
        if reset is not None:
            h = where_lanes(reset, jnp.zeros_like(h) if start is None else start, h)
        h = blend(stays, h, cell(from_input, h)[-1])
        return h, h

    per_step = _from_inputs(dtype, weights, x)[0], resets, edges, starts, with_padding(zoneout, valid)
    carry, h = lax.scan(step, carry, jax.tree.map(lambda x: x.swapaxes(0, 1), per_step))
    return carry, h.swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(
    dtype: Any,
    weights: Weights,
    carry: jax.Array,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    zoneout: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`scanned`, with its backward pass written out, around what recurs."""
    return scanned(dtype, weights, carry, x, resets, valid, zoneout=zoneout)  # not differentiated: nothing to keep


def _forward(
    dtype: Any,
    weights: Weights,
    carry: jax.Array,
    x: jax.Array,
    resets: jax.Array | None,
    valid: jax.Array | None,
    zoneout: jax.Array | None,
) -> tuple[tuple, tuple]:
    cell, stays = _cell(dtype, weights, x.shape[0]), with_padding(zoneout, valid)

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        h, gates, inners, hs = state
        (before,) = zero_where((h,), at(resets, t))
        # The gates take the place of the products they come from, and lanes lead as they do outside.
        activated, inner, h = cell(at(gates, t), before)
        h = blend(at(stays, t), before, h)
        inners = jax.tree.map(lambda all, one: put(all, one, t), inners, inner)
        return (h, put(gates, activated, t), inners, put(hs, h, t)), None

    from_inputs, of_inputs = _from_inputs(dtype, weights, x)
    hs = jnp.zeros((*x.shape[:2], carry.shape[-1]), from_inputs.dtype)
    inner = jax.eval_shape(lambda: cell(from_inputs[:, 0], carry)[1])
    inners = jax.tree.map(lambda x: jnp.zeros((*hs.shape[:2], *x.shape[1:]), x.dtype), inner)
    after, *kept = lax.scan(step, (carry, from_inputs, inners, hs), jnp.arange(x.shape[1]))[0]
    return (after, kept[-1]), (weights, carry, x, resets, valid, zoneout, of_inputs, *kept)


def _backward(dtype: Any, residuals: tuple, cotangents: tuple) -> tuple:
    """Linear in the cotangents by construction, scan and all, so that JAX can transpose it into forward mode."""
    weights, carry, x, resets, valid, zoneout, of_inputs, gates, inners, hs = residuals
    d_carry, d_hs = cotangents
    features, norm, after = carry.shape[-1], weights.norm, weights.recurrent_bias is not None
    input_weights, recurrent = _centred_weights(weights)
    into = functools.partial(times, dtype, lanes=x.shape[0])

    # The cell's derivatives, of all steps at once: only products are left to the loop. What stands still has its cotangent
    # stand still too, and nothing goes back through a reset.
    r, z, n = jnp.split(gates, 3, -1)
    (h_before,) = zero_where((jnp.concatenate([carry[:, None], hs[:, :-1]], 1),), resets)
    space, of_h = inners, inners
    if norm is not None:
        products, scales = of_h
        space = jnp.zeros_like(hs)
        inners = (products * scales[..., 1:] * norm.recurrent)[..., 2 * features :] + weights.recurrent_bias
    by_n = (1 - z) * (1 - n * n)  # dh/d(what tanh is taken of), and so on: before the activations
    by_z = (h_before - n) * z * (1 - z)
    stays = with_padding(zoneout, valid)
    by_n, by_z = (blend(stays, jnp.zeros_like(by), by) for by in (by_n, by_z))
    kept = blend(stays, jnp.ones_like(z), z)
    by_r = (by_n * inners if after else h_before) * r * (1 - r)
    by_inner = by_n * r if after else by_n
    if after:
        into_all = into(recurrent.T)
    else:
        into_gates, into_candidate = (into(w.T) for w in jnp.split(recurrent, [2 * features], 1))

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        d_h, d_gates, d_sums, shared, d_gain = state
        d_h = d_h + at(d_hs, t)
        d_z, d_inner = at(by_z, t) * d_h, at(by_inner, t) * d_h
        if after:
            d_all = jnp.concatenate([at(by_r, t) * d_h, d_z, d_inner], -1)
            d_product, d_sums = d_all, put(d_sums, d_h, t)
            if norm is not None:
                of_step = at(products, t), at(scales, t)
                own = _shared(of_step, norm.recurrent, d_all)
                d_product = _along(of_step, norm.recurrent, d_all, own)
                shared, d_gain = put(shared, own, t), d_gain + _of_gain(of_step, d_all)
            d_before = into_all(d_product)
        else:
            d_reset = into_candidate(d_inner)
            d_all = jnp.concatenate([at(by_r, t) * d_reset, d_z, d_inner], -1)
            d_before = into_gates(d_all[:, : 2 * features]) + at(r, t) * d_reset
        (d_before,) = zero_where((d_before + at(kept, t) * d_h,), at(resets, t))
        return (d_before, put(d_gates, d_all, t), d_sums, shared, d_gain), None

    # The cotangents take the places of the gates and of what r multiplies, which the loop does not read.
    more = (None, None) if norm is None else (jnp.zeros_like(scales), jnp.zeros_like(gates[:, 0]))
    start, steps = (d_carry, gates, space, *more), jnp.arange(x.shape[1])
    d_carry, d_gates, d_sums, shared, d_gain = lax.scan(step, start, steps, reverse=True)[0]
    d_r_z, d_inner = jnp.split(d_gates, [2 * features], -1)
    d_into = jnp.concatenate([d_r_z, by_n * d_sums], -1) if after else d_gates
    d_bias, d_recurrent_bias, d_norm = d_into.sum((0, 1)), d_inner.sum((0, 1)) if after else None, None
    d_products = d_gates if norm is None else _along(of_h, norm.recurrent, d_gates, shared)
    if after:
        d_recurrent = over_steps(dtype, h_before, d_products)
    else:
        d_recurrent = jnp.concatenate(
            [over_steps(dtype, h_before, d_r_z), over_steps(dtype, r * h_before, d_inner)], -1
        )
    if norm is not None:
        d_norm = LayerNorm(_of_gain(of_inputs, d_into).sum((0, 1)), d_gain.sum(0))
        d_into = _along(of_inputs, norm.input, d_into, _shared(of_inputs, norm.input, d_into))
    d_input = over_steps(dtype, x, d_into)
    if norm is not None:
        d_input, d_recurrent = _centred(d_input), _centred(d_recurrent)
    d_weights = Weights(d_input, d_recurrent, d_bias, d_recurrent_bias, d_norm)
    return d_weights, d_carry, dot(dtype, d_into, input_weights.T), None, None, None


fused.defvjp(_forward, _backward)


def _from_inputs(dtype: Any, weights: Weights, x: jax.Array) -> tuple[jax.Array, tuple | None]:
    """What the inputs give to the gates at all steps, and, where that is normalised, what it was made of."""
    products = dot(dtype, x, _centred_weights(weights)[0])
    if weights.norm is None:
        return products, None
    return _scaled(products, weights.norm.input)


def _cell(dtype: Any, weights: Weights, lanes: int) -> Callable[[jax.Array, jax.Array], tuple]:
    """``from_input [lanes, 3 * features], h -> r z n side by side, inner, h``, for a loop.

    inner is what r multiplies, with layer normalisation what that is made of, and nothing where r multiplies h.
    """
    features, norm, recurrent_bias = weights.recurrent.shape[0], weights.norm, weights.recurrent_bias
    _, recurrent = _centred_weights(weights)

    def activations(from_input: jax.Array, from_h: jax.Array) -> jax.Array:
        x = from_input[:, : 2 * features] + from_h[:, : 2 * features]
        return jnp.tanh(x / 2) / 2 + 0.5

    def reset_after(from_input: jax.Array, h: jax.Array) -> tuple:
        from_input, from_h, made_of = from_input + weights.bias, of_all(h), None
        if norm is not None:
            from_h, made_of = _scaled(from_h, norm.recurrent)
        r_z = activations(from_input, from_h)
        inner = from_h[:, 2 * features :] + jnp.asarray(recurrent_bias)
        n = jnp.tanh(from_input[:, 2 * features :] + r_z[:, :features] * inner)
        return jnp.concatenate([r_z, n], 1), inner if norm is None else made_of, n + r_z[:, features:] * (h - n)

    def reset_before(from_input: jax.Array, h: jax.Array) -> tuple:
        from_input = from_input + weights.bias
        r_z = activations(from_input, of_gates(h))
        n = jnp.tanh(from_input[:, 2 * features :] + of_candidate(r_z[:, :features] * h))
        return jnp.concatenate([r_z, n], 1), (), n + r_z[:, features:] * (h - n)

    if recurrent_bias is not None:
        of_all = times(dtype, recurrent, lanes)
        return reset_after
    of_gates, of_candidate = (times(dtype, w, lanes) for w in jnp.split(recurrent, [2 * features], 1))
    return reset_before


def _centred_weights(weights: Weights) -> tuple[jax.Array, jax.Array]:
    if weights.norm is None:
        return weights.input, weights.recurrent
    return _centred(weights.input), _centred(weights.recurrent)


def _centred(w: jax.Array) -> jax.Array:
    return w - _spread(_means(w), w.shape[-1])


def _scaled(x: jax.Array, gain: jax.Array) -> tuple[jax.Array, tuple]:
    """Layer normalisation of what is centred; and what it was made of: that, and the factors of its two groups, ``[..., 2]``."""
    scales = lax.rsqrt(_means(x * x) + EPSILON)
    return x * (_spread(scales, len(gain)) * gain), (x, scales)


def _along(of: tuple, gain: jax.Array, d: jax.Array, shared: jax.Array) -> jax.Array:
    """The cotangent of what :func:`_scaled` was given, from that of what it returned; ``shared`` by :func:`_shared`."""
    x, scales = of
    return d * (_spread(scales, len(gain)) * gain) - x * _spread(shared, len(gain))


def _shared(of: tuple, gain: jax.Array, d: jax.Array) -> jax.Array:
    """What the columns of a group have in common in that cotangent, ``[..., 2]``."""
    x, scales = of
    return scales**3 * _means(d * x * gain)


def _of_gain(of: tuple, d: jax.Array) -> jax.Array:
    """The cotangent of the gain, before it is summed."""
    x, scales = of
    return d * (x * _spread(scales, x.shape[-1]))


def _means(x: jax.Array) -> jax.Array:
    """``[..., 3 * features] -> [..., 2]``: the mean over r and z, and that over n."""
    r, z, n = jnp.split(x.reshape(*x.shape[:-1], 3, -1).mean(-1), 3, -1)
    return jnp.concatenate([(r + z) / 2, n], -1)


def _spread(of_groups: jax.Array, n: int) -> jax.Array:
    """``[..., 2] -> [..., n]``: to each column that of its group."""
    return jnp.where(jnp.arange(n) < 2 * n // 3, of_groups[..., :1], of_groups[..., 1:])
