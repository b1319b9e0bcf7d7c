"""The tasks' data is what it says, and their floors are what enumeration says."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbptt_jax as tb

KEY = jax.random.key(7)


def entropy(p):
    return -sum(q * math.log(q) for q in (p, 1 - p) if q)


@pytest.mark.parametrize(
    "window",
    [
        tb.tasks.copy_memory(KEY, 6, lag=5, symbols=4, length=3),
        tb.tasks.copy_stream(KEY, 6, 11),
        tb.tasks.adding(KEY, 6, 11),
        tb.tasks.lag(KEY, 6, 11),
        tb.tasks.influence_balancing(11),
        tb.tasks.hidden_regime(KEY, 6, 11),
    ],
    ids=["copy_memory", "copy_stream", "adding", "lag", "influence_balancing", "hidden_regime"],
)
def test_a_task_is_whole_sequences_that_split_cuts(window):
    lanes, time = window.resets.shape
    assert time == 11
    np.testing.assert_array_equal(window.resets, np.broadcast_to(np.arange(time) == 0, (lanes, time)))
    windows = tb.split(window, 4)
    assert windows.resets.shape == (3, lanes, 4)
    assert np.isfinite(np.asarray(window.inputs)).all()


def test_tasks_are_functions_of_their_key():
    for task in (
        lambda key: tb.tasks.copy_memory(key, 6, lag=5),
        lambda key: tb.tasks.copy_stream(key, 6, 11),
        lambda key: tb.tasks.adding(key, 6, 12),
        lambda key: tb.tasks.lag(key, 6, 12),
        lambda key: tb.tasks.hidden_regime(key, 6, 12),
    ):
        one, same, other = task(KEY), task(KEY), task(jax.random.key(8))
        np.testing.assert_array_equal(one.inputs, same.inputs)
        np.testing.assert_array_equal(one.targets, same.targets)
        assert (np.asarray(one.inputs) != np.asarray(other.inputs)).any()


# Copy memory


def test_copy_memory_asks_for_the_symbols_in_order_after_the_lag():
    n, lag, symbols, length = 500, 7, 5, 4
    window = tb.tasks.copy_memory(KEY, n, lag, symbols, length)
    assert window.inputs.shape == (n, lag + 2 * length, symbols + 2)
    np.testing.assert_array_equal(window.inputs.sum(-1), 1)
    x, y, weights = np.asarray(window.inputs.argmax(-1)), np.asarray(window.targets), np.asarray(window.weights)
    np.testing.assert_array_equal(x[:, :length], y[:, length + lag :])
    assert (x[:, :length] < symbols).all()
    assert (x[:, length:] == np.where(np.arange(lag + length) == lag - 1, symbols + 1, symbols)).all()
    assert (y[:, : length + lag] == symbols).all()
    np.testing.assert_array_equal(weights, np.broadcast_to(np.arange(lag + 2 * length) >= lag + length, x.shape))
    share = np.bincount(x[:, :length].ravel(), minlength=symbols) / (n * length)
    assert (abs(share - 1 / symbols) < 4 * np.sqrt(0.2 * 0.8 / (n * length))).all()


@pytest.mark.parametrize("window", range(1, 12))
def test_copy_memory_floor_is_the_entropy_of_the_symbols_that_no_window_shows_with_their_recall(window):
    symbols, lag, length = 3, 4, 3
    hidden = 0
    for step in range(lag + length, lag + 2 * length):
        start = step // window * window
        hidden += not any(shown + lag + length == step for shown in range(start, step))
    floor = tb.tasks.copy_memory_floor(window, lag, symbols, length)
    assert floor.recalled == pytest.approx(hidden * math.log(symbols) / length, abs=1e-12)
    assert floor.overall == pytest.approx(hidden * math.log(symbols) / (lag + 2 * length), abs=1e-12)


def test_copy_memory_floors_of_no_memory_and_of_memory():
    assert tb.tasks.copy_memory_floor(1, lag=100) == pytest.approx((math.log(8), 10 * math.log(8) / 120))
    assert tb.tasks.copy_memory_floor(120, lag=100) == (0, 0)


# Copy without end


@pytest.mark.parametrize("shortest, longest", [(1, 1), (3, 3), (2, 5)])
def test_copy_stream_says_each_word_again_in_the_silence_after_it(shortest, longest):
    window = tb.tasks.copy_stream(KEY, 40, 97, 3, shortest, longest)
    assert window.inputs.shape == (40, 97, 5)
    np.testing.assert_array_equal(window.inputs.sum(-1), 1)
    starts, sizes = set(), set()
    for x, y in zip(np.asarray(window.inputs.argmax(-1)), np.asarray(window.targets), strict=True):
        marks = np.flatnonzero(x == 1)
        starts.add(int(marks[0]))
        for first, after in itertools.pairwise(marks):
            half = (after - first) // 2
            sizes.add(half)
            assert (
                after - first == 2 * half
                and (x[first + 1 : first + half] > 1).all()
                and not x[first + half : after].any()
            )
            np.testing.assert_array_equal(y[first:after], np.append(np.zeros(half), x[first : first + half]))
    assert sizes == set(range(shortest, longest + 1)) and len(starts) > shortest


@pytest.mark.parametrize("shortest, longest", [(1, 1), (3, 3), (2, 5)])
def test_copy_stream_floor_is_what_its_symbols_cost_where_they_are_due(shortest, longest):
    due = sum(size - 1 for size in range(shortest, longest + 1)) / sum(
        2 * size for size in range(shortest, longest + 1)
    )
    floor = tb.tasks.copy_stream_floor(3, shortest, longest)
    assert floor == pytest.approx(due * math.log(3), abs=1e-6)
    targets = np.asarray(tb.tasks.copy_stream(KEY, 200, 60, 3, shortest, longest).targets)
    assert math.log(3) * (targets > 1).mean() == pytest.approx(floor, abs=0.02)


def test_copy_stream_refuses_words_that_end_before_they_begin():
    with pytest.raises(ValueError, match="`longest` is 4 and `shortest` 5"):
        tb.tasks.copy_stream(KEY, 2, 20, shortest=5, longest=4)


# Adding


def test_adding_asks_for_the_sum_of_one_number_of_each_half_at_the_last_step():
    n, length = 4000, 9
    window = tb.tasks.adding(KEY, n, length)
    numbers, marks = np.moveaxis(np.asarray(window.inputs, np.float64), -1, 0)
    assert window.inputs.shape == (n, length, 2)
    np.testing.assert_array_equal(marks[:, : length // 2].sum(1), 1)
    np.testing.assert_array_equal(marks[:, length // 2 :].sum(1), 1)
    total = (numbers * marks).sum(1)
    np.testing.assert_allclose(window.targets[..., 0], np.repeat(total[:, None], length, 1), atol=1e-6)
    np.testing.assert_array_equal(window.weights, np.broadcast_to(np.arange(length) == length - 1, (n, length)))
    for half in (marks[:, :4], marks[:, 4:]):
        share = half.mean(0)
        assert (abs(share - 1 / half.shape[1]) < 4 * np.sqrt(0.25 * 0.75 / n)).all()
    assert total.mean() == pytest.approx(1, abs=4 * math.sqrt(1 / 6 / n))
    # The fourth central moment of a sum of two uniforms is 1/15: the variance of its squared error.
    assert ((total - 1) ** 2).mean() == pytest.approx(1 / 6, abs=4 * math.sqrt((1 / 15 - 1 / 36) / n))


@pytest.mark.parametrize("length", [2, 5, 8])
def test_adding_floor_is_the_mean_over_all_marks_of_the_variance_unseen(length):
    half = length // 2
    for seen in range(length + 1):
        pairs = list(itertools.product(range(half), range(half, length)))
        unseen = sum((first < length - seen) + (second < length - seen) for first, second in pairs)
        assert tb.tasks.adding_floor(seen, length) == pytest.approx(unseen / len(pairs) / 12, abs=1e-12)
    assert tb.tasks.adding_floor(0, length) == pytest.approx(1 / 6)
    assert tb.tasks.adding_floor(length, length) == 0


# Lag


def test_lag_floor_goldens():
    assert tb.tasks.lag_floor(1) == pytest.approx(0.6615632382, abs=1e-10)
    assert tb.tasks.lag_floor() == pytest.approx(0.4544543674, abs=1e-10)
    short = 4 * tb.tasks.lag_floor(4) - 3 * tb.tasks.lag_floor(3)
    assert short == pytest.approx(0.5191666997, abs=1e-9)
    for k in (2, 3, 5, 8, 10, 20, 1000):
        exact = min(k, 3) * 0.6615632382 + max(0, min(k, 8) - 3) * 0.5191666997 + max(0, k - 8) * 0.4544543674
        assert tb.tasks.lag_floor(k) == pytest.approx(exact / k, abs=1e-9)


@pytest.mark.parametrize("window", [1, 3, 4, 8, 9, 12])
def test_lag_floor_is_the_entropy_given_what_a_window_shows(window):
    total = 0.0
    for step in range(window):
        by_sight = {}
        for x3, x8 in itertools.product((0, 1), (0, 1)):
            sight = (x3 if step >= 3 else None, x8 if step >= 8 else None)
            by_sight.setdefault(sight, []).append(0.5 + 0.5 * x3 - 0.25 * x8)
        total += sum(len(ps) / 4 * entropy(sum(ps) / len(ps)) for ps in by_sight.values())
    assert tb.tasks.lag_floor(window) == pytest.approx(total / window, abs=1e-12)


def test_hidden_regime_floor_is_the_surprise_of_who_adds_up_all_regimes():
    symbols, signal, lasts, time = 3, 0.4, 4.0, 5
    window = tb.tasks.hidden_regime(KEY, 4, time, symbols, signal, lasts)
    seen = np.concatenate([np.asarray(window.inputs), np.asarray(window.targets)[:, -1:]], 1)
    np.testing.assert_array_equal(seen[:, 1:], window.targets)
    shows = signal * np.eye(symbols) + (1 - signal) / symbols
    moves = (1 - 1 / lasts) * np.eye(symbols) + 1 / lasts / symbols

    def probability(lane, steps):
        """Of the lane's first symbols, the sum over all paths of regimes."""
        return sum(
            np.prod([moves[a, b] for a, b in itertools.pairwise(path)])
            * np.prod([shows[seen[lane, t], regime] for t, regime in enumerate(path)])
            for path in itertools.product(range(symbols), repeat=steps)
        )

    exact = [[-math.log(probability(i, t + 2) / probability(i, t + 1)) for t in range(time)] for i in range(4)]
    np.testing.assert_allclose(tb.tasks.hidden_regime_floor(window, symbols, signal, lasts), exact, rtol=1e-5)


def test_hidden_regime_shows_its_own_symbol_and_lasts_as_it_says():
    symbols, signal, lasts = 4, 0.9, 50.0
    x = np.asarray(tb.tasks.hidden_regime(KEY, 2000, 300, symbols, signal, lasts).inputs)
    np.testing.assert_allclose(np.bincount(x.ravel()) / x.size, 1 / symbols, atol=0.02)
    for lag in (1, 20, 100):
        stays = (1 - 1 / lasts) ** lag
        again = 1 / symbols + stays * signal**2 * (1 - 1 / symbols)
        assert (x[:, :-lag] == x[:, lag:]).mean() == pytest.approx(again, abs=0.02)


def test_lag_coins_are_loaded_by_the_coins_three_and_eight_steps_before():
    window = tb.tasks.lag(KEY, 200, 108)
    x, y = np.asarray(window.inputs)[..., 0], np.asarray(window.targets)[..., 0]
    assert set(np.unique(x)) == set(np.unique(y)) == {0, 1}
    assert x.mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(x.size))
    for x3, x8 in itertools.product((0, 1), (0, 1)):
        chosen = y[:, 8:][(x[:, 5:-3] == x3) & (x[:, :-8] == x8)]
        p = 0.5 + 0.5 * x3 - 0.25 * x8
        assert chosen.mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / chosen.size) + 1e-12)
    unseen = y[:, :3]  # loaded by what was before the stream began
    assert unseen.mean() == pytest.approx(0.625, abs=4 * math.sqrt(0.625 * 0.375 / unseen.size))


# Influence balancing


def test_influence_balancing_is_the_paper_s_system():
    model, window = tb.tasks.influence_balancing_model(), tb.tasks.influence_balancing(60)
    params = model.init(KEY, window.inputs)
    assert float(params["theta"]) == 0.5
    carry = model.initial_carry(params, 1)
    np.testing.assert_array_equal(carry, np.ones((1, 23)))
    end, outputs = model.unroll(params, carry, window.inputs)
    A, v, s = 0.5 * (np.eye(23) + np.eye(23, k=1)), np.r_[np.ones(10), -np.ones(13)], np.ones(23)
    firsts = []
    for _ in range(60):
        s = A @ s + 0.5 * v
        firsts.append(s[0])
    np.testing.assert_allclose(end[0], s, rtol=1e-6)
    np.testing.assert_allclose(outputs[0], firsts, rtol=1e-6)
    np.testing.assert_array_equal(window.targets, np.ones((1, 60)))


@pytest.mark.parametrize(("n", "positive"), [(23, 10), (5, 4), (7, 0)])
def test_influence_balancing_has_no_loss_at_its_optimum(n, positive):
    theta = tb.tasks.influence_balancing_optimum(n, positive)
    model = tb.tasks.influence_balancing_model(n, positive, theta)
    params = {"theta": jnp.asarray(theta)}
    _, outputs = jax.jit(model.unroll)(params, model.initial_carry(params, 1), jnp.zeros((1, 300)))
    assert float(outputs[0, -1]) == pytest.approx(1, abs=1e-5)
    if (n, positive) == (23, 10):
        assert theta == pytest.approx(-1 / 6, abs=1e-15)
        settled = jax.jit(jax.grad(lambda p: model.unroll(p, jnp.ones((1, n)), jnp.zeros((1, 300)))[1][0, -1]))(params)
        assert float(settled["theta"]) == pytest.approx(-6, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: tb.tasks.copy_memory(KEY, 2, lag=0), "`lag` is 0; it needs to be at least 1"),
        (lambda: tb.tasks.copy_memory_floor(0, 3), "`window` is 0; it needs to be at least 1"),
        (lambda: tb.tasks.adding(KEY, 0, 9), "at least 1 sequence is needed"),
        (lambda: tb.tasks.adding(KEY, 2, 1), "two numbers to add need at least 2 steps"),
        (lambda: tb.tasks.adding_floor(10, 9), "of 9 steps from 0 to all can be seen"),
        (lambda: tb.tasks.lag(KEY, 2, 0), "at least 1 of each is needed"),
        (lambda: tb.tasks.lag_floor(0), "a window has at least 1 step"),
        (lambda: tb.tasks.hidden_regime(KEY, 1, 1, signal=1.0), "`signal` is 1.0"),
        (lambda: tb.tasks.hidden_regime(KEY, 1, 1, lasts=0.5), "`lasts` 0.5"),
        (lambda: tb.tasks.hidden_regime(KEY, 0, 1), "`lanes` is 0"),
        (lambda: tb.tasks.influence_balancing(0), "a stream needs at least 1 step"),
        (lambda: tb.tasks.influence_balancing_model(5, 6), "6 of 5 units cannot be positive"),
        (lambda: tb.tasks.influence_balancing_optimum(4, 2), "no influence in the end"),
    ],
)
def test_errors_say_what_is_needed(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
