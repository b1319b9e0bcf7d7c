"""A long influence against a short one: the system of Tallec & Ollivier, *Unbiased online recurrent optimization* (2017)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.cutting import sequences
from tbptt_jax.recurrence import Recurrence, from_step
from tbptt_jax.window import Window

PyTree = Any


def influence_balancing(length: int) -> Window:
    """A stream in which nothing comes in and a one is asked for at every step.

    The loss is ``(outputs - targets)**2 / 2`` on :func:`influence_balancing_model`; its floor is 0, at
    :func:`influence_balancing_optimum`. Nothing in it is random.

    Args:
      length: steps in the stream.

    Returns:
      A window of one lane with inputs (zeros) and targets (ones) ``[1, length]``.

    Raises:
      ValueError: if the length is not positive.

    Reference: Tallec & Ollivier 2017, *Unbiased online recurrent optimization*, influence balancing.
    """
    if length < 1:
        raise ValueError(f"`length` is {length}; a stream needs at least 1 step.")
    return sequences(jnp.zeros((1, length)), jnp.ones((1, length)))


def influence_balancing_model(n: int = 23, positive: int = 10, theta: float = 0.5) -> Recurrence:
    """The linear system s⁺ = A s + θ v with A_ii = A_i,i+1 = ½, of which the first unit s_1 is the output.

    θ reaches s_1 soon through the v = +1 of the first units and late through the v = -1 of the others, which outweigh
    them: a gradient that looks back too few steps points the wrong way, and θ runs off. With 23 units, 10 of them
    positive, and the state settled at θ = ½, windows of k steps give the wrong sign for k ≤ 40 if the loss is at their
    last step, and for k ≤ 109 if it is at every step.

    Args:
      n: number of units, at least 1.
      positive: how many of the first units have v = +1, from 0 to n; for the rest v = -1.
      theta: the initial θ.

    Returns:
      A recurrence with params ``{"theta": []}``, carry ``[lanes, n]``, initially ones, and outputs ``[lanes, time]``.

    Raises:
      ValueError: if n or ``positive`` is not as described.

    Reference: Tallec & Ollivier 2017, *Unbiased online recurrent optimization*, influence balancing.
    """
    v = _signs(n, positive)

    def step(params: PyTree, s: jax.Array, x: PyTree) -> tuple[jax.Array, jax.Array]:
        del x
        s = (s + jnp.pad(s[:, 1:], ((0, 0), (0, 1)))) / 2 + params["theta"] * v.astype(s.dtype)
        return s, s[:, 0]

    return from_step(
        step, lambda key, inputs: {"theta": jnp.asarray(theta, float)}, lambda _, lanes: jnp.ones((lanes, n))
    )


def influence_balancing_optimum(n: int = 23, positive: int = 10) -> float:
    """The θ at which s_1 settles at 1: the settled s_1 is θ·Σ 2v (each s_i = s_i+1 + 2θv_i), so θ* = 1 / Σ 2v.

    For 10 positive units of 23 it is -1/6, since ds_1/dθ settles at -6.

    Args:
      n: number of units, at least 1.
      positive: how many of the first units have v = +1, from 0 to n.

    Returns:
      θ*, of the system of :func:`influence_balancing_model`.

    Raises:
      ValueError: if n or ``positive`` is not as described, or half of the units are positive: Σ 2v is then 0.
    """
    total = 2 * int(_signs(n, positive).sum())
    if not total:
        raise ValueError(
            f"With {positive} positive units of {n} θ has no influence in the end: choose another balance."
        )
    return 1 / total


def _signs(n: int, positive: int) -> np.ndarray:
    if not 0 <= positive <= n or n < 1:
        raise ValueError(f"{positive} of {n} units cannot be positive: choose from 0 to `n`, and `n` at least 1.")
    return np.where(np.arange(n) < positive, 1, -1)
