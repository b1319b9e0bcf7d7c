"""A state that is a matrix, written to by keys and read by queries: step by step, or chunk by chunk in matrix products.

Within a chunk every step sees what was before the chunk, what a reset in it returned to, or nothing, by the last of these; and
what the chunk's own steps have written since. With Γ[i, j] the decay from after step j to step i, and g[i] that from before the
chunk, the written values of all steps are the solution of a triangular system (the WY form), and the rest is products:

    (I + A) U = β ∘ (V − g ∘ K S),  A[i, j] = β_i Γ[i, j] k_iᵀk_j  for j < i;   U = V without the delta rule
    S ← g_last S + Kᵀ (Γ_last ∘ U),    O = g ∘ Q S + (Γ ∘ Q Kᵀ) U

References: Yang, Wang, Zhang, Shen & Kim 2024, *Parallelizing linear transformers with the delta rule over sequence length*;
Yang, Kautz & Hatamizadeh 2025, *Gated delta networks*; without the delta rule Dao & Gu 2024, *Transformers are SSMs*.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import pad, scale, where_lanes
from tbptt_jax.cells.linear_scan.choice import Implementation, Masks
from tbptt_jax.cells.linear_scan.diagonal import later
from tbptt_jax.recurrence import scale_cotangent

CHUNK = 64  # steps; with the delta rule half as many, whose system takes the third power of them


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


def key_value(
    coefficients: KeyValue,
    s: jax.Array,
    start: jax.Array | None,
    masks: Masks,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """``(S after the window, o [lanes, time, heads, values])`` of :class:`KeyValue`, in the dtype of S.

    Args:
      coefficients: of the window.
      s: ``[lanes, heads, keys, values]``, before the window. With one value more than v has, that is written as 1 by each key.
      start: what a reset returns to, ``[lanes, heads, keys, values]``, or of each step ``[lanes, time, heads, keys, values]``.
        None: zeros.
      masks: of the window.
      implementation: how the window is run. ``"associative"`` has the chunks of ``"chunked"`` at once too. Where the gradient
        is scaled at edges, or lanes begin from the data, it is step by step, which those need.
    """
    coefficients = jax.tree.map(lambda x: x.astype(s.dtype), coefficients)
    time = coefficients.k.shape[1]
    begins_from_data = masks.resets is not None and start is not None and start.ndim > s.ndim
    if implementation == "step" or masks.edges is not None or begins_from_data or time < 2:
        return _steps(coefficients._replace(v=_with_ones(coefficients.v, s)), s, start, masks)
    return _chunks(coefficients, s, start, masks, "associative" if implementation == "associative" else "step")


def _steps(coefficients: KeyValue, s: jax.Array, start: jax.Array | None, masks: Masks) -> tuple[jax.Array, jax.Array]:
    log_decay, k, v, q, beta = coefficients
    start = jnp.zeros_like(s) if start is None else start
    each = start.swapaxes(0, 1) if start.ndim > s.ndim else None
    per_step = jax.tree.map(lambda x: x.swapaxes(0, 1), (jnp.exp(log_decay), k, v, q, beta, masks))

    def step(s: jax.Array, at_t: tuple) -> tuple[jax.Array, jax.Array]:
        (decay, k, v, q, beta, (reset, is_valid, edge)), of_t = at_t
        if edge is not None:
            s = scale_cotangent(edge, s)
        if reset is not None:
            s = where_lanes(reset, start if of_t is None else of_t, s)
        new = decay[..., None, None] * s
        u = v if beta is None else beta[..., None] * (v - jnp.einsum("lhkv,lhk->lhv", new, k))
        new = new + k[..., None] * u[..., None, :]
        s = new if is_valid is None else where_lanes(is_valid, new, s)
        return s, jnp.einsum("lhkv,lhk->lhv", s, q)

    s, o = lax.scan(step, s, (per_step, each))
    return s, o.swapaxes(0, 1)


def _with_ones(v: jax.Array, s: jax.Array) -> jax.Array:
    more = s.shape[-1] - v.shape[-1]
    return jnp.pad(v, ((0, 0),) * (v.ndim - 1) + ((0, more),), constant_values=1) if more else v


class _Decays(NamedTuple):
    """Of chunks.

    Attributes:
      between: Γ ``[chunks, steps, steps]``, from after step j to after step i; 0 where i is before j, or something was
        forgotten between them.
      before: ``[chunks, steps]``, to after step i, of what was before the chunk.
      start: ``[chunks, steps]``, of what a reset returned to; None: there are no resets.
    """

    between: jax.Array
    before: jax.Array
    start: jax.Array | None


def _chunks(
    coefficients: KeyValue, s: jax.Array, start: jax.Array | None, masks: Masks, join: Implementation
) -> tuple[jax.Array, jax.Array]:
    lanes, time, heads = coefficients.log_decay.shape
    chunks = -(-time // (CHUNK if coefficients.beta is None else CHUNK // 2))
    c = -(-time // chunks)
    resets, valid, _ = masks
    log_decay, k, v, q, beta = coefficients
    if valid is not None:  # a step that is padding neither decays nor writes
        log_decay, k = where_lanes(valid, (log_decay, k), (jnp.zeros_like(log_decay), jnp.zeros_like(k)))

    def fold(x: jax.Array) -> jax.Array:
        """``[lanes, time, heads, ...]`` → ``[chunks, steps, ...]``, those of all lanes and heads, filled up with zeros: that is
        padding. One axis for all: a CPU takes seven times as long for XLA's sums of products that have an axis of one entry.
        """
        x = jnp.asarray(pad(x, 1, chunks * c - time)).reshape(lanes, chunks, c, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2)).reshape(-1, c, *x.shape[4:])

    k, v, q = fold(k), fold(v), fold(q)
    decays = _decays(fold(log_decay), None if resets is None else fold(jnp.repeat(resets[..., None], heads, -1)))
    s, shape = s.reshape(-1, *s.shape[2:]), s.shape
    starts = None if start is None or decays.start is None else jnp.tile(start.reshape(s.shape), (chunks, 1, 1))

    def of_start(x: jax.Array) -> jax.Array | float:
        return 0.0 if starts is None or decays.start is None else scale(x, decays.start) @ starts

    u, reads = v, None
    if beta is not None:
        beta = fold(beta)
        among = jnp.tril(scale(decays.between * (k @ k.mT), beta), -1)
        both = jnp.concatenate([v - of_start(k), scale(k, decays.before)], -1)
        u, reads = jnp.split(_solve(among, scale(both, beta)), [v.shape[-1]], -1)

    into = scale(k, decays.between[:, -1]).mT  # what a chunk's steps write that stands at its end
    kept, returned = decays.before[:, -1], None
    if starts is not None and decays.start is not None:
        returned = scale(starts, decays.start[:, -1, None])
    sees = decays.before != 0  # what no step sees may be anything
    before, u, last = _over_chunks(join, kept, into, u, reads, sees, returned, s)
    seen = jnp.where(sees[..., None], scale(q @ before, decays.before), 0)
    o = _written(decays.between * (q @ k.mT), u, s) + seen + of_start(q)
    o = jnp.moveaxis(o.reshape(chunks, lanes, heads, c, -1), (0, 2), (1, 3)).reshape(lanes, chunks * c, heads, -1)
    return last.reshape(shape), o[:, :time]


def _decays(log_decay: jax.Array, resets: jax.Array | None) -> _Decays:
    """Every decay is the exponential of a sum of the logarithms that belong to it, and no difference of longer sums."""
    c = log_decay.shape[-1]
    i, j = jnp.arange(c)[:, None], jnp.arange(c)
    exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    all_of_it = jnp.finfo(log_decay.dtype).min / (2 * c)  # forgets all, and no sum of it is infinite
    logs = jnp.maximum(log_decay, all_of_it)
    cut = logs if resets is None else jnp.where(resets, all_of_it, logs)
    between = ((j < i[..., None]) & (i[..., None] <= i)).astype(logs.dtype).reshape(c, c * c)  # [term, i and j]

    def decay(x: jax.Array, among: bool | jax.Array = True) -> jax.Array:
        return jnp.where((x > all_of_it) & among, jnp.exp(x), 0)  # of what was forgotten not even the gradient is left

    from_each = decay(exact(cut, between).reshape(-1, c, c), i >= j)
    from_before = decay(exact(cut, jnp.triu(jnp.ones((c, c), logs.dtype))))
    if resets is None:
        return _Decays(from_each, from_before, None)
    at_reset = jnp.where(resets, jnp.exp(logs), 0)  # of which a step sees the last alone, or none
    return _Decays(from_each, from_before, jnp.einsum("cij,cj->ci", from_each, at_reset))


def _solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """(I + A)⁻¹ B of a strictly lower-triangular A, by the inverse, which the gradient needs too: a CPU's solver takes longer
    than all else.

    The inverse is found for blocks along the diagonal, from single steps on, each time of two that become one:
    X ← X − X A X with the part of A below the diagonal blocks and inside the new ones, as exact as substitution is.
    """
    c = a.shape[-1]
    i, j = jnp.arange(c)[:, None], jnp.arange(c)
    exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    fixed = lax.stop_gradient(a)
    inverse, size = jnp.eye(c, dtype=a.dtype) - jnp.where((i // 2 == j // 2), fixed, 0), 2
    while size < c:
        joins = (i // size != j // size) & (i // (2 * size) == j // (2 * size))
        inverse, size = inverse - exact(exact(inverse, jnp.where(joins, fixed, 0)), inverse), 2 * size
    return lax.custom_linear_solve(
        lambda x: x + exact(a, x), b, lambda _, b: exact(inverse, b), lambda _, b: exact(inverse.mT, b)
    )


def _over_chunks(
    join: Implementation,
    kept: jax.Array,
    into: jax.Array,
    u: jax.Array,
    reads: jax.Array | None,
    sees: jax.Array,
    returned: jax.Array | None,
    s: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U ← U − reads S, S ← kept S + into U + returned, from chunk to chunk: S before each, U, and S after the last."""
    kept, into, u, reads, sees, returned = jax.tree.map(
        lambda x: x.reshape(-1, len(s), *x.shape[1:]), (kept, into, u, reads, sees, returned)
    )

    def seen(s: jax.Array, sees: jax.Array) -> jax.Array:
        return jnp.where(sees[..., :1, None], s, 0)

    def left(u: jax.Array, reads: jax.Array | None, before: jax.Array, sees: jax.Array) -> jax.Array:
        return u if reads is None else u - jnp.where(sees[..., None], reads @ before, 0)

    def on(kept: jax.Array, s: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where((kept == 0)[:, None, None], 0, jnp.einsum("lkv,l->lkv", s, kept)) + b

    one = len(u) == 1
    if join == "step" and reads is not None:

        def chunk(s: jax.Array, of: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            kept, into, u, reads, sees, returned = of
            before = seen(s, sees)
            u = left(u, reads, before, sees)
            s = on(kept, s, into @ u)
            return s if returned is None else s + returned, (before, u)

        s, (before, u) = lax.scan(chunk, s, (kept, into, u, reads, sees, returned), unroll=one)
        return _flat(before), _flat(u), s

    b = _written(into, u, s)
    b = b if returned is None else b + returned
    if join == "step":
        s, before = lax.scan(lambda s, kb: (on(kb[0], s, kb[1]), s), s, (kept, b), unroll=one)
        return _flat(seen(before, sees)), _flat(u), s
    m, d = kept[..., None, None], 1
    m = m if reads is None else m * jnp.eye(s.shape[-2], dtype=s.dtype) - into @ reads

    def product(m: jax.Array, x: jax.Array) -> jax.Array:
        return m * x if reads is None else m @ x

    def of(m: jax.Array, s: jax.Array) -> jax.Array:
        return product(m, jnp.where((m == 0).all((-2, -1), keepdims=True), 0, s))

    b = jnp.concatenate([b[:1] + of(m[:1], s), b[1:]])
    while d < len(b):
        b, m = b + of(m, later(b, d, 0)), product(m, later(m, d, 0))
        d *= 2
    before = seen(jnp.concatenate([s[None], b[:-1]]), sees)
    return _flat(before), _flat(left(u, reads, before, sees)), b[-1]


def _written(by: jax.Array, u: jax.Array, s: jax.Array) -> jax.Array:
    """``by @ u``, with the sums of ``by`` beside it where S has one value more than u: a product with 1 is slower."""
    found = by @ u
    return found if u.shape[-1] == s.shape[-1] else jnp.concatenate([found, by.sum(-1, keepdims=True)], -1)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])
