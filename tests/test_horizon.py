import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import compiled, loss, lstm, params_of, stream

import tbptt_jax as tb
from tbptt_jax import horizon


def probe(time=60, lanes=3):
    return tb.Window(*np.random.default_rng(0).normal(size=(2, lanes, time, 2)))


def test_decay_is_the_norm_of_each_gradient_traced_by_itself():
    model, params, window, lags = lstm(), params_of(lstm()), probe(), 20
    got = horizon.decay(model, loss, params, window, lags=lags)
    assert got.probes == 9

    def loss_of(carry, start, end):
        part = tb.Window(window.inputs[:, start:end], window.targets[:, start:end])
        _, outputs = model.unroll(params, carry, part.inputs, None, None)
        return loss(outputs, part)[:, -1].sum()

    for lag in (1, 7, 20):
        norms = []
        for end in (20, 40, 60):
            carry, _ = model.unroll(
                params, model.initial_carry(params, 3), window.inputs[:, : max(end - lag, 1)], None, None
            )
            carry = model.initial_carry(params, 3) if end == lag else carry
            cotangents = jax.grad(loss_of)(carry, end - lag, end)
            norms.append(jnp.sqrt(sum(jnp.sum(c**2, -1) for c in cotangents)))
        np.testing.assert_allclose(got.norms[lag - 1], np.mean(norms), rtol=1e-5)


def test_a_linear_decay_is_found_exactly_and_its_window_chosen():
    model = tb.from_step(
        lambda p, h, x: (p["w"] * h + x, p["w"] * h + x),
        lambda k, x: {"w": 0.8},
        lambda p, lanes: jnp.zeros((lanes, 1)),
    )
    window = tb.Window(np.random.default_rng(0).normal(size=(2, 40, 1)))
    fading = horizon.decay(model, lambda y, w: y[..., 0], {"w": jnp.array(0.8)}, window, lags=10)
    np.testing.assert_allclose(fading.norms, 0.8 ** np.arange(1, 11), rtol=1e-6)
    assert np.isclose(fading.rate, 0.8)
    # E(K) = 0.8^K / 0.2 · 0.8 and total = E(0), so δ(K) = 0.8^K / (1 - 2·0.8^K) ≤ 0.1 from K with 0.8^K ≤ 1/12 on.
    choice = horizon.suggest(fading, tolerance=0.1)
    assert choice.horizon == int(np.ceil(np.log(12) / -np.log(0.8))) and choice.safe
    mean = lambda k: np.mean(0.8 ** np.arange(k))  # noqa: E731
    assert mean(choice.window) <= 1 / 12 < mean(choice.window - 1)


def test_no_window_is_safe_where_the_gradient_does_not_fade():
    growing = horizon.Decay(1.01 ** np.arange(50), 1.01, 10)
    choice = horizon.suggest(growing, tolerance=0.5, largest=300)
    assert not choice.safe and choice.window == 300 and "No window is safe" in choice.reason


def test_a_model_without_memory_needs_no_more_than_one_step():
    choice = horizon.suggest(horizon.Decay(np.zeros(20), 0.0, 10))
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
    lowered = horizon._compare.lower(model, loss, None, 1, params, window, tb.split(window, 100), jax.random.key(0))
    steps_of_state = 100_000 * (2 + 2) * 8  # inputs and outputs; a step's gates and states are eight times that
    assert compiled(lowered).memory_analysis().temp_size_in_bytes < 4 * steps_of_state


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: horizon.decay(lstm(), loss, None, probe(), lags=61), "`lags` is 61; this probe window has 60 steps"),
        (lambda: horizon.decay(lstm(), loss, None, probe(), lags=20, tail=20), "`tail` is 20"),
        (lambda: horizon.suggest(horizon.Decay(np.ones(3), 0.5, 1), tolerance=0.0), "`tolerance` is 0.0"),
        (lambda: horizon.suggest(horizon.Decay(np.ones(3), 0.5, 1), largest=0), "`largest` is 0"),
        (lambda: horizon.bias(lstm(), loss, None, probe(), 5, draws=0), "`draws` is 0"),
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
