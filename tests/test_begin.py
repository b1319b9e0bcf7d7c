"""What a lane begins from: learned, or given by the data of its first valid step; wherever it is cut, reset or padded."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from streams import F64, FEATURES, UNITS, assert_close, loss, stream, summed_gradient

import tbptt_jax as tb


def linen(**options):
    return tb.from_linen(nn.GRUCell(UNITS, **F64), readout=nn.Dense(2, **F64), **options)


def of_nnx(**options):
    cell = lambda rngs: nnx.GRUCell(FEATURES, UNITS, param_dtype=jnp.float64, rngs=rngs)  # noqa: E731
    readout = lambda rngs: nnx.Linear(UNITS, 2, param_dtype=jnp.float64, rngs=rngs)  # noqa: E731
    return tb.from_nnx(cell, readout=readout, **options)


def layers(make=tb.lstm, **options):
    return make(UNITS, layers=2, readout=nn.Dense(2, **F64), **options)


MODELS = {
    "linen": linen,
    "nnx": of_nnx,
    "fused": layers,
    "gru": functools.partial(layers, tb.gru),
    "scan": functools.partial(layers, implementation="scan"),
}


def params_of(model):
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, FEATURES)))
    return jax.tree.map(lambda p: 1.5 * p.astype(jnp.float64) + 0.1, params)


def given(params, x):
    """A carry of the right tree for each model, of its first step's inputs."""
    h = jnp.tanh(x @ jnp.arange(1.0, 1 + FEATURES * UNITS).reshape(FEATURES, UNITS)) * params["scale"]
    if not isinstance(params["cell"], tuple):
        return h
    return ((h, 2 * h), (-h, h)) if len(params["cell"][0].input[0]) == 4 * UNITS else (h, -h)


def alone(model, params, start, window):
    """Each lane by itself, cut by hand where it is reset: outputs at valid steps, from ``start(params, x)``."""
    outputs, unroll = np.zeros((*window.valid.shape, 2)), jax.jit(model.unroll)
    for lane in range(len(window.valid)):
        carry, pending = None, True
        for t in range(window.valid.shape[1]):
            pending = pending or window.resets[lane, t]
            if window.valid[lane, t]:
                x = jnp.asarray(window.inputs[lane : lane + 1, t])
                carry, pending = (start(params, x) if pending else carry), False
                carry, y = unroll(params, carry, x[:, None])
                outputs[lane, t] = y[0, 0]
    return outputs


@pytest.mark.parametrize(("make", "resets"), [(linen, "none"), *((make, "some") for make in MODELS.values())])
def test_a_lane_begins_from_its_first_valid_step_however_it_is_cut(make, resets):
    window = stream(lanes=3, time=13)
    window.valid[1, :2] = False  # its reset stands on padding
    window = window if resets == "some" else window._replace(resets=np.zeros_like(window.resets))
    plain, model = make(), make(initial_carry=given)
    params = params_of(plain)
    params["scale"] = jnp.array(0.7)
    expected = alone(plain, params, given, window)
    for k in (1, 4, 13):
        windows = jax.tree.map(np.asarray, tb.split(window, k)) if resets == "some" else tb.split(window, k)
        if resets == "none":
            windows = windows._replace(resets=np.zeros_like(windows.resets))
        _, y = tb.predict(model, params, windows)
        np.testing.assert_allclose(
            tb.join(y, like=window)[window.valid], expected[window.valid], rtol=1e-10, atol=1e-12
        )
    step, carry = tb.streaming(model, params), model.initial_carry(params, 3)
    for t in range(5):
        carry, y = step(carry, window.inputs[:, t], window.resets[:, t], window.valid[:, t])
        at = window.valid[:, t]
        np.testing.assert_allclose(np.asarray(y)[at], expected[at, t], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [linen, layers], ids=["linen", "fused"])
def test_a_learned_carry_and_its_gradient_are_those_of_the_loop(make):
    window = stream(lanes=3, time=13)
    plain, model = make(), make(initial_carry="learned")
    params = params_of(model)
    assert not any(np.asarray(h).any() for h in jax.tree.leaves(model.init(jax.random.key(0), window.inputs)["initial_carry"]))  # fmt: skip
    assert "initial_carry" in params

    @jax.jit
    def step(params, carry, x, target):
        carry, y = plain.unroll(params, carry, x[None, None])
        return carry, ((y[0, 0] - target) ** 2).sum()

    def total(params):
        start, sum_ = jax.tree.map(lambda h: h[None], params["initial_carry"]), 0.0
        for lane in range(3):
            carry = start
            for t in range(13):
                carry = start if window.resets[lane, t] else carry
                if window.valid[lane, t]:
                    carry, error = step(params, carry, window.inputs[lane, t], window.targets[lane, t])
                    sum_ += window.weights[lane, t] * error
        return sum_

    estimate = tb.gradient(model, loss, influence=tb.replay(4), normaliser=1.0)
    grads, _ = summed_gradient(estimate, params, tb.split(window, 5))
    assert_close(grads, jax.grad(total)(params), rtol=1e-9, atol=1e-10)


def test_what_is_no_initial_carry_is_refused():
    x = jnp.zeros((2, 3, FEATURES))
    with pytest.raises(ValueError, match="`initial_carry` is 'zeros'"):
        layers(initial_carry="zeros")
    model = layers(initial_carry=lambda params, x: x)
    params = layers().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="it needs to return a carry of this model"):
        model.unroll(params, model.initial_carry(params, 2), x)
