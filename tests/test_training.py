import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import (
    FEATURES,
    TIME,
    assert_close,
    compiled,
    first,
    lane_by_lane,
    loss,
    lstm,
    lstm_start,
    lstm_step,
    params_of,
    stream,
    summed_gradient,
)

import tbptt_jax as tb


def train_step(**options):
    return tb.train_step(tb.gradient(lstm(), loss, **options), optax.adam(1e-2))


def test_train_windows_is_a_loop_of_updates_and_keeps_the_carry():
    step, windows = train_step(), tb.split(stream(), 5)
    state = looped = step.init(jax.random.key(0), first(windows))
    expected = []
    for i in range(len(windows.inputs)):
        looped, metrics = jax.jit(step.update)(looped, jax.tree.map(lambda x, i=i: x[i], windows))
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
        looped, metrics = jax.jit(step.update)(looped, jax.tree.map(lambda x, i=i: x[i], windows))
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
    assert state.updates == 0 and not np.allclose(state.stream.carry[1][0], 0)


def test_evaluating_leaves_the_training_state_as_it_was():
    step, windows = train_step(), tb.split(stream(), 5)
    state, _ = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
    params, carry = jax.tree.map(np.array, (state.params, state.stream.carry))
    one, other = (tb.evaluate(lstm(), loss, state.params, windows) for _ in range(2))
    assert_close(one, other, rtol=0, atol=0)  # it begins from its own carry each time
    assert_close(jax.tree.map(np.array, (state.params, state.stream.carry)), (params, carry), rtol=0, atol=0)


def test_parameters_that_were_kept_outlive_the_training_that_goes_on():
    step, windows = train_step(), tb.split(stream(), 5)
    state = step.init(jax.random.key(0), first(windows))
    best, copies = [], []
    for _ in range(3):
        best.append(state.params)
        copies.append(jax.tree.map(np.array, state.params))
        state, _ = tb.train_windows(step, state, windows)
    for kept, copy in zip(best, copies, strict=True):
        assert_close(jax.tree.map(np.array, kept), copy, rtol=0, atol=0)
        tb.evaluate(lstm(), loss, kept, windows)


@pytest.mark.parametrize("optimiser", [optax.adam(1e-2), optax.adamw(1e-2, weight_decay=0.1)], ids=["adam", "adamw"])
def test_a_window_in_which_nothing_is_scored_is_an_update_of_nothing(optimiser):
    late = stream()
    late.weights[:, 5:15] = 0
    windows = tb.split(late, 5)
    step = tb.train_step(tb.gradient(lstm(), loss, influence=tb.replay(2)), optimiser)
    state, looped = (step.init(jax.random.key(0), first(windows)) for _ in range(2))
    state, metrics = tb.train_windows(step, state, windows)
    assert (np.asarray(metrics.weight) > 0).tolist() == [True, False, False, True, True]
    assert state.updates == 3
    params, adam = (
        looped.params,
        optimiser.init(looped.params),
    )  # by hand: the stream goes on, the optimiser is not asked
    held = looped.stream
    for n in range(5):
        grads, held, of_window = jax.jit(step.estimate.update)(params, held, jax.tree.map(lambda x, n=n: x[n], windows))
        if of_window.weight > 0:
            updates, adam = optimiser.update(grads, adam, params)
            params = optax.apply_updates(params, updates)
    assert_close(state.params, params)
    assert_close(state.stream.carry, held.carry)


@pytest.mark.parametrize("influence", [tb.truncate(), tb.replay(2), tb.rtrl()], ids=["truncate", "replay", "rtrl"])
def test_the_resets_of_a_window_that_is_skipped_hold(influence):
    window = stream()
    resets = np.broadcast_to(np.arange(TIME) % 10 == 0, window.resets.shape).copy()
    resets[1, 10] = False  # this lane's sequence goes on
    window = window._replace(resets=resets, valid=None, weights=None)
    window.targets[2, 12] = 1e200  # in the third window, of five steps; its square is infinite
    windows = tb.split(window, 5)
    estimate = tb.gradient(lstm(), loss, influence=influence)
    step = tb.skip_not_finite(tb.train_step(estimate, optax.sgd(0.0)))
    state = step.init(jax.random.key(0), first(windows))
    for n in range(3):
        before, (state, metrics) = state, jax.jit(step.update)(state, jax.tree.map(lambda x, n=n: x[n], windows))
    assert not np.isfinite(metrics.loss) and state.updates == 2
    at = jax.tree.map(lambda x: x[3], windows)
    grads, stream_after, _ = jax.jit(estimate.update)(state.params, state.stream, at)
    begun = np.array([True, False, True, True])
    # The others begin as the first lanes of all do; the lane that went on, from the carry before.
    anew = at._replace(resets=(np.arange(5) == 0) & begun[:, None] | at.resets)
    expected, stream_expected, _ = jax.jit(estimate.update)(state.params, before.stream, anew)
    assert_close(stream_after.carry, stream_expected.carry)
    assert_close(grads, expected)


def test_the_epoch_s_loss_is_the_mean_over_steps_and_not_over_windows():
    step, windows = tb.train_step(tb.gradient(lstm(), loss), optax.sgd(0.0)), tb.split(stream(), 5)
    state, metrics = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
    exact = tb.evaluate(lstm(), loss, state.params, windows)
    np.testing.assert_allclose(tb.mean_loss(metrics), exact.loss, rtol=1e-12)
    assert abs(metrics.loss.mean() - exact.loss) > 1e-3


def test_initialising_compiles_once_however_many_seeds():
    traced = []

    def init(key, inputs):
        traced.append(key)
        return jax.random.normal(key, (FEATURES,))

    model = tb.from_step(lambda p, c, x: (c + x @ p, x * p), init, lambda p, n: jnp.zeros(n))
    step = tb.train_step(tb.gradient(model, loss), optax.sgd(0.1))
    states = [step.init(jax.random.key(seed), first(tb.split(stream(), 5))) for seed in range(3)]
    assert len(traced) == 1 and not np.allclose(states[0].params, states[1].params)


OPTIMISERS = {
    "reduce_on_plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    "polyak": optax.polyak_sgd(),
    "several windows an update": optax.MultiSteps(optax.adam(1e-2), 2),
    "as a transformation": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "by length": optax.MultiSteps(optax.chain(optax.adam(1e-2), tb.schedules.scale_by_length(5)), 2),
    "line search": optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(max_backtracking_steps=8)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_of_optax_is_given_what_it_needs(name):
    step = tb.skip_not_finite(tb.train_step(tb.gradient(lstm(), loss), OPTIMISERS[name]))
    windows = tb.split(stream(), 5)
    state = step.init(jax.random.key(0), first(windows))
    before, losses = state.params, []
    for _ in range(4):
        state, metrics = tb.train_windows(step, state, windows)
        losses.append(float(tb.mean_loss(metrics)))
    assert state.updates == 20 and losses[-1] < losses[0]
    assert not np.allclose(jax.tree.leaves(before)[0], jax.tree.leaves(state.params)[0])


def test_an_optimiser_is_told_the_objective_and_how_it_changes_with_the_parameters():
    seen = {}

    def update(updates, state, params, *, value, grad, value_fn, window, **others):
        seen.update(value=value, again=value_fn(params), slope=jax.grad(value_fn)(params), grad=grad)
        return updates, state

    asks = optax.GradientTransformationExtraArgs(lambda params: (), update)
    for normaliser in (None, 7.0):
        step = tb.train_step(tb.gradient(lstm(), loss, normaliser=normaliser), asks)
        windows = tb.split(stream(), 5)
        state, _ = step.update(step.init(jax.random.key(0), first(windows)), first(windows))
        step.update(state, jax.tree.map(lambda x: x[1], windows))
        np.testing.assert_allclose(seen["value"], seen["again"], rtol=1e-12)
        assert_close(seen["grad"], seen["slope"])
    needs = optax.GradientTransformationExtraArgs(lambda params: (), lambda u, s, p=None, *, hessian, **others: (u, s))
    with pytest.raises(
        ValueError, match=r"did not reach it \(.*hessian.*\['grad', 'value', 'value_fn', 'window'\].*loop"
    ):
        tb.train_step(tb.gradient(lstm(), loss), needs).init(jax.random.key(0), first(windows))


def test_complex_parameters_are_trained_downhill():
    target = 0.5 + 0.8j
    model = tb.from_step(
        lambda p, c, x: (c, p * x), lambda k, x: jnp.zeros((), complex), lambda p, n: jnp.zeros((n, 1), complex)
    )
    far = lambda outputs, window: jnp.abs(outputs - target)[..., 0] ** 2  # noqa: E731
    step = tb.train_step(tb.gradient(model, far), optax.sgd(0.1))
    windows = tb.split(tb.sequences(np.ones((2, 40, 1))), 1)
    state, _ = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
    assert abs(state.params - target) < 1e-2


@pytest.mark.parametrize("kind", [jnp.float16, jnp.bfloat16])
def test_a_loss_in_half_precision_is_averaged_and_differentiated_with_room(kind):
    model = tb.from_step(lambda p, c, x: (c, p * x), lambda k, x: jnp.ones(()), lambda p, n: jnp.zeros((n, 1)))
    squared = lambda o, w: ((o - w.targets) ** 2)[..., 0].astype(kind)  # noqa: E731
    window = tb.Window(np.full((100, 1000, 1), 3.0), np.zeros((100, 1000, 1)), np.ones((100, 1000), np.float16))
    for normaliser, share in ((None, 1.0), (50_000.0, 2.0)):
        estimate = tb.gradient(model, squared, normaliser=normaliser)
        grads, _, metrics = jax.jit(estimate.update)(
            jnp.ones(()), estimate.init(jax.random.key(0), jnp.ones(()), window), window
        )
        assert metrics.loss == 9 and metrics.weight == 100_000
        np.testing.assert_allclose(grads, 18 * share, rtol=1e-2)
    assert tb.evaluate(model, squared, jnp.ones(()), tb.split(window, 100)).loss == 9


def test_of_several_targets_some_are_missing_and_each_loss_is_averaged_over_its_own_steps():
    window = stream(rubbish=np.nan)
    rng = np.random.default_rng(5)
    names = ("flow", "heat")
    there = {name: window.valid & (rng.random(window.valid.shape) < 0.6) for name in names}
    targets = {name: np.where(there[name], window.targets[..., i], np.nan) for i, name in enumerate(names)}
    windows = tb.split(window._replace(targets=targets, weights=there), 5)
    one = lambda i, name: lambda o, w: (o[..., i] - w.targets[name]) ** 2  # noqa: E731
    both = lambda o, w: {name: one(i, name)(o, w) for i, name in enumerate(names)}  # noqa: E731
    params = params_of(lstm())

    def alone(i, name):
        own = windows._replace(targets={name: windows.targets[name]}, weights=windows.weights[name])
        return own, one(i, name)

    found = tb.evaluate(lstm(), both, params, windows)
    for normaliser in (None, 11.0):
        estimate = tb.gradient(lstm(), both, influence=tb.rtrl(), normaliser=normaliser)
        grads, metrics = summed_gradient(estimate, params, windows)
        expected = jax.tree.map(jnp.zeros_like, grads)
        for i, name in enumerate(names):
            own, loss_of = alone(i, name)
            estimate = tb.gradient(lstm(), loss_of, influence=tb.rtrl(), normaliser=normaliser)
            part, of_part = summed_gradient(estimate, params, own)
            expected = jax.tree.map(jnp.add, expected, part)
            np.testing.assert_allclose(metrics.loss[name], of_part.loss, rtol=1e-12)
            exact = tb.evaluate(lstm(), loss_of, params, own)
            np.testing.assert_allclose([found.loss[name], tb.mean_loss(metrics)[name]], exact.loss, rtol=1e-12)
            assert found.weight[name] == there[name].sum() == exact.weight
        assert_close(grads, expected, rtol=1e-9)
    with pytest.raises(ValueError, match="give weights in the shape of the loss, or one array"):
        tb.evaluate(lstm(), one(0, "flow"), params, windows)


def test_the_state_is_donated_and_seeds_run_side_by_side():
    step, windows = train_step(), tb.split(stream(), 5)
    state = step.init(jax.random.key(1), first(windows))
    after, _ = tb.train_windows(step, state, windows)
    assert all(p.is_deleted() for p in jax.tree.leaves((state.optimiser, state.stream)))
    with pytest.raises(ValueError, match=r"`state` was given to `train_windows` before.*jnp\.copy"):
        tb.train_windows(step, state, windows)
    again, _ = tb.train_windows(step, jax.tree.map(jnp.copy, after), windows)  # the advice
    assert_close(again.params, tb.train_windows(step, after, windows)[0].params, rtol=0, atol=0)

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
    return compiled(jax.jit(function, **static).lower(*args)).memory_analysis().temp_size_in_bytes


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
