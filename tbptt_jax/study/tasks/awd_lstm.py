"""AWD-LSTM (Merity, Keskar & Socher 2018, *Regularizing and optimizing LSTM language models*): a language model of a small text.

Each part of the recipe is an argument, and 0 or False leaves it out. What is not of the model is the optimiser's: a norm that is
clipped, the rate of a window by its length, and the averaging that :func:`tbptt_jax.study.asgd` begins.
"""

import functools
import math
import os
import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tbptt_jax as tb
from tbptt_jax.arrays import on_host
from tbptt_jax.cells.layers import dropped
from tbptt_jax.files import Path, read_text
from tbptt_jax.noise import Keys
from tbptt_jax.study.task import Figure, Task

WORD = re.compile(r"\w+|[^\w\s]|\n+")
UNITS = "words", "characters"


def awd_lstm(
    text: Path | Sequence[Path] = (),
    unit: str = "words",
    most: int | None = 25_000,
    held_out: float = 0.2,
    least: int = 3,
    hidden: int = 128,
    layers: int = 1,
    lanes: int = 16,
    embedding_dropout: float = 0.1,
    input_dropout: float = 0.4,
    dropout: float = 0.25,
    output_dropout: float = 0.4,
    weight_drop: float = 0.5,
    alpha: float = 2.0,
    beta: float = 1.0,
    tied: bool = True,
    random_lengths: bool = True,
    readings: int = 40,
) -> Task:
    """An LSTM that predicts each word of a text from those before it, regularised as AWD-LSTM is.

    The text is split into a training part, a validation part that chooses the parameters, and a test part, in this order. All
    noise is drawn once a window and lane, but for the recurrent weights that are dropped, which all lanes share.

    Args:
      text: a file, or several, one after another; none: the reference manual that ships inside Python.
      unit: ``"words"``, also signs and ends of lines, or ``"characters"``.
      most: of these, that are read from the text's beginning. None: all.
      held_out: the part of them for validation, and the part for test.
      least: times that a symbol occurs in the training part; those that are rarer count as one.
      hidden: units of a layer, and of an embedding.
      layers: of the LSTM.
      lanes: places of the text that are read side by side.
      embedding_dropout: the part of the vocabulary that a window does not see, each of its words nowhere in a lane.
      input_dropout: of the embeddings' units that are left out.
      dropout: likewise between layers.
      output_dropout: likewise of the last layer's outputs.
      weight_drop: the part of the recurrent weights that is left out.
      alpha: of activation regularisation (AR), as :func:`tbptt_jax.activation_penalty` has it.
      beta: of its temporal form (TAR).
      tied: the readout's weights are those of the embedding (Inan et al. 2017; Press & Wolf 2017).
      random_lengths: windows of lengths that are drawn around the one asked for, and padded to the longest. Scale the
        learning rate with :func:`tbptt_jax.schedules.scale_by_length`.
      readings: of the text, each cut at other places, after which they are read again; one epoch of a fit is all of them.

    Raises:
      ValueError: if an argument is not as described, or the text is too short or cannot be read.
    """
    if unit not in UNITS:
        raise ValueError(f"`unit` is {unit!r}; it needs to be 'words' or 'characters'.")
    if not 0 < held_out < 0.5:
        raise ValueError(f"`held_out` is {held_out}; it is a part of the text for each of two, between 0 and 0.5.")
    files = [text] if isinstance(text, str | os.PathLike) else text
    symbols = _symbols(tuple(os.fspath(file) for file in files), unit)[:most]
    parts = [round(len(symbols) * share) for share in (1 - 2 * held_out, 1 - held_out)]
    if min(parts[0] // lanes, parts[1] - parts[0], len(symbols) - parts[1]) < 2:
        raise ValueError(
            f"The text has {len(symbols)} {unit}, too few for {lanes} lanes and two held-out parts: give a longer text, or "
            "fewer lanes."
        )
    vocabulary = ["�", *sorted(s for s, n in Counter(symbols[: parts[0]]).items() if n >= least and s != "�")]
    numbers = {symbol: number for number, symbol in enumerate(vocabulary)}
    train, valid, test = np.split(np.array([numbers.get(s, 0) for s in symbols], np.int32), parts)
    lstm = language_model(
        len(vocabulary), hidden, layers, embedding_dropout, input_dropout, dropout, output_dropout, weight_drop, tied
    )
    penalty = tb.activation_penalty(alpha, beta)

    def cross_entropy(outputs: Any, window: tb.Window) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(outputs["outputs"]["logits"], window.targets)

    task = Task(
        model=tb.with_activations(lstm, hidden, of=lambda y: y["h"], dropped=lambda y: y["dropped"]),
        loss=lambda outputs, window: cross_entropy(outputs, window) + penalty(outputs, window),
        train=tb.lanes(train[:-1], train[1:], lanes=lanes),
        valid=(valid[:-1], valid[1:]),
        test=(test[:-1], test[1:]),
        lanes=lanes,
        figures=(Figure(f"bits per {unit[:-1]}", lambda *of: cross_entropy(*of) / math.log(2), "bits"),),
        name="awd_lstm",
        about=f"A text, each {unit[:-1]} predicted from those before it; scored on its end, which is held out.",
        codec={"unit": unit, "vocabulary": vocabulary},
    )
    return task._replace(cut=functools.partial(cut_at_random, readings=readings)) if random_lengths else task


def language_model(
    symbols: int,
    hidden: int,
    layers: int = 1,
    embedding_dropout: float = 0.0,
    input_dropout: float = 0.0,
    dropout: float = 0.0,
    output_dropout: float = 0.0,
    weight_drop: float = 0.0,
    tied: bool = True,
) -> tb.Recurrence:
    """The model: ``params["embedding"]`` is the one array of all words where it is tied, else ``params["decoder"]`` another.

    Its outputs are ``{"logits": [lanes, time, symbols], "h": [lanes, time, hidden], "dropped": likewise}``, of the last layer
    before and after dropout. The arguments are those of :func:`awd_lstm`.
    """

    def init(key: jax.Array, inputs: Any) -> dict[str, Any]:
        into, out = (0.1 * jax.random.uniform(k, (symbols, hidden), minval=-1) for k in jax.random.split(key))
        return {"embedding": into, "bias": jnp.zeros(symbols), **({} if tied else {"decoder": out})}

    def encoder(params: Any, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return embed(params["embedding"], tokens, embedding_dropout, key)

    def readout(params: Any, h: jax.Array, key: jax.Array | None = None) -> dict[str, jax.Array]:
        left = dropped(h, output_dropout, Keys(key, key), "window")
        logits = left @ params["embedding" if tied else "decoder"].T + params["bias"]
        return {"logits": logits, "h": h, "dropped": left}

    return tb.lstm(
        hidden,
        layers=layers,
        encoder=encoder,
        readout=readout,
        init=init,
        input_dropout=input_dropout,
        dropout=dropout,
        weight_drop=weight_drop,
    )


def embed(table: jax.Array, tokens: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """The rows ``[lanes, time, units]`` of the tokens, with dropout of whole tokens: one that is dropped is 0 wherever it stands in a lane.

    Whether it is, is drawn from the lane's key and the token's number, so that no mask of the vocabulary is made.

    Args:
      table: ``[symbols, units]``.
      tokens: ``[lanes, time]`` int.
      rate: the part that is dropped.
      key: ``[lanes]``, or None: nothing is dropped.

    Reference: Gal & Ghahramani 2016, *A theoretically grounded application of dropout in recurrent neural networks*, section 4.2.
    """
    rows = table[tokens]
    if key is None or not rate:
        return rows
    of_tokens = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key, tokens)
    kept = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate)))(of_tokens)
    return jnp.where(kept[..., None], rows / (1 - rate), 0)


def cut_at_random(window: tb.Window, length: int, lanes: int, *, readings: int = 1) -> tb.Window:
    """Windows ``[windows, lanes, longest, ...]`` of lengths around ``length``, as a :class:`Task` cuts: several readings of the lanes, each
    cut at other places.

    The lengths are normal, with the paper's deviation of a fourteenth, or around half of that once in 20 windows.

    Raises:
      ValueError: if ``lanes`` is not how many the window has, or the length not as from :func:`tbptt_jax.schedules.random_length`.
    """
    there, time = np.shape(window.targets)[:2]
    if lanes != there:
        raise ValueError(f"`lanes` is {lanes}, and the text is laid into {there}: give the task lanes={lanes} instead.")
    draw: Callable = tb.schedules.random_length(length, deviation=length / 14, least=max(1, length // 14))
    with jax.ensure_compile_time_eval():  # a sweep cuts inside its program
        cuts = [draw(jax.random.key(reading), time) for reading in range(readings)]
    longest = max(int(cut.lengths.max()) for cut in cuts)
    windows = [part for cut in cuts for part in tb.schedules.cut(window, cut, unit=longest)]
    stack = np.stack if on_host(window.inputs) else jnp.stack
    return jax.tree.map(lambda *parts: stack(parts), *windows)


@functools.lru_cache(maxsize=1)
def _symbols(files: tuple[str, ...], unit: str) -> list[str]:
    topics = pydoc_data.topics.topics
    text = "\n".join([read_text(file) for file in files] or [topics[name] for name in sorted(topics)])
    return WORD.findall(text) if unit == "words" else list(text)
