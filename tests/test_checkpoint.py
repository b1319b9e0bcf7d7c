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
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
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
    begun = jax.device_put(step.init(jax.random.key(0), first(WINDOWS)), jax.devices()[0])  # as what is restored
    like = jax.eval_shape(lambda: begun)
    with checkpoint.open(tmp_path, SETTINGS) as store:
        assert store.restore(like) is None
        state, _ = tb.train_windows(step, begun, part(0, HALF))
        store.save(HALF, state, {"loss": 0.1 + 0.2})
        there = bits(state)
        state, metrics = tb.train_windows(step, state, part(HALF))  # donates what is being saved
    update, again, data = restored(tmp_path, like)
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


def exact(x):
    """A leaf as its type, its dtype and shape, and its bits."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return type(x), str(x.dtype), np.shape(x), bits(x)[0]
    return type(x), repr(x)


NUMBERS = [0.1, -0.0, np.nan, np.inf, 2.0**-1074, 7.0]


LEAVES = {
    **{name: np.array([0, 1, 3]).astype(name) for name in ("int4", "uint4", "int64", "uint8", "S3", "M8[ns]", "m8[s]")},
    **{name: np.array(NUMBERS).astype(name) for name in ("float8_e4m3fn", "bfloat16", "<f2", ">f4", "<f8", "longdouble")},
    **{f"jax {name}": jnp.array(NUMBERS).astype(name) for name in ("float8_e5m2", "bfloat16", "complex64", "int4")},
    **{name: jax.random.key(1, impl=name) for name in ("threefry2x32", "rbg", "unsafe_rbg")},
    "strings": np.array(["a", "åß"]), "no strings": np.array([""]), "big-endian": np.arange(3, dtype=">i8"),
    "bytes": np.frombuffer(b"12345678", "V4"), "a NaN with a message": np.array([0x7FF8DEADBEEF0001]).view(np.float64),
    "every other": np.arange(12.0).reshape(3, 4)[::2, ::-1], "columns first": np.asfortranarray(np.arange(9.0).reshape(3, 3)),
    "no axes": np.array(3.0), "nothing": np.zeros((2, 0)), "nothing in JAX": jnp.zeros((0, 3)),
    "no keys": jax.random.split(jax.random.key(0), 0), "scalar": np.float32(0.1), "date": np.datetime64("2024-01-01"),
    "truth": np.bool_(True), "int": 3, "large": 2**200, "bool": True, "float": 0.1, "not a number": float("nan"),
    "complex": complex(-0.0, np.inf), "str": "å\x00\ud800", "None": None,
}  # fmt: skip


def test_every_leaf_comes_back_in_its_bits_and_its_type(tmp_path):
    checkpoint.save(tmp_path, LEAVES)
    again = checkpoint.load(tmp_path, LEAVES)
    assert {name: leaf if leaf is None else exact(leaf) for name, leaf in again.items()} == {
        name: leaf if leaf is None else exact(leaf) for name, leaf in LEAVES.items()
    }
    assert all(leaf.flags.writeable for leaf in again.values() if isinstance(leaf, np.ndarray))


@pytest.mark.parametrize("state", [{}, None, (), {"x": jnp.zeros((0, 3))}, jnp.float32(1)], ids=repr)
def test_a_state_may_be_empty_or_one_leaf(state, tmp_path):
    checkpoint.save(tmp_path, state)
    checkpoint.save(tmp_path, state)
    assert jax.tree.structure(checkpoint.load(tmp_path, state)) == jax.tree.structure(state)


def test_without_64_bits_what_they_hold_comes_back_and_nothing_is_printed(tmp_path):
    program = f"""
import jax, numpy as np
import tbptt_jax as tb
state = {{"i": np.array([2**60 + 1]), "f": np.array([0.1]), "x": jax.numpy.ones(3)}}
tb.checkpoint.save({str(tmp_path)!r}, state)
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
for like in (state, shapes):
    again = tb.checkpoint.load({str(tmp_path)!r}, like)
    assert again["i"].tolist() == [2**60 + 1] and again["f"].tolist() == [0.1], again
    assert type(again["i"]) is np.ndarray and isinstance(again["x"], jax.Array)
    tb.checkpoint.save({str(tmp_path)!r}, again)
"""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(tb.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "")


def donated():
    x = jnp.ones(3)
    x.delete()
    return x


class Foreign:
    """As another library's tensor."""

    dtype, shape = "foreign.float32", (3,)


@pytest.mark.parametrize(
    "leaf, sentence",
    [
        (donated(), "`x` was donated, as `train_windows` .* save the state that it returned"),
        (np.ma.array([1.0, 2.0], mask=[True, False]), r"`x` is a masked array: give its `\.data` and its `\.mask`"),
        (np.array([None, {}]), "`x` has dtype object"),
        (np.array(["a"], np.dtypes.StringDType()), "`x` has dtype StringDType"),
        (np.zeros(2, [("a", "i4"), ("b", "f8")]), r"`x` is a structured array of \('a', 'b'\): give its fields"),
        (Foreign(), "`x` is .*, a Foreign; give an array, such as `np.asarray` makes"),
        (b"bytes", "`x` is b'bytes', a bytes; give an array"),
        (
            jax.ShapeDtypeStruct((3,), jnp.float32),
            "`x` is ShapeDtypeStruct.*, which has no numbers; give an array",
        ),
        (10**5000, "`x` cannot be written as JSON: Exceeds the limit"),
    ],
    ids=[
        "donated",
        "masked",
        "objects",
        "StringDType",
        "structured",
        "foreign",
        "bytes",
        "shapes",
        "an endless number",
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(leaf, sentence, tmp_path):
    checkpoint.save(tmp_path / "one", {"x": 1})
    with checkpoint.open(tmp_path, SETTINGS) as store, pytest.raises(ValueError, match=sentence) as told:
        store.save(0, {"x": leaf}, None)
    assert len(str(told.value)) < 300 and {path.name for path in tmp_path.iterdir()} == {"one"}


def test_what_is_no_json_and_an_update_that_is_not_the_next_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`settings` cannot be written as JSON: Object of type set"):
        saved(tmp_path, 1, settings={"flags": {1}})
    with pytest.raises(ValueError, match="`settings` is a list; it needs to be a dict"):
        saved(tmp_path, 1, settings=[1])
    like = saved(tmp_path, 5)
    with checkpoint.open(tmp_path, SETTINGS) as store:
        with pytest.raises(
            ValueError, match=r"`data` cannot be written as JSON: Object of type float32 .* `x.tolist\(\)`"
        ):
            store.save(6, like, {"loss": np.float32(1)})
        for update in (5, 3):
            with pytest.raises(ValueError, match=f"`update` is {update}, and .* holds update 5: give a later one"):
                store.save(update, like, None)
        for update in (-1, 2.0, "3"):
            with pytest.raises(ValueError, match=f"`update` is {update!r}; it needs to be a whole number"):
                store.save(update, like, None)
    assert restored(tmp_path, like).update == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"There can be no directory .*/file/run: Not a directory\. Give another"):
        saved(tmp_path / "file" / "run", 1)


def test_settings_that_are_not_a_number_are_the_same_again_and_absent_ones_are_not(tmp_path):
    like = saved(tmp_path, 1, settings={"clip": float("nan"), "name": "nothing"})
    assert restored(tmp_path, like, {"clip": float("nan"), "name": "nothing"}).update == 1
    with pytest.raises(ValueError, match="there name 'nothing', here nothing"):
        restored(tmp_path, like, {"clip": float("nan")})


def test_leaves_go_by_their_paths_whatever_the_order_of_the_tree(tmp_path):
    state = tb.Window(jnp.float32(1), targets=jnp.float32(2))  # a NamedTuple's fields as written, a dict's keys sorted
    like = {"targets": jnp.float32(0), "inputs": jnp.float32(0)}
    assert [*state._asdict()] != sorted(state._asdict())
    checkpoint.save(tmp_path, {"edges": jnp.float32(3), "b": {"c": 4}, "b.c": 5})
    assert checkpoint.load(tmp_path, {"b": {"c": 0}, "b.c": 0, "edges": jnp.float32(0)}) == {
        "edges": 3,
        "b": {"c": 4},
        "b.c": 5,
    }
    checkpoint.save(tmp_path / "fields", TargetsFirst(jnp.float32(2), jnp.float32(1)))
    assert checkpoint.load(tmp_path / "fields", like) == {"targets": 2, "inputs": 1}


class TargetsFirst(NamedTuple):
    targets: jax.Array
    inputs: jax.Array


@pytest.mark.parametrize("links", [False, True])
def test_a_checkpoint_under_anothers_number_is_broken(tmp_path, links):
    like = saved(tmp_path, 1, 2, 3)
    shutil.rmtree(tmp_path / "3")
    (tmp_path / "3").symlink_to("1") if links else shutil.copytree(tmp_path / "1", tmp_path / "3")
    with pytest.warns(UserWarning, match=r"/3 is broken: it is of update 1, under another's number\. It is set aside"):
        again = restored(tmp_path, like)
    assert again.update == again.state["update"] == 2
    assert restored(tmp_path, like).update == 2


def test_a_checkpoint_of_arrays_in_their_own_shape_and_without_its_update_is_read(tmp_path):
    """As they were written before."""
    array = np.arange(6.0).reshape(2, 3)
    leaf = {"path": "x", "dtype": "float64", "shape": [2, 3], "key": None, "checksum": zlib.crc32(array.tobytes())}
    content = {"settings": SETTINGS, "leaves": [{**leaf, "stored": [[2, 3], "float64"]}], "data": None}
    run = {"content": content, "checksum": zlib.crc32(json.dumps(content).encode())}
    with ocp.CheckpointManager(tmp_path) as manager:
        items = {"arrays": ocp.args.StandardSave({"0": array}), "run": ocp.args.JsonSave(run)}
        manager.save(4, args=ocp.args.Composite(**items))
    update, state, _ = restored(tmp_path, {"x": jnp.zeros((2, 3))})
    assert update == 4 and bits(state) == [array.tobytes()]


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
