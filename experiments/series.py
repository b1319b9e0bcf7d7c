"""Time series: files of people's own, standardised, or two tanks that a pump fills."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb
from tbptt_jax.window import quoted

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
    files: dict[str, str], inputs: list[str], targets: list[str], missing: list[str], fill: str | None
) -> dict[str, Series]:
    """The series of CSV files, by name; with no ``inputs``, the targets of a row are told from those of the row before.

    Args:
      files: name → path; the training file is ``train``.
      inputs: columns.
      targets: columns. Where a number is missing it stays so: such a step is not scored.
      missing: what stands for a missing number, as for :func:`tbptt_jax.streams.read_csv`.
      fill: one of ``FILLS``, what is read where an input is missing: the last one before it (the training file's mean where
        there is none), that mean, or 0. None: it is refused.

    Raises:
      ValueError: with file, line and column, if one is not as :func:`tbptt_jax.streams.read_csv` needs, or too short, or an
        input is missing and there is no ``fill``.
    """
    tables = {name: tb.streams.read_csv(path, inputs + targets, missing=missing) for name, path in files.items()}
    for name, table in tables.items():
        if empty := [
            column for column, values in zip(inputs + targets, table.T, strict=True) if np.isnan(values).all()
        ]:
            raise ValueError(f"{files[name]} has no number in column {quoted(empty[0])}: leave it out.")
    means = np.nanmean(tables["train"], 0)
    found = {}
    for name, table in tables.items():
        past = table[:, : len(inputs)] if inputs else table
        gaps = np.isnan(past)
        if gaps.any() and fill is None:
            row, column = np.argwhere(gaps)[0]
            raise ValueError(
                f"{files[name]} has {gaps.sum()} gaps in what the targets are told from, the first in row {row} (from 0) of column "
                f"{quoted((inputs or targets)[column])}: choose with --fill={'|'.join(FILLS)} what is read there."
            )
        past = filled(past, fill, means[: past.shape[1]])
        if inputs:
            found[name] = Series(past, table[:, len(inputs) :], 0)
            continue
        if len(table) < 2:
            raise ValueError(
                f"{files[name]} has {len(table)} rows; to tell a row from those before it takes at least 2."
            )
        found[name] = Series(past[:-1], table[1:], 1)
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


def scale_of(values: np.ndarray) -> Scale:
    deviation = np.nanstd(values, 0)
    return Scale(np.nanmean(values, 0), np.where(deviation > 0, deviation, 1))


def standardised(values: np.ndarray, scale: Scale) -> np.ndarray:
    """In float64 from the file to here: of a meter at 1e8, float32 has no decimals left."""
    return ((values - scale.mean) / scale.deviation).astype(np.float32)


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
