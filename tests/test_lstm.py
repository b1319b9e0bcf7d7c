"""The fused LSTM window against Flax's cell, PyTorch's layer and JAX's own differentiation."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from streams import assert_close, compiled, loss, stream, summed_gradient

import tbptt_jax as tb
from tbptt_jax.lstm import Weights, from_flax, to_flax

LANES, TIME, INPUTS, FEATURES = 3, 7, 4, 5
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


def window(seed=0, dtype="float64", lanes=LANES, time=TIME):
    return jax.random.normal(jax.random.key(seed), (lanes, time, INPUTS), dtype)


def close(a, b, tolerance=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), a, b)


def model(dtype="float64", **options):
    fused = tb.lstm(FEATURES, **options)
    params = fused.init(jax.random.key(1), window())
    noise = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(noise))
    params = jax.tree.map(lambda p, k: (p + 0.1 * jax.random.normal(k, p.shape)).astype(dtype), params, noise)
    carry = jax.tree.map(
        lambda c: jax.random.normal(jax.random.key(3), c.shape, c.dtype), fused.initial_carry(params, LANES)
    )
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
    (after, outputs), vjp = jax.vjp(jax.jit(fused.unroll), params, carry, window())
    close(outputs, y.detach().numpy())
    close([layer[0] for layer in after], list(c_n.detach().numpy()))
    cotangent = jax.random.normal(jax.random.key(6), outputs.shape)
    d_after = jax.tree.map(jnp.ones_like, after)
    torch.autograd.backward(
        [y, h_n, c_n], [torch.tensor(np.asarray(cotangent)), torch.ones_like(h_n), torch.ones_like(c_n)]
    )
    d_params, d_carry, d_x = vjp((d_after, cotangent))
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


def test_two_windows_are_one_of_twice_the_length():
    fused, params, carry = model(layers=2)
    x = window(time=12)

    def in_two(params, carry, x, **flags):
        carry, first = fused.unroll(params, carry, x[:, :5])
        carry, second = fused.unroll(params, carry, x[:, 5:])
        return carry, jnp.concatenate([first, second], 1)

    close(pullback(in_two, params, carry, x), pullback(fused.unroll, params, carry, x))


@pytest.mark.parametrize("checkpoint", [3, "sqrt"])
def test_checkpoints_change_no_number(checkpoint):
    fused, params, carry = model()
    kept = tb.lstm(FEATURES, checkpoint=checkpoint)
    flags = FLAGS["both"]
    close(
        pullback(kept.unroll, params, carry, window(), **flags),
        pullback(fused.unroll, params, carry, window(), **flags),
    )


def test_padding_may_hold_nan_and_stands_still():
    fused, params, carry = model()
    valid = jnp.arange(TIME) < jnp.array([TIME, 2, 0])[:, None]
    poisoned = jnp.where(valid[..., None], window(), jnp.nan)
    (after, y), grads = pullback(fused.unroll, params, carry, poisoned, valid=valid)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, y, grads)))
    close(jax.tree.map(lambda c: c[2], after), jax.tree.map(lambda c: c[2], carry))
    short = fused.unroll(params, jax.tree.map(lambda c: c[1:2], carry), window()[1:2, :2])[0]
    close(jax.tree.map(lambda c: c[1:2], after), short)


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
    assert {shape for inside, shape in found if not inside and len(shape) == 2} == weights


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


def test_every_influence_and_reweighted_edges_agree_with_the_window_left_to_jax():
    kinds = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    fused, scanned = (tb.lstm(3, readout=nn.Dense(2, **kinds), implementation=how) for how in ("fused", "scan"))
    window = stream(rubbish=np.nan)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), fused.init(jax.random.key(0), window.inputs))
    plain = tb.split(window, 5)
    reweighted = tb.split(window._replace(edges=np.random.default_rng(0).random(window.valid.shape) * 2), 5)
    cases = [(plain, tb.replay(2)), (plain, tb.rtrl()), (plain, tb.uoro()), (reweighted, tb.truncate())]
    for windows, influence in cases:
        estimates = (tb.gradient(m, loss, influence=influence) for m in (fused, scanned))
        a, b = (jax.jit(summed_gradient, static_argnums=0)(each, params, windows)[0] for each in estimates)
        assert_close(a, b, rtol=1e-9)
