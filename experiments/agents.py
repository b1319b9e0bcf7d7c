"""Recurrent PPO and R2D2 as pure functions, on windows that are read from the carry that was stored at their left edge."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import tbptt_jax as tb
from tbptt_jax.arrays import PyTree
from tbptt_jax.rollout import Environment, Live, Rollout, Steps
from tbptt_jax.training import TrainState

DISCOUNT = 0.98  # as Bakker 2002 has it
SMOOTHING, CLIP, ENTROPY, EPOCHS = (
    0.95,
    0.2,
    0.01,
    4,
)  # of PPO: GAE's λ, the ratio's bound, the bonus, reads of a window
CAPACITY, BATCHES, BATCH, N_STEPS, TARGET_RATE = (
    200,
    4,
    32,
    10,
    0.02,
)  # of R2D2; the capacity is in windows of all lanes
WARM_UP = 10  # windows before it learns


class Agent(NamedTuple):
    """Attributes:
    init: ``key -> state``.
    update: ``(state, key) -> (state, steps)``: one window of experience, and what is learned from it.
    """

    init: Callable[[jax.Array], "State"]
    update: Callable[["State", jax.Array], tuple["State", Steps]]


class Memory(NamedTuple):
    """What R2D2 keeps: the last windows ``[capacity, lanes, time, ...]``, window n at n modulo the capacity, the carries at
    their left edges, how many there were, and the target network's parameters."""

    windows: tb.Window
    carries: PyTree
    written: jax.Array
    target: PyTree


class State(NamedTuple):
    train: TrainState
    live: Live
    memory: Memory | None = None


class OfAction(NamedTuple):
    """What is learned from, each ``[lanes, time]``: an action, the return to expect, and for PPO its log-probability and
    advantage then."""

    action: jax.Array
    value: jax.Array
    log_prob: jax.Array | None = None
    advantage: jax.Array | None = None


def at_action(x: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, action[..., None], -1)[..., 0]


def ppo(
    model: tb.Recurrence,
    environment: Environment,
    optimiser: optax.GradientTransformation,
    lanes: int,
    window: int,
    influence: tb.Influence,
) -> Agent:
    """Proximal policy optimisation (Schulman et al. 2017), the policy's logits and the value as outputs of one recurrence.

    A window is read ``EPOCHS`` times, each time from the same carry and with what the influence knew of it. The next one goes
    on from the carry of the rollout.
    """

    def act(key: jax.Array, outputs: jax.Array) -> jax.Array:
        return jax.random.categorical(key, outputs[..., :-1])

    def loss(outputs: jax.Array, window: tb.Window) -> jax.Array:
        then, log_probs = window.targets, jax.nn.log_softmax(outputs[..., :-1])
        ratio = jnp.exp(at_action(log_probs, then.action) - then.log_prob)
        gain = jnp.minimum(ratio * then.advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * then.advantage)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        return -gain + 0.5 * (outputs[..., -1] - then.value) ** 2 - ENTROPY * entropy

    acting = tb.rollout(model, environment, act)
    step = tb.train_step(tb.gradient(model, loss, influence=influence), optimiser)

    def experience(params: PyTree, live: Live, key: jax.Array) -> tuple[Live, Steps, tb.Window]:
        """A window of steps, with generalised advantages (Schulman et al. 2016, equation 16)."""
        live, seen = acting.update(params, live, key, window)
        steps, value = seen.targets, seen.targets.outputs[..., -1]
        _, beyond = tb.streaming(model, params)(live.carry, live.observation, live.begins)
        goes_on = DISCOUNT * ~steps.done
        error = steps.reward + goes_on * jnp.c_[value[:, 1:], beyond[:, -1]] - value

        def back(later: jax.Array, at_t: tuple) -> tuple[jax.Array, jax.Array]:
            now = at_t[0] + SMOOTHING * at_t[1] * later
            return now, now

        advantage = lax.scan(back, jnp.zeros(lanes), (error.T, goes_on.T), reverse=True)[1].T
        normal = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        log_prob = at_action(jax.nn.log_softmax(steps.outputs[..., :-1]), steps.action)
        return live, steps, seen._replace(targets=OfAction(steps.action, advantage + value, log_prob, normal))

    def init(key: jax.Array) -> State:
        keys = jax.random.split(key)
        like = zeros(lambda: experience(*begun(key, acting, environment, model, lanes), key)[2])
        train = step.init(keys[0], like)
        return State(train, acting.init(keys[1], train.params, lanes))

    def update(state: State, key: jax.Array) -> tuple[State, Steps]:
        train, before, _ = state
        live, steps, learn = experience(train.params, before, key)
        stream = train.stream._replace(carry=before.carry)
        for _ in range(EPOCHS):
            train, _ = step.update(train._replace(stream=stream), learn)
        return State(train, live), steps

    return Agent(init, update)


def r2d2(
    model: tb.Recurrence, environment: Environment, optimiser: optax.GradientTransformation, lanes: int, window: int
) -> Agent:
    """Recurrent replay distributed DQN (Kapturowski et al. 2019): double Q-learning from sequences of two windows.

    The first is its burn-in, read from the carry that was stored with it. Lanes explore each at a rate of its own, as in
    Horgan et al. 2018. Sequences are drawn alike, without priorities, and values are not rescaled.
    """

    def act(key: jax.Array, q: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        explores = jax.random.bernoulli(keys[0], 0.4 ** (1 + 7 * jnp.arange(lanes) / max(1, lanes - 1)))
        return jnp.where(explores, jax.random.randint(keys[1], (lanes,), 0, q.shape[-1]), q.argmax(-1))

    def loss(q: jax.Array, window: tb.Window) -> jax.Array:
        return (at_action(q, window.targets.action) - window.targets.value) ** 2

    acting = tb.rollout(model, environment, act)
    step = tb.train_step(tb.gradient(model, loss), optimiser)

    def sequences(params: PyTree, memory: Memory, key: jax.Array) -> tuple[tb.Window, PyTree]:
        """Windows ``[batch, 2 * time]`` to learn from, and the carries that they are read from."""
        which, lane = jax.random.split(key)
        back = jax.random.randint(which, (BATCH, 1), 0, jnp.clip(memory.written - 1, 1, CAPACITY - 1))
        pair = (memory.written - 1 - back + jnp.arange(-1, 1)) % CAPACITY
        lane = jax.random.randint(lane, (BATCH, 1), 0, lanes)
        both = jax.tree.map(lambda x: x[pair, lane].reshape(BATCH, 2 * window, *x.shape[3:]), memory.windows)
        stored, steps = jax.tree.map(lambda h: h[pair[:, 0], lane[:, 0]], memory.carries), both.targets
        q, target = (model.unroll(p, stored, both.inputs, both.resets)[1] for p in (params, memory.target))
        value = at_action(target, q.argmax(-1))
        last = jnp.where(steps.done[:, -1:], steps.reward[:, -1:], value[:, -1:])
        returns = value
        for _ in range(N_STEPS):  # fewer at the right edge, where the last value is all that is known
            later = steps.reward[:, :-1] + DISCOUNT * ~steps.done[:, :-1] * returns[:, 1:]
            returns = jnp.c_[later, last]
        weights = jnp.ones(returns.shape).at[:, -1].set(steps.done[:, -1]) * (memory.written > WARM_UP)
        learn = both._replace(targets=OfAction(steps.action, returns), weights=weights)
        return tb.burn_in(learn, window), stored

    def empty(params: PyTree, live: Live) -> Memory:
        kept = zeros(lambda: (acting.update(params, live, jax.random.key(0), window)[1], live.carry))
        return Memory(*jax.tree.map(lambda x: jnp.zeros((CAPACITY, *x.shape), x.dtype), kept), jnp.int32(0), params)

    def init(key: jax.Array) -> State:
        keys = jax.random.split(key)
        params, live = zeros(lambda: begun(key, acting, environment, model, lanes))
        like = zeros(lambda: sequences(params, empty(params, live), key)[0])
        train = step.init(keys[0], like)
        live = acting.init(keys[1], train.params, lanes)
        return State(train, live, empty(train.params, live))

    def update(state: State, key: jax.Array) -> tuple[State, Steps]:
        train, before, memory = state
        keys = jax.random.split(key, 1 + BATCHES)
        live, seen = acting.update(train.params, before, keys[0], window)
        slot = memory.written % CAPACITY
        kept = jax.tree.map(lambda old, new: old.at[slot].set(new), memory[:2], (seen, before.carry))
        memory = Memory(*kept, memory.written + 1, memory.target)
        for batch_key in keys[1:]:
            learn, stored = sequences(train.params, memory, batch_key)
            train, _ = step.update(train._replace(stream=train.stream._replace(carry=stored)), learn)
            memory = memory._replace(target=optax.incremental_update(train.params, memory.target, TARGET_RATE))
        return State(train, live, memory), seen.targets

    return Agent(init, update)


def zeros(made: Callable, *args: PyTree) -> PyTree:
    """Zeros in the shapes of what a function makes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(made, *args))


def begun(
    key: jax.Array, acting: Rollout, environment: Environment, model: tb.Recurrence, lanes: int
) -> tuple[PyTree, Live]:
    observation = jax.vmap(environment.reset)(jax.random.split(key, lanes))[1]
    params = model.init(key, observation[:, None])
    return params, acting.init(key, params, lanes)
