"""The T-maze is Bakker's; a carry never crosses an episode, whenever that ends; agents solve corridors longer than their windows."""

import itertools
import json
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import program_of, refused

import tbptt_jax as tb
from experiments import ppo, r2d2
from experiments.agents import DISCOUNT
from tbptt_jax.rollout import Steps
from tbptt_jax.study.process import lock, machine
from tbptt_jax.tasks.t_maze import EAST, NORTH, SOUTH, WEST, Place

KEY = jax.random.key(3)


# The maze


def walk(corridor, south, actions):
    """Observations before each action, rewards and ends, from the start."""
    maze, place = tb.tasks.t_maze(corridor), Place(jnp.int32(0), jnp.array(south))
    _, seen, *_ = maze.step(KEY, place, WEST)  # stands still
    steps = []
    for action in actions:
        place, after, reward, done = maze.step(KEY, place, action)
        steps.append(("".join(str(int(x)) for x in seen), round(float(reward), 6), bool(done)))
        seen = after
    return steps, place, seen


@pytest.mark.parametrize("south", [False, True])
@pytest.mark.parametrize("corridor", [1, 2, 5])
def test_the_shortest_way_shows_the_cue_once_and_has_return_4(corridor, south):
    right, wrong, cue = (SOUTH, NORTH, "110") if south else (NORTH, SOUTH, "011")
    steps, place, after = walk(corridor, south, [EAST] * corridor + [right])
    assert [seen for seen, *_ in steps] == [cue, *["101"] * (corridor - 1), "010"]
    assert [reward for _, reward, _ in steps] == [0.0] * corridor + [4.0]
    assert [done for *_, done in steps] == [False] * corridor + [True]
    begun, observation = tb.tasks.t_maze(corridor).reset(KEY)
    assert (place, after.tolist()) == (begun, observation.tolist())  # the next episode
    assert walk(corridor, south, [EAST] * corridor + [wrong])[0][-1] == ("010", -0.1, True)


def test_walls_cost_and_walking_does_not():
    steps, place, _ = walk(2, False, [NORTH, SOUTH, WEST, EAST, NORTH, WEST, EAST, EAST, EAST])
    assert [reward for _, reward, _ in steps] == [-0.1, -0.1, -0.1, 0, -0.1, 0, 0, 0, -0.1]
    assert int(place.position) == 2 and not any(done for *_, done in steps)


def test_the_goal_is_on_either_side_as_often():
    south = jax.vmap(tb.tasks.t_maze(3).reset)(jax.random.split(KEY, 4000))[0].south
    assert south.mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)


def test_who_has_no_memory_finds_the_goal_half_of_the_time_at_best():
    maze, corridor = tb.tasks.t_maze(2), 2

    def returns(policy, south):
        """Whether the goal was found, and the return, of the first episode; ``policy`` is an action for each observation."""

        def step(now, _):
            place, seen, over = now
            action = policy[jnp.argmax((seen == jnp.array([[0, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 0]])).all(1))]
            place, seen, reward, done = maze.step(KEY, place, action)
            return (place, seen, over | done), jnp.where(over, 0.0, reward)

        first = jnp.where(south, jnp.array([1.0, 1, 0]), jnp.array([0.0, 1, 1])).astype(jnp.float32)
        begin = Place(jnp.int32(0), south), first, jnp.array(False)
        rewards = jax.lax.scan(step, begin, None, corridor + 1)[1]
        return (rewards > 0).any(), rewards.sum()

    policies = jnp.array(list(itertools.product(range(4), repeat=4)))
    both = jax.vmap(jax.vmap(returns, (None, 0)), (0, None))(policies, jnp.array([False, True]))
    found, total = (np.asarray(x, float).mean(1) for x in both)
    assert found.max() == 0.5 and total.max() == pytest.approx((4 - 0.1) / 2)


def test_a_corridor_of_none_is_refused():
    with pytest.raises(ValueError, match="`corridor` is 0; the junction needs to be at least 1 step from the start"):
        tb.tasks.t_maze(0)


# The carry and the episodes

LANES, TIME, WINDOWS = 3, 4, 5


class Coins(NamedTuple):
    """An environment whose episodes end by chance."""

    reset: object
    step: object


def coins(chance):
    def reset(key):
        return (), jax.random.normal(key, (2,))

    def step(key, state, action):
        keys = jax.random.split(key)
        return (), jax.random.normal(keys[0], (2,)), action.astype(float), jax.random.bernoulli(keys[1], chance)

    return Coins(reset, step)


MODEL = tb.lstm(5, readout=nn.Dense(3))
PARAMS = MODEL.init(KEY, jnp.zeros((1, 1, 2)))


@jax.jit
def experience(key, chance):
    """Windows ``[windows, lanes, time]`` and the carries stored at their left edges."""
    acting = tb.rollout(MODEL, coins(chance), lambda key, outputs: jax.random.categorical(key, outputs))

    def one(live, key):
        after, window = acting.update(PARAMS, live, key, TIME)
        return after, (window, live.carry)

    keys = jax.random.split(key, WINDOWS + 1)
    return jax.lax.scan(one, acting.init(keys[0], PARAMS, LANES), keys[1:])[1]


read = jax.jit(MODEL.unroll)


@jax.jit
def read_again(windows, carries):
    """Each window from its stored carry."""
    return jax.vmap(lambda w, c: MODEL.unroll(PARAMS, c, w.inputs, w.resets)[1])(windows, carries)


@jax.jit
def remembered(windows, carries, key):
    """What a memory that has room for three of the windows gives: sequences, and their stored carries."""
    empty = jax.tree.map(lambda x: jnp.zeros((3, *x.shape[1:]), x.dtype), (windows, carries))
    memory, _ = jax.lax.scan(
        lambda m, one: (r2d2.written(m, *one), None), r2d2.Memory(*empty, jnp.int32(0)), (windows, carries)
    )
    return r2d2.drawn(memory, 20, key)


def along(x):
    """Windows as one stretch, ``[windows, lanes, time, ...] -> [lanes, windows * time, ...]``."""
    x = np.moveaxis(np.asarray(x), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def alone(windows):
    """The outputs of each step, its episode run alone: from the initial carry, from the step at which the episode began."""
    inputs, done = along(windows.inputs), along(windows.targets.done)
    lanes, time = done.shape
    starts = [[max([0, *(np.flatnonzero(row[:t]) + 1)]) for t in range(time)] for row in done]
    runs = np.stack([np.roll(inputs[lane], -start, 0) for lane in range(lanes) for start in range(time)])
    outputs = np.asarray(read(PARAMS, MODEL.initial_carry(PARAMS, lanes * time), runs)[1]).reshape(
        lanes, time, time, -1
    )
    return np.array([[outputs[i, starts[i][t], t - starts[i][t]] for t in range(time)] for i in range(lanes)])


chances = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.05, 0.95))
seeds = st.integers(0, 2**31 - 1)


@settings(max_examples=15, deadline=None)
@given(seeds, chances)
def test_a_window_from_its_stored_carry_is_each_episode_run_alone(seed, chance):
    windows, carries = experience(jax.random.key(seed), chance)
    expected = alone(windows)
    again = read_again(windows, carries)
    np.testing.assert_allclose(along(windows.targets.outputs), expected, atol=1e-12)  # as it acted
    np.testing.assert_allclose(along(again), expected, atol=1e-12)  # as it is learned from
    begins = np.pad(along(windows.targets.done)[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    np.testing.assert_array_equal(along(windows.resets), begins)


@settings(max_examples=15, deadline=None)
@given(seeds, chances)
def test_a_sequence_from_memory_is_two_windows_in_a_row_and_knows_nothing_of_an_episode_before(seed, chance):
    windows, carries = experience(jax.random.key(seed), chance)
    sequences, stored = remembered(windows, carries, jax.random.key(seed))
    kept = along(windows.inputs)[:, 2 * TIME :]  # the last three windows
    both = [kept[lane, start : start + 2 * TIME] for lane in range(LANES) for start in (0, TIME)]
    assert all(any(np.array_equal(x, pair) for pair in both) for x in np.asarray(sequences.inputs))
    _, outputs = read(PARAMS, stored, sequences.inputs, sequences.resets)
    np.testing.assert_allclose(outputs, sequences.targets.outputs, atol=1e-12)  # each episode's alone, as above
    other = jax.tree.map(lambda h: np.asarray(h) + 1, stored)
    changed = (
        np.abs(np.asarray(read(PARAMS, other, sequences.inputs, sequences.resets)[1]) - np.asarray(outputs)).max(-1) > 0
    )
    began = np.logical_or.accumulate(np.asarray(sequences.resets), 1)
    np.testing.assert_array_equal(changed, ~began)


@settings(max_examples=15, deadline=None)
@given(seeds, chances)
def test_advantages_and_returns_are_their_sums_and_end_with_the_episode(seed, chance):
    rng = np.random.default_rng(seed)
    n, time = 2, 13
    reward, value, beyond = rng.normal(size=(n, time)), rng.normal(size=(n, time)), rng.normal(size=n)
    done = rng.random((n, time)) < chance
    steps = Steps(None, jnp.asarray(value)[..., None], jnp.asarray(reward), jnp.asarray(done))
    after = np.c_[value[:, 1:], beyond]
    error = reward + DISCOUNT * np.where(done, 0, after) - value
    advantage, total = np.zeros((n, time)), np.zeros((n, time))
    for i, t in itertools.product(range(n), range(time)):
        end = min([time - 1, *(t + np.flatnonzero(done[i, t:]))])  # the last step that the one at t leads to
        advantage[i, t] = sum((DISCOUNT * ppo.SMOOTHING) ** (s - t) * error[i, s] for s in range(t, end + 1))
        if t + r2d2.N_STEPS < time and end >= t + r2d2.N_STEPS:
            end = t + r2d2.N_STEPS - 1
            last = value[i, end + 1]
        elif done[i, end]:
            last = 0.0
        else:  # the sequence ends: the last step has its value alone
            last, end = value[i, -1], time - 2
        total[i, t] = sum(DISCOUNT ** (s - t) * reward[i, s] for s in range(t, end + 1))
        total[i, t] += DISCOUNT ** (end + 1 - t) * last
    np.testing.assert_allclose(ppo.advantages(steps, jnp.asarray(beyond))[0], advantage, atol=1e-12)
    np.testing.assert_allclose(ppo.advantages(steps, jnp.asarray(beyond))[1], advantage + value, atol=1e-12)
    np.testing.assert_allclose(r2d2.returns(steps, jnp.asarray(value)), total, atol=1e-12)


# What is refused, and the launch


def test_an_environment_that_does_not_keep_its_shapes_is_refused_in_a_sentence():
    act = lambda key, outputs: outputs.argmax(-1)  # noqa: E731
    fair = coins(0.5)
    no_bool = fair._replace(step=lambda *args: (*fair.step(*args)[:3], jnp.float32(0)))
    other = fair._replace(step=lambda *args: ((), jnp.zeros(3), *fair.step(*args)[2:]))
    for environment in (no_bool, other):
        with pytest.raises(ValueError, match="`done`, which becomes `begins`, to be a bool"):
            tb.rollout(MODEL, environment, act).init(KEY, PARAMS, 2)
    acting = tb.rollout(MODEL, fair, act)
    with pytest.raises(ValueError, match="`lanes` is 0"):
        acting.init(KEY, PARAMS, 0)
    with pytest.raises(ValueError, match="`steps` is 0"):
        acting.update(PARAMS, acting.init(KEY, PARAMS, 1), KEY, 0)


@pytest.fixture
def program():
    yield from program_of("t_maze")


SMALL = ["--corridor=4", "--window=3", "--hidden=16", "--lanes=16", "--seeds=2", "--influence=replay:1"]


@pytest.mark.parametrize("settings", ["ppo --updates=800", "r2d2 --updates=800"])
def test_every_seed_solves_a_corridor_longer_than_its_window(program, settings, tmp_path):
    with flagsaver.flagsaver():
        flags.FLAGS(["", f"--workdir={tmp_path}", *SMALL, *f"--algorithm={settings}".split()])
        program.main()
    lock.release()
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["success"] == [1.0, 1.0] and len(row["curve"]) == 2
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


REFUSED = [
    ("--lanes=1000000000", "GB: lower .*--lanes"),
    ("--influence=replay:1000000000", "reach of --influence"),
    ("--influence=none", "--influence has none, which is none"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSED)
def test_what_does_not_fit_or_is_none_is_refused_before_it_computes(program, wrong, said, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 16 * 10**9)
    refused(program, monkeypatch, tmp_path / "run", [wrong], said)
