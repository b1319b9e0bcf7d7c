"""A task: what a run is about, before anything is cut into windows."""

import functools
import importlib
import importlib.util
import inspect
import math
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import tbptt_jax as tb
from tbptt_jax.gradient import Loss
from tbptt_jax.study.process.writing import short

Streams = Any  # see Task
NAMES = {
    **dict.fromkeys(("first_bit", "copy_memory", "adding", "lag", "influence_balancing"), "known"),
    "char_lm": "text",
    "forecast": "series",
}  # where in `tasks` those of a name are made


class Figure(NamedTuple):
    """A number to report.

    Attributes:
      name: of it.
      of: ``(outputs, window) -> [lanes, time]``, averaged over the scored steps.
      unit: of it, "" for none.
      better: ``"lower"`` or ``"higher"``.
    """

    name: str
    of: Loss
    unit: str = ""
    better: str = "lower"


class Task(NamedTuple):
    """What is to be learned from what, and how it is judged.

    *Streams*, of training, validation and test, are what there is before it is cut. They are one of

    - a :class:`tbptt_jax.Window` ``[n, time, ...]``: n whole sequences, or lanes; those of training run ``lanes`` at a time;
    - ``(inputs, targets)``, arrays ``[time, ...]`` of one corpus, in memory or mapped from a file that is larger
      (:func:`tbptt_jax.streams.open_npy`): training reads it as ``lanes`` stretches side by side, and tests in one go;
    - a function of no argument that returns either, called when the data is first needed;
    - a function of a key that draws a Window: every seed has data of its own.

    Attributes:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]``, what is minimised.
      train: streams.
      valid: streams, for best parameters and early stopping, or None.
      test: streams, or None.
      lanes: how many training streams are read side by side.
      figures: what is reported; the first decides. None: the loss.
      name: of the task.
      about: a sentence or two for the report.
      exact: ``(carried, window) -> the best possible first figure``, None where theory does not say.
      cut: ``(window, length, lanes) -> windows`` ``[windows, lanes, length, ...]``, of streams that are a Window.
      free: whether the test is one free run with the state carried, however it was trained.
      codec: what turns raw data into the model's, as JSON, such as a vocabulary or scales; kept with a run.
      source: the reference and the arguments that it was made by, as :func:`task` sets it.
    """

    model: tb.Recurrence
    loss: Loss
    train: Streams
    valid: Streams | None = None
    test: Streams | None = None
    lanes: int = 1
    figures: tuple[Figure, ...] = ()
    name: str = "task"
    about: str = ""
    exact: Callable[[bool, int], float | None] | None = None
    cut: Callable[[tb.Window, int, int], tb.Window] = lambda window, length, lanes: tb.split(
        window, length, lanes=lanes
    )
    free: bool = False
    codec: dict[str, Any] = {}  # noqa: RUF012
    source: tuple[str, dict[str, Any]] | None = None


class Reader(NamedTuple):
    """Attributes:
    windows: how many there are in the streams.
    steps: the scored and unscored steps of all lanes together.
    read: ``(first, last) -> windows`` ``[last - first, lanes, length, ...]`` in the host's memory, read in order and round
      again; at the beginning the windows themselves reset every lane.
    """

    windows: int
    steps: int
    read: Callable[[int, int], tb.Window]


def task(reference: str, **arguments: Any) -> Task:
    """The task of a name, or of a function of one's own.

    Args:
      reference: a name, such as ``"first_bit"``; ``"package.module:function"``; or ``"path/to/file.py:function"``.
      arguments: of the function that makes it.

    Returns:
      The task, with its ``source``.

    Raises:
      ValueError: if there is no such function, it does not take the arguments, or does not return a :class:`Task`.
    """
    make = maker(reference)
    parameters = inspect.signature(make).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in arguments if name not in parameters and not takes_any]
    missing = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [name for name in missing if name not in arguments]
    if unknown or missing:
        wrong = f"has no argument {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        has = f"its arguments are {', '.join(parameters) or 'none'}, given as --set=name=value, or by name in Python"
        raise ValueError(f"{short(reference)} {short(wrong)}: {has}.")
    made = make(**arguments)
    if not isinstance(made, Task):
        raise ValueError(f"{short(reference)} returned a {type(made).__name__}; it needs to return a study.Task.")
    check_task(made)
    path, colon, function = reference.rpartition(":")
    if colon and path.endswith(".py"):
        reference = f"{pathlib.Path(path).expanduser().absolute()}:{function}"
    kept = {name: _paths_as_text(value) for name, value in arguments.items() if name != "codec"}
    return made._replace(source=(reference, kept), name=_name_of(made, path, function or reference))


def _name_of(made: Task, path: str, function: str) -> str:
    """A task that has no name has its function's, or its file's if that is called task."""
    if made.name != "task":
        return made.name
    return path.removesuffix(".py").replace("/", ".").rpartition(".")[2] if function == "task" and path else function


def _paths_as_text(value: Any) -> Any:
    """The same with paths as texts, as JSON has them."""
    if isinstance(value, list | tuple):
        return [_paths_as_text(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def maker(reference: str) -> Callable[..., Task]:
    """The function that a reference names; a ``ValueError`` if there is none."""
    given, (place, colon, name) = short(reference), reference.rpartition(":")
    if not colon and reference in NAMES:
        place, name = f"tbptt_jax.study.tasks.{NAMES[reference]}", reference
    elif not colon:
        raise ValueError(
            f"There is no task {given!r}: give one of {', '.join(NAMES)}, or a function of your own that returns a study.Task, "
            "as package.module:function or path/to/file.py:function."
        )
    try:
        if place.endswith(".py"):
            path = pathlib.Path(place).expanduser()
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except FileNotFoundError as error:
        raise ValueError(f"{given}: there is no file {short(place)}.") from error
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # a module that the task's own file imports
        raise ValueError(f"{given}: there is no module {short(place)} where Python looks for it.") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{given}: {short(place)} has no function {short(name)!r}.")
    return found


def check_task(task: Task) -> None:
    """Raises a ``ValueError`` unless the task's parts are what they need to be."""
    if not isinstance(task, Task):
        raise ValueError(f"`task` is a {type(task).__name__}; it needs to be a study.Task.")
    if not isinstance(task.model, tb.Recurrence):
        model = type(task.model).__name__
        raise ValueError(f"The task's model is a {model}; it needs to be a Recurrence, as `tb.from_linen` makes.")
    if isinstance(task.lanes, bool) or not isinstance(task.lanes, int) or task.lanes < 1:
        raise ValueError(f"The task's lanes are {task.lanes!r}; they need to be a whole number, at least 1.")
    for figure in task.figures:
        if not isinstance(figure, Figure) or figure.better not in ("lower", "higher"):
            raise ValueError(f"{figure!r} is no study.Figure whose `better` is 'lower' or 'higher'.")
    for name in ("train", "valid", "test"):
        streams = getattr(task, name)
        pair = isinstance(streams, tuple) and len(streams) == 2
        if not (callable(streams) or isinstance(streams, tb.Window) or pair or (streams is None and name != "train")):
            raise ValueError(
                f"The task's {name} is a {type(streams).__name__}; it needs to be a tb.Window [n, time, ...], a pair (inputs, "
                "targets) of arrays [time, ...], or a function that returns one."
            )


def figures(task: Task) -> tuple[Figure, ...]:
    """The task's figures, or its loss as the only one."""
    return task.figures or (Figure("loss", task.loss),)


def is_drawn(streams: Streams) -> bool:
    """Whether every seed has data of its own."""
    return callable(streams) and len(inspect.signature(streams).parameters) > 0


def data_of(streams: Streams, key: jax.Array) -> Any:
    """The streams as a Window or a pair: what is a function, called."""
    if not callable(streams):
        return streams
    return streams(key) if is_drawn(streams) else _once(streams)


@functools.lru_cache(maxsize=8)
def _once(streams: Callable[[], Any]) -> Any:
    return streams()


class Keys(NamedTuple):
    """What is drawn for a seed: its data, and the parameters at first."""

    train: jax.Array
    valid: jax.Array
    test: jax.Array
    init: jax.Array


def keys_of(seed: int | jax.Array) -> Keys:
    """The keys of a seed, the same in a fit and in a sweep."""
    key = jax.random.fold_in(jax.random.key(0), seed)
    train, test = jax.random.split(key)
    return Keys(train, jax.random.fold_in(key, 2), test, jax.random.fold_in(key, 1))


def reader(
    task: Task, streams: Any, length: int, lanes: int | None, *, stateless: bool = False, burn_in: int = 0
) -> Reader:
    """The windows of streams, a Window or a pair, in the order in which they are read.

    Args:
      task: says how they are cut.
      streams: as :func:`data_of` returns them.
      length: steps of a window.
      lanes: streams side by side. None: all of a Window, and one of a pair.
      stateless: each window begins from the initial carry.
      burn_in: steps that a stateless window reads first, to find its state.

    Raises:
      ValueError: as from :func:`tbptt_jax.split`, :func:`tbptt_jax.streams.windows` and :func:`tbptt_jax.overlap`.
    """
    if not isinstance(streams, tb.Window):
        inputs, targets = streams
        time = len(jax.tree.leaves(inputs)[0])
        lanes = lanes or 1
        if not burn_in:
            count, read = tb.streams.cutter(inputs, targets, lanes=lanes, length=length)

            def of_corpus(first: int, last: int) -> tb.Window:
                windows = read(np.arange(first, last) % count)
                return tb.stateless(windows) if stateless else windows

            return Reader(count, time, of_corpus)
        streams = tb.lanes(inputs, targets, lanes=lanes)
    streams = jax.tree.map(lambda x: x if _is_key(x) else np.asarray(x), streams)
    n, steps = jax.tree.leaves(streams.inputs)[0].shape[:2]
    lanes = min(lanes or n, n)
    if burn_in:
        if n > lanes:
            raise ValueError(f"Windows that overlap read all {n} sequences side by side, not {lanes}: give lanes={n}.")
        windows = tb.overlap(streams, length, burn_in)
    else:
        windows = task.cut(streams, length, lanes)
    if stateless:
        windows = tb.stateless(windows)
    count = len(jax.tree.leaves(windows.inputs)[0])

    def read_again(first: int, last: int) -> tb.Window:
        order = np.arange(first, last) % count
        return jax.tree.map(lambda x: x[order], windows)

    return Reader(count, n * steps, read_again)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def checksum(streams: Any) -> int:
    """Of the streams' numbers; of a mapped file, of its beginning, middle and end."""

    def crc(x: Any, so_far: int) -> int:
        x = jax.random.key_data(x) if _is_key(x) else x
        so_far = zlib.crc32(f"{x.shape}{x.dtype}".encode(), so_far)
        if isinstance(x, np.memmap) or getattr(x, "nbytes", 0) > 2**28:
            part = max(1, 2**20 // max(1, math.prod(x.shape[1:])))
            starts = (0, len(x) // 2, max(0, len(x) - part))
            x = np.concatenate([np.asarray(x[i : i + part]) for i in starts])
        return zlib.crc32(np.asarray(x).tobytes(), so_far)

    return functools.reduce(lambda so_far, x: crc(x, so_far), jax.tree.leaves(streams), 0)
