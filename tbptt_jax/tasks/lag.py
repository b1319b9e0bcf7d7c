"""Two lags: the coin that depends on what was 3 and 8 steps ago, of S. Pitis, *Recurrent neural networks in Tensorflow* (2016)."""

import math

import jax
import jax.numpy as jnp

from tbptt_jax.cutting import sequences
from tbptt_jax.window import Window

SHORT, LONG = 3, 8


def lag(key: jax.Array, lanes: int, length: int) -> Window:
    """Coins X, and coins Y of which X three and eight steps ago say how they are loaded:

        P(X_t = 1) = 1/2,    P(Y_t = 1) = 1/2 + X_{t-3}/2 - X_{t-8}/4.

    What X was before the stream began is drawn too and not shown, so that all steps are alike.

    Args:
      key: draws both.
      lanes: number of streams.
      length: steps in each.

    Returns:
      A window with inputs X and targets Y, each ``[lanes, length, 1]`` float32, 0 or 1.

    Raises:
      ValueError: if a number is not positive.

    Reference: S. Pitis 2016, *Recurrent neural networks in Tensorflow*.
    """
    if lanes < 1 or length < 1:
        raise ValueError(f"{lanes} streams of {length} steps: at least 1 of each is needed.")
    x_key, y_key = jax.random.split(key)
    x = jax.random.bernoulli(x_key, 0.5, (lanes, LONG + length, 1)).astype(jnp.float32)
    p = 0.5 + 0.5 * x[:, LONG - SHORT : -SHORT] - 0.25 * x[:, :-LONG]
    y = jax.random.bernoulli(y_key, p).astype(jnp.float32)
    return sequences(x[:, LONG:], y)


def lag_floor(window: int | None = None) -> float:
    """The least cross-entropy, in nats a step, of stateless windows; None: for who remembers all.

    A step knows the lags that reach no further back than its window begins. The entropy that is left is .66156 where
    it knows none, .51917 where the short one and .45445 where both: a window of K has the mean

        [min(K, 3)·.66156 + max(0, min(K, 8) - 3)·.51917 + max(0, K - 8)·.45445] / K.

    A *stateful* run with short windows may go below it: the carry holds what the gradient never saw.

    Args:
      window: steps in each window, at least 1; None: all is remembered.

    Raises:
      ValueError: if ``window`` is below 1.
    """
    nothing = _entropy(0.5 + 0.25 - 0.125)
    short = sum(_entropy(0.5 + x / 2 - 0.125) for x in (0, 1)) / 2
    both = sum(_entropy(0.5 + x / 2 - z / 4) for x in (0, 1) for z in (0, 1)) / 4
    if window is None:
        return both
    if window < 1:
        raise ValueError(f"`window` is {window}; a window has at least 1 step.")
    with_short, with_both = max(0, min(window, LONG) - SHORT), max(0, window - LONG)
    return (min(window, SHORT) * nothing + with_short * short + with_both * both) / window


def _entropy(p: float) -> float:
    """Of a coin, in nats."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q)
