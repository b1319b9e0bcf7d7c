import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tbptt_jax as tb

# The carry is the sum of a sequence so far: it is wrong from the first step at which anything crosses into the next.
summing = tb.from_step(
    lambda params, carry, x: (carry + x, carry + x),
    lambda key, inputs: (),
    lambda params, lanes: jnp.zeros(lanes, int),
)


def sums(lengths, x):
    return np.concatenate([np.cumsum(part) for part in np.split(x, np.cumsum(lengths)[:-1])])


def assert_read_sequence_by_sequence(lengths, lanes, length, key):
    """Read window by window with the carry, every step comes once and is what its sequence alone makes of it."""
    x = np.random.default_rng(0).integers(1, 100, sum(lengths))
    packed = tb.pack(x, {"step": np.arange(len(x))}, lengths=lengths, lanes=lanes, key=key)
    windows = tb.split(packed, min(length, packed.inputs.shape[1]))

    def read(carry, w):
        return summing.unroll((), carry, w.inputs, w.resets, w.valid)

    _, outputs = jax.lax.scan(read, summing.initial_carry((), lanes), windows)
    steps, outputs = (np.asarray(a)[windows.valid] for a in (windows.targets["step"], outputs))
    assert np.sort(steps).tolist() == list(range(len(x)))
    np.testing.assert_array_equal(outputs, sums(lengths, x)[steps])
    return packed


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    lanes=st.integers(1, 4),
    length=st.integers(1, 5),
    key=st.none() | st.integers(0, 99),
)
def test_each_step_is_read_once_and_nothing_crosses_into_the_next_sequence(lengths, lanes, length, key):
    assume(sum(lengths))
    assert_read_sequence_by_sequence(lengths, lanes, length, key)


@pytest.mark.parametrize("key", [None, 0])
def test_ten_thousand_sequences_fill_the_lanes(key):
    lengths = np.random.default_rng(1).integers(0, 100, 10_000)
    packed = assert_read_sequence_by_sequence(lengths, 32, 64, key)
    assert packed.valid.mean() > 0.98
    assert tb.split(packed, 64).valid.mean() > 0.98


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), lanes=st.integers(1, 4))
def test_a_lane_that_ends_takes_the_next_sequence_at_once(lengths, lanes):
    assume(sum(lengths))
    packed = tb.pack(np.repeat(np.arange(len(lengths)), lengths), lengths=lengths, lanes=lanes)
    free = [0] * lanes
    for i, steps in enumerate(lengths):
        lane = free.index(min(free))
        assert (packed.inputs[lane, free[lane] : free[lane] + steps] == i).all()
        free[lane] += steps
    assert packed.inputs.shape == (lanes, max(free))
    assert packed.valid.sum(1).tolist() == free


def test_the_key_draws_the_order_and_leaves_the_shape():
    lengths = np.random.default_rng(2).integers(1, 9, 40)
    x = np.repeat(np.arange(40), lengths)
    pack = lambda key: tb.pack(x, lengths=lengths, lanes=3, key=key)  # noqa: E731
    np.testing.assert_array_equal(pack(jax.random.key(5)).inputs, pack(5).inputs)
    orders = [pack(jax.random.fold_in(jax.random.key(0), epoch)) for epoch in range(20)]
    assert len({o.inputs.shape for o in orders}) == 1
    assert len({o.inputs.tobytes() for o in orders}) == 20
    assert tb.pack(np.arange(50), lengths=[10] * 5, lanes=5, key=0).valid.all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": [3, 4]}, "add up to the arrays' 6 steps"),
        ({"lengths": [7, -1]}, "whole numbers from 0"),
        ({"lengths": [3.0, 3.0]}, "whole numbers from 0"),
        ({"lengths": 6}, "whole numbers from 0"),
        ({"lanes": 0}, "`lanes` is 0"),
        ({"inputs": np.zeros(0), "lengths": [0]}, "empty"),
        ({"targets": np.zeros(5)}, "`targets` has shape"),
        ({"inputs": np.full(6, np.nan)}, "not finite"),
    ],
)
def test_sequences_that_cannot_be_packed_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        tb.pack(**{"inputs": np.zeros(6), "lengths": [2, 4], "lanes": 2} | change)


def test_typed_keys_are_laid_as_their_numbers_are():
    keys = jax.random.split(jax.random.key(0), 7)
    packed = tb.pack({"key": keys, "row": np.arange(7)}, lengths=[3, 4], lanes=2)
    there = np.asarray(packed.valid)
    found = jax.random.key_data(packed.inputs["key"])[there]
    np.testing.assert_array_equal(found, jax.random.key_data(keys)[packed.inputs["row"][there]])


@pytest.mark.parametrize("lengths", [np.ma.masked_array([3, 4], [False, True]), ["3", "4"], [3.0, 4.0]], ids=str)
def test_lengths_that_are_no_whole_numbers_are_a_sentence(lengths):
    with pytest.raises(ValueError, match=r"`lengths` is .*; it needs whole numbers"):
        tb.pack(np.zeros(7), lengths=lengths, lanes=1)
