"""The kit tells: each law fails for the fault that it is there for, in a sentence that names it, and the first place."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbptt_jax as tb
from tbptt_jax import study, testing
from tbptt_jax.noise import shared

LANES, TIME, UNITS = 3, 8, 2
X = np.random.default_rng(0).normal(size=(LANES, TIME, UNITS))
KEY = jax.random.key(0)


def step(params, h, x, key=None):
    h = jnp.tanh(h @ params["w"] + x)
    return h, h * params["out"]


def init(key, inputs):
    return {"w": 0.9 * jax.random.normal(key, (UNITS, UNITS)), "start": jnp.array([0.3, -0.5]), "out": jnp.ones(UNITS)}


def start(params, lanes):
    return jnp.broadcast_to(params["start"], (lanes, UNITS))


def model(step=step, start=start, **parts):
    return tb.from_step(step, init, start, **parts)


def unrolled(change):
    """The model with ``change(unroll, params, carry, inputs, resets, valid, edges)`` in its place."""
    right = model()

    def unroll(params, carry, inputs, resets=None, valid=None, edges=None):
        return change(right.unroll, params, carry, inputs, resets, valid, edges)

    return right._replace(unroll=unroll)


def drawing(noise):
    def draws(params, h, x, key=None):
        return step(params, h if key is None else h + noise(key, h.shape), x)

    return model(draws)


def of_each(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)


def outputs(change):
    """``change(y, x)`` of the outputs and inputs."""

    def changed(unroll, params, carry, x, resets, valid, edges):
        carry, y = unroll(params, carry, x, resets, valid, edges)
        return carry, change(y, x)

    return unrolled(changed)


def cells(unroll):
    return unrolled(lambda _, *args: unroll(*args))


def masked_too_late(params, h, x, resets, valid, edges):
    """Where it is padding, the carry stands still, and what NaN gives is thrown away; but it has a gradient."""
    ys = []
    for t in range(x.shape[1]):
        h = scaled(h, None if edges is None else edges[:, t])
        h = h if resets is None else jnp.where(resets[:, t, None], start(params, len(h)), h)
        new, y = step(params, h, x[:, t])
        h = new if valid is None else jnp.where(valid[:, t, None], new, h)
        ys.append(y)
    return h, jnp.stack(ys, 1)


def scaled(h, edge):
    return h if edge is None else jax.lax.stop_gradient(h) + edge[:, None] * (h - jax.lax.stop_gradient(h))


def stopped_at_the_edge(unroll, params, carry, x, resets, valid, edges):
    return unroll(params, carry if edges is not None else jax.lax.stop_gradient(carry), x, resets, valid, edges)


def late(resets):
    return None if resets is None else jnp.roll(resets, 1, 1).at[:, 0].set(False)


FAULTS = {
    "resets ignored": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x, None, v, e)),
        r"Resets: after a reset at lane 2, step 0 the outputs are not those of a fresh start \(first difference at lane 2, step 0, -0.86\d+ against",
    ),
    "resets of all lanes": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x, None if r is None else r | r.any(0), v, e)),
        "Resets: after a reset of another lane",
    ),
    "a reset to zeros": (
        unrolled(lambda f, p, h, x, r, v, e: f({**p, "start": 0 * p["start"]}, h, x, r, v, e)),
        "Resets: after a reset at lane 2, step 0",
    ),
    "a reset after the step": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x, late(r), v, e)),
        "Resets: after a reset at lane 2, step 0",
    ),
    "a reset on padding ignored": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x, None if r is None else r & (True if v is None else v), v, e)),
        "Padding: where it holds NaN and a reset, lanes do not stand still: outputs",
    ),
    "padding ignored": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x, r, None, e)),
        r"Padding: where it holds NaN, lanes do not stand still: outputs differ \(.*lane 0, step 5, nan",
    ),
    "padding with a gradient": (cells(masked_too_late), "Padding: where it holds NaN the gradient is another .*nan"),
    "other outputs without padding": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x if v is None else 2 * x, r, v, e)), "Masks: with no `resets` and `valid`",
    ),
    "no slope at the zeros of padding": (
        model(lambda p, h, x: step(p, h, jnp.linalg.norm(x * p["out"], axis=-1, keepdims=True))),
        r"Gradient: that of \['params'\]\['out'\] is not finite, in a window with padding, which is read as zeros",
    ),
    "padding read where it is huge": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h + 1e-3 * jnp.nan_to_num(x).max() * (jnp.nan_to_num(x).max() > 1e9), x, r, v, e)),
        "Padding: where it holds huge numbers, lanes do not stand still",
    ),
    "lanes mixed": (
        model(lambda p, h, x: step(p, h.mean(0) + 0 * h, x)),
        "Lanes: lane . does beside others, or in this row, not what it does alone",
    ),
    "a row number": (
        outputs(lambda y, x: y + jnp.arange(len(y))[:, None, None]),
        r"Lanes: lane 2 does beside others, or in this row, not what it does in row 0 \(first difference at step 0",
    ),
    "a row number to begin from": (
        model(start=lambda p, n: start(p, n) + jnp.arange(n)[:, None]),
        "Lanes: the initial carry depends on a lane's number",
    ),
    "a look ahead": (outputs(lambda y, x: y + jnp.roll(x, -1, 1)), r"Time: outputs before step 4 change .*step 3"),
    "a look back": (outputs(lambda y, x: y + jnp.roll(x, 1, 1).at[:, 0].set(0)), "Cutting: read step by step, the output is .*step 1"),
    "a look at the window's length": (outputs(lambda y, x: y + x.shape[1]), "Cutting: read step by step"),
    "a carry that is left behind": (
        unrolled(lambda f, p, h, x, r, v, e: (h, f(p, h, x, r, v, e)[1])), "Cutting: .*step 1"
    ),
    "a carry of another kind": (
        unrolled(lambda f, *args: (f(*args)[0].astype(jnp.float32), f(*args)[1])),
        r"Carry: it is float64\[3, 2\] at first, and float32\[3, 2\] after a window",
    ),
    "a carry without lanes": (model(start=lambda p, n: jnp.zeros(UNITS)), r"Carry: of 3 lanes it has an array \[2\]"),
    "outputs without lanes": (outputs(lambda y, x: y.sum(0)), r"Carry: outputs are \[8, 2\]"),
    "other numbers where there are no masks": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x if r is not None else 2 * x, r, v, e)), "Lanes|Masks: with no `resets`"
    ),
    "a gradient that is stopped": (
        model(lambda p, h, x: step(p, jax.lax.stop_gradient(h), x)), r"Gradient: that of \['carry'\] is not the slope"
    ),
    "a gradient of parameters that is stopped": (
        model(lambda p, h, x: step({**p, "w": jax.lax.stop_gradient(p["w"])}, h, x)),
        r"Gradient: that of \['params'\]\['w'\] is not the slope",
    ),
    "edges ignored": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x, r, v, None)),
        r"Edges: with an edge of 0 into step 1 the gradient is not that of two windows, cut there",
    ),
    "edges squared": (
        unrolled(lambda f, p, h, x, r, v, e: f(p, h, x, r, v, None if e is None else e**2)),
        "Edges: with an edge of 1/2 into step 1 the gradient is not half way",
    ),
    "a gradient stopped where there are no edges": (unrolled(stopped_at_the_edge), "Past: the gradient of `replay` of all"),
    "one key for all lanes": (drawing(lambda keys, shape: of_each(keys[:1], (1, UNITS))), "Keys: lane . draws beside others"),
    "a row number in the keys": (
        drawing(lambda keys, shape: of_each(jax.vmap(jax.random.fold_in)(keys, jnp.arange(shape[0])), shape)),
        "Keys: lane 2 draws beside others, or in this row, not what it draws in row 0 with the same key",
    ),
    "one draw of all lanes' shape": (
        drawing(lambda keys, shape: jax.random.normal(shared(keys), shape)), "Keys: lane . draws beside others"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught_and_named(fault):
    faulty, sentence = FAULTS[fault]
    with pytest.raises(AssertionError, match=sentence) as raised:
        testing.check_recurrence(faulty, X)
    assert "\n" not in str(raised.value)


RIGHT = {
    "plain": model(),
    "of a key that is shared": drawing(lambda keys, shape: jax.random.normal(shared(keys), shape[1:])),
    "without parameters": tb.from_step(lambda p, h, x: (h + x, h * x), lambda k, x: {}, lambda p, n: jnp.zeros((n, UNITS))),
    "a counter alone": tb.from_step(lambda p, n, x: (n + 1, x * n[:, None] * p), lambda k, x: jnp.ones(2), lambda p, n: jnp.zeros(n, int)),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_model_without_a_fault_passes(name):
    testing.check_recurrence(RIGHT[name], X)


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
def test_fewer_digits_are_held_to_less(kind):
    x, params = jax.tree.map(lambda x: jnp.asarray(x, kind), (X, init(KEY, X)))
    testing.check_recurrence(model(), x, params=params)
    with pytest.raises(AssertionError, match="Cutting: "):
        testing.check_recurrence(FAULTS["a look back"][0], x, params=params)


def test_in_float32_a_gradient_that_is_stopped_is_told():
    x, params = jax.tree.map(np.float32, (X, init(KEY, X)))
    with pytest.raises(AssertionError, match=r"Gradient: that of \['carry'\]"):
        testing.check_recurrence(FAULTS["a gradient that is stopped"][0], x, params=params)


def test_what_tells_nothing_is_refused():
    for inputs in (X[:1], X[:, :3], np.ones_like(X)):
        with pytest.raises(ValueError, match="give 2 lanes of 4 steps or more, not all alike"):
            testing.check_recurrence(model(), inputs)


# Influences


K = 3
DRAWN = {"draws": 400}


def edges_between(s, t):
    return s // K - t // K


def half(influence):
    return influence._replace(pullback=lambda *args: jax.tree.map(lambda g: g / 2, influence.pullback(*args)))


KEPT = {
    "truncate": (tb.truncate(), lambda s, t: edges_between(s, t) == 0, {}),
    "replay": (tb.replay(1), lambda s, t: edges_between(s, t) <= 1, {}),
    "replay of all": (tb.replay(2), None, {}),
    "rtrl": (tb.rtrl(), None, {}),
    "random replay": (tb.replay(2, survival=0.5), None, DRAWN),
    "uoro": (tb.uoro(), None, DRAWN),
}
BROKEN = {
    "truncate as all": (tb.truncate(), None, {}, "the gradient of window 1 is not the sum of lag gradients"),
    "replay as all": (tb.replay(1), None, {}, "the gradient of window 2"),
    "replay as truncate": (tb.replay(1), KEPT["truncate"][1], {}, "the gradient of window 1"),
    "half of rtrl": (half(tb.rtrl()), None, {}, "the gradient of window 1"),
    "half of uoro": (half(tb.uoro()), None, DRAWN, r"the mean of 400 draws has 0\.\d+ of the past that it promises"),
    "too few replayed": (tb.replay(1, survival=0.5), None, DRAWN, "the mean of 400 draws is not the sum|has 0"),
    "truncate, drawn": (tb.truncate(), None, DRAWN, "the mean of 400 draws has 0.000 of the past"),
}


@pytest.mark.parametrize("name", KEPT)
def test_an_influence_keeps_what_it_promises(name):
    influence, weights, draws = KEPT[name]
    testing.check_influence(influence, model(), X, K, weights, **draws)


@pytest.mark.parametrize("name", BROKEN)
def test_a_promise_that_is_broken_is_told(name):
    influence, weights, draws, sentence = BROKEN[name]
    with pytest.raises(AssertionError, match=f"Influence: {sentence}"):
        testing.check_influence(influence, model(), X, K, weights, **draws)


def test_an_influence_is_not_judged_by_too_little():
    with pytest.raises(ValueError, match="3 draws are too few to tell this influence from one that knows no past"):
        testing.check_influence(tb.uoro(), model(), X, K, draws=3)
    with pytest.raises(ValueError, match="there is no window with a past"):
        testing.check_influence(tb.rtrl(), model(), X, TIME)


# Tasks


def task(**changes):
    def draw(key):
        x = jax.random.normal(key, (6, 12, UNITS))
        return tb.sequences(np.asarray(x), np.asarray(x.sum(-1, keepdims=True)))

    linear = tb.from_linen(nn.GRUCell(UNITS), readout=nn.Dense(1))
    squared = lambda y, w: ((y - w.targets) ** 2)[..., 0]  # noqa: E731
    return study.Task(linear, squared, draw, draw, draw, lanes=3, exact=lambda carried, k: 0.0)._replace(**changes)


def fixed(key=None):
    return task().train(KEY)


COUNT = iter(range(1000))
NO_TASK = {
    "data that never is the same": ({"train": lambda: task().train(jax.random.key(next(COUNT)))}, "Data: what train is made of is not the same"),
    "data that always is the same": ({"train": lambda key: fixed()}, "Data: what train is made of is the same for seeds 0 and 1"),
    "validation on training's data": ({"train": fixed(), "valid": fixed()}, "Apart: what valid is made of is what is trained on"),
    "a cut that leaves something out": (
        {"cut": lambda w, k, n: jax.tree.map(lambda x: x[:1], tb.split(w, k, lanes=n))}, "Windows: those of train have 30 valid steps, and there are 72"
    ),
    "windows that do not begin": (
        {"cut": lambda w, k, n: (c := tb.split(w, k, lanes=n))._replace(resets=0 * c.resets > 0)}, "Windows: the first one of train does not begin"
    ),
    "nothing to score": ({"cut": lambda w, k, n: (c := tb.split(w, k, lanes=n))._replace(weights=np.zeros(c.resets.shape))}, "Windows: those of train have nothing to score"),
    "a loss that is a mean over time": (
        {"loss": lambda y, w: ((y - w.targets) ** 2).mean(1) + 0 * y[..., 0]}, "Loss: the loss of a step changes with the outputs and targets of others"
    ),
    "a figure over all lanes": (
        {"figures": (study.Figure("error", lambda y, w: (y - y.mean(0))[..., 0] ** 2),)}, "Loss: the figure 'error' of a step changes"
    ),
    "a loss that is not finite": ({"loss": lambda y, w: jnp.log(-abs(y[..., 0]))}, "Loss: the loss is not finite"),
    "a floor below the one with a past": ({"exact": lambda carried, k: 1.0 * carried}, "Floor: the best that is possible is 1 with the past and 0 without"),
    "no floor": ({"exact": lambda carried, k: float("nan")}, "Floor: the best that is possible is nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TASK)
def test_what_is_wrong_with_a_task_is_told(name):
    changes, sentence = NO_TASK[name]
    with pytest.raises(AssertionError, match=sentence):
        testing.check_task(task(**changes))


@pytest.mark.parametrize("name", ["own", "first_bit", "copy_memory", "adding", "lag", "influence_balancing"])
def test_a_task_is_what_it_says(name):
    testing.check_task(task() if name == "own" else study.task(name))
