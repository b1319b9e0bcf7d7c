"""Cells whose papers write them as a loop: each against that loop, in NumPy, a lane and a step at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import assert_close

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
complex_cases = pytest.mark.parametrize("name", ["LRU", "RTU", "RTU, nonlinear"])


def window(seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(LANES, TIME, INPUTS)).astype(dtype)
    resets, valid = rng.random((LANES, TIME)) < 0.2, rng.random((LANES, TIME)) < 0.7
    return x, resets, valid


def params_of(model, dtype="float64", inputs=INPUTS, scale=0.5):
    """Random around the fresh ones."""
    params = model.init(jax.random.key(0), jnp.zeros((1, 1, inputs)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(p + scale * rng.normal(size=p.shape), dtype), params)


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
