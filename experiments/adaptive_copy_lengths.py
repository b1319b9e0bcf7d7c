"""How far each loss is to see back: by the bound of Aicher, Foti & Fox (2019) on the bias of a truncation, or by the library's."""

from collections.abc import Sequence
from typing import Any

import tbptt_jax as tb
from tbptt_jax import study


def chosen(bound: str, tolerance: float, lengths: Sequence[int], every: int) -> study.Lengths:
    """Windows of K, the first of the lengths as far back as every loss is to see.

    All are padded to the longest, so that :func:`tbptt_jax.replay` finds the one before as it was.
    """
    longest = lengths[-1]
    far = 4 * longest
    # Of each lane the last loss, as the authors do it, or all of the second half.
    how: dict[str, Any] = (
        {"lags": far, "burn_in": far - 1} if bound == "norms" else {"lags": far // 2, "burn_in": far // 2, "probes": 16}
    )

    def choose(model: Any, loss: Any, params: Any, window: tb.Window, carry: Any) -> tb.horizon.Suggestion:
        window = window._replace(resets=None)  # where the stream begins again too, gradients are to be seen fading
        fading = tb.horizon.decay(model, loss, params, window, carry=carry, lengths=[longest], **how)
        found = tb.horizon.suggest(fading, tolerance=tolerance, largest=longest, bound=bound)
        K = next((K for K in lengths if found.horizon <= K), longest)
        return found._replace(window=K, relative_bias=found.horizon_bias, safe=found.horizon_bias < tolerance)

    def next_span(place: study.Place) -> study.Span:
        return study.Span(place.choice.window if place.choice else longest, longest)

    settings = {"bound": bound, "tolerance": tolerance, "lengths": list(lengths), "every": every}
    return study.Lengths(next_span, (longest,), settings, study.Look(every, far, choose))
