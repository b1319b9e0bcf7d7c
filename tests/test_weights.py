"""What is written is read bit for bit, by others too; PyTorch's LSTM and GRU compute the same on either side."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

import tbptt_jax as tb

INPUTS, FEATURES, LANES, STEPS = 3, 5, 2, 7
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def flax_layers(cell, layers, dtype):
    of = [tb.from_linen(cell(FEATURES, param_dtype=dtype)) for _ in range(layers)]
    return of[0] if layers == 1 else tb.stack(*of)


MODELS = {
    "tb.lstm": (torch.nn.LSTM, lambda layers, dtype: tb.lstm(FEATURES, layers=layers)),
    "OptimizedLSTMCell": (torch.nn.LSTM, lambda *how: flax_layers(nn.OptimizedLSTMCell, *how)),
    "LSTMCell": (torch.nn.LSTM, lambda *how: flax_layers(nn.LSTMCell, *how)),
    "tb.gru": (torch.nn.GRU, lambda layers, dtype: tb.gru(FEATURES, layers=layers)),
    "GRUCell": (torch.nn.GRU, lambda *how: flax_layers(nn.GRUCell, *how)),
}


def close(a, b, tolerance):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, np.asarray(y).tobytes())


def started(model, dtype="float32"):
    """Parameters drawn by chance, biases too."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((LANES, 1, INPUTS)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 2, dtype), shapes)


@pytest.mark.parametrize("dtype, layers, bias", [("float32", 1, True), ("float64", 2, True), ("float64", 1, False)])
@pytest.mark.parametrize("name", MODELS)
def test_pytorch_and_we_compute_the_same_from_each_other_s_weights(name, dtype, layers, bias):
    module, make = MODELS[name]
    model = make(layers, dtype)
    theirs = module(INPUTS, FEATURES, layers, bias=bias, batch_first=True, dtype=getattr(torch, dtype))
    x = np.random.default_rng(0).normal(size=(LANES, STEPS, INPUTS)).astype(dtype)

    params = tb.weights.from_torch(theirs.state_dict(), started(model, dtype))
    carry = model.initial_carry(params, LANES)
    with torch.no_grad():
        close(jax.jit(model.unroll)(params, carry, x)[1], theirs(torch.tensor(x))[0], TOLERANCE[dtype])

    if bias:  # back again, from weights of ours
        params = started(model, dtype)
        state = tb.weights.to_torch(params)
        theirs.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
        with torch.no_grad():
            close(jax.jit(model.unroll)(params, carry, x)[1], theirs(torch.tensor(x))[0], TOLERANCE[dtype])
        same_bits(tb.weights.from_torch(state, params), params)


def test_what_is_around_the_layers_stays_and_half_precision_too():
    model = tb.lstm(FEATURES, projection=2, encoder=nn.Dense(INPUTS), readout=nn.Dense(1))
    params = started(model, "bfloat16")
    theirs = torch.nn.LSTM(INPUTS, FEATURES, proj_size=2, dtype=torch.bfloat16)
    read = tb.weights.from_torch(theirs.state_dict(), params)
    for part in ("encoder", "readout"):
        same_bits(read[part], params[part])
    (layer,) = read["cell"]
    assert layer.recurrent.dtype == jnp.bfloat16
    close(np.float32(layer.projection).T, theirs.weight_hr_l0.float().detach(), 0)
    same_bits(tb.weights.from_torch(tb.weights.to_torch(params), params), params)


GRU, LSTM = torch.nn.GRU(INPUTS, FEATURES), torch.nn.LSTM(INPUTS, FEATURES)
OURS = started(tb.lstm(FEATURES))


@pytest.mark.parametrize(
    "state, like, said",
    [
        (torch.nn.LSTM(INPUTS, FEATURES, bidirectional=True).state_dict(), OURS, "bidirectional"),
        (torch.nn.LSTM(INPUTS, FEATURES, proj_size=2).state_dict(), OURS, r"projects h to 2 outputs \(proj_size\)"),
        (LSTM.state_dict(), started(tb.lstm(FEATURES, projection=2)), "Layer 0 of the state_dict has no projection"),
        (torch.nn.ModuleDict({"lstm": LSTM, "bn": torch.nn.BatchNorm1d(1)}).state_dict(), OURS, "batch normalisation"),
        (torch.nn.LSTM(INPUTS, FEATURES, 2).state_dict(), OURS, "has 2 layers .* and the model 1: .*layers=2"),
        (GRU.state_dict(), OURS, r"`weight_hh_l0` is \[15, 5\], and the model's cell is an LSTM, of which .* 4 times 5"),
        (LSTM.state_dict(), started(tb.from_linen(nn.GRUCell(FEATURES))), "the model's cell is a GRU"),
        (torch.nn.LSTM(INPUTS, FEATURES, dtype=torch.float64).state_dict(), OURS, r"there `cell.0.input` float64\[3, 20\], here float32\[3, 20\]; `cell.0.rec"),
        (torch.nn.LSTM(2, FEATURES).state_dict(), OURS, r"float32\[2, 20\], here float32\[3, 20\]\. Give `like`"),
        ({}, OURS, "has 0 layers"),
        ({"weight_ih_l0": np.zeros((20, 3), "f")}, OURS, "has no `weight_hh_l0`"),
        ({"weight_ih_l0": None, "weight_hh_l0": None}, OURS, "`weight_hh_l0` is None|`weight_ih_l0` is None"),
        (LSTM.state_dict(), started(tb.from_linen(nn.SimpleCell(FEATURES))), "The cell's parameters are h, i"),
        (LSTM.state_dict(), {"w": np.zeros(2)}, "go to and from those of `tb.lstm`"),
    ],
)  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_a_sentence(state, like, said):
    with pytest.raises(ValueError, match=said):
        tb.weights.from_torch(state, like)


def test_layers_that_are_no_one_module_of_pytorch_are_refused():
    gru, lstm = tb.from_linen(nn.GRUCell(FEATURES)), tb.lstm(FEATURES)
    for model, said in (
        (tb.stack(gru, lstm), "several kinds or sizes"),
        (tb.stack(lstm, tb.lstm(2)), "several kinds or sizes"),
        (tb.stack(tb.lstm(FEATURES, readout=nn.Dense(FEATURES)), lstm), "a readout or an encoder between two layers"),
    ):
        params = started(model)
        with pytest.raises(ValueError, match=said):
            tb.weights.to_torch(params)
        tb.weights.to_torch(params[0])  # what the sentence says to do


TREE = {
    "cell": (started(tb.lstm(2))["cell"][0], np.zeros((0, 3))),
    "half": [jnp.ones((2, 3), jnp.bfloat16) / 3, np.float16(0.1) * np.ones(2, "float16")],
    "scalar": jnp.float64(-0.0),
    "transposed": np.arange(6).reshape(2, 3).T,
    "big-endian": np.arange(3, dtype=">i4").astype("i4"),
    "flags": np.array([True, False]),
    "nan": np.array([0x7FC01234], "u4").view("f4"),
}


def test_parameters_are_read_as_they_were_written_by_us_and_by_pytorch(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    tb.weights.save(path, TREE)
    same_bits(tb.weights.load(path, TREE), TREE)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    read = tb.weights.load(path, like)
    same_bits(read, TREE)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(read))
    with jax.enable_x64(False):
        same_bits(tb.weights.load(path, like), TREE)  # 64 bits stay, in NumPy
    theirs = safetensors.torch.load_file(path)
    assert theirs["half.0"].dtype == torch.bfloat16 and "cell.0.recurrent" in theirs
    np.testing.assert_array_equal(theirs["transposed"], TREE["transposed"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    tb.weights.save(path, TREE["scalar"])  # in its place; a tree that is one array
    same_bits(tb.weights.load(path, TREE["scalar"]), TREE["scalar"])

    safetensors.torch.save_file({"w": torch.ones(2, 3).bfloat16()}, path)
    same_bits(tb.weights.load(path, {"w": jnp.zeros((2, 3), jnp.bfloat16)}), {"w": jnp.ones((2, 3), jnp.bfloat16)})


@pytest.mark.parametrize(
    "params, said",
    [
        ({"a": np.ones(2, complex)}, r"`a` is complex128\[2\], which safetensors has no name for"),
        ({"a": jax.random.key(0)}, r"`a` is key<fry>\[\], .*key_data"),
        ({"a": 1.5}, r"`a` is Python float\[\]"),
        ({"a": np.ones(2, ml_dtypes.int4)}, "`a` is int4"),
        ({"a.b": np.ones(2), "a": {"b": np.ones(2)}}, "Two parameters have the name `a.b`"),
        ({"a": np.ma.masked_array(np.ones(2))}, "masked array"),
        ({"a": None, "b": jax.ShapeDtypeStruct((2,), jnp.float32)}, "has no numbers"),
    ],
)
def test_what_cannot_be_written_is_a_sentence_and_leaves_no_file(params, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        tb.weights.save(tmp_path / "x", params)
    assert not list(tmp_path.iterdir())


def test_all_that_differs_is_said_when_it_is_read(tmp_path):
    path = tmp_path / "x"
    tb.weights.save(path, {"a": np.ones(2), "b": np.ones((2, 3)), "c": np.ones(1)})
    like = {"a": np.ones(2, "float32"), "b": np.ones((3, 2)), "d": np.ones(1)}
    with pytest.raises(ValueError) as error:
        tb.weights.load(path, like)
    assert (
        "`a` float64[2], here float32[2]; `b` float64[2, 3], here float64[3, 2]; `d` nothing, here float64[1]; "
        "`c` float64[1], here nothing"
    ) in str(error.value)
    with pytest.raises(ValueError, match="There is no file"):
        tb.weights.load(tmp_path / "y", like)
    whole = path.read_bytes()
    for broken in (b"", whole[:-1], b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            tb.weights.load(path, like)


def test_without_the_library_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'tbptt_jax\[serve\]'"):
        tb.weights.save(tmp_path / "x", {"a": np.ones(2)})
