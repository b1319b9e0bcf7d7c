"""Lanes over two devices; `conftest` gives the tests' CPU two of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import assert_close, first, loss, lstm, stream

import tbptt_jax as tb
from tbptt_jax import sharding

MESH = jax.make_mesh((2,), ("lane",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("normaliser", [None, 7.0])
@pytest.mark.parametrize("influence", [tb.truncate(), tb.replay(2)], ids=["truncate", "replay"])
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
    text = jax.jit(estimate.update).lower(params, state, window).compile().as_text()
    assert len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)) == 1
    assert not re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    entry = text[text.index("ENTRY") :]
    assert "all-reduce" in entry and "while(" in entry  # once, beside the loops over time


def test_lanes_that_do_not_divide_are_refused():
    estimate = sharding.over_lanes(tb.gradient(lstm(), loss), MESH)
    with pytest.raises(ValueError, match="3 lanes cannot be spread evenly over 2 devices: give a multiple of 2"):
        estimate.init(jax.random.key(0), None, tb.Window(np.zeros((3, 5, 2))))
    other = jax.make_mesh((2,), ("run",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="lanes are spread over an axis named 'lane'"):
        sharding.over_lanes(tb.gradient(lstm(), loss), other)
