"""Real-time recurrent learning: the whole matrix ∂h/∂θ, carried forward."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from tbptt_jax.arrays import at_least_float32
from tbptt_jax.influence.influence import Influence, Linearisation, WindowVJP, check_carried

PyTree = Any


class Rtrl(NamedTuple):
    """Attributes:
    matrix: ∂h/∂θ, leaves ``[lanes, dim(h), ...]`` in the tree of params.
    carry: zeros in the tree of the carry, whose units the matrix has rows for.
    """

    matrix: PyTree
    carry: PyTree


def rtrl(max_bytes: int | None = None) -> Influence:
    """Knows the past exactly: S = ∂h/∂θ for each lane, since lanes do not mix, moved on by S ← J·S + I.

    J = ∂h'/∂h and I = ∂h'/∂θ are those of a whole window, read off by one backward pass for each unit of the carry.
    The gradient is that of full BPTT for a stream of any length, online. Only small models afford it: memory
    lanes·dim(h)·dim(θ), dim(h) backward passes with per-lane parameters and one more forward pass for each window.

    Args:
      max_bytes: the largest S to make; default half of the device's memory, since J·S needs as much again.

    Reference: Williams & Zipser 1989, *A learning algorithm for continually running fully recurrent neural networks*,
    equation 2.

    Raises:
      ValueError: from ``init``, if S would be larger than ``max_bytes``; from the estimator's ``update``, when it is traced,
        if lanes mix.
    """

    def init(params: PyTree, carry: PyTree, vjp: WindowVJP) -> Rtrl:
        del vjp
        check_carried(carry)
        leaves = jax.tree.leaves(carry)
        lanes, units = leaves[0].shape[0], sum(h[0].size for h in leaves)
        kinds = {p.dtype: at_least_float32(p.dtype) for p in jax.tree.leaves(params)}
        needed = sum(lanes * units * p.size * kinds[p.dtype].itemsize for p in jax.tree.leaves(params))
        limit = _device_memory() // 2 if max_bytes is None else max_bytes
        if needed > limit:
            theta = sum(p.size for p in jax.tree.leaves(params))
            raise ValueError(
                f"rtrl would carry a matrix of {lanes} lanes x {units} units x {theta:,} parameters, {_size(needed)}, and "
                f"may use {_size(limit)}: use a smaller model or fewer lanes, or `uoro()`, which "
                "carries an unbiased sketch of it in the memory of the parameters for each lane."
            )
        matrix = jax.tree.map(lambda p: jnp.zeros((lanes, units, *p.shape), kinds[p.dtype]), params)
        return Rtrl(matrix, jax.tree.map(jnp.zeros_like, carry))

    def pullback(state: Rtrl, carry_cotangent: PyTree) -> PyTree:
        by_unit = _flat(carry_cotangent)
        return jax.tree.map(lambda s: jnp.einsum("lh,lh...->...", by_unit, s), state.matrix)

    def push(state: Rtrl, linearisation: Linearisation, key: jax.Array) -> Rtrl:
        del key
        lanes = jax.tree.leaves(state.carry)[0].shape[0]
        zeros, unravel = ravel_pytree(jax.tree.map(lambda h: h[0], state.carry))
        units = jax.vmap(unravel)(jnp.eye(zeros.size, dtype=zeros.dtype))  # [dim(h), ...]

        def rows(unit: PyTree) -> tuple[PyTree, jax.Array]:
            in_every_lane = jax.tree.map(lambda u: jnp.broadcast_to(u, (lanes, *u.shape)), unit)
            immediate, jacobian = linearisation.lane_vjp(in_every_lane)
            return immediate, _flat(jacobian)

        immediate, jacobian = jax.vmap(rows, out_axes=1)(units)  # [lanes, dim(h), ...], [lanes, dim(h), dim(h)]

        def moved(s: jax.Array, i: jax.Array) -> jax.Array:
            return (jnp.einsum("lij,lj...->li...", jacobian, s) + i).astype(s.dtype)

        return Rtrl(jax.tree.map(moved, state.matrix, immediate), state.carry)

    return Influence(init, pullback, push)


def _flat(carry: PyTree) -> jax.Array:
    """``[lanes, dim(h)]``."""
    leaves = jax.tree.leaves(carry)
    return jnp.concatenate([h.reshape(h.shape[0], -1) for h in leaves], 1)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count:,} bytes"


def _device_memory() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
