import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import TIME, assert_close, first, lane_by_lane, loss, lstm, lstm_start, lstm_step, params_of, stream

import tbptt_jax as tb


def train_step(**options):
    return tb.train_step(tb.gradient(lstm(), loss, **options), optax.adam(1e-2))


def test_train_windows_is_a_loop_of_updates_and_keeps_the_carry():
    step, windows = train_step(), tb.split(stream(), 5)
    state = looped = step.init(jax.random.key(0), first(windows))
    expected = []
    for i in range(len(windows.inputs)):
        looped, metrics = step.update(looped, jax.tree.map(lambda x, i=i: x[i], windows))
        expected.append(metrics)
    state, metrics = tb.train_windows(step, state, windows)
    assert_close(
        state._replace(stream=state.stream._replace(key=0)), looped._replace(stream=looped.stream._replace(key=0))
    )
    assert_close(metrics, jax.tree.map(lambda *m: jnp.stack(m), *expected))
    assert state.updates == len(windows.inputs)
    assert not np.allclose(state.stream.carry[1][0], 0)


def test_windows_that_score_nothing_train_alike_one_by_one_and_in_one_call():
    late = stream(rubbish=np.nan)
    late.weights[:, :10] = 0
    late.weights[~late.valid] = -1  # rubbish in the padding
    windows = tb.split(late, 5)
    step = train_step()
    state = looped = step.init(jax.random.key(0), first(windows))
    for i in range(len(windows.inputs)):
        looped, metrics = step.update(looped, jax.tree.map(lambda x, i=i: x[i], windows))
        assert (metrics.weight == 0) == (i < 2)
    state, _ = tb.train_windows(step, state, windows)
    assert_close(state.params, looped.params)
    assert_close(state.stream.carry, looped.stream.carry)


def test_a_call_in_which_nothing_is_scored_reads_on_and_learns_nothing():
    step, windows = tb.train_step(tb.gradient(lstm(), loss), optax.sgd(1e-2)), tb.split(stream(), 5)
    start = jax.tree.map(np.array, step.init(jax.random.key(0), first(windows)).params)
    quiet = jax.tree.map(lambda x: x[:2], windows._replace(weights=0 * windows.weights))
    state, metrics = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), quiet)
    assert_close(metrics, tb.Metrics(np.zeros(2), np.zeros(2)), rtol=0, atol=0)
    assert_close(jax.tree.map(np.array, state.params), start, rtol=0, atol=0)
    assert state.updates == 2 and not np.allclose(state.stream.carry[1][0], 0)


def test_evaluating_leaves_the_training_state_as_it_was():
    step, windows = train_step(), tb.split(stream(), 5)
    state, _ = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
    params, carry = jax.tree.map(np.array, (state.params, state.stream.carry))
    one, other = (tb.evaluate(lstm(), loss, state.params, windows) for _ in range(2))
    assert_close(one, other, rtol=0, atol=0)  # it begins from its own carry each time
    assert_close(jax.tree.map(np.array, (state.params, state.stream.carry)), (params, carry), rtol=0, atol=0)


def test_the_state_is_donated_and_seeds_run_side_by_side():
    step, windows = train_step(), tb.split(stream(), 5)
    state = step.init(jax.random.key(1), first(windows))
    after, _ = tb.train_windows(step, state, windows)
    assert all(p.is_deleted() for p in jax.tree.leaves(state.params))

    def one_seed(key):
        return tb.train_windows(step, step.init(key, first(windows)), windows)[0].params

    both = jax.jit(jax.vmap(one_seed))(jnp.stack([jax.random.key(0), jax.random.key(1)]))
    assert_close(jax.tree.map(lambda p: p[1], both), after.params, rtol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 10, TIME])
def test_evaluate_is_the_weighted_mean_for_any_window_length(k):
    params, window = params_of(lstm()), stream(rubbish=np.nan)
    _, outputs = lane_by_lane(lstm_step, lstm_start, params, window)
    weights = window.weights * window.valid
    error = np.where(weights > 0, ((outputs - np.nan_to_num(window.targets)) ** 2).sum(-1), 0)
    figures = lambda o, w: {"loss": loss(o, w), "double": 2 * loss(o, w)}  # noqa: E731
    got = tb.evaluate(lstm(), figures, params, tb.split(window, k))
    expected = (error * weights).sum() / weights.sum()
    np.testing.assert_allclose([got.loss["loss"], got.loss["double"] / 2], expected, rtol=1e-12)
    assert got.weight == weights.sum()


def test_a_figure_may_be_yes_or_no_and_a_stream_that_scores_nothing_has_mean_zero():
    params, windows = params_of(lstm()), tb.split(stream(), 5)
    right = lambda outputs, window: outputs[..., 0] > window.targets[..., 0]  # noqa: E731
    as_number = lambda outputs, window: 1.0 * right(outputs, window)  # noqa: E731
    assert_close(*(tb.evaluate(lstm(), figure, params, windows) for figure in (right, as_number)))
    nothing = windows._replace(weights=jnp.zeros(windows.weights.shape))
    assert jax.jit(lambda w: tb.evaluate(lstm(), loss, params, w))(nothing).loss == 0


def temp_bytes(function, *args, **static):
    return jax.jit(function, **static).lower(*args).compile().memory_analysis().temp_size_in_bytes


def wide_lstm(checkpoint=None):
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    return tb.from_linen(nn.OptimizedLSTMCell(32, **kinds), readout=nn.Dense(1, **kinds), checkpoint=checkpoint)


def squared(outputs, window):
    return (outputs - window.targets)[..., 0] ** 2


def test_memory_of_training_does_not_depend_on_the_streams_length():
    step = tb.train_step(tb.gradient(wide_lstm(), squared), optax.adam(1e-3))

    def size(windows):
        x = np.zeros((8, windows * 16, 1), np.float32)
        stacked = tb.split(tb.sequences(x, x), 16)
        state = step.init(jax.random.key(0), first(stacked))
        return temp_bytes(lambda state, windows: tb.train_windows(step, state, windows), state, stacked)

    assert size(4) == size(256)


@pytest.mark.parametrize("checkpoint, low, high", [(None, 3.5, 4.5), ("sqrt", 1.5, 2.6)])
def test_memory_of_full_bptt_grows_as_time_and_with_checkpoints_as_its_root(checkpoint, low, high):
    estimate = tb.gradient(wide_lstm(checkpoint), squared)

    def size(time):
        x = np.zeros((8, time, 1), np.float32)
        window = tb.Window(x, x)
        params = wide_lstm().init(jax.random.key(0), x)
        state = estimate.init(jax.random.key(0), params, window)
        return temp_bytes(lambda *args: estimate.update(*args)[0], params, state, window)

    assert low < size(4096) / size(1024) < high


@pytest.mark.parametrize("model", [tb.lstm(8, layers=2), tb.from_linen(nn.OptimizedLSTMCell(8))], ids=["lstm", "linen"])
def test_initial_matrices_are_factorised_one_at_a_time_also_for_seeds_side_by_side(model):
    # On a CPU, batched factorisations of a program that meet in its thread pool can wait for each other for ever.
    step = tb.train_step(tb.gradient(model, lambda y, window: y.sum(-1)), optax.sgd(1e-2))
    window = tb.Window(jnp.zeros((3, 4, 2)))
    for init, key in (
        (step.init, jax.random.key(0)),
        (jax.vmap(step.init, (0, None)), jax.random.split(jax.random.key(0))),
    ):
        factorised = re.findall(r"@lapack_[sd]geqrf_ffi.*: \(tensor<(.*?)>", jax.jit(init).lower(key, window).as_text())
        assert factorised and all(shape.count("x") == 2 for shape in factorised)
