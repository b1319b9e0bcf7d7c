"""The fused LSTM window against Flax's cell, PyTorch's layer and JAX's own differentiation."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from streams import compiled

import tbptt_jax as tb
from tbptt_jax import noise
from tbptt_jax.cells.lstm import Weights, from_flax, to_flax
from tbptt_jax.cells.zoneout import stays

LANES, TIME, INPUTS, FEATURES = 3, 7, 4, 5
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


def window(seed=0, dtype="float64", lanes=LANES, time=TIME):
    return jax.random.normal(jax.random.key(seed), (lanes, time, INPUTS), dtype)


def close(a, b, tolerance=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), a, b)


def model(dtype="float64", **options):
    fused = tb.lstm(FEATURES, **options)
    params = jax.jit(fused.init)(jax.random.key(1), window())
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.1 * rng.normal(size=p.shape), dtype), jax.device_get(params))
    carry = jax.tree.map(lambda c: jnp.asarray(rng.normal(size=c.shape), c.dtype), fused.initial_carry(params, LANES))
    return fused, params, carry


def pullback(unroll, *args, **flags):
    """Outputs, and the gradients of params, carry and inputs for cotangents on the outputs and on the last carry."""

    @jax.jit  # one program instead of one for each operation
    def both(args, flags):
        result, vjp = jax.vjp(lambda *args: unroll(*args, **flags), *args)
        leaves, tree = jax.tree.flatten(result)
        keys = jax.random.split(jax.random.key(9), len(leaves))
        cotangents = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return result, vjp(jax.tree.unflatten(tree, cotangents))

    return both(args, flags)


FLAGS = {
    "plain": {},
    "resets": {"resets": jax.random.bernoulli(jax.random.key(4), 0.3, (LANES, TIME))},
    "padding": {"valid": jax.random.bernoulli(jax.random.key(5), 0.6, (LANES, TIME))},
}
FLAGS["both"] = FLAGS["resets"] | FLAGS["padding"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("flags", FLAGS)
def test_numbers_are_those_of_flax_cell(flags, dtype):
    fused, params, carry = model(dtype)
    flags = FLAGS[flags]
    flax = tb.from_linen(nn.OptimizedLSTMCell(FEATURES, param_dtype=dtype))
    x = window(dtype=dtype)

    def theirs(params, carry, x, **flags):
        (weights,), (carry,) = params["cell"], carry
        after, y = flax.unroll({"cell": to_flax(weights)}, carry, x, **flags)
        return (after,), (y if "valid" not in flags else y * flags["valid"][..., None])

    def ours(params, carry, x, **flags):
        after, y = fused.unroll(params, carry, x, **flags)
        return after, (y if "valid" not in flags else y * flags["valid"][..., None])

    a = pullback(ours, params, carry, x, **flags)
    b = pullback(theirs, params, carry, x, **flags)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(a))
    close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("projection", [None, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_numbers_are_those_of_torch(layers, projection):
    fused, params, carry = model(layers=layers, projection=projection)
    theirs = torch.nn.LSTM(INPUTS, FEATURES, layers, batch_first=True, proj_size=projection or 0, dtype=torch.float64)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in tb.weights.to_torch(params).items()})
    x = torch.tensor(np.asarray(window()), requires_grad=True)
    c, h = (torch.tensor(np.stack([layer[i] for layer in carry]), requires_grad=True) for i in (0, 1))
    y, (h_n, c_n) = theirs(x, (h, c))
    after, outputs = jax.jit(fused.unroll)(params, carry, window())
    close(outputs, y.detach().numpy())
    close([layer[0] for layer in after], list(c_n.detach().numpy()))
    cotangent = jax.random.normal(jax.random.key(6), outputs.shape)
    d_after = jax.tree.map(jnp.ones_like, after)
    torch.autograd.backward(
        [y, h_n, c_n], [torch.tensor(np.asarray(cotangent)), torch.ones_like(h_n), torch.ones_like(c_n)]
    )
    derived = jax.jit(lambda args, cotangents: jax.vjp(fused.unroll, *args)[1](cotangents))
    d_params, d_carry, d_x = derived((params, carry, window()), (d_after, cotangent))
    of_theirs = {k: v.grad for k, v in theirs.named_parameters() if "bias_hh" not in k}
    close(d_params, tb.weights.from_torch(of_theirs, params))
    close(d_x, x.grad.numpy())
    close([layer[0] for layer in d_carry], list(c.grad.numpy()))
    close([layer[1] for layer in d_carry], list(h.grad.numpy()))


@pytest.mark.parametrize("flags", FLAGS)
def test_hand_written_backward_pass_is_the_derivative_of_the_scan(flags):
    options = {"layers": 2, "projection": 3, "encoder": nn.Dense(4, param_dtype="float64"), "readout": nn.Dense(2)}
    fused, params, carry = model(**options)
    scan = tb.lstm(FEATURES, implementation="scan", **options)
    a = pullback(fused.unroll, params, carry, window(), **FLAGS[flags])
    close(a, pullback(scan.unroll, params, carry, window(), **FLAGS[flags]))


@pytest.mark.parametrize("checkpoint", [3, "sqrt"])
def test_checkpoints_change_no_number(checkpoint):
    fused, params, carry = model()
    kept = tb.lstm(FEATURES, checkpoint=checkpoint)
    flags = FLAGS["both"]
    close(
        pullback(kept.unroll, params, carry, window(), **flags),
        pullback(fused.unroll, params, carry, window(), **flags),
    )


def test_bfloat16_operands_keep_a_float32_carry():
    fused, params, carry = model("float32")
    half = tb.lstm(FEATURES, dtype=jnp.bfloat16)
    x = window(dtype="float32")
    exact, rounded = (pullback(m.unroll, params, carry, x) for m in (fused, half))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    close(rounded, exact, 0.1)
    jaxpr = str(jax.make_jaxpr(lambda *a: pullback(half.unroll, *a))(params, carry, x))
    products = re.findall(r"\w+:(\w+)\[[\d,]*\] = dot_general\[(.*?)\]\n? +\w+ \w+", jaxpr, re.S)
    assert products and all(result == "f32" for result, _ in products)


def test_vmap_over_parameters_and_scan_over_windows():
    fused, params, carry = model()
    many = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)
    x = jnp.stack([window(0), window(1)])

    def train(params):
        def loss(params):
            return lax_windows(params).sum()

        def lax_windows(params):
            return jax.lax.scan(lambda c, x: fused.unroll(params, c, x), carry, x)[1]

        return jax.grad(loss)(params)

    together = jax.jit(jax.vmap(train))(many)
    for n in range(2):
        close(jax.tree.map(lambda g, n=n: g[n], together), jax.jit(train)(jax.tree.map(lambda p, n=n: p[n], many)))


@pytest.mark.parametrize("flags", FLAGS)
def test_forward_mode_is_the_transpose_of_the_vjp(flags):
    fused, params, carry = model(layers=2, projection=3)
    scan = tb.lstm(FEATURES, layers=2, projection=3, implementation="scan")
    tangents = jax.tree.map(lambda p: jax.random.normal(jax.random.key(7), p.shape), (params, carry))

    def run(unroll):
        return lambda params, carry: unroll(params, carry, window(), **FLAGS[flags])

    @jax.jit
    def by_transpose(params, carry, tangents):
        result, vjp = jax.vjp(run(fused.unroll), params, carry)
        (forward,) = jax.linear_transpose(vjp, result)(tangents)
        return forward

    _, expected = jax.jit(lambda *args: jax.jvp(run(scan.unroll), *args))((params, carry), tangents)
    close(by_transpose(params, carry, tangents), expected)


def test_lanes_jacobian_by_vmap_of_the_vjp():
    fused, params, carry = model()
    scan = tb.lstm(FEATURES, implementation="scan")

    def right_edge(unroll):
        return lambda params: unroll(params, carry, window())[0]

    close(jax.jit(jax.jacrev(right_edge(fused.unroll)))(params), jax.jit(jax.jacfwd(right_edge(scan.unroll)))(params))


NOISY = {"zoneout": (0.4, 0.3), "weight_drop": 0.3}
KEYS = noise.lane_keys(jax.random.key(8), LANES)
EVERYWHERE = {name: jnp.ones((LANES, TIME), bool) for name in ("resets", "valid")}
REGULARISED = {
    "drawn": (NOISY, {"key": KEYS} | FLAGS["both"]),
    "drawn, resets everywhere": (NOISY, {"key": KEYS} | EVERYWHERE),
    "drawn, padding everywhere": (NOISY, {"key": KEYS, "valid": jnp.zeros((LANES, TIME), bool)}),
    "zoneout of c alone, not drawn": ({"zoneout": (0.4, 0.0), "projection": 3}, FLAGS["both"]),
    "layer normalisation": ({"layer_norm": True}, FLAGS["plain"]),
    "all": (NOISY | {"layer_norm": True, "projection": 3, "layers": 2}, {"key": KEYS} | FLAGS["both"]),
}


@pytest.mark.parametrize("case", REGULARISED)
def test_regularised_windows_derivatives_are_those_of_the_scan_backward_and_forward(case):
    options, flags = REGULARISED[case]
    fused, params, carry = model(**options)
    scan = tb.lstm(FEATURES, implementation="scan", **options)
    ours, theirs = (jax.jit(functools.partial(pullback, m.unroll, **flags)) for m in (fused, scan))
    close(ours(params, carry, window()), theirs(params, carry, window()))
    tangents = jax.tree.map(lambda p: jax.random.normal(jax.random.key(7), p.shape), (params, carry))

    @jax.jit
    def by_transpose(params, carry):
        result, vjp = jax.vjp(lambda params, carry: fused.unroll(params, carry, window(), **flags), params, carry)
        return jax.linear_transpose(vjp, result)(tangents)[0]

    run = jax.jit(lambda params, carry: scan.unroll(params, carry, window(), **flags))
    close(by_transpose(params, carry), jax.jvp(run, (params, carry), tangents)[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layer_normalisation_is_that_of_a_loop_in_torch(dtype):
    fused, params, carry = model(dtype, layer_norm=True)
    x, width = window(dtype=dtype), 4 * FEATURES
    (weights,), ((c, h),) = jax.tree.map(
        lambda p: torch.tensor(np.asarray(p), requires_grad=True), (params["cell"], carry)
    )
    normal, norm, outputs = torch.nn.functional.layer_norm, weights.norm, []
    for x_t in torch.tensor(np.asarray(x)).unbind(1):
        gates = normal(x_t @ weights.input, [width], norm.input) + normal(
            h @ weights.recurrent, [width], norm.recurrent
        )
        i, f, g, o = (gates + weights.bias).split(FEATURES, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * normal(c, [FEATURES], norm.cell, norm.cell_bias).tanh()
        outputs.append(h)
    y = torch.stack(outputs, 1)
    cotangent = jnp.cos(x[..., :1])
    y.backward(torch.tensor(np.asarray(cotangent)).expand(y.shape))

    def total(params):
        outputs = fused.unroll(params, carry, x)[1]
        return jnp.sum(cotangent * outputs), outputs

    gradient, result = jax.jit(jax.grad(total, has_aux=True))(params)
    close(result, y.detach().numpy(), TOLERANCE[dtype])
    close(gradient["cell"][0], jax.tree.map(lambda p: p.grad.numpy(), weights), 20 * TOLERANCE[dtype])


def test_at_rate_0_the_window_is_the_plain_one_and_draws_nothing():
    plain, params, carry = model(layers=2)
    zero = tb.lstm(FEATURES, layers=2, zoneout=(0.0, 0.0), weight_drop=0.0)
    ours, theirs = (str(jax.make_jaxpr(lambda *a, m=m: pullback(m.unroll, *a, key=KEYS))(params, carry, window())) for m in (zero, plain))  # fmt: skip
    assert re.sub(r"0x\w+", "", ours) == re.sub(r"0x\w+", "", theirs)
    noisy = tb.lstm(FEATURES, layers=2, **NOISY)
    assert "random_bits" not in str(jax.make_jaxpr(noisy.unroll)(params, carry, window()))


def test_without_a_key_zoneout_is_the_mean_of_its_steps_and_weight_drop_is_none():
    lanes = 8192
    (params, carry), x = model()[1:], window(time=1)[:1]
    noisy = tb.lstm(FEATURES, zoneout=(0.25, 0.5))
    carry, x = jax.tree.map(lambda h: jnp.broadcast_to(h[:1], (lanes, *h.shape[1:])), (carry, x))
    drawn, _ = jax.jit(noisy.unroll)(params, carry, x, key=noise.lane_keys(jax.random.key(0), lanes))
    mean, _ = jax.jit(noisy.unroll)(params, carry, x)
    for of_draws, expected in zip(jax.tree.leaves(drawn), jax.tree.leaves(mean), strict=True):
        error = (of_draws.mean(0) - expected[0]) / (of_draws.std(0) / lanes**0.5)
        assert np.abs(error).max() < 5
    dropped = tb.lstm(FEATURES, weight_drop=0.5)
    carry = dropped.initial_carry(params, 2)
    close(*(jax.jit(m.unroll)(params, carry, x[:2]) for m in (dropped, model()[0])), 0)


def test_a_lane_draws_the_same_alone_beside_others_and_in_segments_but_another_each_step():
    options = {"layers": 2, "layer_norm": True} | NOISY
    (fused, params, carry), flags = model(**options), FLAGS["both"]
    whole = jax.jit(fused.unroll)(params, carry, window(), **flags, key=KEYS)
    in_segments = tb.lstm(FEATURES, checkpoint=3, **options)
    close(jax.jit(in_segments.unroll)(params, carry, window(), **flags, key=KEYS), whole)
    one = slice(1, 2)
    alone = {name: flag[one] for name, flag in flags.items()}
    carry = jax.tree.map(lambda h: h[one], carry)
    close(
        jax.jit(fused.unroll)(params, carry, window()[one], **alone, key=KEYS[one]),
        jax.tree.map(lambda y: y[one], whole),
    )
    masks = stays((0.5, 0.5), (64, 32), window(), noise.step_keys(KEYS, TIME))
    assert [mask.shape for mask in masks] == [(LANES, TIME, 64), (LANES, TIME, 32)]
    rows = np.concatenate(masks, -1).reshape(LANES * TIME, -1)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_layouts_convert_there_and_back():
    _, params, _ = model()
    (weights,) = params["cell"]
    close(from_flax(to_flax(weights)), weights)


def products(jaxpr, inside=False):
    """(is it inside a scan, shape of the result) of every matrix product of ``jaxpr``."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append((inside, eqn.outvars[0].aval.shape))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += products(inner, inside or eqn.primitive.name == "scan")
    return found


def test_only_the_recurrent_products_are_inside_the_scan():
    fused, params, carry = model()
    lowered = jax.make_jaxpr(lambda *a: pullback(fused.unroll, *a))(params, carry, window())
    found = products(lowered.jaxpr)
    backward, forward = (columns + -columns % 16 for columns in (FEATURES, 4 * FEATURES))  # rows of whole vectors
    assert sorted(shape for inside, shape in found if inside) == [(LANES, backward), (LANES, forward)]
    weights = {(INPUTS, 4 * FEATURES), (FEATURES, 4 * FEATURES)}
    of_all_steps = {(LANES * TIME, 4 * FEATURES), (LANES * TIME, INPUTS)}  # forward, and back to the inputs
    assert {shape for inside, shape in found if not inside} == weights | of_all_steps


def test_wide_recurrent_weights_are_read_in_tiles():
    units = 1025  # neither its columns nor its quarters come out even
    shapes = Weights((INPUTS, 4 * units), (units, 4 * units), (4 * units,))
    keys = Weights(*jax.random.split(jax.random.key(1), 3))
    weights = jax.tree.map(lambda k, shape: 0.03 * jax.random.normal(k, shape, "float32"), keys, shapes)
    fused, scan = (tb.lstm(units, implementation=kind) for kind in ("fused", "scan"))
    params = {"cell": (weights,)}
    args = params, fused.initial_carry(params, LANES), window(dtype="float32")
    ours = jax.jit(lambda *a: pullback(fused.unroll, *a, resets=FLAGS["resets"]["resets"]))
    close(ours(*args), pullback(scan.unroll, *args, resets=FLAGS["resets"]["resets"]), 2e-4)
    inside = sorted(shape for inside, shape in products(jax.make_jaxpr(ours)(*args).jaxpr) if inside)
    assert inside == [(2, tiles, 4, LANES, 64) for tiles in (9, 33)]
    text = compiled(ours.lower(*args)).as_text()
    if "ynn_fusion" in text:  # what the tiles are for: x is not written out again for every tile
        repeated = rf"f32\[2,\d+,4,{LANES},({-(-units // 4)}|{units})\]"  # quarters of what each product is given
        assert re.search(repeated, text) and not re.search(rf"= {repeated}\S* fusion\(", text)
        entry = text[text.index("ENTRY") :]  # one pass lays the tiles out, forward and backward
        assert len(re.findall(r"= f32\[2,\d+,4,\d+,64\]\S* (?:fusion|copy|transpose)\(", entry)) == 2


def test_resets_and_padding_cost_nothing_when_none():
    fused, params, carry = model()
    text = str(jax.make_jaxpr(lambda *a: pullback(fused.unroll, *a))(params, carry, window()))
    assert f"bool[{LANES}" not in text


def test_compiled_window_copies_no_buffer_of_the_window_in_its_loops():
    fused, params, carry = model("float32")

    def grads(params, carry, x):
        return jax.grad(lambda p: fused.unroll(p, carry, x)[1].sum())(params)

    text = compiled(jax.jit(grads).lower(params, carry, window(dtype="float32"))).as_text()
    bodies = [c for c in text.split("\n\n") if re.search(r"dynamic-update-slice|dynamic_update_slice", c)]
    whole = rf"f32\[{LANES},{TIME},\d+\]\S* copy\("
    entry = text[text.index("ENTRY") :]
    assert bodies and not any(re.search(whole, body) for body in bodies if not body.strip().startswith("ENTRY"))
    assert "while" in entry
    # nor is a place for the gates' cotangents made: they take that of the gates
    assert not re.search(rf"= f32\[{LANES},{TIME},{4 * FEATURES}\]\S* (?:broadcast|fusion\(\S*constant)", entry)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tb.lstm(0), "`features` is 0"),
        (lambda: tb.lstm(3, layers=0), "`layers` is 0"),
        (lambda: tb.lstm(3, implementation="fast"), "`implementation` is 'fast'"),
        (lambda: to_flax(model(projection=2)[1]["cell"][0]), "projection"),
        (lambda: tb.lstm(3, zoneout=(0.1, 1.0)), "`zoneout` is 1.0"),
        (lambda: tb.lstm(3, zoneout=(0.1,)), "one rate, or two"),
        (lambda: tb.lstm(3, weight_drop=-0.1), "`weight_drop` is -0.1"),
        (lambda: to_flax(model(layer_norm=True)[1]["cell"][0]), "layer normalisation"),
        (lambda: tb.weights.to_torch(model(layer_norm=True)[1]), "layer normalisation"),
        (lambda: tb.lstm(3, zoneout=0.1, implementation="cudnn"), "'cudnn', which has no zoneout"),
        (lambda: tb.lstm(3, layer_norm=True, implementation="pallas"), "'pallas', which has no zoneout"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inputs_of_another_width_are_refused():
    fused, params, carry = model()
    with pytest.raises(ValueError, match="What reaches the LSTM"):
        fused.unroll(params, carry, window()[..., :2])
    with pytest.raises(ValueError, match="carry does not fit"):
        fused.unroll(params, carry, window(lanes=2))
