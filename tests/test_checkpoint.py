"""A checkpoint is whole or it is not there, and what goes on from it is what would have been."""

import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from streams import first, loss, lstm, stream

import tbptt_jax as tb
from tbptt_jax import checkpoint, sharding

MESH = jax.make_mesh((2,), ("lane",), axis_types=(jax.sharding.AxisType.Auto,))
WINDOWS = tb.split(stream(), 5)
HALF = len(WINDOWS.inputs) // 2
SETTINGS = {"window": 5, "lanes": [4]}


def part(first=0, last=None):
    return jax.tree.map(lambda x: x[first:last], WINDOWS)


def bits(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
        for x in jax.tree.leaves(tree)
    ]


def saved(directory, *updates, state=None, settings=SETTINGS):
    """Checkpoints of ``updates``, whose state says which."""
    state = {"x": jnp.arange(3.0), "key": jax.random.key(1)} if state is None else state
    with checkpoint.open(directory, settings) as store:
        for update in updates:
            store.save(update, {**state, "update": jnp.int32(update)}, {"history": [update, 0.1]})
    return {**state, "update": jnp.int32(0)}


def restored(directory, like, settings=SETTINGS):
    with checkpoint.open(directory, settings) as store:
        return store.restore(like)


@pytest.mark.parametrize(
    "influence", [tb.truncate(), tb.replay(2), tb.rtrl(), tb.uoro()], ids=["truncate", "replay", "rtrl", "uoro"]
)
def test_a_run_goes_on_bit_for_bit(tmp_path, influence):
    step = tb.train_step(tb.gradient(lstm(), loss, influence=influence), optax.adam(1e-2))
    init = lambda: step.init(jax.random.key(0), first(WINDOWS))  # noqa: E731
    with checkpoint.open(tmp_path, SETTINGS) as store:
        assert store.restore(jax.eval_shape(init)) is None
        state, _ = tb.train_windows(step, init(), part(0, HALF))
        store.save(HALF, state, {"loss": 0.1 + 0.2})
        there = bits(state)
        state, metrics = tb.train_windows(step, state, part(HALF))  # donates what is being saved
    update, again, data = restored(tmp_path, jax.eval_shape(init))
    assert update == HALF == again.updates and data == {"loss": 0.1 + 0.2} and bits(again) == there
    again, its_metrics = tb.train_windows(step, again, part(HALF))
    assert bits((again, its_metrics)) == bits((state, metrics))


def test_one_devices_run_goes_on_over_two(tmp_path):
    step = tb.train_step(tb.gradient(lstm(), loss), optax.adam(1e-2))
    state, _ = tb.train_windows(step, step.init(jax.random.key(0), first(WINDOWS)), part(0, HALF))
    with checkpoint.open(tmp_path, SETTINGS) as store:
        store.save(HALF, state, None)
    lane, everywhere = NamedSharding(MESH, P("lane")), NamedSharding(MESH, P())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state)
    carry = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lane), state.stream.carry)
    _, again, _ = restored(tmp_path, like._replace(stream=like.stream._replace(carry=carry)))
    assert bits(again) == bits(state)
    assert {x.sharding for x in jax.tree.leaves(again.stream.carry)} == {lane}
    _, metrics = tb.train_windows(step, state, part(HALF))
    again, its_metrics = tb.train_windows(step, again, sharding.place(part(HALF), MESH))
    np.testing.assert_allclose(its_metrics.loss, metrics.loss, rtol=1e-9)


def test_a_run_over_lanes_goes_on_bit_for_bit(tmp_path):
    step = tb.train_step(sharding.over_lanes(tb.gradient(lstm(), loss, influence=tb.uoro()), MESH), optax.adam(1e-2))
    state = step.init(jax.random.key(0), first(WINDOWS))
    state, _ = tb.train_windows(step, state, sharding.place(part(0, HALF), MESH))
    with checkpoint.open(tmp_path, SETTINGS) as store:
        store.save(HALF, state, None)
    _, again, _ = restored(tmp_path, state)
    assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, state)
    ends = [tb.train_windows(step, s, sharding.place(part(HALF), MESH)) for s in (again, state)]
    assert bits(ends[0]) == bits(ends[1])


def test_kinds_of_leaves_and_the_number_kept(tmp_path):
    state = {
        "bfloat16": jnp.full(3, 0.1, jnp.bfloat16),
        "bool": jnp.array([True, False]),
        "empty": jnp.zeros((0, 3)),
        "keys": jax.random.split(jax.random.key(0, impl="rbg"), 2),
        "nan": np.float32([np.nan, np.inf]),
    }
    like = saved(tmp_path, 5, 10, 15, 20, state=state)
    update, again, data = restored(tmp_path, like)
    assert bits(again) == bits({**state, "update": jnp.int32(20)}) and (update, data) == (20, {"history": [20, 0.1]})
    assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, like)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [10, 15, 20]


def numbers():
    """State of every kind, and what is kept of each without 64 bits in JAX."""
    return {
        "whole": 2**60 + np.arange(3),
        "real": np.array(0.1),
        "other order": np.arange(6, dtype=">i4")[::2],
        "eighth": np.ones(3, jnp.float8_e4m3fn),
        "half": jnp.full(3, 0.1, jnp.bfloat16),
        "empty": np.zeros((0, 3)),
        "number": 3,
        "fraction": 0.1,
        "yes": True,
        "turn": 1 + 2j,
        "scalar": np.float64(0.1),
        "nothing": None,
    }


def test_state_is_kept_bit_for_bit_and_of_its_kind_whatever_jax_holds(tmp_path):
    checkpoint.save(tmp_path, {**numbers(), "jax": jnp.array(0.1, jnp.float64)})
    with jax.enable_x64(False):
        like = numbers()
        got = checkpoint.load(tmp_path, {**like, "jax": jax.ShapeDtypeStruct((), np.float64)})
    assert isinstance(got["jax"], np.ndarray) and got.pop("jax") == np.float64(0.1)
    for name, value in like.items():
        assert type(got[name]) is type(value) and np.asarray(got[name]).dtype == np.asarray(value).dtype, name
        assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), name


@pytest.mark.parametrize(
    "leaf", ["text", np.array([None]), np.array(["2020"], "datetime64[D]"), np.ma.masked_array([1.0]), print]
)
def test_what_is_no_number_is_refused_before_anything_is_written(tmp_path, leaf):
    with pytest.raises(ValueError, match=r"`bad` is .*; a checkpoint holds arrays of numbers, numbers and keys: give"):
        checkpoint.save(tmp_path, {"good": jnp.zeros(3), "bad": leaf})
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_an_empty_state_is_a_state_and_a_donated_one_is_refused(tmp_path):
    checkpoint.save(tmp_path / "empty", {})
    assert checkpoint.load(tmp_path / "empty", {}) == {}
    step = tb.train_step(tb.gradient(lstm(), loss), optax.sgd(0.1))
    state = step.init(jax.random.key(0), first(WINDOWS))
    tb.train_windows(step, state, WINDOWS)
    with pytest.raises(ValueError, match=r"`stream.carry.* was given to a function that wrote into it.*jnp\.copy"):
        checkpoint.save(tmp_path / "donated", state)
    checkpoint.save(tmp_path / "params", state.params)


def test_a_checkpoint_under_another_s_number_is_not_taken_for_it(tmp_path):
    like = saved(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "3")
    with pytest.warns(UserWarning, match=r"/3 is broken: it is that of update 2, moved here"):
        assert restored(tmp_path, like).update == 1


def test_json_of_another_form_is_a_broken_checkpoint_whatever_its_checksum(tmp_path):
    like = saved(tmp_path / "whole", 1)
    path = next(path for path in (tmp_path / "whole" / "1" / "run").rglob("*") if b"checksum" in path.read_bytes())
    run = json.loads(path.read_text())
    places = [
        (),
        ("update",),
        ("settings",),
        ("leaves",),
        ("leaves", 0),
        *(("leaves", i, name) for i in (0, 1) for name in run["content"]["leaves"][0]),
    ]
    for i, place in enumerate(places):
        for j, value in enumerate((None, [], {}, "no", -1, [[3], "nonsense"])):
            content = json.loads(json.dumps(run["content"]))
            at = content
            for name in place[:-1]:
                at = at[name]
            if place and at[place[-1]] == value:
                continue
            if place:
                at[place[-1]] = value
            else:
                content = value
            directory = tmp_path / f"{i}-{j}"
            shutil.copytree(tmp_path / "whole", directory)
            broken = {"content": content, "checksum": checkpoint._checksum_of_json(content)}
            (directory / path.relative_to(tmp_path / "whole")).write_text(json.dumps(broken))
            with pytest.raises(ValueError, match=r"is broken: |of another run: ") as told:
                restored(directory, like)
            assert str(told.value).endswith(".")


def test_nothing_is_said_in_a_program_that_has_not_set_absl_up(tmp_path):
    program = (
        "import sys, numpy as np, tbptt_jax as tb\n"
        "for _ in range(2): tb.checkpoint.save(sys.argv[1], {'x': np.ones(3)})\n"
        "tb.checkpoint.load(sys.argv[1], {'x': np.ones(3)})\n"
        "with tb.checkpoint.open(sys.argv[2], {}) as store: store.save(1, {'x': np.ones(3)}, None)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=pathlib.Path(__file__).parents[1],
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip, lambda path: path.unlink()], ids=["truncate", "flip", "lose"])
def test_a_broken_checkpoint_is_told_of_and_the_one_before_it_used(tmp_path, harm):
    noise = {"x": jax.random.normal(jax.random.key(0), 500)}
    like = saved(tmp_path / "whole", 2, 3, state=noise)
    found = {}
    for i, file in enumerate(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "3").rglob("*")):
        shutil.copytree(tmp_path / "whole", directory := tmp_path / str(i))
        if (directory / file).is_file():
            harm(directory / file)
            with checkpoint.open(directory, SETTINGS) as store, warnings.catch_warnings(record=True) as told:
                update, state, _ = store.restore(like)
                assert bits(state) == bits({**noise, "update": jnp.int32(update)})  # never anything else
                found[file] = [str(warning.message) for warning in told if "is broken" in str(warning.message)]
                assert update == (2 if found[file] else 3)
                if found[file]:
                    assert re.fullmatch(
                        rf"The checkpoint {directory}/3 is broken: .+ It is set aside as 3.broken; update 2 is used.",
                        found[file][0],
                    )
                    store.save(3, {**state, "update": jnp.int32(33)}, None)  # its place is free again
            assert not found[file] or restored(directory, like).state["update"] == 33
    needed = max(found, key=lambda file: (tmp_path / "whole" / file).stat().st_size), pathlib.Path("3/run/metadata")
    print(*found.values(), sep="\n")
    assert all(found[file] for file in needed)


def test_all_broken_is_a_sentence_and_touches_nothing(tmp_path):
    like = saved(tmp_path, 1, 2)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"/2 is broken: .*/1 is broken: .* begin in another directory, or remove"):
        restored(tmp_path, like)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_run_is_refused(tmp_path):
    like = saved(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"of another run: there window 5, here 7.*settings of then.*another directory"
    ):
        restored(tmp_path, like, {**SETTINGS, "window": 7})
    with pytest.raises(ValueError, match=r"there `x` float64\[3\], here float64\[4\]; `y` nothing, here"):
        restored(tmp_path, {**like, "x": jnp.zeros(4), "y": jnp.zeros(4)})
    assert restored(tmp_path, like).update == 1


def test_a_full_disk_is_a_sentence_and_the_last_good_one_is_intact(tmp_path):
    big = {"x": jax.random.normal(jax.random.key(0), 200_000)}
    like = saved(tmp_path, 1, state=big)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # stands for a full disk: a write fails half-way
    try:
        with pytest.raises(OSError, match=r"could not be written to .* update 1 is intact; make room, then run again"):
            saved(tmp_path, 2, state=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert restored(tmp_path, like).update == 1
    saved(tmp_path, 2, state=big)
    assert restored(tmp_path, like).update == 2
