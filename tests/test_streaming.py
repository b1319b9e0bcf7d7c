"""A model read step by step is the model read in windows; what is served is kept with its carry."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbptt_jax as tb

LANES, STEPS = 3, 12
MODELS = {
    "linen": tb.from_linen(nn.OptimizedLSTMCell(4, param_dtype=jnp.float64), encoder=nn.Dense(3), readout=nn.Dense(2)),
    "lstm": tb.lstm(4, layers=2, readout=nn.Dense(2)),
    "stack": tb.stack(tb.from_linen(nn.GRUCell(3, param_dtype=jnp.float64)), tb.lstm(2)),
    "step": tb.from_step(
        lambda params, carry, x: (0.5 * carry + params * x["a"], (carry, x["b"])),
        lambda key, inputs: jnp.float64(0.7),
        lambda params, lanes: jnp.zeros((lanes, 2)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_its_outputs_are_those_of_windows(name):
    model = MODELS[name]
    x = np.random.default_rng(0).normal(size=(LANES, STEPS, 2))
    inputs = {"a": x, "b": x[..., 0]} if name == "step" else x
    params = model.init(jax.random.key(0), inputs)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    start = model.initial_carry(params, LANES)

    by_windows, outputs = start, []
    for first in range(0, STEPS, 5):  # windows of 5, 5 and 2
        window = jax.tree.map(lambda x, first=first: x[:, first : first + 5], inputs)
        by_windows, y = model.unroll(params, by_windows, window, None, None)
        outputs.append(y)
    wanted = jax.tree.map(lambda *y: np.concatenate(y, 1), *outputs)

    predict, carry, told = tb.streaming(model, params), start, []
    for t in range(STEPS):
        carry, y = predict(carry, jax.tree.map(lambda x, t=t: x[:, t], inputs))
        told.append(y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
        (jax.tree.map(lambda *y: np.stack(y, 1), *told), carry),
        (wanted, by_windows),
    )


def test_it_is_compiled_once_and_a_carry_can_be_gone_back_to():
    model = MODELS["lstm"]
    params = model.init(jax.random.key(0), jnp.zeros((LANES, 1, 2)))
    predict, start = tb.streaming(model, params), model.initial_carry(params, LANES)
    first = predict(start, jnp.ones((LANES, 2)))
    size = predict.func._cache_size()
    again = predict(start, jnp.ones((LANES, 2)))
    assert predict.func._cache_size() == size
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize(
    "x, said", [(jnp.float32(1.0), "without axes"), (jnp.ones((LANES + 1, 2)), "carry does not fit")]
)
def test_what_does_not_fit_is_a_sentence(x, said):
    model = MODELS["lstm"]
    params = model.init(jax.random.key(0), jnp.zeros((LANES, 1, 2)))
    with pytest.raises(ValueError, match=said):
        tb.streaming(model, params)(model.initial_carry(params, LANES), x)


def test_params_and_carry_are_kept_together_bit_for_bit(tmp_path):
    model = MODELS["linen"]
    params = model.init(jax.random.key(0), jnp.zeros((LANES, 1, 2)))
    carry, _ = tb.streaming(model, params)(model.initial_carry(params, LANES), jnp.ones((LANES, 2)))
    for state in ((params, model.initial_carry(params, LANES)), (params, carry)):  # the second takes the first's place
        tb.checkpoint.save(tmp_path / "served", state)
    like = jax.eval_shape(lambda: (params, carry))
    jax.tree.map(np.testing.assert_array_equal, tb.checkpoint.load(tmp_path / "served", like), (params, carry))
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["1"]

    with pytest.raises(ValueError, match="no directory"):
        tb.checkpoint.load(tmp_path / "nowhere", like)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        tb.checkpoint.load(tmp_path / "empty", like)
    with pytest.raises(ValueError, match="another run"):
        tb.checkpoint.load(tmp_path / "served", jax.eval_shape(lambda: (params, model.initial_carry(params, 1))))
