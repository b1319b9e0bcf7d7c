"""Each mistake is a sentence before any compute: what was given, what was needed, what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from streams import FEATURES, loss, lstm, params_of

import tbptt_jax as tb

X = np.zeros((4, 10, FEATURES))
ONES = np.ones((4, 10))


def update(window, carry_of=4, loss=loss, **options):
    model, estimate = lstm(), tb.gradient(lstm(), loss, **options)
    params = params_of(model)
    window = jax.tree.map(jnp.asarray, window)  # also under jit: before any compute
    state = estimate.init(jax.random.key(0), params, tb.Window(*[np.zeros((carry_of, 10, 2))] * 2))
    jax.jit(estimate.update).lower(params, state, window)


def begin(window):
    estimate = tb.gradient(lstm(), loss)
    tb.train_step(estimate, optax.sgd(0.1)).init(jax.random.key(0), window)


def with_nan(x):
    x = np.array(x)
    x[2, 3] = np.nan
    return x


MISTAKES = {
    "inputs without time": (
        lambda: update(tb.Window(np.zeros(4), X)),
        r"`inputs` has shape \[4\]; it needs the axes \[lanes, time",
    ),
    "targets of other lanes": (
        lambda: update(tb.Window(X, X[:3])),
        r"`targets` has shape \[3, 10, 2\], but `inputs` begins with \[4, 10\]",
    ),
    "weights with a feature axis": (
        lambda: update(tb.Window(X, X, ONES[..., None])),
        r"`weights` has shape \[4, 10, 1\]; it needs the axes",
    ),
    "a carry of 8 lanes given 4": (
        lambda: update(tb.Window(X, X), carry_of=8),
        r"does not fit this window of 4 lanes.*\[8, 3\].*\[4, 3\].*begin",
    ),
    "no steps": (lambda: update(tb.Window(X[:, :0], X[:, :0])), r"its `time` axis is empty"),
    "no inputs": (lambda: update(tb.Window(None)), "no inputs"),
    "windows not stacked": (
        lambda: tb.train_windows(None, None, tb.Window(ONES)),
        r"it needs the axes \[windows, lanes, time",
    ),
    "evaluate one window": (
        lambda: tb.evaluate(lstm(), loss, None, tb.Window(ONES)),
        r"it needs the axes \[windows, lanes, time",
    ),
    "integer resets": (
        lambda: update(tb.Window(X, X, resets=np.ones((4, 10), int))),
        r"`resets` has dtype int64; it needs bool",
    ),
    "nan inputs": (lambda: begin(tb.Window(with_nan(X), X)), "`inputs` is not finite at lanes 2, time 3"),
    "nan targets": (lambda: begin(tb.Window(X, with_nan(X))), "`targets` is not finite at lanes 2, time 3.*weight 0"),
    "nan in a corpus": (
        lambda: tb.lanes(np.array([0.0, np.inf]), lanes=2),
        "`inputs` is not finite at lanes 1, time 0",
    ),
    "nan in sequences": (lambda: tb.sequences(with_nan(X)), "`inputs` is not finite at sequences 2, time 3"),
    "nothing scored": (lambda: tb.split(tb.Window(X, X, 0 * ONES), 5), "`weights` is 0 at every valid step"),
    "nothing to evaluate": (
        lambda: tb.evaluate(lstm(), loss, None, tb.Window(X[None], X[None], 0 * ONES[None])),
        "`weights` is 0 at every",
    ),
    "all padding": (lambda: tb.split(tb.Window(X, X, ONES, valid=ONES < 0), 5), "`weights` is 0 at every valid step"),
    "nothing valid to evaluate": (
        lambda: tb.evaluate(lstm(), loss, None, tb.Window(X[None], X[None], valid=ONES[None] < 0)),
        "nothing would be scored",
    ),
    "nan in what slides": (lambda: tb.slide(tb.Window(with_nan(X)), 5), "`inputs` is not finite at lanes 2, time 3"),
    "integer resets in what slides": (
        lambda: tb.slide(tb.Window(X, resets=np.ones((4, 10), int)), 5),
        "`resets` has dtype int64; it needs bool",
    ),
    "dropout in the readout": (
        lambda: tb.from_nnx(
            lambda rngs: nnx.GRUCell(2, 3, rngs=rngs), readout=lambda rngs: nnx.Dropout(0.5, rngs=rngs)
        ),
        "The readout holds variables besides its parameters.*key",
    ),
    "a negative normaliser": (
        lambda: tb.gradient(lstm(), loss, normaliser=-1.0),
        "`normaliser` is -1.0; it needs to be positive",
    ),
    "negative weights": (lambda: begin(tb.Window(X, X, -ONES)), "negative weight"),
    "window of 0": (lambda: tb.split(tb.Window(X), 0), "A window of 0 steps is empty"),
    "window longer than the stream": (
        lambda: tb.split(tb.Window(X), 11),
        "A window of 11 steps is longer than the stream of 10",
    ),
    "slide longer": (lambda: tb.slide(tb.Window(X), 11), "A window of 11 steps is longer"),
    "slide nowhere": (lambda: tb.slide(tb.Window(X), 5, 0), "`stride` is 0"),
    "slide over padding": (lambda: tb.slide(tb.Window(X, valid=ONES > 0), 5), "use `split`"),
    "more lanes than sequences": (lambda: tb.split(tb.Window(X), 5, lanes=5), "4 sequences cannot be run in 5 lanes"),
    "more lanes than steps": (
        lambda: tb.lanes(np.zeros(3), lanes=4),
        "A corpus of 3 steps cannot be laid out as 4 lanes",
    ),
    "length beyond the arrays": (
        lambda: tb.sequences(X, lengths=[1, 2, 3, 11]),
        "`lengths` needs one length from 0 to 10",
    ),
    "stateless without resets": (lambda: tb.stateless(tb.Window(X)), "this window has none"),
    "loss averaged too far": (
        lambda: update(tb.Window(X, X), loss=lambda o, w: jnp.mean(o)),
        r"The loss has shape \[\]; .* \[4, 10\]",
    ),
    "normaliser of 0": (
        lambda: tb.gradient(lstm(), loss, normaliser=0.0),
        "`normaliser` is 0.0; it needs to be positive",
    ),
    "an influence not called": (
        lambda: tb.gradient(lstm(), loss, influence=tb.truncate),
        r"`influence` is .*such as `truncate\(\)`, called",
    ),
    "a cell for a model": (lambda: tb.gradient(nn.GRUCell(3), loss), "it needs to be a Recurrence"),
    "a layer for a cell": (lambda: tb.from_linen(nn.Dense(3)), "it needs to be an RNN cell"),
    "a tree of losses": (lambda: update(tb.Window(X, X), loss=lambda o, w: {"l": loss(o, w)}), "The loss is a tree"),
    "a carry of another tree": (
        lambda: tb.from_step(lambda p, c, x: ((c, c), x), None, lambda p, n: jnp.zeros(n)).unroll({}, jnp.zeros(4), X),
        "`step` was given the carry .* the same tree",
    ),
    "lists": (lambda: tb.split(tb.Window([[1.0]]), 1), "`inputs` holds 1.0, a Python float; give arrays"),
    "half a step": (lambda: tb.split(tb.Window(X), 2.5), "whole number of steps; got 2.5"),
    "stacked windows for one": (
        lambda: begin(tb.split(tb.Window(X, X), 5)),
        r"`resets` has shape \[2, 4, 5\].*To take the first",
    ),
    "one window for a stack": (
        lambda: tb.train_windows(None, None, tb.sequences(X)),
        r"`resets` has shape \[4, 10\].*x\[None\]",
    ),
    "no layers": (lambda: tb.stack(), "given no layers"),
    "odd number of first bits": (lambda: tb.tasks.first_bit(jax.random.key(0), 7), "7 sequences cannot be balanced"),
    "a cell with other state": (
        lambda: tb.from_nnx(lambda rngs: nnx.BatchNorm(3, rngs=rngs)),
        "The cell holds variables besides its parameters.*mean",
    ),
    "a segment of no steps": (
        lambda: lstm(checkpoint=0).unroll(params_of(lstm()), lstm().initial_carry(None, 4), X),
        "`checkpoint` is 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(mistake):
    make, sentence = MISTAKES[mistake]
    with pytest.raises(ValueError, match=sentence) as told:
        make()
    assert str(told.value).endswith(".")
