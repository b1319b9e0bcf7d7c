"""sLSTM, mLSTM, Gated DeltaNet and Mamba-2 against their equations, a step and a lane at a time, and against JAX's derivatives."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import assert_close, first, loss, stream

import tbptt_jax as tb
from tbptt_jax.cells.linear_scan import Masks
from tbptt_jax.cells.short_convolution import short_convolution

LANES, TIME, INPUTS, FEATURES = 3, 9, 3, 4
close = functools.partial(assert_close, rtol=1e-10, atol=1e-10)
sigmoid, softplus, silu = jax.nn.sigmoid, jax.nn.softplus, jax.nn.silu


def slstm_step(w, carry, x, heads=2, forget=sigmoid):
    """Not stabilised: c and n as they are in the paper, of what the carry holds."""
    h, c, n, m = carry
    c, n = c * jnp.exp(m), n * jnp.exp(m)
    of_heads = [(own @ r).reshape(4, -1) for own, r in zip(h.reshape(heads, -1), w.recurrent, strict=True)]
    i, f, z, o = (x @ w.input + w.bias).reshape(4, -1) + jnp.concatenate(of_heads, 1)
    kept = jnp.log(forget(f)) + m
    m = jnp.where(n == 0, i, jnp.maximum(kept, i))
    c, n = forget(f) * c + jnp.exp(i) * jnp.tanh(z), forget(f) * n + jnp.exp(i)
    h = sigmoid(o) * c / n
    y = h
    if w.norm is not None:
        y = h.reshape(heads, -1)
        y = ((y - y.mean(1)[:, None]) / jnp.sqrt(y.var(1)[:, None] + 1e-5)).reshape(-1) * w.norm
    return type(carry)(h, c / jnp.exp(m), n / jnp.exp(m), m), y


def mlstm_step(w, carry, x, heads=2, key_size=3):
    q, k, v = jnp.split(x @ w.input, [heads * key_size, 2 * heads * key_size])
    i, f = jnp.split(x @ w.gates + w.gates_bias, 2)
    o, read, after = sigmoid(x @ w.output_gate + w.output_bias), [], []
    for head in range(heads):
        m = carry.m[head]
        c, n = carry.c[head] * jnp.exp(m), carry.n[head] * jnp.exp(m)
        own = [each.reshape(heads, -1)[head] for each in (q, k / np.sqrt(key_size), v)]
        c = sigmoid(f[head]) * c + jnp.exp(i[head]) * jnp.outer(own[1], own[2])
        n = sigmoid(f[head]) * n + jnp.exp(i[head]) * own[1]
        m = jnp.maximum(jnp.log(sigmoid(f[head])) + m, i[head])
        after.append((c / jnp.exp(m), n / jnp.exp(m), m))
        # the authors add 1e-6 to the stabilised denominator
        read.append(own[0] @ c / (jnp.maximum(jnp.abs(own[0] @ n), 1) + 1e-6 * jnp.exp(m)))
    return type(carry)(*(jnp.stack(each) for each in zip(*after, strict=True))), o * jnp.concatenate(read)


def gated_delta_step(w, carry, x, heads=2, keys=3, values=2):
    known = jnp.concatenate([carry.inputs, (x @ w.input)[None]])
    q, k, v = jnp.split(silu((known * w.kernel).sum(0)), [heads * keys, 2 * heads * keys])
    a, b = jnp.split(x @ w.gates, 2)
    y, after = [], []
    for head in range(heads):
        own_q, own_k, own_v = (each.reshape(heads, -1)[head] for each in (q, k, v))
        own_q, own_k = (each / jnp.sqrt(each @ each + 1e-6) for each in (own_q, own_k))
        alpha = jnp.exp(-jnp.exp(w.log_rate[head]) * softplus(a[head] + w.step_bias[head]))
        s, beta = carry.memory[head], sigmoid(b[head])
        s = alpha * (s - beta * jnp.outer(own_k, own_k @ s)) + beta * jnp.outer(own_k, own_v)
        o = own_q @ s / np.sqrt(keys)
        y.append(o / jnp.sqrt((o * o).mean() + 1e-6) * w.norm)
        after.append(s)
    return type(carry)(known[1:], jnp.stack(after)), (jnp.concatenate(y) * silu(x @ w.output_gate)) @ w.output


def mamba2_step(w, carry, x, heads=4, state=3, groups=2):
    inner = len(w.output)
    z, ubc, delta = jnp.split(x @ w.input, [inner, len(w.kernel[0]) + inner])
    known = jnp.concatenate([carry.inputs, ubc[None]])
    u, b, c = jnp.split(silu((known * w.kernel).sum(0) + w.bias), [inner, inner + groups * state])
    delta, o, after = softplus(delta + w.step_bias), [], []
    for head in range(heads):
        own_u = u.reshape(heads, -1)[head]
        own_b, own_c = (each.reshape(groups, -1)[head // (heads // groups)] for each in (b, c))
        h = jnp.exp(-jnp.exp(w.log_rate[head]) * delta[head]) * carry.memory[head]
        h = h + delta[head] * jnp.outer(own_b, own_u)
        o.append(own_c @ h + w.skip[head] * own_u)
        after.append(h)
    gated = (jnp.concatenate(o) * silu(z)).reshape(groups, -1)
    normed = gated / jnp.sqrt((gated * gated).mean(1) + 1e-5)[:, None]
    return type(carry)(known[1:], jnp.stack(after)), (normed.reshape(-1) * w.norm) @ w.output


CELLS = {
    "slstm": (functools.partial(tb.slstm, heads=2), slstm_step),
    "slstm exp norm": (
        functools.partial(tb.slstm, heads=2, forget="exp", norm=True),
        functools.partial(slstm_step, forget=jnp.exp),
    ),
    "mlstm": (functools.partial(tb.mlstm, heads=2, key_size=3), mlstm_step),
    "gated_delta": (functools.partial(tb.gated_delta, heads=2, key_size=3, value_size=2), gated_delta_step),
    "mamba2": (functools.partial(tb.mamba2, heads=4, state=3, groups=2), mamba2_step),
}
cells = pytest.mark.parametrize("cell, step", CELLS.values(), ids=CELLS)
RESETS, VALID, EDGES = (
    jax.random.bernoulli(jax.random.key(n), p, (LANES, TIME)) for n, p in ((1, 0.3), (2, 0.6), (3, 0.5))
)
ALL, FEW = jnp.ones((LANES, TIME), bool), jnp.zeros((LANES, TIME), bool).at[0, 0].set(True)
MASKS = {
    "plain": {},
    "both": {"resets": RESETS, "valid": VALID},
    "a reset everywhere": {"resets": ALL, "valid": VALID},
    "nothing there": {"resets": RESETS, "valid": ~ALL},
    "edges": {"resets": RESETS, "valid": VALID, "edges": 1.5 * EDGES},
}


def inputs(time=TIME, seed=0):
    return jax.random.normal(jax.random.key(seed), (LANES, time, INPUTS))


def drawn(tree, seed=2, scale=0.7):
    """A tree of the same shapes, each number drawn."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jax.device_put((scale * rng.normal(size=p.shape)).astype(p.dtype)), tree)


def by_steps(model, step, begin=None):
    """The cell's equations as a recurrence, of which `from_step` knows resets, padding and edges."""

    def of_lanes(params, carry, x):
        carry, y = jax.vmap(step, (None, 0, 0))(params["cell"][0], carry[0], x)
        return (carry,), y

    return tb.from_step(of_lanes, model.init, model.initial_carry, begin=begin)


def some_carry(model, params):
    """One that a model could have come to."""
    return jax.jit(model.unroll)(params, model.initial_carry(params, LANES), inputs(seed=5))[0]


def implementations(cell):
    return [{}] if cell.func is tb.slstm else [{"implementation": how} for how in ("step", "associative", "chunked")]


@functools.partial(jax.jit, static_argnums=0)
def pullback(unroll, params, carry, x, masks):
    """Outputs where there are steps, the last carry, and the gradients of params, carry and inputs."""

    def run(params, carry, x):
        after, y = unroll(params, carry, x, **masks)
        return after, jnp.where(masks.get("valid", jnp.ones(x.shape[:2], bool))[..., None], y, 0)

    found, back = jax.vjp(run, params, carry, x)
    return found, back(drawn(found, 9))


@cells
def test_numbers_are_those_of_the_equations(cell, step):
    model = cell(FEATURES)
    params = drawn(jax.eval_shape(model.init, jax.random.key(1), inputs()))
    carry, by_hand = some_carry(model, params), by_steps(model, step)
    ways = {str(how): cell(FEATURES, **how) for how in implementations(cell)}
    for name, masks in MASKS.items():
        exact = pullback(by_hand.unroll, params, carry, inputs(), masks)
        for how, way in ways.items() if masks.keys() == MASKS["both"].keys() else [("", model)]:
            try:
                close(pullback(way.unroll, params, carry, inputs(), masks), exact)
            except AssertionError as error:
                raise AssertionError(name, how) from error


@cells
def test_large_gates_empty_memories_and_lanes_without_a_step_stay_finite(cell, step):
    model = cell(FEATURES)
    params = drawn(jax.eval_shape(model.init, jax.random.key(1), inputs()))
    params, carry = jax.tree.map(jnp.float32, (params, model.initial_carry(params, LANES)))
    for scale in (0.0, 1.0, 100.0):  # keys of length 0; gates of some hundreds
        for masks in MASKS.values():
            for at in (params, jax.tree.map(jnp.zeros_like, params)):
                found = pullback(model.unroll, at, carry, jnp.float32(scale * inputs()), masks)
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)), scale


@pytest.mark.parametrize("name", ["slstm", "slstm exp norm", "mlstm"])
def test_exponential_gates_of_100_are_exact_in_float32(name):
    cell, step = CELLS[name]
    model = cell(FEATURES)
    params = drawn(jax.eval_shape(model.init, jax.random.key(1), inputs()), scale=0.3)
    gates = "bias" if name.startswith("slstm") else "gates_bias"
    unroll, by_hand = jax.jit(model.unroll), jax.jit(by_steps(model, step).unroll)
    for size in (-100.0, 100.0):
        (weights,) = params["cell"]
        bias = getattr(weights, gates).at[: FEATURES if gates == "bias" else 2].add(size)
        weights = weights._replace(**{gates: bias})
        exact = by_hand({"cell": (weights,)}, model.initial_carry(params, LANES), inputs(), RESETS)[1]
        found = jax.tree.map(jnp.float32, ({"cell": (weights,)}, model.initial_carry(params, LANES), inputs()))
        # the mLSTM's denominators, differences, may be small
        assert_close(unroll(*found, RESETS)[1], exact, rtol=1e-3, atol=1e-4)


def small(name):
    dense = functools.partial(nn.Dense, dtype=jnp.float64, param_dtype=jnp.float64)
    options = {"encoder": dense(INPUTS), "readout": dense(2), "initial_carry": "learned"}
    return CELLS[name][0](FEATURES, **options, **({"convolution": None} if name == "gated_delta" else {}))


@pytest.mark.parametrize("name", ["slstm", "mlstm", "gated_delta", "mamba2"])
def test_it_is_trained_kept_served_and_spread_over_devices(name, tmp_path):
    model, data = small(name), stream(lanes=4, time=12)
    windows = tb.split(data, 4)
    one = tb.gradient(model, loss, influence=tb.uoro())
    two, trained = tb.sharding.over_lanes(one, tb.sharding.mesh(lane=2)), []
    for each in (one, two):
        step = tb.skip_not_finite(tb.train_step(each, optax.sgd(1e-2)))
        state, metrics = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
        trained.append(jax.device_get((state.params, state.stream.carry, metrics.loss)))
    close(*trained)
    kept = params, carry = trained[0][:2]
    assert np.isfinite(trained[0][2]).all() and all(np.isfinite(tb.carry_health(carry)))
    tb.checkpoint.save(tmp_path / "kept", kept)
    assert_close(tb.checkpoint.load(tmp_path / "kept", like=kept), kept, rtol=0, atol=0)
    tb.weights.save(tmp_path / "weights", params)
    assert_close(tb.weights.load(tmp_path / "weights", like=params), params, rtol=0, atol=0)
    tb.export(model, params, data.inputs[:, 0], tmp_path / "model")
    served, streamed = tb.load_exported(tmp_path / "model"), tb.streaming(model, params)
    for resets in (None, np.array([True, False, False, True])):
        after, y = streamed(carry, data.inputs[:, 0], resets)
        own, theirs = served.step(carry, data.inputs[:, 0], resets)
        close((jax.tree.leaves(own), theirs), (jax.tree.leaves(after), y))


@cells
def test_gradients_are_lowered_for_every_platform(cell, step):
    for how in implementations(cell):
        model = cell(FEATURES, **how)
        shapes = jax.eval_shape(model.init, jax.random.key(1), inputs())
        params = jax.tree.map(lambda p: jnp.ones(p.shape, "float32"), shapes)

        def of_loss(params, carry, x, model=model):
            return jnp.sum(model.unroll(params, carry, x, RESETS, VALID)[1] ** 2)

        of_params = jax.jit(jax.grad(of_loss))
        args = params, model.initial_carry(params, LANES), jnp.float32(inputs())
        for platform in ("cuda", "tpu"):
            jax.export.export(of_params, platforms=[platform])(*args)


@cells
def test_half_precision_is_close(cell, step):
    params = drawn(jax.eval_shape(cell(FEATURES).init, jax.random.key(1), inputs()), scale=0.3)
    model = cell(FEATURES)
    exact = jax.jit(model.unroll)(params, model.initial_carry(params, LANES), inputs(), RESETS, VALID)
    single, half = (jax.tree.map(lambda p, to=to: p.astype(to), (params, inputs())) for to in ("float32", "bfloat16"))
    for each, (params, x) in ((cell(FEATURES, dtype=jnp.bfloat16), single), (model, half)):
        after, y = jax.jit(each.unroll)(params, each.initial_carry(params, LANES), x, RESETS, VALID)
        assert {leaf.dtype for leaf in jax.tree.leaves((after, y))} == {x.dtype}
        if cell.func is not tb.mlstm:  # whose denominators may be small
            assert_close(jnp.float32(y[VALID]), exact[1][VALID], rtol=0.2, atol=0.2)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_convolution_reaches_back_over_what_is_there(width):
    """Brute force, a lane and a step at a time; windows may be shorter than the convolution."""
    rng = np.random.default_rng(0)
    convolved = jax.jit(short_convolution)
    for time in (1, 3, 9):
        kernel, x = rng.normal(size=(width, 2)), rng.normal(size=(LANES, time, 2))
        carry, valid, resets = (
            rng.normal(size=(LANES, width - 1, 2)),
            rng.random((LANES, time)) < 0.6,
            rng.random((LANES, time)) < 0.3,
        )
        for masks in (Masks(), Masks(resets), Masks(None, valid), Masks(resets, valid)):
            after, y = convolved(kernel, x, carry, None, masks)
            for lane in range(LANES):
                known = list(carry[lane])
                for t in range(time):
                    if masks.resets is not None and resets[lane, t]:
                        known = [np.zeros(2)] * (width - 1)
                    if masks.valid is None or valid[lane, t]:
                        known = [*known, x[lane, t]]
                        close(y[lane, t], (np.array(known) * kernel).sum(0))
                        known = known[1:]
                close(after[lane], np.array(known).reshape(width - 1, 2))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: tb.slstm(4, heads=3), "multiple of 3"),
        (lambda: tb.slstm(4, forget="tanh"), "'sigmoid' or 'exp'"),
        (lambda: tb.mlstm(4, heads=3), "multiple of 3"),
        (lambda: tb.gated_delta(4, heads=3), "multiple of 3"),
        (lambda: tb.gated_delta(4, convolution=0), "at least 1"),
        (lambda: tb.mamba2(4, heads=3), "multiple of 3"),
        (lambda: tb.mamba2(4, heads=2, groups=4), "multiple of 4"),
        (lambda: tb.mlstm(4, implementation="loop"), "`implementation`"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("model", [tb.gated_delta(4), tb.mamba2(4, state=3), tb.mlstm(4, norm=True)])
def test_parameters_in_float16_have_a_finite_gradient_where_padding_is_read_as_zeros(model):
    x = jnp.ones((1, 3, 4))
    params = jax.tree.map(lambda p: p.astype(jnp.float16), jax.jit(model.init)(jax.random.key(0), x))
    valid = np.array([[True, False, True]])

    def total(params):
        return model.unroll(params, model.initial_carry(params, 1), x, None, valid)[1].sum().astype(jnp.float32)

    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(total))(params)))
