import jax
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tbptt_jax as tb

sizes = st.integers(1, 12)


@settings(deadline=None)
@given(n=sizes, time=sizes, k=sizes, lanes=sizes, data=st.data())
def test_split_consumes_each_step_once_in_order_and_resets_where_rows_begin(n, time, k, lanes, data):
    k, lanes = min(k, time), min(lanes, n)
    lengths = np.asarray(data.draw(st.lists(st.integers(0, time), min_size=n, max_size=n)))
    assume(lengths.any())
    ids = np.arange(n * time).reshape(n, time) + 1
    windows = tb.split(tb.sequences(ids, ids, lengths), k, lanes=lanes)

    assert windows.inputs.shape == (-(-n // lanes) * -(-time // k), lanes, k)
    per_row = -(-time // k)
    rows = windows.inputs.reshape(-1, per_row, lanes, k).transpose(0, 2, 1, 3).reshape(-1, per_row * k)
    valid = windows.valid.reshape(-1, per_row, lanes, k).transpose(0, 2, 1, 3).reshape(-1, per_row * k)
    resets = windows.resets.reshape(-1, per_row, lanes, k).transpose(0, 2, 1, 3).reshape(-1, per_row * k)
    for row in range(n):
        assert rows[row][valid[row]].tolist() == ids[row, : lengths[row]].tolist()
        assert np.flatnonzero(resets[row]).tolist() == [0]
    assert not valid[n:].any()
    assert jax.vmap(tb.window.step_weights)(windows).sum() == lengths.sum()


@settings(deadline=None)
@given(time=st.integers(1, 60), lanes=sizes, k=sizes)
def test_lanes_lays_out_a_corpus_once_each_lane_continuing_itself(time, lanes, k):
    lanes = min(lanes, time)
    corpus = np.arange(time)
    laid = tb.lanes(corpus, lanes=lanes)
    assert laid.resets[:, 0].all() and not laid.resets[:, 1:].any()
    windows = tb.split(laid, min(k, laid.inputs.shape[1]))
    valid = np.ones(windows.inputs.shape, bool) if windows.valid is None else windows.valid
    in_lanes = windows.inputs.swapaxes(0, 1).reshape(lanes, -1)
    in_valid = valid.swapaxes(0, 1).reshape(lanes, -1)
    assert np.concatenate([row[v] for row, v in zip(in_lanes, in_valid, strict=True)]).tolist() == corpus.tolist()
    assert np.argwhere(windows.resets).tolist() == [[0, lane, 0] for lane in range(lanes)]


@settings(deadline=None)
@given(n=sizes, time=sizes, k=sizes, stride=sizes)
def test_slide_is_the_plain_loop(n, time, k, stride):
    k = min(k, time)
    x = np.random.default_rng(0).normal(size=(n, time, 2))
    loop = [x[i, s : s + k] for i in range(n) for s in range(0, time - k + 1, stride)]
    cut = tb.slide(tb.Window(x, x), k, stride)
    np.testing.assert_array_equal(cut.inputs, loop)
    np.testing.assert_array_equal(cut.targets, loop)
    assert cut.resets[:, 0].all() and not cut.resets[:, 1:].any()


def test_the_studys_sequences_become_its_windows():
    key = jax.random.key(0)
    assert tb.slide(tb.tasks.first_bit(key, 1000), 10).inputs.shape == (11000, 10, 1)
    assert tb.slide(tb.tasks.first_bit(key, 200), 10).inputs.shape == (2200, 10, 1)


def test_stateless_begins_every_window_anew_and_keeps_the_resets_within():
    sequences = tb.sequences(np.zeros((2, 9, 1)))
    inside = sequences._replace(resets=sequences.resets | (np.arange(9) == 4))
    resets = tb.stateless(tb.split(inside, 3)).resets
    assert resets[:, :, 0].all()
    assert np.argwhere(resets[:, :, 1:]).tolist() == [[1, 0, 0], [1, 1, 0]]


def test_resets_within_a_sequence_go_with_their_step_into_every_cut():
    rng = np.random.default_rng(0)
    marks = rng.random((3, 9)) < 0.4
    starts = np.arange(9) == 0
    windows = tb.split(tb.Window(marks * 1.0, resets=marks), 4)
    np.testing.assert_array_equal(windows.resets.swapaxes(0, 1).reshape(3, -1)[:, :9], marks | starts)
    cut = tb.slide(tb.Window(marks * 1.0, resets=marks), 4)
    np.testing.assert_array_equal(cut.resets[:, 1:], cut.inputs[:, 1:] > 0)
    assert cut.resets[:, 0].all()


def test_a_window_of_pytrees_is_cut_leaf_by_leaf():
    inputs = {"text": np.arange(12).reshape(2, 6), "image": np.zeros((2, 6, 3, 3))}
    windows = tb.split(tb.sequences(inputs), 2)
    assert windows.inputs["image"].shape == (3, 2, 2, 3, 3)
    assert windows.inputs["text"][1].tolist() == [[2, 3], [8, 9]]
