"""A truncated gradient against that of full BPTT."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tbptt_jax.arrays import check_whole, is_leaf, quoted
from tbptt_jax.cutting import split
from tbptt_jax.gradient import Loss, as_real, gradient, objective, step_losses, weighted_mean
from tbptt_jax.influence import Influence
from tbptt_jax.noise import is_key, takes_key
from tbptt_jax.recurrence import Recurrence, rematerialised, unroll_window
from tbptt_jax.window import Window, check, check_scored, step_weights, time_shape

PyTree = Any


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
    so that 100,000 steps fit. Of several losses with weights of their own each counts by its mean over the probe window.

    Args:
      model: the recurrence. It draws nothing, as where it is not trained: no dropout.
      loss: as for :func:`tbptt_jax.gradient`.
      params: the parameters.
      window: ``[lanes, time, ...]``.
      length: steps in each of the estimator's windows, at most the window's.
      influence: default :func:`tbptt_jax.truncate`.
      key: for random influences; default ``jax.random.key(0)``.
      draws: how many times to estimate. The mean of a few draws of a noisy influence is itself noisy: its standard error
        is ``relative_std / √draws``.

    Raises:
      ValueError: if ``draws`` is not a whole number of at least 1, ``key`` is none, ``length`` is not a whole number from 1 to the
        window's steps, no step is scored, or the window, the loss or the influence is not as for :func:`tbptt_jax.gradient`.
    """
    check(window)
    check_whole("draws", draws)
    key = key_of(key)
    check_scored(window)
    window = balanced(window)
    windows = split(window, length)
    exact, mean, spread = _compare(model, loss, influence, int(draws), params, window, windows, key)
    groups = exact.items() if isinstance(exact, dict) else [("params", exact)]
    part = (lambda tree, name: tree[name]) if isinstance(exact, dict) else (lambda tree, name: tree)
    by_group = {name: _bias(g, part(mean, name), part(spread, name), {}) for name, g in groups}
    return _bias(exact, mean, spread, by_group)


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

    def one_draw(key: jax.Array) -> PyTree:
        return summed(model, loss, influence, params, windows, key)

    estimates = lax.map(one_draw, jax.random.split(key, draws), batch_size=min(draws, 16))
    mean = jax.tree.map(lambda e: e.mean(0), estimates)
    spread = jax.tree.map(lambda e, m: jnp.sum(jnp.abs(e - m) ** 2, 0) / (draws - 1 or jnp.nan), estimates, mean)
    return full(model, loss, params, window), mean, spread


def full(model: Recurrence, loss: Loss, params: PyTree, window: Window) -> PyTree:
    """The gradient of a window's summed losses by full BPTT from the initial carry, rematerialised in segments of √time."""
    in_segments = rematerialised(model, "sqrt")

    def total_loss(params: PyTree) -> jax.Array:
        lanes, _ = time_shape(window)
        _, outputs = unroll_window(in_segments, params, model.initial_carry(params, lanes), window)
        return objective(weighted_mean(step_losses(loss, outputs, window), window), 1.0)

    return jax.grad(total_loss)(params)


def summed(
    model: Recurrence, loss: Loss, influence: Influence | None, params: PyTree, windows: Window, key: jax.Array
) -> PyTree:
    """The sum of an estimator's gradients over a stream's windows, ``[windows, lanes, time, ...]``, at fixed parameters."""
    estimate = gradient(without_draws(model), loss, influence=influence, normaliser=1.0)
    stream = estimate.init(key, params, jax.tree.map(lambda x: x[0], windows))

    def add(state: tuple, window: Window) -> tuple[tuple, None]:
        stream, total = state
        grads, stream, _ = estimate.update(params, stream, window)
        return (stream, jax.tree.map(jnp.add, total, grads)), None

    return lax.scan(add, (stream, jax.tree.map(jnp.zeros_like, params)), windows)[0][1]


@functools.lru_cache(maxsize=64)
def without_draws(model: Recurrence) -> Recurrence:
    """The same model, which takes no key, and so has no dropout; a random influence draws as ever."""
    if not isinstance(model, Recurrence) or not takes_key(model.unroll):
        return model

    def unroll(params: PyTree, carry: PyTree, inputs: PyTree, *masks: jax.Array | None, **edges: jax.Array) -> tuple:
        return model.unroll(params, carry, inputs, *masks, **edges)

    return model._replace(unroll=unroll)


def balanced(window: Window) -> Window:
    """The same window; of several losses with weights of their own each counts by its mean over the window, as in training.

    Weights that are a tree are divided each by its own sum; one array, or None, stays.
    """
    if window.weights is None or is_leaf(window.weights):
        return window
    of_mean = lambda w: w / jnp.where(w.sum() > 0, w.sum(), 1)  # noqa: E731
    return window._replace(weights=jax.tree.map(of_mean, step_weights(window)))


def key_of(key: jax.Array | None) -> jax.Array:
    """The key, or where it is None, ``jax.random.key(0)``.

    Raises:
      ValueError: if it is no key, as ``jax.random.key`` or ``jax.random.PRNGKey`` makes one.
    """
    if key is None:
        return jax.random.key(0)
    is_array = isinstance(key, jax.Array | np.ndarray)
    if not is_array or key.ndim != (0 if is_key(key) else 1) or not (is_key(key) or key.dtype == np.uint32):
        raise ValueError(f"`key` is {quoted(key)}; it needs to be one key, such as `jax.random.key(0)`.")
    return key


def flat(tree: PyTree) -> np.ndarray:
    """All of a tree's numbers, in float64."""
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(as_real(tree))])


def _bias(exact: PyTree, mean: PyTree, spread: PyTree, groups: dict[str, Bias]) -> Bias:
    g, e, s = map(flat, (exact, mean, spread))
    size = np.linalg.norm(g)
    if size == 0:
        return Bias(0.0 if not e.any() else float("inf"), float("nan"), float("nan"), groups)
    cosine = float(g @ e / (size * np.linalg.norm(e))) if e.any() else 0.0
    return Bias(float(np.linalg.norm(e - g) / size), cosine, float(np.sqrt(s.sum()) / size), groups)
