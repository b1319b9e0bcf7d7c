"""Files as people have them: texts in their encodings, tables in their dialects.

What a file says is read, or refused in a sentence; it is never taken for something else. The tables are read by Python's own
``csv``, which refuses a row that is too short or too long and a quote that does not end, where others fill up, cut off or close.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import lzma
import math
import os
import pathlib
import re
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tbptt_jax.arrays import quoted

Path = str | os.PathLike[str]

GAPS = frozenset(  # in lower case: what people, pandas and spreadsheets write
    ["", "na", "n/a", "nan", "-nan", "null", "none", "<na>", "#n/a", "#na", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"]
)
SEPARATORS = ",;\t|"
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}")  # a number with decimals, or one with thousands
_SAY = 'say what decimals are written with, decimal="," or decimal="." (of a launch, --decimal)'
_MARKS = {  # byte order marks; that of UTF-32 begins as that of UTF-16 does
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_OTHERS = {  # as Python, people and iconv name them
    "utf-16-le": ("UTF-16", "UTF-16LE"),
    "utf-16-be": ("UTF-16", "UTF-16BE"),
    "utf-32-le": ("UTF-32", "UTF-32LE"),
    "utf-32-be": ("UTF-32", "UTF-32BE"),
    "latin-1": ("Latin-1, as older programs write", "LATIN1"),
    "cp1252": ("Windows-1252, as older programs write", "CP1252"),
}
_NOT_WRITTEN = re.compile(r"[\0-\x08\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
_NO_TEXT = {  # what needs more than another encoding
    b"\x28\xb5\x2f\xfd": "is packed by zstd: unpack it with `zstd -d`",
    b"PAR1": "is a Parquet file: write it as CSV, for instance with `pandas.read_parquet(path).to_csv(other)`",
    b"\xd0\xcf\x11\xe0": "is a workbook: save its sheet as CSV",
    b"\x89HDF": "is an HDF5 file: write what is needed of it as CSV",
}


class Table(NamedTuple):
    """Attributes:
    values: ``[time, columns]`` float64, NaN where a number is missing.
    lines: ``[time]``, the line of the file, from 1, that each row ends in.
    texts: name → ``time`` fields as they stand there, of the columns that are read as text.
    """

    values: np.ndarray
    lines: np.ndarray
    texts: dict[str, list[str]] = {}  # noqa: RUF012


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark; plain, or packed by gzip, bzip2, xz or zip.

    Byte order marks are dropped, and lines end in ``\\n``, however they end in the file.

    Args:
      path: the file.

    Raises:
      ValueError: if the file cannot be read, is broken, is no text or is in another encoding, with what converts it.
    """
    with reading(path):
        data = pathlib.Path(path).read_bytes()
    unpack = "cat"
    for magic, (decompress, command) in _PACKED.items():
        if data.startswith(magic):
            try:
                data, unpack = decompress(data), command
            except (
                OSError,
                EOFError,
                ValueError,
                RuntimeError,
                zlib.error,
                lzma.LZMAError,
                zipfile.BadZipFile,
            ) as error:
                raise ValueError(
                    f"{path} is packed, and cannot be unpacked ({str(error)[:80]}): pack it again, or give it unpacked."
                ) from error
    for magic, what in _NO_TEXT.items():
        if data.startswith(magic):
            raise ValueError(f"{path} {what}, and give that.")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding.startswith(("utf-16", "utf-32")):
            raise ValueError(
                f"{path} begins as {encoding.upper()} and is not ({error.reason}): write it again."
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1)
        place = f"line {line}, byte {column + 1} of it, is 0x{data[error.start]:02x}"
        raise ValueError(f"{path} is not UTF-8: {place}. {_conversion(path, unpack, data)}") from error
    if text.count("\0") > len(text) // 10:
        raise ValueError(f"{path} is not UTF-8: it holds zeros. {_conversion(path, unpack, data)}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_plain(path: Path) -> bool:
    """Whether a file's bytes are its text as they stand: neither packed nor after a byte order mark."""
    with reading(path), pathlib.Path(path).open("rb") as file:
        return not file.read(8).startswith((*_PACKED, *_MARKS))


def _conversion(path: Path, unpack: str, data: bytes) -> str:
    """What the encoding may be, and the command that converts it into a file of its own."""
    found = {}
    for encoding in _OTHERS:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            if not _NOT_WRITTEN.search(text):
                found[encoding] = sum(map(str.isascii, text)) / len(text)  # nearly all of a table, and much of a text
    guess, of = _OTHERS[max(found, key=lambda name: found[name])] if found else ("in another encoding", "ENCODING")
    there, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    return f"It may be {guess}. Convert it first: `{unpack} {there} | iconv -f {of} -t UTF-8 > {new}`, and give that."


def _unzip(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if "[Content_Types].xml" in names:
            raise ValueError("it is a workbook: save its sheet as CSV")
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} files, not one")
        return archive.read(names[0])


_PACKED: dict[bytes, tuple[Any, str]] = {
    b"\x1f\x8b": (gzip.decompress, "gunzip -c"),
    b"BZh": (bz2.decompress, "bunzip2 -c"),
    b"\xfd7zXZ\x00": (lzma.decompress, "xz -dc"),
    b"PK\x03\x04": (_unzip, "unzip -p"),
}


def read_csv(
    path: Path, columns: Sequence[str], *, missing: Sequence[str] | None = None, decimal: str | None = None
) -> np.ndarray:
    """Columns of a CSV file whose first line names them.

    Fields are separated by commas, semicolons, tabs or bars, whichever separates the header so that it has the columns. Where
    that is no comma, decimal commas are read. Lines that begin with ``#`` and are no rows are comments; the last of them
    before the rows may be the header. Encodings and packing are those of :func:`read_text`.

    Args:
      path: the file.
      columns: their names, without spaces around them.
      missing: what stands for a number that is not there, besides a blank field, NA, N/A, NaN, null and None: texts, or
        numbers such as ``"-9999"``. None: a gap is refused.
      decimal: what decimals are written with, ``","`` or ``"."``. None: a point where commas separate the fields, and
        elsewhere what the numbers have, if it cannot stand for thousands.

    Returns:
      ``[time, len(columns)]`` float64, in memory, in the order of ``columns``; NaN where a number is missing.

    Raises:
      ValueError: with file, line and column, if the file cannot be read, is not text or not CSV, has no rows or not
        these columns, a row has not the header's number of fields, a field is not a finite number, commas and points are
        both in the numbers, either may stand for decimals or for thousands, or a line may be a comment or a row.
    """
    return read_table(path, columns, missing=missing, decimal=decimal).values


def read_table(
    path: Path, columns: Sequence[str], *, missing: Sequence[str] | None = None, decimal: str | None = None,
    texts: Sequence[str] = (),
) -> Table:  # fmt: skip
    """As :func:`read_csv`, with the lines that the rows stand in, and the columns ``texts`` as text."""
    if decimal not in (None, ",", "."):
        raise ValueError(f'`decimal` is {quoted(decimal)}; it needs to be "," or ".", or None.')
    columns = [name.strip() for name in columns]
    if not columns:
        raise ValueError("`columns` is empty: name at least one.")
    text = read_text(path)
    header, separator, start, at = _header(path, text, [*columns, *texts], decimal)
    places = [(name, header.index(name)) for name in columns]
    kept: dict[str, list[str]] = {name: [] for name in texts}
    number, check = _numbers(path, separator, missing, decimal)
    marked: bool | None = None  # whether rows begin with "#", as ids may
    ends: list[int] = []

    def lines() -> Iterator[str]:
        nonlocal at, marked
        for line in _lines(text, start):
            at += 1
            kind: bool | None = False if line else None
            if line.startswith("#"):
                first = _first_of_row(line, header, separator, places)
                if first is None:
                    continue
                kind = None if first.lower() in GAPS else True
            marked = kind if marked is None else marked
            if kind not in (None, marked):
                raise ValueError(
                    f"{path}, line {at}: some rows begin with # and others do not. Quote the first field of those that are "
                    "rows, and take out those that are comments."
                )
            yield f"{line}\n"

    def rows() -> Iterator[list[str]]:
        reader = _reader(lines(), separator)
        blank: list[int] = []
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{path}, line {at}: this is not CSV ({error}).") from error
            if row is None:
                return
            if not row:  # at the end of a file it is nothing; before a row it may be a step that is missing
                blank.append(at)
                continue
            if len(header) == 1 and missing is not None:  # a blank field is all of its line
                for line in blank:
                    ends.append(line)
                    yield [""]
                blank.clear()
            if blank or len(row) != len(header):
                line, has = (blank[0], 0) if blank else (at, len(row))
                hint = f" If its comma is that of a decimal, {_SAY}." if (has, len(header)) == (2, 1) else ""
                raise ValueError(f"{path}, line {line}: the row has {has} fields, and the header {len(header)}.{hint}")
            ends.append(at)
            for name, fields in kept.items():
                fields.append(row[header.index(name)].strip())
            yield row

    values = np.fromiter(
        ([number(row[place].strip(), name, ends[-1]) for name, place in places] for row in rows()),
        np.dtype((np.float64, len(places))),
    )
    if not len(values):
        raise ValueError(f"{path} has a header and no rows: give a file with at least one step.")
    check()
    return Table(values, np.array(ends), kept)


def _lines(text: str, start: int = 0) -> Iterator[str]:
    """The lines of ``text`` from ``start`` on: one at a time, since a list of them takes several times the text's memory."""
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


def _reader(lines: Iterable[str], separator: str) -> Any:
    return csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)


def _header(path: Path, text: str, columns: Sequence[str], decimal: str | None) -> tuple[list[str], str, int, int]:
    """``(names, separator, start, line)``: where in ``text`` the rows begin, and the number of the line before them.

    The header is the first line that is no comment, or else the comment before it.
    """
    start = number = 0
    line = comment = ""
    for line in _lines(text):
        if not line.startswith("#") and (number or not line.lower().startswith("sep=")):  # as spreadsheets say it
            break
        number, start, comment, line = number + 1, start + len(line) + 1, line, ""
    if not line.strip():
        raise ValueError(
            f"{path}, line {number + 1}: there is nothing; it needs to name the columns, and each row to be a step."
        )
    found: dict[str, list[str]] = {}
    for separator in SEPARATORS if decimal != "," else SEPARATORS[1:] + SEPARATORS[:1]:
        reader = _reader((f"{line}\n" for line in _lines(text, start)), separator)
        with contextlib.suppress(csv.Error):
            found[separator] = names = [name.strip() for name in next(reader)]
            if all(names.count(name) == 1 for name in columns):
                start += sum(len(line) + 1 for line in itertools.islice(_lines(text, start), reader.line_num))
                return names, separator, start, number + reader.line_num
    for header, separator in itertools.product((comment, comment[1:]), SEPARATORS):
        with contextlib.suppress(csv.Error, StopIteration):
            names = [name.strip() for name in next(_reader([header], separator))]
            if all(names.count(name) == 1 for name in columns):
                return names, separator, start, number
    if not found:
        raise ValueError(f"{path}, line {number + 1}: this is not CSV.")
    names = max(found.values(), key=len)
    name = next(name for name in columns if names.count(name) != 1)
    shown = ", ".join(map(quoted, names[:20])) + (", …" if len(names) > 20 else "")
    there, new = shlex.quote(str(path)), shlex.quote(f"{path}.commas")
    advice = (
        f" Where blanks separate, make them commas: `sed -E 's/^ +| +$//g; s/ +/,/g' {there} > {new}`, and give that."
    )
    raise ValueError(
        f"{path} has {names.count(name)} columns {quoted(name)}; one is needed. Those there are: {shown}."
        f"{advice if len(names) == 1 and ' ' in names[0] else ''}"
    )


def _first_of_row(line: str, header: list[str], separator: str, places: list[tuple[str, int]]) -> str | None:
    """The first field of a line that begins with ``#``, if it may be a row for all that; of a comment, None."""
    try:
        row = [field.strip() for field in next(_reader([line], separator))]
    except csv.Error:
        return None
    if len(row) != len(header):
        return None
    fields = [row[place].removeprefix("#").replace(",", ".") for _, place in places if row[place].lower() not in GAPS]
    numbers = [_number(field) is not None for field in fields]
    return row[0] if all(numbers) and (any(numbers) or row[0].lower() in GAPS) else None


def _numbers(
    path: Path, separator: str, missing: Sequence[str] | None, decimal: str | None
) -> tuple[Callable[[str, str, int], float], Callable[[], None]]:
    """``(number, check)``: of a field, its column and its line, NaN for a gap; and whether all of them were read as meant."""
    gaps = GAPS.union(text.strip().lower() for text in missing) if missing is not None else frozenset()
    sentinels = {value for text in missing or () if (value := _number(text)) is not None}
    commas = decimal == "," or (decimal is None and separator != ",")
    said, decimal = decimal, decimal or ("." if separator == "," else None)
    first: dict[str, str] = {}  # where each mark stands first
    plain: set[str] = set()  # the marks that are known to stand for decimals

    def number(field: str, name: str, line: int) -> float:
        comma = commas and field.count(",") == 1 and "." not in field
        value = _number(field.replace(",", ".") if comma else field)
        if value in sentinels or ((value is None or math.isnan(value)) and field.lower() in gaps):
            return math.nan
        mark = "," if "," in field else "." if "." in field else ""
        if value is not None and math.isfinite(value) and (mark in ("", decimal) or plain == {mark} == {*first}):
            return value
        where = f"{path}, line {line}, column {quoted(name)}: {quoted(field)}"
        if value is None or not math.isfinite(value):
            what = "is not a number" if value is None else "is not a finite number"
            hint = " Write it without thousands." if value is None and re.fullmatch(r"[+-]?\d+[\d.,' ]+", field) else ""
            if mark == "," and not said and _number(field.replace(",", ".")) is not None:
                hint = f" If its comma is that of a decimal, {_SAY}."
            if field.lower() in GAPS:
                hint = " To read it as a gap, give `missing=[]`; else fill it in, or drop the row."
            raise ValueError(f"{where} {what}.{hint}")
        if decimal:
            raise ValueError(f"{where} has a point, and decimals have commas: write it without thousands.")
        first.setdefault(mark, where)
        if len(first) == 2:
            raise ValueError(
                f"{first[',']} has a comma, and others have points: write numbers one way, without thousands."
            )
        if not _GROUPED.fullmatch(field):
            plain.add(mark)
        return value

    def check() -> None:
        for mark, where in first.items():
            if mark not in plain:
                raise ValueError(f"{where} may have decimals or thousands, and so may all others: {_SAY}.")

    return number, check


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
        if not isinstance(path, str | os.PathLike) or "\0" not in os.fspath(path):
            raise
        raise ValueError(f"{quoted(os.fspath(path))} cannot be read: a path has no zeros in it.") from error
