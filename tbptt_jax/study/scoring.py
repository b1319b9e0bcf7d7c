"""A task's figures at given parameters."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

import tbptt_jax as tb
from tbptt_jax.gradient import Loss, mean_of, of_each, step_losses, weighted_mean
from tbptt_jax.ranges import check_ranges
from tbptt_jax.recurrence import Recurrence, unroll_window
from tbptt_jax.study.task import Reader, Task, check_task, data_of, figures, keys_of
from tbptt_jax.study.task import reader as reader_of
from tbptt_jax.window import check_scored

STRETCH = 1000  # steps of a window in which a corpus is read in one go
CALL = 1_000_000  # steps of all lanes that are in memory at once


def evaluate(
    task: Task, params: Any, streams: Any = None, *, window: int | None = None, stateless: bool = False, burn_in: int = 0,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """A task's figures over streams, read from the initial carry on, the state carried from window to window.

    Args:
      task: with the model, the figures, and the test data that is read by default.
      params: of the model.
      streams: as a :class:`Task` has them. None: ``task.test``.
      window: steps that are read at a time. Without ``stateless`` the figures are the same for any. None: a whole
        sequence, or 1000 steps of a corpus.
      stateless: each window begins from the initial carry, but where the task says that its test is one free run.
      burn_in: steps that a stateless window reads first, to find its state.
      seed: of data that is drawn from a key.

    Returns:
      Name → number, first the one that decides.

    Raises:
      ValueError: if there are no streams, or nothing in them is scored.
    """
    check_task(task)
    streams = task.test if streams is None else streams
    if streams is None:
        raise ValueError(f"The task {task.name!r} has no test data: give `streams`.")
    return measure(task, params, test_reader(task, streams, "test", window, stateless, burn_in, seed))


def test_reader(
    task: Task, streams: Any, which: str, window: int | None, stateless: bool, burn_in: int, seed: int
) -> Reader:
    """The windows in which validation or test streams are read."""
    streams = data_of(streams, getattr(keys_of(seed), which))
    time = (
        jax.tree.leaves(streams.inputs)[0].shape[1]
        if isinstance(streams, tb.Window)
        else len(jax.tree.leaves(streams)[0])
    )
    carried = task.free or not stateless
    if window is None or (carried and not isinstance(streams, tb.Window)):
        window = min(time, STRETCH) if carried else window or time
    return reader_of(task, streams, min(window, time), None, stateless=not carried, burn_in=0 if carried else burn_in)


def measure(task: Task, params: Any, reader: Reader) -> dict[str, float]:
    """The task's figures over all windows, a few of which are in memory at once."""
    found = figures(task)
    first = reader.read(0, 1)
    lanes, steps = jax.tree.leaves(first.inputs)[0].shape[1:3]
    per_call = max(1, min(reader.windows, CALL // (lanes * steps)))
    carry, parts = task.model.initial_carry(params, lanes), []
    for start in range(0, reader.windows, per_call):
        read = reader.read(start, min(start + per_call, reader.windows))
        check_ranges(task.model, task.loss, params, read, ("windows", "lanes", "time"))
        carry, metrics = _read(task.model, tuple(figure.of for figure in found), params, carry, read)
        parts.append(jax.device_get(metrics))
    values = {}
    for i, figure in enumerate(found):
        metrics = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(part[i] for part in parts))
        weights = of_each(metrics.weight, metrics.loss)
        if not any(w.sum() > 0 for w in jax.tree.leaves(weights)):
            check_scored(reader.read(0, reader.windows))
        means = jax.tree.leaves(mean_of(metrics.loss, weights))
        values[figure.name] = math.fsum(map(float, means))
    return values


@functools.partial(jax.jit, static_argnames=("model", "losses"))
def _read(model: Recurrence, losses: tuple[Loss, ...], params: Any, carry: Any, windows: tb.Window) -> tuple[Any, Any]:
    def one(carry: Any, window: tb.Window) -> tuple[Any, Any]:
        carry, outputs = unroll_window(model, params, carry, window)
        return carry, [weighted_mean(step_losses(loss, outputs, window), window) for loss in losses]

    return jax.lax.scan(one, carry, windows)
