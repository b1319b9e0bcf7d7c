"""Tables and texts are read the same in every dialect, or refused with advice that works."""

import bz2
import gzip
import io
import lzma
import re
import subprocess
import zipfile

import numpy as np
import pytest

import tbptt_jax as tb
from tbptt_jax.files import read_text


def zipped(*texts):
    with zipfile.ZipFile(kept := io.BytesIO(), "w") as archive:
        for i, text in enumerate(texts):
            archive.writestr(f"{i}.csv", text)
    return kept.getvalue()


TABLE = np.round(np.random.default_rng(0).normal(size=(40, 2)) * 100, 4)
TEXT = "größe,x,y\n" + "".join(f"{t},{x},{y}\n" for t, (x, y) in enumerate(TABLE.tolist()))
SEMICOLONS = TEXT.replace(",", ";").replace(".", ",")

DIALECTS = {
    "commas": TEXT.encode(),
    "semicolons and decimal commas": SEMICOLONS.encode(),
    "semicolons and points": TEXT.replace(",", ";").encode(),
    "tabs": TEXT.replace(",", "\t").encode(),
    "tabs and decimal commas": TEXT.replace(",", "\t").replace(".", ",").encode(),
    "bars": TEXT.replace(",", "|").encode(),
    "blanks after commas": TEXT.replace(",", ", ").encode(),
    "comments": b"# station 7, a;b\n" + TEXT.replace("\n1,", "\n# gap\n1,").encode(),
    "quoted names": TEXT.replace("größe,x,y", '"größe","x","y"').encode(),
    "quoted fields": re.sub(r"(?m)^(\\d+)", r'"\\1"', TEXT).encode(),
    "said by a spreadsheet": b"sep=;\r\n" + SEMICOLONS.replace("\n", "\r\n").encode(),
    "CRLF": TEXT.replace("\n", "\r\n").encode(),
    "CR": TEXT.replace("\n", "\r").encode(),
    "a byte order mark": TEXT.encode("utf-8-sig"),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-32": TEXT.encode("utf-32"),
    "gzip": gzip.compress(TEXT.encode()),
    "bzip2": bz2.compress(TEXT.encode("utf-16")),
    "xz": lzma.compress(SEMICOLONS.encode()),
    "zip": zipped(TEXT),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_a_table_is_the_same_in_every_dialect(tmp_path, name):
    path = tmp_path / "x.csv"
    path.write_bytes(DIALECTS[name])
    table = tb.streams.read_csv(path, ["x", "y"])
    assert table.dtype == np.float64
    np.testing.assert_array_equal(table, TABLE)


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [("latin-1", False), ("latin-1", True), ("cp1252", False), ("utf-16-le", False), ("utf-16-be", False), ("utf-32-be", False)],
)  # fmt: skip
def test_what_another_encoding_is_advised_makes_a_file_that_is_read(tmp_path, encoding, packed):
    tables = []
    for name in ("x y.csv", "x z.csv"):  # the second must not be written over the first
        path, table = tmp_path / name, TABLE + len(tables)
        said = f"{'“' if encoding == 'cp1252' else ''}größe,x,y\n" + "".join(f"0,{x},{y}\n" for x, y in table.tolist())
        path.write_bytes(gzip.compress(said.encode(encoding)) if packed else said.encode(encoding))
        with pytest.raises(ValueError, match=r"Convert it first: `.*`") as refused:
            tb.streams.read_csv(path, ["x", "y"])
        (advice,) = re.findall("`(.*)`", str(refused.value))
        subprocess.run(advice, shell=True, check=True, cwd=tmp_path)
        tables.append((advice.split(" > ")[1].strip("'"), table))
    for new, table in tables:
        np.testing.assert_array_equal(tb.streams.read_csv(new, ["x", "y"]), table)


def test_a_comma_that_may_be_of_decimals_or_of_thousands_is_refused_until_it_is_said(tmp_path):
    path = tmp_path / "x.csv"
    for text, decimals in (
        ("x;y\n1,234;2\n-2,500;3\n", [1.234, -2.5]),
        ('x\ty\n"1,234"\t2\n2,500\t3\n', [1.234, 2.5]),
        ("x;y\n1.234;2\n2.500;3\n", [1.234, 2.5]),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r'line 2, column .x.* may have decimals or thousands.*decimal=","'):
            tb.streams.read_csv(path, ["x", "y"])
        said, other = (",", ".") if "," in text else (".", ",")
        assert tb.streams.read_csv(path, ["x", "y"], decimal=said)[:, 0].tolist() == decimals
        with pytest.raises(ValueError, match=r"line 2, column .x.* thousands"):
            tb.streams.read_csv(path, ["x", "y"], decimal=other)
    path.write_text("x;y\n1,234;0\n-2,500;0,5\n")  # its last number settles it
    assert tb.streams.read_csv(path, ["x", "y"])[:, 0].tolist() == [1.234, -2.5]


def test_what_decimals_are_written_with_can_be_said_where_commas_separate(tmp_path):
    for text in ('x,y\n"1,5",2\n', "x\n1,5\n"):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=r'line 2.* If its comma is that of a decimal, say .*decimal=","'):
            tb.streams.read_csv(tmp_path / "x.csv", ["x"])
        assert tb.streams.read_csv(tmp_path / "x.csv", ["x"], decimal=",").tolist() == [[1.5]]
    with pytest.raises(ValueError, match="`decimal` is ';'"):
        tb.streams.read_csv(tmp_path / "x.csv", ["x"], decimal=";")


@pytest.mark.parametrize("header", ["#,x,y", "#t,x,y", "# t,x,y"])
def test_a_header_may_begin_with_the_sign_of_a_comment(tmp_path, header):
    (tmp_path / "x.csv").write_text(f"# station 7\n{header}\n1,2,3\n")
    assert tb.streams.read_csv(tmp_path / "x.csv", ["x", "y"]).tolist() == [[2, 3]]


def test_no_row_is_taken_for_a_comment(tmp_path):
    path = tmp_path / "x.csv"
    for text, expected in (
        ("x,y\n1,2\n#N/A,3\n# station 7, closed\n#,,\n4,5\n", [[1, 2], [np.nan, 3], [4, 5]]),
        ("t,x,y\n#1,2,3\n#2,4,5\n", [[2, 3], [4, 5]]),
    ):
        path.write_text(text)
        np.testing.assert_array_equal(tb.streams.read_csv(path, ["x", "y"], missing=[]), expected)
    path.write_text("y\n1\n#N/A\n# gap\n3\n")
    np.testing.assert_array_equal(tb.streams.read_csv(path, ["y"], missing=[]), [[1], [np.nan], [3]])
    path.write_text("t,x,y\n1,2,3\n#2,4,5\n")
    with pytest.raises(ValueError, match=r"line 3: some rows begin with # and others do not.*Quote the first field"):
        tb.streams.read_csv(path, ["x", "y"])
    path.write_text('t,x,y\n1,2,3\n"#2",4,5\n')
    assert tb.streams.read_csv(path, ["x", "y"]).tolist() == [[2, 3], [4, 5]]


def test_columns_that_blanks_separate_are_read_once_the_advice_is_followed(tmp_path):
    path = tmp_path / "x.dat"
    path.write_text("  t   x y\n  0 1.5  2\n 1   3 -4 \n")
    with pytest.raises(ValueError, match="Where blanks separate") as refused:
        tb.streams.read_csv(path, ["x", "y"])
    (advice,) = re.findall("`(.*)`", str(refused.value))
    subprocess.run(advice, shell=True, check=True)
    assert tb.streams.read_csv(f"{path}.commas", ["x", "y"]).tolist() == [[1.5, 2], [3, -4]]


@pytest.mark.parametrize(
    "text",
    ["", "NA", "nan", "NaN", "-nan", "null", "N/A", "#N/A", "<NA>", "None", "-9999", "-9999.0", "-9.999e3", "missing"],
)
def test_what_stands_for_a_gap_is_a_gap_where_gaps_are_read_and_refused_where_they_are_not(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_text(f"x,y\n1,2\n3,{text}\n5,6\n")
    table = tb.streams.read_csv(path, ["x", "y"], missing=["-9999", "missing"])
    np.testing.assert_array_equal(table, [[1, 2], [3, np.nan], [5, 6]])
    if "9" not in text:
        with pytest.raises(ValueError, match=r"line 3, column 'y': .* is not a"):
            tb.streams.read_csv(path, ["x", "y"])


def test_a_blank_line_is_a_gap_in_a_file_of_one_column(tmp_path):
    (tmp_path / "x.csv").write_text("y\n1\n\n3\n\n")
    np.testing.assert_array_equal(tb.streams.read_csv(tmp_path / "x.csv", ["y"], missing=[]), [[1], [np.nan], [3]])


def test_columns_are_read_by_name_in_the_order_asked_for(tmp_path):
    (tmp_path / "x.csv").write_text('\ufefftime,"a, b",c\nmon,1, 2.5\n"tue\n",-3e2,4\n\n', encoding="utf-8")
    assert tb.streams.read_csv(tmp_path / "x.csv", ["c", "a, b"]).tolist() == [[2.5, 1], [4, -300]]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read: No such file"),
        ("", "line 1: there is nothing"),
        ("# only\n", "line 2: there is nothing"),
        ("a,b\n", "a header and no rows"),
        ("b,c\n1,2\n", r"0 columns 'a'; one is needed. Those there are: 'b', 'c'"),
        ("a,a\n1,2\n", "2 columns 'a'"),
        ("n,a\nx,2\n#1,4\n", "line 3: some rows begin with # and others do not"),
        ("a,b\n1,2\nx,4\n", "line 3, column 'a': 'x' is not a number"),
        ("a,b\n1,2\n,4\n", "line 3, column 'a': '' is not a number. To read it as a gap"),
        ("a,b\n1,2\n1_000,4\n", "line 3, column 'a': '1_000' is not a number"),
        ("a,b\n1,2\n0x1f,4\n", "line 3, column 'a': '0x1f' is not a number"),
        ("a,b\n1,2\nNaN,4\n", "line 3, column 'a': 'NaN' is not a finite"),
        ("a,b\n1e400,2\n", "line 2, column 'a': '1e400' is not a finite"),
        ("a,b\ninfinity,2\n", "line 2, column 'a': 'infinity' is not a finite"),
        ('a,b\n"1,5",2\n', "line 2, column 'a': '1,5' is not a number"),
        ("a;b\n1,5;2\n2.5;3\n", "line 2, column 'a': '1,5' has a comma, and others have points"),
        ("a;b\n1.234,5;2\n", "line 2, column 'a': '1.234,5' is not a number. Write it without thousands"),
        ("a;b\n1,234,567;2\n", "line 2, column 'a': '1,234,567' is not a number. Write it without thousands"),
        ("a,b\n1,2\n3\n", "line 3: the row has 1 fields, and the header 2"),
        ("a,b\n1,5,2,5\n", "line 2: the row has 4 fields, and the header 2"),
        ("a\n1\n\n3\n", "line 3: the row has 0 fields, and the header 1"),
        ("# c\na,b\n# d\n1,2\n3\n", "line 5: the row has 1 fields"),
        ('a,b\n1,"2\n', "line 2: this is not CSV"),
        (b"a,b\n1,2\n3,\xff\n", "line 3, byte 3 of it, is 0xff"),
        (b"\x1f\x8b" + b"0" * 20, "is packed, and cannot be unpacked"),
        (gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:25], "is packed, and cannot be unpacked"),
        *(
            (pack(b"a,b\n1,2\n" * 99)[:-9], "is packed, and cannot be unpacked")
            for pack in (bz2.compress, lzma.compress)
        ),
        (zipped(TEXT, TEXT), "it holds 2 files"),
        (b"\x28\xb5\x2f\xfd\0\0", "is packed by zstd"),
        (bytes(range(256)), "iconv -f ENCODING"),
        (b"\xff\xfea", "begins as UTF-16 and is not"),
        ("a,b\n" + "9" * 5000 + "x,1\n", "'9999.*\\.\\.\\. is not a number"),
        ("x" * 4000 + ",b\n1,1\n", "Those there are: 'xxx.*\\.\\.\\., 'b'"),
    ],
)
def test_a_table_that_will_not_do_is_told_with_its_line_and_column(tmp_path, content, message):
    path = tmp_path / "x.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message) as refused:
        tb.streams.read_csv(path, ["a"])
    assert len(str(refused.value)) < 400 + len(str(path))


def test_a_mutated_table_is_a_table_of_its_shape_or_a_sentence(tmp_path):
    path, rng = tmp_path / "x.csv", np.random.default_rng(0)
    for seed in range(400):
        data = bytearray(list(DIALECTS.values())[seed % len(DIALECTS)])
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.choice(np.frombuffer(b'",;\n\r\t#.-e0\x00\xff _', np.uint8))
        path.write_bytes(data)
        try:
            table = tb.streams.read_csv(path, ["x", "y"], missing=[])
        except ValueError as error:
            assert str(error).startswith(str(path)) and str(error).endswith("."), error
        else:
            assert table.ndim == 2 and table.shape[1] == 2 and not np.isinf(table).any()


def test_texts_are_the_same_however_they_are_kept(tmp_path):
    text = "bœuf\nà la\n"
    kept = [
        text.encode(),
        text.encode("utf-8-sig"),
        text.encode("utf-16"),
        text.replace("\n", "\r").encode(),
        text.replace("\n", "\r\n").encode(),
        gzip.compress(text.encode()),
    ]
    for data in kept:
        (tmp_path / "x").write_bytes(data)
        assert read_text(tmp_path / "x") == text
