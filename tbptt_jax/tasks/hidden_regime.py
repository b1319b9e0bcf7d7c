"""A hidden regime: symbols whose frequencies change at times that nobody is told, a hidden Markov model with an exact filter."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tbptt_jax.arrays import check_whole
from tbptt_jax.cutting import sequences
from tbptt_jax.window import Window


def hidden_regime(
    key: jax.Array, lanes: int, length: int, symbols: int = 4, signal: float = 0.15, lasts: float = 2000
) -> Window:
    """Symbols to be predicted, one of which a regime that is not seen makes a little more frequent than the others.

    There are as many regimes as symbols, all equally likely at first. At each step a symbol is the regime's own with
    probability ``signal``, else any; then, with probability 1 / ``lasts``, the regime is drawn anew. A few hundred steps tell
    the regime, and who goes on adding up what they said has it wrong once it has changed.

    Args:
      key: draws regimes and symbols.
      lanes: number of streams.
      length: steps in each.
      symbols: how many symbols, and regimes, there are.
      signal: above 0, and below 1.
      lasts: steps until a regime is drawn anew, in the mean; at least 1.

    Returns:
      A window with inputs, and targets, which are the next step's, ``[lanes, length]`` int32.

    Raises:
      ValueError: if a number is not as described.

    Reference: Rabiner 1989, *A tutorial on hidden Markov models*, section II.
    """
    _check(symbols, signal, lasts)
    check_whole("lanes", lanes)
    check_whole("length", length)
    keys, shape = jax.random.split(key, 4), (lanes, length + 1)
    anew = jax.random.bernoulli(keys[0], 1 / lasts, shape)
    drawn = jax.random.randint(keys[1], shape, 0, symbols)
    since = lax.cummax(jnp.where(anew, jnp.arange(length + 1), 0), 1)
    regime = jnp.take_along_axis(drawn, since, 1)
    own = jax.random.bernoulli(keys[2], signal, shape)
    seen = jnp.where(own, regime, jax.random.randint(keys[3], shape, 0, symbols))
    return sequences(seen[:, :-1], seen[:, 1:])


def hidden_regime_floor(window: Window, symbols: int = 4, signal: float = 0.15, lasts: float = 2000) -> jax.Array:
    """The surprise of who knows the source and has seen all inputs since the first: Bayes' filter.

    With b the probabilities of the regimes, e(s) those of a symbol s in each, and x the inputs,

        b ← b ∘ e(x) / Σ b ∘ e(x),    b ← (1 − 1/lasts) b + 1 / (lasts · symbols),    −log Σ b ∘ e(target).

    Its mean is the least cross-entropy there is at each step. A stateless window's step i has that of step i.

    Args:
      window: as :func:`hidden_regime` makes it, or steps of it that begin anywhere: all steps are alike.
      symbols: as for :func:`hidden_regime`.
      signal: likewise.
      lasts: likewise.

    Returns:
      Nats, ``[lanes, length]``.

    Raises:
      ValueError: if a number is not as described.

    Reference: Rabiner 1989, *A tutorial on hidden Markov models*, equations 19 to 21.
    """
    _check(symbols, signal, lasts)
    seen_in = signal * jnp.eye(symbols) + (1 - signal) / symbols  # [symbol, regime]

    def step(b: jax.Array, at_t: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        b = b * seen_in[at_t[0]]
        b = (1 - 1 / lasts) * b / b.sum(-1, keepdims=True) + 1 / (lasts * symbols)
        return b, -jnp.log((b * seen_in[at_t[1]]).sum(-1))

    uniform = jnp.full((len(window.inputs), symbols), 1 / symbols)
    return lax.scan(step, uniform, (window.inputs.T, window.targets.T))[1].T


def _check(symbols: int, signal: float, lasts: float) -> None:
    check_whole("symbols", symbols)
    if not 0 < signal < 1 or not np.isfinite(lasts) or lasts < 1:
        raise ValueError(
            f"`signal` is {signal} and `lasts` {lasts}; they need to be a probability between 0 and 1 and a number of steps from 1."
        )
