"""Every influence against brute force: lag gradients, one by one, from a copy of the parameters for each step.

G[s, t] is the gradient of the loss at s through the parameters' use at t, over all lanes. An estimator of window n gives
the sum of w(s, t)·G[s, t] over its losses s; it is unbiased where E[w] = 1 for all t ≤ s.
"""

import functools
import itertools
import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree
from streams import compiled, some

import tbptt_jax as tb
from tbptt_jax.influence.uoro import push_signs

F64 = jnp.float64
NORMALISER = 7.0
LANES, T, K = 3, 26, 4  # seven windows, the last with two steps of padding
KEY = jax.random.key(3)


# Models, all float64


def bare(units=3, features=2):
    """A step function whose carry is a dict with a step counter, and whose initial carry is learned."""

    def init(key, inputs):
        keys = jax.random.split(key, 3)
        return {
            "w": 0.6 * jax.random.normal(keys[0], (units + features, units), F64),
            "start": jax.random.normal(keys[1], (units,), F64),
            "out": jax.random.normal(keys[2], (units, 1), F64),
        }

    def initial_carry(params, lanes):
        h = jnp.broadcast_to(params["start"], (lanes, units))
        return {"h": h, "steps": jnp.zeros(lanes, jnp.int32)}

    def step(params, carry, x):
        h = jnp.tanh(jnp.concatenate([carry["h"], x], -1) @ params["w"])
        return {"h": h, "steps": carry["steps"] + 1}, h @ params["out"]

    return tb.from_step(step, init, initial_carry)


def linen(cell, units=3, readout=True):
    kinds = {"dtype": F64, "param_dtype": F64}
    return tb.from_linen(
        cell(units, kernel_init=some, recurrent_kernel_init=some, **kinds),
        readout=nn.Dense(1, **kinds) if readout else None,
    )


def diagonal(units=2, features=2):
    """A linear recurrent unit: carry, parameters and learned initial carry are complex, the readout's weights are real."""

    def init(key, inputs):
        keys = jax.random.split(key, 4)
        draw = lambda key, *shape: jax.random.normal(key, (*shape, units), jnp.complex128)  # noqa: E731
        a = draw(keys[0])
        return {
            "a": 0.8 * a / jnp.abs(a),
            "b": draw(keys[1], features),
            "start": draw(keys[2]),
            "out": jnp.ones((units, 1)),
        }

    def step(params, h, x):
        h = params["a"] * h + x @ params["b"]
        return h, h.real @ params["out"] + (h.imag**2).sum(-1, keepdims=True) / 9

    return tb.from_step(step, init, lambda params, lanes: jnp.broadcast_to(params["start"], (lanes, units)))


def noisy(units=2):
    """Noise from one draw for all lanes, of their shape."""

    def init(key, inputs):
        return {"w": 0.6 * jax.random.normal(key, (units + 2, units), F64), "out": jnp.ones((units, 1))}

    def initial_carry(params, lanes):
        return {"h": jnp.zeros((lanes, units)), "steps": jnp.zeros(lanes, int)}

    def step(params, carry, x):
        key = jax.random.fold_in(jax.random.key(6), carry["steps"][0])
        mask = jax.random.bernoulli(key, 0.5, (len(x), units))
        h = jnp.tanh(jnp.concatenate([carry["h"] * (0.5 + mask), x], -1) @ params["w"])
        return {"h": h, "steps": carry["steps"] + 1}, h @ params["out"]

    return tb.from_step(step, init, initial_carry)


MODELS = {
    "bare": bare(),
    "complex": diagonal(),
    "one draw": noisy(),
    "lstm": linen(nn.OptimizedLSTMCell),
    "nnx": tb.from_nnx(
        lambda rngs: nnx.GRUCell(2, 3, dtype=F64, param_dtype=F64, rngs=rngs),
        readout=lambda rngs: nnx.Linear(3, 1, dtype=F64, param_dtype=F64, rngs=rngs),
    ),
    "stack": tb.stack(linen(nn.GRUCell, 2, readout=False), linen(nn.SimpleCell, 2)),
}


def loss(outputs, window):
    return (outputs - window.targets)[..., 0] ** 2


def stream(lanes=LANES, time=T, features=2):
    """One window of ragged lanes with a hole, random resets and random weights, some of them 0."""
    rng = np.random.default_rng(0)
    valid = np.arange(time) < rng.permutation(np.linspace(time, time // 2, lanes).astype(int))[:, None]
    valid[0, 9:11] = False
    resets = rng.random((lanes, time)) < 0.06
    resets[:, 0] = True
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], (lanes, time), p=[0.2, 0.2, 0.4, 0.2])
    inputs, targets = rng.normal(size=(lanes, time, features)), rng.normal(size=(lanes, time, 1))
    return tb.Window(inputs, targets, weights, resets, valid)


def first(windows):
    return jax.tree.map(lambda x: x[0], windows)


# Brute force


@functools.cache
def lag_gradients(name):
    """``(params, G [s, t, dim(params)])`` of the stream."""
    params = jax.jit(MODELS[name].init)(KEY, stream().inputs)
    lags = tb.testing.lag_gradients(MODELS[name], scaled, params, stream())
    return params, np.asarray(jax.vmap(jax.vmap(lambda g: ravel_pytree(g)[0]))(lags))


def scaled(outputs, window):
    return loss(outputs, window) / NORMALISER


def sum_of_lags(G, keep, k=K):
    """The sum of w·G for each window of k, ``[windows, dim(params)]``; ``keep(s, t)`` is w."""
    w = np.array([[keep(s, t) for t in range(len(G))] for s in range(len(G))], float)
    by_loss = np.einsum("st,stp->sp", w, G)
    return np.stack([by_loss[n : n + k].sum(0) for n in range(0, len(G), k)])


def tbptt(k1, k2):
    return lambda s, t: t <= s and t >= math.ceil((s + 1) / k1) * k1 - k2


def full(s, t):
    return t <= s


@functools.partial(jax.jit, static_argnums=0)
def frozen(estimate, params, windows, key):
    """The estimate for each window of the stream, ``[windows, dim(params)]``, with the parameters frozen."""

    def update(state, window):
        grads, state, _ = estimate.update(params, state, window)
        return state, ravel_pytree(grads)[0]

    return lax.scan(update, estimate.init(key, params, first(windows)), windows)[1]


@functools.cache
def estimates(name, law):
    """By the influence of one of ``LAWS``."""
    estimate = tb.gradient(MODELS[name], loss, influence=LAWS[law][0], normaliser=NORMALISER)
    params, _ = lag_gradients(name)
    return np.asarray(frozen(estimate, params, tb.split(stream(), K), KEY))


WINDOWS = -(-T // K)
BRUTE = "bare", "complex", "one draw", "stack"  # test_cells.py holds all cells to replay of all and rtrl
LAWS = {
    "truncate": (tb.truncate(), tbptt(K, K)),
    "replay 1": (tb.replay(1), tbptt(K, 2 * K)),
    "replay 2": (tb.replay(2), tbptt(K, 3 * K)),
    "replay all": (tb.replay(WINDOWS - 1), full),
    "rtrl": (tb.rtrl(), full),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", BRUTE)
def test_each_window_s_gradient_is_the_sum_of_the_lag_gradients_that_its_influence_knows(name, law):
    _, G = lag_gradients(name)
    np.testing.assert_allclose(estimates(name, law), sum_of_lags(G, LAWS[law][1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("law", [law for law in LAWS if law != "truncate"])
@pytest.mark.parametrize("name", BRUTE)
def test_truncation_does_not_pass_for_any_other_influence(name, law):
    _, G = lag_gradients(name)
    expected = sum_of_lags(G, LAWS[law][1])
    assert np.abs(sum_of_lags(G, LAWS["truncate"][1]) - expected).max() > 1e-4 * np.abs(expected).max()


def test_replay_of_fewer_windows_does_not_pass_for_more():
    _, G = lag_gradients("bare")
    sums = [sum_of_lags(G, tbptt(K, k2 * K)).sum(0) for k2 in range(1, WINDOWS + 1)]
    for one, other in itertools.combinations(sums[:4], 2):
        assert np.abs(one - other).max() > 1e-6


@pytest.mark.parametrize("name", ["bare", "one draw"])
def test_summed_over_windows_rtrl_and_replay_of_all_are_the_gradient_of_the_whole_stream(name):
    params, _ = lag_gradients(name)
    window, model = stream(), MODELS[name]

    def total(params):
        carry = model.initial_carry(params, LANES)
        _, outputs = model.unroll(params, carry, window.inputs, window.resets, window.valid)
        return jnp.sum(jnp.where(window.valid, window.weights, 0) * loss(outputs, window)) / NORMALISER

    expected = ravel_pytree(jax.jit(jax.grad(total))(params))[0]
    for law in ("rtrl", "replay all"):
        np.testing.assert_allclose(estimates(name, law).sum(0), expected, rtol=0, atol=1e-10)
    assert np.abs(estimates(name, "truncate").sum(0) - expected).max() > 1e-4


def test_the_lag_gradients_are_those_of_a_recurrence_written_by_hand():
    params, G = lag_gradients("bare")
    window = stream()
    wanted = [(5, 2), (8, 8), (14, 3), (25, 20)]

    def losses(copies):
        total = {s: 0.0 for s, _ in wanted}
        for lane in range(LANES):
            h = params["start"]
            for t in range(T):
                p = copies[t]
                h = p["start"] if window.resets[lane, t] else h
                if not window.valid[lane, t]:
                    continue
                h = jnp.tanh(window.inputs[lane, t] @ p["w"][3:] + h @ p["w"][:3])
                if t in total:
                    error = h @ p["out"] - window.targets[lane, t]
                    total[t] += window.weights[lane, t] * jnp.sum(error**2) / NORMALISER
        return [total[s] for s, _ in wanted]

    for jacobian, (s, t) in zip(jax.jit(jax.jacrev(losses))([params] * T), wanted, strict=True):
        np.testing.assert_allclose(ravel_pytree(jacobian[t])[0], G[s, t], rtol=0, atol=1e-12)


def test_a_learned_initial_carry_gets_its_gradient_through_every_reset():
    params, G = lag_gradients("bare")
    of_start = ravel_pytree({**jax.tree.map(jnp.zeros_like, params), "start": jnp.ones(3)})[0] != 0
    exact, cut = sum_of_lags(G, full)[:, of_start], sum_of_lags(G, tbptt(K, K))[:, of_start]
    assert np.abs(exact - cut).max() > 1e-3  # it also reaches windows after the one with the reset
    for law in ("rtrl", "replay all"):
        np.testing.assert_allclose(estimates("bare", law)[:, of_start], exact, rtol=0, atol=1e-10)


# Unbiased influences: every draw, then Monte Carlo


@pytest.mark.parametrize(
    ("make", "lanes", "units", "windows"),
    [(bare, 2, 2, 3), (bare, 1, 3, 4), (diagonal, 2, 1, 3), (noisy, 2, 2, 3)],
    ids=["bare", "one lane", "complex", "one draw"],
)
def test_uoro_averaged_over_all_signs_is_exact(make, lanes, units, windows):
    model, window = make(units), stream(lanes, 24)
    parts = 2 if make is diagonal else 1  # a complex unit has two real numbers
    window = window._replace(valid=None, resets=np.broadcast_to(np.arange(24) == 0, (lanes, 24)))
    params = jax.jit(model.init)(KEY, window.inputs)
    cut = tb.split(window, 24 // windows)

    def of(influence):
        return tb.gradient(model, loss, influence=influence, normaliser=NORMALISER)

    def with_signs(signs):  # [windows, lanes, units]
        def update(state, now):
            window, nu = now
            like = state.influence.carry_sketch
            nu = jax.tree.unflatten(jax.tree.structure(like), [nu.reshape(jax.tree.leaves(like)[0].shape)])
            push = lambda state, linearisation, key: push_signs(state, linearisation, nu)  # noqa: E731
            grads, state, _ = of(tb.uoro()._replace(push=push)).update(params, state, window)
            return state, ravel_pytree(grads)[0]

        return lax.scan(update, of(tb.uoro()).init(KEY, params, first(cut)), (cut, signs))[1]

    draws = np.array(list(itertools.product((-1.0, 1.0), repeat=(windows - 1) * lanes * units * parts)))
    draws = draws.reshape(-1, windows - 1, lanes, units * parts)
    last = np.ones((len(draws), 1, lanes, units * parts))  # nobody reads the last push
    each = jax.jit(jax.vmap(with_signs))(np.concatenate([draws, last], 1))
    exact, truncated = (frozen(of(influence), params, cut, KEY) for influence in (tb.rtrl(), tb.truncate()))
    np.testing.assert_allclose(each.mean(0), exact, rtol=0, atol=1e-10)
    assert each[:, 1:].std(0).max() > 1e-3
    assert np.abs(truncated - exact).max() > 1e-3


def test_uoro_s_noise_falls_with_the_root_of_the_lanes():
    model, one = linen(nn.SimpleCell, 8), stream(1, 40)._replace(valid=None, weights=None, resets=None)
    params = model.init(KEY, one.inputs)
    spread = []
    for lanes in (1, 4, 16, 64):
        window = jax.tree.map(
            lambda x, n=lanes: np.repeat(x, n, 0), one
        )  # as many of one lane: the gradient is the same
        bias = tb.horizon.bias(model, loss, params, window, 2, tb.uoro(), draws=192)
        spread.append(bias.relative_std * math.sqrt(lanes))
    np.testing.assert_allclose(spread, np.mean(spread), rtol=0.15)


@pytest.mark.parametrize("influence", [tb.rtrl(), tb.uoro()], ids=["rtrl", "uoro"])
def test_a_model_whose_lanes_mix_is_refused_by_what_needs_each_lane_alone(influence):
    mixing = tb.from_step(
        lambda p, h, x: ((h + x).mean(0) * p + 0 * h, h), lambda k, x: jnp.ones(2), lambda p, n: jnp.zeros((n, 2))
    )
    window = stream()
    estimate = tb.gradient(mixing, lambda y, w: y[..., 0], influence=influence)
    with pytest.raises(ValueError, match=r"What a lane carries changes with what another lane reads.*`truncate\(\)`"):
        jax.jit(estimate.update)(jnp.ones(2), estimate.init(KEY, jnp.ones(2), window), window)
    for other in (tb.truncate(), tb.replay(2)):  # the advice
        estimate = tb.gradient(mixing, lambda y, w: y[..., 0], influence=other)
        jax.jit(estimate.update)(jnp.ones(2), jax.jit(estimate.init)(KEY, jnp.ones(2), window), window)


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("influence", [tb.rtrl(), tb.uoro()], ids=["rtrl", "uoro"])
def test_the_past_of_a_model_in_half_precision_is_added_up_in_float32(influence, kind):
    model = tb.from_linen(nn.SimpleCell(3, dtype=kind), readout=nn.Dense(1, dtype=kind))
    window = jax.tree.map(lambda x: x.astype(kind) if x.dtype == float else x, stream())
    params = jax.tree.map(lambda p: p.astype(kind), model.init(KEY, window.inputs))
    windows, estimate = tb.split(window, K), tb.gradient(model, loss, influence=influence)
    state = jax.jit(estimate.init)(KEY, params, first(windows))
    for n in range(2):
        grads, state, _ = jax.jit(estimate.update)(params, state, jax.tree.map(lambda x, n=n: x[n], windows))
    of_params = jax.tree.leaves(state.influence[0 if influence.init.__module__.endswith("rtrl") else 1])
    assert {x.dtype for x in of_params} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(kind)}


@pytest.mark.parametrize(("m", "p"), [(WINDOWS - 1, 0.3), (WINDOWS - 1, 0.8), (2, 0.6)])
def test_replay_with_survival_averaged_over_all_reaches_is_replay_of_all_that_it_may_reach(m, p):
    params, G = lag_gradients("bare")
    cut = tb.split(stream(), K)
    estimate = tb.gradient(MODELS["bare"], loss, influence=tb.replay(m, survival=p), normaliser=NORMALISER)

    def reaching(r):
        def update(state, window):
            state = state._replace(influence=state.influence._replace(reach=r))
            grads, state, _ = estimate.update(params, state, window)
            return state, ravel_pytree(grads)[0]

        return lax.scan(update, estimate.init(KEY, params, first(cut)), cut)[1]

    each = np.asarray(jax.jit(jax.vmap(reaching))(jnp.arange(m + 1, dtype=jnp.int32)))
    chance = np.array([p**r * (1 - p) for r in range(m)] + [p**m])
    assert chance.sum() == pytest.approx(1)
    mean = np.einsum("r,rnp->np", chance, each)
    np.testing.assert_allclose(mean, sum_of_lags(G, tbptt(K, (m + 1) * K)), rtol=0, atol=1e-10)
    if m == WINDOWS - 1:  # the whole past: unbiased
        np.testing.assert_allclose(mean, sum_of_lags(G, full), rtol=0, atol=1e-10)
    np.testing.assert_allclose(each[0], sum_of_lags(G, tbptt(K, K)), rtol=0, atol=1e-10)


def test_replay_draws_its_reach_with_the_stated_chances():
    p, m, n = 0.7, 4, 20_000
    model, window = bare(2), first(tb.split(stream(1, 24), 4))
    params = jax.jit(model.init)(KEY, window.inputs)
    estimate = tb.gradient(model, loss, influence=tb.replay(m, survival=p))
    state = estimate.init(KEY, params, window)
    reach = jax.jit(jax.vmap(lambda k: estimate.update(params, state._replace(key=k), window)[1].influence.reach))
    share = np.bincount(reach(jax.random.split(KEY, n)), minlength=m + 1) / n
    chance = np.array([p**r * (1 - p) for r in range(m)] + [p**m])
    assert (np.abs(share - chance) < 4 * np.sqrt(chance * (1 - chance) / n)).all()


@pytest.mark.parametrize("influence", [tb.uoro(), tb.replay(5, survival=0.7)], ids=["uoro", "replay"])
def test_the_mean_over_keys_is_full_bptt_within_four_standard_errors_and_truncation_is_not(influence):
    model, n = linen(nn.OptimizedLSTMCell, 2), 2048
    window = stream(2, 24)
    params = jax.tree.map(lambda p: 1.5 * p, model.init(KEY, window.inputs))
    cut = tb.split(window, 4)

    def total(influence):
        estimate = tb.gradient(model, loss, influence=influence, normaliser=NORMALISER)
        return jax.jit(jax.vmap(lambda key: frozen(estimate, params, cut, key).sum(0)))

    def inside(draws):
        error = np.abs(draws.mean(0) - exact)
        return (error <= 4 * draws.std(0, ddof=1) / math.sqrt(n) + 1e-10).all()

    exact = np.asarray(total(tb.replay(5))(KEY[None]))[0]
    draws = np.asarray(total(influence)(jax.random.split(KEY, n)))
    assert inside(draws)
    truncated = np.asarray(total(tb.truncate())(KEY[None]))[0]
    assert not inside(np.broadcast_to(truncated, draws.shape))
    assert not inside(draws - exact + truncated)  # nor with the noise: it is small enough to tell


# Resets


@pytest.mark.parametrize(
    "influence",
    [tb.replay(2), tb.replay(2, survival=0.5), tb.rtrl(), tb.uoro()],
    ids=["replay", "random", "rtrl", "uoro"],
)
def test_a_reset_within_a_window_cuts_its_lane_and_no_other(influence):
    model, lane, at = MODELS["bare"], 1, 9
    whole = stream()
    resets = np.zeros((LANES, 12), bool)
    resets[:, 0] = True
    resets[lane, at] = True
    window = tb.Window(whole.inputs[:, :12], whole.targets[:, :12], None, resets)
    params = jax.jit(model.init)(KEY, window.inputs)

    def gradients(influence):
        estimate = tb.gradient(model, loss, influence=influence, normaliser=1.0)
        return jax.jit(jax.vmap(lambda windows, key: frozen(estimate, params, windows, key)[2], (None, 0)))

    def scored(lane):
        weights = np.zeros((LANES, 12))
        weights[lane, at:] = 1
        return tb.split(window._replace(weights=weights), 4)

    known, nothing = gradients(influence), gradients(tb.truncate())
    keys = jax.random.split(KEY, 3)
    np.testing.assert_allclose(known(scored(lane), keys), nothing(scored(lane), keys), rtol=0, atol=1e-14)
    assert np.abs(known(scored(0), keys) - nothing(scored(0), keys)).max() > 1e-3


# Training: jit, vmap, scan


TRAINED = {
    "truncate": tb.truncate(),
    "replay": tb.replay(2),
    "random replay": tb.replay(3, survival=0.5),
    "rtrl": tb.rtrl(),
    "uoro": tb.uoro(),
}


@pytest.mark.parametrize(
    ("name", "influence"),
    [*(("bare", influence) for influence in TRAINED), ("stack", "rtrl"), ("lstm", "uoro"), ("nnx", "replay")],
)
def test_training_is_the_same_in_a_scan_over_seeds_and_update_by_update(name, influence):
    step = tb.train_step(tb.gradient(MODELS[name], loss, influence=TRAINED[influence]), optax.adam(1e-2))
    windows = tb.split(stream(), K)
    keys = jax.random.split(KEY, 2)

    def train(key):
        return tb.train_windows(step, step.init(key, first(windows)), windows)

    together, metrics = jax.jit(jax.vmap(train))(keys)
    state, update = jax.jit(step.init)(keys[1], first(windows)), jax.jit(step.update)
    begun, structure = state.params, jax.tree.structure(state)
    for n in range(WINDOWS):
        state, alone = update(state, jax.tree.map(lambda x, n=n: x[n], windows))
        assert jax.tree.structure(state) == structure
        np.testing.assert_allclose(metrics.loss[1, n], alone.loss, rtol=1e-9)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(jax.tree.map(lambda x: x[1], together)), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)
    assert (ravel_pytree(begun)[0] != ravel_pytree(state.params)[0]).mean() > 0.5
    assert np.isfinite(ravel_pytree(state.params)[0]).all()
    if name == "bare":  # the counter is no gradient's business: it counts the valid steps since the last reset
        counts = np.zeros(LANES, int)
        for t in range(T):
            now = stream()
            counts = np.where(now.resets[:, t], 0, counts) + now.valid[:, t]
        np.testing.assert_array_equal(state.stream.carry["steps"], counts)


def test_replay_remembers_windows_as_they_were_when_parameters_change_and_so_agrees_with_rtrl():
    name = "bare"
    windows = tb.split(stream(), K)

    def train(influence):
        step = tb.train_step(tb.gradient(MODELS[name], loss, influence=influence), optax.sgd(0.1))
        state, _ = tb.train_windows(step, jax.jit(step.init)(KEY, first(windows)), windows)
        return ravel_pytree(state.params)[0]

    exact = train(tb.rtrl())
    np.testing.assert_allclose(train(tb.replay(WINDOWS - 1)), exact, rtol=0, atol=1e-10)
    assert np.abs(train(tb.truncate()) - exact).max() > 1e-4


# Somebody else's influence


def test_the_document_s_influence_is_exact_for_units_that_do_not_mix():
    text = (pathlib.Path(__file__).parent.parent / "docs" / "influences.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    definition = blocks[0]
    assert len([line for line in definition.splitlines() if line.strip()]) <= 30
    names = {}
    for block in blocks:
        exec(compile(block, "docs/influences.md", "exec"), names)

    model, window = names["model"], stream()
    params = jax.jit(model.init)(KEY, window.inputs)
    cut = tb.split(window, K)

    def gradients(influence):
        estimate = tb.gradient(model, loss, influence=influence, normaliser=NORMALISER)
        return np.asarray(frozen(estimate, params, cut, KEY))

    exact = gradients(tb.replay(WINDOWS - 1))
    np.testing.assert_allclose(gradients(names["snap1"]()), exact, rtol=0, atol=1e-10)
    assert np.abs(gradients(tb.truncate()) - exact).max() > 1e-4


# Influence balancing


def balance(s, window):
    return (s - window.targets) ** 2 / 2


@pytest.mark.parametrize(
    ("k", "scored", "right"),
    [(10, "last", False), (40, "last", False), (41, "last", True), (109, "all", False), (110, "all", True)],
)
def test_a_window_s_gradient_has_the_wrong_sign_until_it_sees_the_late_influence(k, scored, right):
    model = tb.tasks.influence_balancing_model()
    unsettled = -(-100 // k)  # windows in which s_1 is still on its way from 1 to -3
    windows = tb.split(tb.tasks.influence_balancing((unsettled + 3) * k), k)
    if scored == "last":
        last = np.broadcast_to(np.arange(k) == k - 1, windows.resets.shape)
        windows = windows._replace(weights=last.astype(float))
    params = model.init(KEY, windows.inputs[0])
    toward = frozen(tb.gradient(model, balance), params, windows, KEY)[unsettled:, 0]
    # θ is above its optimum: it needs to fall, so the gradient to be positive.
    assert (toward > 0).all() if right else (toward < 0).all()
    assert frozen(tb.gradient(model, balance, influence=tb.rtrl()), params, windows, KEY)[-1, 0] > 0


def test_the_sign_of_a_settled_window_changes_at_exactly_these_lengths():
    model, k = tb.tasks.influence_balancing_model(), 120
    windows = tb.split(tb.tasks.influence_balancing(3 * k), k)
    params = model.init(KEY, windows.inputs[0])
    estimate = tb.gradient(model, balance)
    state = estimate.init(KEY, params, first(windows))
    for n in range(2):
        _, state, _ = jax.jit(estimate.update)(params, state, jax.tree.map(lambda x, n=n: x[n], windows))
    window = jax.tree.map(lambda x: x[2], windows)
    only = jax.jit(jax.vmap(lambda w: estimate.update(params, state, window._replace(weights=w[None]))[0]["theta"]))
    at = np.asarray(only(jnp.eye(k)))  # the loss at step t only: a window of t + 1 steps with its loss at the last
    lengths = np.arange(1, k + 1)
    np.testing.assert_array_equal(lengths[at > 0], np.arange(41, k + 1))
    np.testing.assert_array_equal(lengths[at.cumsum() > 0], np.arange(110, k + 1))


def test_rtrl_trains_through_single_steps_to_the_golden_parameters():
    estimate = tb.gradient(tb.tasks.influence_balancing_model(), balance, influence=tb.rtrl())
    step = tb.train_step(estimate, optax.sgd(1e-4))
    windows = tb.split(tb.tasks.influence_balancing(500), 1)
    state = step.init(KEY, first(windows))
    state, _ = tb.train_windows(step, state, jax.tree.map(lambda x: x[:100], windows))
    assert float(state.params["theta"]) == pytest.approx(0.17235314, abs=5e-9)
    state, _ = tb.train_windows(step, state, jax.tree.map(lambda x: x[100:], windows))
    assert float(state.params["theta"]) == pytest.approx(-0.14261030, abs=5e-9)


# Cost


def sub_jaxprs(value):
    for x in value if isinstance(value, list | tuple) else [value]:
        x = getattr(x, "jaxpr", x)
        if hasattr(x, "eqns"):
            yield x


def dot_flops(jaxpr, while_loops):
    """Multiply-adds of a jaxpr's matrix products, a scan's times its length, a while loop's times ``while_loops``."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contract, _), _), lhs = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
        times = {"scan": eqn.params.get("length"), "while": while_loops}.get(eqn.primitive.name, 1)
        for value in eqn.params.values():
            total += times * sum(dot_flops(sub, while_loops) for sub in sub_jaxprs(value))
    return total


def big():
    cell, readout = nn.OptimizedLSTMCell(64, param_dtype=F64), nn.Dense(8, param_dtype=F64)
    rng = np.random.default_rng(0)
    window = tb.Window(rng.normal(size=(16, 8, 32)), rng.normal(size=(16, 8, 8)))
    model = tb.from_linen(cell, readout=readout)
    params = jax.jit(model.init)(KEY, window.inputs)

    def forward(params, carry):
        end, y = lax.scan(lambda h, x: cell.apply(params["cell"], h, x), carry, window.inputs.swapaxes(0, 1))
        y = readout.apply(params["readout"], y.swapaxes(0, 1))
        return jnp.mean(jnp.mean((y - window.targets) ** 2, -1)), end

    def by_hand(params, carry):
        (value, end), grads = jax.value_and_grad(forward, has_aux=True)(params, carry)
        return grads, end, value

    return model, window, params, forward, by_hand


def update_of(model, influence, params, window):
    estimate = tb.gradient(model, lambda y, w: jnp.mean((y - w.targets) ** 2, -1), influence=influence)
    return estimate.update, estimate.init(KEY, params, window)


def test_truncation_costs_no_more_than_a_step_written_by_hand():
    model, window, params, _, by_hand = big()
    update, state = update_of(model, tb.truncate(), params, window)

    def flops(f, *args):
        cost = compiled(jax.jit(f).lower(*args)).cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    assert flops(update, params, state, window) == pytest.approx(flops(by_hand, params, state.carry), rel=0.01)
    g, *_ = jax.jit(update)(params, state, window)
    np.testing.assert_allclose(*(ravel_pytree(x)[0] for x in (g, by_hand(params, state.carry)[0])), atol=1e-12)


def test_the_other_influences_cost_what_they_say():
    model, window, params, forward, by_hand = big()

    def flops(f, *args, while_loops=0):
        return dot_flops(jax.make_jaxpr(f)(*args).jaxpr, while_loops)

    def of(influence, while_loops=0):
        update, state = update_of(model, influence, params, window)
        return flops(update, params, state, window, while_loops=while_loops)

    carry = model.initial_carry(params, 16)
    once, with_backward = flops(forward, params, carry), flops(by_hand, params, carry)
    assert once == 16 * 8 * (64 * 4 * (64 + 32) + 64 * 8)  # lanes * time * (gates of carry and input, readout)
    truncate = of(tb.truncate())
    assert once < truncate <= with_backward
    for m in (1, 2, 5):
        assert truncate < of(tb.replay(m), while_loops=m) <= once + (1 + m) * (with_backward - once)
    assert truncate < of(tb.uoro()) <= 4 * truncate


# Errors


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: tb.replay(0),
            r"`windows` is 0; it needs to be a whole number, at least 1\. For none, use `truncate\(\)`",
        ),
        (lambda: tb.replay(-2), r"`windows` is -2"),
        (lambda: tb.replay(1.5), r"`windows` is 1\.5"),
        (lambda: tb.replay(3, survival=0.0), r"`survival` is 0\.0; it is a probability and needs to be in \(0, 1\]"),
        (lambda: tb.replay(3, survival=1.1), r"`survival` is 1\.1"),
        (lambda: tb.replay(3, survival=float("nan")), r"`survival` is nan"),
    ],
)
def test_replay_says_which_windows_and_survival_it_takes(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def start(name="bare", influence=None):
    windows = tb.split(stream(), K)
    params, _ = lag_gradients(name)
    estimate = tb.gradient(MODELS[name], loss, influence=influence)
    return estimate, params, windows


def test_rtrl_says_how_large_it_would_be_and_suggests_uoro():
    estimate, params, windows = start("bare", tb.rtrl(max_bytes=100))
    theta = ravel_pytree(params)[0].size
    with pytest.raises(
        ValueError,
        match=rf"{LANES} lanes x 3 units x {theta} parameters, 1,512 bytes, and may use 100 bytes.*`uoro\(\)`",
    ):
        estimate.init(KEY, params, first(windows))
    needed = LANES * 3 * theta * 8
    tb.gradient(MODELS["bare"], loss, influence=tb.rtrl(needed)).init(KEY, params, first(windows))
    with pytest.raises(ValueError, match="rtrl would carry a matrix"):
        tb.gradient(MODELS["bare"], loss, influence=tb.rtrl(needed - 1)).init(KEY, params, first(windows))


@pytest.mark.parametrize("influence", TRAINED)
def test_a_carry_of_other_lanes_is_refused(influence):
    estimate, params, windows = start("bare", TRAINED[influence])
    state = estimate.init(KEY, params, first(windows))
    two = jax.tree.map(lambda x: x[:2], first(windows))
    with pytest.raises(ValueError, match="The carry does not fit this window of 2 lanes"):
        estimate.update(params, state, two)


def test_replay_refuses_a_window_of_another_shape():
    estimate, params, windows = start("bare", tb.replay(2))
    state = estimate.init(KEY, params, first(windows))
    with pytest.raises(ValueError, match="cut a stream into windows of one shape"):
        estimate.update(params, state, jax.tree.map(lambda x: x[:, :3], first(windows)))


@pytest.mark.parametrize(
    "pullback",
    [
        lambda state, carry_cotangent: carry_cotangent,
        lambda state, carry_cotangent: {"w": jnp.zeros((5, 3)), "start": jnp.zeros(3)},
        lambda state, carry_cotangent: {"w": jnp.zeros((5, 3)), "start": jnp.zeros(4), "out": jnp.zeros((3, 1))},
    ],
    ids=["carry", "missing", "shape"],
)
def test_a_pullback_that_returns_another_tree_is_refused(pullback):
    estimate, params, windows = start("bare", tb.truncate()._replace(pullback=pullback))
    state = estimate.init(KEY, params, first(windows))
    with pytest.raises(ValueError, match=r"pullback returned .* in the tree and shapes of the parameters, .*'out'"):
        estimate.update(params, state, first(windows))
