"""Time series: files of people's own, standardised, or two tanks that a pump fills."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb
from tbptt_jax.arrays import quoted
from tbptt_jax.files import read_table

GENERATED = {"train": 20_000, "valid": 4_000, "test": 4_000}


class Series(NamedTuple):
    """Attributes:
    inputs: ``[time, inputs]`` float64, in the data's units.
    targets: ``[time, targets]``, those of the same step; NaN where one is missing.
    first: the row of the file, from 0, that ``targets[0]`` stands in.
    """

    inputs: np.ndarray
    targets: np.ndarray
    first: int


class Scale(NamedTuple):
    """The mean and standard deviation of each column."""

    mean: np.ndarray
    deviation: np.ndarray


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


FILLS = ("forward", "mean", "zero")
SENTINELS = -99, -999, -9999, -99999, -9999.9, -999.9, 9999, 99999, 999999  # what loggers write for a number they lack


def sentinels(data: dict[str, Series], names: list[str]) -> str | None:
    """A sentence on a number that may stand for one that is missing: a usual one, farther off than all others, again and again."""
    for each in data.values():
        for name, values in zip(names, np.concatenate([each.inputs, each.targets], 1).T, strict=False):
            for number in SENTINELS:
                others = values[(values != number) & ~np.isnan(values)]
                count = int((values == number).sum())
                if (
                    count > 1
                    and others.size
                    and abs(number - others.mean()) > 10 * (others.std() + abs(others).max() / 10)
                ):
                    return f"Column {quoted(name)} holds {number} in {count} rows: if that stands for a missing number, give --missing={number}."
    return None


def read(
    files: dict[str, str],
    inputs: list[str],
    targets: list[str],
    missing: list[str],
    fill: str | None,
    decimal: str | None = None,
) -> dict[str, Series]:
    """The series of CSV files, by name; with no ``inputs``, the targets of a row are told from those of the row before.

    Args:
      files: name → path; the training file is ``train``.
      inputs: columns.
      targets: columns. Where a number is missing it stays so: such a step is not scored. ``test`` may have none.
      missing: what stands for a missing number, as for :func:`tbptt_jax.streams.read_csv`.
      fill: one of ``FILLS``, what is read where an input is missing: the last one before it (the training file's mean where
        there is none), that mean, or 0. None: it is refused.
      decimal: as for :func:`tbptt_jax.streams.read_csv`.

    Raises:
      ValueError: with file, line and column, if one is not as :func:`tbptt_jax.streams.read_csv` needs, or too short, an
        input is missing and there is no ``fill``, or nothing is left to train on.
    """
    columns = inputs + targets
    tables = {name: read_table(path, columns, missing=missing, decimal=decimal) for name, path in files.items()}
    for column, numbers in zip(columns, ~np.isnan(tables["train"].values.T), strict=True):
        if not numbers.any():
            raise ValueError(f"{files['train']} has no number in column {quoted(column)}: leave it out.")
    means = scale_of(tables["train"].values).mean
    found = {}
    for name, (table, lines) in tables.items():
        if not inputs and len(table) < 2:
            raise ValueError(
                f"{files[name]} has {len(table)} rows; to tell a row from those before it takes at least 2."
            )
        past, told = (table[:, : len(inputs)], table[:, len(inputs) :]) if inputs else (table[:-1], table[1:])
        gaps = np.isnan(past)
        if gaps.any() and fill is None:
            column = gaps.any(0).argmax()
            raise ValueError(
                f"{files[name]} has {gaps[:, column].sum()} gaps in column {quoted(columns[column])}, from which the targets are "
                f"told, the first in line {lines[gaps[:, column].argmax()]}. Say what is read there: --fill=forward, the last "
                "number before; --fill=mean, that of the training file; or --fill=zero."
            )
        empty = np.isnan(told).all(0)
        if (name == "train" and empty.any()) or (name == "valid" and empty.all()):
            raise ValueError(
                f"{files[name]} has no number to be told in column {quoted(targets[empty.argmax()])}: leave it out."
            )
        found[name] = Series(filled(past, fill, means[: past.shape[1]]), told, 0 if inputs else 1)
    return found


def filled(values: np.ndarray, fill: str | None, means: np.ndarray) -> np.ndarray:
    """``values`` ``[time, columns]`` with a number where one is missing, as ``fill`` of :func:`read` says."""
    gaps = np.isnan(values)
    if fill == "forward":
        last = np.maximum.accumulate(
            np.where(gaps, -1, np.arange(len(values))[:, None]), 0
        )  # the row of the last number
        return np.where(last < 0, means, np.take_along_axis(values, np.maximum(last, 0), 0))
    return np.where(gaps, 0 if fill == "zero" else means, values)


def generated() -> dict[str, Series]:
    """The pump and the level of :func:`tanks`."""
    tables = {name: tanks(seed, steps) for seed, (name, steps) in enumerate(GENERATED.items())}
    return {name: Series(table[:, :1], table[:, 1:], 0) for name, table in tables.items()}


def mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Of the numbers that are there; NaN where none is."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


def scale_of(values: np.ndarray) -> Scale:
    """Of the numbers that are there in each column. One that never changes has its number for a mean, and the deviation 1.

    Rounding gives 1000 times 0.1 another mean, and so a deviation of 1e-17.
    """
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    size = np.frexp(np.maximum(-low, high))[1]  # by a power of two nothing is rounded, and no square overflows
    values = np.ldexp(values, -size)
    middle = mean(values, 0)
    deviation = np.ldexp(np.sqrt(mean((values - middle) ** 2, 0)), size)
    still = (low == high) | (deviation == 0)
    return Scale(np.where(still, low, np.ldexp(middle, size)), np.where(still, 1, deviation))


def standardised(data: dict[str, Series]) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], Scale]:
    """Inputs and targets of each series, float32, in units of the training file's deviation; and the targets' scale.

    In float64 from the file to here: of a meter at 1e8, float32 has no decimals left.

    Raises:
      ValueError: if one is too far from the training file's mean for float32.
    """
    scales = [scale_of(values) for values in data["train"][:2]]
    found = {}
    for name, each in data.items():
        pair = [(values - scale.mean) / scale.deviation for values, scale in zip(each[:2], scales, strict=True)]
        farthest = max(np.nanmax(np.abs(values), initial=0) for values in pair)
        if farthest > np.finfo(np.float32).max:
            raise ValueError(
                f"The {name} file has a number that is {farthest:.3g} deviations of the training file from its mean, too far to "
                "be computed with: look for it there, or leave its column out."
            )
        found[name] = (pair[0].astype(np.float32), pair[1].astype(np.float32))
    return found, scales[1]


def lanes(inputs: np.ndarray, targets: np.ndarray, lanes: int) -> tb.Window:
    """The series as lanes; its targets are ``(values, there)``, and a step weighs as much as of its targets are there."""
    there = ~np.isnan(targets)
    values = np.where(there, targets, 0)
    weights = there.mean(-1, dtype=np.float32)
    window = tb.lanes(inputs, (values, there, weights), lanes=lanes)
    return window._replace(targets=window.targets[:2], weights=None if there.all() else window.targets[2])


def loss(outputs: jax.Array, window: tb.Window) -> jax.Array:
    """The squared error, a mean over the targets that are there."""
    values, there = window.targets
    return jnp.where(there, (outputs - values) ** 2, 0).sum(-1) / jnp.maximum(there.sum(-1), 1)
