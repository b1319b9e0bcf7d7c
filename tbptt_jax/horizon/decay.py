"""How gradients fade with the lag, and the window whose bias is bounded by what is seen of that."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from tbptt_jax.arrays import at_least_float32, check_whole, pad, where_lanes
from tbptt_jax.gradient import Loss, differentiable, objective, of_real, step_losses, weighted_mean
from tbptt_jax.recurrence import Recurrence, scale_cotangent, unroll_window
from tbptt_jax.window import Window, check, is_scored, step_weights, time_shape

PyTree = Any


class Decay(NamedTuple):
    """How gradients fade with the lag, and what is kept of the gradient where losses see so many steps back.

    Attributes:
      norms: φ_k = E‖∂l_s/∂h_{s-k}‖ for k = 1 … lags, ``[lags]``; the mean over probes.
      rate: β̂, the factor by which φ shrinks from one lag to the next, fitted to its tail; 1 or more: it does not.
      probes: how many losses l_s were traced back.
      kept: ‖ĝ_K‖ for K = 0 … lags, ``[lags + 1]``: of the probes' mean gradient by the parameters, where each sees K steps back.
      left_out: ‖ĝ_lags − ĝ_K‖, ``[lags + 1]``.
      beyond: a bound on what is further back than ``lags``, if φ goes on shrinking by β̂; 0 where nothing is.
      whole: ‖ĝ‖ of all the window's losses, where each sees ``lags`` steps back or more.
      lengths: of windows, ``[n]``, from short to long.
      windows: how far from that the gradient by windows of each length with ``truncate()`` is, ``[n]``.
    """

    norms: np.ndarray
    rate: float
    probes: int
    kept: np.ndarray
    left_out: np.ndarray
    beyond: float
    whole: float
    lengths: np.ndarray
    windows: np.ndarray


class Suggestion(NamedTuple):
    """A truncation, and what it leaves out.

    Attributes:
      window: steps of a window for ``truncate()``.
      horizon: steps that every loss needs to see back, as with ``replay(m)`` and windows of k ≥ horizon / m.
      relative_bias: the bound δ on the relative bias of that window; infinite where nothing bounds it.
      safe: whether it is below the tolerance.
      reason: a sentence, with what the bound rests on.
    """

    window: int
    horizon: int
    relative_bias: float
    safe: bool
    reason: str


def decay(
    model: Recurrence,
    loss: Loss,
    params: PyTree,
    window: Window,
    *,
    lags: int,
    tail: int | None = None,
    carry: PyTree = None,
    burn_in: int = 0,
    probes: int | None = None,
    lengths: Sequence[int] | None = None,
) -> Decay:
    """How the gradient of a step's loss fades with the lag, and what of the parameters' gradient is kept up to each.

    Probes are traced back together, a lag at a time: that takes ``2 * lags`` steps, forward and backward, of as many lanes as there
    are probes. Then windows of some lengths are tried on all losses. Memory is that of the window's carries.

    Args:
      model: the recurrence.
      loss: as for :func:`tbptt_jax.gradient`.
      params: the parameters.
      window: ``[lanes, time, ...]``, at least ``lags`` steps. A probe whose step is not scored is not counted.
      lags: the longest lag to look at.
      tail: the lag from which β̂ is fitted, the τ of the paper; default half of ``lags``.
      carry: what the lanes have before the window, as in the middle of a stream; None: the initial carry.
      burn_in: steps at the window's beginning whose losses are not traced back.
      probes: steps, spread evenly, whose losses are traced back. None: all, or so many that there are 1024 with those of all
        lanes.
      lengths: of the windows to try, from short to long. None: four an octave, up to the window's steps.

    Raises:
      ValueError: if the window or the loss's shape is not as for :func:`tbptt_jax.gradient`, ``lags`` is not from 2 to the
        window's steps, ``tail`` not from 1 to ``lags - 1``, no probe is scored, or a gradient is not finite.

    Reference: Aicher, Foti & Fox 2019, *Adaptively truncating backpropagation through time to control gradient bias*,
    section 3.
    """
    check(window)
    lanes, time = time_shape(window)
    if not 2 <= lags <= time:
        raise ValueError(f"`lags` is {lags}; this probe window has {time} steps, so choose from 2 to {time}.")
    tail = lags // 2 if tail is None else tail
    if not 1 <= tail < lags:
        raise ValueError(
            f"`tail` is {tail}; the decay is fitted from there to lag {lags}, so choose from 1 to {lags - 1}."
        )
    if not 0 <= burn_in < time:
        raise ValueError(f"`burn_in` is {burn_in}; this probe window has {time} steps, so choose from 0 to {time - 1}.")
    probes = max(1, 1024 // lanes) if probes is None else probes
    check_whole("probes", probes)
    steps = np.arange(burn_in, time)
    if probes < len(steps):  # the last of so many stretches
        steps = burn_in - 1 + np.arange(1, probes + 1) * (time - burn_in) // probes
    burnt = jax.tree.map(lambda w: w.at[:, :burn_in].set(0), step_weights(window))
    window = window._replace(weights=burnt)
    scored = is_scored(window)[:, steps]
    if not bool(scored.any()):
        raise ValueError(
            "None of the steps that were to be traced back is scored, so there is no loss: give more `probes`."
        )
    if lengths is None:  # four an octave
        lengths = np.geomspace(1, time, 2 + int(4 * np.log2(time))).round().astype(int).tolist()
    tried = np.unique(lengths)
    if not len(tried) or not 1 <= tried[0] <= tried[-1] <= time:
        raise ValueError(
            f"`lengths` are {tried.tolist()}; this probe window has {time} steps, so choose from 1 to {time}."
        )
    found = _traced(model, loss, lags, params, carry, window, jnp.asarray(steps), jnp.asarray(tried))
    phi, added, kept, left_out, whole, windows = (np.asarray(x, np.float64) for x in found)
    if not np.isfinite(phi).all():
        raise ValueError(
            f"The gradient is not finite from lag {np.flatnonzero(~np.isfinite(phi))[0] + 1} on: it explodes at these "
            "parameters. Trace fewer `lags`, or measure at others."
        )
    rate = _fitted_rate(phi, tail)
    beyond = 0.0
    if time > lags + 1 or carry is not None:  # a lag adds at most so much for what it has of φ
        most = np.max(added[1:] / np.where(phi > 0, phi, np.inf), initial=0.0)
        beyond = float(most * phi[-1] * rate / (1 - rate)) if rate < 1 else float("inf")
    return Decay(phi, rate, int(scored.sum()), kept, left_out, beyond, float(whole), tried, windows)


def suggest(fading: Decay, *, tolerance: float = 0.1, largest: int = 1000) -> Suggestion:
    """The shortest window, and the shortest horizon, whose truncation bias is bounded to be below ``tolerance``.

    Where every loss sees K steps back, at most E(K) = ‖ĝ_lags − ĝ_K‖ + ``beyond`` is left out of the gradient, which is itself
    no smaller than ‖ĝ_K'‖ − E(K') for any K', and the relative bias is at most

        δ(K) = E(K) / max_{K' ≤ K} (‖ĝ_K'‖ − E(K')).

    So much is true of windows too, with what they were seen to leave out in the place of ‖ĝ_lags − ĝ_K‖ and ``whole`` in that of
    ‖ĝ_K'‖. The bound is of the losses of the window that was looked at, and rests on φ fading on beyond ``lags`` as before.

    Args:
      fading: from :func:`decay`.
      tolerance: δ needs to be below it; positive.
      largest: the longest window allowed, in steps, at least 1; returned where none is safe.

    Returns:
      The shortest of the measured windows from which on all are below the tolerance. A longer horizon than ``lags`` is one that
      φ would need if it went on as it does.

    Raises:
      ValueError: if ``tolerance`` is not positive or ``largest`` is below 1.

    Reference: Aicher, Foti & Fox 2019, section 3.3, where E is M Σ_{k>K} φ_k. (Their code returns 1 where β̂ ≥ 1.)
    """
    if not tolerance > 0:
        raise ValueError(f"`tolerance` is {tolerance}; it needs to be positive, such as 0.1 for a bias of a tenth.")
    if largest < 1:
        raise ValueError(f"`largest` is {largest}; a window has at least 1 step.")
    if fading.rate >= 1:
        reason = (
            f"The gradient does not fade: from one lag to the next it changes by a factor of {fading.rate:.4f}. No window "
            f"is safe; {largest} is the largest allowed."
        )
        return Suggestion(largest, largest, float("inf"), False, reason)

    lags = len(fading.norms)
    further = fading.beyond * fading.rate ** np.arange(1, max(0, largest - lags) + 1)
    left_out = np.concatenate([fading.left_out + fading.beyond, further])[1 : largest + 1]  # E(K) for K = 1, 2, …
    kept = np.append(fading.kept[1:], np.full(len(further), fading.kept[-1]))[:largest]
    horizon, _ = _first_below(left_out, np.maximum.accumulate(kept - left_out), tolerance)
    allowed = fading.lengths <= largest
    at_least = np.full(allowed.sum(), fading.whole - fading.beyond)
    index, delta = _first_below(fading.windows[allowed] + fading.beyond, at_least, tolerance)
    window = int(fading.lengths[allowed][index - 1])
    rests = (
        f"if gradients fade by {fading.rate:.4f} a lag beyond lag {lags} too"
        if fading.beyond
        else "which is all there is"
    )
    fits = f"β̂ is {fading.rate:.4f}; every loss should see {horizon} steps back."
    if delta < tolerance:
        reason = f"Windows of {window} have a relative bias of at most {delta:.2g} on these losses, {rests}. {fits}"
        return Suggestion(window, horizon, delta, True, reason)
    reason = f"No window up to {largest} is known to keep the relative bias below {tolerance:g}; for {window} the bound is {delta:.2g}. {fits}"
    return Suggestion(largest, horizon, delta, False, reason)


@functools.partial(jax.jit, static_argnames=("model", "loss", "lags"))
def _traced(
    model: Recurrence,
    loss: Loss,
    lags: int,
    params: PyTree,
    carry: PyTree,
    window: Window,
    probes: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, ...]:
    """φ ``[lags]``; norms of gradients by the parameters: of what each lag adds and of what is kept up to it, ``[lags + 1]``; of
    what that leaves out; of the whole, and of what windows of ``lengths`` leave out of it."""
    lanes, time = time_shape(window)
    fresh = carry is None
    along = jax.tree.map(lambda x: x.swapaxes(0, 1), window)
    weights = functools.reduce(jnp.add, jax.tree.leaves(window.weights))
    total = weights[:, probes].sum()

    def start(params: PyTree) -> PyTree:
        return model.initial_carry(params, lanes) if fresh else carry

    def read(params: PyTree, carry: PyTree, step: Window) -> tuple[PyTree, jax.Array]:
        """One step ``[lanes, ...]``, and the sum of its losses by their weights."""
        step = jax.tree.map(lambda x: x[:, None], step)
        carry, outputs = unroll_window(model, params, carry, step)
        return carry, objective(weighted_mean(step_losses(loss, outputs, step), step), 1.0) / total

    def total_loss(params: PyTree, carry: PyTree, steps: Window, uncut: jax.Array) -> jax.Array:
        """Of steps ``[time, lanes, ...]``; gradients go back through the carry into a step where it is not cut."""

        @jax.checkpoint
        def one(carry: PyTree, at_t: tuple) -> tuple[PyTree, jax.Array]:
            step, edge = at_t
            return read(params, scale_cotangent(edge.astype(jnp.float32), carry), step)

        return lax.scan(one, carry, (steps, uncut))[1].sum()

    def by_windows(length: jax.Array) -> PyTree:
        uncut = (jnp.arange(time) % length > 0) | (jnp.arange(time) == 0)
        return jax.grad(lambda p: total_loss(p, start(p), along, uncut))(params)

    before = lax.scan(lambda h, step: (read(params, h, step)[0], h), start(params), along)[1]

    def merged(tree: PyTree, at: jax.Array) -> PyTree:
        """The steps at which the probes are, as so many lanes."""
        return jax.tree.map(lambda x: x[jnp.maximum(at, 0)].reshape(-1, *x.shape[2:]), tree)

    def lag(reference: PyTree, state: tuple, k: jax.Array) -> tuple[tuple, tuple]:
        """Adds what the step k before each probe gives its parameters; cotangents are of the carry after it, then before it."""
        cotangent, kept = state
        at = probes - k
        there, step = merged(before, at), merged(along, at)

        def weighed(params: PyTree, numbers: PyTree) -> jax.Array:
            after, losses = read(params, of_real(numbers, there), step)
            return optax.tree.vdot(differentiable(after), cotangent) + jnp.where(k == 0, losses, 0)

        added, back = jax.grad(weighed, (0, 1))(params, differentiable(there))
        past = jnp.where(at >= 0, weights[:, probes], 0).sum() / total  # of those that have so much of it
        phi = _lane_norms(back, len(probes) * lanes).sum() / jnp.where(past > 0, past, 1)
        if fresh:  # then the parameters may also make the carry that the stream begins with
            begun = where_lanes(jnp.repeat(at == 0, lanes), back, jax.tree.map(jnp.zeros_like, back))
            of_start = jax.grad(
                lambda p: optax.tree.vdot(differentiable(model.initial_carry(p, len(probes) * lanes)), begun)
            )(params)
            added = optax.tree.add(added, of_start)
        back = where_lanes(jnp.repeat(at > 0, lanes), back, jax.tree.map(jnp.zeros_like, back))
        kept = optax.tree.add(kept, added)
        return (back, kept), (phi, _norm(added), _norm(kept), _norm(optax.tree.sub(reference, kept)))

    def all_lags(reference: PyTree, _: None) -> tuple[PyTree, tuple]:
        none = jax.tree.map(jnp.zeros_like, differentiable(merged(before, probes)))
        begin = none, optax.tree.zeros_like(params)
        (_, kept), norms = lax.scan(functools.partial(lag, reference), begin, jnp.arange(lags + 1))
        return kept, norms

    def far_seeing() -> PyTree:
        """The gradient of all losses, each of which sees ``lags`` steps back: stretches, each with the one before it."""
        if time <= 2 * lags:
            return by_windows(jnp.array(time))
        steps = jax.tree.map(lambda x: pad(x, 0, -time % lags), along)
        stretches = jax.tree.map(lambda x: x.reshape(-1, lags, *x.shape[1:]), steps)

        def with_the_one_before(x: jax.Array) -> jax.Array:
            """``[2 * lags, stretches - 1 · lanes, ...]``."""
            both = jnp.concatenate([x[:-1], x[1:]], 1).swapaxes(0, 1)
            return both.reshape(2 * lags, -1, *both.shape[3:])

        later = jax.tree.map(with_the_one_before, stretches)
        later = later._replace(weights=jax.tree.map(lambda w: w.at[:lags].set(0), later.weights))
        carries = merged(before, jnp.arange(len(jax.tree.leaves(stretches)[0]) - 1) * lags)

        def both(params: PyTree) -> jax.Array:
            first = total_loss(params, start(params), jax.tree.map(lambda x: x[:lags], along), jnp.ones(lags, bool))
            return first + total_loss(params, carries, later, jnp.ones(2 * lags, bool))

        return jax.grad(both)(params)

    # Once to know what all lags keep, and once to know how far from it each is: one program.
    _, (phi, added, kept, left_out) = lax.scan(all_lags, optax.tree.zeros_like(params), length=2)
    whole = far_seeing()
    windows = lax.map(lambda n: _norm(optax.tree.sub(whole, by_windows(n))), lengths)
    return phi[0, :-1], added[0], kept[0], left_out[1], _norm(whole), windows


def _lane_norms(tree: PyTree, lanes: int) -> jax.Array:
    squares = [jnp.sum(x.astype(at_least_float32(x.dtype)) ** 2, range(1, x.ndim)) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(functools.reduce(jnp.add, squares, jnp.zeros(lanes)))


def _norm(tree: PyTree) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), tree))


def _first_below(left_out: np.ndarray, at_least: np.ndarray, tolerance: float) -> tuple[int, float]:
    """The first length, from 1 on, from which on δ = left_out / at_least is below the tolerance, else the last; and its δ."""
    delta = np.where(at_least > 0, left_out / np.where(at_least > 0, at_least, 1), np.inf)
    delta = np.where(left_out == 0, 0.0, delta)  # nothing is left out, also where there is no past at all
    above = np.flatnonzero(delta >= tolerance)
    index = min(above[-1] + 1 if len(above) else 0, len(delta) - 1)
    return int(index) + 1, float(delta[index])


def _fitted_rate(phi: np.ndarray, tail: int) -> float:
    """exp of the slope of log φ_k over k ≥ tail; 0 where the gradient vanishes altogether."""
    lags = np.arange(tail, len(phi) + 1)
    heard = phi[tail - 1 :] > 0
    if heard.sum() < 2:
        return 0.0
    return float(np.exp(np.polyfit(lags[heard], np.log(phi[tail - 1 :][heard]), 1)[0]))
