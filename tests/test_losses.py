"""Losses that see more than outputs: static features and final labels, class weights, activations and their change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from streams import FEATURES, assert_close, params_of, read, stream, summed_gradient

import tbptt_jax as tb

# Its outputs are the sum of a sequence so far, times its static feature.
summing = tb.from_step(
    lambda params, carry, x: (carry + x["inputs"], (carry + x["inputs"]) * x["static"]["scale"]),
    lambda key, inputs: (),
    lambda params, lanes: jnp.zeros(lanes),
)


def squared(outputs, window):
    return (outputs - window.targets) ** 2


def sequences(lengths, seed=0):
    """``(x [n, 9], scale [n], label [n])``, NaN after the ends of sequences."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(lengths), 9))
    x[np.arange(9) >= np.array(lengths)[:, None]] = np.nan
    return x, rng.normal(size=len(lengths)), rng.normal(size=len(lengths))


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    k=st.integers(1, 9),
    lanes=st.integers(1, 3),
    packed=st.booleans(),
)
def test_a_label_is_scored_once_at_the_end_of_its_sequence_however_that_is_laid_and_cut(lengths, k, lanes, packed):
    assume(any(lengths))
    x, scale, label = sequences(lengths)
    label[np.array(lengths) == 0] = np.nan  # nobody is asked
    once = {"static": {"scale": scale}, "label": label}
    if packed:
        flat = x[np.arange(9) < np.array(lengths)[:, None]]
        whole = tb.pack(flat, lengths=lengths, lanes=lanes, key=0, **once)
        windows = tb.split(whole, min(k, whole.valid.shape[1]))
    else:
        windows = tb.split(tb.sequences(x, lengths=lengths, **once), k, lanes=min(lanes, len(lengths)))
    metrics = tb.evaluate(summing, squared, (), windows)
    loop = [(x[i, :n].sum() * scale[i] - label[i]) ** 2 for i, n in enumerate(lengths) if n]
    assert metrics.weight == len(loop)
    np.testing.assert_allclose(metrics.loss, np.mean(loop))


@pytest.mark.parametrize("packed", [False, True])
def test_beside_targets_a_label_has_a_loss_of_its_own(packed):
    lengths = [9, 4, 0, 6]
    x, scale, label = sequences(lengths)
    there = np.arange(9) < np.array(lengths)[:, None]
    once = {"static": {"scale": scale}, "label": {"sum": label}}
    if packed:
        whole = tb.pack(x[there], 2 * x[there], lengths=lengths, lanes=2, **once)
    else:
        whole = tb.sequences(x, 2 * x, lengths, **once)

    def loss(outputs, window):
        of_steps, of_sequence = window.targets["targets"], window.targets["label"]["sum"]
        return {"targets": (outputs - of_steps) ** 2, "label": (outputs - of_sequence) ** 2}

    metrics = tb.evaluate(summing, loss, (), tb.split(whole, 4))
    outputs = np.cumsum(x, 1) * scale[:, None]
    assert metrics.weight == {"targets": 19, "label": 3}
    np.testing.assert_allclose(metrics.loss["targets"], np.mean((outputs - 2 * x)[there] ** 2))
    ends = [(outputs[i, n - 1] - label[i]) ** 2 for i, n in enumerate(lengths) if n]
    np.testing.assert_allclose(metrics.loss["label"], np.mean(ends))


def test_static_features_and_labels_are_views_in_the_hosts_memory_and_may_be_on_a_device():
    static, label = np.ones((5, 3)), np.arange(5)
    window = tb.sequences(np.zeros((5, 1000)), static=static, label=label)
    assert np.shares_memory(window.inputs["static"], static) and np.shares_memory(window.targets, label)
    on_device = tb.sequences(jnp.zeros((5, 7)), static=jnp.asarray(static), label=jnp.asarray(label))
    assert on_device.inputs["static"].shape == (5, 7, 3) and on_device.weights[:, -1].all()
    keys = jax.random.split(jax.random.key(0), 5)
    assert tb.sequences(np.zeros((5, 7)), static=keys).inputs["static"].shape == (5, 7)


@pytest.mark.parametrize(
    "once, message",
    [
        ({"static": np.zeros((3, 2))}, r"`static` has shape \[3, 2\]; it needs the axes \[4 sequences, ...\]"),
        ({"label": np.zeros((7, 4))}, r"`label` has shape \[7, 4\]"),
        ({"label": np.float32(1)}, r"`label` has shape \[\]"),
        ({"label": [0, 1, 0, 1]}, "`label` holds 0, a Python int"),
        ({"static": {}}, "`static` is {}, without an array"),
        ({"static": np.array([0, 1, np.nan, 0])}, "`inputs` is not finite at"),
        ({"label": np.array([0, 1, np.nan, 0])}, "`targets` is not finite at"),
    ],
)
def test_what_a_sequence_cannot_have_once_is_told(once, message):
    with pytest.raises(ValueError, match=message):
        tb.sequences(np.zeros((4, 7)), **once)
    with pytest.raises(ValueError, match=message):
        tb.pack(np.zeros(28), lengths=[7] * 4, lanes=2, **once)


def labelled(seed=0):
    """A stream whose targets are three classes, one of them rare; rubbish where nothing is scored."""
    window, rng = stream(seed), np.random.default_rng(seed)
    labels = rng.choice(3, window.valid.shape, p=[0.6, 0.35, 0.05])
    unscored = ~window.valid | (window.weights == 0)
    return window._replace(targets=np.where(unscored, -100, labels)), ~unscored


def test_class_weights_multiply_those_of_steps_and_leave_out_what_is_not_scored():
    window, scored = labelled()
    weighed = tb.class_weights(window, [1, 2.5, 0])
    np.testing.assert_array_equal(
        weighed.weights[scored], window.weights[scored] * np.array([1, 2.5, 0])[window.targets[scored]]
    )
    np.testing.assert_array_equal(weighed.weights[~scored], window.weights[~scored])
    windows = tb.split(window, 5)
    assert_close(tb.class_weights(windows, [1, 2.5, 0]).weights, tb.split(weighed, 5).weights)
    plain = tb.Window(np.zeros((1, 4)), np.array([[True, False, True, True]]))
    assert tb.class_weights(plain, [3, 1]).weights.tolist() == [[1, 3, 1, 1]]


def test_balanced_every_class_weighs_the_same_and_a_mean_is_that_of_the_classes_means():
    window, scored = labelled()
    figure = np.random.default_rng(1).normal(size=scored.shape)
    balanced = tb.class_weights(window._replace(inputs=figure), "balanced")
    of_class = [(window.weights * scored * (window.targets == c)) for c in range(3)]
    np.testing.assert_allclose([(balanced.weights * (w > 0)).sum() for w in of_class], np.sum(of_class) / 3)
    means = [np.average(figure, weights=w) for w in of_class]
    own = tb.from_step(lambda params, carry, x: (carry, x), lambda *_: (), lambda params, lanes: jnp.zeros(lanes))
    metrics = tb.evaluate(own, lambda y, window: y, (), tb.split(balanced, 4))
    np.testing.assert_allclose(metrics.loss, np.mean(means))

    labels = np.array([[0, 0, 0, 2]])  # as scikit-learn: n / (classes that occur · count)
    weights = tb.class_weights(tb.Window(labels, labels), "balanced").weights
    np.testing.assert_allclose(weights, [[4 / 6, 4 / 6, 4 / 6, 2]])


def test_of_several_targets_those_that_are_named_are_weighed():
    labels = np.array([2, 0, 1])
    window = tb.sequences(np.zeros((3, 4)), np.zeros((3, 4)), label=labels)
    weighed = tb.class_weights(window, {"label": [1.0, 2.0, 4.0]})
    assert weighed.weights["targets"].tolist() == np.ones((3, 4)).tolist()
    assert weighed.weights["label"].tolist() == [[0, 0, 0, w] for w in (4, 1, 2)]
    several = tb.Window(np.zeros((3, 4)), {"a": window.targets["label"], "b": np.zeros((3, 4))})
    assert tb.class_weights(several, {"a": "balanced"}).weights["b"].tolist() == np.ones((3, 4)).tolist()


@pytest.mark.parametrize(
    "targets, weights, message",
    [
        ([[0, 1, 3]], [1.0, 1.0], "holds the label 3, and `weights` has 2 classes"),
        ([[0, 1, -1]], [1.0, 1.0], "holds the label -1"),
        ([[0, 1, -1]], "balanced", "holds the label -1"),
        ([[0.0, 1.0, 0.0]], "balanced", "it needs to be an array of labels"),
        ([[[0], [1], [1]]], "balanced", "one label for each lane and step"),
        ([[0, 1, 1]], "even", "a number from 0 for each class"),
        ([[0, 1, 1]], [1.0, -1.0], "a number from 0 for each class"),
        ([[0, 1, 1]], [], "a number from 0 for each class"),
        ([[0, 1, 1]], {0: 1.0, 1: 5.0}, "the targets are no dict"),
        (None, "balanced", "it needs to be an array of labels"),
    ],
)
def test_labels_and_weights_that_do_not_fit_are_told(targets, weights, message):
    targets = None if targets is None else np.array(targets)
    with pytest.raises(ValueError, match=message):
        tb.class_weights(tb.Window(np.zeros((1, 3)), targets, np.ones((1, 3))), weights)


# An Elman network that hands out its h.
@jax.jit
def step(params, h, x):
    h = jnp.tanh(x @ params["u"] + h @ params["w"])
    return h, {"y": h @ params["o"], "h": h}


handing = tb.from_step(
    step,
    lambda key, inputs: {name: jax.random.normal(key, (n, 2)) for name, n in (("u", FEATURES), ("w", 2), ("o", 2))},
    lambda params, lanes: jnp.zeros((lanes, 2)),
)
UNITS = 2
activating = tb.with_activations(handing, UNITS, of=lambda outputs: outputs["h"])
ALPHA, BETA = 0.7, 1.3
penalty = tb.activation_penalty(ALPHA, BETA)


def penalised(outputs, window):
    return jnp.sum((outputs["outputs"]["y"] - window.targets) ** 2, -1) + penalty(outputs, window)


def loop(params, window, task=1.0, edge=lambda t, tree: tree):
    """The sum of weighted losses, each lane and step by itself; what goes back over the edge into step t is ``edge``'s."""
    total = 0.0
    for lane in range(len(window.valid)):
        carry, before = jnp.zeros(UNITS), None
        for t in range(window.valid.shape[1]):
            carry, before = edge(t, (carry, before))
            if window.resets[lane, t]:
                carry, before = jnp.zeros(UNITS), None
            if window.valid[lane, t]:
                carry, out = step(params, carry, window.inputs[lane, t])
                change = 0.0 if before is None else out["h"] - before
                before = out["h"]
                both = ALPHA * jnp.mean(out["h"] ** 2) + BETA * jnp.mean(change**2)
                loss = task * jnp.sum((out["y"] - window.targets[lane, t]) ** 2) + both
                total += window.weights[lane, t] * loss
    return total


@settings(deadline=None, max_examples=6)
@given(k=st.integers(1, 23))
def test_the_penalty_is_that_of_the_stream_wherever_it_is_cut(k):
    params, window = params_of(handing), stream(rubbish=np.nan)
    metrics = tb.evaluate(activating, penalty, params, tb.split(window, k))
    np.testing.assert_allclose(metrics.loss * metrics.weight, loop(params, window, task=0.0), rtol=1e-11)


def small():
    return stream(seed=2, lanes=3, time=9)


def test_within_one_window_and_by_replay_and_rtrl_across_edges_the_gradient_is_that_of_the_plain_loop():
    params, window = params_of(handing), small()
    expected = jax.grad(lambda p: loop(p, window))(params)
    for k, influence in ((9, tb.truncate()), (4, tb.replay(3)), (2, tb.rtrl())):
        estimate = tb.gradient(activating, penalised, influence=influence, normaliser=1.0)
        assert_close(summed_gradient(estimate, params, tb.split(window, k))[0], expected, rtol=1e-9)


def test_cut_the_change_at_an_edge_counts_and_its_gradient_stops_there():
    params, window = params_of(handing), small()
    still = lambda t, tree: jax.lax.stop_gradient(tree) if t % 4 == 0 else tree  # noqa: E731
    expected = jax.grad(lambda p: loop(p, window, edge=still))(params)
    estimate = tb.gradient(activating, penalised, normaliser=1.0)
    assert_close(summed_gradient(estimate, params, tb.split(window, 4))[0], expected, rtol=1e-9)
    edges = np.broadcast_to((np.arange(9) % 4 > 0).astype(float), (3, 9))  # the same in one window
    assert_close(summed_gradient(estimate, params, tb.split(window._replace(edges=edges), 9))[0], expected, rtol=1e-9)


def test_what_dropout_left_is_penalised_for_its_size_and_what_was_before_it_for_its_change():
    model = tb.with_activations(handing, UNITS, of=lambda y: y["h"], dropped=lambda y: 0.0 * y["h"])
    params, windows = params_of(handing), tb.split(stream(), 5)
    both = [tb.evaluate(model, tb.activation_penalty(*factors), params, windows).loss for factors in ((1, 0), (0, 1))]
    assert both[0] == 0
    assert both[1] == tb.evaluate(activating, tb.activation_penalty(0, 1), params, windows).loss > 0


def test_the_parameters_are_the_models_own_and_its_outputs_the_same():
    params, windows = params_of(handing), tb.split(stream(), 5)
    assert_close(
        activating.init(jax.random.key(0), windows.inputs[0]), handing.init(jax.random.key(0), windows.inputs[0])
    )
    assert_close(read(activating, params, windows)[1]["outputs"], read(handing, params, windows)[1])


def test_what_the_model_draws_it_draws_as_without_the_wrapper():
    noisy = tb.from_step(
        lambda params, carry, x, key: (carry, x if key is None else jax.vmap(jax.random.normal)(key)[:, None]),
        lambda *_: (),
        lambda params, lanes: jnp.zeros(lanes),
    )
    model, x, key = tb.with_activations(noisy, 1), jnp.zeros((3, 5, 1)), tb.noise.lane_keys(jax.random.key(0), 3)
    for keys in (key, None):
        _, outputs = model.unroll((), model.initial_carry((), 3), x, key=keys)
        _, expected = noisy.unroll((), noisy.initial_carry((), 3), x, key=keys)
        np.testing.assert_array_equal(outputs["activation"], expected)


def test_activations_in_half_precision_are_penalised_in_single():
    half = lambda params, carry, x: (carry, x.astype(jnp.bfloat16))  # noqa: E731
    model = tb.with_activations(tb.from_step(half, lambda *_: (), lambda params, lanes: jnp.zeros(lanes)), 1)
    x = jnp.full((1, 2, 1), 1e20)  # its square is beyond half of a float32's exponents
    _, outputs = model.unroll((), model.initial_carry((), 1), x)
    assert outputs["activation"].dtype == jnp.bfloat16 and penalty(outputs, None).dtype != jnp.bfloat16


def test_activations_that_do_not_fit_are_told():
    x = np.zeros((2, 5, FEATURES))
    with pytest.raises(ValueError, match=r"`of` makes .*; it needs to make activations"):
        tb.with_activations(handing, UNITS).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"\[2 lanes, 5 steps, 4 units\]"):
        tb.with_activations(handing, 4, of=lambda y: y["h"]).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="`dropped` makes"):
        tb.with_activations(handing, UNITS, of=lambda y: y["h"], dropped=lambda y: y["y"][..., :1]).init(
            jax.random.key(0), x
        )
    with pytest.raises(ValueError, match="`model` is"):
        tb.with_activations(penalty, 4)
    with pytest.raises(ValueError, match="`units` is 0"):
        tb.with_activations(handing, 0)
    with pytest.raises(ValueError, match="`beta` is -1"):
        tb.activation_penalty(beta=-1)
    params = params_of(handing)
    with pytest.raises(ValueError, match="have no 'activation' and 'change'"):
        tb.evaluate(handing, penalty, params, tb.split(stream(), 5))
    with pytest.raises(ValueError, match="The carry does not fit"):
        activating.unroll(params, handing.initial_carry(params, 2), x)
