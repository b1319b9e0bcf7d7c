"""What recurrent agents share: a training as two pure functions, and how it begins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import tbptt_jax as tb
from tbptt_jax.arrays import PyTree
from tbptt_jax.rollout import Environment, Live, Rollout, Steps

DISCOUNT = 0.98  # as Bakker 2002 has it


class Agent(NamedTuple):
    """Attributes:
    init: ``key -> state``; ``state.train.params`` are the model's parameters.
    update: ``(state, key) -> (state, steps)``: one window of experience ``[lanes, time]``, and what is learned from it.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[Any, jax.Array], tuple[Any, Steps]]


def begun(
    key: jax.Array, model: tb.Recurrence, environment: Environment, acting: Rollout, lanes: int
) -> tuple[PyTree, Live]:
    """Parameters, and where the lanes are: of both the shapes say what a training keeps."""
    _, observation = jax.vmap(environment.reset)(jax.random.split(key, lanes))
    params = model.init(key, jax.tree.map(lambda x: x[:, None], observation))
    return params, acting.init(key, params, lanes)


def chrono(model: tb.Recurrence, steps: int) -> tb.Recurrence:
    """An LSTM of one layer whose units keep what they hold for about 1 to ``steps`` steps at first; with 1 its biases stay zero.

    Reference: Tallec & Ollivier 2018, *Can recurrent neural networks warp time?*, here with times spread evenly.
    """

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        params = model.init(key, inputs)
        (cell,) = params["cell"]
        units = cell.bias.shape[0] // 4
        keeps = jnp.log(jnp.linspace(1, steps, units, dtype=cell.bias.dtype))
        bias = cell.bias.at[:units].add(-keeps).at[units : 2 * units].add(keeps)  # the input and the forget gates
        return {**params, "cell": (cell._replace(bias=bias),)}

    return model._replace(init=init)


def at_action(x: jax.Array, action: jax.Array) -> jax.Array:
    """Of ``x`` ``[lanes, time, actions]`` the number of the action that was taken, ``[lanes, time]``."""
    return jnp.take_along_axis(x, action[..., None], -1)[..., 0]
