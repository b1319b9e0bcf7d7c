"""The laws of an influence: its gradients are sums of lag gradients, weighed as it promises."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tbptt_jax.arrays import PyTree
from tbptt_jax.cutting import split
from tbptt_jax.gradient import Estimate, Loss, gradient, objective, step_losses, weighted_mean
from tbptt_jax.influence import Influence
from tbptt_jax.noise import drawing
from tbptt_jax.recurrence import Recurrence, unroll_window
from tbptt_jax.testing.comparing import agree, on_host, tolerance_of
from tbptt_jax.testing.subject import subject, weighed, weights_of, window_of
from tbptt_jax.window import Window, check, time_shape

ERRORS = 5  # standard errors that a mean may be off


def lag_gradients(model: Recurrence, loss: Loss, params: PyTree, window: Window) -> PyTree:
    """G[s, t] = (∂l_s/∂h_s) · (∂h_s/∂h_t) · (∂⁺h_t/∂θ) by brute force: each step has parameters of its own.

    The loss at step s, weighed and added up over lanes, by the parameters' use at step t; 0 for t > s. The sum over all s and t
    is the gradient of the stream, and every estimator weighs them. Nothing is drawn.

    Cost: one backward pass for each step, and as many parameters as steps.

    Args:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]``.
      params: its parameters.
      window: a whole stream, ``[lanes, time, ...]``.

    Returns:
      A tree of params, leaves ``[time, time, ...]``: s, then t.
    """
    check(window)
    return _lag_gradients(model, loss, params, jax.tree.map(jnp.asarray, window))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lag_gradients(model: Recurrence, loss: Loss, params: PyTree, window: Window) -> PyTree:
    lanes, time = time_shape(window)

    def losses(copies: PyTree) -> jax.Array:
        def step(carry: PyTree, at_t: tuple) -> tuple[PyTree, jax.Array]:
            own, now = at_t
            now = jax.tree.map(lambda x: x[:, None], now)
            carry, y = unroll_window(model, own, carry, now)
            return carry, objective(weighted_mean(step_losses(loss, y, now), now), 1.0)

        start = model.initial_carry(jax.tree.map(lambda p: p[0], copies), lanes)
        return lax.scan(step, start, (copies, jax.tree.map(lambda x: x.swapaxes(0, 1), window)))[1]

    return jax.jacrev(losses)(jax.tree.map(lambda p: jnp.broadcast_to(p, (time, *jnp.shape(p))), params))


def check_influence(
    influence: Influence,
    model: Recurrence,
    inputs: PyTree = None,
    length: int = 3,
    weights: Callable[[np.ndarray, np.ndarray], Any] | None = None,
    *,
    draws: int = 1,
    params: PyTree = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    """Holds an influence to what it promises of the gradient of each window, Σ w(s, t) · G[s, t]; for unit tests.

    G are the :func:`lag_gradients` of a stream with a reset, padding and weights; s are the steps of the window, t all up
    to s. Parameters stand still, and the model draws nothing.

    Args:
      influence: what is tried.
      model: on which; a small one.
      inputs: ``[lanes, time, ...]``, the whole stream. None: normal numbers, 3 lanes of 8 steps of 2 features.
      length: steps of a window.
      weights: ``(s, t) -> w``, of arrays of steps: ``lambda s, t: s // length - t // length <= 1`` for ``replay(1)``. None: 1, all
        of the past, as for an influence that is exact, or right on average.
      draws: how many times an influence that is random is tried. Its mean needs to be within 5 standard errors, and these
        small enough to tell it from no past at all.
      params: see :func:`check_recurrence`.
      seed: of what is drawn.
      tolerance: see :func:`check_recurrence`.

    Raises:
      AssertionError: a sentence that names the first window whose gradient is another.
      ValueError: if there are too few draws to tell, or the stream is cut nowhere.
    """
    model = model._replace(unroll=drawing(functools.partial(model.unroll), False))
    if inputs is None:
        inputs = np.random.default_rng(seed).normal(size=(3, 8, 2)).astype(jax.dtypes.canonicalize_dtype(float))
    s = subject(model, inputs, params, seed)
    _, time = s.shape
    if length >= time:
        raise ValueError(f"`length` is {length}, and the stream has {time} steps: there is no window with a past.")
    resets, valid = np.zeros(s.shape, bool), np.ones(s.shape, bool)
    resets[:, 0] = resets[-1, time // 2] = True  # the first lane goes on to the end: the past is long
    valid[0, time // 2] = valid[-1, -1] = False
    scored = s.rng.choice([0.0, 0.5, 1.0, 2.0], s.shape)
    scored[0, -1] = 1
    stream = window_of(s, resets, valid)
    stream = stream._replace(targets=weights_of(s, stream)[0], weights=scored.astype(np.float32))
    estimate = gradient(model, weighed, influence=influence, normaliser=1.0)
    keys = jax.random.split(jax.random.key(seed), draws)
    each = on_host(_gradients(estimate, s.params, split(stream, length), keys))

    lags = on_host(lag_gradients(model, weighed, s.params, stream))
    if tolerance is None:
        tolerance = tolerance_of(s.params, s.carry)
    step, use = np.indices((time, time))
    promised = np.broadcast_to(1.0 if weights is None else weights(step, use), (time, time)).astype(float)
    known = _windows(lags, promised, length)
    if draws == 1:
        for n in range(-(-time // length)):
            got, expected = jax.tree.map(lambda g, n=n: g[0, n], each), jax.tree.map(lambda g, n=n: g[n], known)
            claim = f"Influence: the gradient of window {n} is not the sum of lag gradients that it promises"
            agree(claim, got, expected, tolerance)
        return
    inside = _windows(lags, promised * (step // length == use // length), length)
    _mean_is_right(each, known, inside, draws, tolerance)


def _mean_is_right(each: PyTree, known: PyTree, inside: PyTree, draws: int, tolerance: float) -> None:
    """Raises an ``AssertionError`` if the mean over draws is not ``known``; a ``ValueError`` if that cannot be told."""
    mean = jax.tree.map(lambda g: g.mean(0), each)
    past = _flat(known) - _flat(inside)
    of_past = np.array([_flat(jax.tree.map(lambda g, d=d: g[d], each)) - _flat(inside) for d in range(draws)]) @ past
    share, error = of_past.mean() / (past @ past), of_past.std(ddof=1) / (past @ past) / math.sqrt(draws)
    if not ERRORS * error < 1:
        raise ValueError(
            f"{draws} draws are too few to tell this influence from one that knows no past: give more `draws`."
        )
    if abs(share - 1) > ERRORS * error + tolerance:
        raise AssertionError(
            f"Influence: the mean of {draws} draws has {share:.3f} of the past that it promises, at a standard error of {error:.3f}."
        )
    for (path, m), k, g in zip(jax.tree.leaves_with_path(mean), *map(jax.tree.leaves, (known, each)), strict=True):
        off = ERRORS * g.std(0, ddof=1) / math.sqrt(draws) + tolerance * (1 + np.abs(k).max())
        bad = np.argwhere(np.abs(m - k) > off)
        if len(bad):
            at = tuple(bad[0])
            raise AssertionError(
                f"Influence: the mean of {draws} draws is not the sum of lag gradients that it promises (in window {at[0]}, of "
                f"{jax.tree_util.keystr(path)}, {m[at]:.6g} against {k[at]:.6g})."
            )


@functools.partial(jax.jit, static_argnums=0)
def _gradients(estimate: Estimate, params: PyTree, windows: Window, keys: jax.Array) -> PyTree:
    """The gradient of each window, leaves ``[draws, windows, ...]``."""

    def update(state: PyTree, window: Window) -> tuple[PyTree, PyTree]:
        found, state, _ = estimate.update(params, state, window)
        return state, found

    first = jax.tree.map(lambda x: x[0], windows)
    return jax.vmap(lambda key: lax.scan(update, estimate.init(key, params, first), windows)[1])(keys)


def _windows(lags: PyTree, promised: np.ndarray, length: int) -> PyTree:
    """Σ w(s, t) · G[s, t] over the steps s of each window, leaves ``[windows, ...]``."""

    def leaf(g: np.ndarray) -> np.ndarray:
        by_step = np.einsum("st,st...->s...", promised, g)
        return np.stack([by_step[first : first + length].sum(0) for first in range(0, len(g), length)])

    return jax.tree.map(leaf, lags)


def _flat(tree: PyTree) -> np.ndarray:
    parts = [np.stack([x.real, x.imag]) if np.iscomplexobj(x) else x for x in jax.tree.leaves(tree)]
    return np.concatenate([x.ravel().astype(np.float64) for x in parts])
