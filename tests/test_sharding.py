"""Lanes over two devices; `conftest` gives the tests' CPU two of them."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import F64, UNITS, assert_close, compiled, first, loss, lstm, stream

import tbptt_jax as tb
from tbptt_jax import checkpoint, sharding

MESH = sharding.mesh(lane=2)


@pytest.mark.parametrize("normaliser", [None, 7.0])
@pytest.mark.parametrize("influence", [tb.truncate(), tb.replay(3, survival=0.6)], ids=["truncate", "random replay"])
def test_two_devices_train_as_one_does(influence, normaliser):
    estimate, windows = (
        tb.gradient(lstm(), loss, influence=influence, normaliser=normaliser),
        tb.split(stream(rubbish=np.nan), 5),
    )
    results = []
    for each, cut in ((estimate, windows), (sharding.over_lanes(estimate, MESH), sharding.place(windows, MESH))):
        step = tb.train_step(each, optax.adam(1e-2))
        state, metrics = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), cut)
        results.append(jax.tree.map(np.asarray, (state.params, metrics)))
    assert_close(results[1], results[0], rtol=1e-9)


@pytest.mark.parametrize("model", [lstm(), tb.lstm(3)], ids=["linen", "fused"])
def test_the_devices_speak_once_a_window_and_not_inside_the_scan(model):
    estimate = sharding.over_lanes(tb.gradient(model, lambda y, w: jnp.sum(y**2, -1)), MESH)
    window = first(tb.split(stream(), 5))
    params = model.init(jax.random.key(0), window.inputs)
    state = estimate.init(jax.random.key(0), params, window)
    text = compiled(jax.jit(estimate.update).lower(params, state, window)).as_text()
    assert len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)) == 1
    assert not re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    entry = text[text.index("ENTRY") :]
    assert "all-reduce" in entry and "while(" in entry  # once, beside the loops over time


INFLUENCES = {
    "truncate": tb.truncate(),
    "replay": tb.replay(3),
    "random replay": tb.replay(3, survival=0.6),
    "rtrl": tb.rtrl(),
    "uoro": tb.uoro(),
}


begun = functools.cache(lambda step: step.init(jax.random.key(0), first(tb.split(stream(), 4))))


def trained(step, windows, directory):
    """Goes on with the run in ``directory``, or with a new one saved there, and saves: parameters, carry and metrics."""
    fresh = begun(step)
    like = jax.eval_shape(lambda: fresh)
    with checkpoint.open(directory, {}) as store:
        if store.restore(like) is None:
            store.save(0, fresh, None)
        state, metrics = tb.train_windows(step, store.restore(like).state, windows)
        store.save(int(state.updates), state, None)
    return jax.device_get((state.params, state.stream.carry, metrics))


def over(devices, influence, model):
    estimate = tb.gradient(model, loss, influence=influence)
    return tb.train_step(sharding.over_lanes(estimate, sharding.mesh(lane=devices)), optax.adam(1e-2))


@pytest.mark.parametrize("name", ["truncate", "random replay", "rtrl", "uoro", "replay of lstm"])
def test_a_checkpoint_goes_on_with_another_number_of_devices(tmp_path, name):
    fused = tb.lstm(UNITS, readout=nn.Dense(2, **F64))
    influence, model = INFLUENCES[name.removesuffix(" of lstm")], fused if name.endswith("of lstm") else lstm()
    one, two = (over(devices, influence, model) for devices in (1, 2))
    windows = tb.split(stream(), 4)
    early, late = (jax.tree.map(lambda x, part=part: x[part], windows) for part in (slice(3), slice(3, None)))
    expected = trained(one, early, tmp_path / "one"), trained(one, late, tmp_path / "one")
    for i, (before, after) in enumerate([(two, one), (one, two)]):
        got = trained(before, early, tmp_path / str(i)), trained(after, late, tmp_path / str(i))
        assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_an_influence_that_every_device_has_its_own_of_is_refused_on_another_number_and_says_why(tmp_path):
    shared = tb.Influence(  # a number for all lanes together
        lambda params, carry, vjp: jnp.zeros(3),
        lambda state, cotangent: None,
        lambda state, linearisation, key: state + 1,
    )
    windows = tb.split(stream(), 4)
    trained(over(2, shared, lstm()), windows, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"influence.*\[2, 3\], here .*\[1, 3\].* every device has its own, 2 then and 1 here: run with 2",
    ):
        trained(over(1, shared, lstm()), windows, tmp_path)


def lru():
    """Complex carry and parameters, beside real ones."""
    init = lambda key, x: {"a": jnp.array([0.5 + 0.6j, 0.7 - 0.2j]), "b": jnp.ones((2, 2))}  # noqa: E731

    def step(params, h, x):
        h = params["a"] * h + x @ params["b"]
        return h, h.real

    return tb.from_step(step, init, lambda params, lanes: jnp.zeros((lanes, 2), complex))


@pytest.mark.parametrize("influence", [tb.rtrl(), tb.uoro()], ids=["rtrl", "uoro"])
def test_of_complex_parameters_too_every_influence_is_spread_and_stays_what_it_is(influence):
    windows, spread = tb.split(stream(), 5), []
    for mesh in (sharding.mesh(lane=1), MESH):
        estimate = sharding.over_lanes(tb.gradient(lru(), loss, influence=influence), mesh)
        step = tb.train_step(estimate, optax.sgd(1e-2))
        state, _ = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
        spread.append(jax.device_get(state.params))
    assert_close(*spread, rtol=1e-9)


@pytest.mark.parametrize("normaliser", [None, 7.0])
def test_several_losses_each_with_weights_of_its_own_are_spread_as_on_one_device(normaliser):
    window = stream()
    weights = {
        "one": window.weights,
        "other": np.where(np.arange(len(window.weights))[:, None] < 1, 0.0, 1.0)[:, :1] + 0 * window.weights,
    }
    windows = tb.split(window._replace(weights=weights), 5)
    both = lambda outputs, window: {"one": loss(outputs, window), "other": outputs[..., 0] ** 2}  # noqa: E731
    estimate, results = tb.gradient(lstm(), both, influence=tb.replay(2), normaliser=normaliser), []
    for each in (estimate, sharding.over_lanes(estimate, MESH)):
        step = tb.train_step(each, optax.sgd(1e-1))
        state, metrics = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
        results.append(jax.device_get((state.params, metrics)))
    assert_close(*results, rtol=1e-9)


def test_trainings_side_by_side_are_those_of_vmap_also_where_they_do_not_divide():
    windows = tb.split(stream(), 5)
    step = tb.train_step(tb.gradient(lstm(), loss), optax.adam(1e-2))

    def train(key, rate):
        state, metrics = tb.train_windows(step, step.init(key, first(windows)), windows)
        return jax.tree.map(lambda p: rate * p, state.params), metrics

    keys, rates = jax.random.split(jax.random.key(0), 3), jnp.arange(3.0)
    program = compiled(jax.jit(sharding.over_runs(train, sharding.mesh(run=2))).lower(keys, rates))
    assert_close(jax.device_get(program(keys, rates)), jax.device_get(jax.vmap(train)(keys, rates)), rtol=1e-9)
    loops = program.as_text().split("ENTRY")[0]
    assert not re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", loops)  # none waits for another


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ValueError, match=r"2 x 2 devices was asked for, and there are 2.*jax_num_cpu_devices"):
        sharding.mesh(run=2, lane=2)


@pytest.mark.parametrize(
    "lanes, window, units, at_most, devices",
    [
        (16, 1, 64, None, 2),
        (16, 128, 512, 1000, 2),
        (16, 128, 512, 1, 1),
        (17, 128, 128, None, 1),
        (14, 128, 128, None, 1),  # too few lanes for each, too small products, too short windows, too large copies
        (16, 128, 63, None, 1),
        (16, 127, 512, None, 1),
        (16, 1000, 513, None, 1),
    ],
)
def test_a_cpu_spreads_lanes_where_that_is_faster(lanes, window, units, at_most, devices):
    assert sharding.lane_devices(lanes, window, units, at_most) == devices


@pytest.mark.parametrize(("sizes", "message"), [((0, 9, 128), "`lanes` is 0"), ((16, 9, 128, 0), "`at_most` is 0")])
def test_lane_devices_wants_whole_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.lane_devices(*sizes)


def test_accelerators_are_all_used(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [sharding.lane_devices(lanes, 1, 1150) for lanes in (2, 3)] == [2, 1]


def test_each_process_reads_as_many_lanes_as_the_others(monkeypatch):
    assert sharding.own_lanes(6) == slice(0, 6)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert sharding.own_lanes(6) == slice(2, 4)
    with pytest.raises(ValueError, match=r"7 lanes cannot be read by 3 processes.* give a multiple of 3"):
        sharding.own_lanes(7)


def test_lanes_that_do_not_divide_are_refused():
    estimate = sharding.over_lanes(tb.gradient(lstm(), loss), MESH)
    with pytest.raises(ValueError, match="3 lanes cannot be spread evenly over 2 devices: give a multiple of 2"):
        estimate.init(jax.random.key(0), None, tb.Window(np.zeros((3, 5, 2))))
    other = jax.make_mesh((2,), ("run",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="lanes are spread over an axis named 'lane'"):
        sharding.over_lanes(tb.gradient(lstm(), loss), other)
    with pytest.raises(ValueError, match=r"`mesh` is 2; it needs to be a mesh of devices"):
        sharding.over_lanes(tb.gradient(lstm(), loss), 2)
