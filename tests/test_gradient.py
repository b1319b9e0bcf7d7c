import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from streams import (
    LANES,
    TIME,
    assert_close,
    first,
    loss,
    lstm,
    lstm_start,
    lstm_step,
    params_of,
    stream,
    summed_gradient,
)

import tbptt_jax as tb

NORMALISER = 7.0


@pytest.fixture(scope="module")
def params():
    return params_of(lstm())


@pytest.fixture(scope="module")
def lag_gradients(params):
    """G[s, t, :], the gradient of the losses at s through the parameters' use at t, summed over lanes, by brute force:
    the textbook LSTM, each lane and each step by itself, each step with a copy of the parameters of its own."""
    window = jax.tree.map(jnp.asarray, stream())
    flat, unravel = ravel_pytree(params)

    def losses(copies, lane):
        def step(carry, at_t):
            copy, x, y, weight, reset, valid = at_t
            carry = jax.tree.map(lambda h: jnp.where(reset, 0.0, h), carry)
            new, out = lstm_step(unravel(copy), carry, x)
            carry = jax.tree.map(lambda n, h: jnp.where(valid, n, h), new, carry)
            return carry, jnp.where(valid, weight, 0.0) * jnp.sum((out - y) ** 2) / NORMALISER

        return jax.lax.scan(step, lstm_start(params), (copies, *lane))[1]

    lanes = window.inputs, window.targets, window.weights, window.resets, window.valid
    jacobian = jax.jit(jax.vmap(jax.jacrev(losses), (None, 0)))
    return np.asarray(jacobian(jnp.tile(flat, (TIME, 1)), lanes).sum(0))


def weighted(lag_gradients, w):
    s, t = np.indices(lag_gradients.shape[:2])
    return np.einsum("st,stp->p", w(s, t), lag_gradients)


@pytest.mark.parametrize("k", [1, 4, 5, TIME])
def test_windows_of_k_sum_the_lags_within_them(k, params, lag_gradients):
    got, _ = summed_gradient(
        tb.gradient(lstm(), loss, normaliser=NORMALISER), params, tb.split(stream(rubbish=np.nan), k)
    )
    expected = weighted(lag_gradients, lambda s, t: (s // k == t // k) * 1.0)
    np.testing.assert_allclose(ravel_pytree(got)[0], expected, rtol=1e-10, atol=1e-12)
    full = weighted(lag_gradients, lambda s, t: 1.0 * (t <= s))
    assert (k == TIME) == np.allclose(expected, full)  # a cut leaves something out, and the law would notice


def test_one_window_over_the_sequence_is_jax_grad_of_the_plain_scan(params):
    x, y = np.random.default_rng(0).normal(size=(2, LANES, TIME, 2))

    def plain(params):
        def step(carry, xy):
            carry, out = jax.vmap(lstm_step, (None, 0, 0))(params, carry, xy[0])
            return carry, jnp.sum((out - xy[1]) ** 2, -1)

        start = jax.tree.map(lambda h: jnp.tile(h, (LANES, 1)), lstm_start(params))
        return jnp.mean(jax.lax.scan(step, start, (x.swapaxes(0, 1), y.swapaxes(0, 1)))[1])

    value, expected = jax.jit(jax.value_and_grad(plain))(params)
    estimate = tb.gradient(lstm(), loss)
    window = tb.Window(x, y)
    state = jax.jit(estimate.init)(jax.random.key(0), params, window)
    got, _, metrics = jax.jit(estimate.update)(params, state, window)
    assert_close(got, expected)
    assert np.isclose(metrics.loss, value) and metrics.weight == LANES * TIME


def copying(outputs, window):
    return jnp.sum((outputs - window.inputs) ** 2, -1)


@pytest.mark.parametrize("loss", [loss, copying])
@pytest.mark.parametrize("rubbish", [np.nan, 1e30])
def test_what_stands_in_the_padding_changes_nothing(rubbish, loss, params):
    estimate = tb.gradient(lstm(), loss)
    clean, dirty = (summed_gradient(estimate, params, tb.split(stream(rubbish=r), 5)) for r in (0.0, rubbish))
    assert_close(dirty, clean, rtol=0, atol=0)


def test_padding_equals_leaving_out(params):
    short = tb.Window(*np.random.default_rng(0).normal(size=(2, LANES, 6, 2)))
    wide = jax.tree.map(lambda x: np.pad(x, ((0, 1), (0, 3), (0, 0)), constant_values=np.nan), short)
    wide = wide._replace(valid=np.pad(np.ones((LANES, 6), bool), ((0, 1), (0, 3))))  # with a lane of length zero
    estimate = tb.gradient(lstm(), loss)

    def run(window):
        state = jax.jit(estimate.init)(jax.random.key(0), params, window)
        grads, state, metrics = jax.jit(estimate.update)(params, state, window)
        return grads, jax.tree.map(lambda h: h[:LANES], state.carry), metrics

    assert_close(run(wide), run(short))


def test_a_missing_target_may_be_nan_where_it_weighs_nothing(params):
    window = tb.Window(*np.random.default_rng(0).normal(size=(2, LANES, 6, 2)), weights=np.ones((LANES, 6)))
    window.weights[1, 2] = 0
    missing = window._replace(targets=np.where(window.weights[..., None] > 0, window.targets, np.nan))
    estimate = tb.gradient(lstm(), loss)
    run = lambda w: jax.jit(estimate.update)(params, jax.jit(estimate.init)(jax.random.key(0), params, w), w)[0]  # noqa: E731
    assert_close(run(missing), run(window), rtol=0, atol=0)


def test_a_window_with_nothing_to_score_has_gradient_zero_and_moves_the_carry(params):
    window = first(tb.split(stream(), 5))
    estimate = tb.gradient(lstm(), loss)
    state = jax.jit(estimate.init)(jax.random.key(0), params, window)
    grads, after, metrics = jax.jit(estimate.update)(params, state, window._replace(weights=jnp.zeros((LANES, 5))))
    assert metrics.loss == metrics.weight == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))
    assert not np.allclose(after.carry[0], state.carry[0])


def test_every_window_draws_anew(params):
    drawn = []
    influence = tb.truncate()._replace(push=lambda state, linearisation, key: jax.random.key_data(key))
    estimate = tb.gradient(lstm(), loss, influence=influence)
    window = first(tb.split(stream(), 5))
    state = jax.jit(estimate.init)(jax.random.key(0), params, window)
    for _ in range(3):
        _, state, _ = jax.jit(estimate.update)(params, state, window)
        drawn.append(tuple(np.asarray(state.influence)))
    assert len(set(drawn)) == 3


def test_the_default_normaliser_is_the_windows_own_weight(params):
    windows = tb.split(stream(), 9)
    summed, metrics = summed_gradient(tb.gradient(lstm(), loss, normaliser=1.0), params, windows)
    by_hand = None
    estimate = tb.gradient(lstm(), loss)
    state = jax.jit(estimate.init)(jax.random.key(0), params, first(windows))
    for i in range(len(windows.inputs)):
        grads, state, m = jax.jit(estimate.update)(params, state, jax.tree.map(lambda x, i=i: x[i], windows))
        grads = jax.tree.map(lambda g, m=m: g * m.weight, grads)
        by_hand = grads if by_hand is None else jax.tree.map(jnp.add, by_hand, grads)
    assert_close(by_hand, summed)
    assert np.isclose(metrics.weight.sum(), (stream().weights * stream().valid).sum())


# Where a stream begins


def learned(lanes=LANES):
    """A recurrence whose initial carry is a function of the parameters."""

    def step(params, h, x):
        h = jnp.tanh(h * params["w"] + x @ params["u"])
        return h, h[:, :2]

    def init(key, inputs):
        keys = jax.random.split(key)
        return {
            "h0": jnp.array([0.5, -0.2, 0.9]),
            "w": jax.random.normal(keys[0], (3,)),
            "u": jax.random.normal(keys[1], (2, 3)),
        }

    return tb.from_step(step, init, lambda params, lanes: jnp.broadcast_to(jnp.tanh(params["h0"]), (lanes, 3)))


INFLUENCES = {"truncate": tb.truncate(), "replay": tb.replay(4), "rtrl": tb.rtrl()}


@pytest.mark.parametrize("name", INFLUENCES)
def test_a_stream_that_begins_without_a_reset_has_its_gradient_through_a_learned_initial_carry(name):
    window = stream()._replace(resets=None, valid=None)
    model = learned()
    params = jax.jit(model.init)(jax.random.key(0), window.inputs)

    def total(params, window):
        _, outputs = model.unroll(params, model.initial_carry(params, LANES), window.inputs)
        return jnp.sum(window.weights * loss(outputs, window)) / NORMALISER

    estimate = tb.gradient(model, loss, influence=INFLUENCES[name], normaliser=NORMALISER)
    windows = jax.tree.map(lambda x: np.stack(np.split(x[:, :20], 4, 1)), window)
    got, _ = summed_gradient(estimate, params, windows)
    if name == "truncate":  # the first window's alone
        expected = jax.jit(jax.grad(total))(params, first(windows))["h0"]
        np.testing.assert_allclose(got["h0"], expected, atol=1e-12)
    else:
        assert_close(got, jax.jit(jax.grad(total))(params, jax.tree.map(lambda x: x[:, :20], window)), rtol=1e-9)
    assert np.abs(got["h0"]).max() > 1e-3


@pytest.mark.parametrize("make", [learned, lstm], ids=["learned", "constant"])
def test_a_carry_that_was_stored_is_read_from_and_no_gradient_goes_into_it(make):
    window, model = stream()._replace(resets=None), make()
    params = jax.jit(model.init)(jax.random.key(0), window.inputs)
    stored = jax.tree.map(lambda h: h + 0.3, model.initial_carry(params, LANES))

    def total(params):
        _, outputs = model.unroll(params, stored, window.inputs, None, window.valid)
        return jnp.sum(window.weights * window.valid * loss(outputs, window)) / NORMALISER

    estimate = tb.gradient(model, loss, normaliser=NORMALISER)
    state = jax.jit(estimate.init)(jax.random.key(0), params, window)._replace(carry=stored)
    grads, state, _ = jax.jit(estimate.update)(params, state, window)
    assert_close(grads, jax.jit(jax.grad(total))(params))
    assert not state.fresh.any()


@pytest.mark.parametrize("model", [lstm(), tb.lstm(3, readout=nn.Dense(2))], ids=["linen", "lstm"])
def test_no_gradient_flows_into_a_burn_in(model):
    window, steps = stream()._replace(resets=None), 6
    params = jax.jit(model.init)(jax.random.key(0), window.inputs)
    stored = jax.tree.map(lambda h: h + 0.3, model.initial_carry(params, LANES))
    head, tail = (jax.tree.map(lambda x, at=at: x[:, at], window) for at in (slice(steps), slice(steps, None)))

    def total(params):
        warm, _ = model.unroll(jax.lax.stop_gradient(params), stored, head.inputs, None, head.valid)
        _, outputs = model.unroll(params, warm, tail.inputs, None, tail.valid)
        return jnp.sum(tail.weights * tail.valid * loss(outputs, tail)) / NORMALISER

    estimate = tb.gradient(model, loss, normaliser=NORMALISER)
    burnt = tb.burn_in(window, steps)
    state = jax.jit(estimate.init)(jax.random.key(0), params, burnt)._replace(carry=stored)
    expected = jax.jit(jax.grad(total))(params)
    assert_close(jax.jit(estimate.update)(params, state, burnt)[0], expected, rtol=1e-9)
    only_weights, _, _ = jax.jit(estimate.update)(params, state, burnt._replace(edges=None))
    assert np.abs(ravel_pytree(only_weights)[0] - ravel_pytree(expected)[0]).max() > 1e-4


# The same laws for odd data


ODD = {**INFLUENCES, "uoro": tb.uoro()}


@pytest.mark.parametrize("name", ODD)
def test_a_stream_cut_in_its_middle_goes_on_as_one_that_was_cut_at_once(name, params):
    whole = stream(rubbish=np.nan, time=20)
    estimate = tb.gradient(lstm(), loss, influence=ODD[name], normaliser=NORMALISER)

    @jax.jit
    def read(state, windows):
        def update(state, window):
            grads, state, _ = estimate.update(params, state, window)
            return state, grads

        return jax.lax.scan(update, state, windows)

    start = jax.jit(estimate.init)(jax.random.key(0), params, first(tb.split(whole, 4)))
    end, at_once = read(start, tb.split(whole, 4))
    halves = [tb.split(jax.tree.map(lambda x, part=part: x[:, part], whole), 4) for part in (slice(8), slice(8, None))]
    middle, early = read(start, halves[0])
    again, late = read(middle, halves[1])
    assert_close(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, late), at_once, rtol=1e-9)
    assert_close(again.carry, end.carry)


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint8, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["truncate", "rtrl"])
def test_weights_are_what_they_say_in_any_kind_of_number(name, kind, params):
    window = stream(rubbish=np.nan)
    window = window._replace(weights=(window.weights > 0).astype(np.float64))
    estimate = tb.gradient(lstm(), loss, influence=INFLUENCES[name])
    expected = summed_gradient(estimate, params, tb.split(window, 5))
    got = summed_gradient(estimate, params, tb.split(window._replace(weights=window.weights.astype(kind)), 5))
    assert_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["replay", "rtrl"])
def test_full_bptt_is_full_bptt_for_a_loss_in_half_precision(name, kind, params):
    window = stream(rubbish=np.nan)
    half = lambda outputs, window: loss(outputs, window).astype(kind)  # noqa: E731
    estimate = tb.gradient(lstm(), half, influence=INFLUENCES[name], normaliser=NORMALISER)
    exact = tb.gradient(lstm(), loss, influence=tb.rtrl(), normaliser=NORMALISER)
    (got, metrics), (expected, _) = (summed_gradient(e, params, tb.split(window, 5)) for e in (estimate, exact))
    got, expected = ravel_pytree(got)[0], ravel_pytree(expected)[0]
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)
    assert metrics.loss.dtype == jnp.float32
