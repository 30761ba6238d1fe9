"""Tables in CSV, JSON lines, Parquet and Excel files: the same rows, whatever the file."""

import csv
import datetime
import gzip
import io
import json
import re
import sys
import zipfile

import openpyxl
import pyarrow
import pytest
from pyarrow import parquet

from clinora.notes import read_notes
from clinora.tables import MissingColumnError, TableError, as_text, open_table, table

HEADER = ("id", "transcription", "medical_specialty")
ROWS = [
    (7, "Knee pain, and fever;\nno rash.", "Orthopedic"),
    (8, 'She said "better".', "Surgery"),
    (9, "Œdème, 38,5 °C", "Surgery"),
    (10, "Chest pain", "Orthopedic"),
]
SECRET = "HIV positive"


def csv_file(rows=ROWS, header=HEADER):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue().encode()


def json_lines(rows=ROWS, header=HEADER):
    lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
    return "\n".join(lines).encode()


def parquet_file(rows=ROWS, header=HEADER):
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream, row_group_size=3)
    return stream.getvalue()


def workbook(rows=ROWS, header=HEADER, further_sheets=0):
    book = openpyxl.Workbook()
    for row in [header, *rows]:
        book.active.append(row)
    for number in range(further_sheets):
        book.create_sheet().append([number])
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


FILES = {
    "csv": csv_file,
    "csv.gz": lambda *args: gzip.compress(csv_file(*args)),
    "jsonl": json_lines,
    "jsonl.gz": lambda *args: gzip.compress(json_lines(*args)),
    "parquet": parquet_file,
    "xlsx": workbook,
}


def rows_of(content, *columns):
    return list(open_table(io.BytesIO(content), columns).select())


# --- the same rows, whatever the file -------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_cells_are_those_that_were_written(kind):
    rows = rows_of(FILES[kind](), "id", "transcription")
    cells = [tuple(as_text(cell) for cell in row.cells) for row in rows]
    assert cells == [(str(number), text) for number, text, _ in ROWS]
    assert {row.wrong for row in rows} == {None}


@pytest.mark.parametrize("kind", FILES)
def test_notes_do_not_depend_on_the_kind_of_the_file(tmp_path, kind):
    path = tmp_path / "notes"  # the name says nothing
    path.write_bytes(FILES[kind]())
    notes = read_notes(path)
    assert [(note.text, note.labels) for note in notes.notes] == [
        (text, (("Orthopedic", "Surgery").index(label),)) for _, text, label in ROWS
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_kept_cells_have_their_type(kind):
    assert [row.cells for row in rows_of(FILES[kind](), "id")] == [[7], [8], [9], [10]]


def test_a_missing_value_is_an_empty_text():
    rows = [(1, None, "A"), (2, "text", None)]
    for write in (json_lines, parquet_file, workbook):
        cells = [row.cells for row in rows_of(write(rows), *HEADER[1:])]
        assert [[as_text(cell) for cell in row] for row in cells] == [["", "A"], ["text", ""]]


def test_a_date_in_a_workbook_is_read():
    content = workbook([(datetime.datetime(2024, 3, 1), "text", "A")])
    ((cell,),) = [row.cells for row in rows_of(content, "id")]
    assert as_text(cell).startswith("2024-03-01")


@pytest.mark.parametrize("kind", FILES)
def test_the_share_that_was_read_rises_to_one(kind):
    rows = [(i, f"note {i} {'x' * 200}", "A") for i in range(3000)]
    opened = open_table(io.BytesIO(FILES[kind](rows)), ["transcription"])
    shares = [opened.share_read() for _ in opened.select()]
    assert shares == sorted(shares)
    assert shares[0] < 0.6
    assert opened.share_read() == 1


# --- wrong rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (f'{{"transcription": "{SECRET}"', "not JSON"),
        (f'["{SECRET}"]', "not a JSON object"),
        (f'{{"note": "{SECRET}"}}', "no 'transcription'"),
        (f'{{"transcription": ["{SECRET}"]}}', "'transcription'"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["not JSON", "list", "other key", "a list as a text", "deep"],
)
def test_a_wrong_line_is_one_wrong_row(line, wrong):
    content = '{"transcription": "a"}\n' + line + '\n\n{"transcription": "b"}\n'
    first, second, third = rows_of(content.encode(), "transcription")
    assert (first.cells, third.cells) == (["a"], ["b"])
    assert (second.line, third.line) == (2, 4)
    assert wrong in second.wrong
    assert SECRET not in second.wrong


def test_a_line_that_is_not_utf_8_is_one_wrong_row():
    content = json_lines() + b'\n{"id": 1, "transcription": "\xe9", "medical_specialty": "A"}\n'
    *_, last = rows_of(content, "transcription")
    assert "UTF-8" in last.wrong


def test_a_cell_beyond_the_header_of_a_workbook_is_a_wrong_row():
    first, second = rows_of(workbook([(1, "a", "A"), (2, "b", "B", SECRET)]), "transcription")
    assert first.wrong is None
    assert "4 cells" in second.wrong


def test_a_list_in_a_parquet_file_is_a_wrong_row():
    (row,) = rows_of(parquet_file([(1, [SECRET], "A")]), "transcription")
    assert "'transcription'" in row.wrong
    assert SECRET not in row.wrong


# --- damaged files, and files that are not what they seem -----------------------------------------


@pytest.mark.parametrize("kind", ["csv.gz", "jsonl.gz", "parquet", "xlsx"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_half_a_file_is_refused(kind, share):
    rows = [(i, f"{i * 7919 % 1000} {SECRET}", "A") for i in range(2000)]
    content = FILES[kind](rows)
    with pytest.raises(TableError, match="damaged"):
        rows_of(content[: int(share * len(content))], "transcription")


@pytest.mark.parametrize("kind", ["csv.gz", "jsonl.gz", "parquet", "xlsx"])
def test_a_changed_byte_raises_no_error_of_another_kind(kind):
    """A command would show another error as a traceback."""
    rows = [(i, f"{i * 7919 % 1000} {SECRET}", "A") for i in range(200)]
    content = FILES[kind](rows)
    for position in range(8, len(content), max(1, len(content) // 60)):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        try:
            rows_of(bytes(changed), "transcription")
        except TableError as error:
            assert SECRET not in str(error)


@pytest.mark.parametrize(
    "start", [b"a,transcription\n", b'{"transcription": "'], ids=["csv", "json"]
)
def test_a_small_gzip_file_that_unpacks_to_hundreds_of_megabytes_is_refused(start):
    content = gzip.compress(start + b"x" * 120_000_000, 1)
    with pytest.raises(TableError, match=r"unpacks to|more than 100,000,000 bytes in line 1"):
        rows_of(content, "transcription")


def test_a_small_workbook_that_unpacks_to_hundreds_of_megabytes_is_refused():
    stream = io.BytesIO(workbook())
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/image.png", bytes(120_000_000))
    with pytest.raises(TableError, match="unpacks to"):
        rows_of(stream.getvalue(), "transcription")


def test_a_wrong_dimension_of_a_sheet_loses_no_row():
    """Some programs write one cell as the dimension of every sheet."""
    before = zipfile.ZipFile(io.BytesIO(workbook()))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in before.namelist():
            content = before.read(name)
            if name == "xl/worksheets/sheet1.xml":
                content, times = re.subn(
                    rb'<dimension ref="A1:C5"', b'<dimension ref="A1"', content
                )
                assert times == 1
            archive.writestr(name, content)
    assert len(rows_of(stream.getvalue(), "transcription")) == len(ROWS)


def test_of_several_sheets_none_is_chosen():
    with pytest.raises(TableError, match="3 sheets"):
        rows_of(workbook(further_sheets=2), "transcription")


@pytest.mark.parametrize("kind", FILES)
def test_more_rows_than_the_limit_are_refused(monkeypatch, kind):
    content = FILES[kind]()
    monkeypatch.setattr(table, "MOST_ROWS", 4)
    assert len(rows_of(content, "transcription")) == 4
    monkeypatch.setattr(table, "MOST_ROWS", 3)
    monkeypatch.setattr("clinora.tables.parquet.MOST_ROWS", 3)
    with pytest.raises(TableError, match="more than 3 rows"):
        rows_of(content, "transcription")


@pytest.mark.parametrize("kind", FILES)
def test_a_column_that_is_not_there_is_refused(kind):
    with pytest.raises(MissingColumnError, match="no column 'text'") as caught:
        rows_of(FILES[kind](), "id", "text")
    assert caught.value.column == "text"
    has_names = kind.startswith(("json", "parquet"))
    assert ("'medical_specialty'" in str(caught.value)) == has_names


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("xlsx", "openpyxl")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, kind, package):
    content = FILES[kind]()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TableError, match=rf"{package}.*clinora\[files\]"):
        rows_of(content, "transcription")


def test_a_date_out_of_range_is_one_wrong_row():
    days = pyarrow.array([10_000_000], pyarrow.int32()).cast(pyarrow.date32())
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"day": days}), stream)
    (row,) = rows_of(stream.getvalue(), "day")
    assert "'day'" in row.wrong


def test_a_lone_surrogate_in_a_key_is_replaced():
    opened = open_table(io.BytesIO(b'{"\\ud800": "a"}\n'), [])
    assert opened.header == ["\ufffd"]


# --- a folder of text files -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Write a folder with a sub-folder for each class."""
    for number, text, label in ROWS:
        path = tmp_path / "notes" / label / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "notes"


def test_text_files_in_a_sub_folder_for_each_class_are_notes(folder, tmp_path):
    (folder / ".DS_Store").write_bytes(b"\xff")
    (folder / "Surgery" / ".hidden").write_bytes(b"\xff")
    path = tmp_path / "notes.csv"
    path.write_bytes(csv_file())
    assert read_notes(folder).fingerprint == read_notes(path).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("readme.txt", b"", "'readme.txt'"),
        ("Surgery/deeper/a.txt", b"a", "deeper is not a file"),
        ("Surgery/a.txt", b"\xe9", r"a\.txt is not a text file"),
        ("Surgery/a.txt", b"x" * 4_000_001, r"a\.txt has more than"),
        (f"{SECRET} {'x' * 100}/a.txt", b"a", "sub-folder.*100"),
    ],
    ids=["beside", "deeper", "not UTF-8", "long", "name"],
)
def test_other_things_in_a_folder_are_refused(folder, name, content, words):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_notes(folder)


def test_a_folder_has_no_column_of_splits(folder):
    with pytest.raises(ValueError, match="'split'"):
        read_notes(folder, split_column="split")
