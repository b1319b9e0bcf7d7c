"""Predictions come back as they were asked for: what is cut, read window by window and joined is what is read whole."""

import contextlib
import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from streams import LANES, TIME, assert_close, loss, lstm, params_of, stream

import tbptt_jax as tb

sizes = st.integers(1, 9)


def numbers(lengths, time):
    """A number of its own for each step, from 1, and 0 for padding."""
    ids = 1 + np.arange(len(lengths) * time).reshape(len(lengths), time)
    return np.where(np.arange(time) < np.asarray(lengths)[:, None], ids, 0)


# Cutting and joining: the outputs are the inputs.


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9), k=sizes, lanes=sizes, drop=st.booleans())
def test_join_undoes_split(lengths, k, lanes, drop):
    assume(sum(lengths))
    ids = numbers(lengths, max(lengths))
    whole = tb.sequences({"id": ids}, lengths=np.array(lengths))
    windows = tb.split(whole, min(k, max(lengths)), lanes=min(lanes, len(lengths)), drop_padding=drop)
    rubbish = np.where(windows.valid if windows.valid is not None else True, windows.inputs["id"], -7)
    np.testing.assert_array_equal(tb.join(rubbish, like=whole), ids)


@settings(deadline=None)
@given(steps=st.integers(1, 60), lanes=sizes, k=sizes)
def test_lanes_of_a_corpus_joined_are_its_stretches_in_order(steps, lanes, k):
    corpus = 1 + np.arange(steps)
    whole = tb.lanes(corpus, lanes=min(lanes, steps))
    windows = tb.split(whole, min(k, whole.inputs.shape[1]))
    joined = tb.join(windows.inputs, like=whole)
    np.testing.assert_array_equal(joined, whole.inputs)
    np.testing.assert_array_equal(joined.reshape(-1)[:steps], corpus)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    lanes=st.integers(1, 4),
    k=sizes,
    drop=st.booleans(),
    key=st.none() | st.integers(0, 99),
)
def test_join_undoes_pack_in_the_order_given(lengths, lanes, k, drop, key):
    assume(sum(lengths))
    flat = np.random.default_rng(0).normal(size=(sum(lengths), 2))
    packed = tb.pack(flat, lengths=lengths, lanes=lanes, key=key)
    windows = tb.split(packed, min(k, packed.valid.shape[1]), drop_padding=drop)
    answers = tb.join({"one": windows.inputs, "two": 2 * windows.inputs[..., 0]}, like=packed)
    assert [len(a["one"]) for a in answers] == lengths
    np.testing.assert_array_equal(np.concatenate([a["one"] for a in answers]), flat)
    np.testing.assert_array_equal(np.concatenate([a["two"] for a in answers]), 2 * flat[:, 0])


def most_past(x, firsts, k):
    """By the plain loop: of each step what stands before it in the earliest window that has it, itself included."""
    seen = [next((t - first + 1 for first in firsts if first <= t < first + k), None) for t in range(x.shape[1])]
    return np.broadcast_to(seen, x.shape)


@settings(deadline=None)
@given(n=sizes, time=sizes, k=sizes, stride=sizes, lanes=sizes)
def test_join_undoes_slide_and_takes_the_window_with_the_most_past(n, time, k, stride, lanes):
    k = min(k, time)
    x = numbers([time] * n, time)
    slid = tb.slide(tb.Window(x), k, stride)
    windows = tb.split(slid, k, lanes=min(lanes, len(slid.inputs)))
    past = np.broadcast_to(1 + np.arange(k), windows.inputs.shape)
    with contextlib.suppress(ValueError):  # where the number of cuts does not tell the stride
        np.testing.assert_array_equal(tb.join(tb.split(slid, k).inputs, like=tb.Window(x)), x)
    if stride == 1:
        np.testing.assert_array_equal(tb.join(tb.split(slid, k).inputs, like=tb.Window(x)), x)
    if (time - k) % stride or (stride > k and time > k):
        with pytest.raises(ValueError, match="are in no window that `slide` cut"):
            tb.join(windows.inputs, like=slid)
        return
    got, seen = tb.join((windows.inputs, past), like=slid)
    np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(seen, most_past(x, range(0, time - k + 1, stride), k))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), k=sizes, burn_in=st.integers(0, 8))
def test_join_undoes_overlap_and_takes_the_steps_that_are_scored(lengths, k, burn_in):
    assume(sum(lengths))
    ids = numbers(lengths, max(lengths))
    k = min(k, max(lengths))
    windows = tb.overlap(tb.sequences(ids, lengths=np.array(lengths)), k, min(burn_in, k - 1))
    got, scored = tb.join((windows.inputs, windows.weights), like=windows)
    np.testing.assert_array_equal(got, ids)
    np.testing.assert_array_equal(scored, ids > 0)


# Predicting.


@pytest.mark.parametrize("k", [1, 4, 7, TIME])
@pytest.mark.parametrize("lanes", [1, 3, LANES])
def test_predicted_in_windows_and_joined_is_the_whole_unrolled(k, lanes):
    model, whole = lstm(), stream(rubbish=np.nan)
    whole.resets[1, 0] = False  # `split` begins it all the same where it follows another sequence in its lane
    params = params_of(model)
    _, expected = jax.jit(model.unroll)(
        params, model.initial_carry(params, LANES), whole.inputs, whole.resets, whole.valid
    )
    _, outputs = tb.predict(model, params, tb.split(whole, k, lanes=lanes))
    joined = tb.join(outputs, like=whole)
    assert_close(joined, np.where(whole.valid[..., None], expected, 0), rtol=0, atol=1e-12)
    assert isinstance(joined, np.ndarray)
    assert_close(tb.join(jax.device_get(outputs), like=whole), joined, rtol=0, atol=0)


@pytest.mark.parametrize("key", [None, 1])
def test_packed_sequences_of_any_lengths_are_answered_as_each_alone(key):
    rng = np.random.default_rng(0)
    lengths = np.append(rng.integers(3, 9, 10), [0, 1])
    flat = rng.normal(size=(lengths.sum(), 2))
    model = lstm()
    params = params_of(model)

    packed = tb.pack(flat, lengths=lengths, lanes=3, key=key)
    _, outputs = tb.predict(model, params, tb.split(packed, 4))
    answers = tb.join(outputs, like=packed)

    assert [a.shape for a in answers] == [(length, 2) for length in lengths]
    for answer, x in zip(answers, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
        if len(x):
            _, alone = jax.jit(model.unroll)(params, model.initial_carry(params, 1), x[None])
            assert_close(answer, np.asarray(alone[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", [1, 3])
def test_a_stream_goes_on_with_the_carry(half):
    model, windows = lstm(), tb.split(stream(), 5)
    windows.resets[half] = False  # so that much hangs on the carry
    params = params_of(model)
    begin, rest = (jax.tree.map(lambda x, part=part: x[part], windows) for part in (np.s_[:half], np.s_[half:]))
    carry, outputs = tb.predict(model, params, windows)
    middle, first = tb.predict(model, params, begin)
    end, second = tb.predict(model, params, rest, jax.device_get(middle))
    assert_close((end, np.concatenate([first, second])), (carry, np.asarray(outputs)))

    whole = tb.evaluate(model, loss, params, windows)
    parts = [tb.evaluate(model, loss, params, begin), tb.evaluate(model, loss, params, rest, middle)]
    assert_close(tb.mean_loss(jax.tree.map(lambda *x: jnp.stack(x), *parts)), whole.loss)
    assert abs(tb.evaluate(model, loss, params, rest).loss - parts[1].loss) > 1e-6


def test_a_reset_begins_a_lane_anew_whatever_carry_is_given():
    model, windows = lstm(), tb.split(tb.sequences(np.ones((LANES, 6, 2)), np.ones((LANES, 6, 2))), 3)
    params = params_of(model)
    carry = jax.tree.map(lambda h: h + 1, model.initial_carry(params, LANES))
    assert_close(tb.predict(model, params, windows, carry), tb.predict(model, params, windows))
    assert_close(tb.evaluate(model, loss, params, windows, carry), tb.evaluate(model, loss, params, windows))


def test_what_is_predicted_need_not_be_known():
    model, windows = lstm(), tb.split(stream(), 5)
    params = params_of(model)
    unknown = windows._replace(targets=np.full_like(windows.targets, np.nan), weights=0 * windows.weights)
    assert_close(tb.predict(model, params, unknown), tb.predict(model, params, windows))
    inside = jax.jit(lambda w: tb.predict(model, params, w))(windows)
    assert_close(inside, tb.predict(model, params, windows))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.complex64, np.bool_])
def test_outputs_keep_their_dtype(dtype):
    whole = tb.sequences(np.ones((2, 3)), lengths=np.array([3, 1]))
    joined = tb.join(jnp.ones((2, 2, 2), dtype), like=whole)
    assert joined.dtype == dtype
    np.testing.assert_array_equal(joined == 1, [[True, True, True], [True, False, False]])


# What remembers, and what has forgotten.


def test_a_packed_window_remembers_its_layout_with_other_weights_and_through_a_pickle():
    lengths = [2, 0, 3]
    packed = tb.pack(np.arange(5), lengths=lengths, lanes=2, key=3)
    weighted = packed._replace(weights=np.ones(packed.valid.shape))
    for like in (packed, weighted, tb.stateless(packed), pickle.loads(pickle.dumps(packed)), copy.copy(packed)):
        windows = tb.split(like, 2)
        assert type(windows) is tb.Window
        answers = tb.join(windows.inputs, like=like)
        assert [a.tolist() for a in answers] == [[0, 1], [], [2, 3, 4]]


packed = tb.pack(np.arange(5), lengths=[2, 3], lanes=1)
whole = tb.sequences(np.zeros((4, 6)))


def ones(*shape):
    return np.ones(shape)


@pytest.mark.parametrize(
    "outputs, like, message",
    [
        (ones(1, 1, 5), jax.tree.map(np.copy, packed), "its layout was lost"),
        (ones(1, 1, 5), jax.tree.map(lambda x: x[:, :3], packed), "its layout was lost"),
        (ones(1, 1, 5), packed._replace(inputs=np.zeros((1, 3))), "its layout was lost"),
        (ones(1, 1, 4), packed, r"are not the windows that `split` cuts of `like`, which is \[1, 5\]"),
        (ones(1, 4, 3), whole, "are not the windows that `split` cuts"),
        (ones(2, 5, 3), whole, "are not the windows that `split` cuts"),
        (ones(1, 4, 7), whole, "are not the windows that `split` cuts"),
        (ones(4, 4, 3), tb.overlap(whole, 3, 1), "are not the windows that were cut to overlap"),
        (ones(4, 6), whole, r"all of them need the same first axes, \[windows, lanes, time, ...\]"),
        ([ones(1, 4, 6), ones(1, 4, 5)], whole, "all of them need the same first axes"),
        ([], whole, "all of them need the same first axes"),
        ([[1.0]], whole, "`outputs` holds 1.0, a Python float"),
        (ones(2, 4, 3), tb.split(whole, 3), "the window that they were cut from"),
        (ones(2, 4, 3), ones(4, 6), "it needs to be a `tb.Window`"),
    ],
)
def test_what_cannot_be_joined_is_told(outputs, like, message):
    with pytest.raises(ValueError, match=message):
        tb.join(outputs, like=like)


def test_traced_outputs_are_told():
    with pytest.raises(ValueError, match="call it on what the jitted function returns"):
        jax.jit(lambda y: tb.join(y, like=whole))(ones(1, 4, 6))


@pytest.mark.parametrize(
    "windows, lanes, message",
    [
        (whole, 4, "the axes"),
        (tb.split(whole, 3), 3, "The carry does not fit this window of 4 lanes"),
        (np.zeros((1, 4, 6, 2)), 4, "it needs to be a `tb.Window`"),
        (tb.Window(np.full((1, 4, 6, 2), np.nan)), 4, "`inputs` is not finite"),
    ],
)
def test_what_cannot_be_predicted_is_told(windows, lanes, message):
    model = lstm()
    params = params_of(model)
    carry = model.initial_carry(params, lanes)
    for read in (tb.predict, lambda model, *rest: tb.evaluate(model, loss, *rest)):
        with pytest.raises(ValueError, match=message):
            read(model, params, windows, carry)


def test_a_token_that_no_table_has_is_told_before_it_is_predicted():
    model = tb.from_step(
        lambda params, carry, x: (carry + params[x], carry + params[x]),
        lambda key, inputs: jnp.ones((5, 3)),
        lambda params, lanes: jnp.zeros((lanes, 3)),
    )
    with pytest.raises(ValueError, match="`inputs` is 7 at windows 0, lanes 1, time 2"):
        tb.predict(model, jnp.ones((5, 3)), tb.Window(np.array([[[0, 1, 2], [3, 4, 7]]])))
