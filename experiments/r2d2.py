"""R2D2: S. Kapturowski et al. 2019, *Recurrent experience replay in distributed reinforcement learning*."""

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

CAPACITY = 200  # windows of all lanes that are kept
BATCHES, BATCH = 4, 32  # updates for each window, and sequences in each
N_STEPS = 10  # of the returns
TARGET_RATE = 0.01  # of the target network, at each update
EXPLORE, SPREAD = 0.4, 7  # lane i of n acts at random at the rate 0.4 ** (1 + 7 i / (n - 1)), Horgan et al. 2018


class Memory(NamedTuple):
    """The last windows, number n at n modulo the capacity.

    Attributes:
      windows: ``[capacity, lanes, time, ...]``.
      carries: at their left edges, ``[capacity, lanes, ...]``.
      written: int32, how many there have been.
    """

    windows: tb.Window
    carries: PyTree
    written: jax.Array


class State(NamedTuple):
    """``target`` are the parameters of the target network."""

    train: TrainState
    target: PyTree
    live: Live
    memory: Memory


class Targets(NamedTuple):
    """Each ``[lanes, time]``: the action taken, and the return to expect."""

    action: jax.Array
    value: jax.Array


def r2d2(
    model: tb.Recurrence, environment: Environment, optimiser: optax.GradientTransformation, lanes: int, window: int
) -> Agent:
    """Double Q-learning with the values of the actions as the model's outputs, from sequences of two windows that are kept.

    The first window is burn-in: it is read from the carry that was stored with it, by the parameters of now, weighs nothing
    and passes no gradient. Sequences are drawn all alike, without priorities, and values are not rescaled. At the beginning the
    memory is filled by acting at random.
    """

    def act(key: jax.Array, q: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        explores = jax.random.bernoulli(keys[0], EXPLORE ** (1 + SPREAD * jnp.arange(lanes) / max(1, lanes - 1)))
        return jnp.where(explores, at_random(keys[1], q), q.argmax(-1))

    def loss(q: jax.Array, window: tb.Window) -> jax.Array:
        return (at_action(q, window.targets.action) - window.targets.value) ** 2

    def at_random(key: jax.Array, q: jax.Array) -> jax.Array:
        return jax.random.randint(key, (lanes,), 0, q.shape[-1])

    acting, wandering = (tb.rollout(model, environment, each) for each in (act, at_random))
    step = tb.train_step(tb.gradient(model, loss), optimiser)

    def learnable(params: PyTree, target: PyTree, memory: Memory, key: jax.Array) -> tuple[tb.Window, PyTree]:
        """Sequences ``[batch, 2 * time]`` to learn from, and the carries that they are read from."""
        sequences, stored = drawn(memory, BATCH, key)
        q, later = (model.unroll(p, stored, sequences.inputs, sequences.resets)[1] for p in (params, target))
        steps = sequences.targets
        value = returns(steps, at_action(later, q.argmax(-1)))
        # Of the last step nothing is known but its value, unless the episode ended.
        weights = jnp.ones(value.shape).at[:, -1].set(steps.done[:, -1])
        return tb.burn_in(sequences._replace(targets=Targets(steps.action, value), weights=weights), window), stored

    def init(key: jax.Array) -> State:
        keys = jax.random.split(key, 2 + CAPACITY)
        params, live = begun(keys[0], model, environment, acting, lanes)
        _, seen = acting.update(params, live, key, window)
        windows, carries = jax.tree.map(lambda x: jnp.zeros((CAPACITY, *x.shape), x.dtype), (seen, live.carry))
        memory = Memory(windows, carries, jnp.int32(0))
        train = step.init(keys[0], learnable(params, params, memory, key)[0])

        def wander(both: tuple[Live, Memory], key: jax.Array) -> tuple[tuple[Live, Memory], None]:
            live, memory = both
            after, seen = wandering.update(train.params, live, key, window)
            return (after, written(memory, seen, live.carry)), None

        start = acting.init(keys[1], train.params, lanes), memory
        (live, memory), _ = lax.scan(wander, start, keys[2:])
        return State(train, train.params, live, memory)

    def update(state: State, key: jax.Array) -> tuple[State, Steps]:
        key, rollout_key = jax.random.split(key)
        live, seen = acting.update(state.train.params, state.live, rollout_key, window)
        memory = written(state.memory, seen, state.live.carry)

        def learn(both: tuple[TrainState, PyTree], key: jax.Array) -> tuple[tuple[TrainState, PyTree], None]:
            train, target = both
            sequences, stored = learnable(train.params, target, memory, key)
            train, _ = step.update(train._replace(stream=train.stream._replace(carry=stored)), sequences)
            return (train, optax.incremental_update(train.params, target, TARGET_RATE)), None

        both, _ = lax.scan(learn, (state.train, state.target), jax.random.split(key, BATCHES))
        return State(*both, live, memory), seen.targets

    return Agent(init, update)


def written(memory: Memory, window: tb.Window, carry: PyTree) -> Memory:
    """The memory with one more window, and the carry at its left edge, in the place of the oldest."""
    slot = memory.written % len(memory.windows.targets.done)
    windows, carries = jax.tree.map(
        lambda old, new: old.at[slot].set(new), (memory.windows, memory.carries), (window, carry)
    )
    return Memory(windows, carries, memory.written + 1)


def drawn(memory: Memory, n: int, key: jax.Array) -> tuple[tb.Window, PyTree]:
    """``n`` sequences of two windows that followed one another, ``[n, 2 * time]``, and the carries at their left edges."""
    capacity, lanes, time = memory.windows.targets.done.shape
    back_key, lane_key = jax.random.split(key)
    back = jax.random.randint(back_key, (n, 1), 0, jnp.clip(memory.written - 1, 1, capacity - 1))
    pair = (memory.written - 2 - back + jnp.arange(2)) % capacity
    lane = jax.random.randint(lane_key, (n, 1), 0, lanes)
    sequences = jax.tree.map(lambda x: x[pair, lane].reshape(n, 2 * time, *x.shape[3:]), memory.windows)
    return sequences, jax.tree.map(lambda h: h[pair[:, 0], lane[:, 0]], memory.carries)


def returns(steps: Steps, value: jax.Array) -> jax.Array:
    """Returns over ``N_STEPS`` steps, fewer where the sequence ends before; of its last step there is the ``value`` alone."""
    last = jnp.where(steps.done, steps.reward, value)[:, -1:]
    total = value
    for _ in range(N_STEPS):
        total = jnp.c_[steps.reward[:, :-1] + DISCOUNT * ~steps.done[:, :-1] * total[:, 1:], last]
    return total
