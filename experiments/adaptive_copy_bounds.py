"""How far each loss is to see back: by the bound of Aicher, Foti & Fox (2019) on the bias of a truncation, or by the library's."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb
from tbptt_jax import study
from tbptt_jax.recurrence import unroll_window


@functools.partial(jax.jit, static_argnames=("model", "loss"))
def by_carry(model: Any, loss: Any, params: Any, window: tb.Window, carry: Any) -> tuple[jax.Array, jax.Array]:
    """Of the last step's loss: φ_k = E‖∂l_s/∂h_{s-k}‖, and ‖E Σ ∂l_s/∂h_{s-j}‖ over j ≤ k, for k = 1, 2, … ``[time]``, over the lanes."""
    along = jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], window)

    def last_loss(nudges: Any) -> jax.Array:
        def step(carry: Any, at_t: tuple) -> tuple[Any, jax.Array]:
            nudge, now = at_t
            carry, outputs = unroll_window(model, params, jax.tree.map(jnp.add, carry, nudge), now)
            return carry, loss(outputs, now).sum()

        return jax.lax.scan(step, carry, (nudges, along))[1][-1]

    time = len(along.targets)
    back = jax.grad(last_loss)(jax.tree.map(lambda h: jnp.zeros((time, *h.shape)), carry))
    lags = jnp.concatenate([x[::-1] for x in jax.tree.leaves(back)], -1)  # [lags, lanes, units]
    return jnp.linalg.norm(lags, axis=-1).mean(1), jnp.linalg.norm(jnp.cumsum(lags.mean(1), 0), axis=-1)


def by_norms(model: Any, loss: Any, params: Any, window: tb.Window, carry: Any) -> tuple[np.ndarray, np.ndarray]:
    """E(K) and ‖ĝ_K‖ for K = 1, 2, … as the paper has them: sums of norms, by the carry."""
    phi, kept = (np.asarray(x, np.float64) for x in by_carry(model, loss, params, window, carry))
    tail = np.arange(len(phi) // 2, len(phi))
    rate = np.exp(np.polyfit(tail, np.log(phi[tail] + 1e-30), 1)[0])
    beyond = phi[-1] * rate / (1 - rate) if rate < 1 else np.inf
    return phi.sum() - np.cumsum(phi) + beyond, kept


def by_gradients(model: Any, loss: Any, params: Any, window: tb.Window, carry: Any) -> tuple[np.ndarray, np.ndarray]:
    """E(K) and ‖ĝ_K‖ as the library has them: norms of sums, by the parameters."""
    half = window.targets.shape[1] // 2
    fading = tb.horizon.decay(
        model, loss, params, window, lags=half, carry=carry, burn_in=half, probes=16, lengths=[half]
    )
    return (fading.left_out + fading.beyond)[1:], fading.kept[1:]


BOUNDS = {"norms": by_norms, "gradients": by_gradients}


def chosen(bound: str, tolerance: float, lengths: Sequence[int], every: int) -> study.Lengths:
    """Windows of K, the first of the lengths with δ(K) = E(K) / max (‖ĝ_K'‖ − E(K')) over K' ≤ K below the tolerance.

    All are padded to the longest, so that :func:`tbptt_jax.replay` finds the one before as it was.
    """
    longest = lengths[-1]

    def choose(model: Any, loss: Any, params: Any, window: tb.Window, carry: Any) -> tb.horizon.Suggestion:
        window = window._replace(resets=None)  # where the stream begins again too, gradients are to be seen fading
        left_out, kept = BOUNDS[bound](model, loss, params, window, carry)
        at_least = np.maximum.accumulate(kept - left_out)
        delta = np.where(at_least > 0, left_out / np.where(at_least > 0, at_least, 1), np.inf)
        K = next((K for K in lengths if delta[K - 1] < tolerance), longest)
        found = float(delta[K - 1])
        return tb.horizon.Suggestion(K, K, found, found < tolerance, f"by the bound on {bound}")

    def next_span(place: study.Place) -> study.Span:
        return study.Span(place.choice.window if place.choice else longest, longest)

    settings = {"bound": bound, "tolerance": tolerance, "lengths": list(lengths), "every": every}
    return study.Lengths(next_span, (longest,), settings, study.Look(every, 4 * longest, choose))
