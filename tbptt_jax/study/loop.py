"""The loop of a run: from its newest checkpoint on, stopped when asked to or where a number is not finite, judged on the way.

What it ends with is, bit for bit, that of a run never interrupted: also the best parameters, the averages, and the update at
which it stopped early, since they are of the state that is kept, and all that is decided is decided from what is kept.
"""

import contextlib
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import tbptt_jax as tb
from tbptt_jax.checkpoint import Store
from tbptt_jax.checkpoint import open as open_checkpoints
from tbptt_jax.study import averaging
from tbptt_jax.study.feed import Feed
from tbptt_jax.study.guard import Watched, not_finite, watched
from tbptt_jax.study.process.console import say
from tbptt_jax.study.process.machine import check_fits, largest, meet, size
from tbptt_jax.study.process.signals import stop_asked
from tbptt_jax.training import TrainState, TrainStep, all_finite


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
    valid: the figures on the validation data after it, the one that decides first; None if it was not asked.
    window: the steps of its longest window, where a schedule decides them (:func:`tbptt_jax.study.lengths.adaptive`), else None.
    steps: of a lane, read at its end, likewise.
    bias_bound: of its windows, as :class:`tbptt_jax.study.lengths.Chosen` has it, likewise.
    """

    loss: float
    weight: float
    updates: int
    seconds: float
    skipped: int
    norm: float
    saturated: float
    since_reset: int
    valid: dict[str, float] | None = None
    window: int | None = None
    steps: int | None = None
    bias_bound: float | None = None


class Event(NamedTuple):
    """What a listener is given.

    Attributes:
      kind: ``"begin"``, with what was reported before an interruption; ``"call"``, after each call; ``"end"``.
      updates: made so far.
      metrics: name → number: those of a :class:`Call`, and ``valid/NAME`` for each figure.
      history: of ``"begin"``: the calls' events up to here, none in a run that begins.
    """

    kind: str
    updates: int
    metrics: dict[str, float]
    history: tuple = ()


class Kept(NamedTuple):
    """What a checkpoint holds: the training's state, and the parameters that were best, ``()`` if nothing is judged."""

    state: TrainState
    best: Any


class Judge(NamedTuple):
    """What looks at the validation data."""

    measure: Callable[[Any], dict[str, float]]  # of the parameters the figures, the one that decides first
    higher: bool = False  # whether more of it is better
    patience: int | None = None  # stop after so many looks without a better one
    since: int = 0  # of the looks after this update, or step


def train(
    step: TrainStep, init: Callable[[], TrainState], feed: Feed,
    locate: Callable[[TrainState, tb.Window], tuple[int, int] | None], *, per_call: int, every: int,
    directory: pathlib.Path | None, settings: dict[str, Any], resume: bool = True, skip: bool = False,
    judge: Judge | None = None, nonmonotone: int | None = None, begun: Callable[[], None] = lambda: None,
    show: Callable[[list[Call]], None] = lambda calls: None, listeners: Sequence[Callable[[Event], None]] = (),
    profile: int | None = None,
) -> tuple[Kept, list[Call], Any]:  # fmt: skip
    """Trains from the newest checkpoint on, as :func:`tbptt_jax.study.fit` describes it.

    A window in which something is not finite stops the run: the state just before it is saved, and the error names the
    window, and the lane and step if an output or a loss of it is not finite. ``skip`` can go on from there.

    Args:
      step: the train step.
      init: its state at update 0.
      feed: the windows, and how many.
      locate: ``(state, window) -> (lane, step)`` of the first loss that is not finite, as ``guard.first_not_finite`` finds.
      per_call: updates in a compiled call, which is what is reported and saved by.
      every: save, and judge, at the end of each call in which a multiple of this falls, and at the end.
      directory: of the checkpoints. None: nothing is kept.
      resume: False: begin at update 0. The checkpoints found are kept, in ``<directory>.old``, until this run stops.
      nonmonotone: averaging begins when a look is worse than the best but so many (see :mod:`tbptt_jax.study.averaging`).
      begun: called in the first process once nothing refuses the run any more, such as another one's checkpoints.

    Returns:
      The state after the last update with the best parameters, and all calls, those before the interruptions too, and the place in the
      feed.
    """
    state_of, one = jax.eval_shape(init), size(feed.read(feed.begin, 0, 1))
    sizes = "the model's size, `lanes` or `window`, or the windows of a replay"
    check_fits("The state of the training", size(state_of) + size(state_of.params), sizes)
    count = min(per_call, feed.until)
    of = f" of {feed.until}" if feed.unit == "updates" else ""
    check_fits(f"The {count} windows of a call", 2 * one * count, "`windows_per_call`")
    if not resume and directory is not None:
        _put_aside(directory)
    settings = {**settings, "updates in a call": per_call}
    step = watched(step)
    step = tb.skip_not_finite(step) if skip else step
    health, fine = jax.jit(tb.carry_health), jax.jit(all_finite)
    like = Kept(state_of, state_of.params if judge else ())
    wrong = ""

    def begin() -> Kept:
        state = init()
        return Kept(state, state.params if judge else ())

    def call_of(cut: tb.Window, seen: Watched, state: TrainState, done: int, began: float) -> Call:
        """What there is to report of the windows ``cut``, which led to ``state`` at update ``done``."""
        losses, weights = (np.where(seen.finite, x, 0).astype(np.float64) for x in seen[:2])
        weight = float(weights.sum())
        norm, saturated = map(float, health(state.stream.carry))
        return Call(
            loss=float(losses @ weights) / (weight or 1.0),
            weight=weight,
            updates=done,
            seconds=time.perf_counter() - began,
            skipped=int((~seen.finite).sum()),
            norm=norm,
            saturated=saturated,
            since_reset=_since_reset(cut.resets, calls[-1].since_reset if calls else 0),
            **feed.told(place, done),
        )

    def again(store: Store, number: int) -> tuple[int, Kept]:
        """The update of the newest checkpoint, 0 for none, and the state at update ``number``, made anew from there."""
        saved = store.restore(like)
        first = done = saved.update if saved else 0
        state, best = saved.state if saved else begin()
        place = feed.restored(saved.data.get("place", ())) if saved else feed.begin
        while done < number:
            place = feed.look(place, state) if feed.looks(place, done) else place
            last = min(feed.end(place, done), number)
            state, _ = tb.train_windows(step, state, feed.read(place, done, last))
            done, place = last, feed.after(place, last)
        return first, Kept(state, best)

    def report(event: Event) -> None:
        for listen in listeners if jax.process_index() == 0 else ():
            listen(event)

    with stop_asked() as asked, _checkpoints(directory, settings) as store:
        try:
            saved = store.restore(like)
        except ValueError as error:
            free = "Another workdir is free for this run; resume=False, --noresume, begins afresh in this one."
            raise ValueError(f"{error} ({free})") from error
        calls = [Call(*c) for c in saved.data["calls"]] if saved else []
        done, (state, best) = (saved.update, saved.state) if saved else (0, begin())
        place = feed.restored(saved.data.get("place", ())) if saved else feed.begin
        first = done
        if saved:
            say(f"Going on from update {done}{of}, saved in {directory}.")
        if jax.process_index() == 0:
            begun()
        report(Event("begin", done, {}, tuple(map(_event, calls))))
        stop, ahead = largest(asked()), None
        while feed.end(place, done) > done and not stop and not _early(calls, judge, feed.unit):
            began = time.perf_counter()
            place = feed.look(place, state) if feed.looks(place, done) else place
            last = feed.end(place, done)
            after = feed.after(place, last)
            ends = feed.end(after, last) == last
            cut = feed.read(place, done, last) if ahead is None else ahead
            state = _beside(state, cut) if done == first else state
            traced = directory and profile is not None and done <= profile < last and directory.parent / "profile"
            with jax.profiler.trace(str(traced)) if traced else contextlib.nullcontext():
                state, metrics = tb.train_windows(step, state, cut)
                ahead = None
                if not ends and not feed.looks(after, last):  # read while the device computes
                    ahead = feed.read(after, last, feed.end(after, last))
                seen = Watched(*map(np.asarray, metrics))  # waits for the call
            if not skip and not seen.finite.all():
                good = int(np.argmin(seen.finite))
                bad = done + good
                del state  # the call has overwritten the one before the bad window
                before, (state, best) = again(store, bad)
                wrong = not_finite(step, locate, state, feed.read(place, bad, bad + 1), bad, float(seen.loss[good]))
                if not fine(state):
                    wrong += " The state before it is not finite either, and is not saved."
                    break
                if before < bad:
                    if good:
                        part, of_part = jax.tree.map(lambda x, n=good: x[:n], (cut, seen))
                        calls.append(call_of(part, of_part, state, bad, began))
                    store.save(bad, Kept(state, best), {"calls": calls, "place": place})
                wrong += f" The state before it is saved, as update {bad} in {directory}." if bad and directory else ""
                break
            calls.append(call_of(cut, seen, state, last, began))
            stop = largest(asked())  # once, and for all processes: what ends the loop is what saved
            due = ends or last // every > done // every
            if due and judge is not None:
                params = averaging.params_of(state)
                calls[-1] = calls[-1]._replace(valid=judge.measure(params))
                scores = _scores(calls, judge)
                if scores[-1] < min([*scores[:-1], math.inf]):
                    best = jax.tree.map(jax.numpy.copy, params)
                if nonmonotone is not None and scores[-1] > min(scores[: -1 - nonmonotone], default=math.inf):
                    state = averaging.begun(state)
            if due or stop:
                store.save(last, Kept(state, best), {"calls": calls, "place": after})
            done, place = last, after
            if jax.process_index() == 0:
                show(calls)
            report(_event(calls[-1]))
        report(Event("end", done, {}))
    if wrong:
        raise ValueError(wrong)
    if directory is not None:
        shutil.rmtree(_old(directory), ignore_errors=True)
    if stop:
        say(f"Stopped at update {done}{of}; the same command goes on.")
        sys.exit(128 + stop)
    if feed.end(place, done) > done:
        say(
            f"Stopped early at update {done}{of}: the last {judge and judge.patience} looks were no better. More than were "
            "asked for, or more patience, go on."
        )
    return Kept(state, best), calls, place


def _beside(state: TrainState, windows: tb.Window) -> TrainState:
    """The state on the one device that the windows are on, as a call returns it: else the first call's program is its alone."""
    where = getattr(jax.tree.leaves(windows)[0], "sharding", None)
    if not isinstance(where, NamedSharding) or where.mesh.size > 1:
        return state
    return jax.device_put(state, NamedSharding(where.mesh, PartitionSpec()))


def _scores(calls: list[Call], judge: Judge) -> list[float]:
    """The deciding figure at each look, less being better; what is not finite is worst."""
    found = [next(iter(call.valid.values())) * (-1 if judge.higher else 1) for call in calls if call.valid]
    return [score if math.isfinite(score) else math.inf for score in found]


def _early(calls: list[Call], judge: Judge | None, unit: str) -> bool:
    if judge is None or judge.patience is None or not (scores := _scores(calls, judge)):
        return False
    before = sum((getattr(call, unit) or 0) <= judge.since for call in calls if call.valid)
    return len(scores) - max(scores.index(min(scores)) + 1, before) >= judge.patience


def _event(call: Call) -> Event:
    metrics = {name: value for name, value in call._asdict().items() if name not in ("updates", "valid")}
    metrics = {name: value for name, value in metrics.items() if value is not None}
    return Event("call", call.updates, metrics | {f"valid/{name}": x for name, x in (call.valid or {}).items()})


@contextlib.contextmanager
def _checkpoints(directory: pathlib.Path | None, settings: dict[str, Any]) -> Iterator[Store]:
    if directory is None:
        yield Store(lambda update, state, data: None, lambda like: None)
        return
    with open_checkpoints(directory, settings) as store:
        yield store


def _old(directory: pathlib.Path) -> pathlib.Path:
    return directory.with_name(f"{directory.name}.old")


def _put_aside(directory: pathlib.Path) -> None:
    if directory.exists() and jax.process_index() == 0:
        shutil.rmtree(_old(directory), ignore_errors=True)
        directory.rename(_old(directory))
    meet("the old checkpoints are out of the way")


def health_of(calls: list[Call]) -> dict[str, Any]:
    """What ``results.json`` says of the windows left out, and of the carry at the end."""
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
