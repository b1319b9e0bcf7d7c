"""A token or a label out of range is found before compute, with lane and step; what is no index is left alone."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tbptt_jax as tb

V = 5
IDS = np.random.default_rng(0).integers(0, V, (4, 20)).astype(np.int32)
FLAT = np.eye(V)[IDS]


def cross_entropy(outputs, window):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, window.targets)


def table(params, x):
    return params["table"][x]


MODELS = {
    "lstm": tb.lstm(8, encoder=nn.Embed(V, 4), readout=nn.Dense(V)),
    "linen": tb.from_linen(nn.GRUCell(8), encoder=nn.Embed(V, 4), readout=nn.Dense(V)),
    "nnx": tb.from_nnx(
        lambda rngs: nnx.GRUCell(4, 8, rngs=rngs),
        encoder=lambda rngs: nnx.Embed(V, 4, rngs=rngs),
        readout=lambda rngs: nnx.Linear(8, V, rngs=rngs),
    ),
    "step": tb.from_step(
        lambda p, h, x: (h + x, h + x),
        lambda key, x: {"table": jax.random.normal(key, (V, V))},
        lambda p, n: jnp.zeros((n, V)),
        encoder=table,
    ),
}


def indexed(outputs, window):
    """Written with a plain index, which JAX clamps to the last class."""
    lanes, steps = jnp.indices(window.targets.shape)
    return -jax.nn.log_softmax(outputs)[lanes, steps, window.targets]


def with_one(ids, value):
    ids = ids.copy()
    ids[2, 7] = value
    return ids


@pytest.mark.parametrize("loss", [cross_entropy, indexed])
@pytest.mark.parametrize("name", MODELS)
def test_a_token_or_label_out_of_range_is_found_with_its_lane_and_step(name, loss):
    model = MODELS[name]
    params = model.init(jax.random.key(0), IDS)
    step = tb.train_step(tb.gradient(model, loss), optax.sgd(0.1))
    state = step.init(jax.random.key(0), jax.tree.map(lambda x: x[0], tb.split(tb.sequences(IDS, IDS), 5)))
    there = np.ones(IDS.shape, bool)
    there[2, 7] = False
    for value, field in itertools.product((5, 6, -1, -5, -100), ("inputs", "targets")):
        data = (with_one(IDS, value), IDS) if field == "inputs" else (IDS, with_one(IDS, value))
        windows = tb.split(tb.sequences(*data), 5)
        sentence = rf"`{field}` is {value} at windows 1, lanes 2, time 2 \(1 such steps\), and the .* {V} (rows|classes), 0 to 4"
        with pytest.raises(ValueError, match=sentence):
            tb.evaluate(model, loss, params, windows)
        with pytest.raises(ValueError, match=sentence):
            tb.train_windows(step, state, windows)
        with pytest.raises(ValueError, match=r"at lanes 2, time 2 "):
            step.update(state, jax.tree.map(lambda x: x[1], windows))
        # The advice: what is not read, or not scored, may be anything.
        advised = {"valid": there} if field == "inputs" else {"weights": there}
        assert np.isfinite(tb.evaluate(model, loss, params, tb.split(tb.sequences(*data)._replace(**advised), 5)).loss)


def ignoring(outputs, window):
    return jnp.where(
        window.targets < 0,
        0.0,
        optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(window.targets, 0)),
    )


def ignoring_after(outputs, window):
    return jnp.where(window.targets == -100, 0.0, cross_entropy(outputs, window))


def one_hot(outputs, window):
    return optax.softmax_cross_entropy(outputs, jax.nn.one_hot(window.targets, V))


def poisson(outputs, window):
    return (jnp.exp(outputs) - window.targets[..., None] * outputs).mean(-1)


def of_another_field(outputs, window):
    return cross_entropy(outputs, window._replace(targets=window.targets["label"]))


def right(outputs, window):
    return outputs.argmax(-1) == window.targets


def capped(outputs, window):
    return cross_entropy(outputs, window._replace(targets=jnp.minimum(window.targets, V - 1)))


def capped_index(outputs, window):
    return indexed(outputs, window._replace(targets=jnp.minimum(window.targets, V - 1)))


def remainder(outputs, window):
    return cross_entropy(outputs, window._replace(targets=window.targets % V))


LOSSES = {
    **{f"accuracy of {value}": (right, with_one(IDS, value)) for value in (-1, -2, -3, -4, -5, -100, 5, 6)},
    "what is past the last is the last": (capped, with_one(IDS, 7)),
    "what is past the last is the last, by an index": (capped_index, with_one(IDS, 7)),
    "a remainder": (remainder, with_one(IDS, -1)),
    "a loss with its own use for negatives": (ignoring, with_one(IDS, -1)),
    "a loss that leaves -100 out": (ignoring_after, with_one(IDS, -100)),
    "one hot": (one_hot, with_one(IDS, -1)),
    "counts": (poisson, IDS * 40),
    "differences": (poisson, IDS - 3),
    "a number of the row beside the label": (of_another_field, {"label": IDS, "row": np.arange(80).reshape(4, 20) - 7}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_whole_numbers_that_are_no_class_of_the_outputs_are_left_alone(name):
    loss, targets = LOSSES[name]
    params = MODELS["lstm"].init(jax.random.key(0), IDS)
    tb.evaluate(MODELS["lstm"], loss, params, tb.split(tb.sequences(IDS, targets), 5))


@pytest.mark.parametrize(
    "encoder",
    [
        lambda p, x: jax.nn.one_hot(x, V),
        lambda p, x: (x / 300)[..., None] * jnp.ones(V),
        lambda p, x: jnp.abs(x)[..., None] * jnp.ones(V),
        lambda p, x: jnp.asarray(p["w"])[jnp.clip(x, 0, V - 1)],
        lambda p, x: jnp.asarray(p["w"])[x % V],  # buckets
        lambda p, x: jnp.where((x < 0)[..., None], 0, jnp.asarray(p["w"])[jnp.clip(x, 0, V - 1)]),
    ],
    ids=["one hot", "bytes", "sizes", "clipped", "buckets", "missing"],
)
@pytest.mark.parametrize("ids", [IDS * 50, IDS - 3, with_one(IDS, -1)])
def test_whole_numbers_that_index_no_table_are_left_alone(encoder, ids):
    model = tb.from_step(
        lambda p, h, x: (jnp.tanh(h + x @ p["w"]),) * 2,
        lambda key, x: {"w": jax.random.normal(key, (V, V)), "two": jnp.ones((2, V))},
        lambda p, n: jnp.zeros((n, V)),
        encoder=encoder,
    )
    params = model.init(jax.random.key(0), ids)
    tb.evaluate(model, lambda y, w: (y**2).sum(-1), params, tb.split(tb.sequences(ids), 5))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_a_model_s_own_word_for_what_is_past_its_table_is_left_alone(dtype):
    """The gather takes it for the last too, but sends no gradient back."""
    encoders = {"own": lambda p, x: table(p, jnp.minimum(x, V - 1)), "gather": table}
    for name, encoder in encoders.items():
        model = tb.from_step(
            lambda p, h, x: (h + jnp.tanh(x),) * 2,
            lambda key, x: {"table": jax.random.normal(key, (V, V))},
            lambda p, n: jnp.zeros((n, V)),
            encoder=lambda p, x, encoder=encoder: encoder(jax.tree.map(jnp.asarray, p), x),
        )
        windows = tb.split(tb.sequences(with_one(IDS.astype(dtype), 7)), 5)
        params = model.init(jax.random.key(0), IDS.astype(dtype))
        if name == "own":
            tb.evaluate(model, lambda y, w: (y**2).sum(-1), params, windows)
            continue
        with pytest.raises(ValueError, match="`inputs` is 7 at windows 1, lanes 2, time 2"):
            tb.evaluate(model, lambda y, w: (y**2).sum(-1), params, windows)


def test_a_token_is_found_though_the_outputs_lag_a_step_and_a_label_beside_other_figures():
    model = tb.from_step(
        lambda p, h, x: (jnp.tanh(h + x), h),  # the carry it came with
        lambda key, x: {"table": jax.random.normal(key, (V, V))},
        lambda p, n: jnp.zeros((n, V)),
        encoder=table,
    )
    params = model.init(jax.random.key(0), IDS)
    for value in (5, -1):
        with pytest.raises(ValueError, match=f"`inputs` is {value} at"):
            tb.evaluate(model, cross_entropy, params, tb.split(tb.sequences(with_one(IDS, value), IDS), 5))
        figures = lambda outputs, window: {"right": right(outputs, window), "loss": cross_entropy(outputs, window)}  # noqa: E731
        with pytest.raises(ValueError, match=f"`targets` is {value} at"):
            tb.evaluate(model, figures, params, tb.split(tb.sequences(IDS, with_one(IDS, value)), 5))


def test_whole_numbers_of_no_size_and_keys_beside_tokens_are_no_hindrance():
    keys = jax.random.split(jax.random.key(0), IDS.shape)
    model = tb.from_step(
        lambda p, h, x: (
            (jnp.tanh(h + jnp.asarray(p["table"])[x["id"]] + jax.vmap(jax.random.uniform)(x["key"])[:, None]),) * 2
        ),
        lambda key, x: {"table": jax.random.normal(key, (V, V))},
        lambda p, n: jnp.zeros((n, V)),
    )
    params = model.init(jax.random.key(0), inputs := {"id": IDS, "key": keys, "none": np.zeros((4, 20, 0), np.int32)})
    assert np.isfinite(tb.evaluate(model, cross_entropy, params, tb.split(tb.sequences(inputs, IDS), 5)).loss)
    with pytest.raises(ValueError, match="`inputs` is 6 at windows 1, lanes 2, time 2"):
        inputs = {**inputs, "id": with_one(IDS, 6)}
        tb.evaluate(model, cross_entropy, params, tb.split(tb.sequences(inputs, IDS), 5))
    with pytest.raises(ValueError, match="`targets` is -1 at windows 1, lanes 2, time 2"):
        inputs = {**inputs, "id": IDS}
        tb.evaluate(model, cross_entropy, params, tb.split(tb.sequences(inputs, with_one(IDS, -1)), 5))


def test_windows_that_a_program_holds_as_constants_are_checked_when_it_is_traced():
    model = MODELS["lstm"]
    params = model.init(jax.random.key(0), IDS)
    windows = tb.split(tb.sequences(jnp.asarray(IDS), jnp.asarray(with_one(IDS, 6))), 5)
    good = windows._replace(targets=windows.inputs)
    assert np.isfinite(jax.jit(lambda p: tb.evaluate(model, cross_entropy, p, good).loss)(params))
    with pytest.raises(ValueError, match="`targets` is 6 at windows 1, lanes 2, time 2"):
        jax.jit(lambda p: tb.evaluate(model, cross_entropy, p, windows).loss)(params)
