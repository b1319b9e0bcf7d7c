"""Unbiased online recurrent optimisation: ∂h/∂θ as a random rank-one matrix that is right on average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbptt_jax.influence.influence import Influence, Linearisation, WindowVJP, check_carried, own_draws

PyTree = Any

EPSILON = 1e-7  # keeps the scales finite where a sketch is still zero (Tallec & Ollivier, section 3.2)


class Uoro(NamedTuple):
    """∂h/∂θ ≈ carry_sketch ⊗ params_sketch.

    Attributes:
      carry_sketch: s̃, in the tree of the carry, all lanes together.
      params_sketch: w̃, in the tree of params.
    """

    carry_sketch: PyTree
    params_sketch: PyTree


def uoro() -> Influence:
    """Carries an unbiased rank-one sketch of ∂h/∂θ: online, for a stream of any length, in the memory of the model.

    With BPTT exact inside the window, noise enters only with lags that cross an edge. Its variance grows with
    lanes·dim(h): expect to average more, or to step less, the larger the model.

    Cost: one Jacobian-vector and one vector-Jacobian product for each window, dim(h) + dim(θ) memory.

    Reference: Tallec & Ollivier 2017, *Unbiased online recurrent optimization*, algorithm 1, with a window as the step.

    Raises:
      ValueError: from the estimator's ``init``, if the carry has no floating-point array; from its ``update``, when it is
        traced, if the model's backward pass cannot be transposed, as cuDNN's and those in Pallas cannot.
    """

    def init(params: PyTree, carry: PyTree, vjp: WindowVJP) -> Uoro:
        del vjp
        check_carried(carry)
        return Uoro(*jax.tree.map(jnp.zeros_like, (carry, params)))

    def pullback(state: Uoro, carry_cotangent: PyTree) -> PyTree:
        parts = jax.tree.map(jnp.vdot, carry_cotangent, state.carry_sketch)
        along = jnp.sum(jnp.stack(jax.tree.leaves(parts)))
        return jax.tree.map(lambda w: along.astype(w.dtype) * w, state.params_sketch)

    def push(state: Uoro, linearisation: Linearisation, key: jax.Array) -> Uoro:
        leaves, treedef = jax.tree.flatten(state.carry_sketch)
        keys = jax.random.split(own_draws(key), len(leaves))
        signs = [jax.random.rademacher(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=True)]
        return push_signs(state, linearisation, jax.tree.unflatten(treedef, signs))

    return Influence(init, pullback, push)


def push_signs(state: Uoro, linearisation: Linearisation, signs: PyTree) -> Uoro:
    """One step of the sketch for given signs ν ∈ {±1}, in the tree of the carry: s̃ ← ρ0·J s̃ + ρ1·ν, w̃ ← w̃/ρ0 + νᵀI/ρ1.

    Averaged over independent signs, s̃ ⊗ w̃ becomes J·(s̃ ⊗ w̃) + I, whatever the scales; these keep the variance least.
    """
    immediate, _ = linearisation.vjp(signs)  # νᵀI
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
    return Uoro(
        jax.tree.map(lambda s, n: (rho0 * s + rho1 * n).astype(s.dtype), moved, signs),
        jax.tree.map(lambda w, i: (w / rho0 + i / rho1).astype(w.dtype), state.params_sketch, immediate),
    )


def _norm(tree: PyTree) -> jax.Array:
    return jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree)))
