"""The library's tasks, with an LSTM: their data and what theory says of it are those of :mod:`tbptt_jax.tasks`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import tbptt_jax as tb
from tbptt_jax.study.process.machine import check_fits
from tbptt_jax.study.task import Figure, Task
from tbptt_jax.tasks import copy_memory_floor
from tbptt_jax.tasks.first_bit import first_bit_floor, score_last


def binary(logits: jax.Array, window: tb.Window) -> jax.Array:
    """Binary cross-entropy, ``[lanes, time]``."""
    return optax.sigmoid_binary_cross_entropy(logits, window.targets)[..., 0]


def correct(logits: jax.Array, window: tb.Window) -> jax.Array:
    """Whether a binary prediction is right, ``[lanes, time]``."""
    return ((logits > 0) == (window.targets > 0.5))[..., 0].astype(jnp.float32)


def squared(outputs: jax.Array, window: tb.Window) -> jax.Array:
    """Squared error, ``[lanes, time]``."""
    return ((outputs - window.targets) ** 2)[..., 0]


def symbols(logits: jax.Array, window: tb.Window) -> jax.Array:
    """Cross-entropy of symbols, ``[lanes, time]``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, window.targets)


def _drawn(make: Callable[..., tb.Window], n: int, steps: int, *numbers: int) -> Callable[[jax.Array], tb.Window]:
    """Streams ``make(key, n, *numbers)``, of so many steps."""

    def draw(key: jax.Array) -> tb.Window:
        check_fits(f"{n:,} streams of {steps} steps", 8 * n * steps, "--lanes")
        return make(key, n, *(numbers or (steps,)))

    return draw


def first_bit(hidden: int = 10, lanes: int = 100, steps: int = 20, implementation: Any = None) -> Task:
    """Sequences that begin with the bit that is their label."""

    def exact(carried: bool, window: int) -> float:
        return first_bit_floor(1 if carried else -(-steps // window)).accuracy

    return Task(
        model=tb.lstm(hidden, readout=nn.Dense(1), implementation=implementation),
        loss=binary,
        train=_drawn(tb.tasks.first_bit, 1000, steps),
        test=_drawn(tb.tasks.first_bit, 200, steps),
        lanes=lanes,
        figures=(Figure("test accuracy", correct, better="higher"),),
        name="first_bit",
        about=f"Sequences of {steps} steps begin with a one or a zero, all else is zero, and the label is that first value. Cut into "
        "windows that each begin anew, only the first window of a sequence has seen it, and the others can but guess: of n "
        "windows the best accuracy is (n + 1) / 2n. With the state carried, every window knows.",
        exact=exact,
        cut=lambda streams, length, lanes: score_last(tb.split(streams, length, lanes=lanes)),
    )


def copy_memory(
    hidden: int = 16, lanes: int = 20, silence: int = 28, alphabet: int = 2, implementation: Any = None
) -> Task:
    """A symbol that is asked for again after a silence."""

    return Task(
        model=tb.lstm(hidden, readout=nn.Dense(alphabet + 1), implementation=implementation),
        loss=symbols,
        train=_drawn(tb.tasks.copy_memory, 100 * lanes, silence + 2, silence, alphabet, 1),
        test=_drawn(tb.tasks.copy_memory, 400, silence + 2, silence, alphabet, 1),
        lanes=lanes,
        figures=(Figure("loss of a recalled symbol", symbols, "nats"),),
        name="copy_memory",
        about=f"A symbol is shown, and asked for again after {silence} steps of silence. A window without the past knows it only if "
        "it spans both.",
        exact=lambda carried, window: 0.0 if carried else copy_memory_floor(window, silence, alphabet, 1).recalled,
    )


def adding(hidden: int = 16, lanes: int = 50, steps: int = 40, implementation: Any = None) -> Task:
    """The sum of two marked numbers."""

    return Task(
        model=tb.lstm(hidden, readout=nn.Dense(1), implementation=implementation),
        loss=squared,
        train=_drawn(tb.tasks.adding, 40 * lanes, steps),
        test=_drawn(tb.tasks.adding, 400, steps),
        lanes=lanes,
        figures=(Figure("squared error of the sum", squared),),
        name="adding",
        about=f"Of {steps} numbers two are marked, one in each half, and their sum is asked for at the end. Guessing the mean has a "
        "squared error of 1/6.",
        exact=lambda carried, window: 0.0 if carried else tb.tasks.adding_floor((steps - 1) % window + 1, steps),
    )


def lag(hidden: int = 16, lanes: int = 64, steps: int = 2000, implementation: Any = None) -> Task:
    """A coin that is loaded by what another showed 3 and 8 steps ago."""

    def exact(carried: bool, window: int) -> float | None:
        return tb.tasks.lag_floor() if carried else tb.tasks.lag_floor(window) if steps % window == 0 else None

    return Task(
        model=tb.lstm(hidden, readout=nn.Dense(1), implementation=implementation),
        loss=binary,
        train=_drawn(tb.tasks.lag, lanes, steps),
        test=_drawn(tb.tasks.lag, lanes, steps),
        lanes=lanes,
        figures=(Figure("test loss", binary, "nats a step"),),
        name="lag",
        about="A coin is loaded by what another coin showed 3 and 8 steps ago. A window without the past cannot know it for its "
        "first steps; with the state carried, even a window shorter than the lag may, for what it remembers need not be what "
        "its gradient saw.",
        exact=exact,
    )


def influence_balancing(steps: int = 1000) -> Task:
    """One parameter whose influence has one sign at once and the other later."""

    def error(s: jax.Array, window: tb.Window) -> jax.Array:
        return (s - window.targets) ** 2 / 2

    stream = tb.tasks.influence_balancing(steps)
    return Task(
        model=tb.tasks.influence_balancing_model(),
        loss=error,
        train=stream,
        test=stream,
        figures=(Figure("loss", error),),
        name="influence_balancing",
        about="One parameter pulls the output one way at once and the other way, harder, later. A gradient that looks back too few "
        "steps has the wrong sign and drives the parameter off.",
        free=True,
    )
