"""Time series: files of people's own, standardised, or two tanks that a pump fills."""

import math
from typing import NamedTuple

import jax
import numpy as np

import tbptt_jax as tb

GENERATED = {"train": 20_000, "valid": 4_000, "test": 4_000}


class Series(NamedTuple):
    """Attributes:
    inputs: ``[time, inputs]`` float32, in the data's units.
    targets: ``[time, targets]``, those of the same step.
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


def read(files: dict[str, str], inputs: list[str], targets: list[str]) -> dict[str, Series]:
    """The series of CSV files, by name; with no ``inputs``, the targets of a row are told from those of the row before.

    Raises:
      ValueError: with file, line and column, if one is not as :func:`tbptt_jax.streams.read_csv` needs, or too short.
    """
    found = {}
    for name, path in files.items():
        table = tb.streams.read_csv(path, inputs + targets)
        if inputs:
            found[name] = Series(table[:, : len(inputs)], table[:, len(inputs) :], 0)
            continue
        if len(table) < 2:
            raise ValueError(f"{path} has {len(table)} rows; to tell a row from those before it takes at least 2.")
        found[name] = Series(table[:-1], table[1:], 1)
    return found


def generated() -> dict[str, Series]:
    """The pump and the level of :func:`tanks`."""
    tables = {name: tanks(seed, steps) for seed, (name, steps) in enumerate(GENERATED.items())}
    return {name: Series(table[:, :1], table[:, 1:], 0) for name, table in tables.items()}


def scale_of(values: np.ndarray) -> Scale:
    deviation = values.std(0, dtype=np.float64)
    return Scale(values.mean(0, dtype=np.float64), np.where(deviation > 0, deviation, 1))


def standardised(values: np.ndarray, scale: Scale) -> np.ndarray:
    return ((values - scale.mean) / scale.deviation).astype(np.float32)


def loss(outputs: jax.Array, window: tb.Window) -> jax.Array:
    """The squared error, a mean over targets."""
    return ((outputs - window.targets) ** 2).mean(-1)
