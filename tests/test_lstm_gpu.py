"""The LSTM for NVIDIA GPUs, on a CPU: kernels interpreted, cuDNN by JAX's reference for it, and what is lowered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

import tbptt_jax as tb
from tbptt_jax.cells.lstm import gpu

LANES, TIME, INPUTS, FEATURES = 18, 6, 3, 6  # neither a multiple of a kernel's block
KEYS = jax.random.split(jax.random.key(0), 6)
RESETS = {"resets": jax.random.bernoulli(KEYS[0], 0.2, (LANES, TIME))}
VALID = {"valid": jax.random.bernoulli(KEYS[1], 0.7, (LANES, TIME))}
START = {"resets": jnp.zeros((LANES, TIME), bool).at[::2, 0].set(True)}


def window_after_window(implementation, flags, dtype=jnp.float64, length=3, **options):
    """Outputs, the last carry and all gradients of a stream in windows of ``length``, differentiated as a whole."""
    model = tb.lstm(FEATURES, implementation=implementation, layers=2, **options)
    x = jax.random.normal(KEYS[2], (LANES, TIME, INPUTS), dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), jax.jit(model.init)(KEYS[3], x))
    carry = jax.tree.map(lambda h: h + 0.3, model.initial_carry(params, LANES))

    def read(params, carry, x):
        outputs = []
        for t in range(0, TIME, length):
            part = {name: flag[:, t : t + length] for name, flag in flags.items()}
            carry, y = model.unroll(params, carry, x[:, t : t + length], **part)
            outputs.append(y)
        return carry, jnp.concatenate(outputs, 1)

    @jax.jit
    def both(*args):
        result, vjp = jax.vjp(read, *args)
        return result, vjp(jax.tree.map(jnp.cos, result))

    return both(params, carry, x)


def agree(a, b, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("flags", [{}, RESETS, VALID, RESETS | VALID], ids=["plain", "resets", "padding", "both"])
def test_the_kernels_numbers_are_those_of_the_scans(flags):
    agree(window_after_window("pallas", flags), window_after_window("scan", flags), 1e-12)


def test_the_kernels_take_operands_in_bfloat16_and_add_up_in_float32():
    options = {"dtype": jnp.float32, "flags": RESETS, "length": TIME}
    agree(window_after_window("pallas", **options), window_after_window("fused", **options), 1e-5)
    model = tb.lstm(FEATURES, implementation="pallas", dtype=jnp.bfloat16)
    x = jax.random.normal(KEYS[2], (LANES, TIME, INPUTS), jnp.float32)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), model.init(KEYS[3], x))
    after, y = jax.jit(model.unroll)(params, model.initial_carry(params, LANES), x)
    exact = jax.jit(tb.lstm(FEATURES).unroll)(params, model.initial_carry(params, LANES), x)
    assert {h.dtype for h in jax.tree.leaves((after, y))} == {jnp.dtype("float32")}
    agree((after, y), exact, 3e-2)
    assert not np.allclose(y, exact[1], atol=1e-5)


@pytest.fixture
def reference(monkeypatch):
    """JAX's reference in the place of cuDNN, which no CPU has."""

    def reference(x, h, c, weights, lengths, inputs, units, *rest):
        parts = rnn.unpack_lstm_weights(weights, inputs, units, 1, False)
        return rnn.lstm_ref(x, h, c, *parts, lengths, inputs, units, *rest[:3])

    def forward(x, h, c, weights, lengths, *settings):
        called.append(settings)
        return reference(x, h, c, weights, lengths, *settings), (x, h, c, weights, lengths)

    def backward(*args):
        *settings, (x, h, c, weights, lengths), cotangents = args
        return (*jax.vjp(lambda *a: reference(*a, lengths, *settings), x, h, c, weights)[1](cotangents), None)

    called = []
    monkeypatch.setattr(rnn, "lstm_fwd", forward)
    monkeypatch.setattr(rnn, "lstm_bwd", backward)
    return called


@pytest.mark.parametrize("flags", [{}, START, RESETS], ids=["plain", "at the start", "within"])
def test_cudnn_is_given_the_weights_in_its_order_and_resets_are_kept(flags, reference):
    exact = window_after_window("scan", flags, jnp.float32)
    agree(window_after_window("cudnn", flags, jnp.float32), exact, 1e-5)
    assert {settings[-1] for settings in reference} == {jax.lax.Precision.HIGHEST}


def test_cudnn_takes_trainings_side_by_side(reference):
    model, exact = tb.lstm(FEATURES, implementation="cudnn"), tb.lstm(FEATURES)
    x = jax.random.normal(KEYS[2], (2, LANES, TIME, INPUTS), jnp.float32)

    def grads(model, key, x):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), model.init(key, x))
        return jax.grad(lambda p: jnp.sum(model.unroll(p, model.initial_carry(p, LANES), x, **START)[1] ** 2))(params)

    both = (jax.jit(jax.vmap(lambda key, x, m=m: grads(m, key, x)))(KEYS[:2], x) for m in (model, exact))
    agree(*both, 1e-4)


def test_what_cudnn_cannot_do_is_told():
    with pytest.raises(ValueError, match=r"float32, without `dtype`.*float64 parameters, dtype=None, no padding"):
        window_after_window("cudnn", {}, jnp.float64)
    with pytest.raises(ValueError, match=r"dtype=None, padding: leave `implementation` None\."):
        window_after_window("cudnn", VALID, jnp.float32)
    for implementation in ("cudnn", "pallas"):
        with pytest.raises(ValueError, match=f"`implementation` is '{implementation}', which has no projection"):
            tb.lstm(FEATURES, projection=2, implementation=implementation)


@pytest.mark.parametrize("features", [10, 64])
def test_for_a_gpu_the_loops_are_two_kernels(features, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = tb.lstm(features, implementation="pallas")
    x = jnp.zeros((LANES, TIME, INPUTS), jnp.float32)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), model.init(KEYS[3], x))
    grads = jax.grad(lambda p: model.unroll(p, model.initial_carry(p, LANES), x, **RESETS)[1].sum())
    text = jax.jit(grads).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text)) == 2 and "stablehlo.while" not in text


def test_the_flat_weights_are_unpacked_by_jax_as_they_were():
    (weights,) = tb.lstm(FEATURES).init(KEYS[3], jnp.zeros((1, 1, INPUTS)))["cell"]
    w_ih, w_hh, b_ih, b_hh = rnn.unpack_lstm_weights(gpu.flat_weights(weights), INPUTS, FEATURES, 1, False)
    agree((w_ih[0], w_hh[0], b_ih[0] + b_hh[0]), (weights.input.T, weights.recurrent.T, weights.bias), 0)


def test_what_does_not_fit_on_the_chip_is_refused():
    model = tb.lstm(128, implementation="pallas")
    x = jnp.zeros((2, 3, INPUTS), jnp.float32)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), model.init(KEYS[0], x))
    with pytest.raises(ValueError, match=r"128 units take 264 KiB there, and it has 227\. Use"):
        jax.grad(lambda p: model.unroll(p, model.initial_carry(p, 2), x)[1].sum())(params)
