"""The ways to cut the sequences of the first-bit study, and what theory and others say of each."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import tbptt_jax as tb
from tbptt_jax.tasks.first_bit import Floor, first_bit_floor

LENGTH, SLIDING = 20, 10


class System(NamedTuple):
    """A way to cut sequences ``[n, 20, 1]``, what theory says of it, and what was published."""

    name: str
    window: int
    cut: Callable[[tb.Window, int], tb.Window]  # (sequences, lanes) -> windows
    exact: Floor | None
    published: float | None = None


def contiguous(length: int, sequences: tb.Window, lanes: int) -> tb.Window:
    return tb.split(sequences, length, lanes=lanes)


def sliding(sequences: tb.Window, lanes: int) -> tb.Window:
    return tb.split(tb.slide(sequences, SLIDING), SLIDING, lanes=lanes)


def misaligned(sequences: tb.Window, lanes: int) -> tb.Window:
    """The misuse: overlapping windows in batches of 11, as `split` would not let them run, carried on with no reset."""
    del lanes
    return sliding(sequences, LENGTH - SLIDING + 1)._replace(resets=None)


def systems() -> list[System]:
    published = {("stateful", 1): 1.0, ("stateless", 1): 0.525}
    rows = [
        System("stateless full", LENGTH, functools.partial(contiguous, LENGTH), first_bit_floor(1)),
        System("stateless sliding", SLIDING, sliding, first_bit_floor(LENGTH - SLIDING + 1), 0.5455),
        System("stateful misaligned", SLIDING, misaligned, None, 0.5),
    ]
    for k in (1, 2, 4, 5, 10, 20):
        cut = functools.partial(contiguous, k)

        def forget(sequences: tb.Window, lanes: int, cut: Callable = cut) -> tb.Window:
            return tb.stateless(cut(sequences, lanes))

        floor = first_bit_floor(LENGTH // k)
        rows.append(System("stateless contiguous", k, forget, floor, published.get(("stateless", k))))
        rows.append(System("stateful contiguous", k, cut, first_bit_floor(1), published.get(("stateful", k))))
    return rows


def shape_of(windows: tb.Window) -> list[int]:
    """``[windows over all lanes, time, features]`` of windows ``[windows, lanes, time, features]``."""
    count, lanes, time_, features = windows.inputs.shape
    filled = count * lanes if windows.valid is None else int(windows.valid[..., 0].sum())
    return [filled, time_, features]


def starts_of(system: System, test: tb.Window) -> np.ndarray:
    """Where in its sequence each window starts, ``[windows, lanes]``."""
    count, lanes, length, _ = test.inputs.shape
    if system.cut in (sliding, misaligned):
        return np.arange(count * lanes).reshape(count, lanes) % (LENGTH - length + 1)
    return np.arange(count)[:, None] % (LENGTH // length) * length + np.zeros(lanes, int)
