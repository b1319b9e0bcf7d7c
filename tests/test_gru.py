"""The fused GRU window against Flax's cell, PyTorch's layer and JAX's own differentiation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from streams import assert_close

import tbptt_jax as tb
from tbptt_jax import noise
from tbptt_jax.cells.gru import from_flax, to_flax

LANES, TIME, INPUTS, FEATURES = 3, 7, 4, 5
FORMS = {"after": {}, "before": {"reset_after": False}, "normalised": {"layer_norm": True}}
RESETS, VALID = (jax.random.bernoulli(jax.random.key(n), p, (LANES, TIME)) for n, p in ((4, 0.3), (5, 0.6)))
ALL = jnp.ones((LANES, TIME), bool)
MASKS = [{}, *({"resets": r, "valid": v} for r, v in [(RESETS, VALID), (ALL, ALL), (~ALL, ALL), (RESETS, ~ALL)])]
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
close = functools.partial(assert_close, rtol=1e-10, atol=1e-10)


def window(seed=0, dtype="float64", lanes=LANES, time=TIME):
    return jax.random.normal(jax.random.key(seed), (lanes, time, INPUTS), dtype)


def model(dtype="float64", **options):
    fused = tb.gru(FEATURES, **options)
    shapes = jax.eval_shape(fused.init, jax.random.key(1), window())
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), dtype), shapes)
    carry = jax.tree.map(lambda h: jnp.asarray(rng.normal(size=h.shape), dtype), fused.initial_carry(params, LANES))
    return fused, params, carry


def pullback(unroll, *args, **masks):
    """Outputs, and the gradients of params, carry and inputs for cotangents on the outputs and on the last carry."""
    result, vjp = jax.vjp(lambda params, carry, inputs: unroll(params, carry, inputs, **masks), *args)
    rng = np.random.default_rng(9)
    return result, vjp(jax.tree.map(lambda y: jnp.asarray(rng.normal(size=y.shape), y.dtype), result))


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 2e-5)])
def test_numbers_are_those_of_flax_cell(dtype, tolerance):
    fused, params, carry = model(dtype)
    flax = tb.from_linen(nn.GRUCell(FEATURES, param_dtype=dtype))

    def theirs(params, carry, x, **masks):
        (weights,), (carry,) = params["cell"], carry
        after, y = flax.unroll({"cell": to_flax(weights)}, carry, x, **masks)
        return (after,), jnp.where(masks.get("valid", ALL)[..., None], y, 0)

    def ours(params, carry, x, **masks):
        after, y = fused.unroll(params, carry, x, **masks)
        return after, jnp.where(masks.get("valid", ALL)[..., None], y, 0)

    both = [jax.jit(functools.partial(pullback, unroll)) for unroll in (ours, theirs)]
    for masks in MASKS:
        a, b = (found(params, carry, window(dtype=dtype), **masks) for found in both)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(a))
        assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert_close(from_flax(to_flax(params["cell"][0])), params["cell"][0], rtol=0, atol=0)


@pytest.mark.parametrize("layers", [1, 2])
def test_numbers_are_those_of_torch(layers):
    fused, params, carry = model(layers=layers)
    theirs = torch.nn.GRU(INPUTS, FEATURES, layers, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in tb.weights.to_torch(params).items()})
    x, start = (torch.tensor(np.asarray(each), requires_grad=True) for each in (window(), np.stack(carry)))
    y, after = theirs(x, start)
    rng = np.random.default_rng(9)
    torch.autograd.backward([after, y], [torch.tensor(rng.normal(size=each.shape)) for each in (after, y)])
    result, (d_params, d_carry, d_x) = jax.jit(pullback, static_argnums=0)(fused.unroll, params, carry, window())
    close((np.stack(result[0]), result[1]), (after.detach().numpy(), y.detach().numpy()))
    of_theirs = {k: v.grad.numpy() for k, v in theirs.named_parameters()}
    for n in range(layers):  # there are two biases of r and z there, which become their sum
        of_theirs[f"bias_hh_l{n}"][: 2 * FEATURES] = 0
    close(d_params, tb.weights.from_torch(of_theirs, params))
    close((np.stack(d_carry), d_x), (start.grad.numpy(), x.grad.numpy()))


def by_the_papers(weights, h, x, zoneout):
    """A step of one lane."""
    units = slice(None, 2 * FEATURES), slice(2 * FEATURES, None)

    def normalised(x, gain):
        return gain * np.concatenate([(x[u] - x[u].mean()) / np.sqrt(x[u].var() + 1e-5) for u in units])

    into, again = x @ weights.input, h @ weights.recurrent
    if weights.norm is not None:
        into, again = normalised(into, weights.norm.input), normalised(again, weights.norm.recurrent)
    into = into + weights.bias
    r, z = np.split(1 / (1 + np.exp(-(into + again)[units[0]])), 2)
    if weights.recurrent_bias is None:
        n = np.tanh(into[units[1]] + (r * h) @ weights.recurrent[:, units[1]])
    else:
        n = np.tanh(into[units[1]] + r * (again[units[1]] + weights.recurrent_bias))
    return zoneout * h + (1 - zoneout) * ((1 - z) * n + z * h)


@forms
def test_forms_are_those_of_the_papers(form):
    fused, params, carry = model(zoneout=0.25, **form)
    (weights,), h = jax.tree.map(np.asarray, params["cell"]), np.array(carry[0])
    expected = np.zeros((LANES, TIME, FEATURES))
    for lane, t in np.ndindex(LANES, TIME):
        h[lane] = 0 if RESETS[lane, t] else h[lane]
        h[lane] = by_the_papers(weights, h[lane], np.asarray(window())[lane, t], 0.25) if VALID[lane, t] else h[lane]
        expected[lane, t] = h[lane]
    close(jax.jit(fused.unroll)(params, carry, window(), RESETS, VALID), ((jnp.asarray(h),), jnp.asarray(expected)))


@forms
def test_hand_written_backward_pass_and_its_transpose_are_the_derivatives_of_the_scan(form):
    options = {"zoneout": 0.2, "weight_drop": 0.4, **form}
    fused, params, carry = model(**options)
    scan = tb.gru(FEATURES, implementation="scan", **options)
    key, x = noise.lane_keys(jax.random.key(6), LANES), window()
    tangents = jax.tree.map(lambda p: jnp.cos(7 * p), (params, carry))

    @jax.jit
    def derivatives(masks):
        result, vjp = jax.vjp(lambda p, c: fused.unroll(p, c, x, key=key, **masks), params, carry)
        (forward,) = jax.linear_transpose(vjp, result)(tangents)
        return forward, pullback(fused.unroll, params, carry, x, key=key, **masks)

    @jax.jit
    def expected(masks):
        def run(params, carry):
            return scan.unroll(params, carry, x, key=key, **masks)

        return jax.jvp(run, (params, carry), tangents)[1], pullback(scan.unroll, params, carry, x, key=key, **masks)

    for masks in MASKS:
        close(derivatives(masks), expected(masks))


def test_weights_are_left_out_for_a_window_and_zoneout_keeps_units_for_a_step():
    fused, params, carry = model(weight_drop=0.5)
    keys = noise.lane_keys(jax.random.key(0), LANES)
    unroll = jax.jit(fused.unroll)
    drawn, same, other, none = (
        unroll(params, carry, window(), key=key)[1]
        for key in (keys, keys, noise.lane_keys(jax.random.key(1), LANES), None)
    )
    close(drawn, same)
    assert np.abs(drawn - other).max() > 1e-3
    close(none, jax.jit(tb.gru(FEATURES).unroll)(params, carry, window())[1])
    _, hs = jax.jit(tb.gru(FEATURES, zoneout=0.4).unroll)(params, carry, jnp.tile(window(), (1, 60, 1)), key=keys)
    stood_still = np.diff(hs, axis=1) == 0
    assert abs(stood_still.mean() - 0.4) < 0.03 and stood_still.std((0, 1)).min() > 0.4


def test_what_is_drawn_is_a_lanes_own_and_the_same_in_segments():
    options = {"layers": 2, "dropout": 0.5, "weight_drop": 0.4, "zoneout": 0.3}
    fused, params, carry = model(**options)
    keys = noise.lane_keys(jax.random.key(1), LANES)
    whole = jax.jit(fused.unroll)(params, carry, window(), key=keys)
    close(jax.jit(tb.gru(FEATURES, checkpoint=3, **options).unroll)(params, carry, window(), key=keys), whole)
    alone = jax.jit(fused.unroll)(params, jax.tree.map(lambda h: h[1:2], carry), window()[1:2], key=keys[1:2])
    close(alone, jax.tree.map(lambda h: h[1:2], whole))


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.1), ("float16", 0.02)])
@forms
def test_half_precision_is_close(form, dtype, tolerance):
    fused, params, carry = model("float32", **form)
    x = window(dtype="float32")
    found = jax.jit(pullback, static_argnums=0)
    exact = found(fused.unroll, params, carry, x)
    operands = found(tb.gru(FEATURES, dtype=dtype, **form).unroll, params, carry, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(operands))
    assert_close(operands, exact, rtol=tolerance, atol=tolerance)
    half = jax.tree.map(lambda p: p.astype(dtype), (params, carry, x))
    after, y = jax.jit(fused.unroll)(*half)
    assert {after[0].dtype, y.dtype} == {jnp.dtype(dtype)}
    assert_close(jnp.float32(y), exact[0][1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tb.gru(0), "`features` is 0"),
        (lambda: tb.gru(3, layers=0), "`layers` is 0"),
        (lambda: tb.gru(3, zoneout=1.0), "`zoneout` is 1.0"),
        (lambda: tb.gru(3, weight_drop=-0.1), "`weight_drop` is -0.1"),
        (lambda: tb.gru(3, implementation="cudnn"), "`implementation` is 'cudnn'"),
        (lambda: tb.gru(3, layer_norm=True, reset_after=False), "leave one of them out"),
        (lambda: to_flax(model(reset_after=False)[1]["cell"][0]), "reset_after=False"),
        (lambda: to_flax(model(layer_norm=True)[1]["cell"][0]), "layer normalisation"),
        (lambda: tb.weights.to_torch(model(reset_after=False)[1]), "reset_after=False"),
        (lambda: tb.weights.to_torch(model(layer_norm=True)[1]), "normalisation"),
        (lambda: tb.gru(3).init(jax.random.key(0), jnp.zeros((2, 3))), "What reaches the GRU"),
        (lambda: tb.gru(FEATURES).unroll(*model()[1:], window()[..., :2]), "What reaches the GRU"),
        (lambda: tb.gru(FEATURES).unroll(*model()[1:], window() + 1j), "What reaches the GRU is complex"),
        (lambda: tb.gru(FEATURES).unroll(*model()[1:], window(lanes=2)), "carry does not fit"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
