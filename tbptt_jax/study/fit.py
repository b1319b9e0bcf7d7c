"""Training a task, so that it lasts: kept on disk, gone on with bit for bit, judged on the way."""

import functools
import inspect
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb
from tbptt_jax.arrays import check_whole
from tbptt_jax.checkpoint import newest
from tbptt_jax.sharding import own_lanes, place
from tbptt_jax.study import averaging
from tbptt_jax.study.depths import Depths, with_depths
from tbptt_jax.study.feed import Feed, carry_of, check_same_state, choices_of, feed_of
from tbptt_jax.study.guard import first_not_finite
from tbptt_jax.study.lengths import Chosen, Lengths, check_until
from tbptt_jax.study.loop import Call, Event, Judge, Kept, train
from tbptt_jax.study.process.console import progress, quieted
from tbptt_jax.study.process.lock import holding
from tbptt_jax.study.process.machine import mesh as lane_mesh
from tbptt_jax.study.process.writing import short, write_json
from tbptt_jax.study.scoring import measure, test_reader
from tbptt_jax.study.steps import step_of
from tbptt_jax.study.task import Task, check_task, checksum, data_of, figures, keys_of, maker
from tbptt_jax.study.task import task as make_task
from tbptt_jax.training import TrainState, TrainStep

RECORD = "run.json"


class Run(NamedTuple):
    """Attributes:
    task: what it is about.
    params: those to use: the best on the validation data, or else the averaged, or else the last.
    state: the state after the last update; ``state.params`` are the last parameters.
    calls: what was measured, a :class:`tbptt_jax.study.loop.Call` for each compiled call.
    updates: how many windows were read.
    windows: in one reading of the training data; where a schedule decides their lengths, of its longest.
    workdir: where it is kept, or None.
    settings: what makes it this run, as ``run.json`` has it.
    choices: of windows over time, as :func:`adaptive` made them, or of depths, as :func:`adaptive_replay` did.
    steps: of a lane in one reading, where a schedule decides the windows' lengths, else None.
    """

    task: Task
    params: Any
    state: TrainState
    calls: list[Call]
    updates: int
    windows: int
    workdir: pathlib.Path | None
    settings: dict[str, Any]
    choices: tuple[Chosen, ...] = ()
    steps: int | None = None

    @property
    def model(self) -> tb.Recurrence:
        """The task's model."""
        return self.task.model

    @property
    def epochs(self) -> float:
        """How often the training data was read."""
        read = self.calls[-1].steps if self.calls else None
        return read / self.steps if read and self.steps else self.updates / self.windows


def fit(
    task: Task,
    *,
    window: int | Lengths,
    updates: int | None = None,
    epochs: float | None = None,
    workdir: str | pathlib.Path | None = None,
    influence: tb.Influence | Depths | str | None = None,
    optimiser: Any = None,
    learning_rate: float = 0.01,
    stateless: bool = False,
    burn_in: int = 0,
    lanes: int | None = None,
    seed: int = 0,
    windows_per_call: int = 50,
    checkpoint_every: int = 500,
    patience: int | None = None,
    average: averaging.Averaging | None = None,
    not_finite: str = "stop",
    listeners: Sequence[Callable[[Event], None]] = (),
    profile: int | None = None,
    resume: bool = True,
    start: "Run | str | pathlib.Path | None" = None,
    settings: dict[str, Any] | None = None,
    devices: int | None = None,
    show: Callable[[list[Call]], str] | None = None,
    quiet: bool = False,
) -> Run:
    """Trains a task; interrupted in any way, the same call goes on and ends with the same bits.

    With more ``updates`` a run that is done, or has stopped early, is gone on with, from its last state, at another ``learning_rate`` if you like:
    the rate of those that are added falls along a cosine of their own. For other data, or to begin from the best
    parameters, ``start`` another run from it.

    SIGTERM and SIGINT (Ctrl-C) finish the call, save, and exit with status 143 and 130; a second one exits at once.

    Args:
      task: the task.
      window: steps of a window, or a schedule of them: :func:`adaptive`, :func:`growing`, :func:`drawn`. With ``epochs`` the learning
        rate of a schedule's run then falls by the steps read, not by updates; with ``updates`` as ever.
      updates: one for each window, in all.
      epochs: times to read the training data, instead, also a part of one.
      workdir: where checkpoints and ``run.json`` go. None: nothing is kept.
      influence: what the gradient knows of the past, or its name, such as ``"replay:3"``; default :func:`tbptt_jax.truncate`. Or how
        its depth is chosen: :func:`adaptive_replay`.
      optimiser: an optax transformation. None: the gradient clipped to a norm of 1, then Adam.
      learning_rate: Adam's at the start; it falls to zero along a cosine.
      stateless: begin each window from the initial carry, for comparison.
      burn_in: steps that a stateless window reads before those it scores.
      lanes: training streams side by side; default the task's.
      seed: of the parameters and of data that is drawn.
      windows_per_call: windows, and so updates, in one compiled call.
      checkpoint_every: updates from one checkpoint, and look at the validation data, to the next.
      patience: stop after so many looks without a better one.
      average: :func:`ema` or :func:`asgd`: what is judged and returned is an average of the parameters.
      not_finite: ``"stop"`` or ``"skip"``: what a loss, gradient or carry that is not finite does.
      listeners: each is given every :class:`Event`: :func:`jsonl`, :func:`tensorboard`, :func:`wandb`, or your own.
      profile: the call that makes this update is traced by ``jax.profiler``, into ``workdir/profile``.
      resume: False: begin afresh.
      start: a run, or its workdir, whose parameters are begun from; its model needs to be of the same shapes.
      settings: whatever else makes it this run, such as your optimiser's settings, as JSON.
      devices: to spread the lanes over at most; default all that there are.
      show: ``calls -> text`` beside the progress; default the loss, and the validation's figure.
      quiet: print nothing.

    Returns:
      The run.

    Raises:
      ValueError: before any compute, if an argument is not as described, the data does not fit the window and lanes, or the
        workdir holds another run or is another process's; if a number is not finite, with its window, lane and step.
      OSError: if a checkpoint could not be written.
    """
    check_task(task)
    if isinstance(window, Depths):
        raise ValueError(
            "`window` is study.adaptive_replay(), which is for `influence`: give `window` a number of steps."
        )
    if isinstance(influence, Lengths):
        raise ValueError(f"`influence` is the schedule {influence.name!r} of window lengths, which is for `window`.")
    lanes = task.lanes if lanes is None else lanes
    for name, number in {"window": 1 if isinstance(window, Lengths) else window, "lanes": lanes, "windows_per_call": windows_per_call,
                         "checkpoint_every": checkpoint_every, "patience": 1 if patience is None else patience}.items():  # fmt: skip
        check_whole(name, number)
    check_until(updates, epochs)
    if not_finite not in ("stop", "skip"):
        raise ValueError(f"`not_finite` is {not_finite!r}; it needs to be 'stop' or 'skip'.")
    needs_valid = patience is not None or (average is not None and average.nonmonotone is not None)
    if needs_valid and task.valid is None:
        raise ValueError("`patience` and `asgd` look at validation data, and the task has none: give it `valid`.")
    if burn_in and not stateless:
        raise ValueError(f"`burn_in` is {burn_in}, which is for stateless windows: give stateless=True, or leave it.")

    keys = keys_of(seed)
    data = data_of(task.train, keys.train)
    feed = feed_of(
        task, data, window, lanes, stateless=stateless, burn_in=burn_in, per_call=windows_per_call, updates=updates, epochs=epochs
    )  # fmt: skip
    if isinstance(influence, Depths):
        feed = with_depths(feed, influence, task, window, stateless)
    first = jax.tree.map(lambda x: x[0], feed.read(feed.begin, 0, 1))
    lanes = len(jax.tree.leaves(first.inputs)[0])
    carry = carry_of(task, first)
    begin_from = None if start is None else (start if isinstance(start, Run) else load(start)).params
    named = influence.settings if isinstance(influence, Depths) else influence
    identity = {
        "window": window.settings if isinstance(window, Lengths) else window, "lanes": lanes, "stateless": bool(stateless), "burn_in": burn_in, "seed": seed,
        "data": checksum(data), "average": average and list(average), "start": None if begin_from is None else checksum(begin_from),
        **({"influence": named} if isinstance(named, str | dict) else {}),
        **({"learning rate by": feed.unit} if feed.unit == "steps" else {}),
        **({"checkpoint_every": checkpoint_every} if needs_valid else {}),
        **(settings or {}),
    }  # fmt: skip
    with holding(workdir) as directory:
        legs = _legs(directory, feed, None if optimiser is not None else learning_rate, resume)
        units = max([h.shape[-1] for h in jax.tree.leaves(carry) if h.ndim > 1] or [1])
        mesh = lane_mesh(lanes=lanes, window=feed.longest, units=units, devices=devices)
        past = f"replay:{influence.depths[-1]}" if isinstance(influence, Depths) else influence
        falls = tuple(map(tuple, legs))
        step = step_of(task.model, task.loss, past, feed.windows, mesh, optimiser, falls, feed.unit, average)
        if isinstance(window, Lengths) and len(window.sizes) != 1:  # which are all padded alike
            check_same_state(step, first)

        def init() -> TrainState:
            state = step.init(keys.init, first)
            return state if begin_from is None else _started(state, step, begin_from, first)

        own = own_lanes(lanes)

        def windows(at: Any, begin: int, end: int) -> tb.Window:
            return place(jax.tree.map(lambda x: x[:, own], feed.read(at, begin, end)), mesh)

        judge = None
        if task.valid is not None:
            valid = test_reader(
                task, task.valid, "valid", None if isinstance(window, Lengths) else window, stateless, burn_in, seed
            )
            higher = figures(task)[0].better == "higher"
            judge = Judge(lambda at: measure(task, jax.device_get(at), valid), higher, patience, int(legs[-1][0]))
        source, arguments = task.source or (None, {})
        record = {
            "task": source, "arguments": arguments, "codec": task.codec, "settings": identity, "legs": legs,
            "judged": judge is not None, "windows": feed.windows, "steps": feed.steps, "inputs": _spec(first.inputs),
        }  # fmt: skip

        def keep_record() -> None:
            if directory is not None:
                write_json(directory / RECORD, record)

        with quieted(quiet), progress(feed.until, feed.unit) as report:
            kept, calls, at = train(
                step, init, feed._replace(read=windows),
                lambda state, window: first_not_finite(task.model, task.loss, state, window),
                per_call=windows_per_call, every=checkpoint_every,
                directory=directory and directory / "checkpoints", settings=identity, resume=resume,
                skip=not_finite == "skip", judge=judge, nonmonotone=average and average.nonmonotone, begun=keep_record,
                show=lambda calls: report(getattr(calls[-1], feed.unit), (show or _shown)(calls)), listeners=listeners, profile=profile,
            )  # fmt: skip
        reached = getattr(calls[-1], feed.unit) if calls else 0
        if calls and (reached < feed.until or isinstance(window, Lengths) or choices_of(at)):
            record |= {"ended": calls[-1].updates, "reached": reached, "choices": [c._asdict() for c in choices_of(at)]}
            keep_record()
    return _run(task, kept, calls, feed.windows, directory, identity, choices_of(at), feed.steps)


def load(workdir: str | pathlib.Path, task: Task | None = None) -> Run:
    """A run as it was last kept: its model, parameters and codec, ready to predict, stream, be prompted or exported.

    Args:
      workdir: of a :func:`fit`.
      task: the task that was fitted, if it was made in a program. None: it is made again from the reference that
        :func:`task` was given, such as ``"char_lm"`` or ``"file.py:function"``, its data unread where it can be.

    Raises:
      ValueError: if there is no run, it is broken, or its task is not known.
    """
    directory = pathlib.Path(workdir).expanduser()
    path = directory / RECORD
    if not path.exists():
        raise ValueError(f"{short(directory)} holds no run, as study.fit keeps one: there is no {RECORD}.")
    try:
        record = json.loads(path.read_text())
        reference, arguments, codec = record["task"], record["arguments"], record["codec"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{short(path)} is broken, so the run there is not known.") from error
    if task is None:
        if reference is None:
            raise ValueError(
                f"The run in {short(directory)} is of a Task that a program made: give it as well, `study.load(workdir, task)`, or "
                "make it by `study.task('file.py:function')`."
            )
        takes = inspect.signature(maker(reference)).parameters
        task = make_task(reference, **arguments, **({"codec": codec} if "codec" in takes and codec else {}))
    inputs = _of_spec(record["inputs"]) if record.get("inputs") else _inputs(task)
    like = jax.eval_shape(task.model.init, jax.random.key(0), inputs)
    averages = record["settings"].get("average")
    whole = TrainState(like, averaging.Average(None, None, None, like) if averages else None, None, np.int32(0))  # type: ignore[arg-type]
    saved = newest(directory / "checkpoints", Kept(whole, like if record["judged"] else ()), partial=True)
    calls = [Call(*call) for call in saved.data["calls"]]
    choices = choices_of(saved.data.get("place"))
    return _run(
        task, saved.state, calls, record["windows"], directory, record["settings"], choices, record.get("steps")
    )


def _run(
    task: Task, kept: Kept, calls: list[Call], windows: int, directory: pathlib.Path | None, settings: dict[str, Any],
    choices: tuple[Chosen, ...], steps: int | None,
) -> Run:  # fmt: skip
    judged = any(call.valid for call in calls) and jax.tree.leaves(kept.best)
    params = kept.best if judged else averaging.params_of(kept.state)
    updates = calls[-1].updates if calls else 0
    return Run(task, params, kept.state, calls, updates, windows, directory, settings, choices, steps)


def _legs(directory: pathlib.Path | None, feed: Feed, rate: float | None, resume: bool) -> list[list[float]]:
    """The stretches ``[first, last, rate]``, in updates or in steps, over which the rate falls, those of a run that is gone on with first."""
    updates, unit = feed.until, feed.unit
    new: list[list[float]] = [[0, updates, rate if rate is not None else 0.0]]
    path = directory and directory / RECORD
    if not resume or path is None or not path.exists() or not (path.parent / "checkpoints").exists():
        return new
    try:
        record = json.loads(path.read_text())
        legs = record["legs"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{short(path)} is broken, so its run is not known: give another workdir.") from error
    if record.get("settings", {}).get("learning rate by", "updates") != unit:
        return new  # another run, which is refused as such
    first, last, before = legs[-1]
    if [last, before] == new[0][1:]:
        return legs
    made = max((int(p.name) for p in (path.parent / "checkpoints").iterdir() if p.name.isdecimal()), default=0)
    ended = made == record.get("ended", last)
    made = record.get("reached", made) if ended else made
    if ended and updates > made:
        return [*legs, [made, updates, new[0][2]]]
    if made == 0:
        return new
    if rate is None:
        return [*legs[:-1], [first, updates, 0.0]]
    unit, told = ("epochs", functools.partial(_epochs, feed.steps or 1)) if unit == "steps" else (unit, str)
    there = f"{short(path.parent)} holds a run of {told(last)} {unit} with the learning rate {before:g}"
    asked = f"{told(updates)} with {rate:g} were asked for"
    if not ended:
        raise ValueError(
            f"{there}, of which {made} updates are made, and {asked}: ask for {told(last)} {unit} and "
            f"learning_rate={before:g} to end it first, or begin afresh with resume=False (--noresume) or in another workdir."
        )
    raise ValueError(
        f"{there}, and {asked}. To go on with it give more {unit} than {told(made)}, at any rate; to begin from what "
        f"it has learned, start={short(path.parent)} (--init_from) and another workdir; to begin afresh, resume=False "
        "(--noresume)."
    )


def _epochs(reading: int, steps: int) -> str:
    """The shortest number of epochs that are so many steps of a lane, of which one reading of the data has ``reading``."""
    numbers = (float(f"{steps / reading:.{digits}g}") for digits in range(1, 18))
    return next(f"{number}".removesuffix(".0") for number in numbers if round(number * reading) == steps)


def _started(state: TrainState, step: TrainStep, params: Any, first: tb.Window) -> TrainState:
    """The state at update 0, begun from other parameters."""
    leaves = map(jax.tree_util.tree_leaves_with_path, (params, state.params))
    then, now = ({jax.tree_util.keystr(at): f"{x.dtype}{list(x.shape)}" for at, x in each} for each in leaves)
    if differ := [f"{at} {then.get(at)}, here {now.get(at)}" for at in then | now if then.get(at) != now.get(at)]:
        raise ValueError(
            f"The run to start from has other parameters: there {'; '.join(differ[:3])}. Give the model its sizes, text its vocabulary."
        )
    params = jax.tree.map(jnp.array, params)
    optimiser = state.optimiser
    if isinstance(optimiser, averaging.Average):
        optimiser = optimiser._replace(mean=jax.tree.map(jnp.array, params))
    stream = step.estimate.init(state.stream.key, params, first)
    return state._replace(params=params, optimiser=optimiser, stream=stream)


def _shown(calls: list[Call]) -> str:
    valid = next((call.valid for call in reversed(calls) if call.valid), {})
    return f"loss {calls[-1].loss:.4g}" + "".join(f", validation {name} {x:.4g}" for name, x in valid.items())


def _inputs(task: Task) -> Any:
    """A window's inputs, for their shapes."""
    data = data_of(task.train, keys_of(0).train)
    if isinstance(data, tb.Window):
        return jax.tree.map(lambda x: x[:1, :1], data.inputs)
    return jax.tree.map(lambda x: jnp.asarray(x[None, :1]), data[0])


def _spec(tree: Any) -> Any:
    """The shapes and dtypes of arrays in dicts, lists and tuples as JSON; None for other trees."""
    if isinstance(tree, dict) and all(isinstance(name, str) for name in tree):
        parts = {name: _spec(x) for name, x in tree.items()}
        return None if None in parts.values() else {"dict": parts}
    if type(tree) in (list, tuple):
        specs = [_spec(x) for x in tree]
        return None if None in specs else {type(tree).__name__: specs}
    if hasattr(tree, "shape") and not jax.dtypes.issubdtype(tree.dtype, jax.dtypes.prng_key):
        return {"shape": list(tree.shape), "dtype": str(tree.dtype)}
    return None


def _of_spec(spec: Any) -> Any:
    if "dict" in spec:
        return {name: _of_spec(x) for name, x in spec["dict"].items()}
    if "shape" in spec:
        return jax.ShapeDtypeStruct(tuple(spec["shape"]), jnp.dtype(spec["dtype"]))
    kind = list if "list" in spec else tuple
    return kind(map(_of_spec, spec[kind.__name__]))
