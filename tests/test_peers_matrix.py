"""sLSTM, mLSTM, Gated DeltaNet, Mamba-2 and their convolution against others' implementations, in float32.

What those gave is pinned beside them, so that it holds where none is installed; `-s` prints the largest differences, as parts of
the largest number of an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import assert_close

import tbptt_jax as tb
from tbptt_jax.cells.linear_scan import Masks
from tbptt_jax.cells.short_convolution import short_convolution

LANES, TIME, INPUTS = 2, 11, 4


def slstm(w, x):
    """xlstm's sLSTM layer, whose input matrices are those of heads: ours are masked so."""
    layers = pytest.importorskip("xlstm.blocks.slstm.layer")
    torch = pytest.importorskip("torch")
    config = layers.sLSTMLayerConfig(embedding_dim=4, num_heads=2, conv1d_kernel_size=0, backend="vanilla")
    config.enable_automatic_mixed_precision = False
    config.dtype = config.dtype_b = config.dtype_r = config.dtype_w = config.dtype_g = config.dtype_s = "float32"
    params = {
        "slstm_cell._recurrent_kernel_": w.recurrent.transpose(1, 2),
        "slstm_cell._bias_": w.bias,
        "group_norm.weight": w.norm - 1,
    }
    for name, of_gate in zip("fizo", w.input.split(4, 1), strict=True):  # the layer swaps the names of i and f
        blocks = [of_gate[2 * head :, 2 * head :][:2, :2].T for head in range(2)]
        params[f"{name}gate.weight"] = torch.stack(blocks)
    return torch.func.functional_call(layers.sLSTMLayer(config), params, (x,))


def mlstm(w, x, parallel=True):
    """xlstm's two ways to run an mLSTM, with its norm."""
    backends = pytest.importorskip("xlstm.blocks.mlstm.backends")
    norms = pytest.importorskip("xlstm.components.ln")
    torch = pytest.importorskip("torch")
    q, k, v = ((x @ part).view(LANES, TIME, 2, -1).transpose(1, 2) for part in w.input.split((6, 6, 4), 1))
    i, f = (x @ w.gates + w.gates_bias).transpose(1, 2)[..., None].split(2, 1)
    if parallel:
        h = backends.parallel_stabilized_simple(q, k, v, i, f)
    else:
        state = torch.zeros(LANES, 2, 3, 2), torch.zeros(LANES, 2, 3, 1), torch.zeros(LANES, 2, 1, 1)
        steps = []
        for t in range(TIME):
            h, state = backends.recurrent_step_stabilized_simple(
                *state, *(each[:, :, t : t + 1].clone() for each in (q, k, v, i, f))
            )
            steps.append(h)
        h = torch.cat(steps, 2)
    norm = norms.MultiHeadLayerNorm(ndim=4)
    h = torch.func.functional_call(norm, {"weight": w.norm - 1}, (h,)).transpose(1, 2).reshape(LANES, TIME, 4)
    return torch.sigmoid(x @ w.output_gate + w.output_bias) * h


def gated_delta(w, x, step_by_step=False):
    """The layer of Qwen3-Next, by chunks or a step at a time."""
    models = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    torch = pytest.importorskip("torch")
    config = models.Qwen3NextConfig(
        hidden_size=4,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=3,
        linear_value_head_dim=2,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    parts = [part.view(4, 2, -1) for part in (*w.input.split((6, 6, 4), 1), w.output_gate)]
    params = {
        "in_proj_qkvz.weight": torch.cat(parts, 2).flatten(1).T,
        "in_proj_ba.weight": w.gates.view(4, 2, 2).flip(1).transpose(1, 2).flatten(1).T,
        "conv1d.weight": w.kernel.T[:, None],
        "dt_bias": w.step_bias,
        "A_log": w.log_rate,
        "norm.weight": w.norm,
        "out_proj.weight": w.output.T,
    }
    layer, by_chunks = models.Qwen3NextGatedDeltaNet(config, 0), models.torch_chunk_gated_delta_rule
    if step_by_step:
        models.torch_chunk_gated_delta_rule = models.torch_recurrent_gated_delta_rule
    try:
        return torch.func.functional_call(layer, params, (x,))
    finally:
        models.torch_chunk_gated_delta_rule = by_chunks


def mamba2(w, x):
    """The block of Mamba-2."""
    models = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    torch = pytest.importorskip("torch")
    config = models.Mamba2Config(
        hidden_size=4, num_heads=4, head_dim=2, state_size=3, n_groups=2, expand=2, conv_kernel=4, num_hidden_layers=1
    )
    params = {
        "in_proj.weight": w.input.T,
        "conv1d.weight": w.kernel.T[:, None],
        "conv1d.bias": w.bias,
        "dt_bias": w.step_bias,
        "A_log": w.log_rate,
        "D": w.skip,
        "norm.weight": w.norm,
        "out_proj.weight": w.output.T,
    }
    return torch.func.functional_call(models.Mamba2Mixer(config, 0), params, (x,))


MODELS = {
    "slstm": tb.slstm(4, heads=2, norm=True),
    "mlstm": tb.mlstm(4, heads=2, key_size=3, norm=True),
    "gated_delta": tb.gated_delta(4, heads=2, key_size=3, value_size=2),
    "mamba2": tb.mamba2(4, heads=4, state=3, groups=2),
}
PEERS = {
    "xlstm 2.0.6, vanilla": ("slstm", slstm),
    "xlstm 2.0.6, parallel": ("mlstm", mlstm),
    "xlstm 2.0.6, recurrent": ("mlstm", lambda w, x: mlstm(w, x, parallel=False)),
    "transformers 5.24.0, Qwen3-Next by chunks": ("gated_delta", gated_delta),
    "transformers 5.24.0, Qwen3-Next by steps": ("gated_delta", lambda w, x: gated_delta(w, x, step_by_step=True)),
    "transformers 5.24.0, Mamba2": ("mamba2", mamba2),
}
# Of the outputs the last of lane 1, the first of the gradient of its first input, and the norms of the gradients of the weights.
PINNED = {
    "slstm": [-0.395893, -6.15567e-05, 11.1101, 4.65334, 2.67711, 5.61324],
    "mlstm": [-0.128632, -0.243457, 20.8761, 2.34584, 1.00526, 4.48786, 2.24888, 7.90815],
    "gated_delta": [-0.145336, -1.72354, 116.440, 67.7528, 2.19004, 1.88228, 1.40249, 19.1716, 26.5527, 21.9920],
    "mamba2": [-1.60390, 1.89068, 53.3936, 43.8111, 13.2669, 2.58172, 2.51306, 6.84771, 18.0433, 18.7719],
}


def given(name):
    """The weights, the inputs and a cotangent of the outputs, in float32."""
    rng = np.random.default_rng(3)
    x, dy = (rng.normal(size=(LANES, TIME, INPUTS)).astype("float32") for _ in range(2))
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), x)["cell"][0]
    weights = jax.tree.map(lambda p: (0.7 * rng.normal(size=p.shape)).astype("float32"), shapes)
    if name == "slstm":  # its matrices are those of heads
        weights = weights._replace(input=weights.input * np.kron(np.eye(2), np.ones((2, 2)))[:, [0, 1, 2, 3] * 4])
    return jax.tree.map(lambda p: np.asarray(p, "float32"), weights), x, dy


def found(name):
    """The outputs, and the gradients of the inputs and the weights."""
    weights, x, dy = given(name)
    model = MODELS[name]

    def run(weights, x):
        params = {"cell": (weights,)}
        return model.unroll(params, model.initial_carry(params, LANES), x)[1]

    @jax.jit
    def derived(weights, x, dy):
        y, back = jax.vjp(run, weights, x)
        return y, back(dy)

    y, (d_weights, d_x) = derived(weights, x, dy)
    if name == "slstm":
        d_weights = d_weights._replace(input=d_weights.input * (weights.input != 0))
    return y, d_x, d_weights


def short(y, d_x, d_weights):
    norms = [float(np.linalg.norm(d)) for d in d_weights if d is not None]
    return [float(y[1, -1, -1]), float(d_x[1, 0, 0]), *norms]


@pytest.mark.parametrize("peer", PEERS)
def test_numbers_and_gradients_are_those_of_others(peer):
    torch = pytest.importorskip("torch")
    name, theirs = PEERS[peer]
    weights, x, dy = given(name)
    weights, x = jax.tree.map(lambda p: torch.tensor(p, requires_grad=True), (weights, x))
    y = theirs(weights, x)
    y.backward(torch.tensor(dy))
    of_theirs = jax.tree.map(lambda p: p.detach().numpy(), (y, x.grad, type(weights)(*(p.grad for p in weights))))
    of_ours = found(name)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(of_ours))
    apart = [
        max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(*map(jax.tree.leaves, (m, o)), strict=True))
        for m, o in zip(of_ours, of_theirs, strict=True)
    ]
    print(f"\n{name}, {peer}: outputs {apart[0]:.1e}, gradients {max(apart[1:]):.1e}", short(*of_theirs))
    assert_close(of_ours, of_theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PINNED)
def test_numbers_are_those_that_others_gave(name):
    np.testing.assert_allclose(short(*found(name)), PINNED[name], rtol=3e-5, atol=3e-5)


def test_the_convolution_is_that_of_recurrentgemma():
    layers = pytest.importorskip("recurrentgemma.jax.layers")
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(3, 9, 5)), jnp.float32) for _ in range(2))
    kernel, bias = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), jnp.zeros(5, jnp.float32)
    resets = jnp.asarray(rng.random((3, 9)) < 0.3).at[:, 0].set(True)
    since = jnp.arange(9) - jax.lax.cummax(jnp.where(resets, jnp.arange(9), 0), axis=1)
    layer = layers.Conv1D(width=5, temporal_width=4)

    def theirs(kernel, x):
        return layer.apply({"params": {"w": kernel, "b": bias}}, x, since, return_cache=False)[0]

    def ours(kernel, x):
        return short_convolution(kernel, x, jnp.zeros((3, 3, 5), jnp.float32), None, Masks(resets))[1]

    (a, of_a), (b, of_b) = (jax.vjp(run, kernel, x) for run in (ours, theirs))
    assert_close((a, of_a(dy)), (b, of_b(dy)), rtol=2e-6, atol=2e-6)
