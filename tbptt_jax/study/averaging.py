"""Averaged parameters: what is judged and kept is a mean over the updates, whose noise is less than the last one's.

An optimiser with an average in its state, so that checkpoints, devices and windows that are left out need nothing more.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tbptt_jax.training import TrainState, as_transformation


class Averaging(NamedTuple):
    """Attributes:
    decay: of an exponential moving average. None: the plain mean.
    nonmonotone: the mean begins when a look at the validation data is worse than the best but so many. None: at once.
    """

    decay: float | None = None
    nonmonotone: int | None = None


def ema(decay: float = 0.999) -> Averaging:
    """The exponential moving average ``mean ← d·mean + (1 - d)·params``, d at most ``decay`` and ``(1 + n) / (10 + n)`` after n updates.

    Raises:
      ValueError: if ``decay`` is not between 0 and 1.

    Reference: Polyak and Juditsky 1992, *Acceleration of stochastic approximation by averaging*; the rule for the first
    updates is TensorFlow's.
    """
    if not 0 < decay < 1:
        raise ValueError(f"`decay` is {decay}; it needs to be between 0 and 1, such as 0.999.")
    return Averaging(decay=decay)


def asgd(nonmonotone: int = 5) -> Averaging:
    """The plain mean of the parameters, from the look on that is worse than the best one before the last ``nonmonotone``.

    It needs validation data, since a look at it is what begins it.

    Raises:
      ValueError: if ``nonmonotone`` is not a whole number from 0.

    Reference: Merity, Keskar and Socher 2018, *Regularizing and optimizing LSTM language models* (AWD-LSTM), algorithm 1.
    """
    if isinstance(nonmonotone, bool) or not isinstance(nonmonotone, int) or nonmonotone < 0:
        raise ValueError(f"`nonmonotone` is {nonmonotone!r}; it needs to be a whole number from 0, such as 5.")
    return Averaging(nonmonotone=nonmonotone)


class Average(NamedTuple):
    """An optimiser's state, with the average."""

    optimiser: Any  # its own
    on: jax.Array  # bool: whether averaging has begun; until then the mean is the parameters
    updates: jax.Array  # int32: how many are averaged
    mean: Any  # in the tree of the parameters


def averaged(optimiser: Any, averaging: Averaging) -> optax.GradientTransformationExtraArgs:
    """The same optimiser, with the average of what it makes of the parameters in its state."""
    inner = as_transformation(optimiser)

    def init(params: Any) -> Average:
        on = jnp.array(averaging.nonmonotone is None)
        return Average(inner.init(params), on, jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(grads: Any, state: Average, params: Any = None, **extra: Any) -> tuple[Any, Average]:
        updates, optimiser_state = inner.update(grads, state.optimiser, params, **extra)
        count = jnp.where(state.on, state.updates + 1, 0)
        if averaging.decay is None:
            share = 1 / jnp.maximum(count, 1)
        else:
            share = 1 - jnp.minimum(averaging.decay, (1 + state.updates) / (10 + state.updates))

        def follow(mean: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(state.on, mean + share.astype(mean.real.dtype) * (new - mean), new)

        mean = jax.tree.map(follow, state.mean, optax.apply_updates(params, updates))
        return updates, Average(optimiser_state, state.on, count, mean)

    return optax.GradientTransformationExtraArgs(init, update)


def params_of(state: TrainState) -> Any:
    """The averaged parameters, or the parameters where nothing is averaged."""
    return state.optimiser.mean if isinstance(state.optimiser, Average) else state.params


def begun(state: TrainState) -> TrainState:
    """The same state, averaging from here on if it does not yet."""
    if not isinstance(state.optimiser, Average):
        return state
    on = jax.tree.map(jnp.ones_like, state.optimiser.on)  # placed as it was
    return state._replace(optimiser=state.optimiser._replace(on=on))
