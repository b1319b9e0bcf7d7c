import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from streams import first, loss, lstm, params_of, stream, summed_gradient

import tbptt_jax as tb
from tbptt_jax import schedules

KEY = jax.random.key(3)
LAWS = {"constant": lambda d: np.full(np.shape(d), 0.3), "polynomial": lambda d: 3 / (2 * 5 + d)}


def gradient_over(windows, params, estimate):
    state, total = jax.jit(estimate.init)(KEY, params, windows[0]), 0.0
    update = jax.jit(estimate.update)
    for window in windows:
        grads, state, _ = update(params, state, window)
        total = total + ravel_pytree(grads)[0]
    return total


@pytest.mark.parametrize("law", LAWS)
def test_artbp_averaged_over_every_draw_is_full_bptt(law):
    time, cut_probability = 6, LAWS[law]
    whole = jax.tree.map(lambda x: x[:, :time], stream())
    params, estimate = params_of(lstm()), tb.gradient(lstm(), loss, normaliser=1.0)
    full = ravel_pytree(summed_gradient(estimate, params, tb.split(whole, time))[0])[0]
    mean = plain = total = 0.0
    for cuts in itertools.product([False, True], repeat=time - 1):
        lengths = np.diff([0, *(np.flatnonzero(cuts) + 1), time])
        probability = 1.0
        for n, length in enumerate(lengths):
            probability *= np.prod(1 - cut_probability(np.arange(1, length)))
            probability *= cut_probability(np.asarray(length)) if n < len(lengths) - 1 else 1.0
        reweighted = schedules.Cuts(lengths, schedules.edge_weights(lengths, cut_probability))
        mean = mean + probability * gradient_over(schedules.cut(whole, reweighted, unit=time), params, estimate)
        plain = plain + probability * gradient_over(
            schedules.cut(whole, schedules.Cuts(lengths), unit=time), params, estimate
        )
        total += probability
    assert np.isclose(total, 1)
    np.testing.assert_allclose(mean, full, rtol=1e-10, atol=1e-12)
    assert not np.allclose(plain, full, rtol=1e-2)  # cutting without reweighting is biased


@pytest.mark.parametrize(
    "schedule, mean",
    [
        (schedules.fixed(7), 7),
        (schedules.random_length(40), 39),
        (schedules.constant_tail(20), 20),
        (schedules.polynomial_tail(20, 6.0), 20),
    ],
    ids=["fixed", "random_length", "constant_tail", "polynomial_tail"],
)
def test_lengths_cover_the_stream_with_the_stated_mean_and_are_drawn_from_the_key(schedule, mean):
    cuts, again, other = schedule(KEY, 200_000), schedule(KEY, 200_000), schedule(jax.random.key(4), 200_000)
    assert cuts.lengths.sum() == 200_000 and cuts.lengths.min() >= 1
    assert abs(cuts.lengths.mean() - mean) < 0.03 * mean
    np.testing.assert_array_equal(cuts.lengths, again.lengths)
    assert mean == 7 or not np.array_equal(cuts.lengths, other.lengths)


def test_cutting_anywhere_gives_the_same_stream_in_few_padded_lengths():
    window, estimate, params = stream(rubbish=np.nan), tb.gradient(lstm(), loss, normaliser=1.0), params_of(lstm())
    windows = schedules.cut(window, schedules.random_length(6, deviation=2.0, least=2)(KEY, 23), unit=2)
    assert {w.inputs.shape[1] for w in windows} <= {2, 4, 6, 8, 10} and schedules.compilations(windows) <= 5
    assert sum(int(w.valid.sum()) for w in windows) == window.valid.sum()
    init, update = jax.jit(estimate.init), jax.jit(estimate.update)
    state = init(KEY, params, windows[0])
    for w in windows:
        _, state, _ = update(params, state, w)
    expected = tb.split(window, 5)
    whole = init(KEY, params, first(expected))
    for i in range(len(expected.inputs)):
        _, whole, _ = update(params, whole, jax.tree.map(lambda x, i=i: x[i], expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), state.carry, whole.carry)


@pytest.mark.parametrize(
    "schedule, most, late, overhead",
    [
        (schedules.fixed(20), 1, 0, 1),
        (schedules.random_length(35), 8, 1, 1.1),
        (schedules.random_length(70), 8, 1, 1.1),
        (schedules.random_length(71, deviation=0.5), 8, 1, 1.1),
        (schedules.constant_tail(20), 20, 3, 1.15),
        (schedules.polynomial_tail(20), 26, 8, 1.15),  # its longest windows are new in any epoch
    ],
    ids=["fixed", "random_length 35", "random_length 70", "random_length 71", "constant_tail", "polynomial_tail"],
)
def test_padded_lengths_belong_to_the_law_and_not_to_the_draw(schedule, most, late, overhead):
    stream, time, epochs = tb.lanes(np.arange(5000, dtype=np.int32), lanes=1), 5000, 20
    seen, computed, lengths = {}, 0, []
    for epoch in range(epochs):
        cuts = schedule(jax.random.fold_in(KEY, epoch), time)
        for length, window in zip(cuts.lengths, schedules.cut(stream, cuts), strict=True):
            padded = window.valid.shape[1]
            assert window.valid.sum() == length and padded % cuts.unit == 0
            computed += padded
            seen.setdefault(padded, epoch)
        lengths.append(cuts.lengths)
    assert len({len(each) for each in lengths}) > 1 or len(seen) == 1  # the draws differ
    assert len(seen) <= most and sum(epoch >= 3 for epoch in seen.values()) <= late, seen
    assert computed <= overhead * time * epochs


def test_cuts_by_hand_are_padded_by_a_quarter_at_most_and_a_law_no_further_than_the_stream():
    for length in range(1, 200):
        cuts = schedules.Cuts(np.array([length, 1]))
        padded = schedules.cut(tb.sequences(np.zeros((1, length + 1, 1))), cuts)[0].valid.shape[1]
        assert length <= padded <= 1.25 * length
    (window,) = schedules.cut(tb.sequences(np.zeros((1, 7, 1))), schedules.fixed(1000)(KEY, 7))
    assert window.valid.shape == (1, 7)


def test_cutting_adds_no_reset_to_a_stream_that_brings_its_own():
    lanes = tb.lanes(np.arange(80.0)[:, None], lanes=2)
    cuts = schedules.fixed(7)(KEY, 20)
    later = jax.tree.map(lambda x: x[:, 20:], lanes)  # nothing begins here
    assert not any(window.resets.any() for window in schedules.cut(later, cuts))
    begun = [np.argwhere(w.resets).tolist() for w in schedules.cut(later._replace(resets=None), cuts)]
    assert begun == [[[0, 0], [1, 0]], [], []]  # of rows that say nothing each is a sequence


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_scaled_updates_are_rounded_once_to_their_own_dtype(dtype):
    window = tb.sequences(np.zeros((1, 71, 1), np.float32))
    updates = {"w": jnp.array([1.5, -3.0, 0.1, 70.0], dtype), "frozen": None}
    scaled, _ = schedules.scale_by_length(70).update(updates, optax.EmptyState(), None, window=window)
    wide = np.complex128 if dtype == jnp.complex64 else np.float64
    assert scaled["w"].dtype == dtype and scaled["frozen"] is None
    np.testing.assert_array_equal(np.asarray(scaled["w"]), (np.asarray(updates["w"], wide) * (71 / 70)).astype(dtype))


def test_steps_are_scaled_within_chains_of_chains():
    inner = optax.chain(optax.sgd(1.0), schedules.scale_by_length(10))
    step_sizes = optax.inject_hyperparams(schedules.scale_by_length)(base=10.0)
    params, window = {"w": jnp.ones(2)}, tb.sequences(np.zeros((1, 5, 1)))
    for wrapped in (
        optax.GradientTransformationExtraArgs((several := optax.MultiSteps(inner, 2)).init, several.update),
        optax.chain(optax.identity(), optax.masked(inner, {"w": True})),
        optax.partition({"a": inner}, {"w": "a"}),
        optax.apply_if_finite(inner, 3),
        optax.chain(optax.sgd(1.0), step_sizes),
    ):
        wrapped, state = optax.with_extra_args_support(wrapped), wrapped.init(params)
        for _ in range(2):
            updates, state = wrapped.update({"w": jnp.ones(2)}, state, params, window=window)
        np.testing.assert_array_equal(updates["w"], [-0.5, -0.5])


def test_steps_are_scaled_by_the_windows_length_without_its_padding():
    optimiser = optax.chain(optax.sgd(1.0), schedules.scale_by_length(10))
    step = tb.train_step(tb.gradient(lstm(), loss), optimiser)
    plain = tb.train_step(tb.gradient(lstm(), loss), optax.sgd(1.0))
    whole = tb.sequences(*np.random.default_rng(0).normal(size=(2, 3, 12, 2)))
    window = schedules.cut(whole, schedules.Cuts(np.array([5, 7])), unit=8)[0]
    before = jax.jit(step.init)(KEY, window)
    moved = [
        jax.tree.map(jnp.subtract, jax.jit(s.update)(before, window)[0].params, before.params) for s in (step, plain)
    ]
    np.testing.assert_allclose(ravel_pytree(moved[0])[0], 0.5 * ravel_pytree(moved[1])[0], rtol=1e-12)


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: schedules.fixed(0), "`length` is 0"),
        (lambda: schedules.constant_tail(0.5), "`base` is 0.5"),
        (lambda: schedules.polynomial_tail(20, 2.0), "`alpha` is 2.0"),
        (lambda: schedules.cut(stream(), schedules.Cuts(np.array([5, 5]))), "add up to the stream's 23 steps"),
        (lambda: schedules.cut(stream(), schedules.Cuts(np.array([20.0, 3.0]))), "need to be whole numbers"),
        (
            lambda: schedules.cut(stream(), schedules.Cuts(np.array([23]), np.ones(5))),
            r"have shape \[5\]; .* is \[23\]",
        ),
        (lambda: schedules.random_length(20, deviation=-1.0), "`deviation` is -1.0"),
        (lambda: schedules.random_length(20, deviation=np.inf), "`deviation` is inf; it needs to be finite"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(mistake, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistake()


def test_reweighted_edges_pass_through_padding_as_they_are():
    time = 10
    window = jax.tree.map(lambda x: x[:, :time], stream())
    params, cuts = params_of(lstm()), schedules.Cuts(np.array([3, 4, 3]), np.linspace(1, 2, time))
    for influence in (tb.replay(2), tb.rtrl()):
        estimate = tb.gradient(lstm(), loss, influence=influence, normaliser=1.0)
        whole = gradient_over(
            schedules.cut(window, cuts._replace(lengths=np.array([time])), unit=time), params, estimate
        )
        for unit in (4, 8):  # windows of one padded length, as `replay` needs
            parts = schedules.cut(window, cuts, unit=unit)
            np.testing.assert_allclose(gradient_over(parts, params, estimate), whole, rtol=1e-10, atol=1e-12)
        edged = window._replace(edges=np.broadcast_to(cuts.edges, (len(window.valid), time)))
        split, _ = summed_gradient(estimate, params, tb.split(edged, 4))
        np.testing.assert_allclose(ravel_pytree(split)[0], whole, rtol=1e-10, atol=1e-12)
        again = schedules.cut(edged, cuts._replace(edges=np.ones(time)), unit=4)  # what was there stays
        np.testing.assert_allclose(gradient_over(again, params, estimate), whole, rtol=1e-10, atol=1e-12)
