import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import (
    F64,
    FEATURES,
    LANES,
    TIME,
    UNITS,
    assert_close,
    lane_by_lane,
    loss,
    lstm,
    lstm_start,
    lstm_step,
    params_of,
    read,
    stream,
    summed_gradient,
)

import tbptt_jax as tb


def bare(**options):
    """`lstm()` as a bare step function over the lanes."""
    start = lambda params, lanes: (jnp.zeros((lanes, UNITS)), jnp.zeros((lanes, UNITS)))  # noqa: E731
    return tb.from_step(lstm_step, lstm().init, start, **options)


def from_nnx():
    """`lstm()` in NNX, and its parameters from Linen's."""

    def convert(params):
        cell, readout = params["cell"]["params"], params["readout"]["params"]
        gate = lambda kind, what: jnp.concatenate([cell[kind + n][what] for n in "ifgo"], -1)  # noqa: E731
        parts = model.init(jax.random.key(0), None)
        cell_state = {
            "dense_i": {"kernel": gate("i", "kernel")},
            "dense_h": {"kernel": gate("h", "kernel"), "bias": gate("h", "bias")},
        }
        for part, values in (("cell", cell_state), ("readout", readout)):
            flat = jax.tree.leaves(values)  # both in alphabetical order
            parts[part] = jax.tree.unflatten(jax.tree.structure(parts[part]), flat)
        return parts

    model = tb.from_nnx(
        lambda rngs: nnx.OptimizedLSTMCell(FEATURES, UNITS, rngs=rngs, **F64),
        readout=lambda rngs: nnx.Linear(UNITS, 2, rngs=rngs, **F64),
    )
    return model, convert


@pytest.fixture(scope="module")
def params():
    return params_of(lstm())


@pytest.fixture(scope="module")
def whole(params):
    """The stream read as one window, by the oracle."""
    return lane_by_lane(lstm_step, lstm_start, params, stream())


@settings(deadline=None, max_examples=6)
@given(k=st.integers(1, TIME))
def test_any_cutting_gives_the_same_outputs_and_final_carry(k):
    params, window = params_of(lstm()), stream(rubbish=np.nan)
    expected_carry, expected = lane_by_lane(lstm_step, lstm_start, params, window)
    carry, outputs = read(lstm(), params, tb.split(window, k))
    outputs = outputs.swapaxes(0, 1).reshape(LANES, -1, 2)[:, :TIME]
    assert_close(carry, expected_carry)
    np.testing.assert_allclose(outputs[window.valid], expected[window.valid], atol=1e-12)


def test_a_reset_in_the_middle_equals_two_separate_sequences(params):
    window = tb.Window(
        *[np.random.default_rng(0).normal(size=(2, 10, 2))] * 2, resets=np.arange(10) == np.array([[4], [4]])
    )
    model = lstm()
    start = model.initial_carry(params, 2)
    carry, outputs = model.unroll(params, start, window.inputs, window.resets)
    _, before = model.unroll(params, start, window.inputs[:, :4])
    end, after = model.unroll(params, start, window.inputs[:, 4:])
    assert_close(carry, end)
    np.testing.assert_allclose(outputs, np.concatenate([before, after], 1), atol=1e-14)


def test_a_lane_of_length_zero_keeps_the_carry_it_came_with(params):
    window, model = stream(rubbish=np.nan), lstm()
    carry = jax.tree.map(lambda h: h + 0.3, model.initial_carry(params, LANES))
    end, _ = model.unroll(params, carry, window.inputs, None, window.valid)
    assert_close(jax.tree.map(lambda h: h[-1], end), jax.tree.map(lambda h: h[-1], carry))


@pytest.mark.parametrize("model", [lstm(), tb.lstm(UNITS)], ids=["linen", "fused"])
def test_padding_at_the_start_does_not_hide_the_reset_that_stands_there(model):
    x = np.random.default_rng(1).normal(size=(4, 9, FEATURES))
    late = tb.sequences(x)._replace(valid=np.arange(9) >= np.array([[0], [2], [5], [3]]))  # padded on the left
    params = params_of(model)
    for cut in (tb.split(late, 4, lanes=1), tb.stateless(tb.split(late, 4, lanes=1))):
        _, outputs = read(model, params, cut)  # the rows one after another in one lane
        alone = jax.tree.map(lambda w: w.reshape(len(w) // 3, 3, *w.shape[1:]), cut)
        for row in range(4):
            _, expected = read(model, params, jax.tree.map(lambda w, row=row: w[row], alone))
            got = outputs[3 * row : 3 * row + 3]
            np.testing.assert_allclose(got[alone.valid[row]], expected[alone.valid[row]], atol=1e-14)


@pytest.mark.parametrize("checkpoint", ["sqrt", 1, 4, TIME, 100])
@pytest.mark.parametrize("form", [lstm, bare])
def test_checkpointing_changes_nothing_but_memory(form, checkpoint, params):
    window = stream(rubbish=np.nan)
    expected, plain = summed_gradient(tb.gradient(lstm(), loss), params, tb.split(window, TIME))
    got, metrics = summed_gradient(tb.gradient(form(checkpoint=checkpoint), loss), params, tb.split(window, TIME))
    assert_close(got, expected)
    assert_close(metrics, plain)


def test_linen_nnx_and_the_bare_step_are_one_lstm(params):
    windows = tb.split(stream(rubbish=np.nan), 5)
    expected, metrics = summed_gradient(tb.gradient(lstm(), loss), params, windows)
    assert_close(summed_gradient(tb.gradient(bare(), loss), params, windows), (expected, metrics))
    model, convert = from_nnx()
    got, nnx_metrics = summed_gradient(tb.gradient(model, loss), convert(params), windows)
    assert_close(nnx_metrics, metrics)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(convert(expected)))


def test_an_nnx_module_given_whole_brings_its_own_parameters():
    cell = nnx.GRUCell(FEATURES, UNITS, rngs=nnx.Rngs(7))
    model = tb.from_nnx(cell)
    one, other = (model.init(jax.random.key(i), None) for i in range(2))
    assert_close(one, other)
    made = tb.from_nnx(lambda rngs: nnx.GRUCell(FEATURES, UNITS, rngs=rngs))
    one, other = (jax.tree.leaves(made.init(jax.random.key(i), None))[-1] for i in range(2))
    assert not np.allclose(one, other)


def test_a_stack_is_its_layers_one_after_another(params):
    window = stream()
    layers = (tb.from_linen(nn.GRUCell(4, **F64)), tb.from_linen(nn.SimpleCell(3, **F64), readout=nn.Dense(2, **F64)))
    model = tb.stack(*layers)
    p = model.init(jax.random.key(1), window.inputs)
    carry = model.initial_carry(p, LANES)
    (low, high), outputs = model.unroll(p, carry, window.inputs, window.resets, window.valid)
    end_low, between = layers[0].unroll(p[0], carry[0], window.inputs, window.resets, window.valid)
    end_high, expected = layers[1].unroll(p[1], carry[1], between, window.resets, window.valid)
    assert_close((low, high, outputs), (end_low, end_high, expected))


def test_the_lstm_of_torch_agrees_in_outputs_and_gradients_window_after_window(params):
    x = np.random.default_rng(3).normal(size=(LANES, 12, FEATURES))
    y = np.random.default_rng(4).normal(size=(LANES, 12, 2))
    cell, readout = params["cell"]["params"], params["readout"]["params"]
    theirs, dense = torch.nn.LSTM(FEATURES, UNITS, batch_first=True).double(), torch.nn.Linear(UNITS, 2).double()
    stacked = lambda kind, what: np.concatenate([cell[kind + n][what].T for n in "ifgo"])  # noqa: E731
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.tensor(stacked("i", "kernel")))
        theirs.weight_hh_l0.copy_(torch.tensor(stacked("h", "kernel")))
        theirs.bias_hh_l0.copy_(torch.tensor(stacked("h", "bias")))
        theirs.bias_ih_l0.zero_()
        dense.weight.copy_(torch.tensor(np.array(readout["kernel"]).T))
        dense.bias.copy_(torch.tensor(np.array(readout["bias"])))

    state, total = None, 0.0
    for t in range(0, 12, 4):
        h, state = theirs(torch.tensor(x[:, t : t + 4]), state)
        part = ((dense(h) - torch.tensor(y[:, t : t + 4])) ** 2).sum() / 9
        part.backward()  # gradients add up over the windows
        total += float(part.detach())
        state = tuple(s.detach() for s in state)

    estimate = tb.gradient(lstm(), loss, normaliser=9.0)
    grads, metrics = summed_gradient(estimate, params, tb.split(tb.Window(x, y), 4))
    np.testing.assert_allclose((metrics.loss * metrics.weight).sum() / 9, total, rtol=1e-12)
    got = grads["cell"]["params"]
    for kind, what, expected in (
        ("i", "kernel", theirs.weight_ih_l0),
        ("h", "kernel", theirs.weight_hh_l0),
        ("h", "bias", theirs.bias_hh_l0),
    ):
        np.testing.assert_allclose(
            np.concatenate([got[kind + n][what].T for n in "ifgo"]), expected.grad, rtol=1e-10, atol=1e-12
        )
    np.testing.assert_allclose(grads["readout"]["params"]["kernel"].T, dense.weight.grad, rtol=1e-10, atol=1e-12)


def test_an_initial_carry_that_is_learned_gets_its_gradient_through_every_reset():
    def init(key, inputs):
        return {"start": jnp.array([0.3]), "w": jnp.array(0.9)}

    def step(params, carry, x):
        carry = params["w"] * carry + x
        return carry, carry

    model = tb.from_step(step, init, lambda params, lanes: jnp.broadcast_to(params["start"], (lanes, 1)))
    resets = np.array([[True, False, True, False, False, False]])
    windows = tb.split(tb.Window(np.zeros((1, 6, 1)), resets=resets), 3)
    grads, _ = summed_gradient(tb.gradient(model, lambda y, w: y[..., 0], normaliser=1.0), init(None, None), windows)
    assert np.isclose(grads["start"][0], 0.9 + 0.9**2 + 0.9)  # steps 0 and 1, then 2; the next window's past is cut


def test_a_bfloat16_cell_keeps_a_float32_carry():
    model = tb.from_linen(nn.OptimizedLSTMCell(4, dtype=jnp.bfloat16, param_dtype=jnp.float32))
    x = jnp.ones((2, 5, 3), jnp.bfloat16)
    params = model.init(jax.random.key(0), x)
    carry, _ = model.unroll(params, model.initial_carry(params, 2), x, None, None)
    assert {h.dtype for h in jax.tree.leaves(carry)} == {jnp.dtype("float32")}


def test_a_step_that_computes_in_bfloat16_adds_up_in_the_float32_of_its_carry():
    step = lambda params, carry, x: ((carry + x).astype(jnp.bfloat16), carry)  # noqa: E731
    model = tb.from_step(step, lambda key, inputs: {}, lambda params, lanes: jnp.zeros((lanes, 1), jnp.float32))
    x = jnp.ones((2, 5, 1), jnp.bfloat16)
    carry, outputs = model.unroll({}, model.initial_carry({}, 2), x)
    assert carry.dtype == outputs.dtype == jnp.float32
    assert (carry == 5).all()


def test_a_convolutional_cell_is_told_its_shape():
    model = tb.from_linen(nn.ConvLSTMCell(2, (3, 3)), input_shape=(5, 5, 1))
    x = jnp.ones((2, 3, 5, 5, 1))
    params = model.init(jax.random.key(0), x)
    _, outputs = model.unroll(params, model.initial_carry(params, 2), x, None, None)
    assert outputs.shape == (2, 3, 5, 5, 2)
