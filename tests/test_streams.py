import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import assert_close, first, loss, lstm

import tbptt_jax as tb

sizes = st.integers(1, 9)


def save(path, array):
    np.save(path, array)
    return tb.streams.open_npy(path)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def stacked(calls):
    return jax.tree.map(lambda *x: np.concatenate(x), *calls)


@settings(deadline=None, max_examples=40)
@given(time=st.integers(2, 70), lanes=sizes, length=sizes, per_call=st.integers(1, 5), epochs=st.integers(1, 3))
def test_a_stream_is_what_split_cuts_again_and_again(time, lanes, length, per_call, epochs):
    lanes = min(lanes, time)
    length = min(length, -(-time // lanes))
    x, y = np.arange(2.0 * time).reshape(time, 2) + 1, {"next": np.arange(time)}
    calls = list(tb.streams.windows(x, y, lanes=lanes, length=length, per_call=per_call, epochs=epochs))
    assert {len(w.resets) for w in calls[:-1]} <= {per_call}
    assert_same(stacked(calls), stacked([tb.split(tb.lanes(x, y, lanes=lanes), length)] * epochs))


def test_the_next_step_is_a_slice_of_the_map(tmp_path):
    series = save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(101, 3)).astype(np.float32))
    (read,) = tb.streams.windows(series[:-1], series[1:], lanes=4, length=7, per_call=99, epochs=1)
    assert isinstance(read.inputs, jax.Array)
    assert_same(read, tb.split(tb.lanes(series[:-1], series[1:], lanes=4), 7))


@settings(deadline=None, max_examples=10)
@given(taken=st.integers(0, 9))
def test_a_restored_stream_goes_on_after_the_element_last_received(taken):
    def start():
        return iter(tb.streams.windows(np.arange(50), lanes=3, length=4, per_call=3))

    first = start()
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    again = start()
    next(again)
    again.set_state(state)
    for _ in range(4):
        assert_same(next(again), next(first))


def test_each_process_reads_its_own_lanes():
    x = np.arange(95)
    whole, *parts = (
        stacked(tb.streams.windows(x, lanes=6, length=5, per_call=2, epochs=1, shard=shard))
        for shard in ((0, 1), (0, 3), (1, 3), (2, 3))
    )
    assert_same(jax.tree.map(lambda *x: np.concatenate(x, 1), *parts), whole)


def test_training_from_disk_is_training_from_memory(tmp_path):
    series = save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(42, 2)))
    windows = tb.split(tb.lanes(series[:-1], series[1:], lanes=2), 5)
    step = tb.train_step(tb.gradient(lstm(), loss), optax.sgd(0.1))
    state, _ = tb.train_windows(step, step.init(jax.random.key(0), first(windows)), windows)
    from_disk = step.init(jax.random.key(0), first(windows))
    for call in tb.streams.windows(series[:-1], series[1:], lanes=2, length=5, per_call=2, epochs=1):
        from_disk, _ = tb.train_windows(step, from_disk, call)
    assert_close(from_disk.params, state.params)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="asks Linux for the resident memory")
def test_what_was_read_of_a_map_does_not_stay_resident(tmp_path):
    def resident_mib():
        return int(re.search(r"RssFile:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

    shape = (1 << 14, 1 << 10)
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape)  # 64 MiB, of which the disk holds nothing
    series = tb.streams.open_npy(tmp_path / "x.npy")
    next(iter(tb.streams.windows(series, lanes=4, length=8, per_call=4)))
    before = resident_mib()
    for _ in tb.streams.windows(series, lanes=4, length=8, per_call=4, epochs=1, place=lambda windows: windows):
        pass
    assert resident_mib() < before + 16


def test_a_program_ends_in_peace_with_a_stream_still_open():
    program = "import numpy as np, tbptt_jax as tb\nreader = iter(tb.streams.windows(np.arange(99), lanes=3, length=4, per_call=3))\nnext(reader)"
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "Exception" not in ran.stderr


def test_characters_are_numbered_and_those_not_known_are_0(tmp_path):
    (tmp_path / "a").write_text("bœuf\r\n🙂b", encoding="utf-8", newline="")
    (tmp_path / "b").write_text("fbx", encoding="utf-8")
    ids, vocabulary = tb.streams.read_characters(tmp_path / "a")
    assert vocabulary == ["�", *sorted(set("bœuf\n🙂"))]
    assert "".join(vocabulary[i] for i in ids) == "bœuf\n🙂b"
    other, same = tb.streams.read_characters(tmp_path / "b", vocabulary)
    assert same == vocabulary and "".join(vocabulary[i] for i in other) == "fb�"
    assert bytes(tb.streams.open_bytes(tmp_path / "a")) == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([{}]), "Python objects"),
        (np.array(["a"]), "holds <U1"),
        (np.zeros(3, ">f4"), "byte order"),
        (np.float32(1), r"shape \[\]"),
        (np.zeros((0, 2)), r"shape \[0, 2\]"),
    ],
)
def test_an_array_that_is_not_numbers_over_time_is_told(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=f"x.npy.*{message}"):
        tb.streams.open_npy(tmp_path / "x.npy")


def test_a_broken_header_of_an_array_is_a_sentence_whatever_breaks_it(tmp_path):
    path, rng = tmp_path / "x.npy", np.random.default_rng(0)
    np.save(path, np.arange(50.0))
    whole = path.read_bytes()
    broken = [whole[:10] + b"{'descr': '<f8', 'shape': (50,), 'fortran_order': (" + whole[61:]]
    broken += [whole.replace(b"(50,)", b"(%d,)" % 10**n, 1) for n in (9, 18, 30)]
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, 128, 3):
            data[at] = rng.integers(0, 256)
        broken.append(bytes(data))
    for data in broken:
        path.write_bytes(data)
        try:
            assert tb.streams.open_npy(path).ndim > 0
        except ValueError as error:
            assert (
                str(error).startswith(str(path)) and str(error).endswith(".") and len(str(error)) < 300 + len(str(path))
            )


def test_a_file_that_is_cut_short_missing_empty_or_not_text_is_told(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(1000))
    whole = path.read_bytes()
    for size in (5000, 40, 3, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.npy is not a whole \.npy file"):
            tb.streams.open_npy(path)
    for read in (tb.streams.open_bytes, tb.streams.read_characters):
        with pytest.raises(ValueError, match=r"x\.npy is empty"):
            read(path)
    for read in (tb.streams.open_npy, tb.streams.open_bytes, tb.streams.read_characters):
        with pytest.raises(ValueError, match="none cannot be read: No such file"):
            read(tmp_path / "none")
    path.write_bytes("é\naé".encode() + b"\xe9")
    with pytest.raises(ValueError, match=r"line 2, byte 4 of it, is 0xe9.*iconv -f LATIN1 -t UTF-8 > "):
        tb.streams.read_characters(path)


@pytest.mark.parametrize("field", ["inputs", "targets"])
def test_what_is_not_finite_on_disk_is_told_with_its_step_when_it_is_reached(tmp_path, field):
    data = np.zeros((60, 2), np.float32)
    data[41, 1] = np.nan
    bad, good = save(tmp_path / "x.npy", data)[1:], np.zeros(59)
    pair = (bad, good) if field == "inputs" else (good, bad)
    calls = iter(tb.streams.windows(*pair, lanes=2, length=5, per_call=1))
    next(calls), next(calls)
    with pytest.raises(ValueError, match=f"`{field}` is not finite at step 41 of .*x.npy"):
        next(calls)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lanes": 21}, "21 lanes of a corpus of 20 steps"),
        ({"lanes": 0}, "`lanes` is 0"),
        ({"length": 6}, "have 5 steps each, and windows of 6"),
        ({"length": 0}, "`length` is 0"),
        ({"shard": (2, 2)}, "`shard` is"),
        ({"shard": (0, 3)}, "a multiple of the count"),
        ({"per_call": 0}, "`per_call` is 0"),
        ({"epochs": 0}, "`epochs` is 0"),
        ({"targets": np.zeros(19)}, "`targets` has shape"),
        ({"inputs": []}, "no inputs"),
    ],
)
def test_a_stream_that_cannot_be_cut_is_told_before_anything_is_read(change, message):
    arguments = {"inputs": np.zeros(20), "lanes": 4, "length": 5, "per_call": 1} | change
    with pytest.raises(ValueError, match=message):
        tb.streams.windows(**arguments)


def test_a_text_shorter_than_one_window_for_each_lane_is_told_with_its_name(tmp_path):
    (tmp_path / "x.txt").write_text("too short")
    text = tb.streams.open_bytes(tmp_path / "x.txt")
    for lanes in (4, 10):
        with pytest.raises(ValueError, match=rf"{lanes} lanes of a corpus of 9 steps of .*x\.txt"):
            tb.streams.windows(text, lanes=lanes, length=5, per_call=1)
