"""Say it again, later: the copy task of Hochreiter & Schmidhuber (1997), as Arjovsky et al. (2016) pose it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.cutting import sequences
from tbptt_jax.window import Window


class Floor(NamedTuple):
    """The best cross-entropy that can be reached, in nats.

    Attributes:
      recalled: for a recalled symbol.
      overall: for a step, if all were scored.
    """

    recalled: float
    overall: float


def copy_memory(key: jax.Array, n: int, lag: int, symbols: int = 8, length: int = 10) -> Window:
    """Symbols to be repeated in their order after ``lag`` steps of silence, the last of which says "now".

    A sequence has ``length`` symbols, ``lag - 1`` blanks, a delimiter and ``length`` blanks more, ``lag + 2 * length``
    steps in all. Each symbol is asked for ``lag + length`` steps after it was shown. Only these last ``length`` steps
    are scored; at the others the target is the blank, for those who give them a weight.

    Args:
      key: draws the symbols, all equally likely.
      n: number of sequences.
      lag: steps from the last symbol to the delimiter, at least 1.
      symbols: how many symbols there are. The blank is number ``symbols``, the delimiter ``symbols + 1``.
      length: how many are to be remembered.

    Returns:
      A window with inputs one-hot ``[n, lag + 2 * length, symbols + 2]`` and targets ``[n, lag + 2 * length]`` int32.

    Raises:
      ValueError: if a number is not positive.

    Reference: Arjovsky, Shah & Bengio 2016, *Unitary evolution recurrent neural networks*, there with T = ``lag``.
    """
    _check(n=n, lag=lag, symbols=symbols, length=length)
    blank, delimiter, time = symbols, symbols + 1, lag + 2 * length
    shown = jax.random.randint(key, (n, length), 0, symbols, jnp.int32)
    silence = jnp.full((n, time), blank, jnp.int32)
    inputs = silence.at[:, :length].set(shown).at[:, length + lag - 1].set(delimiter)
    targets = silence.at[:, -length:].set(shown)
    weights = np.broadcast_to((np.arange(time) >= time - length).astype(np.float32), (n, time))
    return sequences(jax.nn.one_hot(inputs, symbols + 2), targets)._replace(weights=weights)


def copy_memory_floor(window: int, lag: int, symbols: int = 8, length: int = 10) -> Floor:
    """The Bayes optimum of contiguous windows that each begin with nothing known.

    A symbol and its recall, ``lag + length`` steps later, share a window only if it is the first one and longer than
    that: of ``length`` symbols it covers ``window - lag - length``. The others cost ``log(symbols)`` nats each, and
    where blanks are due nothing is lost. So a model without memory (``window=1``) has the floors

        log(symbols)   and   length * log(symbols) / (lag + 2 * length),

    and one that remembers (``window=lag + 2 * length``) has 0.

    Args:
      window: steps in each window, at least 1.
      lag: as for :func:`copy_memory`.
      symbols: likewise.
      length: likewise.

    Returns:
      Both floors, in nats.

    Raises:
      ValueError: if a number is not positive.

    Reference: Arjovsky, Shah & Bengio 2016, for the second of the floors without memory, 10 log 8 / (T + 20).
    """
    _check(window=window, lag=lag, symbols=symbols, length=length)
    covered = min(max(window - lag - length, 0), length)
    unseen = (length - covered) * float(np.log(symbols))
    return Floor(unseen / length, unseen / (lag + 2 * length))


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` is {count}; it needs to be at least 1.")
