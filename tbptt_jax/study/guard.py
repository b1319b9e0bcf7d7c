"""What stops a run: a loss, a gradient or a carry that is not finite, and where it was first."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import tbptt_jax as tb
from tbptt_jax.gradient import StreamState
from tbptt_jax.noise import window_keys
from tbptt_jax.recurrence import unroll_window
from tbptt_jax.training import TrainState, TrainStep, all_finite, stays_finite
from tbptt_jax.window import is_scored


class Watched(NamedTuple):
    """The metrics of a window, and whether they and all of the state that it led to are finite."""

    loss: Any
    weight: Any
    finite: Any


@functools.lru_cache(maxsize=8)
def watched(step: TrainStep, skip: bool = False) -> TrainStep:
    """The same step, its metrics :class:`Watched`; with ``skip`` it leaves windows out in which something is not finite."""

    def update(state: TrainState, window: tb.Window) -> tuple[TrainState, Any]:
        new, metrics = step.update(state, window)
        return new, Watched(*metrics, stays_finite(state, new, metrics))

    watching = step._replace(update=update)
    return tb.skip_not_finite(watching) if skip else watching


def not_finite(
    step: TrainStep, locate: Callable[[TrainState, tb.Window], tuple[int, int] | None], state: TrainState, windows: tb.Window,
    number: int, loss: float,
) -> str:  # fmt: skip
    """What of window ``number``, the only one of ``windows``, read from ``state``, is not finite, where, and what to do."""
    window = jax.tree.map(lambda x: x[0], windows)
    (new, _), fine = jax.jit(step.update)(state, window), jax.jit(all_finite)
    if not np.isfinite(loss):
        what = f"The loss of window {number} is {loss}"
    elif not fine(new.stream.carry):
        what = f"The carry at the end of window {number} is not finite"
    elif not fine((new.params, new.optimiser)):
        what = f"The loss of window {number} is {loss:.4g}, and its gradient, or the update made of it, is not finite"
    else:
        what = f"What the influence knows after window {number} is not finite"
    place = locate(state, window)
    where = f", first in lane {place[0]} at step {place[1]}" if place else ""
    if place and jax.process_count() > 1:
        lanes = len(jax.tree.leaves(window.inputs)[0]) // jax.process_count()
        where += f", which process {place[0] // lanes} reads"
    return (
        f"{what}{where}: lower the learning rate, look at the data there, or go on with not_finite=skip, which leaves such "
        "windows out."
    )


def first_not_finite(
    model: tb.Recurrence, loss: Callable, state: TrainState, window: tb.Window
) -> tuple[int, int] | None:
    """``(lane, step)`` of a window's earliest scored step whose outputs or loss, with its draws, are not finite, or None.

    The window ``[lanes, time, ...]`` has all lanes; of several processes, all ask at once.
    """

    @jax.jit
    def not_finite(params: Any, stream: StreamState, window: tb.Window) -> jax.Array:
        keys = window_keys(model.unroll, stream.key, len(stream.fresh))
        _, outputs = unroll_window(model, params, stream.carry, window, keys)
        bad = ~jnp.isfinite(loss(outputs, window))
        for leaf in jax.tree.leaves(outputs):
            bad |= ~jnp.isfinite(leaf).reshape(*bad.shape, -1).all(-1)
        return bad & is_scored(window)

    bad = not_finite(state.params, state.stream, window)
    if not bad.is_fully_addressable:
        bad = multihost_utils.process_allgather(bad, tiled=True)
    places = np.argwhere(np.asarray(bad).T)  # by time
    return (int(places[0][1]), int(places[0][0])) if len(places) else None
