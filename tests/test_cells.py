"""Every cell is held to the laws of a recurrence. A new one is a line of CELLS."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from streams import F64

import tbptt_jax as tb
from tbptt_jax import testing
from tbptt_jax.cells.mamba2 import Carry

LANES, TIME, FEATURES, UNITS = 3, 8, 2, 3
X = np.random.default_rng(0).normal(size=(LANES, TIME, FEATURES))
TOKENS = np.random.default_rng(1).integers(0, 5, (LANES, TIME))
IMAGES = np.random.default_rng(2).normal(size=(LANES, TIME, 4, 1))
DROPS = {"weight_drop": 0.3, "zoneout": 0.2, "dropout": 0.4, "layers": 2}


def linen(cell, **options):
    return tb.from_linen(cell(UNITS, **F64), readout=nn.Dense(2, **F64), **options)


def of_nnx(cell, **options):
    part = lambda make, *sizes: lambda rngs: make(*sizes, rngs=rngs, **F64)  # noqa: E731
    return tb.from_nnx(part(cell, FEATURES, UNITS), readout=part(nnx.Linear, UNITS, 2), **options)


def given(params, x):
    """What a lane begins from, of its first inputs."""
    return (jnp.tanh(x @ jnp.ones((FEATURES, UNITS))),)


def short_memory(params, x):
    """Likewise, inputs before the window and a memory."""
    first = jnp.tanh(x.sum(1))[:, None, None]
    return (Carry(first * jnp.ones((3, 12)), first[..., None] * jnp.ones((2, 2, 2))),)


def begun(params, x):
    return (tb.rg_lru(2).initial_carry(params, len(x))[0]._replace(carry=jnp.tanh(x)),)


def linear_recurrent_unit():
    """Diagonal and complex, with an initial carry that is learned."""

    def init(key, inputs):
        a, b, start = jax.random.normal(key, (3, UNITS), jnp.complex128)
        return {"a": 0.9 * a / jnp.abs(a), "b": b, "start": start, "out": jnp.ones(UNITS)}

    def step(params, h, x):
        h = params["a"] * h + x[:, :1] * params["b"]
        return h, h.real * params["out"] + h.imag**2

    return tb.from_step(step, init, lambda params, lanes: jnp.broadcast_to(params["start"], (lanes, UNITS)))


def keyed():
    """A counter, and noise by a typed key of each lane's own, in the carry."""

    def step(params, carry, x):
        own = jax.vmap(jax.random.split)(carry["key"])
        noise = jax.vmap(lambda key: jax.random.normal(key, (UNITS,)))(own[:, 1])
        h = jnp.tanh(carry["h"] * params + x[:, :1] + noise)
        return {"h": h, "key": own[:, 0], "steps": carry["steps"] + 1}, h

    def start(params, lanes):
        keys = jax.random.split(jax.random.key(0), lanes)
        return {"h": jnp.zeros((lanes, UNITS)), "key": keys, "steps": jnp.zeros(lanes, int)}

    return tb.from_step(step, lambda key, x: jnp.full(UNITS, 0.7), start)


def several():
    return tb.from_step(
        lambda params, h, x: (0.5 * h + params * x["a"], (h, x["b"])), lambda key, x: jnp.float64(0.7), lambda params, lanes: jnp.zeros((lanes, FEATURES))
    )  # fmt: skip


CELLS = {
    "lstm": (tb.lstm(UNITS, readout=nn.Dense(2, **F64)), X),
    "lstm, projected and normalised": (tb.lstm(UNITS, projection=2, layer_norm=True), X),
    "lstm that draws": (tb.lstm(UNITS, **DROPS), X),
    "lstm that begins from the data": (tb.lstm(UNITS, initial_carry=lambda p, x: (given(p, x) * 2,)), X),
    "lstm, step by step": (tb.lstm(UNITS, implementation="scan", initial_carry="learned"), X),
    "gru": (tb.gru(UNITS, encoder=nn.Embed(5, 4, **F64)), TOKENS),
    "gru, reset before": (tb.gru(UNITS, reset_after=False, checkpoint=3), X),
    "gru, normalised": (tb.gru(UNITS, layer_norm=True, initial_carry="learned"), X),
    "gru that draws": (tb.gru(UNITS, weight_drop=0.3, zoneout=0.2), X),
    "gru that begins from the data": (tb.gru(UNITS, initial_carry=given), X),
    "min_gru": (tb.min_gru(UNITS), X),
    "min_lstm": (tb.min_lstm(UNITS, positive_candidates=True, initial_carry="learned"), X),
    "lru": (tb.lru(UNITS, units=2, layers=2, dropout=0.3), X),
    "lru, learned": (tb.lru(2, initial_carry="learned", checkpoint=3, implementation="step"), X),
    "lru that begins from the data": (tb.lru(2, initial_carry=lambda p, x: (x * (1 + 2j),)), X),
    "rg_lru": (tb.rg_lru(4, heads=2, encoder=nn.Dense(4, **F64)), X),
    "rg_lru, learned": (tb.rg_lru(2, layers=2, initial_carry="learned", residual=True, implementation="chunked"), X),
    "rg_lru that begins from the data": (tb.rg_lru(2, initial_carry=begun), X),
    "rtu": (tb.rtu(2, implementation="associative"), X),
    "rtu, nonlinear": (tb.rtu(2, activation=jnp.tanh, activation_inside=True, initial_carry="learned"), X),
    "slstm": (tb.slstm(4, heads=2, layers=2), X),
    "slstm, normalised": (tb.slstm(4, heads=2, forget="exp", norm=True, initial_carry="learned"), X),
    "mlstm": (tb.mlstm(4, heads=2, key_size=3, layers=2), X),
    "mlstm, normalised": (tb.mlstm(4, norm=True, initial_carry="learned", checkpoint=3), X),
    "gated_delta": (tb.gated_delta(4, heads=2, value_size=3, residual=True), X),
    "gated_delta, without a convolution": (tb.gated_delta(3, convolution=None, initial_carry="learned"), X),
    "mamba2": (tb.mamba2(3, heads=2, state=3), X),
    "mamba2 that begins from the data": (tb.mamba2(2, heads=2, groups=2, state=2, initial_carry=short_memory), X),
    "nn.LSTMCell": (linen(nn.LSTMCell), X),
    "nn.OptimizedLSTMCell": (linen(nn.OptimizedLSTMCell, checkpoint="sqrt"), X),
    "nn.GRUCell": (linen(nn.GRUCell, initial_carry=lambda p, x: given(p, x)[0]), X),
    "nn.MGUCell": (linen(nn.MGUCell, initial_carry="learned"), X),
    "nn.SimpleCell": (linen(nn.SimpleCell), X),
    "nn.ConvLSTMCell": (tb.from_linen(nn.ConvLSTMCell(1, (2,), **F64), input_shape=(4, 1)), IMAGES),
    "nnx.LSTMCell": (of_nnx(nnx.LSTMCell), X),
    "nnx.OptimizedLSTMCell": (of_nnx(nnx.OptimizedLSTMCell), X),
    "nnx.GRUCell": (of_nnx(nnx.GRUCell), X),
    "nnx.SimpleCell": (of_nnx(nnx.SimpleCell), X),
    "a step, complex": (linear_recurrent_unit(), X),
    "a step with keys and a counter": (keyed(), X),
    "a step of several inputs": (several(), {"a": X, "b": TOKENS}),
    "a stack": (tb.stack(tb.gru(2, weight_drop=0.5), linen(nn.SimpleCell)), X),
}


@pytest.mark.parametrize("name", CELLS)
def test_it_keeps_the_laws_of_a_recurrence(name):
    testing.check_recurrence(*CELLS[name])
