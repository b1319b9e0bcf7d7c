"""Linear recurrences over a window: h_t = a_t ∘ h_{t−1} + b_t, and matrix states with the delta rule.

Resets and padding are folded into the coefficients: a step at which a lane is reset multiplies what was by 0, one that is
padding multiplies it by 1 and adds nothing. The gradient of such a recurrence is one too, read backwards,

    g_t = dh_t + a_{t+1} ∘ g_{t+1},    db_t = g_t,    da_t = g_t ∘ h_{t−1},

so that only a and h are kept for it.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes

Implementation = Literal["step", "associative", "chunked"] | None


class KeyValue(NamedTuple):
    """Coefficients of a state that is a matrix S ``[lanes, heads, keys, values]``, written to by keys and read by queries:

        S ← decay · S,    S ← S + k ⊗ u,    o = Sᵀ q,    u = v, or β (v − Sᵀ k) with the delta rule.

    Attributes:
      log_decay: ``[lanes, time, heads]``, the logarithm of the decay; at most 0, -inf to forget all.
      k: keys ``[lanes, time, heads, keys]``.
      v: values ``[lanes, time, heads, values]``.
      q: queries ``[lanes, time, heads, keys]``.
      beta: ``[lanes, time, heads]``, how much of what stands at the key is replaced; None: values are added.
    """

    log_decay: jax.Array
    k: jax.Array
    v: jax.Array
    q: jax.Array
    beta: jax.Array | None = None


class Masks(NamedTuple):
    """What is known of each step, ``[lanes, time]``, as a :class:`tbptt_jax.Window` has it; None: nothing of the kind."""

    resets: jax.Array | None = None
    valid: jax.Array | None = None
    edges: jax.Array | None = None


def check_implementation(implementation: Implementation) -> None:
    """Raises a ``ValueError`` unless it is one."""
    (known, _) = get_args(Implementation)
    if implementation not in (None, *get_args(known)):
        raise ValueError(
            f"`implementation` is {implementation!r}; it needs to be one of {get_args(known)}, or None to choose by platform."
        )


def diagonal(
    a: jax.Array, b: jax.Array, h: jax.Array, start: jax.Array, masks: Masks, implementation: Implementation = None
) -> jax.Array:
    """h_t = a_t ∘ h_{t−1} + b_t, ``[lanes, time, ...]``, in the dtype of ``h``.

    Args:
      a: ``[lanes, time, ...]``, or what broadcasts to it.
      b: ``[lanes, time, ...]``, or what broadcasts to it.
      h: ``[lanes, ...]``, before the window.
      start: what a reset returns to, ``[lanes, ...]``, or of each step ``[lanes, time, ...]``.
      masks: of the window.
      implementation: how the window is run.
    """
    resets, valid, edges = masks
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    a, b = (jnp.broadcast_to(x.astype(h.dtype), shape) for x in (a, b))
    if valid is not None:
        a, b = where_lanes(valid, a, jnp.ones_like(a)), where_lanes(valid, b, jnp.zeros_like(b))
    if resets is not None:
        start = start if start.ndim == len(shape) else start[:, None]
        b = where_lanes(resets, b + a * start, b)
        a = where_lanes(resets, jnp.zeros_like(a), a)
    return _diagonal(implementation, a, b, h, edges)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _diagonal(
    implementation: Implementation, a: jax.Array, b: jax.Array, h: jax.Array, edges: jax.Array | None
) -> jax.Array:
    return _run(implementation, a, b, h)


def _diagonal_forward(
    implementation: Implementation, a: jax.Array, b: jax.Array, h: jax.Array, edges: jax.Array | None
) -> tuple:
    hs = _run(implementation, a, b, h)
    return hs, (a, h, hs, edges)


def _diagonal_backward(implementation: Implementation, kept: tuple, dh: jax.Array) -> tuple:
    a, h, hs, edges = kept
    before = jnp.concatenate([h[:, None], hs], 1)[:, :-1]
    back = a if edges is None else a * edges.reshape(*edges.shape, *[1] * (a.ndim - 2)).astype(a.dtype)
    after = jnp.concatenate([back, jnp.zeros_like(back[:, :1])], 1)[:, 1:]  # a_{t+1}
    g = _run(implementation, after[:, ::-1], dh[:, ::-1], jnp.zeros_like(h))[:, ::-1]
    dh0 = back[:, 0] * g[:, 0] if a.shape[1] else jnp.zeros_like(h)
    return g * before, g, dh0, None if edges is None else jnp.zeros_like(edges)


_diagonal.defvjp(_diagonal_forward, _diagonal_backward)


def _run(implementation: Implementation, a: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
    def step(h: jax.Array, ab: tuple) -> tuple[jax.Array, jax.Array]:
        h = ab[0] * h + ab[1]
        return h, h

    return lax.scan(step, h, (a.swapaxes(0, 1), b.swapaxes(0, 1)))[1].swapaxes(0, 1)


def key_value(
    coefficients: KeyValue, s: jax.Array, start: jax.Array, masks: Masks, implementation: Implementation = None
) -> tuple[jax.Array, jax.Array]:
    """``(S after the window, o [lanes, time, heads, values])`` of :class:`KeyValue`, in the dtype of S.

    Args:
      coefficients: of the window.
      s: ``[lanes, heads, keys, values]``, before the window.
      start: what a reset returns to, ``[lanes, heads, keys, values]``.
      masks: of the window.
      implementation: how the window is run.
    """
    log_decay, k, v, q, beta = jax.tree.map(lambda x: x.astype(s.dtype), coefficients)
    per_step = jax.tree.map(lambda x: x.swapaxes(0, 1), (jnp.exp(log_decay), k, v, q, beta, masks))

    def step(s: jax.Array, at_t: tuple) -> tuple[jax.Array, jax.Array]:
        decay, k, v, q, beta, (reset, is_valid, edge) = at_t
        if edge is not None:
            still = lax.stop_gradient(s)
            s = still + edge[:, None, None, None].astype(s.dtype) * (s - still)
        if reset is not None:
            s = where_lanes(reset, start, s)
        new = decay[..., None, None] * s
        u = v if beta is None else beta[..., None] * (v - jnp.einsum("lhkv,lhk->lhv", new, k))
        new = new + k[..., None] * u[..., None, :]
        s = new if is_valid is None else where_lanes(is_valid, new, s)
        return s, jnp.einsum("lhkv,lhk->lhv", s, q)

    s, o = lax.scan(step, s, per_step)
    return s, o.swapaxes(0, 1)
