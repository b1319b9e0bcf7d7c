"""Recurrent proximal policy optimisation: J. Schulman et al. 2017, *Proximal policy optimization algorithms*."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import tbptt_jax as tb
from experiments.agents import DISCOUNT, Agent, at_action, begun
from tbptt_jax.arrays import PyTree
from tbptt_jax.rollout import Environment, Live, Steps
from tbptt_jax.training import TrainState

EPOCHS = 4  # how often a window is read
SMOOTHING = 0.95  # λ of the advantages
CLIP, ENTROPY, VALUE = 0.2, 0.01, 0.5  # the bound of the ratio, the weights of the bonus and of the value's error


class State(NamedTuple):
    train: TrainState
    live: Live


class Targets(NamedTuple):
    """Each ``[lanes, time]``: the action taken, its log-probability then, its advantage, and the return to expect."""

    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    value: jax.Array


def ppo(
    model: tb.Recurrence,
    environment: Environment,
    optimiser: optax.GradientTransformation,
    lanes: int,
    window: int,
    influence: tb.Influence,
) -> Agent:
    """Actor and critic are one recurrence, whose outputs are a logit for each action and the value, ``[..., actions + 1]``.

    A window is read ``EPOCHS`` times, each time from the carry that the rollout had at its left edge, and with what the
    influence knows of how that came about. The next window goes on from the rollout's own carry.
    """

    def act(key: jax.Array, outputs: jax.Array) -> jax.Array:
        return jax.random.categorical(key, outputs[..., :-1])

    def loss(outputs: jax.Array, window: tb.Window) -> jax.Array:
        then, log_probs = window.targets, jax.nn.log_softmax(outputs[..., :-1])
        ratio = jnp.exp(at_action(log_probs, then.action) - then.log_prob)
        gain = jnp.minimum(ratio * then.advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * then.advantage)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        return -gain + VALUE * (outputs[..., -1] - then.value) ** 2 - ENTROPY * entropy

    acting = tb.rollout(model, environment, act)
    step = tb.train_step(tb.gradient(model, loss, influence=influence), optimiser)

    def experience(params: PyTree, live: Live, key: jax.Array) -> tuple[Live, Steps, tb.Window]:
        """A window of steps, and what is to be learned from it."""
        live, seen = acting.update(params, live, key, window)
        steps, log_probs = seen.targets, jax.nn.log_softmax(seen.targets.outputs[..., :-1])
        _, beyond = tb.streaming(model, params)(live.carry, live.observation, live.begins)
        advantage, value = advantages(steps, beyond[:, -1])
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        learn = Targets(steps.action, at_action(log_probs, steps.action), advantage, value)
        return live, steps, seen._replace(targets=learn)

    def init(key: jax.Array) -> State:
        keys = jax.random.split(key)
        _, _, like = experience(*begun(key, model, environment, acting, lanes), key)
        train = step.init(keys[0], like)
        return State(train, acting.init(keys[1], train.params, lanes))

    def update(state: State, key: jax.Array) -> tuple[State, Steps]:
        live, steps, learn = experience(state.train.params, state.live, key)
        stream = state.train.stream._replace(carry=state.live.carry)

        def epoch(train: TrainState, _: None) -> tuple[TrainState, None]:
            return step.update(train._replace(stream=stream), learn)[0], None

        return State(lax.scan(epoch, state.train, None, EPOCHS)[0], live), steps

    return Agent(init, update)


def advantages(steps: Steps, beyond: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Generalised advantages (Schulman et al. 2016, equation 16) and the returns they make of the values, ``[lanes, time]``.

    Args:
      steps: of a window; the last of the outputs is the value.
      beyond: ``[lanes]``, the value of the step after the window. None of it reaches back over the end of an episode.
    """
    value, goes_on = steps.outputs[..., -1], DISCOUNT * ~steps.done
    error = steps.reward + goes_on * jnp.c_[value[:, 1:], beyond] - value

    def back(later: jax.Array, at_t: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, goes_on = at_t
        advantage = error + SMOOTHING * goes_on * later
        return advantage, advantage

    _, advantage = lax.scan(back, jnp.zeros_like(beyond), (error.T, goes_on.T), reverse=True)
    return advantage.T, advantage.T + value
