"""TBPTT(k1, k2), full BPTT and randomised truncation: backward through the windows that came before, once more."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import check_whole
from tbptt_jax.influence.influence import Influence, Linearisation, WindowVJP

PyTree = Any


class Replay(NamedTuple):
    """Attributes:
    ring: the vjps of the last windows; window n is at n modulo the ring's length.
    pushed: int32, windows seen so far.
    reach: int32, how many windows the next gradient goes back, those that have been seen. With a survival of 1 it stays as it
      is: ``state._replace(reach=jnp.int32(2))`` goes back two from here on, of those that are kept anyway.
    """

    ring: WindowVJP
    pushed: jax.Array
    reach: jax.Array


def replay(windows: int, survival: float = 1.0) -> Influence:
    """Goes back through the last ``windows`` windows, as they were: their activations and the parameters of then.

    With windows of k steps this is TBPTT(k1, k2) with k1 = k and k2 = (windows + 1)·k: only the newest window's losses
    are injected, so that no lag counts twice. With as many windows as the stream has it is full BPTT.

    With a survival p below 1, each further window back is reached with probability p and weighs 1/p more, all lanes
    alike: randomised truncation, unbiased as long as ``windows`` covers the past. It goes back p/(1 - p) windows on
    average, and the passes that are not made are not paid for.

    How far it goes back can change in the middle of a stream: ``state._replace(reach=…)``.

    Cost: at most ``windows`` more backward passes, and the memory of ``windows`` windows' residuals.

    Args:
      windows: how many windows to go back, at least 1.
      survival: probability in (0, 1] of each further window.

    References: Williams & Peng 1990 (BPTT(h; h')); for p < 1, Tallec & Ollivier 2017, *Unbiasing truncated
    backpropagation through time*, equation 6, with truncations at window edges only.

    Raises:
      ValueError: if ``windows`` or ``survival`` are not as described.
    """
    check_whole("windows", windows, " For none, use `truncate()`.")
    if not 0 < survival <= 1:
        raise ValueError(f"`survival` is {survival!r}; it is a probability and needs to be in (0, 1].")

    def init(params: PyTree, carry: PyTree, vjp: WindowVJP) -> Replay:
        del params, carry
        ring = jax.tree.map(lambda r: jnp.zeros((windows, *r.shape), r.dtype), vjp)
        return Replay(ring, jnp.int32(0), jnp.int32(windows))

    def pullback(state: Replay, carry_cotangent: PyTree) -> PyTree:
        def pull(back: jax.Array, cotangent: PyTree) -> tuple[PyTree, PyTree]:
            vjp = jax.tree.map(lambda r: r[(state.pushed - 1 - back) % windows], state.ring)
            return vjp(jax.tree.map(lambda c: c / survival, cotangent))

        def further(past: tuple) -> tuple:
            back, total, cotangent = past
            gradient, cotangent = pull(back, cotangent)
            return back + 1, jax.tree.map(jnp.add, total, gradient), cotangent

        reach = jnp.minimum(state.reach, state.pushed)
        like, _ = jax.eval_shape(pull, jnp.int32(0), carry_cotangent)
        start = (jnp.int32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), like), carry_cotangent)
        return lax.while_loop(lambda past: past[0] < reach, further, start)[1]

    def push(state: Replay, linearisation: Linearisation, key: jax.Array) -> Replay:
        slot = state.pushed % windows
        stored, new = state.ring.residuals, linearisation.vjp.residuals
        if [(s.shape[1:], s.dtype) for s in stored] != [(n.shape, n.dtype) for n in new]:
            raise ValueError(
                "This window does not have the shape of the one that `init` was given, and `replay` keeps windows side by "
                "side: cut a stream into windows of one shape, as `split` does, with `resets` and `valid` in all or none."
            )
        ring = dataclasses.replace(state.ring, residuals=[s.at[slot].set(n) for s, n in zip(stored, new, strict=True)])
        reach = state.reach
        if survival < 1:
            reach = jnp.cumprod(jax.random.bernoulli(key, survival, (windows,))).sum(dtype=jnp.int32)
        return Replay(ring, state.pushed + 1, reach)

    return Influence(init, pullback, push)
