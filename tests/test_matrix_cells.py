"""sLSTM, mLSTM, Gated DeltaNet and Mamba-2 against their equations, a step and a lane at a time, and against JAX's derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import assert_close

import tbptt_jax as tb

LANES, TIME, INPUTS, FEATURES = 3, 9, 3, 4
close = functools.partial(assert_close, rtol=1e-9, atol=1e-9)
sigmoid, softplus, silu = jax.nn.sigmoid, jax.nn.softplus, jax.nn.silu


def slstm_step(w, carry, x, heads=2, forget=sigmoid):
    """Not stabilised: c and n as they are in the paper, of what the carry holds."""
    h, c, n, m = carry
    c, n = c * jnp.exp(m), n * jnp.exp(m)
    i, f, z, o = jnp.split(x @ w.input + w.bias, 4)
    for gate, part in enumerate((i, f, z, o)):
        size = FEATURES // heads
        own = [h[k * size :][:size] @ w.recurrent[k, :, gate * size :][:, :size] for k in range(heads)]
        i, f, z, o = (a + jnp.concatenate(own) if k == gate else a for k, a in enumerate((i, f, z, o)))
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
        h = own[0] @ c / (jnp.maximum(jnp.abs(own[0] @ n), 1) + 1e-6 * jnp.exp(m))
        read.append((h - h.mean()) / jnp.sqrt(h.var() + 1e-5) if w.norm is not None else h)
    h = jnp.concatenate(read)
    after = type(carry)(*(jnp.stack(each) for each in zip(*after, strict=True)))
    return after, o * (h if w.norm is None else h * w.norm)


def gated_delta_step(w, carry, x, heads=2, keys=3, values=2):
    qkv, inputs = x @ w.input, None
    if w.kernel is not None:
        known = jnp.concatenate([carry.inputs, qkv[None]])
        inputs, qkv = known[1:], (known * w.kernel).sum(0)
    q, k, v = jnp.split(silu(qkv), [heads * keys, 2 * heads * keys])
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
    return type(carry)(inputs, jnp.stack(after)), (jnp.concatenate(y) * silu(x @ w.output_gate)) @ w.output


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
    "mlstm norm": (functools.partial(tb.mlstm, heads=2, key_size=3, norm=True), mlstm_step),
    "gated_delta": (functools.partial(tb.gated_delta, heads=2, key_size=3, value_size=2), gated_delta_step),
    "gated_delta without": (
        functools.partial(tb.gated_delta, heads=2, key_size=3, value_size=2, convolution=None),
        gated_delta_step,
    ),
    "mamba2": (functools.partial(tb.mamba2, heads=4, state=3, groups=2), mamba2_step),
}
cells = pytest.mark.parametrize("cell, step", CELLS.values(), ids=CELLS)
RESETS, VALID, EDGES = (
    jax.random.bernoulli(jax.random.key(n), p, (LANES, TIME)) for n, p in ((1, 0.3), (2, 0.6), (3, 0.5))
)
ALL, FEW = jnp.ones((LANES, TIME), bool), jnp.zeros((LANES, TIME), bool).at[0, 0].set(True)
MASKS = {
    "plain": {},
    "resets": {"resets": RESETS},
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
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), tree)


def by_steps(model, step, begin=None):
    """The cell's equations as a recurrence, of which `from_step` knows resets, padding and edges."""

    def of_lanes(params, carry, x):
        carry, y = jax.vmap(step, (None, 0, 0))(params["cell"][0], carry[0], x)
        return (carry,), y

    return tb.from_step(of_lanes, model.init, model.initial_carry, begin=begin)


def some_carry(model, params):
    """One that a model could have come to."""
    return model.unroll(params, model.initial_carry(params, LANES), inputs(seed=5))[0]


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
    for name, masks in MASKS.items():
        for carry in (some_carry(model, params), model.initial_carry(params, LANES)):
            both = [pullback(m.unroll, params, carry, inputs(), masks) for m in (model, by_steps(model, step))]
            try:
                close(*both)
            except AssertionError as error:
                raise AssertionError(name) from error
