"""Text: a language model of characters or bytes, documents that do not run into each other, prompting.

``codec`` is ``{"unit": "characters", "vocabulary": [...]}`` or ``{"unit": "bytes"}``. Of characters, number 0 stands for any that
the vocabulary does not have.
"""

import functools
import math
import pydoc_data.topics
import warnings
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tbptt_jax as tb
from tbptt_jax.files import read_text
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.study.task import Figure, Task

HELD_OUT = 0.1
UNKNOWN = "�"


def loss(logits: jax.Array, window: tb.Window) -> jax.Array:
    """Cross-entropy of the next symbol in nats, ``[lanes, time]``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, window.targets.astype(jnp.int32))


def bits(logits: jax.Array, window: tb.Window) -> jax.Array:
    """The same in bits."""
    return loss(logits, window) / math.log(2)


def char_lm(
    text: str | Sequence[str] = (),
    documents: str | None = None,
    unit: str = "characters",
    hidden: int = 128,
    layers: int = 1,
    lanes: int = 32,
    codec: dict[str, Any] | None = None,
    implementation: Any = None,
) -> Task:
    """An LSTM that predicts each symbol of a text from those before it; the last tenth is held out.

    Args:
      text: a file, or several; none: the reference manual that ships inside Python.
      documents: what is a document, begun anew and predicted from itself alone: ``"files"``, each file; ``"lines"``, each
        line; or a text that stands between two. None: each file if there are several, else all is one.
      unit: ``"characters"``, or ``"bytes"`` of UTF-8, of any language.
      hidden: units of a layer.
      layers: of the LSTM.
      lanes: places of the text, or documents, read side by side.
      codec: of a run to go on from, whose vocabulary other texts are read with.
      implementation: of :func:`tbptt_jax.lstm`.

    Raises:
      ValueError: if a file cannot be read, is empty, or too short for the lanes.
    """
    files = [text] if isinstance(text, str) else list(text)
    if unit not in ("characters", "bytes"):
        raise ValueError(f"`unit` is {unit!r}; it needs to be 'characters' or 'bytes'.")
    if codec is not None and codec["unit"] != unit:
        unit = codec["unit"]
    corpus = functools.lru_cache(maxsize=1)(lambda: _corpus(files, documents, unit, codec))
    codec = {"unit": "bytes"} if unit == "bytes" else codec or {"unit": unit, "vocabulary": corpus()[1]}
    size = symbols(codec)

    def train() -> Any:
        return _streams(corpus()[0][0], lanes)

    def held_out() -> Any:
        return _streams(corpus()[0][1], None)

    one = "byte" if unit == "bytes" else "character"
    return Task(
        model=tb.lstm(
            hidden, layers=layers, encoder=nn.Embed(size, hidden), readout=nn.Dense(size), implementation=implementation
        ),
        loss=loss,
        train=train,
        test=held_out,
        lanes=lanes,
        figures=(Figure(f"bits per {one}", bits, "bits"),),
        name="char_lm",
        about=f"A text, each {one} predicted from those before it; scored on its last tenth, which is held out.",
        codec=codec,
    )


def symbols(codec: dict[str, Any]) -> int:
    """How many there are."""
    return 256 if codec["unit"] == "bytes" else len(codec["vocabulary"])


def encode(text: str, codec: dict[str, Any]) -> np.ndarray:
    """The numbers of a text's symbols, ``[time]``: int32, of bytes uint8."""
    if codec["unit"] == "bytes":
        return np.frombuffer(text.encode(), np.uint8)
    numbers = {character: i for i, character in enumerate(codec["vocabulary"]) if i}
    return np.asarray([numbers.get(character, 0) for character in text], np.int32)


def decode(ids: np.ndarray, codec: dict[str, Any]) -> str:
    """The text of symbols ``[time]``; bytes that are no UTF-8 become "�"."""
    if codec["unit"] == "bytes":
        return np.asarray(ids, np.uint8).tobytes().decode(errors="replace")
    return "".join(codec["vocabulary"][int(i)] for i in ids)


def documents_of(files: list[str], documents: str | None) -> list[str]:
    """The documents of the files; one, if all is read on.

    Raises:
      ValueError: if a file cannot be read or is empty, or there is no document of two characters.
    """
    if not files:
        texts = ["\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))]
    else:
        texts = [_read(file) for file in files]
    if documents is None or documents == "files":
        return texts
    if documents == "":
        raise ValueError("`documents` is empty: give 'files', 'lines', or the text that stands between two documents.")
    parts = [part for each in texts for part in (each.splitlines() if documents == "lines" else each.split(documents))]
    found = [part for part in parts if len(part) > 1]  # of one character there is nothing to predict
    if not found:
        raise ValueError(f"`documents` is {documents!r}, by which no document has two characters.")
    return found


def _read(file: str) -> str:
    try:
        text = read_text(file)
    except ValueError as error:
        raise ValueError(f"--text={error}") from error
    if not text:
        raise ValueError(f"--text={file} is empty: give a file with text in it.")
    return text


def _corpus(
    files: list[str], documents: str | None, unit: str, codec: dict[str, Any] | None
) -> tuple[tuple[list[np.ndarray], list[np.ndarray]], list[str]]:
    """The numbers of the documents to train on and of those held out, and the vocabulary of the former."""
    texts = documents_of(files, documents)
    if len(texts) == 1:
        place = round(len(texts[0]) * (1 - HELD_OUT))
        train, held_out = [texts[0][:place]], [texts[0][place:]]
    else:
        ends = np.cumsum([len(text) for text in texts])
        first = min(len(texts) - 1, max(1, int(np.searchsorted(ends, ends[-1] * (1 - HELD_OUT)))))
        train, held_out = texts[:first], texts[first:]
    if min(max(map(len, train)), max(map(len, held_out))) < 2:
        raise ValueError(
            f"The text has {sum(map(len, texts))} characters in {len(texts)} documents, and its last tenth is held out: two "
            "characters are needed on either side. Give a longer text."
        )
    vocabulary = (
        codec["vocabulary"]
        if codec and unit != "bytes"
        else [UNKNOWN, *sorted(set().union(*map(set, train)) - {UNKNOWN})]
    )
    own = {"unit": unit, "vocabulary": vocabulary}
    parts = [encode(text, own) for text in train], [encode(text, own) for text in held_out]
    if codec and unit != "bytes":
        unknown = float(np.mean(np.concatenate(parts[0]) == 0))
        if unknown > 0.01:
            warnings.warn(
                f"{unknown:.0%} of the text's characters are not in the vocabulary that it is read with.", stacklevel=2
            )
    return parts, vocabulary


def _streams(documents: list[np.ndarray], lanes: int | None) -> Any:
    """One text as a corpus; documents as lanes, each begun anew, its targets its own next symbols."""
    if len(documents) == 1:
        return documents[0][:-1], documents[0][1:]
    return tb.streams.documents(documents, lanes=lanes or min(len(documents), 32))


def prompt(
    model: Recurrence,
    params: Any,
    codec: dict[str, Any],
    text: str,
    length: int = 400,
    *,
    temperature: float = 1.0,
    seed: int | jax.Array = 0,
) -> str:
    """Reads a text and goes on writing.

    Args:
      model: the language model.
      params: its parameters.
      codec: of its run.
      text: what it reads first, at least one symbol of its vocabulary.
      length: how many symbols it writes.
      temperature: logits are divided by it: below 1 safer, above 1 bolder; 0: always the likeliest.
      seed: of what is drawn, or a key.

    Returns:
      What it wrote, without the prompt.

    Raises:
      ValueError: if the prompt is empty or has a character that the vocabulary does not have, ``length`` is negative or
        ``temperature`` not a number from 0.
    """
    if codec["unit"] != "bytes" and (unknown := sorted(set(text) - set(codec["vocabulary"][1:]))):
        raise ValueError(
            f"The prompt has {', '.join(map(repr, unknown[:5]))}, which the model's training text does not have: leave them out."
        )
    if not text:
        raise ValueError(
            "The prompt is empty: give at least one character for the model to go on from, such as a line's end."
        )
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"`length` is {length!r}; it needs to be a whole number from 0.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"`temperature` is {temperature}; it needs to be a number from 0.")
    key = jax.random.key(seed) if isinstance(seed, int | np.integer) else seed
    ids = encode(text, codec)
    part = 64  # so that prompts of any length take few programs
    carry, logits = model.initial_carry(params, 1), None
    for first in range(0, len(ids), part):
        carry, logits = _continue(model, params, carry, jnp.asarray(ids[None, first : first + part]))
    keys = jax.random.split(key, length)
    never = 0 if codec["unit"] == "bytes" else 1
    written = _write(model, never, params, carry, logits, keys, jnp.float32(temperature), ids.dtype.type(0))
    return decode(np.asarray(written), codec)


@functools.partial(jax.jit, static_argnames="model")
def _continue(model: Recurrence, params: Any, carry: Any, ids: jax.Array) -> tuple[Any, jax.Array]:
    carry, logits = model.unroll(params, carry, ids, None, None)
    return carry, logits[:, -1]


@functools.partial(jax.jit, static_argnames=("model", "never"))
def _write(
    model: Recurrence,
    never: int,
    params: Any,
    carry: Any,
    logits: Any,
    keys: jax.Array,
    temperature: jax.Array,
    like: Any,
) -> jax.Array:
    """Symbols ``[time]``, one for each key; the first ``never`` of the vocabulary are not drawn."""

    def one_step(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        carry, logits = state
        logits = logits.astype(jnp.float32).at[:, :never].set(-jnp.inf)
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        symbol = jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(like.dtype)
        carry, logits = model.unroll(params, carry, symbol[:, None], None, None)
        return (carry, logits[:, 0]), symbol[0]

    return jax.lax.scan(one_step, (carry, logits), keys)[1]
