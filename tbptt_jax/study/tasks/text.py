"""Text: a language model of characters or bytes, documents that do not run into each other, prompting.

``codec`` is ``{"unit": "characters", "vocabulary": [...]}`` or ``{"unit": "bytes"}``, with ``"end"`` where a text ends each document.
Of characters, number 0 stands for any that the vocabulary does not have.
"""

import functools
import itertools
import math
import os
import pydoc_data.topics
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tbptt_jax as tb
from tbptt_jax.files import Path, is_plain, read_text
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.streams import characters, open_bytes
from tbptt_jax.study.process.console import say
from tbptt_jax.study.process.writing import short
from tbptt_jax.study.task import Figure, Task

UNITS = "characters", "bytes"
SIDE_BY_SIDE = 32  # held-out documents
UNKNOWN = 0.03  # of a text's characters, from which on it is worth a warning
PART = 128  # symbols of a prompt that are read at a time, so that one program reads any


class Corpus(NamedTuple):
    """Documents, symbols ``[time]`` each, int32, of bytes uint8."""

    train: list[np.ndarray]
    held_out: list[np.ndarray]
    vocabulary: list[str] | None  # the characters by their numbers; of bytes None


def char_lm(
    text: Path | Sequence[Path] = (),
    documents: str | None = None,
    unit: str = "characters",
    hidden: int = 128,
    layers: int = 1,
    lanes: int = 32,
    held_out: float = 0.1,
    codec: dict[str, Any] | None = None,
    implementation: Any = None,
) -> Task:
    """An LSTM that predicts each symbol of a text from those before it; the last tenth is held out.

    One text is read as ``lanes`` stretches side by side. Of several documents each begins anew and no target is of another;
    they are laid into the lanes in an order drawn once, and only one that is longer than a lane's share is cut into
    stretches too. Held out are the last whole documents, at least one; or, where that would be far more than asked for, the
    end of the last one.

    Args:
      text: a file, or several; none: the reference manual that ships inside Python.
      documents: what is a document: ``"files"``, each file; ``"lines"``, each line; or a text that ends each, such as
        ``"\\n\\n"`` or ``"<|endoftext|>"``, which stays with the document that it ends, so that the model learns where to
        end. None: each file if there are several, else all is one.
      unit: ``"characters"``, or ``"bytes"``: of any language, and of plain files as they are, mapped and not held in memory
        where there is one document.
      hidden: units of a layer.
      layers: of the LSTM.
      lanes: places of the text, or documents, read side by side.
      held_out: the part of the text that is not trained on.
      codec: of a run to go on from, whose vocabulary other texts are read with. No file is read before data is needed.
      implementation: of :func:`tbptt_jax.lstm`.

    Raises:
      ValueError: if an argument is not as described, a file cannot be read or is empty, or the text is too short; with a
        ``codec`` of files only when data is needed.
    """
    files = [os.fspath(file) for file in ([text] if isinstance(text, str | os.PathLike) else text)]
    if codec is not None:
        check_codec(codec)
        if unit == "bytes" != codec["unit"]:
            raise ValueError("`unit` is 'bytes', and the codec is of characters: leave the unit out, or the codec.")
        unit = codec["unit"]
    if unit not in UNITS:
        raise ValueError(f"`unit` is {unit!r}; it needs to be 'characters' or 'bytes'.")
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out` is {held_out}; it needs to be a number between 0 and 1.")
    end = _end(documents)
    vocabulary: Any = codec and codec.get("vocabulary")
    corpus = functools.lru_cache(maxsize=1)(lambda: read(files, documents, unit, held_out, vocabulary))
    own: dict[str, Any] = {"unit": unit}
    if unit == "characters":
        own["vocabulary"] = list(vocabulary or corpus().vocabulary or ())
    size = symbols(own)

    def train() -> Any:
        parts = corpus().train
        return _pair(parts) if len(parts) == 1 else _laid(parts, lanes)

    def test() -> Any:
        parts = corpus().held_out
        return _pair(parts) if len(parts) == 1 else tb.streams.documents(parts, lanes=SIDE_BY_SIDE)

    one = unit[:-1]
    return Task(
        model=tb.lstm(
            hidden, layers=layers, encoder=nn.Embed(size, hidden), readout=nn.Dense(size), implementation=implementation
        ),
        loss=loss,
        train=train,
        test=test,
        lanes=lanes,
        figures=(Figure(f"bits per {one}", bits, "bits"),),
        name="char_lm",
        about=f"A text, each {one} predicted from those before it; scored on its end, which is held out.",
        codec=own | ({"end": end} if end else {}),
    )


def loss(logits: jax.Array, window: tb.Window) -> jax.Array:
    """Cross-entropy of the next symbol in nats, ``[lanes, time]``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, window.targets.astype(jnp.int32))


def bits(logits: jax.Array, window: tb.Window) -> jax.Array:
    """The same in bits."""
    return loss(logits, window) / math.log(2)


def check_codec(codec: dict[str, Any]) -> None:
    """Raises a ``ValueError`` unless it is one of a text."""
    unit, vocabulary = codec.get("unit"), codec.get("vocabulary")
    single = isinstance(vocabulary, list | tuple) and all(isinstance(c, str) and len(c) == 1 for c in vocabulary)
    if unit not in UNITS or (unit == "characters" and not (single and len(vocabulary or ()) > 1)):
        raise ValueError(
            f"`codec` is {short(repr(codec))}; it needs to be {{'unit': 'bytes'}}, or {{'unit': 'characters', 'vocabulary': "
            "[...]} of single characters, as a run of char_lm keeps it."
        )


def symbols(codec: dict[str, Any]) -> int:
    """How many there are."""
    return 256 if codec["unit"] == "bytes" else len(codec["vocabulary"])


def encode(text: str, codec: dict[str, Any]) -> np.ndarray:
    """The numbers of a text's symbols, ``[time]``: int32, of bytes uint8."""
    if codec["unit"] == "bytes":
        return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
    return characters(text, codec["vocabulary"])[0]


def decode(ids: np.ndarray, codec: dict[str, Any]) -> str:
    """The text of symbols ``[time]``; bytes that are no UTF-8 become "�"."""
    if codec["unit"] == "bytes":
        return np.asarray(ids, np.uint8).tobytes().decode(errors="replace")
    return "".join(codec["vocabulary"][int(i)] for i in ids)


def read(
    files: Sequence[str], documents: str | None = None, unit: str = "characters", held_out: float = 0.1,
    vocabulary: Sequence[str] | None = None,
) -> Corpus:  # fmt: skip
    """The documents of files as numbers; where there are several, it says how many.

    Args:
      files: as :func:`char_lm` takes them, as the others.
      documents: what is a document.
      unit: of what the numbers are.
      held_out: the part that is not trained on.
      vocabulary: to number characters by. None: those of the training part, after the "�" that is number 0.

    Raises:
      ValueError: as from :func:`char_lm`.
    """
    parts = [_contents(file, unit) for file in files] or [_manual(unit)]
    places = _places(parts, _end(documents), documents)
    long = np.diff(places) > 1
    skipped, begins, ends = int((~long).sum()), places[:-1][long], places[1:][long]
    if not len(begins):
        raise ValueError("No document has two symbols, so there is nothing to predict: give a longer text.")
    train, rest = _last(begins, ends, held_out)
    if min((train[1] - train[0]).max(), (rest[1] - rest[0]).max()) < 2:
        has = f"The text has {(ends - begins).sum()} {unit}, and its end is held out"
        raise ValueError(f"{has}: each side needs a document of two. Give a longer text.")
    if unit == "bytes":
        ids, known = parts[0] if len(parts) == 1 else np.concatenate(parts), None
    else:
        text = "".join(parts)
        ids, known = characters(text, vocabulary or characters(text[: train[1][-1]])[1])
    if vocabulary and (unknown := float((ids == 0).mean())) > UNKNOWN:
        warnings.warn(
            f"{unknown:.0%} of the text's characters are not in the vocabulary that it is read with, and all count as one: train "
            "on this text afresh, or on bytes, if that is too many.",
            stacklevel=2,
        )
    first, last = ([ids[b:e] for b, e in zip(*side, strict=True)] for side in (train, rest))
    if len(begins) > 1:
        left = f"; {skipped:,} of less than two symbols are left out" if skipped else ""
        tail = "the end of the last one" if rest[0][0] not in begins else f"{len(rest[0]):,}"
        say(f"{len(begins):,} documents, each begun anew: {len(train[0]):,} to train on, held out {tail}{left}.")
    return Corpus(first, last, known)


def _end(documents: str | None) -> str | None:
    """The text that ends a document."""
    if documents == "":
        raise ValueError("`documents` is empty: give 'files', 'lines', or the text that ends each document.")
    if documents in (None, "files"):
        return None
    return "\n" if documents == "lines" else documents.replace("\\n", "\n").replace("\\t", "\t")


def _manual(unit: str) -> Any:
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return text if unit == "characters" else np.frombuffer(text.encode(), np.uint8)


def _contents(file: str, unit: str) -> Any:
    """The characters of a file, or its bytes ``[time]`` uint8, mapped if they are its text as it stands."""
    try:
        if unit == "bytes" and is_plain(file):
            return open_bytes(file)
        text = read_text(file)
    except ValueError as error:
        raise ValueError(f"--text={error}") from error
    if not text:
        raise ValueError(f"--text={file} is empty: give a file with text in it.")
    return text if unit == "characters" else np.frombuffer(text.encode(), np.uint8)


def _places(parts: list[Any], end: str | None, documents: str | None) -> np.ndarray:
    """Where documents begin in the parts one after another, and at last where they end."""
    places, start, found = [0], 0, False
    for part in parts:
        if end is not None:
            wanted: Any = end if isinstance(part, str) else end.encode()
            whole: Any = part if isinstance(part, str) else memoryview(part)
            inside = [start + match.end() for match in re.finditer(re.escape(wanted), whole)]
            found = found or bool(inside)
            places += inside
        start += len(part)
        if places[-1] != start:
            places.append(start)
    if end is not None and not found and documents != "lines":
        nowhere = f"`documents` is {short(repr(documents))}, which is nowhere in the text"
        raise ValueError(f"{nowhere}: give 'files', 'lines', or the text that ends each document.")
    return np.asarray(places)


def _last(begins: np.ndarray, ends: np.ndarray, part: float) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The documents to train on, and those held out, ``(begins, ends)`` each."""
    read = np.cumsum(ends - begins)
    total, most = int(read[-1]), len(begins) - 1
    first = min(int(np.searchsorted(read, (1 - part) * total - 1e-9 * total)) + 1, most)
    if most and total - read[first - 1] <= 2.5 * part * total:
        return (begins[:first], ends[:first]), (begins[first:], ends[first:])
    place = ends[-1] - (total - round(total * (1 - part)))
    place = min(max(place, begins[-1]), ends[-1])
    return (begins, np.append(ends[:-1], place)), (np.array([place]), ends[-1:])


def _pair(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return documents[0][:-1], documents[0][1:]


def _laid(documents: list[np.ndarray], lanes: int) -> tb.Window:
    """Documents in lanes, in an order drawn once; one that is longer than a lane's share in stretches of equal length."""
    steps = [len(each) - 1 for each in documents]
    share = -(-sum(steps) // lanes)
    stretches = []
    for i in np.random.default_rng(0).permutation(len(documents)):
        places = np.linspace(0, steps[i], -(-steps[i] // share) + 1).round().astype(int)
        stretches += [documents[i][a : b + 1] for a, b in itertools.pairwise(places)]
    return tb.streams.documents(stretches, lanes=lanes)


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
    """Reads a text from the initial carry on, and goes on writing; prompts of any length are read by one program.

    Args:
      model: the language model.
      params: its parameters.
      codec: of its run.
      text: what it reads first, at least one symbol of its vocabulary.
      length: how many symbols it writes at most; it ends with a document, where the codec says what ends one.
      temperature: logits are divided by it: below 1 safer, above 1 bolder; 0: always the likeliest.
      seed: of what is drawn, or a key.

    Returns:
      What it wrote, without the prompt. It never writes number 0 of a vocabulary; bytes that are no UTF-8 are "�".

    Raises:
      ValueError: if the prompt is empty or has a character that the vocabulary does not have, ``length`` is negative,
        ``temperature`` not a number from 0, or what the model returns is not finite.
    """
    check_codec(codec)
    if codec["unit"] != "bytes" and (unknown := sorted(set(text) - set(codec["vocabulary"][1:]))):
        has, them = ", ".join(map(repr, unknown[:5])), "it" if len(unknown) == 1 else "them"
        raise ValueError(f"The prompt has {has}, which the model's training text does not have: leave {them} out.")
    if not text:
        raise ValueError("The prompt is empty: give at least one character for the model to go on from.")
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"`length` is {length!r}; it needs to be a whole number from 0.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"`temperature` is {temperature}; it needs to be a number from 0.")
    key = jax.random.key(seed) if isinstance(seed, int | np.integer) else seed
    ids = encode(text, codec)
    carry, logits = model.initial_carry(params, 1), jnp.zeros(())
    for first in range(0, len(ids), PART):
        part = ids[first : first + PART]
        carry, logits = _read(model, params, carry, np.pad(part, (0, PART - len(part))), len(part))
    if not np.isfinite(logits).all():
        raise ValueError("The model's outputs after the prompt are not finite: its parameters are of no use.")
    never = 0 if codec["unit"] == "bytes" else 1
    keys = jax.random.split(key, length)
    written = _write(model, never, params, carry, logits, keys, jnp.float32(temperature), ids.dtype.type(0))
    told = decode(np.asarray(written), codec)
    end = codec.get("end") or ""
    place = (text + told).find(end, max(0, len(text) - len(end) + 1)) if end else -1
    return told if place < 0 else told[: place + len(end) - len(text)]


@functools.partial(jax.jit, static_argnames="model")
def _read(model: Recurrence, params: Any, carry: Any, ids: Any, length: Any) -> tuple[Any, jax.Array]:
    """The carry and the logits ``[1, symbols]`` after the first ``length`` of ``ids`` ``[PART]``."""
    carry, logits = model.unroll(params, carry, ids[None], None, (jnp.arange(PART) < length)[None])
    return carry, logits[:, length - 1]


@functools.partial(jax.jit, static_argnames=("model", "never"))
def _write(
    model: Recurrence, never: int, params: Any, carry: Any, logits: Any, keys: jax.Array, temperature: jax.Array, like: Any
) -> jax.Array:  # fmt: skip
    """Symbols ``[time]``, one for each key; the first ``never`` of the vocabulary are not drawn."""

    def one_step(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        carry, logits = state
        logits = logits.astype(jnp.float32).at[:, :never].set(-jnp.inf)
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        symbol = jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(like.dtype)
        carry, logits = model.unroll(params, carry, symbol[:, None], None, None)
        return (carry, logits[:, 0]), symbol[0]

    return jax.lax.scan(one_step, (carry, logits), keys)[1]
