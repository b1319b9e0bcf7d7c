"""Influences by name, as flags and results have them."""

import re

import tbptt_jax as tb
from tbptt_jax.study.process.writing import plain, short

INFLUENCES = "Any of truncate, replay:WINDOWS, replay:WINDOWS:SURVIVAL, rtrl, uoro; WINDOWS is a number, or all."
LARGEST = 2**31 - 1  # what counts and axes are numbered with has 32 bits


def influence(name: str, windows: int, flag: str = "influences") -> tb.Influence:
    """The influence that a flag names, for a stream of ``windows`` windows; a ``ValueError`` if it names none."""
    kind, *settings = name.split(":")
    if kind in ("truncate", "rtrl", "uoro") and not settings:
        return {"truncate": tb.truncate, "rtrl": tb.rtrl, "uoro": tb.uoro}[kind]()
    if kind == "replay" and re.fullmatch(r"(all|\d+)(:[\d.]+(e-?\d+)?)?", ":".join(settings)):
        depth, *survival = settings
        try:
            if depth != "all" and (len(depth) > 10 or int(depth) > LARGEST):
                raise ValueError(f"there are never more than {LARGEST} windows.")
            return tb.replay(windows if depth == "all" else int(depth), *map(float, survival))
        except ValueError as error:
            raise ValueError(f"--{flag} has {short(name)}: {plain(str(error), 200)} {INFLUENCES}") from error
    raise ValueError(f"--{flag} has {short(name)}, which is none. {INFLUENCES}")


def check_influences(names: list[str]) -> None:
    """Raises a ``ValueError`` unless each of ``names``, at least one, is an influence's."""
    if not names:
        raise ValueError(f"--influences is empty. {INFLUENCES}")
    for name in names:
        influence(name, 1)
