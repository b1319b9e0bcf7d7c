"""Add two numbers shown far apart: the adding problem of Hochreiter & Schmidhuber, *Long short-term memory* (1997)."""

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.cutting import sequences
from tbptt_jax.window import Window


def adding(key: jax.Array, n: int, length: int) -> Window:
    """Uniform numbers of which two are marked, one in each half; their sum is asked for at the last step.

    Args:
      key: draws the numbers, uniform in [0, 1), and the marks, uniform in each half.
      n: number of sequences.
      length: steps in each, at least 2; of an odd number the second half has one more.

    Returns:
      A window with inputs ``[n, length, 2]`` float32 (number, mark) and targets ``[n, length, 1]``, the sum at every
      step. Only the last is scored.

    Raises:
      ValueError: if n is not positive or the length is below 2.

    Reference: Hochreiter & Schmidhuber 1997, experiment 4; numbers and marks as in Arjovsky, Shah & Bengio 2016, *Unitary
    evolution recurrent neural networks*.
    """
    if n < 1:
        raise ValueError(f"`n` is {n}; at least 1 sequence is needed.")
    _check_length(length)
    half = length // 2
    keys = jax.random.split(key, 3)
    numbers = jax.random.uniform(keys[0], (n, length), jnp.float32)
    first = jax.random.randint(keys[1], (n, 1), 0, half)
    second = jax.random.randint(keys[2], (n, 1), half, length)
    steps = jnp.arange(length)
    marks = ((steps == first) | (steps == second)).astype(jnp.float32)
    total = jnp.sum(numbers * marks, 1)[:, None, None]
    weights = np.broadcast_to((np.arange(length) == length - 1).astype(np.float32), (n, length))
    window = sequences(jnp.stack([numbers, marks], -1), jnp.broadcast_to(total, (n, length, 1)))
    return window._replace(weights=weights)


def adding_floor(seen: int, length: int) -> float:
    """The least squared error for who sees only the last ``seen`` steps, ``(P(first unseen) + P(second unseen)) / 12``.

    Each number unseen costs the variance of a uniform number, 1/12, for the best to say is its mean. So predicting the
    mean has 1/6 (``seen=0``), and 0 is reached by seeing, or remembering, all. Contiguous stateless windows of k see at
    the end the steps of the last one, ``(length - 1) % k + 1``.

    Args:
      seen: how many of the last steps are seen, from 0 to ``length``.
      length: steps in each sequence, at least 2.

    Returns:
      The mean squared error of a sequence's sum.

    Raises:
      ValueError: if the length is below 2 or ``seen`` is not from 0 to it.
    """
    _check_length(length)
    if not 0 <= seen <= length:
        raise ValueError(f"`seen` is {seen}; of {length} steps from 0 to all can be seen.")
    half = length // 2
    second_unseen = max(0, length - half - seen) / (length - half)
    first_unseen = min(half, length - seen) / half
    return (first_unseen + second_unseen) / 12


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"`length` is {length}; two numbers to add need at least 2 steps.")
