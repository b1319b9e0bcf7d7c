"""The cheapest truncation whose bias, measured, is within a tolerance."""

import bisect
import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tbptt_jax.arrays import check_tolerance, check_whole, quoted
from tbptt_jax.cutting import split
from tbptt_jax.gradient import Loss
from tbptt_jax.horizon.bias import balanced, flat, full, key_of, summed
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
    lengths: Iterable[int] | None = None,
    influences: Mapping[str, Influence] | None = None,
    key: jax.Array | None = None,
) -> Choice:
    """The cheapest way to truncate whose relative bias on a probe window, measured against full BPTT, is within a tolerance.

    For each influence the shortest length is found by bisection, and from there downward as long as one of the next two holds, since a
    longer window need not be better; a program is compiled for each that is measured, about log2 of the lengths and two.

    Args:
      model: the recurrence. It draws nothing, as where it is not trained: no dropout.
      loss: as for :func:`tbptt_jax.gradient`.
      params: the parameters.
      window: ``[lanes, time, ...]``, read from the initial carry on.
      tolerance: the largest relative bias to accept, positive.
      lengths: of windows, in steps; None: 1, 2, 3, 4, 6, 8, 12, …, and all of the window's steps.
      influences: name → influence, such as ``{"replay:1": tb.replay(1)}``; None: ``truncate`` and ``replay:1``.
      key: for random influences, of which one draw is measured; default ``jax.random.key(0)``.

    Raises:
      ValueError: if ``tolerance`` is not positive, ``lengths`` are not whole numbers from 1 to the window's steps, or there is none,
        ``influences`` have no names, or there is none, ``key`` is none, no step is scored, or the window, the loss or an influence
        is not as for :func:`tbptt_jax.gradient`.
    """
    check(window)
    _, steps = time_shape(window)
    check_tolerance(tolerance)
    sizes = _lengths(lengths, steps)
    influences = {"truncate": truncate(), "replay:1": replay(1)} if influences is None else influences
    if not isinstance(influences, Mapping) or not influences:
        raise ValueError(
            f'`influences` is {quoted(influences)}; give one or more by name, such as {{"replay:1": tb.replay(1)}}.'
        )
    for name, influence in influences.items():
        if not isinstance(influence, Influence):
            raise ValueError(
                f"`influences` has {quoted(influence)} for {name!r}; it needs to be an Influence, such as `truncate()`, called."
            )
    key = key_of(key)
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

    measured: list[Candidate] = []
    holding: list[Candidate] = []
    for name in influences:
        found: dict[int, Candidate] = {}

        def holds(at: int, name: str = name, found: dict[int, Candidate] = found) -> bool:
            if at not in found:
                found[at] = measure(name, sizes[at])
            return found[at].relative_bias <= tolerance

        shortest = bisect.bisect_left(range(len(sizes)), True, key=holds)
        while shorter := [at for at in (shortest - 1, shortest - 2) if at >= 0 and holds(at)]:
            shortest = shorter[-1]
        measured += found.values()
        if shortest in found:
            holding.append(found[shortest])
    best = min(holding, key=lambda each: each.seconds, default=None)
    return Choice(best, tuple(holding), tuple(measured))


def _lengths(lengths: Iterable[int] | None, steps: int) -> list[int]:
    """Those to choose from, from short to long.

    Raises:
      ValueError: if there is none, or one is not a whole number from 1 to the window's ``steps``.
    """
    if lengths is None:
        return sorted(
            {n for e in range(steps.bit_length()) for n in (2**e, 3 * 2**e // 2) if 1 <= n <= steps} | {steps}
        )
    try:
        sizes = list(lengths)
    except TypeError:  # one number
        sizes = []
    if not sizes:
        raise ValueError(f"`lengths` is {quoted(lengths)}; give one or more, such as [8, 16, 32].")
    for n in sizes:
        check_whole("lengths", n)
        if n > steps:
            raise ValueError(f"`lengths` has {n}; this probe window has {steps} steps, so choose from 1 to {steps}.")
    return sorted(set(map(int, sizes)))
