"""Copy without end: words that are shown and said again at once, in a stream, the synthetic task of Aicher, Foti & Fox (2019)."""

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import check_whole
from tbptt_jax.cutting import sequences
from tbptt_jax.window import Window


def copy_stream(
    key: jax.Array, lanes: int, length: int, symbols: int = 4, shortest: int = 10, longest: int = 10
) -> Window:
    """Words of 10 steps, each followed by a silence of as many in which it is to be said again; then comes the next one.

    A word begins with its own mark, and the rest of it are symbols, all equally likely::

        inputs   1 2 5 3 0 0 0 0 1 4 4 0 0 0
        targets  0 0 0 0 1 2 5 3 0 0 0 1 4 4

    Each step is asked for as many steps later as its word is long, and a model that has them all predicts without loss. A stream
    begins anywhere in a word or its silence.

    Args:
      key: draws the symbols, the lengths of words and where the streams begin.
      lanes: number of streams.
      length: steps in each.
      symbols: how many there are, numbered from 2 on. 0 is the silence and 1 the mark.
      shortest: steps of a word; each word's length is drawn from ``shortest`` to ``longest``, all equally likely.
      longest: likewise.

    Returns:
      A window with inputs one-hot ``[lanes, length, symbols + 2]`` and targets ``[lanes, length]`` int32.

    Raises:
      ValueError: if a number is not a positive whole one, or ``longest`` is below ``shortest``.

    Reference: Aicher, Foti & Fox 2019, *Adaptively truncating backpropagation through time to control gradient bias*, section 5.1:
    words of 10 steps, and of 5 to 10.
    """
    _check(shortest, longest, lanes=lanes, length=length, symbols=symbols)
    words, keys = length // (2 * shortest) + 3, jax.random.split(key, 3)
    sizes = jax.random.randint(keys[0], (lanes, words), shortest, longest + 1)
    shown = jax.random.randint(keys[1], (lanes, words, longest), 2, symbols + 2, jnp.int32).at[:, :, 0].set(1)
    ends = jnp.cumsum(2 * sizes, 1)
    at = jnp.arange(length) + jax.random.randint(keys[2], (lanes, 1), 0, 2 * sizes[:, :1])
    word = jax.vmap(lambda ends, at: jnp.searchsorted(ends, at, side="right"))(ends, at)
    size = jnp.take_along_axis(sizes, word, 1)
    place = at - jnp.take_along_axis(ends, word, 1) + 2 * size  # in the word, or in its silence

    def said(place: jax.Array) -> jax.Array:
        symbol = shown[jnp.arange(lanes)[:, None], word, jnp.clip(place, 0, longest - 1)]
        return jnp.where((place >= 0) & (place < size), symbol, 0)

    return sequences(jax.nn.one_hot(said(place), symbols + 2), said(place - size))


def copy_stream_floor(symbols: int = 4, shortest: int = 10, longest: int = 10) -> float:
    """The cross-entropy, in nats a step, of who knows the place in the word, and nothing of what was shown.

    Of 2·n steps of a word of n, the n − 1 in which its symbols are due cost log(symbols) each: (n − 1) / 2n · log(symbols), with
    n the mean length.

    Args:
      symbols: as for :func:`copy_stream`.
      shortest: likewise.
      longest: likewise.

    Raises:
      ValueError: as :func:`copy_stream`.
    """
    _check(shortest, longest, symbols=symbols)
    mean = (shortest + longest) / 2
    return (mean - 1) / (2 * mean) * float(jnp.log(symbols))


def _check(shortest: int, longest: int, **counts: int) -> None:
    for name, count in {"shortest": shortest, "longest": longest, **counts}.items():
        check_whole(name, count)
    if longest < shortest:
        raise ValueError(
            f"`longest` is {longest} and `shortest` {shortest}: words cannot be drawn from there to there."
        )
