"""What a lane begins from: zeros, a carry that is learned, or one that the data gives."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree

InitialCarry = Literal["learned"] | Callable[[PyTree, PyTree], PyTree] | None


class Begun(NamedTuple):
    """The carry of a model whose lanes begin from what the data gives.

    Attributes:
      carry: the model's, every leaf ``[lanes, ...]``.
      fresh: ``[lanes]`` bool, the lanes that begin at their next valid step.
    """

    carry: PyTree
    fresh: jax.Array


def begin_from(
    chosen: InitialCarry, init: Callable[..., PyTree], initial_carry: Callable[[PyTree, int], PyTree]
) -> tuple[Callable[..., PyTree], Callable[[PyTree, int], PyTree], Callable[[PyTree, PyTree], PyTree] | None]:
    """``(init, initial_carry, begin)`` of a model, for its argument ``initial_carry``; begin as in :func:`tbptt_jax.from_step`.

    Args:
      chosen: None: what the model has. ``"learned"``: ``params["initial_carry"]``, which is that at first. A function
        ``(params, x [lanes, ...]) -> carry`` of the inputs of a lane's first step.
      init: the model's.
      initial_carry: the model's.

    Raises:
      ValueError: if ``chosen`` is none of these.
    """
    if chosen is None:
        return init, initial_carry, None
    if callable(chosen):
        return init, initial_carry, chosen
    if chosen != "learned":
        raise ValueError(
            f"`initial_carry` is {chosen!r}; it needs to be 'learned', a function `(params, x) -> carry`, or None."
        )

    def init_learned(key: jax.Array, inputs: PyTree) -> PyTree:
        params = init(key, inputs)
        start = jax.tree.map(lambda h: h[0] if jnp.issubdtype(h.dtype, jnp.inexact) else None, initial_carry(params, 1))
        return {**params, "initial_carry": start}

    def learned(params: PyTree, lanes: int) -> PyTree:
        def leaf(own: Any, h: jax.Array) -> jax.Array:
            return h if own is None else jnp.broadcast_to(own, h.shape)

        default = initial_carry(params, lanes)
        return jax.tree.map(leaf, params["initial_carry"], default, is_leaf=lambda x: x is None)

    return init_learned, learned, None


def first_steps(
    fresh: jax.Array, resets: jax.Array | None, valid: jax.Array | None, time: int
) -> tuple[jax.Array, jax.Array]:
    """Where lanes begin, ``[lanes, time]`` bool: at the first valid step from a reset on; and those still to begin, ``[lanes]``."""
    lanes = fresh.shape[0]  # a symbol, where a model is exported
    none = jnp.zeros((lanes, time), bool)
    t = jnp.arange(time)
    there = ~none if valid is None else valid
    reset = lax.cummax(jnp.where((none if resets is None else resets) | (fresh[:, None] & (t == 0)), t, -2), 1)
    upto = lax.cummax(jnp.where(there, t, -1), 1)
    before = jnp.concatenate([jnp.full((lanes, 1), -1), upto[:, :-1]], 1)
    return there & (reset > before), reset[:, -1] > upto[:, -1]


def starts_of(begin: Callable[[PyTree], PyTree], x: PyTree, at: jax.Array, carry: PyTree) -> PyTree:
    """What a lane begins from at each step, a carry ``[lanes, time, ...]``; it means nothing but where ``at`` is True.

    Raises:
      ValueError: if ``begin`` returns no carry.
    """
    first = begin(jax.tree.map(lambda x: x[:, 0], x))

    def shapes(tree: PyTree) -> tuple:
        return jax.tree.structure(tree), [jnp.shape(h) for h in jax.tree.leaves(tree)]

    if shapes(first) != shapes(carry):
        has, needs = (jax.tree.map(lambda h: list(jnp.shape(h)), tree) for tree in (first, carry))
        raise ValueError(f"`initial_carry` returned {has}; it needs to return a carry of this model, {needs}.")

    def as_carry(h: jax.Array, c: jax.Array) -> jax.Array:
        return jnp.asarray(h, c.dtype)

    def only_first() -> PyTree:
        return jax.tree.map(
            lambda h, c: jnp.zeros((*at.shape, *c.shape[1:]), c.dtype).at[:, 0].set(as_carry(h, c)), first, carry
        )

    def all_steps() -> PyTree:
        return jax.tree.map(as_carry, jax.vmap(begin, 1, 1)(x), carry)

    return lax.cond(at[:, 1:].any(), all_steps, only_first)


def from_first_step(
    whole: Callable[[PyTree, jax.Array | None], PyTree],
    within: Callable[[], PyTree],
    carry: PyTree,
    resets: jax.Array | None,
    starts: PyTree,
) -> PyTree:
    """A window by ``whole(carry, None)``, which knows no other beginnings than zeros, where lanes begin at its first step only;
    else by ``within()``."""
    if starts is None or resets is None:
        return whole(carry, resets)
    first = resets[:, 0]
    begun = jax.tree.map(lambda s, h: jnp.where(first.reshape(-1, *[1] * (h.ndim - 1)), s[:, 0], h), starts, carry)
    return lax.cond(resets[:, 1:].any(), within, functools.partial(whole, begun, None))
