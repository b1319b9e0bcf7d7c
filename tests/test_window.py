import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    windows = tb.split(tb.Window(marks * 1.0, resets=marks), 4)
    np.testing.assert_array_equal(windows.resets.swapaxes(0, 1).reshape(3, -1)[:, :9], marks)
    cut = tb.slide(tb.Window(marks * 1.0, resets=marks), 4)
    np.testing.assert_array_equal(cut.resets[:, 1:], cut.inputs[:, 1:] > 0)
    assert cut.resets[:, 0].all()


def test_a_window_of_pytrees_is_cut_leaf_by_leaf():
    inputs = {"text": np.arange(12).reshape(2, 6), "image": np.zeros((2, 6, 3, 3))}
    windows = tb.split(tb.sequences(inputs), 2)
    assert windows.inputs["image"].shape == (3, 2, 2, 3, 3)
    assert windows.inputs["text"][1].tolist() == [[2, 3], [8, 9]]


@pytest.mark.parametrize("lanes", [4, 2, 3])
def test_a_stream_cut_in_its_middle_goes_on_and_only_a_row_that_follows_another_in_a_lane_is_reset(lanes):
    later = jax.tree.map(lambda x: x[:, 3:], tb.lanes(np.arange(40), lanes=4))
    assert not later.resets.any()
    resets = tb.split(later, 2, lanes=lanes).resets  # [groups * 4 windows, lanes, 2]
    expected = np.zeros_like(resets)
    expected[4::4, : 4 - lanes if lanes < 4 else 0, 0] = True
    np.testing.assert_array_equal(resets, expected)


def test_padding_at_a_group_s_end_can_be_left_out_and_what_is_left_is_the_same():
    x = np.arange(6 * 9.0).reshape(6, 9, 1)
    ragged = tb.sequences(x, x, [9, 2, 1, 0, 3, 9])
    every, fewer = tb.split(ragged, 3, lanes=2), tb.split(ragged, 3, lanes=2, drop_padding=True)
    lives = [0, 1, 2, 3, 6, 7, 8]  # of the second group only the first window
    np.testing.assert_array_equal(fewer.inputs, every.inputs[lives])
    np.testing.assert_array_equal(fewer.valid, every.valid[lives])
    late = ragged._replace(resets=ragged.resets | (np.arange(9) == 5))  # a reset in the padding is not nothing
    assert len(tb.split(late, 3, lanes=2, drop_padding=True).resets) == 8
    assert len(tb.split(tb.sequences(x), 3, drop_padding=True).resets) == 3


@settings(deadline=None)
@given(time=st.integers(1, 40), k=sizes, burn_in=st.integers(0, 11))
def test_overlapping_windows_score_each_step_once_after_its_burn_in(time, k, burn_in):
    k = min(k, time)
    burn_in = min(burn_in, k - 1)
    x = np.arange(2 * time).reshape(2, time, 1) + 1.0
    windows = tb.overlap(tb.Window(x, x), k, burn_in)
    assert windows.inputs.shape[1:] == (2, k, 1) and windows.resets[:, :, 0].all()
    scored = np.asarray(jax.vmap(tb.window.step_weights)(windows)) > 0
    assert sorted(windows.inputs[scored].ravel()) == x.ravel().tolist()
    assert not scored[1:, :, :burn_in].any() and scored[0, :, 0].all()
    starts = windows.inputs[:, 0, 0, 0] - 1
    assert np.diff(starts).tolist() == [k - burn_in] * (len(starts) - 1)
    if burn_in:
        assert (windows.edges[1:, :, burn_in] == 0).all() and (windows.edges[0] == 1).all()
        assert (windows.edges[1:].sum(-1) == k - 1).all()


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint8, np.int32, np.float16, jnp.bfloat16, np.float32, np.float64])
def test_weights_of_any_real_kind_mean_the_same_and_their_sum_has_room(kind):
    weights = np.ones((400, 300), kind)
    total = tb.window.step_weights(tb.Window(np.zeros((400, 300, 1)), weights=weights)).sum()
    assert total == 120_000 and total.dtype in (jnp.float32, jnp.float64)


def test_typed_keys_are_cut_and_padded_as_other_inputs_are():
    keys = jax.random.split(jax.random.key(0), (2, 5))
    data = jax.random.key_data(tb.split(tb.sequences({"noise": keys}), 2).inputs["noise"])
    np.testing.assert_array_equal(data[2, :, 0], jax.random.key_data(keys)[:, 4])
    assert data.shape == (3, 2, 2, 2) and not data[2, :, 1].any()
