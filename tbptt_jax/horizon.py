"""How long should a window be? What a truncation leaves out, measured.

In three calls:

    fading = horizon.decay(model, loss, params, window, lags=200)         how fast gradients fade: φ_k
    choice = horizon.suggest(fading, tolerance=0.1)                       the window that leaves out little enough
    report = horizon.bias(model, loss, params, window, 20, tb.replay(1))  windows of 20 against full BPTT
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tbptt_jax.arrays import at_least_float32
from tbptt_jax.cutting import split
from tbptt_jax.gradient import Loss, as_real, gradient, objective, step_losses, weighted_mean
from tbptt_jax.influence import Influence
from tbptt_jax.recurrence import Recurrence, rematerialised, unroll_window
from tbptt_jax.window import Window, check, is_scored, time_shape

PyTree = Any


class Decay(NamedTuple):
    """How gradients fade with the lag.

    Attributes:
      norms: φ_k = E‖∂l_s/∂h_{s-k}‖ for k = 1 … lags, ``[lags]``; the mean over probes.
      rate: β̂, the factor by which φ shrinks from one lag to the next, fitted to its tail; 1 or more: it does not.
      probes: how many losses l_s were traced back.
    """

    norms: np.ndarray
    rate: float
    probes: int


class Choice(NamedTuple):
    """A truncation, and what it leaves out.

    Attributes:
      window: steps of a window for ``truncate()`` with every step scored: the loss at its j-th step sees j - 1 steps back.
      horizon: steps that every loss needs to see back, as with ``replay(m)`` and windows of k ≥ horizon / m.
      relative_bias: the bound δ on the relative bias of that window; infinite where nothing bounds it.
      safe: whether it is within the tolerance.
      reason: a sentence.
    """

    window: int
    horizon: int
    relative_bias: float
    safe: bool
    reason: str


class Bias(NamedTuple):
    """An estimator of the gradient against full BPTT, over all parameters and by group (the top level of their tree).

    Attributes:
      relative_bias: ‖E ĝ − g‖ / ‖g‖.
      cosine: of the angle between E ĝ and g.
      relative_std: √E‖ĝ − E ĝ‖² / ‖g‖, from one draw of a random influence to another; NaN from a single draw.
      groups: the same three for each group, name → Bias with no groups.
    """

    relative_bias: float
    cosine: float
    relative_std: float
    groups: dict[str, "Bias"]


def decay(
    model: Recurrence, loss: Loss, params: PyTree, window: Window, *, lags: int, tail: int | None = None
) -> Decay:
    """The norms φ_k of the gradient of one step's loss by the carry k steps before, from one backward sweep a probe.

    The window is read from the initial carry on. Each stretch of ``lags`` steps gives one probe a lane, its last step's
    loss, so that memory is that of one stretch however long the window.

    Args:
      model: the recurrence.
      loss: as for :func:`tbptt_jax.gradient`.
      params: the parameters.
      window: ``[lanes, time, ...]``, at least ``lags`` steps. A probe whose step is not scored is not counted.
      lags: the longest lag to look at.
      tail: the lag from which β̂ is fitted, the τ of the paper; default half of ``lags``.

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
    whole = time // lags * lags

    def stretch(x: jax.Array) -> jax.Array:  # as they are: a reset, as `split` adds where there are none, ends the past
        return x[:, :whole].reshape(lanes, -1, lags, *x.shape[2:]).swapaxes(0, 1)

    stretches = jax.tree.map(stretch, window)
    norms, scored = jax.tree.map(np.asarray, _sweep(model, loss, params, stretches))
    if not scored.any():
        raise ValueError(f"None of the steps {lags}, {2 * lags}, … is scored, so there is no loss to trace back from.")
    phi = norms[scored].mean(0)
    if not np.isfinite(phi).all():
        raise ValueError(
            f"The gradient is not finite from lag {np.flatnonzero(~np.isfinite(phi))[0] + 1} on: it explodes at these "
            "parameters. Trace fewer `lags`, or measure at others."
        )
    return Decay(phi, _fitted_rate(phi, tail), int(scored.sum()))


def suggest(fading: Decay, *, tolerance: float = 0.1, largest: int = 1000) -> Choice:
    """The smallest window, and the smallest horizon, whose truncation bias is bounded by ``tolerance``.

    Lags beyond those measured follow φ geometrically with β̂. In units of ‖∂h/∂θ‖, which cancel, a loss that sees K steps
    back misses at most E(K) = Σ_{k>K} φ_k of a gradient of which it keeps ĝ(K) = Σ_{k≤K} φ_k, and the relative bias is at
    most δ(K) = E(K) / (ĝ(K) − E(K)). The losses of a window see 0, 1, … steps back: for it, E and ĝ are the means over
    them. With β̂ ≥ 1 the sums have no end and no window is safe.

    Args:
      fading: from :func:`decay`.
      tolerance: the largest δ to accept, positive.
      largest: the largest window allowed, in steps, at least 1; returned where none is safe.

    Raises:
      ValueError: if ``tolerance`` is not positive or ``largest`` is below 1.

    Reference: Aicher, Foti & Fox 2019, theorem 1 and section 3.3, for the horizon. (Their code returns 1 where β̂ ≥ 1.)
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
        return Choice(largest, largest, float("inf"), False, reason)

    measured = len(fading.norms)
    beyond = fading.norms[-1] * fading.rate ** np.arange(1, max(0, largest - measured) + 1)
    phi = np.concatenate([fading.norms, beyond]).astype(np.float64)
    rest = phi[-1] * fading.rate / (1 - fading.rate)
    left_out = np.append(np.cumsum(phi[::-1])[::-1] + rest, rest)  # E(K) for K = 0, 1, …
    total = left_out[0]
    by_window = np.cumsum(left_out[:largest]) / np.arange(1, largest + 1)
    horizon, _ = _first_within(left_out[1 : largest + 1], total, tolerance)
    window, delta = _first_within(by_window, total, tolerance)
    fits = f"β̂ is {fading.rate:.4f}; every loss should see {horizon} steps back."
    if delta <= tolerance:
        reason = f"Windows of {window} bound the relative bias by {delta:.2g}. {fits}"
    else:
        reason = f"No window up to {largest} keeps the relative bias within {tolerance:g}; {largest} bounds it by {delta:.2g}. {fits}"
    return Choice(window, horizon, delta, bool(delta <= tolerance), reason)


def bias(
    model: Recurrence,
    loss: Loss,
    params: PyTree,
    window: Window,
    length: int,
    influence: Influence | None = None,
    *,
    key: jax.Array | None = None,
    draws: int = 1,
) -> Bias:
    """How far an influence with windows of ``length`` is from full BPTT over the probe window, at fixed parameters.

    The estimate is summed over the windows; full BPTT is one window over all steps, rematerialised in segments of √time,
    so that 100,000 steps fit.

    Args:
      model: the recurrence.
      loss: as for :func:`tbptt_jax.gradient`.
      params: the parameters.
      window: ``[lanes, time, ...]``.
      length: steps in each of the estimator's windows, at most the window's.
      influence: default :func:`tbptt_jax.truncate`.
      key: for random influences; default ``jax.random.key(0)``.
      draws: how many times to estimate. The mean of a few draws of a noisy influence is itself noisy: its standard error
        is ``relative_std / √draws``.

    Raises:
      ValueError: if ``draws`` is below 1, ``length`` is not a whole number from 1 to the window's steps, no step is scored,
        or the window, the loss or the influence is not as for :func:`tbptt_jax.gradient`.
    """
    check(window)
    if draws < 1:
        raise ValueError(f"`draws` is {draws}; at least 1 estimate is needed.")
    windows = split(window, length)
    key = jax.random.key(0) if key is None else key
    exact, mean, spread = _compare(model, loss, influence, draws, params, window, windows, key)
    groups = exact.items() if isinstance(exact, dict) else [("params", exact)]
    part = (lambda tree, name: tree[name]) if isinstance(exact, dict) else (lambda tree, name: tree)
    by_group = {name: _bias(g, part(mean, name), part(spread, name), {}) for name, g in groups}
    return _bias(exact, mean, spread, by_group)


@functools.partial(jax.jit, static_argnames=("model", "loss"))
def _sweep(model: Recurrence, loss: Loss, params: PyTree, stretches: Window) -> tuple[jax.Array, jax.Array]:
    """Norms ``[probes, lanes, lags]`` and whether each probe is scored, ``[probes, lanes]``."""
    _, lanes, lags = time_shape(stretches, ("stretches", "lanes", "time"))

    def of_carry(cotangent: jax.Array) -> jax.Array:
        size = jnp.abs(cotangent)
        return jnp.sum(size.astype(at_least_float32(size.dtype)) ** 2, range(2, size.ndim))

    def probe(carry: PyTree, stretch: Window) -> tuple[PyTree, tuple]:
        def last_loss(nudges: PyTree) -> tuple[jax.Array, PyTree]:
            def one_step(carry: PyTree, at_t: tuple) -> tuple[PyTree, jax.Array]:
                nudge, step = at_t
                carry = jax.tree.map(lambda h, n: h if n is None else h + n, carry, nudge, is_leaf=lambda x: x is None)
                step = jax.tree.map(lambda x: x[:, None], step)
                carry, outputs = unroll_window(model, params, carry, step)
                losses = jax.tree.leaves(step_losses(loss, outputs, step))
                return carry, sum(x[:, 0].astype(at_least_float32(x.dtype)) for x in losses)

            steps = jax.tree.map(lambda x: x.swapaxes(0, 1), stretch)
            end, losses = lax.scan(one_step, carry, (nudges, steps))
            return losses[-1].sum(), end

        nudges = jax.tree.map(
            lambda h: jnp.zeros((lags, *h.shape), h.dtype) if jnp.issubdtype(h.dtype, jnp.inexact) else None, carry
        )
        cotangents, carry = jax.grad(last_loss, has_aux=True)(nudges)  # of the carry before each step
        square = functools.reduce(jnp.add, map(of_carry, jax.tree.leaves(cotangents)))
        return carry, (jnp.sqrt(square).T[:, ::-1], is_scored(stretch)[:, -1])

    return lax.scan(probe, model.initial_carry(params, lanes), stretches)[1]


def _first_within(left_out: np.ndarray, total: float, tolerance: float) -> tuple[int, float]:
    """The first length, from 1 on, with δ = E / (total - 2E) within the tolerance, else the last; and its δ."""
    margin = total - 2 * left_out
    delta = np.where(margin > 0, left_out / np.where(margin > 0, margin, 1), np.inf)
    delta = np.where(left_out == 0, 0.0, delta)  # nothing is left out, also where there is no past at all
    within = np.flatnonzero(delta <= tolerance)
    index = within[0] if len(within) else len(delta) - 1
    return int(index) + 1, float(delta[index])


def _fitted_rate(phi: np.ndarray, tail: int) -> float:
    """exp of the slope of log φ_k over k ≥ tail; 0 where the gradient vanishes altogether."""
    lags = np.arange(tail, len(phi) + 1)
    heard = phi[tail - 1 :] > 0
    if heard.sum() < 2:
        return 0.0
    return float(np.exp(np.polyfit(lags[heard], np.log(phi[tail - 1 :][heard]), 1)[0]))


@functools.partial(jax.jit, static_argnames=("model", "loss", "influence", "draws"))
def _compare(
    model: Recurrence,
    loss: Loss,
    influence: Influence | None,
    draws: int,
    params: PyTree,
    window: Window,
    windows: Window,
    key: jax.Array,
) -> tuple[PyTree, PyTree, PyTree]:
    """Full BPTT's gradient, the estimates' mean, and the mean square of their distance from it, leaf by leaf."""
    full = rematerialised(model, "sqrt")

    def total_loss(params: PyTree) -> jax.Array:
        lanes, _ = time_shape(window)
        _, outputs = unroll_window(full, params, model.initial_carry(params, lanes), window)
        return objective(weighted_mean(step_losses(loss, outputs, window), window), 1.0)

    estimate = gradient(model, loss, influence=influence, normaliser=1.0)

    def one_draw(key: jax.Array) -> PyTree:
        stream = estimate.init(key, params, jax.tree.map(lambda x: x[0], windows))

        def add(state: tuple, window: Window) -> tuple[tuple, None]:
            stream, total = state
            grads, stream, _ = estimate.update(params, stream, window)
            return (stream, jax.tree.map(jnp.add, total, grads)), None

        return lax.scan(add, (stream, jax.tree.map(jnp.zeros_like, params)), windows)[0][1]

    estimates = lax.map(one_draw, jax.random.split(key, draws), batch_size=min(draws, 16))
    mean = jax.tree.map(lambda e: e.mean(0), estimates)
    spread = jax.tree.map(lambda e, m: jnp.sum(jnp.abs(e - m) ** 2, 0) / (draws - 1 or jnp.nan), estimates, mean)
    return jax.grad(total_loss)(params), mean, spread


def _bias(exact: PyTree, mean: PyTree, spread: PyTree, groups: dict[str, Bias]) -> Bias:
    g, e, s = (
        np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(as_real(t))])
        for t in (exact, mean, spread)
    )
    size = np.linalg.norm(g)
    if size == 0:
        return Bias(0.0 if not e.any() else float("inf"), float("nan"), float("nan"), groups)
    cosine = float(g @ e / (size * np.linalg.norm(e))) if e.any() else 0.0
    return Bias(float(np.linalg.norm(e - g) / size), cosine, float(np.sqrt(s.sum()) / size), groups)
