"""What is exported computes, in another process and for any number of lanes, what streaming computes, bit for bit."""

import os
import re
import subprocess
import sys
import zipfile
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

import tbptt_jax as tb


class Carry(NamedTuple):
    z: Any
    keys: Any


def spiral(params, carry, x):
    keys = jax.vmap(jax.random.split)(carry.keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys[:, 0])
    return Carry(params["a"] * carry.z + x["u"] + noise, keys[:, 1]), {"z": carry.z.real, "seen": (x["n"], None)}


VECTOR = np.zeros((1, 2))
HALF = {
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
    "recurrent_kernel_init": nn.initializers.lecun_normal(),  # no QR in half precision
}
MODELS = {
    "lstm": (tb.lstm(4, layers=2, readout=nn.Dense(2)), VECTOR),
    "tokens": (tb.lstm(4, projection=2, encoder=nn.Embed(5, 3), readout=nn.Dense(5)), np.zeros((1,), int)),
    "half": (tb.from_linen(nn.GRUCell(3, **HALF)), VECTOR.astype(jnp.bfloat16)),
    "stack": (tb.stack(tb.from_linen(nn.GRUCell(3, param_dtype=jnp.float64)), tb.lstm(2)), VECTOR),
    "complex, keys, a Python number, a NamedTuple": (
        tb.from_step(
            spiral,
            lambda key, inputs: {"a": 0.5 + 0.5j, "start": np.ones(2)},
            lambda p, lanes: Carry(
                jnp.broadcast_to(p["start"] + 0j, (lanes, 2)), jax.vmap(jax.random.key)(jnp.arange(lanes))
            ),
        ),
        {"u": VECTOR, "n": np.zeros((1,), int)},
    ),
}


def bits(tree):
    keys = jax.dtypes.prng_key
    leaves = [jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, keys) else x for x in jax.tree.leaves(tree)]
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in leaves]


def steps(x, lanes):
    """Some steps with resets and padding, then one without."""
    rng = np.random.default_rng(0)
    for masked in (True, True, False):
        drawn = jax.tree.map(lambda a: rng.integers(0, 5, (lanes, *a.shape[1:])).astype(a.dtype), x)
        yield (drawn, *((rng.random(lanes) < 0.3, rng.random(lanes) < 0.7) if masked else (None, None)))


@pytest.mark.parametrize("name", MODELS)
def test_one_file_serves_any_number_of_lanes_as_streaming_does(name, tmp_path):
    model, x = MODELS[name]
    params = model.init(jax.random.key(0), jax.tree.map(lambda x: x[:, None], x))
    tb.export(model, params, x, tmp_path / "served")
    served, predict = tb.load_exported(tmp_path / "served"), tb.streaming(model, params)
    for lanes in (1, 1000):
        carry, expected = served.initial_carry(lanes), model.initial_carry(params, lanes)
        assert bits(carry) == bits(expected)
        for x_t, resets, valid in steps(x, lanes):
            carry, y = served.step(carry, x_t, resets, valid)
            expected, told = predict(expected, x_t, resets, valid)
            assert bits((carry, y)) == bits((expected, told))
            carry = expected if resets is None else carry  # the carry of training is taken too, whatever its nodes


ALONE = """
import json, sys, zipfile
import jax, numpy as np
from jax import export
jax.config.update("jax_enable_x64", True)
with zipfile.ZipFile(sys.argv[1]) as archive:
    about = json.loads(archive.read("header.json"))["params"]
    params = [np.frombuffer(archive.read(f"params/{n}"), p["dtype"]).reshape(p["shape"]) for n, p in enumerate(about)]
    begin, step = (export.deserialize(bytearray(archive.read(name))) for name in ("initial_carry", "step"))
carry = begin.call(params, np.ones(3, bool))
for x in np.arange(12.0).reshape(2, 3, 2):
    carry, y = step.call(params, carry, x, np.array([True, False, False]), np.ones(3, bool))
assert not {"flax", "tbptt_jax"} & set(sys.modules)
print(step.platforms, np.asarray(y).tolist())
"""


def test_jax_alone_reads_it(tmp_path):
    model, x = MODELS["lstm"]
    params = jax.tree.map(lambda p: p.astype(jnp.float64), model.init(jax.random.key(0), x[:, None]))
    tb.export(model, params, x, tmp_path / "served")
    carry = model.initial_carry(params, 3)
    for x_t in np.arange(12.0).reshape(2, 3, 2):
        carry, y = tb.streaming(model, params)(carry, x_t, np.array([True, False, False]))
    environment = {**os.environ, "PYTHONPATH": ""}
    ran = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, tmp_path / "served"], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    platforms, told = re.fullmatch(r"(\(.*\)) (\[.*\])\n", ran.stdout).groups()
    assert platforms == "('cpu', 'cuda', 'tpu')"
    np.testing.assert_allclose(np.array(eval(told)), y, rtol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_lstm_is_exported_as_what_every_platform_has(backend, tmp_path, monkeypatch):
    model, x = MODELS["lstm"]
    params = jax.tree.map(lambda p: p.astype(jnp.float32), model.init(jax.random.key(0), x[:, None]))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # where "gpu", training would take cuDNN's
    tb.export(model, params, x.astype(np.float32), tmp_path / "served")
    with zipfile.ZipFile(tmp_path / "served") as archive:
        step = jax_export.deserialize(bytearray(archive.read("step")))
    calls = set(re.findall(r"custom_call @(\w+)", step.mlir_module()))
    assert calls <= {"shape_assertion"}  # that there is a lane


def test_parameters_that_are_on_several_devices_are_served_on_one(tmp_path):
    model, x = MODELS["lstm"]
    params = model.init(jax.random.key(0), x[:, None])
    mesh = jax.sharding.Mesh(jax.devices(), "lanes")
    everywhere = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.P()))
    tb.export(model, everywhere, x, tmp_path / "served")
    served = tb.load_exported(tmp_path / "served")
    told = served.step(served.initial_carry(3), np.ones((3, 2)))
    assert bits(told) == bits(tb.streaming(model, params)(model.initial_carry(params, 3), np.ones((3, 2))))


def test_what_is_not_finite_spoils_its_own_lane_only(tmp_path):
    model, x = MODELS["lstm"]
    params = model.init(jax.random.key(0), x[:, None])
    tb.export(model, params, x, tmp_path / "served")
    served = tb.load_exported(tmp_path / "served")
    _, y = served.step(served.initial_carry(2), np.array([[1.0, 2.0], [np.nan, 0.0]]))
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


COUNTS = tb.from_step(
    lambda params, carry, x: (carry + x, carry),
    lambda key, inputs: 1.0,
    lambda params, lanes: np.zeros((int(lanes), 2)),
)


@pytest.mark.parametrize(
    "model, x, options, said",
    [
        ("lstm", VECTOR, {"platforms": "cpu"}, "`platforms` is 'cpu'; it needs to be a tuple of some of"),
        ("lstm", VECTOR, {"platforms": ("cpu", "gpu")}, "it needs to be a tuple of some of"),
        ("lstm", np.float64(1), {}, r"`inputs` has shape \[\]; it needs the axes \[lanes, ...\]"),
        ("lstm", [1.0, 2.0], {}, "`inputs` holds 1.0, a Python float; give arrays"),
        ("lstm", np.zeros((1, 3)), {}, r"What reaches the LSTM is float64\[lanes, 1, 3\]"),
        (COUNTS, VECTOR, {}, "cannot be exported for any number of lanes .* as `jnp` functions take it"),
        (tb.lstm(4, implementation="cudnn"), VECTOR.astype("f"), {}, "leave `implementation` None"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence_and_leaves_no_file(model, x, options, said, tmp_path):
    model = MODELS[model][0] if isinstance(model, str) else model
    params = model.init(jax.random.key(0), VECTOR[:, None])
    with pytest.raises(ValueError, match=said):
        tb.export(model, params, x, tmp_path / "served", **options)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_what_was_exported_is_a_sentence(tmp_path):
    model, x = MODELS["lstm"]
    params = model.init(jax.random.key(0), x[:, None])
    path = tmp_path / "served"
    tb.export(model, params, x, path)
    served = tb.load_exported(path)
    carry, two = served.initial_carry(2), np.ones((2, 2))
    for arguments, said in (
        ((carry, np.ones((2, 3))), r"`x` is float64\[2, 3\], and what was exported needs float64\[lanes, 2\]"),
        ((carry, np.ones((3, 2))), "`carry` is .* here of 3 lanes as `x` has them"),
        ((carry, two, np.zeros(3, bool)), "`resets` is bool"),
        ((carry, two, None, np.ones(2)), "`valid` is float64"),
        ((carry, two * 1j), "`x` is complex128"),
        ((carry, [1.0, 2.0]), "`x` is"),
        ((carry, None), "`x` is None"),
        ((carry[0], two), "`carry` is"),
        ((carry, np.array([["a", "b"]] * 2)), "needs arrays of numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            served.step(*arguments)
    narrow = served.step(carry, two.astype(np.float32))
    assert bits(narrow) == bits(served.step(carry, two))
    with pytest.raises(ValueError, match="`lanes` is 0"):
        served.initial_carry(0)

    with jax.enable_x64(False), pytest.raises(ValueError, match=r"computes with 64-bit numbers: set .*jax_enable_x64"):
        tb.load_exported(path)
    with pytest.raises(ValueError, match="There is no file"):
        tb.load_exported(tmp_path / "nowhere")
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole.replace(b'"format"', b'"fermat"'), b"[1, 2]"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"cannot be read as what `tb\.export` writes"):
            tb.load_exported(path)
