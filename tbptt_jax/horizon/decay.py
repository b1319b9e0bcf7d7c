"""How gradients fade with the lag, and what windows of some lengths leave out of them, measured."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from tbptt_jax.arrays import at_least_float32, check_whole, quoted, where_lanes
from tbptt_jax.gradient import Loss, differentiable, objective, of_real, step_losses, weighted_mean
from tbptt_jax.horizon.bias import balanced
from tbptt_jax.recurrence import Recurrence, unroll_window
from tbptt_jax.window import Window, check, is_scored, step_weights, time_shape

PyTree = Any


class Decay(NamedTuple):
    """How gradients fade with the lag, and what is kept of the gradient where losses see so many steps back.

    Attributes:
      norms: φ_k = E‖∂l_s/∂h_{s-k}‖ for k = 1 … lags, ``[lags]``; the mean over probes.
      sums: ‖E Σ_{j ≤ k} ∂l_s/∂h_{s-j}‖ for k = 1 … lags, ``[lags]``.
      rate: β̂, the factor by which φ shrinks from one lag to the next, fitted to its tail; 1 or more: it does not.
      probes: how many losses l_s were traced back.
      kept: ‖ĝ_K‖ for K = 0 … lags, ``[lags + 1]``: of the probes' mean gradient by the parameters, where each sees K steps back.
      left_out: ‖ĝ_lags − ĝ_K‖, ``[lags + 1]``.
      rest: Σ_{k > lags} φ_k, if φ goes on shrinking by β̂ below all of its tail; 0 where nothing is further back.
      beyond: what that adds to the parameters' gradient at most, if no lag adds more for what it has of φ than those that were seen; and
        what a window's first losses have before it, from a ``carry``.
      whole: ‖ĝ‖ of all the window's losses, where each sees ``lags`` steps back or more.
      lengths: of windows, ``[n]``, from short to long.
      windows: how far from that the gradient by windows of each length is, ``[n]``.
      depths: of ``replay`` with them, ``[n]``; None: all are with ``truncate()``.
    """

    norms: np.ndarray
    sums: np.ndarray
    rate: float
    probes: int
    kept: np.ndarray
    left_out: np.ndarray
    rest: float
    beyond: float
    whole: float
    lengths: np.ndarray
    windows: np.ndarray
    depths: np.ndarray | None = None


def decay(
    model: Recurrence,
    loss: Loss,
    params: PyTree,
    window: Window,
    *,
    lags: int,
    tail: int | None = None,
    carry: PyTree = None,
    burn_in: int | None = None,
    probes: int | None = None,
    lengths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
) -> Decay:
    """How the gradient of a step's loss fades with the lag, and what of the parameters' gradient is kept up to each.

    Probes are traced back together, a lag at a time: that takes ``2 * lags`` steps, forward and backward, of as many lanes as there
    are probes. Then windows of some lengths are tried on all losses: each takes as many steps as the window has, or, side by side,
    as the least common multiple of the lengths. Memory is that of the window's carries.

    Args:
      model: the recurrence.
      loss: as for :func:`tbptt_jax.gradient`.
      params: the parameters.
      window: ``[lanes, time, ...]``, at least ``lags`` steps.
      lags: the longest lag to look at.
      tail: the lag from which β̂ is fitted, the τ of the paper; default half of ``lags``.
      carry: what the lanes have before the window, as in the middle of a stream; None: the initial carry.
      burn_in: steps at the window's beginning whose losses are not counted. None: 0, or from a ``carry`` ``lags``, since what those
        see of the past is not in the window; at most half of it.
      probes: scored steps of each lane, spread evenly, in each lane at other places, whose losses are traced back. None: all, or
        so many that there are 1024 with those of all lanes.
      lengths: of the windows to try, from short to long. None: four an octave, up to the window's steps.
      depths: of ``replay``, from 0, ``truncate()``, to deep, to try with windows of a single length in ``lengths``.

    Raises:
      ValueError: if the window or the loss's shape is not as for :func:`tbptt_jax.gradient`, ``lags`` is not from 2 to the
        window's steps, ``tail`` not from 1 to ``lags - 1``, ``burn_in``, ``probes``, ``lengths`` or ``depths`` are not as described, no
        step is scored, or a gradient is not finite.

    Reference: Aicher, Foti & Fox 2019, *Adaptively truncating backpropagation through time to control gradient bias*,
    section 3.
    """
    check(window)
    lanes, time = time_shape(window)
    if time < 2:
        raise ValueError("The probe window has 1 step; how gradients fade is seen in windows of 2 steps and more.")
    check_whole("lags", lags)
    if not 2 <= lags <= time:
        raise ValueError(f"`lags` is {lags}; this probe window has {time} steps, so choose from 2 to {time}.")
    tail = lags // 2 if tail is None else tail
    check_whole("tail", tail)
    if not 1 <= tail < lags:
        raise ValueError(
            f"`tail` is {tail}; the decay is fitted from there to lag {lags}, so choose from 1 to {lags - 1}."
        )
    burn_in = (0 if carry is None else min(lags, time // 2)) if burn_in is None else burn_in
    if not isinstance(burn_in, int | np.integer) or not 0 <= burn_in < time:
        raise ValueError(f"`burn_in` is {burn_in}; this probe window has {time} steps, so choose from 0 to {time - 1}.")
    probes = max(1, 1024 // lanes) if probes is None else probes
    check_whole("probes", probes)
    burnt = jax.tree.map(lambda w: w.at[:, :burn_in].set(0), step_weights(window))
    window = balanced(window._replace(weights=burnt))
    traced = _spread(np.asarray(is_scored(window)), min(probes, time - burn_in))
    if (traced < 0).all():
        raise ValueError(
            f"No step of the probe window is scored from step {burn_in} on, so there is no loss to look at."
        )
    if lengths is None:  # four an octave
        lengths = np.geomspace(1, time, 2 + int(4 * np.log2(time))).round().astype(int).tolist()
    if np.ndim(lengths) != 1:
        raise ValueError(f"`lengths` is {quoted(lengths)}; give several, such as (8, 16, 32).")
    lengths = list(lengths)
    for length in lengths:
        check_whole("lengths", length)
    tried = np.unique(lengths)
    if not len(tried) or not 1 <= tried[0] <= tried[-1] <= time:
        raise ValueError(
            f"`lengths` are {tried.tolist()}; this probe window has {time} steps, so choose from 1 to {time}."
        )
    stretch = math.lcm(*tried.tolist())
    if depths is not None and np.ndim(depths) != 1:
        raise ValueError(f"`depths` is {quoted(depths)}; give several, such as (0, 1, 2).")
    deep = () if depths is None else tuple(depths)
    if deep:
        whole_numbers = all(isinstance(depth, int | np.integer) and depth >= 0 for depth in deep)
        if len(tried) > 1 or not whole_numbers or list(deep) != sorted(set(deep)):
            raise ValueError(
                f"`depths` are {list(deep)}, and `lengths` {tried.tolist()}: give depths from 0 or more to deep, and one length."
            )
        tried = np.repeat(tried, len(deep))
    found = _traced(
        model,
        loss,
        lags,
        burn_in,
        min(stretch, time),
        deep,
        params,
        carry,
        window,
        jnp.asarray(traced),
        jnp.asarray(tried),
    )
    phi, sums, added, kept, left_out, whole, windows = (np.asarray(x, np.float64) for x in found)
    if not np.isfinite(phi).all():
        raise ValueError(
            f"The gradient is not finite from lag {np.flatnonzero(~np.isfinite(phi))[0] + 1} on: it explodes at these "
            "parameters. Trace fewer `lags`, or measure at others."
        )
    rate = _fitted_rate(phi, tail)
    rest = beyond = 0.0
    if time > lags + 1 or carry is not None:
        # Of the curves that shrink by β̂ the one that all of the tail is below, at its end.
        above = np.max(phi[tail - 1 :] * rate ** np.arange(lags - tail, -1, -1.0))
        rest = float(above * rate / (1 - rate)) if rate < 1 else float("inf")
        tails = np.append(phi[::-1].cumsum()[::-1], 0) + rest  # Σ_{j > k} φ_j for k = 0 … lags
        of_steps = np.asarray(functools.reduce(jnp.add, jax.tree.leaves(window.weights)).sum(0), np.float64)
        unseen = rest
        if carry is not None and rate < 1:  # what the first losses have before the window is not seen either
            unseen = float(tails[np.minimum(np.arange(time), lags)] @ of_steps / of_steps.sum())
        if unseen > 0:
            heard = np.max(added[1:] / np.where(phi > 0, phi, np.inf), initial=0.0)
            beyond = unseen * (heard or float(_heard(model, loss, params, carry, window)))
    return Decay(
        phi, sums, rate, int((traced >= 0).sum()), kept, left_out, rest, beyond, float(whole), tried, windows, np.array(deep) if deep else None
    )  # fmt: skip


def _spread(scored: np.ndarray, probes: int) -> np.ndarray:
    """Of the scored steps of each lane, ``[lanes, time]``, so many, evenly and in each lane at other places, ``[probes, lanes]``; where
    a lane has fewer, -1."""
    found = np.full((probes, len(scored)), -1)
    for lane, steps in enumerate(map(np.flatnonzero, scored)):
        if len(steps) > probes:  # the last of so many stretches in the last lane, in the others before that
            at = (np.arange(probes) + (lane + 1) / len(scored)) * len(steps) / probes
            steps = steps[np.ceil(at - 1e-9).astype(int) - 1]
        found[: len(steps), lane] = steps
    return found


def always(t: jax.Array) -> bool:
    """True, whatever the step."""
    return True


@functools.partial(jax.jit, static_argnames=("model", "loss", "lags", "burn_in", "stretch", "depths"))
def _traced(
    model: Recurrence,
    loss: Loss,
    lags: int,
    burn_in: int,
    stretch: int,
    depths: tuple[int, ...],
    params: PyTree,
    carry: PyTree,
    window: Window,
    probes: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, ...]:
    """φ ``[lags]``, and the norms of the sums of these gradients; norms of gradients by the parameters: of what each lag adds and of what is kept up to it, ``[lags + 1]``; of
    what that leaves out; of the whole, and of what windows of ``lengths`` leave out of it, which all are cut every ``stretch``
    steps, or windows of ``stretch`` where replay goes back by each of the ``depths``."""
    lanes, time = time_shape(window)
    fresh = carry is None
    along = jax.tree.map(lambda x: x.swapaxes(0, 1), window)
    weights = functools.reduce(jnp.add, jax.tree.leaves(window.weights))
    of_all = weights.sum()
    weights = jnp.where(probes >= 0, weights[jnp.arange(lanes), probes], 0)  # of the probes
    of_probes = weights.sum()
    read = functools.partial(_read, model, loss)
    first = model.initial_carry(params, lanes) if fresh else carry
    before = lax.scan(lambda h, step: (read(params, h, step)[0], h), first, along)[1]

    def merged(tree: PyTree, at: jax.Array) -> PyTree:
        """The steps ``at`` as so many lanes."""
        at = jnp.clip(at, 0, time - 1)
        row = (at,) if at.ndim == 1 else (at, jnp.arange(lanes))
        return jax.tree.map(lambda x: x[row].reshape(-1, *x.shape[2:]), tree)

    def of_each(x: jax.Array) -> jax.Array:
        """``[places]``, or ``[places, lanes]``, of as many lanes."""
        return x.ravel() if x.ndim == 2 else jnp.repeat(x, lanes)

    def nothing(places: int) -> tuple[PyTree, PyTree]:
        begin = merged(before, jnp.zeros(places, int))
        return optax.tree.zeros_like(differentiable(begin)), optax.tree.zeros_like(params)

    def back(state: tuple, at: jax.Array, counted: Any, uncut: Any, total: jax.Array) -> tuple[tuple, tuple]:
        """One step back from several places: ``(cotangents of the carries, gradient so far)``, before the step from after it.

        Args:
          state: of after the step.
          at: ``[places]``, or ``[places, lanes]``, the steps' numbers; what is outside of the window is not there.
          counted: whether their losses are added.
          uncut: whether cotangents go on beyond them.
          total: what losses are divided by.
        """
        cotangent, kept = state
        there, step = merged(before, at), merged(along, at)
        scored = of_each(counted & (at >= 0) & (at < time))
        step = step._replace(weights=jax.tree.map(lambda w: jnp.where(scored, w, 0), step.weights))

        def weighed(params: PyTree, numbers: PyTree) -> jax.Array:
            after, losses = read(params, of_real(numbers, there), step)
            return optax.tree.vdot(differentiable(after), cotangent) + losses / total

        added, edge = jax.grad(weighed, (0, 1))(params, differentiable(there))
        none = optax.tree.zeros_like(edge)
        if fresh:  # then the parameters may also make the carry that the stream begins with
            begun = where_lanes(of_each(at == 0), edge, none)
            of_start = jax.grad(
                lambda p: optax.tree.vdot(differentiable(model.initial_carry(p, len(at) * lanes)), begun)
            )(params)
            added = optax.tree.add(added, of_start)
        cotangent = where_lanes(of_each((at > 0) & uncut), edge, none)
        return (cotangent, optax.tree.add(kept, added)), (edge, added)

    def lag(reference: PyTree, state: tuple, k: jax.Array) -> tuple[tuple, tuple]:
        """Adds what the step k before each probe gives its parameters."""
        state, edges = state
        state, (edge, added) = back(state, probes - k, k == 0, True, of_probes)
        past = jnp.where(probes >= k, weights, 0).sum() / of_probes  # of those that have so much of it
        past = jnp.where(past > 0, past, 1)
        edges = jax.tree.map(lambda e, x: (e + x.sum(0, dtype=e.dtype) / past).astype(e.dtype), edges, edge)
        phi = _lane_norms(edge, len(probes) * lanes).sum() / past
        return (state, edges), (
            phi,
            _norm(edges),
            _norm(added) / past,
            _norm(state[1]),
            _norm(optax.tree.sub(reference, state[1])),
        )

    def all_lags(reference: PyTree, _: None) -> tuple[PyTree, tuple]:
        begin = nothing(len(probes))
        begin = begin, jax.tree.map(lambda x: x[0].astype(at_least_float32(x.dtype)), begin[0])
        ((_, kept), _), norms = lax.scan(functools.partial(lag, reference), begin, jnp.arange(lags + 1))
        return kept, norms

    def stretches(begin: Any, steps: int, state: tuple | None = None, *, counted: Callable = always, uncut: Callable = always) -> tuple:  # fmt: skip
        """Back through stretches side by side, which begin at these steps; step t of each is ``counted(t)`` and ``uncut(t)``."""

        def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
            return back(state, begin + t, counted(t), uncut(t), of_all)[0], None

        return lax.scan(step, nothing(len(begin)) if state is None else state, jnp.arange(steps), reverse=True)[0]

    def left_out(gradient: PyTree) -> jax.Array:
        return _norm(optax.tree.sub(whole, gradient))

    def of_steps(steps: int) -> np.ndarray:
        """Where the stretches of so many begin that have a loss."""
        return np.arange(burn_in // steps * steps, time, steps)

    def by_windows(length: jax.Array) -> jax.Array:
        return left_out(stretches(of_steps(stretch), stretch, uncut=lambda t: t % length > 0)[1])

    def further(state: tuple, depth: jax.Array) -> tuple[tuple, jax.Array]:
        """One window further back from all windows."""
        state = stretches(of_steps(stretch) - depth * stretch, stretch, state, counted=lambda t: depth == 0)
        return state, left_out(state[1])

    # Once to know what all lags keep, and once to know how far from it each is: one program.
    _, (phi, sums, added, kept, without) = lax.scan(all_lags, optax.tree.zeros_like(params), length=2)
    # All losses, each of which sees ``lags`` steps back: stretches, each with the one before it.
    if time <= 2 * lags:
        _, whole = stretches(np.array([0]), time)
    else:
        _, whole = stretches(of_steps(lags) - lags, 2 * lags, counted=lambda t: t >= lags)
    if depths:
        _, windows = lax.scan(further, nothing(len(of_steps(stretch))), jnp.arange(depths[-1] + 1))
        windows = windows[np.array(depths)]
    else:
        windows = lax.map(by_windows, lengths, batch_size=min(4, len(lengths)))  # what is read is the same for a batch
    return phi[0, :-1], sums[0, :-1], added[0], kept[0], without[1], _norm(whole), windows


@functools.partial(jax.jit, static_argnames=("model", "loss"))
def _heard(model: Recurrence, loss: Loss, params: PyTree, carry: PyTree, window: Window) -> jax.Array:
    """How much parameters hear of a gradient by the carry: the most of all steps of ‖∂h/∂θ‖, by a random direction of each."""
    lanes, time = time_shape(window)
    along = jax.tree.map(lambda x: x.swapaxes(0, 1), window)

    def step(state: tuple, at_t: tuple) -> tuple[tuple, jax.Array]:
        carry, key = state
        t, now = at_t
        leaves, tree = jax.tree.flatten(differentiable(carry))
        keys = jax.random.split(jax.random.fold_in(key, t), len(leaves))
        u = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]

        def along_u(params: PyTree) -> jax.Array:
            after, _ = _read(model, loss, params, carry, now)
            return optax.tree.vdot(differentiable(after), jax.tree.unflatten(tree, u))

        return (_read(model, loss, params, carry, now)[0], key), _norm(jax.grad(along_u)(params))

    first = model.initial_carry(params, lanes) if carry is None else carry
    return lax.scan(step, (first, jax.random.key(0)), (jnp.arange(time), along))[1].max()


def _read(model: Recurrence, loss: Loss, params: PyTree, carry: PyTree, step: Window) -> tuple[PyTree, jax.Array]:
    """One step ``[lanes, ...]``, and the sum of its losses by their weights."""
    step = jax.tree.map(lambda x: x[:, None], step)
    carry, outputs = unroll_window(model, params, carry, step)
    return carry, objective(weighted_mean(step_losses(loss, outputs, step), step), 1.0)


def _lane_norms(tree: PyTree, lanes: int) -> jax.Array:
    squares = [jnp.sum(x.astype(at_least_float32(x.dtype)) ** 2, range(1, x.ndim)) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(functools.reduce(jnp.add, squares, jnp.zeros(lanes)))


def _norm(tree: PyTree) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), tree))


def _fitted_rate(phi: np.ndarray, tail: int) -> float:
    """exp of the slope of log φ_k over k ≥ tail; 0 where the gradient vanishes altogether."""
    lags = np.arange(tail, len(phi) + 1)
    heard = phi[tail - 1 :] > 0
    if heard.sum() < 2:
        return 0.0
    return float(np.exp(np.polyfit(lags[heard], np.log(phi[tail - 1 :][heard]), 1)[0]))
