"""The task of forecasting time series: an LSTM reads columns of a table, and predicts columns of it.

A column that is read and is a target as well is read one row late: its past. Everything is standardised with the mean and
deviation of the training file.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb
from tbptt_jax.arrays import check_whole, quoted
from tbptt_jax.study.task import Figure, Task
from tbptt_jax.study.tasks.tables import GENERATED, Series, generated, read, scale_of, warmed


class Layout(NamedTuple):
    """What a model reads of a table and what it predicts, and in what units. As a dict it is the codec of a :func:`forecast`.

    Attributes:
      inputs: the columns that are read. One that is a target too is read one row late.
      targets: the columns that are predicted.
      ahead: how many steps ahead, the first being the row whose inputs were read last.
      direct: whether the model has outputs for each step ahead; else its forecasts are fed back as the targets' past.
      scales: column → its mean and deviation in the training file.
    """

    inputs: Sequence[str]
    targets: Sequence[str]
    ahead: int
    direct: bool
    scales: dict[str, Sequence[float]]

    @property
    def late(self) -> list[int]:
        """The inputs, by their place, that are read one row late."""
        return [i for i, name in enumerate(self.inputs) if name in self.targets]

    @property
    def past(self) -> list[int]:
        """The targets, by their place, that these are."""
        return [list(self.targets).index(self.inputs[i]) for i in self.late]

    def scale(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation ``[columns]`` of each."""
        mean, deviation = np.array([self.scales[name] for name in names], np.float64).T
        return mean, deviation


def forecast(
    train: str | None = None,
    valid: str | None = None,
    test: str | None = None,
    inputs: Sequence[str] | str = (),
    targets: Sequence[str] | str = (),
    hidden: int = 32,
    layers: int = 1,
    lanes: int = 16,
    ahead: int = 1,
    ahead_by: str | None = None,
    series: str | None = None,
    time: str | None = None,
    warm_up: str | int = 0,
    missing: Sequence[str] | str = (),
    fill: str | None = None,
    decimal: str | None = None,
    implementation: Any = None,
    codec: dict[str, Any] | None = None,
) -> Task:
    """Forecasting the targets of CSV files with an LSTM.

    Args:
      train: path of a file whose first line names the columns. None: two tanks, generated.
      valid: another.
      test: another.
      inputs: columns that are read; those that are targets too are read one row late. None: the targets, one row late.
      targets: columns that are predicted.
      hidden: units of a layer.
      layers: LSTM layers.
      lanes: places of the training file, or series of it, that are read side by side.
      ahead: how many steps ahead are forecast.
      ahead_by: ``"recursive"``: forecasts are fed back as the targets' past. ``"direct"``: the model has outputs for each step
        ahead. None: recursive where the targets' past is read.
      series: the column that tells many series of one file apart; each begins from the initial carry.
      time: a column that says when, kept as text.
      warm_up: ``"train"``: the test goes on where the training file ends; a number: where its last rows end. 0: it begins from
        the initial carry.
      missing: what stands for a missing number, as for :func:`tbptt_jax.streams.read_csv`.
      fill: what is read where an input is missing, as for :func:`tbptt_jax.study.tasks.tables.read`.
      decimal: as for :func:`tbptt_jax.streams.read_csv`.
      implementation: of :func:`tbptt_jax.lstm`.
      codec: of a task that was made before: the files are read only when their data is needed.

    Raises:
      ValueError: as from :func:`tbptt_jax.study.tasks.tables.read`, or if the arguments do not go together.
    """
    names = names_of(inputs), names_of(targets)
    given: dict[str, Any] = {"train": train, "valid": valid, "test": test, "inputs": names[0], "targets": names[1]}
    check_columns(train, *names, ahead, ahead_by, series, time)
    how: dict[str, Any] = {"missing": missing, "fill": fill, "decimal": decimal, "series": series, "time": time}
    data = functools.partial(data_of, **given, **how, warm_up=warm_up)
    layout = layout_of(data(), *columns_of(train, *names), ahead, ahead_by) if codec is None else Layout(**codec)
    there = [name for name, path in (("train", train), ("valid", valid), ("test", test)) if path is not None]
    return task_of(layout, data, there or list(GENERATED), hidden, layers, lanes, implementation)


def data_of(
    train: str | None = None, valid: str | None = None, test: str | None = None, inputs: Sequence[str] | str = (),
    targets: Sequence[str] | str = (), *, missing: Sequence[str] | str = (), warm_up: str | int = 0, **how: Any,
) -> dict[str, list[Series]]:  # fmt: skip
    """The series that a :func:`forecast` with these arguments is of, those of :func:`generated` where no file is named.

    What was read last is kept. Arguments that are not of the data are taken, and not used.
    """
    files = {name: path for name, path in (("train", train), ("valid", valid), ("test", test)) if path is not None}
    stamps = tuple(os.stat(path).st_mtime_ns for path in files.values() if os.path.exists(path))
    columns = columns_of(train, names_of(inputs), names_of(targets))
    used: dict[str, Any] = {name: how[name] for name in ("fill", "decimal", "series", "time") if name in how}
    used["missing"] = tuple(names_of(missing))
    return _load(tuple(files.items()), *map(tuple, columns), warm_up, tuple(used.items()), stamps)


@functools.lru_cache(maxsize=1)
def _load(files: tuple, inputs: tuple, targets: tuple, warm_up: str | int, how: tuple, stamps: tuple) -> Any:
    return warmed(read(dict(files), inputs, targets, **dict(how)) if files else generated(), warm_up)


def columns_of(train: str | None, inputs: list[str], targets: list[str]) -> tuple[list[str], list[str]]:
    """The inputs and the targets, those of what is generated where there is no training file."""
    return (["pump"], ["level"]) if train is None else (inputs or targets, targets)


def names_of(given: Sequence[str] | str | None) -> list[str]:
    """Columns from a list, or from a text with commas."""
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given or ())


def check_columns(
    train: str | None, inputs: Sequence[str], targets: Sequence[str], ahead: int, ahead_by: str | None, series: str | None,
    time: str | None,
) -> None:  # fmt: skip
    """Raises a ``ValueError`` unless the columns and the steps ahead go together."""
    if (train is None) != (not targets) or (train is None and inputs):
        raise ValueError("A forecast needs a training file and targets: give train, test and targets, or none of them.")
    for which, names in (("inputs", inputs), ("targets", targets)):
        twice = [name for name in names if list(names).count(name) > 1]
        if twice:
            raise ValueError(f"The {which} name {quoted(twice[0])} more than once: give each column once.")
    for which, name in (("series", series), ("time", time)):
        if name is not None and name in (*inputs, *targets):
            raise ValueError(f"The {which} column {quoted(name)} is among the inputs or targets: leave it out there.")
    if series is not None and series == time:
        raise ValueError(f"The series column and the time column are both {quoted(series)}: give one of them.")
    check_whole("ahead", ahead)
    if ahead_by not in (None, "recursive", "direct"):
        raise ValueError(f"`ahead_by` is {quoted(ahead_by)}; it needs to be 'recursive' or 'direct'.")
    inputs, targets = columns_of(train, list(inputs), list(targets))
    if ahead > 1 and ahead_by == "recursive" and not set(inputs) & set(targets):
        raise ValueError(
            f"{ahead} steps ahead by recursion feed forecasts back as the targets' past, and no target is among the inputs: "
            "name it there as well, or choose direct."
        )


def layout_of(
    data: dict[str, list[Series]], inputs: Sequence[str], targets: Sequence[str], ahead: int = 1, ahead_by: str | None = None
) -> Layout:  # fmt: skip
    """The layout of a forecast, with the scales of the training series."""
    inputs = list(inputs or targets)
    own_past = bool(set(inputs) & set(targets))
    direct = ahead > 1 and (ahead_by == "direct" or (ahead_by is None and not own_past))
    scales: dict[str, Sequence[float]] = {}
    for names, values in ((inputs, [s.inputs for s in data["train"]]), (targets, [s.targets for s in data["train"]])):
        for name, *scale in zip(names, *(x.tolist() for x in scale_of(np.concatenate(values))), strict=True):
            scales[name] = scale  # those of a target, which may have gaps, come last
    return Layout(inputs, list(targets), ahead, direct, scales)


def task_of(
    layout: Layout, data: Callable[[], dict[str, list[Series]]], names: Sequence[str], hidden: int = 32, layers: int = 1,
    lanes: int = 16, implementation: Any = None,
) -> Task:  # fmt: skip
    """The task of a layout, its data read when it is needed; ``names`` says which of train, valid and test there are."""

    def streams_of(name: str) -> tb.Window:
        many = name == "train" or len(data()[name]) > 1
        return streams(layout, data()[name], lanes if many else 1, name)

    parts: dict[str, Any] = {name: functools.partial(streams_of, name) for name in names}
    outputs = len(layout.targets) * (layout.ahead if layout.direct else 1)
    return Task(
        model=tb.lstm(hidden, layers=layers, readout=nn.Dense(outputs), implementation=implementation),
        loss=loss,
        **parts,
        lanes=lanes,
        figures=(Figure("squared error, standardised", loss),),
        name="forecast",
        about=f"A time series: {', '.join(layout.targets)} predicted from {', '.join(layout.inputs)}, as far as they were read.",
        free=True,
        codec=layout._asdict(),
    )


def known(layout: Layout, series: Series) -> int:
    """The rows that can be read: all, or where the targets' past is read up to the last row that has one."""
    if not layout.late:
        return len(series.rows)
    seen = np.flatnonzero(~np.isnan(series.targets).all(1))
    return int(seen[-1]) + 1 if len(seen) else 0


def features(layout: Layout, series: Series) -> np.ndarray:
    """What the model reads, ``[time + 1, inputs]`` float64, standardised; NaN where it is not known.

    The last row is the one after the end, of which the targets' past is known, and no more.
    """
    mean, deviation = layout.scale(layout.inputs)
    values = (series.inputs - mean) / deviation
    read = np.concatenate([values, np.full_like(values[:1], np.nan)])
    read[0, layout.late] = np.nan
    read[1:, layout.late] = values[:, layout.late]
    read[known(layout, series) + 1 :, layout.late] = np.nan
    return read


def streams(layout: Layout, data: Sequence[Series], lanes: int, name: str = "") -> tb.Window:
    """The series as lanes ``[lanes, time, ...]``, many of them packed, each reset at its start.

    Targets are ``(values, there)``, ``[lanes, time, targets]`` or with those of each step ahead side by side, and a step
    weighs as much as of its targets are there. What is not known is read as the training file's mean and not scored.

    Raises:
      ValueError: if a number is too far from the training file's mean for float32, or no target is there; ``name`` is the
        file's.
    """
    mean, deviation = layout.scale(layout.targets)
    parts: list[tuple[np.ndarray, ...]] = []
    for each in data:
        length = known(layout, each)
        read, goals = features(layout, each)[:length], (each.targets[:length] - mean) / deviation
        farthest = max(np.nanmax(np.abs(x), initial=0) for x in (read, goals))
        if farthest > np.finfo(np.float32).max:
            raise ValueError(
                f"The {name} file has a number that is {farthest:.3g} deviations of the training file from its mean, too far to "
                "be computed with: look for it there, or leave its column out."
            )
        if layout.direct:
            goals = np.concatenate([_shifted(goals, k) for k in range(layout.ahead)], 1)
        scored = ~np.isnan(read).any(1) & (np.arange(length) >= each.warm)
        there = ~np.isnan(goals) & scored[:, None]
        values = np.where(there, goals, 0).astype(np.float32)
        parts.append((np.nan_to_num(read).astype(np.float32), values, there, there.mean(1, dtype=np.float32)))
    inputs, values, there, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not there.any():
        raise ValueError(f"The {name} file has no target that is there: there is nothing to score.")
    if len(parts) == 1:
        window = tb.lanes(inputs, (values, there, weights), lanes=lanes)
    else:
        lengths = np.array([len(part[0]) for part in parts])
        window = tb.pack(inputs, (values, there, weights), lengths=lengths, lanes=min(lanes, len(parts)))
    return window._replace(targets=window.targets[:2], weights=None if there.all() else window.targets[2])


def check_long_enough(window: tb.Window, data: Sequence[Series], lanes: int, length: int, name: str) -> None:
    """Raises a ``ValueError`` if training streams are too short for windows of ``length``; ``name`` is that of the file."""
    steps = sum(len(each.rows) for each in data)
    if len(data) == 1 and steps < lanes * length:
        raise ValueError(
            f"{name} has {steps} steps; {lanes} lanes with windows of {length} need at least {lanes * length}. Give a longer "
            "file, or fewer --lanes or a shorter --window."
        )
    if (time := window.inputs.shape[1]) < length:
        raise ValueError(
            f"The {len(data)} series of {name} fill {len(window.inputs)} lanes of {time} steps, and windows have {length}: "
            f"give fewer --lanes, or a --window of at most {time}."
        )


def _shifted(values: np.ndarray, steps: int) -> np.ndarray:
    """Row t is what was row t + steps; NaN at the end."""
    after = np.full_like(values, np.nan)
    after[: max(0, len(values) - steps)] = values[steps:]
    return after


def loss(outputs: jax.Array, window: tb.Window) -> jax.Array:
    """The squared error, a mean over the targets that are there."""
    values, there = window.targets
    return jnp.where(there, (outputs - values) ** 2, 0).sum(-1) / jnp.maximum(there.sum(-1), 1)
