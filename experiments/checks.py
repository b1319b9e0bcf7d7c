"""Checks of flags, before anything is computed."""

import math
import re

from absl import flags

from tbptt_jax.study.influences import LARGEST
from tbptt_jax.study.process.writing import short


def check_flags() -> None:
    """Raises a ``ValueError`` if a number is none that can be counted with, or a text is not UTF-8."""
    for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
        value, most = flag.value, 2**63 - 1 if flag.name == "seed" else LARGEST
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{flag.name}={value}: give a finite number.")
        if isinstance(value, int) and not -most <= value <= most:
            raise ValueError(f"--{flag.name}={short(value)}: give a number of at most {most}.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"--{flag.name}={short(text)} is not UTF-8: give it another name.")


def positive_integers(flag: str, values: list[str], at_most: int) -> list[int]:
    """The numbers of a list flag; a ``ValueError`` unless each is from 1 to ``at_most``."""
    for value in values:
        if not re.fullmatch(r"\d{1,18}", value.strip()) or not 1 <= int(value) <= at_most:
            raise ValueError(f"--{flag} has {short(value)!r}: give whole numbers from 1 to {at_most}, as {flag}=1,2,5.")
    if not values:
        raise ValueError(f"--{flag} is empty: give at least one number, such as --{flag}=1,2,5.")
    return sorted({int(value) for value in values})
