"""The cheapest truncation whose bias, measured, is within a tolerance."""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tbptt_jax.arrays import check_tolerance, check_whole
from tbptt_jax.cutting import split
from tbptt_jax.gradient import Loss
from tbptt_jax.horizon.bias import balanced, flat, full, summed
from tbptt_jax.influence import Influence, replay, truncate
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.window import Window, check, check_scored, time_shape

PyTree = Any


class Candidate(NamedTuple):
    """A way to truncate, measured.

    Attributes:
      window: steps of a window.
      influence: its name.
      relative_bias: ‖E ĝ − g‖ / ‖g‖, against full BPTT.
      seconds: that the gradient takes for one step of all lanes, the median of a few runs.
      bytes: that it needs at most beside the data and the parameters.
    """

    window: int
    influence: str
    relative_bias: float
    seconds: float
    bytes: int


class Choice(NamedTuple):
    """The truncations whose measured bias is within the tolerance.

    Attributes:
      best: the one of ``holding`` that takes the least time; None where none holds.
      holding: for each influence the shortest window that holds, where one does.
      measured: all that were measured, in the order in which they were.
    """

    best: Candidate | None
    holding: tuple[Candidate, ...]
    measured: tuple[Candidate, ...]


def choose(
    model: Recurrence,
    loss: Loss,
    params: PyTree,
    window: Window,
    tolerance: float = 0.1,
    *,
    lengths: Sequence[int] | None = None,
    influences: Mapping[str, Influence] | None = None,
    key: jax.Array | None = None,
) -> Choice:
    """The cheapest way to truncate whose relative bias on a probe window, measured against full BPTT, is within a tolerance.

    For each influence the shortest length is found by bisection, as if a longer window were no worse; a program is compiled for
    each that is measured, log2 of the lengths at most and one.

    Args:
      model: the recurrence. It draws nothing, as where it is not trained: no dropout.
      loss: as for :func:`tbptt_jax.gradient`.
      params: the parameters.
      window: ``[lanes, time, ...]``, read from the initial carry on.
      tolerance: the largest relative bias to accept, positive.
      lengths: of windows, in steps; None: 1, 2, 3, 4, 6, 8, 12, … up to the window's steps.
      influences: name → influence, such as ``{"replay:1": tb.replay(1)}``; None: ``truncate`` and ``replay:1``.
      key: for random influences, of which one draw is measured; default ``jax.random.key(0)``.

    Raises:
      ValueError: if ``tolerance`` is not positive, ``lengths`` are not whole numbers from 1 to the window's steps, no step is
        scored, or the window, the loss or an influence is not as for :func:`tbptt_jax.gradient`.
    """
    check(window)
    _, steps = time_shape(window)
    check_tolerance(tolerance)
    if lengths is None:
        lengths = sorted({n for e in range(steps.bit_length()) for n in (2**e, 3 * 2**e // 2) if 1 <= n <= steps})
    for n in lengths:
        check_whole("lengths", n)
        if n > steps:
            raise ValueError(f"`lengths` has {n}; this probe window has {steps} steps, so choose from 1 to {steps}.")
    lengths = sorted(set(lengths))
    influences = {"truncate": truncate(), "replay:1": replay(1)} if influences is None else influences
    key = jax.random.key(0) if key is None else key
    check_scored(window)
    window = balanced(window)
    exact = flat(jax.jit(functools.partial(full, model, loss))(params, window))

    def measure(name: str, length: int) -> Candidate:
        windows = split(window, length)
        estimate = jax.jit(functools.partial(summed, model, loss, influences[name]))
        compiled = estimate.lower(params, windows, key).compile()
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            found = jax.block_until_ready(compiled(params, windows, key))
            seconds.append(time.perf_counter() - began)
        size, apart = np.linalg.norm(exact), np.linalg.norm(flat(found) - exact)
        bias = float(apart / size) if size else (float("inf") if apart else 0.0)
        memory = compiled.memory_analysis()
        return Candidate(
            length, name, bias, float(np.median(seconds)) / steps, getattr(memory, "temp_size_in_bytes", 0)
        )

    measured, holding = [], []
    for name in influences:
        low, high, shortest = 0, len(lengths) - 1, None
        while low <= high:
            middle = (low + high) // 2
            measured.append(measure(name, lengths[middle]))
            if measured[-1].relative_bias <= tolerance:
                shortest, high = measured[-1], middle - 1
            else:
                low = middle + 1
        if shortest is not None:
            holding.append(shortest)
    best = min(holding, key=lambda each: each.seconds, default=None)
    return Choice(best, tuple(holding), tuple(measured))
