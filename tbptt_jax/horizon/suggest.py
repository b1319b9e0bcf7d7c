"""The shortest window whose bias is bounded, by what was seen of how gradients fade."""

from typing import NamedTuple

import numpy as np

from tbptt_jax.arrays import check_tolerance
from tbptt_jax.horizon.decay import Decay

BOUNDS = "gradients", "norms"


class Suggestion(NamedTuple):
    """A truncation, and what it leaves out.

    Attributes:
      window: steps of a window.
      horizon: steps that every loss needs to see back, as with ``replay(m)`` and windows of k ≥ horizon / m.
      relative_bias: the bound δ on the relative bias of that window, or where none is safe, of the longest measured; infinite where
        nothing bounds it.
      safe: whether it is below the tolerance.
      reason: a sentence, with what the bound rests on.
      depth: windows before it that ``replay`` goes back; 0: ``truncate()``.
      horizon_bias: the bound δ where every loss sees ``horizon`` steps back.
    """

    window: int
    horizon: int
    relative_bias: float
    safe: bool
    reason: str
    depth: int = 0
    horizon_bias: float = float("inf")


def suggest(fading: Decay, *, tolerance: float = 0.1, largest: int = 1000, bound: str = "gradients") -> Suggestion:
    """The shortest window, and the shortest horizon, whose truncation bias is bounded to be below ``tolerance``.

    Where every loss sees K steps back, at most E(K) = ‖ĝ_lags − ĝ_K‖ + ``beyond`` is left out of the gradient, which is itself
    no smaller than ‖ĝ_K'‖ − E(K') for any K', and the relative bias is at most

        δ(K) = E(K) / max_{K' ≤ K} (‖ĝ_K'‖ − E(K')).

    So much is true of windows too, with what they were seen to leave out in the place of ‖ĝ_lags − ĝ_K‖ and ``whole`` in that of
    ‖ĝ_K'‖. The bound is of the losses of the window that was looked at, and rests on φ fading on beyond ``lags`` as before, and on no
    lag there adding more to the parameters' gradient, for what it has of φ, than those that were seen: the reason says so.

    The paper's own bound, ``"norms"``, has Σ_{k > K} φ_k for E(K), the mean of that over a window's steps for what windows leave out, and
    ‖E Σ_{k ≤ K} ∂l_s/∂h_{s-k}‖ for ‖ĝ_K‖: gradients by the carry, as if ∂h/∂θ were as large at every step. A mean of norms does not
    shrink where the gradients of single losses point everywhere, so that it asks for longer windows while there is still to be
    found what the past is good for.

    Args:
      fading: from :func:`decay`.
      tolerance: δ needs to be below it; positive.
      largest: the longest window allowed, in steps, at least 1; returned where none is safe.
      bound: ``"gradients"``, by the parameters, or ``"norms"``, the paper's.

    Returns:
      The shortest of the measured windows, or the smallest depth, from which on all are below the tolerance. A longer horizon than ``lags`` is one that
      φ would need if it went on as it does.

    Raises:
      ValueError: if ``tolerance`` is not positive, ``largest`` is below 1 or all windows measured, or ``bound`` is neither.

    Reference: Aicher, Foti & Fox 2019, section 3.3, where E is M Σ_{k>K} φ_k. (Their code returns 1 where β̂ ≥ 1.)
    """
    check_bound(bound)
    check_tolerance(tolerance)
    if not isinstance(largest, int | np.integer) or largest < 1:
        raise ValueError(f"`largest` is {largest!r}; it needs to be a whole number of steps, at least 1.")
    if largest < fading.lengths[0]:
        raise ValueError(
            f"`largest` is {largest}, and no window was measured shorter than {fading.lengths[0]}: allow that, or give `decay` shorter `lengths`."
        )
    depths = np.zeros_like(fading.lengths) if fading.depths is None else fading.depths
    most, deepest = (largest if fading.depths is None else int(fading.lengths[-1])), int(depths[-1])
    if fading.rate >= 1:
        reason = (
            f"The gradient does not fade: from one lag to the next it changes by a factor of {fading.rate:.4f}. No window "
            f"is safe; {_named(most, deepest)} is the largest allowed."
        )
        return Suggestion(most, largest, float("inf"), False, reason, deepest)

    lags, allowed = len(fading.norms), fading.lengths <= largest
    left_out, kept, of_windows, whole = (
        _by_norms(fading, depths, largest) if bound == "norms" else _by_gradients(fading, largest)
    )
    horizon, there = _first_below(left_out[1:], np.maximum.accumulate(kept[1:] - left_out[1:]), tolerance)
    index, delta = _first_below(of_windows[allowed], np.full(allowed.sum(), whole), tolerance)
    window, depth = (int(tried[allowed][index - 1]) for tried in (fading.lengths, depths))
    rests = (
        f"if gradients by the carry fade by {fading.rate:.4f} a lag beyond lag {lags} too"
        if fading.rest
        else "which is all there is"
    )
    if bound == "norms":
        rests = f"as if ∂h/∂θ were as large at every step, {rests}"
    elif fading.rest:
        rests += ", and those by the parameters with them"
    fits = f"β̂ is {fading.rate:.4f}; every loss should see {horizon} steps back."
    if delta < tolerance:
        reason = f"Windows of {_named(window, depth)} have a relative bias of at most {delta:.2g} on these losses, {rests}. {fits}"
        return Suggestion(window, horizon, delta, True, reason, depth, there)
    reason = (
        f"No window up to {_named(most, deepest)} is known to keep the relative bias below {tolerance:g}; for "
        f"{_named(window, depth)} the bound is {delta:.2g}. {fits}"
    )
    return Suggestion(most, horizon, delta, False, reason, deepest, there)


def check_bound(bound: str) -> None:
    """Raises a ``ValueError`` if there is no such bound."""
    if bound not in BOUNDS:
        raise ValueError(f"`bound` is {bound!r}; it needs to be {' or '.join(map(repr, BOUNDS))}.")


def _by_gradients(fading: Decay, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """E(K) and ‖ĝ_K‖ for K = 0 … largest, what the windows leave out, and the least that the whole gradient is: by the parameters."""
    left_out, kept = _further(fading, fading.left_out, fading.kept, fading.beyond, largest)
    return left_out, kept, fading.windows + fading.beyond, fading.whole - fading.beyond


def _by_norms(fading: Decay, depths: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The same, by the carry. Of a window's steps the first sees what depths before it have, and each one step more."""
    tails = np.append(fading.norms[::-1].cumsum()[::-1], 0.0)
    ends = fading.lengths * (depths + 1)
    left_out, kept = _further(
        fading, tails, np.append(0.0, fading.sums), fading.rest, max(largest, ends[-1], len(tails) - 1)
    )
    means = [left_out[end - n : end].mean() for n, end in zip(fading.lengths, ends, strict=True)]
    return left_out[: largest + 1], kept[: largest + 1], np.array(means), np.max(kept - left_out)


def _further(
    fading: Decay, left_out: np.ndarray, kept: np.ndarray, beyond: float, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """What is left out and kept up to lag ``last``, as φ goes on to fade beyond those that were seen."""
    lag, seen = np.arange(last + 1), len(fading.norms)
    rest = beyond * fading.rate ** np.maximum(lag - seen, 0)
    return np.where(lag > seen, 0, left_out[np.minimum(lag, seen)]) + rest, kept[np.minimum(lag, seen)]


def _named(window: int, depth: int) -> str:
    return f"{window} with replay({depth})" if depth else str(window)


def _first_below(left_out: np.ndarray, at_least: np.ndarray, tolerance: float) -> tuple[int, float]:
    """The first length, from 1 on, from which on δ = left_out / at_least is below the tolerance, else the last; and its δ."""
    delta = np.where(at_least > 0, left_out / np.where(at_least > 0, at_least, 1), np.inf)
    delta = np.where(left_out == 0, 0.0, delta)  # nothing is left out, also where there is no past at all
    above = np.flatnonzero(delta >= tolerance)
    index = min(above[-1] + 1 if len(above) else 0, len(delta) - 1)
    return int(index) + 1, float(delta[index])
