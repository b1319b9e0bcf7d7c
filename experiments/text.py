"""A text as numbers of its characters: files of people's own, or the reference manual that ships inside Python."""

import pydoc_data.topics
from typing import NamedTuple

import jax
import numpy as np
import optax

import tbptt_jax as tb
from tbptt_jax.files import read_text

HELD_OUT = 0.1


class Text(NamedTuple):
    """Attributes:
    characters: the vocabulary. Number 0 stands for any character that the training part does not have.
    train: ids ``[time]`` int32.
    held_out: ids of the text's last tenth.
    """

    characters: list[str]
    train: np.ndarray
    held_out: np.ndarray


def read(files: list[str]) -> str:
    """The text of the files, one after another, or the default text.

    Raises:
      ValueError: if a file cannot be read, is empty or in an encoding that :func:`tbptt_jax.files.read_text` does not know.
    """
    if not files:
        return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    parts = []
    for file in files:
        try:
            parts.append(read_text(file))
        except ValueError as error:
            raise ValueError(f"--text={error}") from error
        if not parts[-1]:
            raise ValueError(f"--text={file} is empty: give a file with text in it.")
    return "\n".join(parts)


def encode(text: str, lanes: int, window: int) -> Text:
    """Splits off the last tenth and numbers the characters.

    Raises:
      ValueError: if the training part has less than one window for each lane, or the rest less than two characters.
    """
    cut = round(len(text) * (1 - HELD_OUT))
    if cut - 1 < lanes * window or len(text) - cut < 2:
        raise ValueError(
            f"The text has {len(text)} characters, of which {cut} are for training; {lanes} lanes with windows of {window} "
            f"need more than {lanes * window}. Give a longer text, or fewer --lanes or a shorter --window."
        )
    characters = sorted(set(text[:cut]))
    number = {character: i for i, character in enumerate(characters, 1)}
    ids = np.asarray([number.get(character, 0) for character in text], np.int32)
    return Text(["�", *characters], ids[:cut], ids[cut:])


def loss(logits: jax.Array, window: tb.Window) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, window.targets)
