"""Each mistake is a sentence before any compute: what was given, what was needed, what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import torch
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
    train_step().init(jax.random.key(0), window)


def train_step():
    return tb.train_step(tb.gradient(lstm(), loss), optax.sgd(0.1))


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
    "batch statistics in the readout": (
        lambda: tb.from_nnx(
            lambda rngs: nnx.GRUCell(2, 3, rngs=rngs), readout=lambda rngs: nnx.BatchNorm(3, rngs=rngs)
        ),
        "The readout holds variables besides its parameters.*mean",
    ),
    "a dropout of one": (lambda: tb.gru(3, dropout=1.0), "`dropout` is 1.0; it is the part that is left out"),
    "a negative normaliser": (
        lambda: tb.gradient(lstm(), loss, normaliser=-1.0),
        "`normaliser` is -1.0; it needs to be positive",
    ),
    "negative weights": (lambda: begin(tb.Window(X, X, -ONES)), "negative weight"),
    "window of 0": (lambda: tb.split(tb.Window(X), 0), "`length` is 0; it needs to be a whole number, at least 1"),
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
        "`lengths` needs one whole number from 0 to 10",
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
    "a complex loss": (
        lambda: update(tb.Window(X, X), loss=lambda o, w: loss(o, w) + 0j),
        r"The loss has dtype complex128, which has no gradient to go down by.*`jnp.abs\(e\) \*\* 2`",
    ),
    "a loss of nothing": (lambda: update(tb.Window(X, X), loss=lambda o, w: {}), "The loss is a tree without an array"),
    "a carry of another tree": (
        lambda: tb.from_step(lambda p, c, x: ((c, c), x), None, lambda p, n: jnp.zeros(n)).unroll({}, jnp.zeros(4), X),
        "`step` was given the carry .* the same tree",
    ),
    "lists": (lambda: tb.split(tb.Window([[1.0]]), 1), "`inputs` holds 1.0, a Python float; give arrays"),
    "a mask that would be lost": (
        lambda: tb.sequences(np.ma.masked_array(X, X > 0)),
        r"`inputs` is a masked array.*`x.filled\(0\)`.*`valid`.*`weights`",
    ),
    "a torch tensor": (
        lambda: tb.lanes(torch.zeros(40, 1), lanes=3),
        "`inputs` holds tensor.*, of torch, a Tensor; give arrays of numbers, as `np.asarray` makes",
    ),
    "a table of pandas": (
        lambda: tb.pack(pd.DataFrame(X[0]), lengths=[10], lanes=1),
        "of pandas, a DataFrame; .*np.asarray",
    ),
    "a column of pandas": (
        lambda: tb.lanes(np.zeros(9), pd.Series(np.zeros(9)), lanes=1),
        "`targets` holds .*of pandas, a Series",
    ),
    "dates": (
        lambda: tb.lanes(np.arange("2020-01", "2020-02", dtype="datetime64[D]"), lanes=3),
        "dtype datetime64.*np.asarray",
    ),
    "letters": (lambda: tb.sequences(np.array([list("hello")])), "`inputs` has dtype <U1.*numbers that stand for them"),
    "objects": (lambda: tb.streams.windows(np.array([1, "a"], object), lanes=1, length=1, per_call=1), "dtype object"),
    "inputs without time beside masks": (
        lambda: begin(tb.Window(np.zeros(4), X, resets=ONES > 0)),
        r"`inputs` has shape \[4\]; it needs the axes \[lanes, time",
    ),
    "complex weights": (lambda: begin(tb.Window(X, X, ONES + 0j)), "`weights` has dtype complex128; it needs real"),
    "burn-in of the whole window": (lambda: tb.burn_in(tb.Window(X), 10), "`steps` is 10.*from 0 to 9"),
    "burn-in of all that overlaps": (lambda: tb.overlap(tb.Window(X), 5, 5), "`burn_in` is 5.*from 0 to 4"),
    "padding dropped under jit": (
        lambda: jax.jit(lambda v: tb.split(tb.Window(X, valid=v), 5, drop_padding=True))(ONES > 0),
        "`drop_padding` needs `valid` in the host's memory",
    ),
    "half a step": (lambda: tb.split(tb.Window(X), 2.5), "`length` is 2.5; it needs to be a whole number"),
    "stacked windows for one": (
        lambda: begin(tb.split(tb.Window(X, X), 5)),
        r"`resets` has shape \[2, 4, 5\].*To take the first",
    ),
    "one window for a stack": (
        lambda: tb.train_windows(None, None, tb.sequences(X)),
        r"`resets` has shape \[4, 10\].*x\[None\]",
    ),
    "no layers": (lambda: tb.stack(), r"`stack` was given \(\); it needs recurrences"),
    "a list of layers": (lambda: tb.stack([lstm()]), "it needs recurrences one after another"),
    "half a sequence": (lambda: tb.sequences(X, lengths=[2.5] * 4), "needs one whole number from 0 to 10"),
    "half a lane": (lambda: tb.split(tb.Window(X), 5, lanes=2.0), "`lanes` is 2.0; it needs to be a whole number"),
    "no lanes": (lambda: tb.lanes(np.zeros(3), lanes=0), "`lanes` is 0; it needs to be a whole number, at least 1"),
    "half a stride": (lambda: tb.slide(tb.Window(X), 5, 1.5), "`stride` is 1.5; it needs to be a whole number"),
    "half a schedule": (lambda: tb.schedules.fixed(2.5), "`length` is 2.5"),
    "no probability": (lambda: tb.schedules.random_length(20, short=3), r"`short` is 3; .* in \[0, 1\]"),
    "a schedule not drawn from": (
        lambda: tb.schedules.cut(tb.sequences(X), tb.schedules.fixed(5)),
        r"it needs to be what a schedule draws, such as `fixed\(20\)\(key, time\)`",
    ),
    "yes for a number of windows": (lambda: tb.replay(True), "`windows` is True; it needs to be a whole number"),
    "no optimiser": (lambda: tb.train_step(tb.gradient(lstm(), loss), None), r"`optimiser` is None; .*optax.adam"),
    "a model for an estimate": (lambda: tb.train_step(lstm(), optax.sgd(0.1)), "`estimate` is Recurrence.*tb.gradient"),
    "data for a window": (lambda: begin(X), "A ndarray was given for a window; it needs to be a `tb.Window`"),
    "state and step swapped": (
        lambda: tb.train_windows(None, train_step(), tb.Window(X[None], X[None])),
        "`step` and `state` are a NoneType and a TrainStep; they need to be",
    ),
    "nan in what is trained on": (
        lambda: tb.train_windows(None, None, tb.Window(with_nan(X)[None], X[None])),
        "`inputs` is not finite at windows 0, lanes 2, time 3",
    ),
    "negative weights in what is trained on": (
        lambda: tb.train_windows(None, None, tb.Window(X[None], X[None], -ONES[None])),
        "negative weight",
    ),
    "a loss of whole numbers": (
        lambda: update(tb.Window(X, X), loss=lambda o, w: jnp.ones((4, 10), int)),
        "The loss has dtype int64, which has no gradient",
    ),
    "batch statistics in an LSTM": (
        lambda: tb.lstm(3, encoder=nn.BatchNorm(use_running_average=True)).init(jax.random.key(0), X),
        r"The encoder holds variables besides its parameters: \['batch_stats'\]",
    ),
    "no feature axis for a cell": (
        lambda: tb.from_linen(nn.GRUCell(8)).init(jax.random.key(0), X[..., 0]),
        r"`inputs` has shape \[4, 10\], and `cell.params.in.kernel` is \[4, 8\] for these 4 lanes of 10 steps and \[5, 8\]",
    ),
    "tokens for a cell": (
        lambda: tb.from_linen(nn.GRUCell(8)).init(jax.random.key(0), X[..., 0].astype(int)),
        "or tokens an `encoder` such as nn.Embed",
    ),
    "no feature axis for an encoder": (
        lambda: tb.from_linen(nn.GRUCell(8), encoder=nn.Dense(3)).init(jax.random.key(0), X[..., 0]),
        r"`inputs` has shape \[4, 10\], and `cell.params.in.kernel` is .* a module takes the last axis for features",
    ),
    "no feature axis for an LSTM": (
        lambda: tb.lstm(8).init(jax.random.key(0), X[..., 0]),
        r"What reaches the LSTM has shape \[4, 10\]; it needs to be \[lanes, time, features\]: `x\[..., None\]`",
    ),
    "no feature axis for a cell of as many features as lanes": (
        lambda: tb.from_nnx(lambda rngs: nnx.GRUCell(4, 8, rngs=rngs)).init(jax.random.key(0), X[..., 0]),
        r"`inputs` has shape \[4, 10\], and 5 lanes of such inputs do not fit",
    ),
    "one module for two places that it does not fit": (
        lambda: tb.from_linen(nn.GRUCell(8), **dict.fromkeys(("encoder", "readout"), nn.Dense(3))).init(
            jax.random.key(0), X
        ),
        "The readout is, or holds, a module of another part, and shares its parameters.*make a second",
    ),
    "complex inputs of a real LSTM": (
        lambda: tb.lstm(8).unroll(
            tb.lstm(8).init(jax.random.key(0), X),
            tb.lstm(8).initial_carry(tb.lstm(8).init(jax.random.key(0), X), 4),
            X + 0j,
        ),
        r"What reaches the LSTM is complex128\[4, 10, 2\]; it needs to be real",
    ),
    "a carry that loses its imaginary part": (
        lambda: tb.from_step(lambda p, c, x: (c * 1j, x), None, lambda p, n: jnp.zeros(n)).unroll({}, jnp.zeros(4), X),
        r"given the carry float64\[4\] and returned complex128\[4\].*kinds of number",
    ),
    "batch statistics": (
        lambda: tb.from_linen(nn.GRUCell(3), readout=nn.BatchNorm(use_running_average=False)).init(
            jax.random.key(0), X
        ),
        r"The readout holds variables besides its parameters: \['batch_stats'\]",
    ),
    "a class for a cell": (lambda: tb.from_nnx(nnx.GRUCell), "The cell is the class GRUCell; .*rngs=rngs"),
    "a carry that turns into whole numbers": (
        lambda: tb.from_step(lambda p, c, x: (c.astype(int), x), None, lambda p, n: jnp.zeros(n)).unroll(
            {}, jnp.zeros(4), X
        ),
        r"given the carry float64\[4\] and returned int64\[4\].*kinds of number",
    ),
    "a carry of another shape": (
        lambda: tb.from_step(lambda p, c, x: (x, x), None, lambda p, n: jnp.zeros(n)).unroll({}, jnp.zeros(4), X),
        r"given the carry float64\[4\] and returned float64\[4, 2\]",
    ),
    "a carry without lanes": (
        lambda: tb.gradient(tb.from_step(lambda p, c, x: (c, x), None, lambda p, n: jnp.zeros(3)), loss).init(
            jax.random.key(0), {}, tb.Window(X, X)
        ),
        r"`initial_carry` made \[3\]; every array of it needs to be \[4 lanes",
    ),
    "nothing carried that could be learned from": (
        lambda: tb.gradient(
            tb.from_step(lambda p, c, x: (c, x), None, lambda p, n: jnp.zeros(n, int)), loss, influence=tb.uoro()
        ).init(jax.random.key(0), {}, tb.Window(X, X)),
        "no floating-point array.*truncate",
    ),
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
