import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    (low, high), outputs = jax.jit(model.unroll)(p, carry, window.inputs, window.resets, window.valid)
    end_low, between = jax.jit(layers[0].unroll)(p[0], carry[0], window.inputs, window.resets, window.valid)
    end_high, expected = jax.jit(layers[1].unroll)(p[1], carry[1], between, window.resets, window.valid)
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
    _, outputs = jax.jit(model.unroll)(params, model.initial_carry(params, 2), x, None, None)
    assert outputs.shape == (2, 3, 5, 5, 2)


class Attend(nn.Module):
    """Reads a vocabulary off with the table that it was embedded by."""

    embed: nn.Module

    def __call__(self, h):
        return self.embed.attend(h)


class NnxAttend(nnx.Module):
    def __init__(self, embed):
        self.embed = embed

    def __call__(self, h):
        return self.embed.attend(h)


def tied(kind):
    """A model whose encoder and readout have one table, and where the table is."""
    if kind == "nnx":
        embed = nnx.Embed(5, 8, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        model = tb.from_nnx(
            nnx.GRUCell(8, 8, rngs=nnx.Rngs(1), param_dtype=jnp.float64), encoder=embed, readout=NnxAttend(embed)
        )
        return model, lambda params: params["encoder"]["embedding"].get_value()
    embed = nn.Embed(5, 8, **F64)
    if kind == "lstm":
        model = tb.lstm(8, encoder=embed, readout=Attend(embed))
        return model, lambda params: params["encoder"]["params"]["embedding"]
    model = tb.from_linen(
        nn.GRUCell(8, **F64), encoder=nn.Sequential([embed, nn.Dense(8, **F64)]), readout=Attend(embed)
    )
    return model, lambda params: params["encoder"]["params"]["layers_0"]["embedding"]


@pytest.mark.parametrize("kind", ["linen", "lstm", "nnx"])
def test_a_module_that_is_a_part_of_encoder_and_readout_is_one(kind):
    model, table = tied(kind)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 6)))
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert shapes.count((5, 8)) == 1 and table(params).shape == (5, 8)

    def one_class(params):  # a loss of the readout alone, of tokens that are never read
        return model.unroll(params, model.initial_carry(params, 2), jnp.zeros_like(tokens))[1][..., 3].sum()

    found = table(jax.jit(jax.grad(one_class))(params))
    assert np.abs(found[3]).max() > 0
    assert np.abs(found[0]).max() > 0  # and through the encoder


class OverTime(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "attention":
            return nn.MultiHeadDotProductAttention(2, qkv_features=4)(x)
        if self.how == "norm":
            return x - x.mean(1, keepdims=True)
        if self.how == "norm over lanes":
            return x - x.mean(0, keepdims=True)
        if self.how == "positions":
            return x + self.param("at", nn.initializers.normal(), (x.shape[1], 1))
        if self.how == "bidirectional":
            return nn.Bidirectional(*(nn.RNN(nn.GRUCell(4, **F64)) for _ in range(2)))(x)
        return nn.Conv(3, (2,), padding="CAUSAL", kernel_dilation=int(self.how))(x)


@pytest.mark.parametrize("how", ["1", "100", "attention", "norm", "norm over lanes", "positions", "bidirectional"])
@pytest.mark.parametrize("place", ["encoder", "readout"])
def test_a_module_that_looks_along_time_is_refused_at_init(how, place):
    x = np.ones((2, 6, 3))
    for make in (tb.lstm, lambda n, **parts: tb.from_linen(nn.GRUCell(n, **F64), **parts)):
        with pytest.raises(ValueError, match=rf"The {place} (OverTime|holds|cannot).*|`inputs` has shape") as refused:
            jax.eval_shape(make(4, **{place: OverTime(how)}).init, jax.random.key(0), x)
        assert how == "positions" or (
            f"The {place} OverTime" in str(refused.value) and "tb.from_step" in str(refused.value)
        )


def test_functions_and_nnx_modules_are_found_to_look_along_time_too():
    x = jnp.ones((2, 6, 3))
    ahead = lambda params, x: jnp.roll(x, 1, 1)  # noqa: E731
    step = lambda p, c, x: (c + x, c)  # noqa: E731
    for parts in ({"encoder": ahead}, {"readout": ahead}):
        model = tb.from_step(step, lambda key, x: {}, lambda p, n: jnp.zeros((n, 3)), **parts)
        with pytest.raises(ValueError, match="does not read each step by itself"):
            model.init(jax.random.key(0), x)
    model = tb.from_nnx(lambda rngs: nnx.GRUCell(4, 4, rngs=rngs), encoder=lambda rngs: nnx.Conv(3, 4, (3,), rngs=rngs))
    with pytest.raises(ValueError, match=r"The encoder module does not read each step by itself.*tb\.stack"):
        model.init(jax.random.key(0), x)


def test_what_the_refusal_of_a_convolution_advises_is_the_convolution():
    """The last inputs in a carry, as a layer of its own: the same numbers, in windows of any length."""
    x = np.random.default_rng(0).normal(size=(2, 12, 3))
    conv = nn.Conv(4, (3,), padding="CAUSAL", **F64)
    weights = conv.init(jax.random.key(0), x)["params"]

    def step(params, last, now):
        read = jnp.concatenate([last, now[:, None]], 1)  # [lanes, 3, features]
        return read[:, 1:], jnp.einsum("ltf,tfo->lo", read, params["kernel"]) + params["bias"]

    layer = tb.from_step(step, lambda key, x: weights, lambda params, lanes: jnp.zeros((lanes, 2, 3)))
    model = tb.stack(layer, tb.lstm(8))
    params = model.init(jax.random.key(1), x)
    cut = tb.split(tb.sequences(x), 5)
    _, outputs = read(model, params, cut)
    _, expected = jax.jit(tb.lstm(8).unroll)(
        params[1], tb.lstm(8).initial_carry(params[1], 2), conv.apply({"params": weights}, x)
    )
    np.testing.assert_allclose(outputs.swapaxes(0, 1).reshape(2, -1, 8)[:, :12], expected, atol=1e-12)


STEPWISE = {
    "dense": lambda: nn.Dense(3),
    "norm of features": nn.LayerNorm,
    "half precision": lambda: nn.Dense(64, dtype=jnp.bfloat16),
    "several": lambda: nn.Sequential([nn.Dense(8), nn.gelu, nn.LayerNorm(), nn.Dense(8)]),
}


@pytest.mark.parametrize("name", STEPWISE)
def test_modules_that_read_each_step_by_itself_are_taken(name):
    x, make = np.random.default_rng(0).normal(size=(2, 1, 3)), STEPWISE[name]  # also from a window of one step
    for model in (
        tb.lstm(4, encoder=make(), readout=make()),
        tb.from_linen(nn.GRUCell(4), encoder=make(), readout=make()),
    ):
        jax.eval_shape(model.init, jax.random.key(0), x)
        jax.jit(model.init)(jax.random.key(0), x)


def test_an_encoder_is_given_arrays_of_jax_when_it_is_tried():
    table = lambda params, x: params["table"].at[x].get(mode="clip")  # noqa: E731
    model = tb.from_step(
        lambda p, h, x: (h + x, h),
        lambda key, x: {"table": jnp.ones((5, 3))},
        lambda p, n: jnp.zeros((n, 3)),
        encoder=table,
    )
    model.init(jax.random.key(0), np.zeros((2, 4), int))


@pytest.mark.parametrize("kind", [bool, np.int32, np.float32])
@pytest.mark.parametrize("model", [lstm(), tb.lstm(UNITS, readout=nn.Dense(2, **F64))], ids=["linen", "lstm"])
def test_masks_are_taken_as_numpy_makes_them_outside_of_jit(model, kind):
    params, window = params_of(model), stream(rubbish=np.nan)
    start = model.initial_carry(params, LANES)
    expected = model.unroll(params, start, *map(jnp.asarray, (window.inputs, window.resets, window.valid)))
    got = model.unroll(params, start, window.inputs, window.resets.astype(kind), window.valid.astype(kind))
    assert_close(got[0], expected[0])
    np.testing.assert_array_equal(got[1][window.valid], expected[1][window.valid])


def keyed(typed):
    """Noise drawn by a key of each lane in the carry, which a reset brings back if it is raw."""
    wrap, data = (lambda k: k, lambda k: k) if typed else (jax.random.wrap_key_data, jax.random.key_data)

    def step(params, carry, x):
        keys = jax.vmap(jax.random.split)(wrap(carry["key"]))
        noise = jax.vmap(lambda key: jax.random.normal(key, (UNITS,)))(keys[:, 1])
        h = jnp.tanh(carry["h"] * params["w"] + x @ params["u"] + noise)
        return {"h": h, "key": data(keys[:, 0])}, h[:, :2]

    def init(key, inputs):
        return {"w": jnp.full(UNITS, 0.7), "u": jnp.ones((FEATURES, UNITS))}

    def initial_carry(params, lanes):
        return {"h": jnp.zeros((lanes, UNITS)), "key": data(jax.random.split(jax.random.key(0), lanes))}

    return tb.from_step(step, init, initial_carry)


def test_a_typed_key_in_the_carry_goes_on_and_stands_still_and_no_reset_sets_it_back():
    whole = stream(rubbish=np.nan)
    window = whole._replace(resets=np.zeros_like(whole.resets))  # a raw one is a number like others, and reset
    results = []
    for typed in (True, False):
        model = keyed(typed)
        params = model.init(jax.random.key(0), window.inputs)
        step = tb.train_step(tb.gradient(model, loss, influence=tb.replay(1)), optax.sgd(0.1))
        windows = tb.split(window, 5)
        state = tb.skip_not_finite(step).init(jax.random.key(0), jax.tree.map(lambda x: x[0], windows))
        state, metrics = tb.train_windows(tb.skip_not_finite(step), state, windows)
        end, outputs = jax.jit(model.unroll)(
            params, model.initial_carry(params, LANES), window.inputs, window.resets, window.valid
        )
        results.append((metrics, outputs, end["h"], state.params))
    assert_close(*results, rtol=1e-13)
    model = keyed(True)
    ends = [jax.jit(model.unroll)(params, model.initial_carry(params, LANES), w.inputs, w.resets, w.valid)[0]["key"] for w in (whole, window)]  # fmt: skip
    np.testing.assert_array_equal(*map(jax.random.key_data, ends))
