"""The first-bit task is exactly balanced, and its floors are the published figures."""

import jax
import numpy as np
import pytest

import tbptt_jax as tb
from tbptt_jax.tasks.first_bit import first_bit_floor

SLIDING = {  # window: (accuracy, loss), stride 1 over 20 steps
    2: (0.526316, 0.674551),
    5: (0.531250, 0.670982),
    8: (0.538462, 0.665718),
    10: (0.545455, 0.660558),
    12: (0.555556, 0.653004),
    15: (0.583333, 0.631592),
    18: (0.666667, 0.560843),
    19: (0.75, 0.477386),
    20: (1.0, 0.0),
}
CONTIGUOUS = {2: (0.55, 0.657173), 4: (0.60, 0.618265), 5: (0.625, 0.597545), 10: (0.75, 0.477386), 20: (1.0, 0.0)}


@pytest.mark.parametrize("window", SLIDING)
def test_the_floor_of_sliding_windows(window):
    np.testing.assert_allclose(first_bit_floor(21 - window), SLIDING[window], atol=6e-7)


@pytest.mark.parametrize("window", CONTIGUOUS)
def test_the_floor_of_contiguous_windows(window):
    np.testing.assert_allclose(first_bit_floor(20 // window), CONTIGUOUS[window], atol=6e-7)
    assert first_bit_floor(20).accuracy == 0.525


@pytest.mark.parametrize("window, cut", [(10, tb.slide), (5, tb.slide), (5, tb.split)])
def test_the_floor_is_what_the_best_guess_from_each_window_reaches(window, cut):
    windows = cut(tb.tasks.first_bit(jax.random.key(0), 40), window)
    one_in_it = np.asarray(windows.inputs).reshape(-1, window).any(1)
    label = np.asarray(windows.targets).reshape(-1, window)[:, 0]
    p = np.where(one_in_it, 1.0, label[~one_in_it].mean())  # the frequencies of what is seen
    accuracy = np.mean((p > 0.5) == label)
    cross_entropy = -np.mean(np.log(np.where(label == 1, p, 1 - p)))
    per_sequence = len(label) // 40
    np.testing.assert_allclose(first_bit_floor(per_sequence), (accuracy, cross_entropy), rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_exactly_half_the_sequences_begin_with_a_one_and_only_their_first_step_tells(seed):
    window = tb.tasks.first_bit(jax.random.key(seed), 1000)
    inputs, targets = np.asarray(window.inputs), np.asarray(window.targets)
    assert inputs.shape == targets.shape == (1000, 20, 1)
    assert inputs.sum() == inputs[:, 0].sum() == 500
    np.testing.assert_array_equal(targets, np.broadcast_to(inputs[:, :1], targets.shape))
    assert set(np.unique(inputs)) == {0, 1}
    np.testing.assert_array_equal(window.resets, np.broadcast_to(np.arange(20) == 0, (1000, 20)))


def test_the_key_decides_which_half():
    draw = lambda seed: np.asarray(tb.tasks.first_bit(jax.random.key(seed), 100).inputs[:, 0, 0])  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))


@pytest.mark.parametrize("windows", [0, -1])
def test_a_sequence_gives_at_least_one_window(windows):
    with pytest.raises(ValueError, match=f"`windows` is {windows}; a sequence gives at least 1"):
        first_bit_floor(windows)
