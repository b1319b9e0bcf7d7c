"""Schedules of window lengths: how long the next window of a stream is, while the stream goes on where it is.

    study.fit(task, window=study.adaptive(0.5, lengths=(8, 16, 32, 64)), epochs=20)     by how far gradients reach
    study.fit(task, window=study.growing(8, 64, epochs=10), epochs=20)                  a curriculum
    study.fit(task, window=study.drawn(tb.schedules.random_length(70)), epochs=20)      by chance

A schedule is a pure function of a :class:`Place`, all of which is kept with the run, so that a run that is gone on with decides
the same. The carry, the optimiser and the position in the data do not depend on it.
"""

import functools
import numbers
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import tbptt_jax as tb
from tbptt_jax.arrays import check_tolerance, check_whole, quoted
from tbptt_jax.gradient import Loss
from tbptt_jax.horizon.suggest import check_bound
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.window import Window

MOST_LANES = 16  # that a look is at, drawn once: as many steps of others say little more


class Chosen(NamedTuple):
    """What was chosen after a look at the stream.

    Attributes:
      updates: made before it.
      steps: of a lane, read before it.
      window: steps of the windows from here on.
      bias_bound: of that window's gradient, relative to the whole one's; infinite where nothing bounds it.
      horizon: steps that every loss needs to see back.
      safe: whether the bound is below the tolerance.
      reason: a sentence, with what the bound rests on.
      depth: windows that ``replay`` goes back from here on, where that is chosen (:func:`adaptive_replay`), else None.
    """

    updates: int
    steps: int
    window: int
    bias_bound: float
    horizon: int
    safe: bool
    reason: str
    depth: int | None = None


class Place(NamedTuple):
    """Where a run is in its stream: all that a schedule may decide by.

    Attributes:
      updates: made so far, one a window.
      steps: of a lane, read so far in all readings.
      time: steps of a lane until it is at an end, where other sequences or the next reading begin.
      reading: steps of a lane in one reading of all the data, an epoch: several times ``time`` where there are more sequences than
        lanes.
      choice: the last :class:`Chosen`, or None.
    """

    updates: int
    steps: int
    time: int
    reading: int
    choice: Chosen | None = None


class Span(NamedTuple):
    """The next window.

    Attributes:
      length: its steps.
      padded: None: all windows of the compiled call have the length of its first, and none is padded; one that comes to the end of
        the lane reads on where other sequences, or the next reading, begin. Else the steps that it is padded to, at least
        ``length``; where fewer are left of the lane it has those, and all windows of a call are padded to the longest of them.
      edges: ``[length]``, as :class:`tbptt_jax.Window` has them, or None.
    """

    length: int
    padded: int | None = None
    edges: np.ndarray | None = None


class Look(NamedTuple):
    """How a schedule looks at the stream.

    Attributes:
      every: updates from one look to the next, at the beginning of a compiled call.
      steps: of the probe: those of each lane that come next.
      choose: ``(model, loss, params, probe, carry) -> suggestion``, the carry that of the stream before the probe.
      rarest: after each look that leads to what the one before did the next is twice as far off, up to so many times ``every``.
    """

    every: int
    steps: int
    choose: Callable[[Recurrence, Loss, Any, Window, Any], tb.horizon.Suggestion]
    rarest: int = 1


class Lengths(NamedTuple):
    """A schedule of window lengths.

    Attributes:
      next: ``place -> span``, pure.
      sizes: the steps that windows have, or are padded to, from short to long; () where that is not known before.
      settings: what makes it this schedule, as JSON; a run is gone on with by the same one only.
      look: how it looks at the stream, or None.
      name: for people.
    """

    next: Callable[[Place], Span]
    sizes: tuple[int, ...]
    settings: dict[str, Any]
    look: Look | None = None
    name: str = "schedule"


def adaptive(
    tolerance: float = 0.5, *, lengths: Sequence[int] = (8, 16, 32, 64), every: int = 1000, probe: int | None = None,
    bound: str = "gradients",
) -> Lengths:  # fmt: skip
    """The shortest window whose bias is bounded to be below a tolerance, measured again and again while the model learns.

    Each look measures, at the parameters and the carry of that moment, what windows of each length leave out of the gradient of
    the steps that come next, by :func:`tbptt_jax.horizon.decay.decay` and :func:`tbptt_jax.horizon.suggest.suggest`. That takes as long as
    some dozens of updates by short windows. Where no length is safe, or nothing can be measured, the longest is used, and
    the :class:`Chosen` says why.

    Args:
      tolerance: of the relative bias of ``truncate()``; positive.
      lengths: of windows, in steps, from short to long; a short geometric list, since each is compiled.
      every: updates from one look to the next, which is made where a compiled call begins, of ``windows_per_call`` updates
        (:func:`tbptt_jax.study.fit.fit`); twice as many after each look that leads to what the one before did, up to eight times.
      probe: steps of a lane that a look reads, of 16 lanes at most, drawn once; the first so many as the longest window has are for what lies before the others.
        Default twice the longest window.
      bound: ``"gradients"``, which is the tighter; or ``"norms"``, the paper's, which asks for longer windows on a plateau, where the
        gradient of now says nothing of what is further back.

    Raises:
      ValueError: if an argument is not as described, or the probe is shorter than two of the longest windows.

    Reference: Aicher, Foti & Fox 2019, *Adaptively truncating backpropagation through time to control gradient bias*, algorithm 1.
    """
    if np.ndim(lengths) != 1:
        raise ValueError(f"`lengths` is {quoted(lengths)}; give several, such as (8, 16, 32, 64).")
    for length in lengths:
        check_whole("lengths", length)
    sizes = tuple(map(int, lengths))
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[-1] < 2:
        raise ValueError(f"`lengths` are {list(sizes)}; give them from short to long, the longest at least 2.")
    longest = sizes[-1]
    probe = 2 * longest if probe is None else probe
    check_whole("probe", probe)
    probe = int(probe)
    if probe < 2 * longest:
        raise ValueError(f"`probe` is {probe}; with windows of up to {longest} give at least {2 * longest}.")

    def next_span(place: Place) -> Span:
        return Span(longest if place.choice is None else place.choice.window)

    look = looking(tolerance, every, probe, longest, sizes, bound=bound)
    settings = {
        "adaptive": float(tolerance),
        "lengths": list(sizes),
        "every": look.every,
        "probe": probe,
        "bound": bound,
    }
    return Lengths(next_span, sizes, settings, look, "auto")


def looking(
    tolerance: float, every: int, steps: int, lags: int, lengths: Sequence[int], depths: Sequence[int] | None = None, *,
    bound: str,
) -> Look:  # fmt: skip
    """A look that suggests one of ``lengths``, or with a single one, of the ``depths`` of replay; the last where none is safe.

    Raises:
      ValueError: if ``tolerance`` is not positive, ``every`` not a whole number of at least 1, or there is no such ``bound``.
    """
    check_bound(bound)
    check_tolerance(tolerance)
    check_whole("every", every)

    def choose(model: Recurrence, loss: Loss, params: Any, window: Window, carry: Any) -> tb.horizon.Suggestion:
        lanes = len(jax.tree.leaves(window.inputs)[0])
        if lanes > MOST_LANES:  # any, since lanes may be laid out in some order
            some = np.sort(np.random.default_rng(0).permutation(lanes)[:MOST_LANES])
            window, carry = jax.tree.map(lambda x: x[some], (window, carry))
        probes = max(1, 2 * MOST_LANES // lanes)
        try:
            fading = tb.horizon.decay(
                model, loss, params, window, lags=lags, carry=carry, burn_in=lags, probes=probes, lengths=lengths, depths=depths
            )  # fmt: skip
        except ValueError as error:  # it explodes, or no step is scored
            said, deepest = f"Nothing could be measured: {error}", depths[-1] if depths else 0
            return tb.horizon.Suggestion(lengths[-1], lags, float("inf"), False, said, deepest)
        return tb.horizon.suggest(fading, tolerance=tolerance, largest=lags, bound=bound)

    return Look(int(every), steps, choose, rarest=8)


def growing(first: int, last: int, *, updates: int | None = None, epochs: float | None = None) -> Lengths:
    """A curriculum: windows of ``first`` steps, then of twice as many, and so on up to ``last``, each for as long.

    Args:
      first: steps of the windows at first.
      last: steps of those at the end, and from there on.
      updates: after which windows have ``last`` steps.
      epochs: readings of the data after which they do, instead, as :func:`tbptt_jax.study.fit.fit` counts them; steps decide, not
        windows.

    Raises:
      ValueError: if an argument is not as described.
    """
    check_whole("first", first)
    check_whole("last", last)
    if last < first:
        raise ValueError(f"`first` is {first} and `last` is {last}: windows that grow need `last` to be the longer.")
    check_until(updates, epochs)
    first, last = int(first), int(last)
    updates, epochs = updates and int(updates), epochs and float(epochs)
    sizes = tuple(first * 2**i for i in range((last // first).bit_length()))
    sizes = sizes if sizes[-1] == last else (*sizes, last)
    stages = len(sizes) - 1

    def next_span(place: Place) -> Span:
        part = place.updates / updates if updates else place.steps / place.reading / (epochs or 1)
        return Span(sizes[min(int(part * stages), stages)])

    return Lengths(next_span, sizes, {"growing": [first, last], "updates": updates, "epochs": epochs}, name="growing")


def check_until(updates: int | None, epochs: float | None) -> None:
    """Raises a ``ValueError`` unless one of them is given, ``updates`` a whole number or ``epochs`` a positive one."""
    if (updates is None) == (epochs is None):
        raise ValueError(f"`updates` is {quoted(updates)} and `epochs` is {quoted(epochs)}: give one of them.")
    if epochs is None:
        check_whole("updates", updates)  # type: ignore[arg-type]
    elif isinstance(epochs, bool) or not isinstance(epochs, numbers.Real) or not 0 < epochs < float("inf"):
        raise ValueError(f"`epochs` is {epochs!r}; it needs to be a positive number.")


def drawn(schedule: tb.schedules.Schedule, *, seed: int = 0) -> Lengths:
    """Windows of lengths drawn by chance, at other places in each reading: AWD-LSTM's, or those of ARTBP with their weights.

    All windows of a compiled call are padded to the longest of them, and that to 1, 2, 4, 8, … of the schedule's units
    (:class:`tbptt_jax.schedules.Cuts`), so that few lengths are compiled. Fewer windows in a call are less padding.

    Args:
      schedule: from :mod:`tbptt_jax.schedules`, such as ``random_length(70)`` or ``polynomial_tail(20)``.
      seed: of the draws, a whole number.

    Raises:
      ValueError: if it draws no :class:`tbptt_jax.schedules.Cuts`, or the seed is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"`seed` is {quoted(seed)}; it needs to be a whole number.")
    seed, wrong = (
        int(seed),
        f"`schedule` is {quoted(schedule)}; it needs to be such as `tb.schedules.random_length(70)`",
    )
    try:
        cuts = schedule(jax.random.key(seed), 1000)
    except TypeError as error:  # no function, or one of other arguments
        raise ValueError(f"{wrong}, a function of a key and of how many steps there are: {error}") from error
    if not isinstance(cuts, tb.schedules.Cuts):
        raise ValueError(f"{wrong}; it returned {quoted(cuts)}.")
    own = zlib.crc32(np.asarray(cuts.lengths, np.int64).tobytes(), 0 if cuts.edges is None else 1)

    @functools.lru_cache(maxsize=2)
    def draw(reading: int, time: int) -> tuple[tb.schedules.Cuts, np.ndarray]:
        cuts = schedule(jax.random.fold_in(jax.random.key(seed), reading), time)
        return cuts, np.cumsum(cuts.lengths)

    def next_span(place: Place) -> Span:
        reading, begin = divmod(place.steps, place.time)
        cuts, ends = draw(reading, place.time)
        end = int(ends[np.searchsorted(ends, begin, "right")])
        edges = None if cuts.edges is None else cuts.edges[begin:end]
        units = 2 ** (-(-(end - begin) // cuts.unit) - 1).bit_length()
        return Span(end - begin, min(units * cuts.unit, place.time), edges)

    return Lengths(next_span, (), {"drawn": own, "seed": seed}, name="drawn")
