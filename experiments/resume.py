"""What launches that train share: checkpoints to go on from, a stop when asked to, and one where a number is not finite."""

import contextlib
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import tbptt_jax as tb
from experiments import launch, process
from tbptt_jax import checkpoint, sharding
from tbptt_jax.recurrence import unroll_window
from tbptt_jax.training import TrainState, TrainStep, all_finite, stays_finite
from tbptt_jax.window import is_scored

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of the first of several processes, the same for all; auto: found by itself on Slurm and Kubernetes.",
)
flags.DEFINE_enum(
    "not_finite",
    "stop",
    ["stop", "skip"],
    "What a loss, gradient or carry that is not finite does: stop the run, or leave its window out and count it.",
)
flags.DEFINE_integer("processes", None, "How many processes there are, each with lanes of its own.", lower_bound=1)
flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


class Call(NamedTuple):
    """Attributes:
    loss: the mean over the scored steps of one call's windows, 0 where none is scored; windows left out are not counted.
    weight: their sum of weights.
    updates: how many windows had been read at its end, of all calls.
    seconds: that it took.
    skipped: windows left out, since something in them was not finite.
    norm: the largest of a lane's carry at the end, as :func:`tbptt_jax.carry_health` has it.
    saturated: the part of the carry's units that are.
    since_reset: the steps, at the end, since the lane that was reset longest ago was.
    measured: what ``measure`` found after it, if it was asked.
    """

    loss: float
    weight: float
    updates: int
    seconds: float
    skipped: int
    norm: float
    saturated: float
    since_reset: int
    measured: float | None = None


def join_processes(lanes: int) -> None:
    """Joins the processes that the flags name, before JAX computes anything; none are named: this is the only one.

    Raises:
      ValueError: if the flags do not go together, the others are not found, or the lanes do not divide by all devices.
    """
    if FLAGS.coordinator is None and FLAGS.processes is FLAGS.process is None:
        return
    automatic = FLAGS.coordinator == "auto" and FLAGS.processes is FLAGS.process is None
    if not automatic and (
        None in (FLAGS.coordinator, FLAGS.processes, FLAGS.process) or FLAGS.process >= FLAGS.processes
    ):
        raise ValueError(
            "Several processes need --coordinator=HOST:PORT, --processes=N and --process=I with I from 0 to N - 1, or "
            "--coordinator=auto alone."
        )
    try:
        jax.distributed.initialize(*(() if automatic else (FLAGS.coordinator, FLAGS.processes, FLAGS.process)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The processes did not meet: {str(error).splitlines()[0]}") from error
    launch.console.quiet = jax.process_index() > 0
    if lanes % jax.device_count():
        raise ValueError(
            f"--lanes={lanes} cannot be spread over the {jax.device_count()} devices of {jax.process_count()} processes: "
            f"give a multiple of {jax.device_count()}."
        )


class Watched(NamedTuple):
    """Attributes:
    loss: as :class:`tbptt_jax.Metrics` has it.
    weight: likewise.
    finite: bool, whether the loss is, and all of the state that the window led to.
    """

    loss: Any
    weight: Any
    finite: Any


def watched(step: TrainStep) -> TrainStep:
    """The same step, its metrics :class:`Watched`."""

    def update(state: TrainState, window: tb.Window) -> tuple[TrainState, Any]:
        new, metrics = step.update(state, window)
        return new, Watched(*metrics, stays_finite(state, new, metrics))

    return step._replace(update=update)


def windows_of(stream: tb.Window, lanes: int, mesh: Mesh) -> Callable[[int, int], tb.Window]:
    """``(first, last) -> windows`` of a stream in the host's memory, read in order and round again, over the mesh's devices.

    At the stream's beginning the windows themselves reset every lane.

    Args:
      stream: all of its windows, ``[windows, lanes, time, ...]``.
      lanes: how many it has; this process reads its own of them.
      mesh: where :func:`tbptt_jax.sharding.place` puts them.
    """
    count, own = len(jax.tree.leaves(stream.inputs)[0]), sharding.own_lanes(lanes)

    def windows(first: int, last: int) -> tb.Window:
        order = np.arange(first, last) % count
        return sharding.place(jax.tree.map(lambda x: x[order][:, own], stream), mesh)

    return windows


def train(
    step: TrainStep,
    init: Callable[[], TrainState],
    windows: Callable[[int, int], tb.Window],
    locate: Callable[[TrainState, tb.Window], tuple[int, int] | None],
    *,
    updates: int,
    per_call: int,
    every: int,
    directory: pathlib.Path,
    settings: dict[str, Any],
    resume: bool,
    skip: bool,
    report: Callable[[int, list[Call]], None],
    measure: Callable[[TrainState], float] | None = None,
) -> tuple[TrainState, list[Call]]:
    """Trains from the newest checkpoint on; what it ends with is, bit for bit, that of a run never interrupted.

    SIGTERM and SIGINT finish the call, save, and exit with status 128 + the signal; a second one exits at once.

    A window in which something is not finite stops the run: the state just before it is saved, and the error names the
    window, and the lane and step if an output or a loss of it is not finite. ``skip`` can go on from there.

    Args:
      step: the train step.
      init: its state at update 0.
      windows: ``(first, last) -> [last - first, lanes, time, ...]``, the windows of these updates.
      locate: ``(state, window) -> (lane, step)`` of the first loss that is not finite, as :func:`first_not_finite` finds.
      updates: how many in all.
      per_call: how many in one compiled call, which is what is told and saved by.
      every: save at the end of each call in which a multiple of this falls, and at the end.
      directory: of the checkpoints.
      settings: what makes it this run, as JSON.
      resume: False: begin at update 0. The checkpoints found are kept, in ``<directory>.old``, until this run stops.
      skip: a window in which something is not finite is left out, and counted, instead of stopping the run.
      report: ``(updates done, calls so far)``, after each call.
      measure: ``(state) -> number``, such as a loss on other data; asked where a checkpoint is due, and kept in the call.

    Returns:
      The state after the last update, and all calls, those before the interruptions too.

    Raises:
      ValueError: if the checkpoints are of another run, or the loss, the gradient or the carry of a window is not finite.
      OSError: if a checkpoint could not be written.
    """
    state_of, one = jax.eval_shape(init), launch.size(windows(0, 1))
    sizes = "--hidden, --layers, --lanes or --window, or the windows of a replay"
    launch.check_fits("The state of the training", launch.size(state_of) + launch.size(state_of.params), sizes)
    launch.check_fits(
        f"The {min(per_call, updates)} windows of a call", one * min(per_call, updates), "--windows_per_call"
    )
    old = directory.with_name(f"{directory.name}.old")
    if not resume and directory.exists() and jax.process_index() == 0:
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    meet("the old checkpoints are out of the way")
    settings = {**settings, "updates": updates, "updates in a call": per_call}
    step = watched(step)
    step = tb.skip_not_finite(step) if skip else step
    health, fine = jax.jit(tb.carry_health), jax.jit(all_finite)
    wrong = ""

    def end_of(done: int) -> int:
        """Calls end where those of a run never interrupted do."""
        return min(done - done % per_call + per_call, updates)

    def call_of(cut: tb.Window, told: Watched, state: TrainState, done: int, began: float) -> Call:
        """What there is to tell of the windows ``cut``, which led to ``state`` at update ``done``."""
        losses, weights = (np.where(told.finite, x, 0).astype(np.float64) for x in told[:2])
        weight = float(weights.sum())
        norm, saturated = map(float, health(state.stream.carry))
        return Call(
            loss=float(losses @ weights) / (weight or 1.0),
            weight=weight,
            updates=done,
            seconds=time.perf_counter() - began,
            skipped=int((~told.finite).sum()),
            norm=norm,
            saturated=saturated,
            since_reset=_since_reset(cut.resets, calls[-1].since_reset if calls else 0),
        )

    def again(store: checkpoint.Store, number: int) -> tuple[int, TrainState]:
        """The update of the newest checkpoint, 0 for none, and the state at update ``number``, made anew from there."""
        saved = store.restore(jax.eval_shape(init))
        kept = done = saved.update if saved else 0
        state = saved.state if saved else init()
        while done < number:
            last = min(end_of(done), number)
            state, _ = tb.train_windows(step, state, windows(done, last))
            done = last
        return kept, state

    with stop_asked() as asked, checkpoint.open(directory, settings) as store:
        try:
            saved = store.restore(jax.eval_shape(init))
        except ValueError as error:
            raise ValueError(
                f"{error} (--workdir=DIRECTORY is another; --noresume begins afresh in this one.)"
            ) from error
        done, state, calls = (
            (saved.update, saved.state, [Call(*c) for c in saved.data["calls"]]) if saved else (0, init(), [])
        )
        if saved:
            launch.say(f"Going on from update {done} of {updates}, saved in {directory}.")
        stop = largest(asked())
        while done < updates and not stop:
            began, last = time.perf_counter(), end_of(done)
            cut = windows(done, last)
            state, metrics = tb.train_windows(step, state, cut)
            told = Watched(*map(np.asarray, metrics))  # waits for the call
            if not skip and not told.finite.all():
                good = int(np.argmin(told.finite))
                bad = done + good
                del state  # the call has overwritten the one before the bad window
                kept, state = again(store, bad)
                wrong = _not_finite(step, locate, state, windows(bad, bad + 1), bad, float(told.loss[good]))
                if not fine(state):
                    wrong += " The state before it is not finite either, and is not saved."
                    break
                if kept < bad:
                    if good:
                        part, of_part = _first((cut, told), good)
                        calls.append(call_of(part, of_part, state, bad, began))
                    store.save(bad, state, {"calls": calls})
                wrong += f" The state before it is saved, as update {bad} in {directory}." if bad else ""
                break
            calls.append(call_of(cut, told, state, last, began))
            stop = largest(asked())  # once, and for all processes: what ends the loop is what saved
            due = last == updates or last // every > done // every
            if due and measure is not None:
                calls[-1] = calls[-1]._replace(measured=measure(state))
            if due or stop:
                store.save(last, state, {"calls": calls})
            done = last
            report(done, calls)
    if wrong:
        raise ValueError(wrong)
    shutil.rmtree(old, ignore_errors=True)
    if stop:
        launch.say(f"Stopped at update {done} of {updates}; the same command goes on.")
        sys.exit(128 + stop)
    return state, calls


def _first(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x[:number], tree)


def health_of(calls: list[Call]) -> dict[str, Any]:
    """What ``results.json`` tells of the windows left out, and of the carry at the end."""
    carry = {name: getattr(calls[-1], name) for name in ("norm", "saturated", "since_reset")}
    return {"windows_skipped": sum(call.skipped for call in calls), "carry": carry}


def _since_reset(resets: Any, before: int) -> int:
    """Steps since the lane that was reset longest ago was, after windows ``[windows, lanes, time]``."""
    if resets is None:
        return before
    own = resets.addressable_shards if isinstance(resets, jax.Array) else ()
    lanes = np.concatenate([np.asarray(shard.data) for shard in own], 1) if own else np.asarray(resets)
    steps = lanes.swapaxes(0, 1).reshape(lanes.shape[1], -1)
    ago = np.where(steps.any(1), np.argmax(steps[:, ::-1], 1) + 1, before + steps.shape[1])
    return largest(int(ago.max()))


def meet(where: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def largest(number: int) -> int:
    """Of the numbers that the processes give."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).max())


def _not_finite(
    step: TrainStep,
    locate: Callable[[TrainState, tb.Window], tuple[int, int] | None],
    state: TrainState,
    windows: tb.Window,
    number: int,
    loss: float,
) -> str:
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
        f"{what}{where}: lower the learning rate, look at the data there, or go on with --not_finite=skip, which leaves such "
        "windows out."
    )


def first_not_finite(
    model: tb.Recurrence, loss: Callable, params: Any, carry: Any, window: tb.Window
) -> tuple[int, int] | None:
    """``(lane, step)`` of a window's earliest scored step whose outputs or loss are not finite, or None.

    Args:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]``.
      params: its parameters.
      carry: at the window's left edge.
      window: ``[lanes, time, ...]``; with several processes, all lanes, and all of them ask at once.
    """

    @jax.jit
    def not_finite(params: Any, carry: Any, window: tb.Window) -> jax.Array:
        _, outputs = unroll_window(model, params, carry, window)
        bad = ~jnp.isfinite(loss(outputs, window))
        for leaf in jax.tree.leaves(outputs):
            bad |= ~jnp.isfinite(leaf).reshape(*bad.shape, -1).all(-1)
        return bad & is_scored(window)

    bad = not_finite(params, carry, window)
    if not bad.is_fully_addressable:
        bad = multihost_utils.process_allgather(bad, tiled=True)
    places = np.argwhere(np.asarray(bad).T)  # by time
    return (int(places[0][1]), int(places[0][0])) if len(places) else None


@contextlib.contextmanager
def stop_asked(after: str = "after this call, saved") -> Iterator[Callable[[], int]]:
    """Yields ``asked() -> int``: the first SIGTERM or SIGINT that has come, or 0. A second one ends the process at once.

    Args:
      after: when it stops and what becomes of the work, as it is told.
    """
    told: list[int] = []

    def tell(number: int) -> None:
        told.append(number)
        if len(told) > 1:
            process.leave(told[0])
        print(f"{signal.Signals(number).name}: stopping {after}. Again: at once.", file=sys.stderr)

    with process.heard(tell):
        yield lambda: told[0] if told else 0
