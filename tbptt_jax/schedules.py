"""Windows of varying length: where a stream is cut, when that is drawn by chance.

    lengths = schedules.polynomial_tail(base=20)(key, time)        where to cut
    windows = schedules.cut(sequences, lengths)                    a list: the lengths differ

Each cut window is padded to one of few lengths, which the schedule decides and not the draw, so that a jitted update
compiles few times, nearly all of them in the first epoch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tbptt_jax.arrays import check_whole, pad
from tbptt_jax.window import Window, check, check_scored, time_shape

PyTree = Any


class Cuts(NamedTuple):
    """Attributes:
    lengths: ``[windows]`` int, in order; they add up to the stream.
    edges: ``[time]`` float, the weight of the backward edge into each step, or None: all 1.
    unit: what windows are padded to multiples of, in steps (see :func:`cut`): the same for every draw of a schedule.
    """

    lengths: np.ndarray
    edges: np.ndarray | None = None
    unit: int = 1


Schedule = Callable[[jax.Array, int], Cuts]


def fixed(length: int) -> Schedule:
    """Windows of one length; the last is what is left.

    Args:
      length: steps in each.

    Returns:
      ``(key, time) -> Cuts``, the same whatever the key.

    Raises:
      ValueError: if ``length`` is not a whole number, at least 1.

    Reference: Williams & Peng 1990, *An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories*: BPTT(h; h') with h = h'.
    """
    check_whole("length", length)

    def draw(key: jax.Array, time: int) -> Cuts:
        del key
        return Cuts(_fill(np.full(-(-time // length), length), time), unit=length)

    return draw


def random_length(base: int, *, short: float = 0.05, deviation: float = 5.0, least: int = 5) -> Schedule:
    """AWD-LSTM's windows: around ``base`` steps, with probability ``short`` around half of that.

    The lengths are normal with ``deviation``, at least ``least`` steps. Cutting at other places in each epoch lets every
    pair of steps come into one window. Scale the learning rate with :func:`scale_by_length`, as the paper does.

    Args:
      base: the usual mean, in steps, at least 1.
      short: probability of a window around ``base / 2`` instead, in [0, 1].
      deviation: standard deviation, in steps, not negative.
      least: the fewest steps of a window, a whole number, at least 1; only the last, cut to fit, may have fewer.

    Raises:
      ValueError: if ``base``, ``short``, ``deviation`` or ``least`` is not as described.

    Reference: Merity, Keskar & Socher 2018, *Regularizing and optimizing LSTM language models*, section 4.1.
    """
    _at_least("base", base, 1)
    _at_least("deviation", deviation, 0)
    for name, value in (("base", base), ("deviation", deviation)):
        if math.isinf(value):
            raise ValueError(f"`{name}` is {value}; it needs to be finite.")
    check_whole("least", least)
    if not 0 <= short <= 1:
        raise ValueError(f"`short` is {short}; it is a probability and needs to be in [0, 1].")

    def draw(key: jax.Array, time: int) -> Cuts:
        rng = _host_rng(key)
        most = -(-time // least)
        middle = np.where(rng.random(most) < short, base / 2, base)
        return Cuts(_fill(np.maximum(least, rng.normal(middle, deviation).astype(int)), time), unit=_unit(base))

    return draw


def constant_tail(base: float) -> Schedule:
    """ARTBP with a cut after each step with probability 1/base: windows of ``base`` steps on average, geometric.

    Each backward edge that survives weighs 1/(1 - c), with c the probability that it would have been cut; with
    ``truncate()`` between windows the gradient at fixed parameters is then unbiased.

    Args:
      base: mean window length, in steps, at least 1.

    Raises:
      ValueError: if ``base`` is below 1.

    Reference: Tallec & Ollivier 2017, *Unbiasing truncated backpropagation through time*, section 4.
    """
    _at_least("base", base, 1)
    return _artbp(base, lambda steps: np.full(steps.shape, 1 / base))


def polynomial_tail(base: float, alpha: float = 4.0) -> Schedule:
    """ARTBP with c = (α - 1) / ((α - 2)·base + d) after d steps without a cut: windows of ``base`` steps on average.

    Long windows are more frequent than under :func:`constant_tail`, and weigh less: the weight of a lag grows as a power
    of it, not exponentially, which keeps the variance in bounds.

    Args:
      base: mean window length, in steps, at least 1.
      alpha: exponent of the tail, above 2.

    Raises:
      ValueError: if ``base`` is below 1 or ``alpha`` not above 2.

    Reference: Tallec & Ollivier 2017, *Unbiasing truncated backpropagation through time*, section 4, equation 17.
    """
    _at_least("base", base, 1)
    if not alpha > 2:
        raise ValueError(f"`alpha` is {alpha}; the mean window is finite only above 2.")
    return _artbp(base, lambda steps: (alpha - 1) / ((alpha - 2) * base + steps))


def edge_weights(lengths: np.ndarray, cut_probability: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The weight of the backward edge into each step, ``[time]``: 1/(1 - c_d) after d steps of a window, 1 at its start.

    ``cut_probability`` takes the steps d = 1, 2, … since the last cut to c_d. No window may be longer than it allows,
    and none may be cut short for being long: that would bring the bias back.
    """
    since_cut = np.concatenate([np.arange(length) for length in lengths])
    probability = cut_probability(np.maximum(since_cut, 1))
    return np.where(since_cut == 0, 1.0, 1 / np.where(since_cut == 0, 1.0, 1 - probability))


def cut(window: Window, cuts: Cuts, *, unit: int | None = None) -> list[Window]:
    """Cuts whole sequences or lanes at the drawn places.

    Args:
      window: ``[lanes, time, ...]``.
      cuts: from a schedule, for the same time.
      unit: windows are padded to a multiple of it, in steps: to ``unit``, 2·unit, … 8·unit, and, when longer, to four
        lengths in each octave, 10, 12, 14, 16, 20, 24, … units. Default: the schedule's, ``cuts.unit``, or time if that is
        less. What runs over the windows compiles once for each of these lengths that occurs: :func:`compilations` of them.

    Returns:
      Consecutive windows ``[lanes, padded length, ...]``, with resets and ``valid`` in all of them, and with ``edges``
      where the cuts or the window have them. The resets are the window's own; where it has none, rows begin at their
      first step.

    Raises:
      ValueError: if the window's shapes, data or weights are not as :class:`tbptt_jax.Window` describes, no step is scored,
        ``cuts`` is no Cuts, its lengths are not positive whole numbers or do not add up to time, its ``edges`` are not
        ``[time]``, or ``unit`` is not a whole number, at least 1.
    """
    check(window)
    check_scored(window)
    lanes, time = time_shape(window)
    if not isinstance(cuts, Cuts):
        raise ValueError(f"`cuts` is {cuts!r}; it needs to be what a schedule draws, such as `fixed(20)(key, time)`.")
    lengths = np.asarray(cuts.lengths)
    if not np.issubdtype(lengths.dtype, np.integer) or (lengths < 1).any() or lengths.sum() != time:
        raise ValueError(
            f"The lengths need to be whole numbers, at least 1, and add up to the stream's {time} steps; got "
            f"{np.array2string(lengths, threshold=8)}."
        )
    if cuts.edges is not None and np.shape(cuts.edges) != (time,):
        raise ValueError(f"The cuts' `edges` have shape {list(np.shape(cuts.edges))}; one for each step is [{time}].")
    check_whole("unit", cuts.unit if unit is None else unit)
    unit = min(cuts.unit, time) if unit is None else unit
    whole = window._replace(
        resets=np.broadcast_to(np.arange(time) == 0, (lanes, time)) if window.resets is None else window.resets,
        valid=np.ones((lanes, time), bool) if window.valid is None else window.valid,
    )
    if cuts.edges is not None:
        before = np.ones((lanes, time)) if whole.edges is None else whole.edges
        whole = whole._replace(edges=before * cuts.edges)
    windows = []
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        padded = _padded(int(length), int(unit))
        part = jax.tree.map(lambda x, end=end, length=length: x[:, end - length : end], whole)
        more = padded - int(length)
        edges = None if part.edges is None else pad(part.edges, 1, more, 1)
        part = jax.tree.map(lambda x, more=more: pad(x, 1, more), part)
        windows.append(part._replace(edges=edges))
    return windows


def compilations(windows: list[Window]) -> int:
    """How many shapes the windows have: so often does an update over them compile."""
    return len({time_shape(window) for window in windows})


def scale_by_length(base: float) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the window's length in steps, padding not counted, over ``base``.

    ``optax.chain(optax.sgd(30.0), scale_by_length(70))`` steps as far for each step of the stream whatever the window.
    :func:`tbptt_jax.train_step` hands the window to the optimiser.

    Args:
      base: the length, in steps, at which updates stay as they are; at least 1. A step counts if any lane is valid there.

    Raises:
      ValueError: now, if ``base`` is below 1; from ``update``, if the window's arrays do not share ``[lanes, time]``.
      TypeError: from ``update``, if it is not handed the window.

    Reference: Merity, Keskar & Socher 2018, section 4.1.
    """
    _at_least("base", base, 1)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, *, window: Window, **others: Any) -> tuple:
        del params, others
        time = time_shape(window)[1]
        length = time if window.valid is None else jnp.any(window.valid, 0).sum()
        scale = jnp.asarray(length / base, jnp.result_type(float))
        return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def by_steps(rate: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus a learning rate that goes by the steps read, not by the updates made.

    ``optax.chain(optax.scale_by_adam(), by_steps(optax.cosine_decay_schedule(1e-2, 100_000)))`` falls as fast for windows of
    any length. :func:`tbptt_jax.train_step` hands the window to the optimiser.

    Args:
      rate: ``steps -> rate``, steps of a lane before the window; padding is not counted, nor windows in which nothing is scored.

    Raises:
      TypeError: from ``update``, if it is not handed the window.
    """

    def update(updates: PyTree, steps: jax.Array, params: PyTree = None, *, window: Window, **others: Any) -> tuple:
        del params, others
        scale = -rate(steps)
        updates = jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
        read = time_shape(window)[1] if window.valid is None else jnp.any(window.valid, 0).sum()
        return updates, (steps + read).astype(jnp.int32)

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


def _artbp(base: float, cut_probability: Callable[[np.ndarray], np.ndarray]) -> Schedule:
    def draw(key: jax.Array, time: int) -> Cuts:
        rng = _host_rng(key)
        survival = np.cumprod(1 - cut_probability(np.arange(1, time + 1)))  # P(a window is longer than d)
        lengths = _fill(1 + np.searchsorted(-survival, -rng.random(time)), time)
        return Cuts(lengths, edge_weights(lengths, cut_probability), _unit(base))

    return draw


def _unit(base: float) -> int:
    """A fifth of the usual length: the padding is then about a tenth."""
    return max(1, math.ceil(min(base, 2**31) / 5))


def _padded(length: int, unit: int) -> int:
    """``length`` up to the next of ``unit``, 2·unit, … 8·unit, and then of four lengths in each octave."""
    step = unit * 2 ** max(0, (-(-length // unit) - 1).bit_length() - 3)
    return -(-length // step) * step


def _host_rng(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))


def _fill(lengths: np.ndarray, time: int) -> np.ndarray:
    """The first of ``lengths`` that cover ``time``, the last cut to fit."""
    ends = np.minimum(np.cumsum(lengths), time)
    ends = ends[: np.searchsorted(ends, time) + 1]
    return np.diff(ends, prepend=0)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"`{name}` is {value}; it needs to be at least {least}.")
