"""What a sweep over window lengths can train on: each task's data, model and score, and what theory says of it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tbptt_jax as tb
from experiments import launch, series, text
from tbptt_jax.tasks import adding, adding_floor, copy_memory, copy_memory_floor, lag, lag_floor
from tbptt_jax.tasks.first_bit import first_bit_floor
from tbptt_jax.tasks.influence_balancing import influence_balancing, influence_balancing_model


class Task(NamedTuple):
    """Attributes:
    about: what it asks, and what a window without a carried state can see of it.
    data: ``key -> (train, test)``, whole streams ``[n, time, ...]`` to be cut.
    shared: whether the data is the same whatever the key, as a file's is.
    steps: of a training stream: the longest window.
    lanes: how many training streams are read side by side.
    model: the recurrence.
    loss: ``(outputs, window) -> [lanes, time]``, what is minimised.
    score: likewise, what is reported.
    metric: the report's words for the score: its name, unit, and whether higher or lower is better.
    last: whether only the last step of each window is scored.
    free: whether the test is one free run with the state carried, however it was trained.
    exact: ``(carried, window) -> the best possible score``, None where theory does not say.
    """

    about: str
    data: Callable[[jax.Array], tuple[tb.Window, tb.Window]]
    shared: bool
    steps: int
    lanes: int
    model: tb.Recurrence
    loss: Callable[[Any, tb.Window], jax.Array]
    score: Callable[[Any, tb.Window], jax.Array]
    metric: dict[str, str]
    last: bool = False
    free: bool = False
    exact: Callable[[bool, int], float | None] = lambda carried, window: None


class Files(NamedTuple):
    """What the flags name."""

    text: list[str]
    train: str | None
    test: str | None
    inputs: list[str]
    targets: list[str]
    missing: list[str] = []  # noqa: RUF012
    fill: str | None = None
    decimal: str | None = None


NAMES = ("first_bit", "copy_memory", "adding", "lag", "influence_balancing", "char_lm", "forecast")


def make(
    name: str, hidden: int | None, lanes: int | None, longest: int, files: Files, lstm: Callable = tb.lstm
) -> Task:
    """The task of a name.

    Args:
      name: one of ``NAMES``.
      hidden: units of the LSTM; None: the task's own number.
      lanes: streams side by side; None: the task's own number.
      longest: the longest window there will be.
      files: those of char_lm and forecast.
      lstm: ``tb.lstm``, or the same with an implementation chosen.

    Raises:
      ValueError: if a file is not as it needs to be, or too short.
    """
    match name:
        case "first_bit":
            return _first_bit(lstm, hidden or 10, lanes or 100)
        case "copy_memory":
            return _copy_memory(lstm, hidden or 16, lanes or 20)
        case "adding":
            return _adding(lstm, hidden or 16, lanes or 50)
        case "lag":
            return _lag(lstm, hidden or 16, lanes or 64)
        case "influence_balancing":
            return _influence_balancing()
        case "char_lm":
            return _char_lm(lstm, hidden or 64, lanes or 32, longest, files)
    return _forecast(lstm, hidden or 32, lanes or 16, longest, files)


def _binary(logits: jax.Array, window: tb.Window) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, window.targets)[..., 0]


def _correct(logits: jax.Array, window: tb.Window) -> jax.Array:
    return ((logits > 0) == (window.targets > 0.5))[..., 0].astype(jnp.float32)


def _lower(name: str, unit: str = "") -> dict[str, str]:
    return {"name": name, "unit": unit, "better": "lower"}


def _both(data: Callable[[jax.Array, int], tb.Window], train: int, test: int, steps: int) -> Callable:
    """``key -> (train, test)`` from ``(key, n) -> streams`` of so many steps."""

    def draw(key: jax.Array) -> tuple[tb.Window, tb.Window]:
        launch.check_fits(f"{train:,} streams of {steps} steps", 8 * train * steps, "--lanes")
        keys = jax.random.split(key)
        return data(keys[0], train), data(keys[1], test)

    return draw


def _first_bit(lstm: Callable, hidden: int, lanes: int, steps: int = 20) -> Task:
    def exact(carried: bool, window: int) -> float | None:
        if carried:
            return first_bit_floor(1).accuracy
        return first_bit_floor(-(-steps // window)).accuracy

    return Task(
        about=f"Sequences of {steps} steps begin with a one or a zero, all else is zero, and the label is that first value. Cut into "
        "windows that each begin anew, only the first window of a sequence has seen it, and the others can but guess: of n "
        "windows the best accuracy is (n + 1) / 2n. With the state carried, every window knows.",
        data=_both(lambda key, n: tb.tasks.first_bit(key, n, steps), 1000, 200, steps),
        shared=False,
        steps=steps,
        lanes=lanes,
        model=lstm(hidden, readout=nn.Dense(1)),
        loss=_binary,
        score=_correct,
        metric={"name": "test accuracy", "unit": "", "better": "higher"},
        last=True,
        exact=exact,
    )


def _copy_memory(lstm: Callable, hidden: int, lanes: int, silence: int = 28, symbols: int = 2) -> Task:
    loss = optax.softmax_cross_entropy_with_integer_labels
    steps = silence + 2
    return Task(
        about=f"A symbol is shown, and asked for again after {silence} steps of silence. A window without the past knows it only if "
        "it spans both.",
        data=_both(lambda key, n: copy_memory(key, n, silence, symbols, 1), 100 * lanes, 400, steps),
        shared=False,
        steps=steps,
        lanes=lanes,
        model=lstm(hidden, readout=nn.Dense(symbols + 1)),
        loss=lambda logits, window: loss(logits, window.targets),
        score=lambda logits, window: loss(logits, window.targets),
        metric=_lower("loss of a recalled symbol", "nats"),
        exact=lambda carried, window: 0.0 if carried else copy_memory_floor(window, silence, symbols, 1).recalled,
    )


def _adding(lstm: Callable, hidden: int, lanes: int, steps: int = 40) -> Task:
    def error(outputs: jax.Array, window: tb.Window) -> jax.Array:
        return ((outputs - window.targets) ** 2)[..., 0]

    return Task(
        about=f"Of {steps} numbers two are marked, one in each half, and their sum is asked for at the end. Guessing the mean has a "
        "squared error of 1/6.",
        data=_both(lambda key, n: adding(key, n, steps), 40 * lanes, 400, steps),
        shared=False,
        steps=steps,
        lanes=lanes,
        model=lstm(hidden, readout=nn.Dense(1)),
        loss=error,
        score=error,
        metric=_lower("squared error of the sum"),
        exact=lambda carried, window: 0.0 if carried else adding_floor((steps - 1) % window + 1, steps),
    )


def _lag(lstm: Callable, hidden: int, lanes: int, steps: int = 2000) -> Task:
    return Task(
        about="A coin is loaded by what another coin showed 3 and 8 steps ago. A window without the past cannot know it for its "
        "first steps; with the state carried, even a window shorter than the lag may, for what it remembers need not be what "
        "its gradient saw.",
        data=_both(lambda key, n: lag(key, n, steps), lanes, lanes, steps),
        shared=False,
        steps=steps,
        lanes=lanes,
        model=lstm(hidden, readout=nn.Dense(1)),
        loss=_binary,
        score=_binary,
        metric=_lower("test loss", "nats a step"),
        exact=lambda carried, window: lag_floor() if carried else lag_floor(window) if steps % window == 0 else None,
    )


def _influence_balancing(steps: int = 1000) -> Task:
    def error(s: jax.Array, window: tb.Window) -> jax.Array:
        return (s - window.targets) ** 2 / 2

    return Task(
        about="One parameter pulls the output one way at once and the other way, harder, later. A gradient that looks back too few "
        "steps has the wrong sign and drives the parameter off.",
        data=lambda key: (influence_balancing(steps), influence_balancing(steps)),
        shared=True,
        steps=steps,
        lanes=1,
        model=influence_balancing_model(),
        loss=error,
        score=error,
        metric=_lower("loss"),
        free=True,
    )


def _char_lm(lstm: Callable, hidden: int, lanes: int, longest: int, files: Files) -> Task:
    corpus = text.encode(text.read(files.text), lanes, longest)
    train = tb.lanes(corpus.train[:-1], corpus.train[1:], lanes=lanes)
    test = tb.lanes(corpus.held_out[:-1], corpus.held_out[1:], lanes=1)
    symbols = len(corpus.characters)
    return Task(
        about=f"A text of {len(corpus.train):,} characters, each to be told from those before it; scored on {len(corpus.held_out):,} held out.",
        data=lambda key: (train, test),
        shared=True,
        steps=train.inputs.shape[1],
        lanes=lanes,
        model=lstm(hidden, encoder=nn.Embed(symbols, hidden), readout=nn.Dense(symbols)),
        loss=text.loss,
        score=lambda logits, window: text.loss(logits, window) / math.log(2),
        metric=_lower("held-out bits per character"),
    )


def _forecast(lstm: Callable, hidden: int, lanes: int, longest: int, files: Files) -> Task:
    if (files.train is None) != (files.test is None) or (files.train is None) != (not files.targets):
        raise ValueError("--task=forecast needs --train=FILE, --test=FILE and --targets=COLUMN,…, or none of them.")
    if both := sorted(set(files.inputs) & set(files.targets)):
        raise ValueError(
            f"{both} are among --inputs and --targets: a target cannot be told from itself. Leave --inputs out."
        )
    if files.train is None:
        data = series.generated()
    else:
        data = series.read({"train": files.train, "test": str(files.test)}, *files[3:])
        if np.isnan(data["test"].targets).all():
            raise ValueError(f"{files.test} has no target that is there: there is nothing to score.")
    scaled, _ = series.standardised(data)
    (x, x_targets), (y, y_targets) = scaled["train"], scaled["test"]
    if len(x) < lanes * longest:
        raise ValueError(
            f"{files.train or 'The series'} has {len(x)} steps; {lanes} lanes with windows of {longest} need at least "
            f"{lanes * longest}. Give a longer file, or fewer --lanes or shorter --windows."
        )
    train, test = series.lanes(x, x_targets, lanes), series.lanes(y, y_targets, 1)
    return Task(
        about=f"A time series of {len(x):,} steps, its targets told from what was read so far; scored on {len(y):,} others.",
        data=lambda key: (train, test),
        shared=True,
        steps=train.inputs.shape[1],
        lanes=lanes,
        model=lstm(hidden, readout=nn.Dense(x_targets.shape[1])),
        loss=series.loss,
        score=series.loss,
        metric=_lower("squared error on the test file, standardised"),
        free=True,
    )
