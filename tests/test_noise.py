"""What is drawn: in training alone, by a key of each lane, the same wherever, beside whichever lanes and however often it is read."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from streams import F64, FEATURES, LANES, UNITS, assert_close, first, loss, some, stream

import tbptt_jax as tb
from tbptt_jax import noise, sharding, testing

CELL = F64 | {"kernel_init": some, "recurrent_kernel_init": some}


class DropCell(nn.GRUCell):
    """A cell that drops what it reads."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, carry, x):
        return super().__call__(carry, nn.Dropout(self.rate, deterministic=False)(x))


def linen(rate, part, **options):
    drop = nn.Sequential([nn.Dropout(rate, deterministic=False), nn.Dense(2, **F64)])
    cell = DropCell(UNITS, rate=rate, **CELL) if part == "cell" else nn.GRUCell(UNITS, **CELL)
    readout = drop if part == "readout" else nn.Dense(2, **F64)
    return tb.from_linen(cell, encoder=drop if part == "encoder" else None, readout=readout, **options)


def nnx_readout(rate, **options):
    def readout(rngs):
        return nnx.Sequential(nnx.Dropout(rate, rngs=rngs), nnx.Linear(UNITS, 2, param_dtype=jnp.float64, rngs=rngs))

    cell = lambda rngs: nnx.GRUCell(FEATURES, UNITS, param_dtype=jnp.float64, rngs=rngs)  # noqa: E731
    return tb.from_nnx(cell, readout=readout, **options)


def by_hand(rate, **options):
    def step(params, h, x, key=None):
        if key is not None:
            h = h * jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (UNITS,)))(key) / (1 - rate)
        h = jnp.tanh(h @ params["w"] + x @ params["u"])
        return h, h[:, :2]

    def init(key, inputs):
        return {"w": jax.random.normal(key, (UNITS, UNITS)), "u": jax.random.normal(key, (FEATURES, UNITS))}

    return tb.from_step(step, init, lambda params, lanes: jnp.zeros((lanes, UNITS)), **options)


def layers(rate, **options):
    drops = {"dropout": rate, "input_dropout": rate}
    return tb.lstm(UNITS, layers=2, readout=nn.Dense(2, **F64), **drops, **options)


def drop_and_zoneout(rate, make=tb.lstm, **options):
    return make(UNITS, layers=2, readout=nn.Dense(2, **F64), weight_drop=rate, zoneout=rate, **options)


def stacked(rate, **options):
    hidden = tb.from_linen(nn.GRUCell(UNITS, **CELL), readout=nn.Dropout(rate, deterministic=False), **options)
    return tb.stack(hidden, by_hand_on(UNITS, rate, **options))


def by_hand_on(inputs, rate, **options):
    model = by_hand(rate, **options)
    return model._replace(init=lambda key, x: {**model.init(key, x), "u": jax.random.normal(key, (inputs, UNITS))})


NOISE = {
    "a step of one's own": by_hand,
    "linen encoder": functools.partial(linen, part="encoder"),
    "linen cell": functools.partial(linen, part="cell"),
    "linen readout": functools.partial(linen, part="readout"),
    "nnx readout": nnx_readout,
    "between fused layers": layers,
    "weights and units of the LSTM": drop_and_zoneout,
    "weights and units of the GRU": functools.partial(drop_and_zoneout, make=tb.gru),
    "stacked": stacked,
}
every = pytest.mark.parametrize("make", NOISE.values(), ids=NOISE)
draws = pytest.mark.parametrize("draw", ["window", "step"])
HELD = (by_hand, "step"), (functools.partial(linen, part="encoder"), "window"), (functools.partial(linen, part="cell"), "step"), (nnx_readout, "window")  # fmt: skip


def params_of(model):
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, FEATURES)))
    return jax.tree.map(lambda p: 1.5 * p.astype(jnp.float64) + 0.1, params)


def outputs(model, params, window, keys, lanes=slice(None)):
    window = jax.tree.map(lambda x: x[lanes], window)
    carry = model.initial_carry(params, len(window.valid))
    draws = {} if keys is None else {"key": keys}
    return jax.jit(model.unroll)(params, carry, window.inputs, window.resets, window.valid, **draws)


@pytest.mark.parametrize(("make", "draw"), HELD, ids=["step", "linen encoder", "linen cell", "nnx readout"])
def test_what_is_drawn_keeps_the_laws_of_a_recurrence(make, draw):
    testing.check_recurrence(make(0.5, draw=draw), stream(lanes=3, time=8).inputs)


@draws
@pytest.mark.parametrize("make", [by_hand, stacked, layers], ids=["step", "stacked", "between fused layers"])
def test_a_lane_draws_the_same_in_segments_and_another_with_other_keys(make, draw):
    model, window, keys = make(0.5, draw=draw), stream(rubbish=np.nan), noise.lane_keys(jax.random.key(1), LANES)
    params = params_of(model)
    whole = outputs(model, params, window, keys)
    assert_close(outputs(make(0.5, draw=draw, checkpoint=4), params, window, keys), whole)
    other = outputs(model, params, window, noise.lane_keys(jax.random.key(2), LANES))
    assert not np.allclose(other[1], whole[1])


@every
def test_without_a_key_and_at_rate_0_nothing_is_drawn(make):
    window, keys = stream(), noise.lane_keys(jax.random.key(1), LANES)
    never, model = make(0.0), make(0.5)
    params = params_of(model)
    without, (carry, y) = outputs(never, params, window, None), outputs(model, params, window, None)
    jax.tree.map(np.testing.assert_array_equal, outputs(never, params, window, keys), without)
    if "zoneout" not in str(make):  # which is then the mean over its draws
        jax.tree.map(np.testing.assert_array_equal, (carry, y), without)
    assert "random_bits" not in str(jax.make_jaxpr(lambda: outputs(model, params, window, None))())
    end, read = tb.predict(model, params, tb.split(window, 5))
    assert_close((end, tb.join(read, like=window)[window.valid]), (carry, y[window.valid]))


class Identity(nn.RNNCellBase):
    """Its outputs are what it reads, perhaps dropped."""

    drop: bool = False

    @nn.compact
    def __call__(self, carry, x):
        return carry, nn.Dropout(0.5, deterministic=False)(x) if self.drop else x

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 1))

    @property
    def num_feature_axes(self):
        return 1


@draws
@pytest.mark.parametrize("part", ["encoder", "cell", "readout"])
def test_a_mask_holds_for_a_window_or_a_step_and_is_a_lanes_own(part, draw):
    parts = {} if part == "cell" else {part: nn.Dropout(0.5, deterministic=False)}
    model = tb.from_linen(Identity(drop=part == "cell"), draw=draw, **parts)
    masks = np.stack([
        outputs(model, params_of(model), tb.sequences(np.ones((3, 5, 32)), lengths=np.full(3, 5)), keys)[1]
        for keys in (noise.lane_keys(jax.random.key(i), 3) for i in range(2))
    ])  # fmt: skip
    assert set(np.unique(masks)) == {0.0, 2.0}
    rows = masks.reshape(-1, 32) if draw == "step" else masks[:, :, 0].reshape(-1, 32)
    assert len(np.unique(rows, axis=0)) == len(rows)  # no two lanes, windows or steps alike
    assert draw == "step" or (masks == masks[:, :, :1]).all()


@pytest.mark.parametrize("influence", [tb.truncate(), tb.replay(2), tb.uoro(), tb.rtrl()], ids=["truncate", "replay", "uoro", "rtrl"])  # fmt: skip
def test_two_devices_and_a_resumed_run_draw_what_one_that_goes_on_does(influence, tmp_path):
    windows = tb.split(stream(time=20), 5)
    halves = [
        jax.tree.map(lambda x, at=at: x[at], windows) for at in (slice(2), slice(2, None))
    ]  # one program for both
    plain = tb.gradient(stacked(0.5), loss, influence=influence)
    step = tb.train_step(plain, optax.adam(1e-2))
    begun = jax.device_put(step.init(jax.random.key(0), first(windows)), jax.devices()[0])  # as what is loaded
    half, _ = tb.train_windows(step, begun, halves[0])
    tb.checkpoint.save(tmp_path, half)
    resumed, _ = tb.train_windows(step, tb.checkpoint.load(tmp_path, like=half), halves[1])
    whole, metrics = tb.train_windows(step, half, halves[1])
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    mesh = sharding.mesh(lane=2)
    spread = tb.train_step(sharding.over_lanes(plain, mesh), optax.adam(1e-2))
    on_two = spread.init(jax.random.key(0), first(windows))
    for half in halves:
        on_two, other = tb.train_windows(spread, on_two, sharding.place(half, mesh))
    assert_close((on_two.params, other), (whole.params, metrics), rtol=1e-8, atol=1e-10)


@draws
@pytest.mark.parametrize("make", [functools.partial(linen, part="readout"), nnx_readout], ids=["linen", "nnx"])
def test_the_mean_over_draws_of_a_linear_model_is_the_model_without(make, draw):
    model, window = make(0.3, draw=draw), stream(lanes=2, time=6)
    params = params_of(model)
    each = jax.jit(jax.vmap(lambda key: outputs(model, params, window, noise.lane_keys(key, 2))[1]))
    y = np.asarray(each(jax.random.split(jax.random.key(0), 4000)))
    expected = np.asarray(outputs(model, params, window, None)[1])
    error = (y.mean(0) - expected) / (y.std(0) / len(y) ** 0.5 + 1e-12)
    assert np.abs(error).max() < 5


class Always(nn.Module):
    """Draws without being asked."""

    @nn.compact
    def __call__(self, x):
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class IfTold(nn.Module):
    """Adds a number that is drawn, in training."""

    @nn.compact
    def __call__(self, x, train):
        return x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x


def test_a_module_with_an_argument_train_is_told_and_one_that_always_draws_is_refused():
    x = jnp.zeros((2, 3, FEATURES))
    model = tb.from_linen(Identity(), readout=IfTold())
    window = tb.sequences(np.zeros((2, 3, FEATURES)), lengths=np.full(2, 3))
    assert not outputs(model, model.init(jax.random.key(0), x), window, None)[1].any()
    assert outputs(model, model.init(jax.random.key(0), x), window, noise.lane_keys(jax.random.key(0), 2))[1].any()
    for part in ("encoder", "readout"):
        with pytest.raises(ValueError, match=f"The {part} draws where no key is given"):
            tb.from_linen(nn.GRUCell(2), **{part: Always()}).init(jax.random.key(0), x)

    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

        def __call__(self, x):
            return x + jax.random.normal(self.rngs.noise(), x.shape)

    with pytest.raises(ValueError, match="The readout draws where no key is given"):
        tb.from_nnx(lambda rngs: nnx.GRUCell(FEATURES, 2, rngs=rngs), readout=lambda rngs: Noisy(rngs)).init(
            jax.random.key(0), x
        )
    with pytest.raises(ValueError, match="a key for each of 2 lanes"):
        model.unroll({}, model.initial_carry({}, 2), x, key=jax.random.key(0))
