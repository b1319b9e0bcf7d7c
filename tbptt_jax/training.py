"""Training and evaluating over the windows of a stream."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tbptt_jax.arrays import at_least_float32
from tbptt_jax.gradient import (
    Estimate,
    Loss,
    Metrics,
    StreamState,
    mean_of,
    objective,
    of_each,
    step_losses,
    weighted_mean,
    window_objective,
)
from tbptt_jax.predicting import check_start
from tbptt_jax.ranges import check_ranges
from tbptt_jax.recurrence import Recurrence, begun_anew, unroll_window
from tbptt_jax.window import Window, check, check_scored, time_shape

PyTree = Any


class TrainState(NamedTuple):
    """Attributes:
    params: the model's parameters.
    optimiser: the optax state.
    stream: the carry, the influence's state and its key.
    updates: how many updates have been made, int32; a window in which nothing is scored makes none.
    """

    params: PyTree
    optimiser: PyTree
    stream: StreamState
    updates: jax.Array


class TrainStep(NamedTuple):
    """Attributes:
    init: ``(key, window) -> state``; only the window's shapes and dtypes enter the state.
    update: ``(state, window) -> (state, metrics)``: one window, one optimiser update.
    estimate: the gradient estimator that it steps by.
    """

    init: Callable[[jax.Array, Window], TrainState]
    update: Callable[[TrainState, Window], tuple[TrainState, Metrics]]
    estimate: Estimate


def train_step(estimate: Estimate, optimiser: optax.GradientTransformation | optax.MultiSteps) -> TrainStep:
    """One optimiser update for each window in which something is scored; the others are read on, and that is all.

    By default each window's gradient is of the window's own mean, so a short last window steps as far as a whole one; with
    a constant ``normaliser`` in :func:`tbptt_jax.gradient` it weighs what it scores.

    Args:
      estimate: the gradient estimator.
      optimiser: an optax transformation; clipping and schedules are its parts. One that takes extra arguments is given
        ``value`` (the objective), ``grad``, ``value_fn`` (``params -> value``, the same window read from the same carry) and
        the ``window``, as ``optax.contrib.reduce_on_plateau``, ``optax.polyak_sgd``, ``optax.lbfgs`` and
        :func:`tbptt_jax.schedules.scale_by_length` need. Gradients of complex parameters reach it conjugated, as
        directions of steepest ascent: `jax.grad` has them the other way round.

    Returns:
      The step's ``init`` and ``update``, for :func:`train_windows` or a loop of one's own.

    Raises:
      ValueError: now, if they are not these; from ``init`` and ``update`` what the estimator's raise, and if the optimiser
        needs an argument that is not among these.
    """
    if not isinstance(estimate, Estimate):
        raise ValueError(f"`estimate` is {estimate!r}; it needs to be such as `tb.gradient(model, loss)`.")
    optimiser = as_transformation(optimiser)

    @jax.jit  # every leaf a buffer of its own, so that `train_windows` can donate them
    def start(key: jax.Array, window: Window) -> TrainState:
        like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), window)
        params_key, stream_key = jax.random.split(key)
        # Under vmap one after another: of the factorisations behind orthogonal matrices, two batched ones that meet on
        # a CPU can wait for each other for ever (jaxlib 0.10).
        params = jax.custom_batching.sequential_vmap(estimate.model.init)(params_key, like.inputs)
        stream = estimate.init(stream_key, params, like)
        state = TrainState(params, optimiser.init(params), stream, jnp.zeros((), jnp.int32))
        jax.eval_shape(update, state, like)  # raises what it would, before any compute
        return state

    def init(key: jax.Array, window: Window) -> TrainState:
        check(window)
        return start(key, window)

    def update(state: TrainState, window: Window) -> tuple[TrainState, Metrics]:
        grads, stream, metrics = estimate.update(state.params, state.stream, window)
        grads = jax.tree.map(lambda g: g.conj() if jnp.iscomplexobj(g) else g, grads)
        extra = {
            "value": objective(metrics, estimate.normaliser),
            "grad": grads,
            "value_fn": lambda params, window=window: window_objective(estimate, params, state.stream, window),
            "window": window,
        }
        try:
            updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params, **extra)
        except TypeError as error:
            if "required keyword-only argument" not in str(error):
                raise
            raise ValueError(
                f"The optimiser asks for an argument that did not reach it ({error}). It is given {sorted(extra)}, and optax hands "
                "these on to what is a `GradientTransformationExtraArgs` alone. For others write the update with "
                "`estimate.update`, in a loop of your own."
            ) from error
        params = optax.apply_updates(state.params, updates)
        new = TrainState(params, optimiser_state, stream, state.updates + 1)
        if window.weights is None and window.valid is None:
            return new, metrics
        scored = functools.reduce(jnp.logical_or, (w > 0 for w in jax.tree.leaves(metrics.weight)))
        return jax.tree.map(lambda n, o: jnp.where(scored, n, o), new, state)._replace(stream=stream), metrics

    return TrainStep(init, update, estimate)


def as_transformation(optimiser: Any) -> optax.GradientTransformationExtraArgs:
    """An optimiser as optax's extended transformation, ``optax.MultiSteps`` too.

    Raises:
      ValueError: if it is none.
    """
    several = getattr(getattr(optimiser, "update", None), "__self__", None)
    if isinstance(several, optax.MultiSteps):  # its own `gradient_transformation` keeps the extra arguments from it
        optimiser = optax.GradientTransformationExtraArgs(several.init, several.update)
    if not isinstance(optimiser, optax.GradientTransformation):
        raise ValueError(f"`optimiser` is {optimiser!r}; it needs to be such as `optax.adam(1e-3)`.")
    return optax.with_extra_args_support(optimiser)


def skip_not_finite(step: TrainStep) -> TrainStep:
    """The same step, but a window whose loss, gradient or carry is not finite is as if it had not been there.

    Its metrics tell of it; parameters, optimiser, carry and ``updates`` stay as they were. Only its resets hold: a lane
    that was reset in it begins anew at the next window, since what it goes on with is another sequence.

    Args:
      step: the train step, as :func:`train_step` makes it.
    """

    def update(state: TrainState, window: Window) -> tuple[TrainState, Metrics]:
        new, metrics = step.update(state, window)
        fine = stays_finite(state, new, metrics)
        kept = state
        if window.resets is not None:
            begun = jnp.asarray(window.resets).any(1)
            start = step.estimate.model.initial_carry(state.params, len(begun))
            carry = begun_anew(begun, start, state.stream.carry)
            kept = state._replace(stream=state.stream._replace(carry=carry, fresh=state.stream.fresh | begun))
        return jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, kept), metrics

    return step._replace(update=update)


def stays_finite(before: TrainState, after: TrainState, metrics: Metrics) -> jax.Array:
    """Whether a window's loss, and all that it led to, is finite, a bool of shape ``[]``.

    An optimiser's state may be infinite from the start, as that of ``reduce_on_plateau`` is until it has seen a loss.
    """

    def stays(old: jax.Array, new: jax.Array) -> jax.Array:
        inexact = jnp.issubdtype(new.dtype, jnp.inexact)
        return (jnp.isfinite(new) | ~jnp.isfinite(old)).all() if inexact else jnp.array(True)

    def each_stays() -> jax.Array:
        return jnp.array(jax.tree.leaves(jax.tree.map(stays, before.optimiser, after.optimiser)), bool).all()

    optimiser = lax.cond(all_finite(after.optimiser), lambda: jnp.array(True), each_stays)
    return all_finite((after.params, after.stream, metrics.loss)) & optimiser


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no floating-point number in ``tree`` is infinite or NaN, a bool of shape ``[]``."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    # 0 times what is not finite is NaN, and sums of rows, side by side, take a tenth of the time of looking at each number.
    return jnp.array([jnp.isfinite(jnp.sum(x * 0, range(x.ndim - 1))).all() for x in numbers], bool).all()


def carry_health(carry: PyTree) -> tuple[jax.Array, jax.Array]:
    """``(norm, saturated)``: the largest norm of a lane's carry, and the part of its numbers where tanh' is below 0.01.

    A norm that grows from window to window is a carry that drifts beyond what training has seen; units that are saturated
    pass no gradient on.

    Args:
      carry: of a recurrence, every leaf ``[lanes, ...]``; whole numbers in it are not counted.

    Returns:
      Two numbers of shape ``[]``, 0 where the carry has no floating-point array.
    """
    moving = [jnp.abs(h) for h in jax.tree.leaves(carry) if jnp.issubdtype(h.dtype, jnp.inexact)]
    if not moving:
        return jnp.zeros(()), jnp.zeros(())
    by_lane = jnp.concatenate([h.reshape(len(h), -1).astype(at_least_float32(h.dtype)) for h in moving], 1)
    return jnp.linalg.norm(by_lane, axis=1).max(), jnp.mean(1 - jnp.tanh(by_lane) ** 2 < 0.01)


def train_windows(step: TrainStep, state: TrainState, windows: Window) -> tuple[TrainState, Metrics]:
    """One update for each of many windows, in one compiled call.

    Args:
      step: the train step.
      state: its state. Its optimiser and stream are donated: use those returned. Its parameters stay, and may be kept, as
        the best so far are.
      windows: consecutive windows ``[windows, lanes, time, ...]``, as :func:`tbptt_jax.split` cuts them. They may be a part
        of a stream in which nothing is scored: the loss and the weight of such windows are 0, and they make no update.

    Returns:
      The state after the last window, and metrics of shape ``[windows]``; :func:`mean_loss` is their mean.

    Raises:
      ValueError: before any compute, if the windows' shapes or data are not as described, the state was donated before, or, in
        the host's memory, a token is not in the model's table or a label none of the classes.
    """
    check(windows, ("windows", "lanes", "time"))
    if not isinstance(step, TrainStep) or not isinstance(state, TrainState):
        raise ValueError(
            f"`step` and `state` are a {type(step).__name__} and a {type(state).__name__}; they need to be "
            "`step = tb.train_step(…)` and `state = step.init(key, window)`."
        )
    if any(
        isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted()
        for x in jax.tree.leaves(state)
    ):
        raise ValueError(
            "`state` was given to `train_windows` before, which wrote into its optimiser and stream: go on with the state that "
            "it returned. Of an earlier state the parameters may be kept; of all of it a copy, `jax.tree.map(jnp.copy, state)`."
        )
    check_ranges(step.estimate.model, step.estimate.loss, state.params, windows, ("windows", "lanes", "time"))
    return _train_windows(step, state.params, state._replace(params=()), windows)


@functools.partial(jax.jit, static_argnames="step", donate_argnames="rest")
def _train_windows(step: TrainStep, params: PyTree, rest: TrainState, windows: Window) -> tuple[TrainState, Metrics]:
    return lax.scan(step.update, rest._replace(params=params), windows)


def mean_loss(metrics: Metrics) -> PyTree:
    """The loss of all windows together, an epoch's for instance: the mean over their scored steps.

    The mean of the windows' means is another number wherever they do not all score as much, as where the last is short.

    Args:
      metrics: of any number of windows, as :func:`train_windows` returns them.

    Returns:
      A number of shape ``[]``, or a tree of them for a loss that is a tree; 0 where nothing is scored.
    """
    return mean_of(metrics.loss, of_each(metrics.weight, metrics.loss))


def evaluate(model: Recurrence, loss: Loss, params: PyTree, windows: Window, carry: PyTree | None = None) -> Metrics:
    """The mean of a loss over a stream, read from the initial carry on, or from another.

    It has a carry of its own, so nothing leaks from or into training, and means are weighted by scored steps, so that
    the result is the same for any window length.

    Args:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]``, or a tree of such arrays, one for each figure wanted.
      params: the model's parameters.
      windows: consecutive windows ``[windows, lanes, time, ...]``.
      carry: what to begin from where the windows have no reset, every leaf ``[lanes, ...]``: that which training or
        :func:`tbptt_jax.predict` ended with, for a stream that goes on. None: the initial carry.

    Returns:
      The means, in the tree of the loss, and the total weight.

    Raises:
      ValueError: before any compute, if the windows' shapes or data are not as described, no step is scored, the carry does
        not fit the lanes, or, in the host's memory, a token is not in the model's table or a label none of the classes.
    """
    check(windows, ("windows", "lanes", "time"))
    check_scored(windows)
    check_ranges(model, loss, params, windows, ("windows", "lanes", "time"))
    check_start(model, params, windows, carry)
    return _evaluate(model, loss, params, windows, carry)


@functools.partial(jax.jit, static_argnames=("model", "loss"))
def _evaluate(model: Recurrence, loss: Loss, params: PyTree, windows: Window, carry: PyTree | None) -> Metrics:
    _, lanes, _ = time_shape(windows, ("windows", "lanes", "time"))

    def read(carry: PyTree, window: Window) -> tuple[PyTree, Metrics]:
        carry, outputs = unroll_window(model, params, carry, window)
        return carry, weighted_mean(step_losses(loss, outputs, window), window)

    _, metrics = lax.scan(read, model.initial_carry(params, lanes) if carry is None else carry, windows)
    return Metrics(mean_loss(metrics), jax.tree.map(jnp.sum, metrics.weight))
