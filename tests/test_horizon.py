import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import compiled, loss, lstm, params_of, stream

import tbptt_jax as tb
from tbptt_jax import horizon
from tbptt_jax.horizon.bias import _compare as compare
from tbptt_jax.horizon.decay import _spread as spread


def probe(time=60, lanes=3):
    return tb.Window(*np.random.default_rng(0).normal(size=(2, lanes, time, 2)))


def test_decay_is_the_norm_of_each_gradient_traced_by_itself():
    model, params, window, lags = lstm(), params_of(lstm()), probe(), 20
    got = horizon.decay(model, loss, params, window, lags=lags, burn_in=lags)
    assert got.probes == 3 * 40

    def loss_at(nudges, end):
        def step(carry, at_t):
            nudge, now = at_t
            carry, outputs = model.unroll(params, jax.tree.map(jnp.add, carry, nudge), now.inputs, None, None)
            return carry, loss(outputs, now)

        along = jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], window)
        return jax.lax.scan(step, model.initial_carry(params, 3), (nudges, along))[1][end - 1].sum()

    nothing = jax.tree.map(lambda h: jnp.zeros((60, *h.shape)), model.initial_carry(params, 3))
    traced = jax.jit(jax.grad(loss_at))
    lags_of = lambda end: [x[end - lags : end][::-1] for x in jax.tree.leaves(traced(nothing, end))]  # noqa: E731
    each = np.array([np.concatenate(lags_of(end), -1) for end in range(21, 61)])  # [probes, lags, lanes, units]
    np.testing.assert_allclose(got.norms, np.linalg.norm(each, axis=-1).mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(got.sums, np.linalg.norm(each.mean((0, 2)).cumsum(0), axis=-1), rtol=1e-5)


def test_what_is_traced_is_spread_over_the_scored_steps_of_each_lane():
    scored = np.zeros((4, 60), bool)
    scored[0], scored[1, 7::10], scored[2, 59] = True, True, True
    found = spread(scored, 5)
    np.testing.assert_array_equal(found.T, [[2, 14, 26, 38, 50], [7, 17, 27, 47, 57], [59, -1, -1, -1, -1], [-1] * 5])
    np.testing.assert_array_equal(spread(scored[:1], 60)[:, 0], np.arange(60))
    window, model = tb.Window(np.ones((4, 60, 1)), weights=scored.astype(float)), linear()
    fading = horizon.decay(model, first_feature, {"b": jnp.array(0.1)}, window, lags=20, probes=5)
    assert fading.probes == 11
    np.testing.assert_allclose(fading.norms, 0.8 ** np.arange(1, 21))


def linear(rate=0.8):
    """h ← rate h + x + b: ∂h/∂b is 1, so that a lag k adds rate^k to the gradient by b."""

    def step(p, h, x):
        h = rate * h + x + p["b"]
        return h, h

    return tb.from_step(step, lambda k, x: {"b": jnp.array(0.1)}, lambda p, lanes: jnp.zeros((lanes, 1)))


def first_feature(y, window):
    return y[..., 0]


@pytest.mark.parametrize("tolerance", [1, 0.5, 0.2, 0.1, 0.05])
def test_for_a_geometric_decay_the_horizon_is_that_of_the_papers_formula(tolerance):
    window, params, lags = tb.Window(np.random.default_rng(0).normal(size=(2, 60, 1))), {"b": jnp.array(0.1)}, 30
    fading = horizon.decay(linear(), first_feature, params, window, lags=lags, burn_in=lags)
    k = np.arange(lags + 1)
    np.testing.assert_allclose(fading.norms, 0.8 ** k[1:], rtol=1e-6)
    np.testing.assert_allclose(fading.rate, 0.8)
    np.testing.assert_allclose(fading.kept, np.cumsum(0.8**k), rtol=1e-6)
    # E(K) = Σ_{k>K} .8^k, and the gradient is Σ_{k≤K} .8^k: δ(K) = .8^(K+1) / (1 − 2 · .8^(K+1)) < δ
    needed = next(K for K in range(1, 99) if tolerance * max(0, 1 - 2 * 0.8 ** (K + 1)) > 0.8 ** (K + 1))
    assert horizon.suggest(fading, tolerance=tolerance).horizon == needed


def test_what_is_called_safe_is_and_what_is_chosen_is_the_shortest_that_holds():
    cases = []
    for model, of, params, window in (
        (
            linear(0.95),
            first_feature,
            {"b": jnp.array(0.1)},
            tb.Window(np.random.default_rng(1).normal(size=(1, 60, 1))),
        ),
        (lstm(), loss, params_of(lstm()), probe()),
        (lstm(), loss, params_of(lstm(), 3.0), stream(time=40, rubbish=np.nan)),
    ):
        time = window.inputs.shape[1]
        measured = {n: horizon.bias(model, of, params, window, n).relative_bias for n in (1, 4, 8, 16, time)}
        fading = horizon.decay(model, of, params, window, lags=time // 2, lengths=list(measured))
        for tolerance in (1, 0.5, 0.2, 0.1, 0.05):
            suggestion = horizon.suggest(fading, tolerance=tolerance)
            if suggestion.safe:
                cases.append(measured[suggestion.window])
                assert cases[-1] <= tolerance
        chosen = horizon.choose(
            model, of, params, window, 0.2, lengths=list(measured), influences={"truncate": tb.truncate()}
        )
        assert chosen.best.window == min(n for n in measured if max(measured[m] for m in measured if m >= n) <= 0.2)
        np.testing.assert_allclose(chosen.best.relative_bias, measured[chosen.best.window])
    assert len(cases) > 8 and any(case > 0.01 for case in cases)


def test_what_replay_leaves_out_is_what_is_measured_of_it():
    model, params, window = lstm(), params_of(lstm(), 3.0), stream(time=41, rubbish=np.nan)
    depths = (0, 1, 2, 5)
    got = horizon.decay(model, loss, params, window, lags=40, lengths=[4], depths=depths)
    measured = [
        horizon.bias(model, loss, params, window, 4, tb.replay(n) if n else tb.truncate()).relative_bias for n in depths
    ]
    np.testing.assert_allclose(got.windows / got.whole, measured, rtol=1e-6)
    for tolerance in (0.5, 0.2, 0.1, 0.01):
        suggestion = horizon.suggest(got, tolerance=tolerance)
        holding = [n for n, bias in zip(depths, measured, strict=True) if bias < tolerance]
        assert suggestion.safe == bool(holding) and suggestion.depth == min(holding, default=5)


@pytest.mark.parametrize("largest", [20, 80])
def test_the_papers_bound_is_the_mean_of_its_tails_over_the_steps_of_a_window(largest):
    """φ_k = .8^k, whatever is traced: E(K) = .8^(K+1) / .2, and of windows after d others the mean of E from d·n to d·n + n − 1."""
    window, params, lags = tb.Window(np.random.default_rng(0).normal(size=(2, 60, 1))), {"b": jnp.array(0.1)}, 30
    k = np.arange(400)
    tails = 4 * 0.8**k
    whole = 4 * (
        1 - 0.8**30 - 0.8 ** max(largest, 30)
    )  # the most that is known of it: what is kept less what is left out
    ask = {"lags": lags, "burn_in": lags}
    cut = horizon.decay(linear(), first_feature, params, window, lengths=(2, 5, 10, 20), **ask)
    deep = horizon.decay(linear(), first_feature, params, window, lengths=(5,), depths=(0, 1, 3), **ask)
    for fading, depths in (cut, np.zeros(4, int)), (deep, np.array([0, 1, 3])):
        means = [tails[n * d : n * (d + 1)].mean() for n, d in zip(fading.lengths, depths, strict=True)]
        for tolerance in (2, 0.5, 0.2, 0.01):
            got = horizon.suggest(fading, tolerance=tolerance, largest=largest, bound="norms")
            delta = np.array(means) / whole
            best = next((i for i, each in enumerate(delta) if each < tolerance), len(delta) - 1)
            assert got.safe == (delta[best] < tolerance)
            assert got.depth == depths[best] and (got.window == fading.lengths[best] or not got.safe)
            np.testing.assert_allclose(got.relative_bias, delta[best], rtol=1e-3)
            of_each = 0.8 ** k[1:] / (1 - 2 * 0.8 ** k[1:])
            fits = np.flatnonzero((of_each > 0) & (of_each < tolerance))[0] + 1
            assert got.horizon == min(fits, largest)
            np.testing.assert_allclose(got.horizon_bias, of_each[got.horizon - 1], rtol=1e-3)


def test_where_the_past_of_losses_cancels_the_papers_bound_asks_for_more():
    def step(p, h, x):
        h = 0.8 * h + p["b"]
        return h, jnp.concatenate([p["w"] + 0 * h, h], 1)

    model = tb.from_step(step, lambda k, x: {"b": jnp.array(0.1), "w": jnp.array(0.1)}, lambda p, n: jnp.zeros((n, 1)))
    signs = np.broadcast_to(np.array([1.0, -1.0])[:, None, None], (2, 60, 1))  # of the past each lane says the opposite
    window = tb.Window(np.zeros((2, 60, 1)), signs)
    either = lambda y, w: y[..., 0] + w.targets[..., 0] * y[..., 1]  # noqa: E731
    fading = horizon.decay(model, either, model.init(jax.random.key(0), None), window, lags=30, lengths=(1, 8, 30))
    near, far = (horizon.suggest(fading, tolerance=0.5, largest=30, bound=bound) for bound in ("gradients", "norms"))
    assert (near.window, near.safe, far.window, far.safe) == (1, True, 30, False)


def test_in_the_middle_of_a_stream_the_past_goes_on():
    """From a carry the lags that reach over the window's beginning are not known, and the bound says so."""
    window, params = tb.Window(np.random.default_rng(0).normal(size=(2, 20, 1))), {"b": jnp.array(0.1)}
    begun = horizon.decay(linear(), first_feature, params, window, lags=19)
    going_on = horizon.decay(linear(), first_feature, params, window, lags=19, carry=jnp.ones((2, 1)))
    assert begun.beyond == 0 < going_on.beyond
    np.testing.assert_allclose(going_on.norms, begun.norms)


@pytest.mark.parametrize("burn_in", [0, 3, 10, None])
def test_in_the_middle_of_a_stream_what_the_first_losses_have_before_the_window_is_left_out_too(burn_in):
    window, params, lags = tb.Window(np.random.default_rng(0).normal(size=(2, 20, 1))), {"b": jnp.array(0.1)}, 8
    fading = horizon.decay(linear(), first_feature, params, window, lags=lags, carry=jnp.ones((2, 1)), burn_in=burn_in)
    seen = np.arange(8 if burn_in is None else burn_in, 20).clip(max=lags)
    np.testing.assert_allclose(fading.beyond, np.mean(0.8 ** (seen + 1) / 0.2), rtol=1e-5)


def test_where_no_parameter_was_seen_to_hear_of_the_past_it_is_not_said_that_none_does():
    """A cue every 100 steps, and 30 steps after it a loss: at 10 lags back nothing is, though the gradient by h is large."""
    model = tb.from_step(
        lambda b, h, x: (0.95 * h + b * x, 0.95 * h + b * x), lambda k, x: jnp.ones(()), lambda p, n: jnp.zeros((n, 1))
    )
    cue, scored = (np.broadcast_to(np.arange(300) % 100 == at, (2, 300)).astype(float) for at in (0, 30))
    window = tb.Window(cue[..., None], weights=scored)
    near = horizon.decay(model, first_feature, jnp.ones(()), window, lags=10)
    far = horizon.decay(model, first_feature, jnp.ones(()), window, lags=40)
    assert not near.kept.any() and not horizon.suggest(near, tolerance=0.5).safe
    np.testing.assert_allclose(far.kept[[29, 30]], [0, 0.95**30])


def test_what_all_losses_keep_is_what_each_keeps_where_all_are_probes():
    """In stretches with the one before, each loss sees at least so many steps back, and a geometric decay tells how many."""
    window, params, lags = tb.Window(np.random.default_rng(0).normal(size=(2, 47, 1))), {"b": jnp.array(0.1)}, 10
    got = horizon.decay(linear(), first_feature, params, window, lags=lags, burn_in=3)
    seen = [s if s < lags else s % lags + lags for s in range(3, 47)]
    np.testing.assert_allclose(got.whole, np.mean([np.sum(0.8 ** np.arange(k + 1)) for k in seen]), rtol=1e-6)


def test_a_learned_initial_carry_is_part_of_what_is_kept():
    model = tb.lstm(3, initial_carry="learned")
    window = probe()
    params = params_of(model, 1.5)
    squared = lambda y, w: (y**2).sum(-1)  # noqa: E731
    whole = horizon.decay(model, squared, params, window, lags=59)
    assert abs(whole.whole - whole.kept[-1]) < 1e-9
    exact = jax.grad(lambda p: (model.unroll(p, model.initial_carry(p, 3), window.inputs)[1] ** 2).sum() / (3 * 60))(
        params
    )
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(exact)))
    np.testing.assert_allclose(whole.kept[-1], norm, rtol=1e-6)
    assert whole.windows[-1] < 1e-6 * norm  # one window is all of it


def fading(norms, rate):
    """A decay of a model of one parameter that each lag adds φ to."""
    kept = 1 + np.concatenate([[0], np.cumsum(norms)])
    return horizon.Decay(
        norms,
        np.cumsum(norms),
        rate,
        10,
        kept,
        kept[-1] - kept,
        0.0,
        0.0,
        kept[-1],
        np.array([1]),
        np.array([kept[-1] - 1]),
    )


def test_no_window_is_safe_where_the_gradient_does_not_fade():
    choice = horizon.suggest(fading(1.01 ** np.arange(50), 1.01), tolerance=0.5, largest=300)
    assert not choice.safe and choice.window == 300 and "No window is safe" in choice.reason


def test_a_model_without_memory_needs_no_more_than_one_step():
    choice = horizon.suggest(fading(np.zeros(20), 0.0))
    assert (choice.window, choice.horizon, choice.relative_bias, choice.safe) == (1, 1, 0.0, True)


def test_bias_sees_what_is_exact_and_what_is_not():
    model, params = lstm(), params_of(lstm())
    window = stream(rubbish=np.nan)
    exact = horizon.bias(model, loss, params, window, 5, tb.rtrl(), draws=2)
    assert exact.relative_bias < 1e-12 and np.isclose(exact.cosine, 1) and exact.relative_std < 1e-12
    short, long = (horizon.bias(model, loss, params, window, k) for k in (2, 10))
    assert short.relative_bias > long.relative_bias > 1e-3 and short.cosine < long.cosine < 1
    assert short.groups["readout"].relative_bias < 1e-12 < short.groups["cell"].relative_bias  # the readout has no past
    noisy = horizon.bias(model, loss, params, window, 2, tb.uoro(), draws=64)
    assert noisy.relative_std > 0.1 and noisy.relative_bias < 4 * noisy.relative_std / 8


def test_a_hundred_thousand_steps_fit():
    model, params = lstm(), params_of(lstm())
    window = probe(time=100_000, lanes=1)
    lowered = compare.lower(model, loss, None, 1, params, window, tb.split(window, 100), jax.random.key(0))
    steps_of_state = 100_000 * (2 + 2) * 8  # inputs and outputs; a step's gates and states are eight times that
    assert compiled(lowered).memory_analysis().temp_size_in_bytes < 4 * steps_of_state


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: horizon.decay(lstm(), loss, None, probe(), lags=61), "`lags` is 61; this probe window has 60 steps"),
        (lambda: horizon.decay(lstm(), loss, None, probe(), lags=20, tail=20), "`tail` is 20"),
        (lambda: horizon.suggest(fading(np.ones(3), 0.5), tolerance=0.0), "`tolerance` is 0.0"),
        (lambda: horizon.suggest(fading(np.ones(3), 0.5), largest=0), "`largest` is 0"),
        (
            lambda: horizon.suggest(fading(np.ones(3), 0.5)._replace(lengths=np.array([4, 8])), largest=3),
            "shorter than 4",
        ),
        (lambda: horizon.bias(lstm(), loss, None, probe(), 5, draws=0), "`draws` is 0"),
        (lambda: horizon.decay(lstm(), loss, None, probe(), lags=20, burn_in=60), "`burn_in` is 60"),
        (lambda: horizon.decay(lstm(), loss, None, probe(), lags=9, lengths=[4, 8], depths=[0, 1]), "and one length"),
        (lambda: horizon.choose(lstm(), loss, None, probe(), 0.0), "`tolerance` is 0.0"),
        (
            lambda: horizon.choose(lstm(), loss, None, probe(), lengths=[61]),
            "`lengths` has 61; this probe window has 60 steps",
        ),
        (
            lambda: horizon.decay(lstm(), lambda y, w: jnp.sqrt(0 * loss(y, w)), params_of(lstm()), probe(), lags=5),
            "The gradient is not finite from lag 1 on",
        ),
    ],
)
def test_a_mistake_is_told_in_a_sentence(mistake, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistake()


def test_a_complex_model_is_measured_whole():
    """A turning unit: φ_k = |a|^k whatever its phase, and full BPTT from one window has no bias."""
    a = 0.9 * np.exp(2j)
    model = tb.from_step(
        lambda p, h, x: (p * h + x, (p * h + x).real),
        lambda k, x: jnp.asarray(a),
        lambda p, n: jnp.zeros((n, 1), complex),
    )
    window = tb.Window(np.random.default_rng(0).normal(size=(2, 40, 1)))
    fading = horizon.decay(model, lambda y, w: y[..., 0], jnp.asarray(a), window, lags=10)
    np.testing.assert_allclose(fading.norms, 0.9 ** np.arange(1, 11), rtol=1e-6)
    squared = lambda y, w: y[..., 0] ** 2  # noqa: E731

    def total(p):
        return (model.unroll(p, model.initial_carry(p, 2), window.inputs)[1] ** 2).sum()

    estimate = tb.gradient(model, squared, normaliser=1.0)
    g, parts = jax.grad(total)(jnp.asarray(a)), jnp.zeros((), complex)
    cut = tb.split(window, 4)
    state = estimate.init(jax.random.key(0), jnp.asarray(a), jax.tree.map(lambda x: x[0], cut))
    for n in range(10):
        grads, state, _ = estimate.update(jnp.asarray(a), state, jax.tree.map(lambda x, n=n: x[n], cut))
        parts += grads
    got = horizon.bias(model, squared, jnp.asarray(a), window, 4)
    np.testing.assert_allclose(got.relative_bias, abs(parts - g) / abs(g), rtol=1e-9)
    np.testing.assert_allclose(got.cosine, (parts * g.conj()).real / abs(parts) / abs(g), rtol=1e-9)
    for exact in (tb.rtrl(), tb.replay(9)):
        assert horizon.bias(model, squared, jnp.asarray(a), window, 4, exact).relative_bias < 1e-10


@pytest.mark.parametrize("kind", [jnp.float16, jnp.bfloat16])
def test_a_loss_in_half_precision_is_measured_with_room(kind):
    model, params, window = lstm(), params_of(lstm()), probe()
    large = lambda outputs, window: 100 * loss(outputs, window)  # noqa: E731
    exact = horizon.bias(model, large, params, window, 10)
    got = horizon.bias(model, lambda o, w: large(o, w).astype(kind), params, window, 10)
    np.testing.assert_allclose(got.relative_bias, exact.relative_bias, rtol=0.05)


@pytest.mark.parametrize("kind", [jnp.float16, jnp.bfloat16])
def test_a_model_in_half_precision_is_traced(kind):
    half = jnp.array(0.5, kind)
    model = tb.from_step(
        lambda p, h, x: (p * h + x, p * h + x), lambda k, x: half, lambda p, n: jnp.zeros((n, 1), kind)
    )
    window = tb.Window(np.ones((2, 40, 1), kind))
    fading = horizon.decay(model, first_feature, half, window, lags=8, burn_in=10)
    k = np.arange(1, 9)
    np.testing.assert_allclose(fading.norms, 0.5**k, rtol=1e-2)
    np.testing.assert_allclose(fading.sums, 1 - 0.5**k, rtol=1e-2)


def test_what_is_beyond_the_lags_counts_against_a_window():
    seen = fading(np.full(3, 0.5), 0.5)._replace(
        beyond=1.0, whole=10.0, lengths=np.array([4, 8]), windows=np.array([2.0, 0.0])
    )
    short, whole = (horizon.suggest(seen, tolerance=tolerance) for tolerance in (0.34, 0.12))
    assert (short.window, short.safe, whole.window, whole.safe) == (4, True, 8, True)
    np.testing.assert_allclose((short.relative_bias, whole.relative_bias), (3 / 9, 1 / 9))
    assert not horizon.suggest(seen, tolerance=0.11).safe


def test_of_losses_with_weights_of_their_own_each_counts_by_its_mean():
    """Where one is seldom there: as in training, which goes down by the sum of means, so as if both were divided by their weights."""
    model, params, plain = lstm(), params_of(lstm()), probe()
    seldom = np.tile(np.arange(60) % 10 == 9, (3, 1)).astype(float)
    weights = {"often": np.ones_like(seldom), "seldom": 7 * seldom}
    window = plain._replace(targets=(plain.targets, seldom), weights=weights)

    def both(outputs, window):
        return {"often": ((outputs - window.targets[0]) ** 2).sum(-1) / 10, "seldom": outputs[..., 0]}

    def means(outputs, window):
        losses = both(outputs, window)
        return losses["often"] / seldom.size + losses["seldom"] * window.targets[1] / seldom.sum()

    expected = horizon.bias(model, means, params, window._replace(weights=None), 10)
    got = horizon.bias(model, both, params, window, 10)
    np.testing.assert_allclose(got[:2], expected[:2], rtol=1e-6)
    chosen = horizon.choose(model, both, params, window, lengths=[10], influences={"none": tb.truncate()})
    np.testing.assert_allclose(chosen.measured[0].relative_bias, expected.relative_bias, rtol=1e-6)


def test_what_a_model_draws_is_left_out_on_both_sides_and_what_an_influence_draws_is_not():
    model, window = tb.lstm(4, layers=2, dropout=0.5), probe(time=20)
    params = model.init(jax.random.key(0), window.inputs)
    of_mean = lambda outputs, window: outputs.mean(-1) * window.targets[..., 0]  # noqa: E731
    assert horizon.bias(model, of_mean, params, window, 20).relative_bias < 1e-10
    plain, short = tb.lstm(4, layers=2), {"length": 5, "draws": 2, "influence": tb.uoro()}
    expected, got = (horizon.bias(each, of_mean, params, window, **short) for each in (plain, model))
    assert got.relative_std > 0.01
    np.testing.assert_allclose(got[:3], expected[:3], rtol=1e-9)
    chosen = horizon.choose(model, of_mean, params, window, 1e-9, lengths=[20], influences={"truncate": tb.truncate()})
    assert chosen.best is not None


@pytest.mark.parametrize("lengths, tolerance", [([50, 60, 100], 0.12), (None, 0.3), (None, 0.1)])
def test_the_shortest_window_is_chosen_also_where_a_longer_one_is_worse(lengths, tolerance):
    """Losses at every 50th step: windows of 60 cut what those of 50 do not, and only one of all steps cuts nothing."""
    model = tb.from_step(lambda p, h, x: (0.97 * h + p + x, 0.97 * h + p), lambda k, x: jnp.ones(()), lambda p, n: jnp.zeros((n, 1)))  # fmt: skip
    weights = (np.arange(100) % 50 == 49).astype(float)[None]
    window, params = tb.Window(np.zeros((1, 100, 1)), weights=weights), jnp.ones(())
    of_output = lambda outputs, window: outputs[..., 0]  # noqa: E731
    ask = {"lengths": lengths, "influences": {"truncate": tb.truncate()}}
    chosen = horizon.choose(model, of_output, params, window, tolerance, **ask)
    tried = lengths or [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    biases = {n: horizon.bias(model, of_output, params, window, n).relative_bias for n in tried}
    assert chosen.best.window == min(n for n, bias in biases.items() if bias <= tolerance)
    assert all(np.isclose(each.relative_bias, biases[each.window]) for each in chosen.measured)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"lengths": 8}, "`lengths` is 8; give one or more"),
        ({"lengths": []}, "`lengths` is .*; give one or more"),
        ({"lengths": (n for n in (4, 61))}, "`lengths` has 61; this probe window has 60 steps"),
        ({"influences": {}}, "`influences` is {}; give one or more by name"),
        ({"influences": [tb.truncate()]}, "give one or more by name"),
        ({"influences": {"r": "replay:1"}}, "`influences` has 'replay:1' for 'r'"),
        ({"key": 3}, "`key` is 3; it needs to be one key"),
    ],
)
def test_what_cannot_be_chosen_from_is_told_in_a_sentence(more, sentence):
    with pytest.raises(ValueError, match=sentence):
        horizon.choose(lstm(), loss, None, probe(), **more)


@pytest.mark.parametrize("more", [{"draws": 1.5}, {"draws": "2"}, {"draws": True}, {"key": 3}])
def test_draws_and_their_key_are_asked_for_before_anything_is_measured(more):
    with pytest.raises(ValueError, match=f"`{next(iter(more))}` is .*; it needs to be"):
        horizon.bias(lstm(), loss, None, probe(), 5, **more)
