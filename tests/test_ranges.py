"""A token or a label out of range is found before compute, with lane and step; what is no index is left alone."""

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
@pytest.mark.parametrize("value", [5, 6, -1, -5, -100])
def test_a_token_or_label_out_of_range_is_found_with_its_lane_and_step(name, value, loss):
    model = MODELS[name]
    params = model.init(jax.random.key(0), IDS)
    step = tb.train_step(tb.gradient(model, loss), optax.sgd(0.1))
    for field, data in (("inputs", (with_one(IDS, value), IDS)), ("targets", (IDS, with_one(IDS, value)))):
        windows = tb.split(tb.sequences(*data), 5)
        sentence = rf"`{field}` is {value} at windows 1, lanes 2, time 2 \(1 such steps\), and the .* {V} (rows|classes), 0 to 4"
        with pytest.raises(ValueError, match=sentence):
            tb.evaluate(model, loss, params, windows)
        state = step.init(jax.random.key(0), jax.tree.map(lambda x: x[0], windows))
        with pytest.raises(ValueError, match=sentence):
            tb.train_windows(step, state, windows)
        with pytest.raises(ValueError, match=r"at lanes 2, time 2 "):
            step.update(state, jax.tree.map(lambda x: x[1], windows))
        # The advice: what is not read, or not scored, may be anything.
        there = np.ones(IDS.shape, bool)
        there[2, 7] = False
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


LOSSES = {
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
    ],
    ids=["one hot", "bytes", "sizes"],
)
@pytest.mark.parametrize("ids", [IDS * 50, IDS - 3, with_one(IDS, -1)])
def test_whole_numbers_that_index_no_table_are_left_alone(encoder, ids):
    model = tb.from_step(
        lambda p, h, x: (jnp.tanh(h + x @ p["w"]), h),
        lambda key, x: {"w": jax.random.normal(key, (V, V)), "two": jnp.ones((2, V))},
        lambda p, n: jnp.zeros((n, V)),
        encoder=encoder,
    )
    params = model.init(jax.random.key(0), ids)
    tb.evaluate(model, lambda y, w: (y**2).sum(-1), params, tb.split(tb.sequences(ids), 5))
