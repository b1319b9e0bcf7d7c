"""Rollouts: steps of an environment as windows, with a reset where an episode begins.

    acting = tb.rollout(model, environment, act)
    live = acting.init(key, params, lanes)
    stored = live.carry                                        # at the left edge of the window that comes
    live, window = acting.update(params, live, key, steps)     # [lanes, steps]

The carry goes on from window to window, so that an agent knows of what lies further back than its windows are long. Whoever
trains on the window, now or later, reads it from the carry that was stored: ``stream._replace(carry=stored)``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree, check_whole
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.streaming import streaming
from tbptt_jax.window import Window


class Environment(Protocol):
    """A world to act in, as pure functions of one lane, such as :func:`tbptt_jax.tasks.t_maze` makes."""

    @property
    def reset(self) -> Callable[[jax.Array], tuple[PyTree, PyTree]]:
        """``key -> (state, observation)``: a new episode."""

    @property
    def step(self) -> Callable[[jax.Array, PyTree, Any], tuple[PyTree, PyTree, jax.Array, jax.Array]]:
        """``(key, state, action) -> (state, observation, reward, done)``. Where ``done`` is True the episode has ended with this
        reward, and state and observation are the first of the next one."""


class Live(NamedTuple):
    """Where all lanes are.

    Attributes:
      state: the environment's, every leaf ``[lanes, ...]``.
      observation: pytree of arrays ``[lanes, ...]``, not yet read by the model.
      begins: ``[lanes]`` bool, whether that is the first of an episode.
      carry: the model's, every leaf ``[lanes, ...]``, before it reads the observation.
    """

    state: PyTree
    observation: PyTree
    begins: jax.Array
    carry: PyTree


class Steps(NamedTuple):
    """What came of the steps of a window, its ``targets``.

    Attributes:
      action: ``[lanes, time, ...]``, as ``act`` chose it.
      outputs: the model's, ``[lanes, time, ...]``, with the parameters of then.
      reward: ``[lanes, time]``.
      done: ``[lanes, time]`` bool, whether the episode ended with this step.
    """

    action: PyTree
    outputs: PyTree
    reward: jax.Array
    done: jax.Array


class Rollout(NamedTuple):
    """Attributes:
    init: ``(key, params, lanes) -> live``: every lane at the beginning of an episode.
    update: ``(params, live, key, steps) -> (live, window)``: all lanes ``steps`` steps on. The window ``[lanes, steps]`` has
      the observations as inputs, :class:`Steps` as targets, and a reset where an episode begins; it is read from the
      carry of the ``live`` that was given.
    """

    init: Callable[[jax.Array, PyTree, int], Live]
    update: Callable[[PyTree, Live, jax.Array, int], tuple[Live, Window]]


def rollout(model: Recurrence, environment: Environment, act: Callable[[jax.Array, PyTree], PyTree]) -> Rollout:
    """Lets a model act in an environment, in many lanes side by side, and makes windows of what it sees.

    Args:
      model: the recurrence; its inputs are the observations ``[lanes, time, ...]``.
      environment: of one lane.
      act: ``(key, outputs [lanes, ...]) -> actions [lanes, ...]``.

    Returns:
      Its ``init`` and ``update``, which run under ``jit``, ``vmap`` and ``lax.scan``.

    Raises:
      ValueError: from ``init``, if ``lanes`` is not a whole number from 1, or ``step`` does not return the state and observation of
        ``reset``, with a bool; from ``update``, if ``steps`` is not a whole number from 1; and what the model raises.
    """

    def one_step(params: PyTree, live: Live, key: jax.Array) -> tuple[Live, Window]:
        act_key, key = jax.random.split(key)
        carry, outputs = streaming(model, params)(live.carry, live.observation, live.begins)
        action = act(act_key, outputs)
        keys = jax.random.split(key, len(live.begins))
        state, observation, reward, done = jax.vmap(environment.step)(keys, live.state, action)
        seen = Window(live.observation, Steps(action, outputs, reward, done), resets=live.begins)
        return Live(state, observation, done, carry), seen

    def init(key: jax.Array, params: PyTree, lanes: int) -> Live:
        check_whole("lanes", lanes)
        state, observation = jax.vmap(environment.reset)(jax.random.split(key, lanes))
        live = Live(state, observation, jnp.ones(lanes, bool), model.initial_carry(params, lanes))
        after, _ = jax.eval_shape(one_step, params, live, key)
        reset, step = (
            jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", each._replace(carry=())) for each in (live, after)
        )
        if step != reset:
            raise ValueError(
                f"With {lanes} lanes `reset` begins with {reset}, and after `step` there is {step}: state and observation need to "
                "keep their tree, shapes and dtypes, and `done`, which becomes `begins`, to be a bool of shape []."
            )
        return live

    def update(params: PyTree, live: Live, key: jax.Array, steps: int) -> tuple[Live, Window]:
        check_whole("steps", steps)
        keys = jax.random.split(key, steps)
        live, window = lax.scan(lambda live, key: one_step(params, live, key), live, keys)
        return live, jax.tree.map(lambda x: x.swapaxes(0, 1), window)

    return Rollout(init, update)
