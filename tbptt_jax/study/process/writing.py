"""What is written for people and their programs: files whole or not at all, text that is safe to show."""

import contextlib
import csv
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax

QUOTED = 80  # characters of a user's text in a sentence
WHITE = "\n\t"
# What moves a terminal's cursor, or turns the direction in which a line is read.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str, at_most: int | None = None, keep: str = "") -> str:
    """A user's text as it is safe to show: control characters, but those to ``keep``, as Python writes them.

    Of a text longer than ``at_most`` characters the middle is left out.
    """
    shown = CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
    if at_most is None or len(shown) <= at_most:
        return shown
    return f"{shown[: at_most // 2]}…{shown[at_most // 2 + 1 - at_most :]}"


def short(text: Any) -> str:
    """A user's text as a sentence quotes it."""
    return plain(str(text), QUOTED)


def cell(text: str) -> str:
    """A user's text as a field of a CSV file, such that no spreadsheet takes it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def csv_text(rows: list[dict[str, Any]], first: Iterable[str] = (), without: Iterable[str] = ()) -> str:
    """A line for each row, with the columns ``first`` and one for each other key of any, but those ``without``.

    A list's numbers are separated by spaces; what is not finite is nan there, and else empty.
    """

    def told(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return " ".join("nan" if y is None or not math.isfinite(y) else str(y) for y in x)
        if isinstance(x, dict | str):
            return cell(x if isinstance(x, str) else json.dumps(x))
        return "" if finite(x) is None else x

    fields = [key for key in dict.fromkeys([*first, *(key for row in rows for key in row)]) if key not in without]
    to = io.StringIO()
    out = csv.writer(to, lineterminator="\n")
    out.writerow(map(cell, fields))
    out.writerows([told(row.get(field)) for field in fields] for row in rows)
    return to.getvalue()


@contextlib.contextmanager
def whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to, which is moved to ``target`` when all is written: nobody sees a half of it."""
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_json(target: pathlib.Path, content: Any) -> None:
    """By the first of several processes, whole or not at all; what is not finite, as of a training that diverged, as null."""
    write_files(target.parent, {target.name: (json.dumps(finite(content), indent=1, allow_nan=False) + "\n").encode()})


def finite(x: Any) -> Any:
    """The same JSON with None for each number that is not finite."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_files(directory: pathlib.Path, files: dict[str, bytes]) -> None:
    """Each whole or not at all, by the first of several processes."""
    for name, content in files.items() if jax.process_index() == 0 else ():
        with whole(directory / name) as path:
            path.write_bytes(content)


def check_own(directory: pathlib.Path, files: dict[str, bytes]) -> None:
    """Raises a ``ValueError`` if a file is there already and holds something else than what is generated here."""
    for name, content in files.items():
        there = directory / name
        if there.exists() and there.read_bytes() != content:
            own = f"{there} is not the series that is generated here, which would take its place"
            raise ValueError(f"{own}: give it as --{there.stem}, or another --workdir.")


def csv_bytes(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    """A CSV file, in which no text is taken for a formula, and what is not a number is blank."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(map(cell, heads))
    writer.writerows([cell(x) if isinstance(x, str) else "" if x != x else x for x in row] for row in rows)
    return text.getvalue().encode()
