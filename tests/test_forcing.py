"""Scheduled sampling: which of two inputs is read, and what the gradient knows of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import FEATURES, LANES, assert_close, params_of, read, stream, summed_gradient

import tbptt_jax as tb

PAIR = jnp.zeros(2)


@jax.jit
def step(params, h, x):
    """An Elman network."""
    h = jnp.tanh(x @ params["u"] + h @ params["w"])
    return h, h @ params["o"]


elman = tb.from_step(
    step,
    lambda key, inputs: {name: jax.random.normal(key, (n, 2)) for name, n in (("u", FEATURES), ("w", 2), ("o", 2))},
    lambda params, lanes: jnp.zeros((lanes, 2)),
)


def mean(inputs, outputs, key):
    return outputs


def forced(probability=0.0, feed=mean, model=None, like=PAIR, **options):
    return tb.scheduled_sampling(elman if model is None else model, feed, probability, like=like, **options)


def loop(params, window, reads_own):
    """``outputs [lanes][time]``, each lane and step by itself; ``reads_own(lane, t)`` says what is read."""
    outputs = []
    for lane in range(len(window.valid)):
        carry, before, row = jnp.zeros(2), None, []
        for t in range(window.valid.shape[1]):
            if window.resets[lane, t]:
                carry, before = jnp.zeros(2), None
            row.append(None)
            if window.valid[lane, t]:
                x = before if before is not None and reads_own(lane, t) else window.inputs[lane, t]
                carry, before = step(params, carry, x)
                row[-1] = before
        outputs.append(row)
    return outputs


def assert_read_as_the_loop(outputs, expected):
    for row, loop_row in zip(outputs, expected, strict=True):
        for y, of_loop in zip(row, loop_row, strict=False):
            if of_loop is not None:
                np.testing.assert_allclose(y, of_loop, atol=1e-11)


def in_lanes(outputs):
    return outputs.swapaxes(0, 1).reshape(outputs.shape[1], -1, *outputs.shape[3:])


@settings(deadline=None, max_examples=4)
@given(k=st.integers(1, 23))
def test_free_it_reads_its_own_outputs_wherever_the_stream_is_cut(k):
    params, window = params_of(elman), stream(rubbish=np.nan)
    _, outputs = read(forced(free=True), params, tb.split(window, k))
    assert_read_as_the_loop(in_lanes(outputs), loop(params, window, lambda lane, t: True))


def test_without_a_key_all_is_teacher_forced_and_so_it_is_at_probability_zero():
    params, w = params_of(elman), stream(rubbish=np.nan)
    _, expected = jax.jit(elman.unroll)(params, elman.initial_carry(params, LANES), w.inputs, w.resets, w.valid)
    for model, key in ((forced(0.5), None), (forced(0.0), tb.noise.lane_keys(jax.random.key(0), LANES))):
        start = model.initial_carry(params, LANES)
        _, outputs = jax.jit(model.unroll)(params, start, w.inputs, w.resets, w.valid, key=key)
        np.testing.assert_allclose(outputs[w.valid], expected[w.valid], atol=1e-14)


def test_by_a_function_of_the_inputs_some_is_given_and_the_rest_its_own():
    """A prompt of 4 steps, then its own outputs; with a key by a probability that is data, without one by `free`."""
    window = stream(rubbish=np.nan)
    prompt = np.broadcast_to(np.arange(23) >= 4, window.valid.shape)
    inner = tb.from_step(
        lambda params, h, x: step(params, h, x["x"]),
        lambda key, inputs: elman.init(key, inputs["x"]),
        elman.initial_carry,
    )
    feed = lambda inputs, outputs, key: inputs | {"x": outputs}  # noqa: E731
    params = params_of(elman)
    expected = loop(params, window, lambda lane, t: t >= 4)
    inputs = {"x": window.inputs, "own": prompt.astype(float)}
    drawn = tb.scheduled_sampling(inner, feed, lambda x: x["own"], like=PAIR)
    free = tb.scheduled_sampling(inner, feed, 0.0, like=PAIR, free=lambda x: x["own"] > 0)
    for model, key in ((drawn, tb.noise.lane_keys(jax.random.key(0), LANES)), (free, None)):
        carry = model.initial_carry(params, LANES)
        _, outputs = jax.jit(model.unroll)(params, carry, inputs, window.resets, window.valid, key=key)
        assert_read_as_the_loop(outputs, expected)


# What it reads, it says: which of the two that was is seen in its outputs.
saying = tb.from_step(lambda params, carry, x: (carry, x), lambda *_: (), lambda params, lanes: jnp.zeros(lanes))
one_more = lambda inputs, outputs, key: outputs + 1  # noqa: E731


def own_steps(model, lanes, time, key):
    x = np.broadcast_to(1000 * np.arange(time), (lanes, time))
    _, outputs = jax.jit(model.unroll)((), model.initial_carry((), lanes), x, key=tb.noise.lane_keys(key, lanes))
    return np.asarray(outputs != x)


def test_each_step_of_each_lane_draws_by_itself_and_whatever_lanes_are_beside_it():
    model = forced(0.3, one_more, saying, jnp.zeros((), int))
    own = own_steps(model, 40, 51, jax.random.key(1))
    assert not own[:, 0].any()  # there is no step before
    deviation = np.sqrt(0.3 * 0.7 / (40 * 50))
    assert abs(own[:, 1:].mean() - 0.3) < 4 * deviation
    assert abs(np.corrcoef(own[:, 1:-1].ravel(), own[:, 2:].ravel())[0, 1]) < 4 / np.sqrt(40 * 49)
    assert abs(np.corrcoef(own[:-1, 1:].ravel(), own[1:, 1:].ravel())[0, 1]) < 4 / np.sqrt(39 * 50)
    np.testing.assert_array_equal(own[:3], own_steps(model, 3, 51, jax.random.key(1)))
    assert (own[:, 1:] != own_steps(model, 40, 51, jax.random.key(2))[:, 1:]).any()


def test_what_feed_draws_is_another_at_each_step_of_each_lane_and_independent_of_the_choice():
    uniform = lambda inputs, outputs, key: jax.vmap(jax.random.uniform)(key)  # noqa: E731
    model = forced(0.5, uniform, saying, jnp.zeros(()))
    keys = tb.noise.lane_keys(jax.random.key(0), 30)
    _, outputs = jax.jit(model.unroll)((), model.initial_carry((), 30), jnp.full((30, 40), -1.0), key=keys)
    drawn = np.asarray(outputs)[np.asarray(outputs) >= 0]
    assert len(np.unique(drawn)) == len(drawn)
    assert abs(drawn.mean() - 0.5) < 4 / np.sqrt(12 * len(drawn))


def test_the_models_own_noise_is_held_over_the_window_or_drawn_at_each_step():
    noisy = tb.from_step(
        lambda params, carry, x, key: (carry, x if key is None else jax.vmap(jax.random.uniform)(key)),
        lambda *_: (),
        lambda params, lanes: jnp.zeros(lanes),
    )
    x, keys = jnp.zeros((3, 6)), tb.noise.lane_keys(jax.random.key(0), 3)
    for draw, different in (("window", 1), ("step", 6)):
        model = forced(0.5, mean, noisy, jnp.zeros(()), draw=draw)
        _, outputs = jax.jit(model.unroll)((), model.initial_carry((), 3), x, key=keys)
        assert [len(np.unique(row)) for row in outputs] == [different] * 3
        assert len(np.unique(outputs)) == 3 * different


def loss(outputs, window):
    return jnp.sum((outputs - window.targets) ** 2, -1)


def test_the_gradient_goes_through_what_it_reads_and_over_edges_as_the_influence_says():
    params, window = params_of(elman), stream(seed=2, lanes=3, time=9)

    def total(params):
        outputs = loop(params, window, lambda lane, t: True)
        return sum(
            window.weights[lane, t] * jnp.sum((y - window.targets[lane, t]) ** 2)
            for lane, row in enumerate(outputs)
            for t, y in enumerate(row)
            if y is not None
        )

    expected = jax.grad(total)(params)
    for k, influence in ((9, tb.truncate()), (4, tb.replay(3)), (2, tb.rtrl())):
        estimate = tb.gradient(forced(1.0), loss, influence=influence, normaliser=1.0)
        assert_close(summed_gradient(estimate, params, tb.split(window, k))[0], expected, rtol=1e-9)


def test_two_devices_and_checkpointing_draw_the_same():
    params, windows = params_of(elman), tb.split(stream(seed=2, lanes=4, time=9), 3)
    estimate = tb.gradient(forced(0.5), loss)
    spread = tb.sharding.over_lanes(estimate, tb.sharding.mesh(lane=2))
    expected = summed_gradient(estimate, params, windows)
    assert_close(summed_gradient(spread, params, windows), expected, rtol=1e-10)
    assert_close(summed_gradient(tb.gradient(forced(0.5, checkpoint=2), loss), params, windows), expected, rtol=1e-10)


def test_given_the_draws_rtrl_is_replay_of_all():
    params, windows = params_of(elman), tb.split(stream(seed=2, lanes=3, time=9), 3)
    one, other = (
        summed_gradient(tb.gradient(forced(0.5), loss, influence=past), params, windows)
        for past in (tb.rtrl(), tb.replay(3))
    )
    assert_close(one, other, rtol=1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probability": 1.5}, "`probability` is 1.5"),
        ({"probability": "half"}, "`probability` is 'half'"),
        ({"model": loss}, "`model` is"),
        ({"like": jnp.zeros(3)}, r"The model has outputs float64\[4, 2\]; .* float64\[4, 3\], those of `like`"),
        (
            {"feed": lambda inputs, outputs, key: outputs[:, :1]},
            r"`feed` makes inputs float64\[4, 1\]; .* float64\[4, 2\], those",
        ),
        ({"feed": lambda inputs, outputs, key: outputs.argmax(-1)}, r"`feed` makes inputs int64\[4\]"),
        ({"probability": lambda inputs: inputs}, r"returned shape \[4, 2\]; `probability` and `free` need one number"),
    ],
)
def test_what_cannot_be_fed_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        forced(**options).init(jax.random.key(0), stream().inputs)
