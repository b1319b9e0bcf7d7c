"""minGRU, minLSTM, LRU and RG-LRU against others' implementations, in float32, those with resets where theirs have some.

What those gave is pinned beside them, so that it holds where none is installed; `-s` prints the largest differences, as parts of
the largest number of an array.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import assert_close

import tbptt_jax as tb

LANES, TIME, FEATURES = 3, 17, 4
RESETS = np.random.default_rng(5).random((LANES, TIME)) < 0.2
RESETS[:, 0] = True


def of_torch(run):
    """The outputs and gradients of ``run(weights, x)``, written in PyTorch."""

    def theirs(weights, x, dy):
        torch = pytest.importorskip("torch")
        weights, x = jax.tree.map(lambda p: torch.tensor(p, requires_grad=True), (weights, x))
        y = run(torch, weights, x)
        y.backward(torch.tensor(dy))
        of_weights = (torch.zeros_like(p) if p.grad is None else p.grad for p in weights)
        return jax.tree.map(lambda p: p.detach().numpy(), (y, x.grad, type(weights)(*of_weights)))

    return theirs


def of_jax(run):
    """The same of ``run(weights, x)`` in JAX."""

    def theirs(weights, x, dy):
        y, back = jax.vjp(functools.partial(run), *jax.tree.map(jnp.asarray, (weights, x)))
        of_weights, of_x = back(jnp.asarray(dy))
        return y, of_x, of_weights

    return theirs


@of_torch
def min_gru(torch, w, x):
    """Its log-space version, which has no biases."""
    peer = pytest.importorskip("minGRU_pytorch.minGRU").minGRU(FEATURES)
    z, n = w.input.split(FEATURES, 1)
    return torch.func.functional_call(peer, {"to_hidden_and_gate.weight": torch.cat([n, z], 1).T}, (x,))


@of_torch
def min_lstm(torch, w, x):
    peer = pytest.importorskip("minGRU_pytorch.minLSTM").minLSTM(FEATURES)
    f, i, n = w.input.split(FEATURES, 1)
    return torch.func.functional_call(peer, {"to_hidden_and_f_i_gate.weight": torch.cat([n, f, i], 1).T}, (x,))


@of_jax
def lru(w, x):
    peer = pytest.importorskip("memax.linen.semigroups.lru").LRU
    units = len(w.nu_log)
    layer = peer(
        algebra=peer.default_algebra(recurrent_size=units),
        scan=peer.default_scan(),
        hidden_size=FEATURES,
        recurrent_size=units,
    )
    (b_re, b_im), (c_re, c_im) = jnp.split(w.B.T, 2, 0), jnp.split(w.C.T, 2, 1)
    own = {"B_re": b_re, "B_im": b_im, "C_re": c_re, "C_im": c_im, "D": w.D}
    params = {"params": {**own, "nu_log": w.nu_log, "theta_log": w.theta_log, "gamma_log": w.gamma_log}}

    def one_lane(x, resets):
        return layer.apply(params, layer.zero_carry(), (x, resets))[1]

    return jnp.stack([one_lane(*lane) for lane in zip(x, jnp.asarray(RESETS), strict=True)])


def since_reset():
    t = np.arange(TIME)
    return t - np.maximum.accumulate(np.where(RESETS, t, 0), axis=1)


@of_jax
def rg_lru(w, x):
    layers = pytest.importorskip("recurrentgemma.jax.layers")
    r, i = ({"w": p, "b": b} for p, b in zip(jnp.split(w.gates, 2, -1), jnp.split(w.bias, 2, -1), strict=True))
    params = {"params": {"a_param": -w.log_odds, "a_gate": r, "input_gate": i}}
    return layers.RGLRU(width=FEATURES, num_heads=2).apply(params, x, jnp.asarray(since_reset()))[0]


@of_torch
def rg_lru_of_transformers(torch, w, x):
    models = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = models.RecurrentGemmaConfig(lru_width=FEATURES, num_attention_heads=2, hidden_size=FEATURES)
    (w_r, w_i), (b_r, b_i) = (p.chunk(2, -1) for p in (w.gates, w.bias))
    params = {
        "recurrent_param": -w.log_odds,
        "recurrent_gate_weight": w_r,
        "recurrent_gate_bias": b_r,
        "input_gate_weight": w_i,
        "input_gate_bias": b_i,
    }
    return torch.func.functional_call(models.RecurrentGemmaRglru(config), params, (x, torch.tensor(since_reset())))


MODELS = {  # and whether their streams have resets
    "min_gru": (tb.min_gru(FEATURES, positive_candidates=True), False),
    "min_lstm": (tb.min_lstm(FEATURES, positive_candidates=True), False),
    "lru": (tb.lru(FEATURES), True),
    "rg_lru": (tb.rg_lru(FEATURES, heads=2), True),
}
PEERS = {
    "minGRU-pytorch 0.2.1, minGRU": ("min_gru", min_gru),
    "minGRU-pytorch 0.2.1, minLSTM": ("min_lstm", min_lstm),
    "memax 0.1.1, LRU": ("lru", lru),
    "recurrentgemma 1.0.1, RGLRU": ("rg_lru", rg_lru),
    "transformers 5.24.0, RecurrentGemmaRglru": ("rg_lru", rg_lru_of_transformers),
}
# Of the outputs the last of lane 1, the first of the gradient of its first input, and the norms of the gradients of the weights.
PINNED = {
    "min_gru": [0.866774, -0.0196895, 21.8858, 0.0],
    "min_lstm": [0.396845, -2.38933, 13.5308, 0.0],
    "lru": [-3.95132, 3.44556, 4.11619, 9.66983, 40.8564, 69.5947, 56.9468, 15.4821],
    "rg_lru": [0.170101, 0.303854, 2.46502, 6.31879, 3.52121],
}


def given(name):
    """The weights, the inputs and a cotangent of the outputs, in float32."""
    rng = np.random.default_rng(3)
    x, dy = (rng.normal(size=(LANES, TIME, FEATURES)).astype("float32") for _ in range(2))
    shapes = jax.eval_shape(MODELS[name][0].init, jax.random.key(0), x)["cell"][0]
    weights = jax.tree.map(lambda p: (0.7 * rng.normal(size=p.shape)).astype("float32"), shapes)
    if name.startswith("min"):  # theirs has no biases
        weights = weights._replace(bias=0 * weights.bias)
    return weights, x, dy


def found(name):
    """The outputs, and the gradients of the inputs and the weights."""
    model, resets = MODELS[name]

    @of_jax
    def ours(weights, x):
        params = {"cell": (weights,)}
        return model.unroll(params, model.initial_carry(params, LANES), x, RESETS if resets else None)[1]

    y, of_x, of_weights = ours(*given(name))
    return y, of_x, (of_weights._replace(bias=0 * of_weights.bias) if name.startswith("min") else of_weights)


def short(y, of_x, of_weights):
    return [float(y[1, -1, -1]), float(of_x[1, 0, 0]), *(float(np.linalg.norm(d)) for d in of_weights)]


@pytest.mark.parametrize("peer", PEERS)
@jax.enable_x64(False)
def test_numbers_and_gradients_are_those_of_others(peer):
    name, theirs = PEERS[peer]
    of_theirs, of_ours = theirs(*given(name)), found(name)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(of_ours))
    apart = [
        max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)) for a, b in zip(*map(jax.tree.leaves, (m, o)), strict=True))
        for m, o in zip(of_ours, of_theirs, strict=True)
    ]  # fmt: skip
    print(f"\n{name}, {peer}: outputs {apart[0]:.1e}, gradients {max(apart[1:]):.1e}", short(*of_theirs))
    assert_close(of_ours, of_theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PINNED)
@jax.enable_x64(False)
def test_numbers_are_those_that_others_gave(name):
    np.testing.assert_allclose(short(*found(name)), PINNED[name], rtol=3e-5, atol=3e-5)
