"""Remember the first bit: the task of P. Remy, *Stateful LSTM in Keras* (2016)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.cutting import sequences
from tbptt_jax.window import Window


class Floor(NamedTuple):
    """The best that can be reached.

    Attributes:
      accuracy: the share of windows judged right, from 0 to 1.
      loss: cross-entropy, in nats a scored step.
    """

    accuracy: float
    loss: float


def first_bit(key: jax.Array, n: int, length: int = 20) -> Window:
    """Sequences of zeros of which exactly half begin with a one; the label is that first value.

    Args:
      key: draws which half.
      n: number of sequences, even.
      length: steps in each.

    Returns:
      A window with inputs and targets ``[n, length, 1]`` float32; the target is the label at every step.

    Raises:
      ValueError: if n is odd or not positive, or the length is not positive.

    Reference: P. Remy 2016, *Stateful LSTM in Keras*, there with 20 steps.
    """
    if n < 2 or n % 2:
        raise ValueError(f"{n} sequences cannot be balanced: `n` needs to be even and at least 2.")
    if length < 1:
        raise ValueError(f"`length` is {length}; a sequence needs at least 1 step.")
    label = jax.random.permutation(key, jnp.arange(n) % 2).astype(jnp.float32)[:, None, None]
    inputs = jnp.zeros((n, length, 1)).at[:, :1].set(label)
    return sequences(inputs, jnp.broadcast_to(label, (n, length, 1)))


def score_last(windows: Window) -> Window:
    """One answer a window, as the study asks: the weight is 1 at each window's last valid step, and 0 elsewhere.

    Args:
      windows: ``[windows, lanes, time, ...]``, as ``split`` and ``slide`` cut them; also shorter windows at a sequence's end.

    Returns:
      The windows with weights ``[windows, lanes, time]`` float32; a row that is all padding has none.

    Reference: P. Remy 2016, *Stateful LSTM in Keras*.
    """
    valid = jnp.ones(windows.inputs.shape[:3], bool) if windows.valid is None else jnp.asarray(windows.valid)
    from_here = jnp.cumsum(valid[..., ::-1], -1)[..., ::-1]  # valid steps from each on
    return windows._replace(weights=(valid & (from_here == 1)).astype(jnp.float32))


def first_bit_floor(windows: int) -> Floor:
    """The Bayes optimum where a sequence gives ``windows`` windows, each judged alone, and one of them holds the bit.

    The optimum knows the label if the window shows a one. Of the windows of zeros, n - 1 in 2n - 1 come from a sequence
    that began with a one, so that is the probability to state for them, with n the number of windows:

        accuracy = (n + 1) / 2n,    loss = [(n - 1) ln((2n - 1) / (n - 1)) + n ln((2n - 1) / n)] / 2n.

    Contiguous windows of k of 20 steps: n = 20 / k. Sliding ones with stride 1: n = 21 - k. A carried state: n = 1.

    Args:
      windows: how many windows a sequence gives, at least 1.

    Returns:
      Accuracy, and loss in nats.

    Raises:
      ValueError: if ``windows`` is below 1.
    """
    n = windows
    if n < 1:
        raise ValueError(f"`windows` is {n}; a sequence gives at least 1.")
    unseen = (n - 1) * np.log((2 * n - 1) / (n - 1)) if n > 1 else 0.0
    return Floor((n + 1) / (2 * n), float(unseen + n * np.log((2 * n - 1) / n)) / (2 * n))
