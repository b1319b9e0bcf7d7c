"""Time series from tables: one or many in a file, their gaps filled, a test that goes on where training ended."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tbptt_jax.arrays import quoted
from tbptt_jax.files import Table, read_table

GENERATED = {"train": 20_000, "valid": 4_000, "test": 4_000}
FILLS = ("forward", "mean", "zero")
SENTINELS = -99, -999, -9999, -99999, -9999.9, -999.9, 9999, 99999, 999999  # what loggers write for a number they lack


class Series(NamedTuple):
    """One series of a file.

    Attributes:
      inputs: ``[time, inputs]`` float64, in the data's units, each column as it stands in its row.
      targets: ``[time, targets]``; NaN where one is missing.
      rows: ``[time]``, the row of the file, from 0; negative for rows of another file that come before.
      name: what tells the series from others of its file, "" for the only one.
      times: ``time`` texts, what the file says of when; None: nothing.
      warm: how many of its first rows are read for the state alone, and not scored.
    """

    inputs: np.ndarray
    targets: np.ndarray
    rows: np.ndarray
    name: str = ""
    times: list[str] | None = None
    warm: int = 0


def read(
    files: dict[str, str],
    inputs: Sequence[str],
    targets: Sequence[str],
    *,
    missing: Sequence[str] = (),
    fill: str | None = None,
    decimal: str | None = None,
    series: str | None = None,
    time: str | None = None,
    scales: dict[str, Sequence[float]] | None = None,
) -> dict[str, list[Series]]:
    """The series of CSV files, by the file's name.

    Args:
      files: name → path; the training file is ``train``, and may be left out where there are ``scales``.
      inputs: columns, those that are targets too to be read one row late; none: the targets.
      targets: columns. Where a number is missing it stays so: such a step is not scored. ``test`` may have none. Where their
        past is read, rows at the end that have none are rows to come: they stay in ``test``, and are left out elsewhere.
      missing: what stands for a missing number, as for :func:`tbptt_jax.streams.read_csv`.
      fill: one of ``FILLS``, what is read where an input is missing: the last one before it (the training file's mean where
        there is none), that mean, or 0. None: it is refused.
      decimal: as for :func:`tbptt_jax.streams.read_csv`.
      series: the column that tells series apart; they come in the order in which they appear.
      time: a column that is kept as text.
      scales: those of a :class:`tbptt_jax.study.tasks.series.Layout`, whose means are those of the training file.

    Raises:
      ValueError: with file, line and column, if one is not as :func:`tbptt_jax.streams.read_csv` needs, or too short, an
        input is missing and there is no ``fill``, or nothing is left to train on.
    """
    inputs = list(inputs or targets)
    own_past = [name in targets for name in inputs]
    columns = list(dict.fromkeys([*inputs, *targets]))
    texts = [name for name in (series, time) if name is not None]
    how: dict = {"missing": missing, "decimal": decimal, "texts": texts}
    tables = {name: read_table(path, columns, **how) for name, path in files.items()}
    if scales is None:
        for column, numbers in zip(columns, ~np.isnan(tables["train"].values.T), strict=True):
            if not numbers.any():
                raise ValueError(f"{files['train']} has no number in column {quoted(column)}: leave it out.")
    means = scale_of(tables["train"].values)[0] if scales is None else np.array([scales[name][0] for name in columns])
    result: dict[str, list[Series]] = {}
    for name, table in tables.items():
        result[name] = []
        scored = np.zeros(len(targets), int)
        gaps: list[tuple[int, int]] = []  # row, column
        for of, rows in _rows_of(table, series).items():
            values, goal = (table.values[rows][:, [columns.index(c) for c in chosen]] for chosen in (inputs, targets))
            length, last = len(rows), len(rows)
            if any(own_past):
                seen = np.flatnonzero(~np.isnan(goal).all(1))
                last = int(seen[-1]) + 1 if len(seen) else 0
                length, last = (length, last) if name == "test" else (last, last - 1)
            scored += (~np.isnan(goal[1 if any(own_past) else 0 :])).sum(0)
            missed = np.isnan(values) & (np.arange(len(rows)) < np.where(own_past, last, length)[:, None]).T
            gaps += [(int(rows[t]), int(i)) for t, i in np.argwhere(missed)]
            values = filled(values, fill, means[[columns.index(c) for c in inputs]])
            times = [table.texts[time][row] for row in rows[:length].tolist()] if time else None
            result[name].append(Series(values[:length], goal[:length], rows[:length], of, times))
        if gaps and fill is None:
            i = min(i for _, i in gaps)
            at = [row for row, column in gaps if column == i]
            raise ValueError(
                f"{files[name]} has {len(at)} gaps in column {quoted(inputs[i])}, from which the targets are told, the first in "
                f"line {table.lines[min(at)]}. Say what is read there: --fill=forward, the last number before; --fill=mean, that "
                "of the training file; or --fill=zero."
            )
        if name != "test" and any(own_past) and max(len(each.rows) for each in result[name]) < 2:
            raise ValueError(f"{files[name]} has {len(table.values)} rows; telling one from those before it takes 2.")
        if (name == "train" and not scored.all()) or (name == "valid" and not scored.any()):
            column = quoted(targets[int(scored.argmin())])
            raise ValueError(f"{files[name]} has no number to be told in column {column}: leave it out.")
    return result


def _rows_of(table: Table, series: str | None) -> dict[str, np.ndarray]:
    """The rows of each series, by its name."""
    if series is None:
        return {"": np.arange(len(table.values))}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table.texts[series]):
        rows.setdefault(name, []).append(row)
    return {name: np.array(of) for name, of in rows.items()}


def warmed(data: dict[str, list[Series]], warm_up: str | int) -> dict[str, list[Series]]:
    """The same data, the test series with the training series of their name before them, which are not scored.

    Args:
      data: as of :func:`read`.
      warm_up: ``"train"`` for all rows of the training series; how many of its last rows; 0 for none.

    Raises:
      ValueError: if ``warm_up`` is none of these, or there are not so many rows.
    """
    if "test" not in data or warm_up in (0, "0"):
        return data
    longest = max(len(each.rows) for each in data["train"])
    text = str(warm_up)
    if text != "train" and not (text.isdecimal() and len(text) < 19 and int(text) <= longest):
        raise ValueError(
            f"`warm_up` is {quoted(warm_up)}; it needs to be 'train', or how many of the training file's last rows are read "
            f"before the test file, from 0 to {longest}."
        )
    before = {each.name: each for each in data["train"]}

    def joined(each: Series) -> Series:
        past = before.get(each.name)
        if past is None:
            return each
        warm = len(past.rows) if text == "train" else min(int(text), len(past.rows))
        first = len(past.rows) - warm
        inputs, targets = (np.concatenate([x[first:], y]) for x, y in zip(past[:2], each[:2], strict=True))
        times = each.times and [""] * warm + each.times
        return Series(inputs, targets, np.concatenate([np.arange(-warm, 0), each.rows]), each.name, times, warm)

    return {**data, "test": [joined(each) for each in data["test"]]}


def filled(values: np.ndarray, fill: str | None, means: np.ndarray) -> np.ndarray:
    """``values`` ``[time, columns]`` with a number where one is missing, as ``fill`` of :func:`read` says; None: as they are."""
    gaps = np.isnan(values)
    if fill is None:
        return values
    if fill == "forward":
        last = np.maximum.accumulate(np.where(gaps, -1, np.arange(len(values))[:, None]), 0)  # row of the last number
        return np.where(last < 0, means, np.take_along_axis(values, np.maximum(last, 0), 0))
    return np.where(gaps, 0 if fill == "zero" else means, values)


def mean_of(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Of the numbers that are there; NaN where none is."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


def scale_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the numbers in each column. One that never changes has the deviation 1.

    Rounding gives 1000 times 0.1 another mean, and so a deviation of 1e-17.
    """
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    size = np.frexp(np.maximum(-low, high))[1]  # by a power of two nothing is rounded, and no square overflows
    values = np.ldexp(values, -size)
    middle = mean_of(values, 0)
    deviation = np.ldexp(np.sqrt(mean_of((values - middle) ** 2, 0)), size)
    still = (low == high) | (deviation == 0)
    return np.where(still, low, np.ldexp(middle, size)), np.where(still, 1, deviation)


def sentinels(data: dict[str, list[Series]], inputs: Sequence[str], targets: Sequence[str]) -> str | None:
    """A sentence on a number that may stand for one that is missing: a usual one, farther off than all others, repeated."""
    for each in data.values():
        columns = np.concatenate([np.concatenate([s.inputs, s.targets], 1) for s in each])
        for name, values in zip([*(inputs or targets), *targets], columns.T, strict=True):
            for number in SENTINELS:
                others = values[(values != number) & ~np.isnan(values)]
                count = int((values == number).sum())
                far = others.size and abs(number - others.mean()) > 10 * (others.std() + abs(others).max() / 10)
                if count > 1 and far:
                    return f"Column {quoted(name)} holds {number} in {count} rows: if that stands for a missing number, give --missing={number}."
    return None


def counts(data: dict[str, list[Series]]) -> dict[str, dict[str, int]]:
    """The steps and the missing targets of each file, without those that are read for the state alone."""
    steps = {name: sum(len(s.rows) - s.warm for s in each) for name, each in data.items()}
    missing = {name: sum(int(np.isnan(s.targets[s.warm :]).sum()) for s in each) for name, each in data.items()}
    return {"steps": steps, "targets_missing": missing}


def generated() -> dict[str, list[Series]]:
    """The pump and the level of :func:`tanks`."""
    tables = {name: tanks(seed, steps) for seed, (name, steps) in enumerate(GENERATED.items())}
    return {name: [Series(x[:, :1], x[:, 1:], np.arange(len(x)))] for name, x in tables.items()}


def columns(data: Sequence[Series]) -> tuple[Sequence[str], list[list[float]]]:
    """Header and rows of a table of what was :func:`generated`."""
    return ("pump", "level"), np.hstack([data[0].inputs, data[0].targets])[data[0].warm :].tolist()


def tanks(seed: int, steps: int) -> np.ndarray:
    """``[steps, 2]``: what a pump gives, changed now and then, and the level measured in the lower of two tanks.

    What runs out of a tank goes with the root of its level (Torricelli). The lower level follows the pump over some
    hundreds of steps. After the cascaded tanks of Wigren and Schoukens 2013, *Three free data sets for development and
    benchmarking in nonlinear system identification*.
    """
    rng = np.random.default_rng(seed)
    pump = np.repeat(rng.uniform(0.1, 1, steps), rng.integers(10, 80, steps))[:steps]
    levels = np.empty(steps)
    upper = lower = 0.3
    for t in range(steps):
        out = 0.03 * math.sqrt(upper)
        upper, lower = max(0.0, upper + 0.03 * pump[t] - out), max(0.0, lower + out - 0.03 * math.sqrt(lower))
        levels[t] = lower
    return np.stack([pump, levels + rng.normal(0, 0.01, steps)], 1)
