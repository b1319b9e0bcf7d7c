"""Unbiased online recurrent optimisation: ∂h/∂θ as a random rank-one matrix that is right on average."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import at_least_float32
from tbptt_jax.influence.influence import Influence, Linearisation, WindowVJP, check_carried
from tbptt_jax.noise import lane_keys

PyTree = Any

EPSILON = 1e-7  # keeps the scales finite where a sketch is still zero (Tallec & Ollivier, section 3.2)


class Uoro(NamedTuple):
    """∂h/∂θ ≈ carry_sketch ⊗ params_sketch, lane by lane.

    Attributes:
      carry_sketch: s̃, in the tree of the carry, leaves ``[lanes, ...]``.
      params_sketch: w̃, in the tree of params, leaves ``[lanes, ...]``.
    """

    carry_sketch: PyTree
    params_sketch: PyTree


def uoro() -> Influence:
    """Carries an unbiased rank-one sketch of each lane's ∂h/∂θ: online, for a stream of any length.

    With BPTT exact inside the window, noise enters only with lags that cross an edge. Its variance grows with dim(h) and,
    as lanes draw apart, falls with their number as that of any mean over lanes does. One sketch for all of them together
    would need the memory of a single one, and its noise would not fall with more lanes: it is worth it only where
    lanes·dim(θ) does not fit, and there fewer lanes are the better choice, so it is not offered.

    Cost: one Jacobian-vector and one vector-Jacobian product for each window, the latter with parameters of its own for
    each lane, and so one more forward pass; lanes·(dim(h) + dim(θ)) memory.

    Reference: Tallec & Ollivier 2017, *Unbiased online recurrent optimization*, algorithm 1, with a window as the step.

    Raises:
      ValueError: from the estimator's ``init``, if the carry has no floating-point array; from its ``update``, when it is
        traced, if lanes mix, or the model's backward pass cannot be transposed, as cuDNN's and those in Pallas cannot.
    """

    def init(params: PyTree, carry: PyTree, vjp: WindowVJP) -> Uoro:
        del vjp
        check_carried(carry)
        lanes = jax.tree.leaves(carry)[0].shape[0]
        sketch = jax.tree.map(lambda p: jnp.zeros((lanes, *p.shape), at_least_float32(p.dtype)), params)
        return Uoro(jax.tree.map(jnp.zeros_like, carry), sketch)

    def pullback(state: Uoro, carry_cotangent: PyTree) -> PyTree:
        along = _dot(carry_cotangent, state.carry_sketch)
        return jax.tree.map(lambda w: jnp.einsum("l,l...->...", along.astype(w.dtype), w), state.params_sketch)

    def push(state: Uoro, linearisation: Linearisation, key: jax.Array) -> Uoro:
        leaves, treedef = jax.tree.flatten(state.carry_sketch)
        keys = lane_keys(key, leaves[0].shape[0])

        def signs(number: int, s: jax.Array) -> jax.Array:
            draw = lambda key: jax.random.rademacher(jax.random.fold_in(key, number), s.shape[1:], s.dtype)  # noqa: E731
            return jax.vmap(draw)(keys)

        return push_signs(
            state, linearisation, jax.tree.unflatten(treedef, [signs(*each) for each in enumerate(leaves)])
        )

    return Influence(init, pullback, push)


def push_signs(state: Uoro, linearisation: Linearisation, signs: PyTree) -> Uoro:
    """One step of the sketch for given signs ν ∈ {±1}, in the tree of the carry: s̃ ← ρ0·J s̃ + ρ1·ν, w̃ ← w̃/ρ0 + νᵀI/ρ1.

    Averaged over independent signs, s̃ ⊗ w̃ becomes J·(s̃ ⊗ w̃) + I, whatever the scales; these keep the variance least.
    """
    immediate, _ = linearisation.lane_vjp(signs)  # νᵀI
    to_the_left = jax.linear_transpose(
        lambda c: linearisation.vjp(c)[1], signs
    )  # of carry_cotangents: its transpose is J
    try:
        (moved,) = to_the_left(state.carry_sketch)
    except NotImplementedError as error:
        raise ValueError(
            f"uoro moves forward along the window by transposing its backward pass, and this model's cannot be ({error}). "
            'An LSTM\'s can with `tb.lstm(..., implementation="fused")`.'
        ) from error
    rho0 = jnp.sqrt((_norm(state.params_sketch) + EPSILON) / (_norm(moved) + EPSILON))
    rho1 = jnp.sqrt((_norm(immediate) + EPSILON) / (_norm(signs) + EPSILON))

    def scaled(rho: jax.Array, x: jax.Array) -> jax.Array:
        return rho.reshape(-1, *[1] * (x.ndim - 1)) * x

    return Uoro(
        jax.tree.map(lambda s, n: (scaled(rho0, s) + scaled(rho1, n)).astype(n.dtype), moved, signs),
        jax.tree.map(
            lambda w, i: (scaled(1 / rho0, w) + scaled(1 / rho1, i)).astype(w.dtype), state.params_sketch, immediate
        ),
    )


def _dot(one: PyTree, other: PyTree) -> jax.Array:
    """The inner product of each lane, ``[lanes]``, in at least float32."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (x.reshape(len(x), -1).astype(at_least_float32(x.dtype)) for x in (a, b))
        return (a * b).sum(1)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, one, other)))


def _norm(tree: PyTree) -> jax.Array:
    return jnp.sqrt(_dot(tree, tree))
