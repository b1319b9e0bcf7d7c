"""Cells whose papers write them as a loop: each against that loop, in NumPy, a lane and a step at a time."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import assert_close, first, loss, stream, summed_gradient

import tbptt_jax as tb

LANES, TIME, INPUTS, FEATURES = 4, 9, 4, 4
close = functools.partial(assert_close, rtol=1e-10, atol=1e-10)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def g(x):
    return np.where(x >= 0, x + 0.5, sigmoid(x))


def min_gru(w, h, x, candidate=lambda n: n):
    z, n = np.split(x @ w.input + w.bias, 2)
    h = (1 - sigmoid(z)) * h + sigmoid(z) * candidate(n)
    return h, h


def min_lstm(w, h, x, candidate=lambda n: n):
    f, i, n = np.split(x @ w.input + w.bias, 3)
    f, i = sigmoid(f), sigmoid(i)
    h = f / (f + i) * h + i / (f + i) * candidate(n)
    return h, h


def lru(w, h, x):
    eigenvalue = np.exp(-np.exp(w.nu_log) + 1j * np.exp(w.theta_log))
    b, c = (re + 1j * im for re, im in (np.split(w.B, 2, 1), np.split(w.C, 2, 0)))
    h = eigenvalue * h + np.exp(w.gamma_log) * (x @ b)
    return h, (h @ c).real + x @ (np.diag(w.D) if w.D.ndim == 1 else w.D)


def rg_lru(w, carry, x):
    h, fresh = carry
    of_heads = np.einsum("hi,hij->hj", x.reshape(len(w.gates), -1), w.gates) + w.bias
    r, i = (sigmoid(gate.ravel()) for gate in np.split(of_heads, 2, -1))
    a = sigmoid(w.log_odds) ** (8 * r)
    h = a * h + np.where(fresh, 1, np.sqrt(1 - a**2)) * i * x
    return carry._replace(carry=h, fresh=np.array(False)), h


def rtu(w, h, x, inside=False):
    r, theta = np.exp(-np.exp(w.nu_log)), np.exp(w.theta_log)
    h1, h2 = h.real, h.imag
    w1, w2 = np.split(w.input, 2, 1)
    gamma = np.sqrt(1 - r**2) + 1e-8
    h1, h2 = (
        r * np.cos(theta) * h1 - r * np.sin(theta) * h2 + gamma * (x @ w1),
        r * np.cos(theta) * h2 + r * np.sin(theta) * h1 + gamma * (x @ w2),
    )
    if inside:
        h1, h2 = np.tanh(h1), np.tanh(h2)
        return h1 + 1j * h2, np.concatenate([h1, h2])
    return h1 + 1j * h2, relu(np.concatenate([h1, h2]))


class Case(NamedTuple):
    """Attributes:
    cell: options -> model.
    step: ``(weights, carry, x [features]) -> (carry, y)`` of one lane, in NumPy.
    implementations: that it is run by.
    """

    cell: object
    step: object
    implementations: tuple = ("step", "associative", "chunked")


CASES = {
    "minGRU": Case(functools.partial(tb.min_gru, FEATURES), min_gru),
    "minGRU, positive": Case(
        functools.partial(tb.min_gru, FEATURES, positive_candidates=True), functools.partial(min_gru, candidate=g)
    ),
    "minLSTM": Case(functools.partial(tb.min_lstm, FEATURES), min_lstm),
    "minLSTM, positive": Case(
        functools.partial(tb.min_lstm, FEATURES, positive_candidates=True), functools.partial(min_lstm, candidate=g)
    ),
    "LRU": Case(functools.partial(tb.lru, FEATURES, units=5), lru),
    "LRU, wider": Case(functools.partial(tb.lru, 6, units=3), lru),
    "RG-LRU": Case(functools.partial(tb.rg_lru, FEATURES, heads=2), rg_lru),
    "RTU": Case(functools.partial(tb.rtu, 3), rtu),
    "RTU, nonlinear": Case(
        functools.partial(tb.rtu, 3, activation=jnp.tanh, activation_inside=True),
        functools.partial(rtu, inside=True),
        ("step",),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def window(seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(LANES, TIME, INPUTS)).astype(dtype)
    resets, valid = rng.random((LANES, TIME)) < 0.2, rng.random((LANES, TIME)) < 0.7
    return x, resets, valid


def of_width(tree, dtype):
    """Numbers as real ones of this dtype, or complex ones as wide."""
    return jax.tree.map(
        lambda x: x.astype(jnp.promote_types(dtype, "complex64") if jnp.iscomplexobj(x) else dtype), tree
    )


def params_of(model, dtype="float64", inputs=INPUTS, scale=0.5):
    """Random around the fresh ones."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, inputs)))
    rng = np.random.default_rng(1)
    return of_width(jax.tree.map(lambda p: p + scale * rng.normal(size=p.shape), params), dtype)


def by_the_loop(step, start, carry, weights, x, resets, valid):
    """``(carries, y of the valid steps)``; ``start``, a carry of one lane, is what a reset returns to."""
    carries, outputs = [], []
    for lane in range(len(x)):
        h = jax.tree.map(lambda h: np.asarray(h[lane]), carry)  # noqa: B023
        for t in range(x.shape[1]):
            if resets[lane, t]:
                h = start
            if valid[lane, t]:
                h, y = step(weights, h, x[lane, t])
                outputs.append(y)
        carries.append(h)
    return jax.tree.map(lambda *h: np.stack(h), *carries), np.stack(outputs)


@cases
def test_numbers_are_those_of_the_papers_loop(case):
    x, resets, valid = window()
    for how in case.implementations:
        model = case.cell(implementation=how)
        params = params_of(model)
        (weights,) = jax.tree.map(np.asarray, params["cell"])
        (start,) = jax.tree.map(lambda h: np.asarray(h[0]), model.initial_carry(params, 1))
        rng = np.random.default_rng(2)
        carry = jax.tree.map(
            lambda h: h if h.dtype == bool else jnp.asarray(rng.normal(size=h.shape), h.dtype),  # noqa: B023
            model.initial_carry(params, LANES),
        )
        after, y = jax.jit(model.unroll)(params, carry, x, resets, valid)
        expected, ys = by_the_loop(case.step, start, carry[0], weights, x, resets, valid)
        close((after, y[valid]), ((expected,), ys))


def one_step_at_a_time(model):
    """The same cell, of which JAX makes the window and its backward pass."""

    def step(params, carry, x):
        carry, y = model.unroll(params, carry, jax.tree.map(lambda x: x[:, None], x))
        return carry, y[:, 0]

    return tb.from_step(step, model.init, model.initial_carry)


@pytest.mark.parametrize("name", ["LRU", "RG-LRU"])
def test_uoro_reweighted_edges_and_the_decay_are_those_of_the_cell_read_a_step_at_a_time(name):
    readout = nn.Dense(2, dtype=jnp.float64, param_dtype=jnp.float64)
    model = CASES[name].cell(readout=readout, initial_carry="learned")
    params, each = params_of(model), one_step_at_a_time(model)
    rng, data = np.random.default_rng(0), stream(lanes=4, time=8)
    data = data._replace(inputs=rng.normal(size=(4, 8, INPUTS)))
    reweighted = data._replace(edges=2 * rng.random(data.valid.shape))
    for whole, influence in [(data, tb.uoro()), (reweighted, tb.truncate())]:
        estimates = (tb.gradient(m, loss, influence=influence) for m in (model, each))
        assert_close(*(summed_gradient(e, params, tb.split(whole, 4))[0] for e in estimates), rtol=1e-9, atol=1e-10)
    whole = data._replace(resets=None, valid=None)
    close(*(tb.horizon.decay(m, loss, params, whole, lags=4).norms for m in (model, each)))


@pytest.mark.parametrize("name", ["LRU", "RG-LRU"])
@jax.enable_x64(False)
def test_it_is_trained_kept_served_and_spread_over_devices(name, tmp_path):
    model = CASES[name].cell(encoder=nn.Dense(INPUTS), readout=nn.Dense(2), initial_carry="learned")
    data = jax.tree.map(lambda x: x.astype("float32") if x.dtype == "float64" else x, stream(lanes=4, time=12))
    windows = tb.split(data, 4)
    one = tb.gradient(model, loss)
    two, trained = tb.sharding.over_lanes(one, tb.sharding.mesh(lane=2)), []
    for each in (one, two):
        step = tb.skip_not_finite(tb.train_step(each, optax.sgd(1e-2)))
        state, metrics = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
        trained.append(jax.device_get((state.params, state.stream.carry, metrics.loss)))
    assert_close(*trained, rtol=1e-4, atol=1e-4)
    kept = params, carry = trained[0][:2]
    assert np.isfinite(trained[0][2]).all() and all(np.isfinite(tb.carry_health(carry)))

    spoilt = windows._replace(targets=np.full_like(windows.targets, 1e30))  # whose square is infinite
    state = step.init(jax.random.key(0), first(windows))
    skipped, _ = tb.train_windows(step, state, spoilt)
    close(skipped.params, state.params)
    tb.checkpoint.save(tmp_path / "kept", kept)
    assert_close(tb.checkpoint.load(tmp_path / "kept", like=kept), kept, rtol=0, atol=0)
    tb.weights.save(tmp_path / "weights", params)
    assert_close(tb.weights.load(tmp_path / "weights", like=params), params, rtol=0, atol=0)
    tb.export(model, params, data.inputs[:, 0], tmp_path / "model")
    served = tb.load_exported(tmp_path / "model")
    streamed = tb.streaming(model, params)
    for resets in (None, np.array([True, False, False, True])):
        after, y = streamed(carry, data.inputs[:, 0], resets)
        own, theirs = served.step(carry, data.inputs[:, 0], resets)
        assert_close((jax.tree.leaves(own), theirs), (jax.tree.leaves(after), y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@cases
def test_gradients_are_lowered_for_every_platform(case, platform):
    x, resets, valid = window(dtype="float32")
    for how in case.implementations:
        model = case.cell(implementation=how)
        params = params_of(model, "float32")

        def of_loss(params, carry, x, model=model):
            return jnp.sum(model.unroll(params, carry, x, resets, valid)[1] ** 2)

        jax.export.export(jax.jit(jax.grad(of_loss)), platforms=[platform])(
            params, model.initial_carry(params, LANES), x
        )


@cases
def test_half_precision_is_close(case):
    x, resets, valid = window(dtype="float32")
    model, operands = case.cell(), case.cell(dtype=jnp.bfloat16)
    params = params_of(model, "float32", scale=0.1)
    carry = model.initial_carry(params, LANES)
    unroll = jax.jit(model.unroll)
    after, exact = unroll(params, carry, x, resets, valid)
    same, y = jax.jit(operands.unroll)(params, carry, x, resets, valid)
    assert jax.tree.map(lambda h: h.dtype, same) == jax.tree.map(lambda h: h.dtype, after) and y.dtype == jnp.float32
    assert_close(y[valid], exact[valid], rtol=0.1, atol=0.1)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    _, y = unroll(half, model.initial_carry(half, LANES), x.astype(jnp.bfloat16), resets, valid)
    assert y.dtype == jnp.bfloat16
    assert_close(jnp.float32(y[valid]), exact[valid], rtol=0.2, atol=0.2)


def test_eigenvalues_begin_on_the_ring():
    options = {"r_min": 0.5, "r_max": 0.9, "max_phase": 1.0}
    for cell in (tb.lru(1, units=4096, **options), tb.rtu(4096, **options)):
        (w,) = cell.init(jax.random.key(0), jnp.zeros((1, 1, 2)))["cell"]
        r, theta = np.exp(-np.exp(w.nu_log)), np.exp(w.theta_log)
        assert 0.5 <= r.min() < 0.51 and 0.89 < r.max() <= 0.9 and theta.max() <= 1
        assert abs(np.mean(r**2) - (0.5**2 + 0.9**2) / 2) < 0.01 and abs(theta.mean() - 0.5) < 0.02  # by area
    (w,) = tb.lru(8, r_min=0.5, r_max=0.9).init(jax.random.key(0), jnp.zeros((1, 1, 8)))["cell"]
    np.testing.assert_allclose(np.exp(2 * w.gamma_log), 1 - np.exp(-2 * np.exp(w.nu_log)), rtol=1e-5)
    (w,) = tb.rg_lru(4096, heads=64).init(jax.random.key(0), jnp.zeros((1, 1, 4096)))["cell"]
    assert sigmoid(w.log_odds).min() >= 0.9 and sigmoid(w.log_odds).max() <= 0.999 + 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tb.min_lstm(0), "`features` is 0"),
        (lambda: tb.lru(3, units=-1), "`units` is -1"),
        (lambda: tb.lru(3, r_min=0.9, r_max=0.5), "r_min < r_max"),
        (lambda: tb.rg_lru(3, r_min="a"), "`r_min` is 'a'; it needs to be a number"),
        (lambda: tb.rtu(3, max_phase=0), "`max_phase` is 0"),
        (lambda: tb.lru(3, implementation="fft"), "`implementation` is 'fft'"),
        (lambda: tb.rtu(3, activation_inside=True, implementation="associative"), "a step needs the one before"),
        (lambda: tb.rg_lru(6, heads=4), "does not divide the 6 features"),
        (lambda: tb.rg_lru(6).init(jax.random.key(0), jnp.zeros((1, 1, 2))), r"encoder=nn.Dense\(6\)"),
        (lambda: tb.lru(3).init(jax.random.key(0), jnp.zeros((2, 3))), "What reaches the LRU"),
        (
            lambda: tb.lru(4).unroll(params_of(tb.lru(4)), tb.lru(4).initial_carry(params_of(tb.lru(4)), 4), window()[0] * 1j),
            "What reaches the LRU is complex128",
        ),
        (
            lambda: tb.lru(4).unroll(params_of(tb.lru(4)), (jnp.zeros((4, 4)),), window()[0]),
            "carry does not fit",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
