"""The T-maze of B. Bakker, *Reinforcement learning with long short-term memory* (2002): a cue at the start says where to turn."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NORTH, EAST, SOUTH, WEST = range(4)
ACTIONS = 4
RIGHT, WRONG = 4.0, -0.1  # rewards


class Place(NamedTuple):
    """Attributes:
    position: int32, steps from the start; as many as the corridor has, at the junction.
    south: bool, whether the goal is in the south.
    """

    position: jax.Array
    south: jax.Array


class TMaze(NamedTuple):
    """The maze as pure functions of one lane; ``jax.vmap`` makes many.

    Attributes:
      reset: ``key -> (state, observation)``: a new episode.
      step: ``(key, state, action) -> (state, observation, reward, done)``. Where ``done`` is True the episode has ended with this
        reward, and state and observation are the first of a new one.
    """

    reset: Callable
    step: Callable


def t_maze(corridor: int) -> TMaze:
    """A corridor that ends in a junction; whether the goal lies north or south of it is seen at the start alone.

    The observation ``[3]`` is 011 at the start if the goal is in the north and 110 if it is in the south, 101 in the corridor and
    010 at the junction. Actions are 0 north, 1 east, 2 south, 3 west. To turn at the junction ends the episode, with reward 4
    at the goal and -.1 at the other side. To run into a wall, and so to stand still, costs .1, and walking nothing.

    The best there is takes ``corridor + 1`` steps and has return 4. Without memory the goal is found half of the time at best.

    Args:
      corridor: steps from the start to the junction.

    Returns:
      Its ``reset`` and ``step``, as :func:`tbptt_jax.rollout` takes them.

    Raises:
      ValueError: if the corridor is below 1.

    Reference: Bakker 2002, section 4, there with corridors of up to 70 steps.
    """
    if corridor < 1:
        raise ValueError(f"`corridor` is {corridor}; the junction needs to be at least 1 step from the start.")

    def observe(place: Place) -> jax.Array:
        cue = jnp.where(place.south, jnp.array([1, 1, 0]), jnp.array([0, 1, 1]))
        beyond = jnp.where(place.position < corridor, jnp.array([1, 0, 1]), jnp.array([0, 1, 0]))
        return jnp.where(place.position == 0, cue, beyond).astype(jnp.float32)

    def reset(key: jax.Array) -> tuple[Place, jax.Array]:
        place = Place(jnp.int32(0), jax.random.bernoulli(key))
        return place, observe(place)

    def step(key: jax.Array, place: Place, action: jax.Array) -> tuple[Place, jax.Array, jax.Array, jax.Array]:
        turns = (action == NORTH) | (action == SOUTH)
        done = turns & (place.position == corridor)
        walked = jnp.clip(place.position + (action == EAST) - (action == WEST), 0, corridor)
        stands = (walked == place.position) & ~done
        right = done & ((action == SOUTH) == place.south)
        reward = jnp.where(right, RIGHT, jnp.where(done | stands, WRONG, 0.0))
        begun, _ = reset(key)
        place = Place(jnp.where(done, begun.position, walked), jnp.where(done, begun.south, place.south))
        return place, observe(place), reward, done

    return TMaze(reset, step)
