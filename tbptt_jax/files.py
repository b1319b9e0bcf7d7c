"""Files as people have them: texts in their encodings, tables in their dialects.

What a file says is read, or refused in a sentence; it is never taken for something else. The tables are read by Python's own
``csv``, which refuses a row that is too short or too long and a quote that does not end, where others fill up, cut off or close.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import lzma
import os
import pathlib
import shlex
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tbptt_jax.window import quoted

Path = str | os.PathLike[str]

GAPS = ("", "na", "n/a", "nan", "null", "none")  # in lower case
_MARKS = {  # byte order marks; that of UTF-32 begins as that of UTF-16 does
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PACKED: dict[bytes, tuple[Any, str]] = {
    b"\x1f\x8b": (gzip.decompress, "gunzip -c"),
    b"BZh": (bz2.decompress, "bunzip2 -c"),
    b"\xfd7zXZ\x00": (lzma.decompress, "xz -dc"),
}


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark; plain, or packed by gzip, bzip2 or xz.

    Byte order marks are dropped, and lines end in ``\\n``, however they end in the file.

    Args:
      path: the file.

    Raises:
      ValueError: if the file cannot be read, is broken or is in another encoding, with what converts it.
    """
    with reading(path):
        data = pathlib.Path(path).read_bytes()
    unpack = "cat"
    for magic, (decompress, command) in _PACKED.items():
        if data.startswith(magic):
            try:
                data, unpack = decompress(data), command
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(
                    f"{path} is packed, and broken ({error}): pack it again, or give it unpacked."
                ) from error
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")

    def convert(source: str) -> str:
        return f"Convert it first: `{unpack} {shlex.quote(str(path))} | iconv -f {source} -t UTF-8 > converted`, and give that."

    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise ValueError(
                f"{path} begins as {encoding.upper()} and is not ({error.reason}): write it again."
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1)
        zeros = data.count(b"\0") > len(data) // 10
        of = "UTF-16LE" if zeros else "LATIN1"
        guess = "It may be UTF-16" if zeros else "It may be Latin-1, as older programs write"
        raise ValueError(
            f"{path} is not UTF-8: line {line}, byte {column + 1} of it, is 0x{data[error.start]:02x}. {guess}. {convert(of)}"
        ) from error
    if text.count("\0") > len(text) // 10:
        raise ValueError(f"{path} is UTF-16 without a byte order mark, it seems: it holds zeros. {convert('UTF-16LE')}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_csv(path: Path, columns: Sequence[str], *, missing: Sequence[str] | None = None) -> np.ndarray:
    """Columns of a CSV file whose first line names them.

    Fields are separated by commas, semicolons, tabs or bars, whichever separates the header so that it has the columns. Where
    that is no comma, decimal commas are read. Lines that begin with ``#`` are comments. Encodings and packing are those of
    :func:`read_text`.

    Args:
      path: the file.
      columns: their names, without spaces around them.
      missing: what stands for a number that is not there, besides a blank field, NA, N/A, NaN, null and None: texts, or
        numbers such as ``"-9999"``. None: a gap is refused.

    Returns:
      ``[time, len(columns)]`` float64, in memory, in the order of ``columns``; NaN where a number is missing.

    Raises:
      ValueError: with file, line and column, if the file cannot be read, is not text or not CSV, has no rows or not
        these columns, a row has not the header's number of fields, a field is not a finite number, or commas and points are
        both in the numbers.
    """
    text, columns = read_text(path), [name.strip() for name in columns]
    numbers = [
        n for n, line in enumerate(text.split("\n"), 1) if not line.startswith("#")
    ]  # of the lines that are read
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    if lines[:1] and lines[0].lower().startswith("sep="):  # what a spreadsheet writes to say how it separates
        numbers, lines = numbers[1:], lines[1:]
    if not lines or not lines[0].strip():
        raise ValueError(f"{path}, line 1: there is nothing; it needs to name the columns, and each row to be a step.")
    rows = csv.reader(
        (f"{line}\n" for line in lines), delimiter=_separator(path, lines, columns), skipinitialspace=True, strict=True
    )
    try:
        header = [name.strip() for name in next(rows)]
        places = [header.index(name) for name in columns]
        _check_comments(path, text, rows.dialect.delimiter, len(header), places)
        fields: list[list[str]] = []
        at: list[int] = []
        blank: list[int] = []
        for row in rows:
            line = numbers[min(rows.line_num, len(numbers)) - 1]
            if not row:  # at the end of a file it is nothing; before a row it may be a step that is missing
                blank.append(line)
                continue
            if len(header) == 1 and missing is not None:  # a blank field is all of its line
                fields.extend([""] for _ in blank)
                at.extend(blank)
                blank = []
            if blank or len(row) != len(header):
                line, has = (blank[0], 0) if blank else (line, len(row))
                raise ValueError(f"{path}, line {line}: the row has {has} fields, and the header {len(header)}.")
            fields.append([row[place].strip() for place in places])
            at.append(line)
    except csv.Error as error:
        line = numbers[min(rows.line_num, len(numbers)) - 1]
        raise ValueError(f"{path}, line {line}: this is not CSV ({error}).") from error
    if not fields:
        raise ValueError(f"{path} has a header and no rows: give a file with at least one step.")
    return _numbers(path, fields, at, columns, rows.dialect.delimiter != ",", missing)


def _check_comments(path: Path, text: str, separator: str, fields: int, places: list[int]) -> None:
    """Raises a ``ValueError`` for a comment that could be a row."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("#"):
            row = line.split(separator)
            if len(row) == fields and all(_number(row[place]) is not None for place in places if place):
                raise ValueError(
                    f"{path}, line {number}: {quoted(line)} begins as a comment and could be a row: quote its first field, or "
                    "write the comment in another way."
                )


def _separator(path: Path, lines: list[str], columns: Sequence[str]) -> str:
    """What separates the header's names so that the columns are among them."""
    found = {}
    for separator in ",;\t|":
        try:
            header = next(
                csv.reader((f"{line}\n" for line in lines), delimiter=separator, skipinitialspace=True, strict=True)
            )
        except csv.Error:
            continue
        found[separator] = [name.strip() for name in header]
    for separator, header in found.items():
        if all(header.count(name) == 1 for name in columns):
            return separator
    if not found:
        raise ValueError(f"{path}, line 1: this is not CSV.")
    header = max(found.values(), key=len)
    name = next(name for name in columns if header.count(name) != 1)
    shown = ", ".join(quoted(name) for name in header[:20]) + (", …" if len(header) > 20 else "")
    raise ValueError(
        f"{path} has {header.count(name)} columns {quoted(name)}; one is needed. Those there are: {shown}."
    )


def _numbers(
    path: Path,
    fields: list[list[str]],
    at: list[int],
    columns: Sequence[str],
    commas: bool,
    missing: Sequence[str] | None,
) -> np.ndarray:
    gaps = {*GAPS, *(text.strip().lower() for text in missing)} if missing is not None else set()
    sentinels = {float(text) for text in missing or () if _number(text) is not None}
    points = commas and any("." in field and field.lower() not in gaps for row in fields for field in row)
    array = np.empty((len(fields), len(columns)))
    for row, (values, line) in enumerate(zip(fields, at, strict=True)):
        for i, field in enumerate(values):
            if field.lower() in gaps:
                array[row, i] = np.nan
                continue
            where = f"{path}, line {line}, column {quoted(columns[i])}: {quoted(field)}"
            if commas and "," in field:
                if points or field.count(",") > 1:
                    raise ValueError(
                        f"{where} has a comma, and others have points: write numbers one way, without thousands."
                    )
                field = field.replace(",", ".")
            value = _number(field)
            if value is None:
                read = (
                    ""
                    if missing is not None or field.lower() not in GAPS
                    else " If it is a gap, say how gaps are read."
                )
                raise ValueError(f"{where} is not a number.{read}")
            if not np.isfinite(value):
                raise ValueError(f"{where} is not a finite number: fill it in, or drop the row.")
            array[row, i] = np.nan if value in sentinels else value
    return array


def _number(field: str) -> float | None:
    try:
        return None if "_" in field else float(field)  # an underscore is Python's own way of writing thousands
    except ValueError:
        return None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the operating system's errors into sentences."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        if "null" not in str(error):  # a path with a zero in it
            raise
        raise ValueError(f"{quoted(str(path))} cannot be read: {error}.") from error
