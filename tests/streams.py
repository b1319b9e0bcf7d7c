"""What the tests share: a small LSTM in float64, and streams with ragged lanes, resets, weights and rubbish in the padding."""

import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
LANES, TIME, FEATURES, UNITS = 4, 23, 2, 3


def some(key, shape, dtype=jnp.float64):
    """Weights to begin from, compiled in no time, as orthogonal matrices are not."""
    return jax.random.uniform(key, shape, dtype, -0.8, 0.8)


def lstm(**options):
    cell = nn.OptimizedLSTMCell(UNITS, kernel_init=some, recurrent_kernel_init=some, **F64)
    return tb.from_linen(cell, readout=nn.Dense(2, kernel_init=some, **F64), **options)


def loss(outputs, window):
    return jnp.sum((outputs - window.targets) ** 2, -1)


def stream(seed=0, lanes=LANES, time=TIME, rubbish=0.0):
    """Whole lanes ``[lanes, time]``; one of length 0, one with a hole; ``rubbish`` stands in the padding."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(time // 2, time + 1, lanes)
    lengths[0], lengths[-1] = time, 0
    valid = np.arange(time) < lengths[:, None]
    valid[0, 7:9] = False
    inputs, targets = rng.normal(size=(lanes, time, FEATURES)), rng.normal(size=(lanes, time, 2))
    inputs[~valid] = targets[~valid] = rubbish
    resets = rng.random((lanes, time)) < 0.1
    resets[:, 0] = True
    return tb.Window(inputs, targets, rng.choice([0.0, 1.0, 2.5], (lanes, time)), resets, valid)


def lane_by_lane(step, initial, params, window):
    """An oracle without scan, batch or mask: ``(final carries, outputs)``, each lane and step by itself."""
    carries, outputs = [], np.zeros((*window.valid.shape, 2))
    for lane in range(len(window.valid)):
        carry = initial(params)
        for t in range(window.valid.shape[1]):
            if window.resets[lane, t]:
                carry = initial(params)
            if window.valid[lane, t]:
                carry, outputs[lane, t] = step(params, carry, window.inputs[lane, t])
        carries.append(carry)
    return jax.tree.map(lambda *h: np.stack(h), *carries), outputs


def lstm_step(params, carry, x):
    """The textbook LSTM on one lane's vectors, from Flax's parameters of `lstm()`."""
    c, h = carry
    cell, readout = params["cell"]["params"], params["readout"]["params"]
    i, f, g, o = (x @ cell["i" + n]["kernel"] + h @ cell["h" + n]["kernel"] + cell["h" + n]["bias"] for n in "ifgo")
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h @ readout["kernel"] + readout["bias"]


def lstm_start(params):
    return jnp.zeros(UNITS), jnp.zeros(UNITS)


def params_of(model, scale=1.5):
    """Random parameters, larger than fresh ones so that long lags matter."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, FEATURES)))
    return jax.tree.map(lambda p: scale * p + 0.1, params)


def first(windows):
    return jax.tree.map(lambda x: x[0], windows)


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, windows):
    """Outputs ``[windows, lanes, time, ...]`` and the final carry."""
    carry = model.initial_carry(params, windows.valid.shape[1])
    return jax.lax.scan(lambda c, w: model.unroll(params, c, w.inputs, w.resets, w.valid), carry, windows)


@functools.partial(jax.jit, static_argnums=0)
def summed_gradient(estimate, params, windows):
    """The estimates of all windows, added up at fixed parameters."""

    def add(stream, window):
        grads, stream, metrics = estimate.update(params, stream, window)
        return stream, (grads, metrics)

    state = estimate.init(jax.random.key(0), params, first(windows))
    _, (grads, metrics) = jax.lax.scan(add, state, windows)
    return jax.tree.map(lambda g: g.sum(0), grads), metrics


def assert_close(actual, expected, rtol=1e-11, atol=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def compiled(lowered):
    """As a user's program is, for a look at it: conftest.py has others compiled with fewer fusions."""
    known = "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]
    return lowered.compile({"xla_cpu_use_fusion_emitters": True} if known else None)
