"""Training and evaluating over the windows of a stream."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tbptt_jax.gradient import Estimate, Loss, Metrics, StreamState, step_losses, weighted_mean
from tbptt_jax.recurrence import Recurrence, unroll_window
from tbptt_jax.window import Window, check, check_scored, time_shape

PyTree = Any


class TrainState(NamedTuple):
    """Attributes:
    params: the model's parameters.
    optimiser: the optax state.
    stream: the carry, the influence's state and its key.
    updates: how many updates have been made, int32.
    """

    params: PyTree
    optimiser: PyTree
    stream: StreamState
    updates: jax.Array


class TrainStep(NamedTuple):
    """Attributes:
    init: ``(key, window) -> state``; only the window's shapes and dtypes enter the state.
    update: ``(state, window) -> (state, metrics)``: one window, one optimiser update.
    """

    init: Callable[[jax.Array, Window], TrainState]
    update: Callable[[TrainState, Window], tuple[TrainState, Metrics]]


def train_step(estimate: Estimate, optimiser: optax.GradientTransformation) -> TrainStep:
    """One optimiser update for each window.

    Args:
      estimate: the gradient estimator.
      optimiser: an optax transformation; clipping and schedules are its parts. One that takes extra arguments is given
        the ``window``, as :func:`tbptt_jax.schedules.scale_by_length` needs.

    Returns:
      The step's ``init`` and ``update``, for :func:`train_windows` or a loop of one's own.

    Raises:
      ValueError: now, if they are not these; from ``init`` and ``update`` what the estimator's raise.
    """
    for name, given, needed, like in (
        ("estimate", estimate, Estimate, "`tb.gradient(model, loss)`"),
        ("optimiser", optimiser, optax.GradientTransformation, "`optax.adam(1e-3)`"),
    ):
        if not isinstance(given, needed):
            raise ValueError(f"`{name}` is {given!r}; it needs to be such as {like}.")
    optimiser = optax.with_extra_args_support(optimiser)

    def init(key: jax.Array, window: Window) -> TrainState:
        check(window)

        @jax.jit  # every leaf a buffer of its own, so that `train_windows` can donate them
        def start(key: jax.Array) -> TrainState:
            like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), window)
            params_key, stream_key = jax.random.split(key)
            # Under vmap one after another: of the factorisations behind orthogonal matrices, two batched ones that meet on
            # a CPU can wait for each other for ever (jaxlib 0.10).
            params = jax.custom_batching.sequential_vmap(estimate.model.init)(params_key, like.inputs)
            stream = estimate.init(stream_key, params, like)
            return TrainState(params, optimiser.init(params), stream, jnp.zeros((), jnp.int32))

        return start(key)

    def update(state: TrainState, window: Window) -> tuple[TrainState, Metrics]:
        grads, stream, metrics = estimate.update(state.params, state.stream, window)
        updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params, window=window)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimiser_state, stream, state.updates + 1), metrics

    return TrainStep(init, update)


def skip_not_finite(step: TrainStep) -> TrainStep:
    """The same step, but a window whose loss, gradient or carry is not finite is as if it had not been there.

    Its metrics tell of it; parameters, optimiser, carry and ``updates`` stay as they were, so that the windows skipped are
    those made less ``updates``.

    Args:
      step: the train step, as :func:`train_step` makes it.
    """

    def update(state: TrainState, window: Window) -> tuple[TrainState, Metrics]:
        new, metrics = step.update(state, window)
        fine = all_finite((new, metrics.loss))
        return jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, state), metrics

    return step._replace(update=update)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no floating-point number in ``tree`` is infinite or NaN, a bool of shape ``[]``."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in numbers]).all()


def carry_health(carry: PyTree) -> tuple[jax.Array, jax.Array]:
    """``(norm, saturated)``: the largest norm of a lane's carry, and the part of its numbers where tanh' is below 0.01.

    A norm that grows from window to window is a carry that drifts beyond what training has seen; units that are saturated
    pass no gradient on.

    Args:
      carry: of a recurrence, every leaf ``[lanes, ...]``; whole numbers in it are not counted.

    Returns:
      Two numbers of shape ``[]``, 0 where the carry has no floating-point array.
    """
    moving = [h.reshape(h.shape[0], -1) for h in jax.tree.leaves(carry) if jnp.issubdtype(h.dtype, jnp.inexact)]
    if not moving:
        return jnp.zeros(()), jnp.zeros(())
    by_lane = jnp.concatenate(moving, 1)
    return jnp.linalg.norm(by_lane, axis=1).max(), jnp.mean(1 - jnp.tanh(by_lane) ** 2 < 0.01)


def train_windows(step: TrainStep, state: TrainState, windows: Window) -> tuple[TrainState, Metrics]:
    """One update for each of many windows, in one compiled call.

    Args:
      step: the train step.
      state: its state. It is donated: use the one returned.
      windows: consecutive windows ``[windows, lanes, time, ...]``, as :func:`tbptt_jax.split` cuts them. They may be a part
        of a stream in which nothing is scored: the loss and the weight of such windows are 0, as their gradients are.

    Returns:
      The state after the last window, and metrics of shape ``[windows]``.

    Raises:
      ValueError: before any compute, if the windows' shapes or data are not as described.
    """
    check(windows, ("windows", "lanes", "time"))
    if not isinstance(step, TrainStep) or not isinstance(state, TrainState):
        raise ValueError(
            f"`step` and `state` are a {type(step).__name__} and a {type(state).__name__}; they need to be "
            "`step = tb.train_step(…)` and `state = step.init(key, window)`."
        )
    return _train_windows(step, state, windows)


@functools.partial(jax.jit, static_argnames="step", donate_argnames="state")
def _train_windows(step: TrainStep, state: TrainState, windows: Window) -> tuple[TrainState, Metrics]:
    return lax.scan(step.update, state, windows)


def evaluate(model: Recurrence, loss: Loss, params: PyTree, windows: Window) -> Metrics:
    """The mean of a loss over a stream, read from the initial carry on.

    It has a carry of its own, so nothing leaks from or into training, and means are weighted by scored steps, so that
    the result is the same for any window length.

    Args:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]``, or a tree of such arrays, one for each figure wanted.
      params: the model's parameters.
      windows: consecutive windows ``[windows, lanes, time, ...]``.

    Returns:
      The means, in the tree of the loss, and the total weight.

    Raises:
      ValueError: before any compute, if the windows' shapes or data are not as described or no step is scored.
    """
    check(windows, ("windows", "lanes", "time"))
    check_scored(windows)
    return _evaluate(model, loss, params, windows)


@functools.partial(jax.jit, static_argnames=("model", "loss"))
def _evaluate(model: Recurrence, loss: Loss, params: PyTree, windows: Window) -> Metrics:
    _, lanes, _ = time_shape(windows, ("windows", "lanes", "time"))

    def read(carry: PyTree, window: Window) -> tuple[PyTree, Metrics]:
        carry, outputs = unroll_window(model, params, carry, window)
        return carry, weighted_mean(step_losses(loss, outputs, window), window)

    _, (losses, weights) = lax.scan(read, model.initial_carry(params, lanes), windows)
    weight = weights.sum()
    return Metrics(jax.tree.map(lambda x: jnp.sum(x * weights) / jnp.where(weight > 0, weight, 1), losses), weight)
