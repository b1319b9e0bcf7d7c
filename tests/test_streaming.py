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


def test_it_is_compiled_once_for_all_parameters_and_a_carry_can_be_gone_back_to():
    traced = []

    def step(params, carry, x):
        traced.append(x.shape)
        return params * carry + x, carry

    model = tb.from_step(step, lambda key, inputs: jnp.float64(0.7), lambda params, lanes: jnp.zeros((lanes, 2)))
    start, x = jnp.ones((LANES, 2)), jnp.ones((LANES, 2))
    first, again = (tb.streaming(model, jnp.float64(0.5))(start, x) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    once = len(traced)
    np.testing.assert_array_equal(tb.streaming(model, jnp.float64(0.1))(start, x)[0], 1.1)
    assert len(traced) == once


@pytest.mark.parametrize("name", ["linen", "lstm", "stack"])
def test_a_lane_begins_anew_stands_still_or_is_spoilt_by_itself(name):
    model = MODELS[name]
    x = np.random.default_rng(1).normal(size=(4, LANES, 2))
    params = jax.tree.map(lambda p: p.astype(jnp.float64), model.init(jax.random.key(0), x))
    predict, start = tb.streaming(model, params), model.initial_carry(params, LANES)
    carry, _ = predict(start, x[0])
    lane = np.arange(LANES)

    def lanes(tree, which):
        return jax.tree.map(lambda leaf: np.asarray(leaf)[which], tree)

    plain, anew = predict(carry, x[1]), predict(start, x[1])
    spoilt = np.where(lane[:, None] == 2, np.nan, x[1])
    after = predict(carry, spoilt, resets=lane == 0, valid=lane != 1)
    for which, wanted in ((0, anew), (slice(1, 2), (carry, None))):
        jax.tree.map(np.testing.assert_array_equal, lanes(after[0], which), lanes(wanted[0], which))
    np.testing.assert_array_equal(after[1][0], anew[1][0])
    assert np.isnan(after[1][2]).all()
    others = predict(carry, spoilt)
    jax.tree.map(np.testing.assert_array_equal, lanes(others, slice(0, 2)), lanes(plain, slice(0, 2)))
    back = predict(others[0], x[2], resets=lane == 2)
    jax.tree.map(np.testing.assert_array_equal, lanes(back, 2), lanes(predict(start, x[2]), 2))


@pytest.mark.parametrize("name", ["linen", "lstm"])
@pytest.mark.parametrize(
    "x, said",
    [
        (jnp.float32(1.0), r"has shape \[\]; it needs the axes \[lanes, ...\]"),
        (None, "no inputs"),
        (np.ones((LANES + 1, 2)), "carry does not fit"),
        (np.ones(2), "carry does not fit"),  # lanes forgotten
        (np.ones(LANES), "The model cannot take|What reaches"),
        (np.ones((LANES, 5)), "The model cannot take|What reaches"),
        (np.array([["a", "b"]] * LANES), r"cannot take the step `x`, <U1\[3, 2\]: it needs numbers"),
        ("now", "cannot take the step `x`, 'now': it needs numbers"),
    ],
)
def test_what_does_not_fit_is_a_sentence(name, x, said):
    model = MODELS[name]
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
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["0", "1"]

    with pytest.raises(ValueError, match="no directory"):
        tb.checkpoint.load(tmp_path / "nowhere", like)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        tb.checkpoint.load(tmp_path / "empty", like)
    with pytest.raises(ValueError, match="another run"):
        tb.checkpoint.load(tmp_path / "served", jax.eval_shape(lambda: (params, model.initial_carry(params, 1))))


def test_what_is_kept_neither_takes_a_runs_place_nor_disturbs_who_is_writing(tmp_path):
    model = MODELS["linen"]
    params = model.init(jax.random.key(0), jnp.zeros((LANES, 1, 2)))
    state = params, model.initial_carry(params, LANES)
    with tb.checkpoint.open(tmp_path / "run", {"window": 16}) as store:
        store.save(10, {"x": jnp.zeros(3)}, None)
    tb.checkpoint.save(tmp_path / "served", state)
    for directory, other, said in (
        ("run", state, "of another run: there window 16"),
        (
            "served",
            (params, model.initial_carry(params, 1)),
            "of another run: there `1.0` .*begin in another directory",
        ),
    ):
        before = sorted((tmp_path / directory).rglob("*"))
        for call in (tb.checkpoint.save, tb.checkpoint.load):
            with pytest.raises(ValueError, match=said):
                call(tmp_path / directory, other)
        assert sorted((tmp_path / directory).rglob("*")) == before

    half = tmp_path / "served" / "1.orbax-checkpoint-tmp"
    half.mkdir()
    jax.tree.map(np.testing.assert_array_equal, tb.checkpoint.load(tmp_path / "served", state), state)
    assert half.exists()
    for path in (tmp_path / "served" / "0").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"served/0 is broken: .* No other is left"):
        tb.checkpoint.load(tmp_path / "served", state)


def test_a_broken_state_is_told_of_and_the_one_before_it_loaded(tmp_path):
    for number in (1.0, 2.0):
        tb.checkpoint.save(tmp_path, {"x": jnp.full(3, number)})
    (tmp_path / "1" / "run" / "metadata").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match=rf"{tmp_path}/1 is broken: .* The one before it, 0, is used"):
        assert tb.checkpoint.load(tmp_path, {"x": jnp.zeros(3)})["x"].tolist() == [1, 1, 1]
    assert sorted(tmp_path.rglob("*")) == before  # it is not for who reads to change what is there
