"""Recognising files, and reading tables, which ``read_notes`` and the page do with one reader."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import struct
import zipfile

import hypothesis
import pytest
from hypothesis import strategies

from clinora.files import recognise
from clinora.notes import read_notes
from clinora.serving.files import FileError, check_table, read_rows
from clinora.tables import TableError, open_table

SECRET = "HIV positive"  # in each bad file; no message may quote it
HEADER = ("id", "transcription", "medical_specialty")
ROWS = [
    ["1", "Knee pain, and fever; no rash.", "Orthopedic"],
    ["2", 'She said "better".\nNo\tcough.', "Surgery"],
    ["3", "", "Surgery"],
    ["4", "Chest pain", "Orthopedic"],
]


def csv_of(rows, header=HEADER, **options):
    """Write a table with the csv module."""
    text = io.StringIO()
    csv.writer(text, **options).writerows([header, *rows])
    return text.getvalue().encode()


def rows_of(content, *columns):
    """Give the rows of a file, with the cells of all columns."""
    table = open_table(io.BytesIO(content), columns)
    return [row.cells for row in table.rows(table.header)]


def read_transcription(content):
    """Give the note of each row, and what is wrong with the row."""
    return [(note, wrong) for note, _kept, wrong in read_rows(content, "transcription")]


READERS = (check_table, read_transcription)  # when a file is chosen, and when it is classified


def notes_of(folder, content):
    path = folder / "notes.csv"
    path.write_bytes(content)
    return read_notes(path)


def messages(folder, content):
    """Give what ``read_notes`` and the page say when they refuse a file."""
    with pytest.raises(ValueError, match=r"notes\.csv ") as caught:
        notes_of(folder, content)
    found = [str(caught.value)]
    for read in READERS:
        with pytest.raises(FileError) as caught:
            read(content)
        found.append(str(caught.value))
    return found


# --- kinds of files -------------------------------------------------------------------------------


def workbook():
    """A zip file with some of the names that an Excel workbook has."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/sharedStrings.xml", f"<t>{SECRET}</t>")
    return file.getvalue()


TABLE = csv_of([["1", SECRET, "A"], ["2", "b", "B"]])
NOTE = {"transcription": SECRET, "medical_specialty": "A"}
OTHER_KINDS = {
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "Git LFS"),
    "web page": (f"\n<!DOCTYPE html>\n<p>{SECRET}</p>".encode(), "web page"),
    "web page without a doctype": (f"<HTML><p>{SECRET}</p>".encode(), "web page"),
    "gzip in gzip": (gzip.compress(gzip.compress(TABLE)), "compressed"),
    "half a gzip file": (gzip.compress(TABLE)[:-20], "damaged or incomplete gzip"),
    "zip in gzip": (gzip.compress(workbook()), "zip.*gzip"),
    "bzip2": (bz2.compress(TABLE), "compressed"),
    "xz": (lzma.compress(TABLE), "compressed"),
    "zip": (workbook(), "zip file.*unpack"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + TABLE, "Excel.*CSV"),
    "Parquet": (b"PAR1\x15\x04" + TABLE, "damaged Parquet"),
    "JSON of rows": (json.dumps([NOTE], indent=1).encode(), "JSON.*lines"),
    "JSON of columns": (json.dumps(NOTE, indent=1).encode(), "JSON.*lines"),
    "UTF-16": (TABLE.replace(b",", b"\t").decode().encode("utf-16"), "^(?!.*NUL).*UTF-16.*CSV"),
    "UTF-16, big-endian": (b"\xfe\xff" + TABLE.decode().encode("utf-16-be"), "UTF-16.*CSV"),
    "UTF-16 without a mark": (TABLE.decode().encode("utf-16-le"), "UTF-16.*CSV"),
    "Windows-1252": (TABLE + "3,caf\u00e9,A".encode("cp1252"), "line 4.*Windows-1252.*CSV"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_of_another_kind_is_recognised(tmp_path, kind):
    content, expected = OTHER_KINDS[kind]
    for message in messages(tmp_path, content):
        assert re.search(expected, message)
        assert SECRET not in message


@pytest.mark.parametrize("name", ["PAR1", "PKs", "BZh", "version", "[id]", "{id}", "<id>"])
def test_a_column_name_that_begins_like_another_kind_is_read(name):
    assert rows_of(csv_of(ROWS, (name, *HEADER[1:]))) == ROWS


def test_weights_with_a_header_of_any_length_are_not_taken_for_gzip():
    """Safetensors begins with the header's length, which can have the first bytes of gzip."""
    for length in range(0x088B1F, 1 << 24, 1 << 16):
        assert recognise(struct.pack("<Q", length) + b'{"x":{"dtype":"F32"') is None


# --- delimiters and encodings ---------------------------------------------------------------------


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL], ids=["minimal", "all"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_a_delimiter_changes_neither_notes_nor_rows(tmp_path, delimiter, quoting):
    content = csv_of(ROWS, delimiter=delimiter, quoting=quoting)
    assert rows_of(content) == rows_of(content, "transcription") == ROWS
    notes = notes_of(tmp_path, content)
    expected = [(row[1], row[2]) for row in ROWS if row[1]]
    assert [(note.text, notes.classes[note.filed[0]]) for note in notes.notes] == expected
    assert (notes.rows, notes.without_text) == (4, 1)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@hypothesis.given(data=strategies.data())
def test_a_table_that_the_csv_module_writes_is_read_back(delimiter, data):
    characters = strategies.characters(exclude_categories=["Cs"], exclude_characters="\0")
    cell = strategies.text(characters)
    rows = data.draw(strategies.lists(strategies.lists(cell, min_size=3, max_size=3), min_size=1))
    assert rows_of(csv_of(rows, delimiter=delimiter)) == rows


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [
        (("transcription", "medical_specialty", "BP (sys;dia;mean;rate)"), ","),
        (("transcription", "medical_specialty", "a\tb\tc\td"), ","),
        (("weight, kg", "height, cm", "age, y", "transcription", "medical_specialty"), ";"),
        (("transcription", "medical_specialty", "a, b, c; d; e"), "\t"),
    ],
)
def test_the_wanted_columns_decide_which_delimiter_it_is(tmp_path, header, delimiter):
    rows = [[f"{i}-{name[:5]}" for name in header] for i in range(3)]
    # Excel quotes a cell with its own delimiter alone.
    content = csv_of(rows, header, delimiter=delimiter, quoting=csv.QUOTE_NONE, escapechar="\\")
    assert rows_of(content, "transcription") == rows
    notes = notes_of(tmp_path, content)
    assert [note.text for note in notes.notes] == ["0-trans", "1-trans", "2-trans"]


def test_a_column_of_sentences_has_commas_and_semicolons_in_its_cells():
    content = b"transcription\nKnee pain; fever\nNo rash\n"
    assert rows_of(content, "transcription") == [["Knee pain; fever"], ["No rash"]]


@pytest.mark.parametrize(
    ("lines", "cells"),
    [
        (["Kopfschmerzen, Fieber", "Husten; Schnupfen"], None),
        (["Kopfschmerzen, Fieber", "Husten"], None),
        (["Kopfschmerzen; Fieber", "", "Husten\tSchnupfen"], None),
        (["Kopfschmerzen, Fieber", "Husten\tSchnupfen", " "], None),
        (["Fieber, Husten", '"Husten, ""a""; b\nc"'], ["Fieber, Husten", 'Husten, "a"; b\nc']),
    ],
)
@pytest.mark.parametrize("columns", [(), ("transcription",)])
def test_in_one_column_delimiters_need_no_quotes(lines, cells, columns):
    content = "\n".join(["transcription", *lines, ""]).encode()
    assert rows_of(content, *columns) == [[cell] for cell in cells or lines]


def test_a_single_column_with_every_delimiter_has_rows_with_too_many_cells():
    content = b"transcription\na,b\nc;d\ne\tf\n"
    errors = [wrong for _cell, wrong in read_transcription(content)]
    assert [bool(wrong) for wrong in errors] == [True, False, False]
    assert "2 fields" in errors[0]
    assert "quotes" in errors[0]


@pytest.mark.parametrize("begin", ["sep={}", "\ufeffsep={}", "SEP={}"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["n", "rn", "r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_a_first_line_for_excel_gives_the_delimiter(tmp_path, delimiter, begin, end):
    first_line = (begin.format(delimiter) + end).encode()
    header = ("a,b;c\td", "transcription", "medical_specialty")
    content = first_line + csv_of(ROWS, header, delimiter=delimiter, lineterminator=end)
    assert rows_of(content) == rows_of(content, "transcription") == ROWS
    assert len(notes_of(tmp_path, content).notes) == 3
    with pytest.raises(ValueError, match=r"row 5 .*line 8\)"):
        notes_of(tmp_path, content + delimiter.join("abcd").encode())
    with pytest.raises(TableError, match="empty"):
        rows_of(first_line)


@pytest.mark.parametrize("last", [" ", " \t ", "\x1a", "\x1a\r\n", " \x1a", "\u00a0"])
@pytest.mark.parametrize("delimiter", [",", ";"], ids=["comma", "semicolon"])
def test_a_blank_last_line_is_no_row(tmp_path, last, delimiter):
    content = csv_of(ROWS, delimiter=delimiter) + last.encode()
    assert rows_of(content) == rows_of(content, "transcription") == ROWS
    assert notes_of(tmp_path, content).rows == len(ROWS)


def test_quotes_are_advised_only_for_too_many_cells():
    answers = read_transcription(b"id,transcription\n1\n2,a,b\n")
    few, many = (wrong for _cell, wrong in answers)
    assert re.search(r"\b1 field\b", few)
    assert "quotes" not in few
    assert re.search(r"\b3 fields\b.*commas.*quotes", many)


@pytest.mark.parametrize(
    "content",
    [
        b'transcription,"specialty (A; B; C)"\n\n"Pain; ""bad"" x","A"\n',
        b'transcription,"specialty (A; B; C)"\n"Pain; ""bad"" x","A"\n',
        b'"a,b,c,d";transcription\n"a";"Pain, ""bad"" x"\n',
    ],
)
def test_a_file_that_reads_well_with_its_column_is_accepted_without(content):
    check_table(content)
    assert [(wrong, "bad" in cell) for cell, wrong in read_transcription(content)] == [(None, True)]


def test_spaces_around_names_of_columns_do_not_matter(tmp_path):
    spaced = csv_of(ROWS, [f" {name}\t" for name in HEADER])
    plain = csv_of(ROWS)
    assert notes_of(tmp_path, spaced) == notes_of(tmp_path, plain)
    for column in ("transcription", " transcription "):
        for content in (spaced, plain):
            notes = [(note, wrong) for note, _kept, wrong in read_rows(content, column)]
            assert notes == read_transcription(plain)


@pytest.mark.parametrize("marks", [1, 2])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL], ids=["minimal", "all"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_byte_order_marks_are_no_part_of_the_first_column(tmp_path, marks, quoting, delimiter):
    header = ("transcription", "medical_specialty")
    table = csv_of([["a", "A"], ["b", "B"]], header, delimiter=delimiter, quoting=quoting)
    content = b"\xef\xbb\xbf" * marks + table
    assert notes_of(tmp_path, content) == notes_of(tmp_path, table)
    assert open_table(io.BytesIO(content)).header == list(header)


def test_a_second_file_appended_with_its_byte_order_mark_repeats_the_header(tmp_path):
    table = b"\xef\xbb\xbf" + csv_of([["a", "A"], ["b", "B"]], HEADER[1:])
    with pytest.raises(ValueError, match=r"row 3 .*repeats the header"):
        notes_of(tmp_path, table * 2)


def test_a_header_that_cannot_be_offered_is_refused():
    long = "HIV positive " * 20
    many = [f"c{i}" for i in range(201)]
    large = [f"HIV positive {i} {'x' * 100}" for i in range(150)]
    cases = [
        ([long, "id"], "expected a header"),
        (many, "201 columns"),
        (large, "characters together, more than 10,000"),
    ]
    for header, words in cases:
        with pytest.raises(FileError, match=words) as caught:
            check_table(csv_of([["a"] * len(header)], header))
        assert SECRET not in str(caught.value)


# --- no row is lost -------------------------------------------------------------------------------

WORDS = strategies.text("abcdefgh ", min_size=1)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@hypothesis.given(data=strategies.data())
def test_a_missing_closing_quote_is_refused_wherever_it_is(delimiter, data):
    rows = data.draw(strategies.lists(strategies.lists(WORDS, min_size=3, max_size=3), min_size=1))
    content = csv_of(rows, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    quotes = [found.start() for found in re.finditer(b'"', content)]
    missing = quotes[data.draw(strategies.sampled_from(range(7, len(quotes), 2)))]
    line = content.count(b"\n", 0, missing) + 1
    for read in READERS:
        with pytest.raises(FileError, match=rf"line {line} "):
            read(content[:missing] + content[missing + 1 :])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'transcription\nfirst\n"HIV positive, never closed\nthird\nfourth\n', 3),
        (b'id,transcription\n1,first\n2,"HIV positive\n3,third\n4,fourth\n', 3),
        (b'id;transcription\n1;"a\nb"\n2;"HIV positive\n3;third\n', 4),
        (b'id,"transcription\n1,HIV positive\n', 1),
        (b'transcription\n"HIV" positive\n', 2),
    ],
    ids=["one column", "two columns", "behind a text of two lines", "in the header", "text after"],
)
def test_a_wrong_quote_is_refused_with_the_line_of_its_row(tmp_path, content, line):
    for read in READERS:
        with pytest.raises(FileError, match=rf"line {line} ") as caught:
            read(content)
        assert "HIV" not in str(caught.value)


def test_in_one_column_an_empty_line_is_an_empty_cell():
    content = b"transcription\nfirst\n\n\nfourth\nfifth\n\nseventh\n\n\n"
    expected = ["first", "", "", "fourth", "fifth", "", "seventh"]
    assert rows_of(content) == [[cell] for cell in expected]


def test_in_several_columns_an_empty_line_is_no_row(tmp_path):
    content = b"transcription,medical_specialty\n\na,A\n\n\nb,B\n\n"
    assert rows_of(content) == [["a", "A"], ["b", "B"]]
    assert notes_of(tmp_path, content).rows == 2


def test_an_empty_first_line_is_not_an_empty_file(tmp_path):
    for message in messages(tmp_path, b"\n" + TABLE):
        assert "empty line" in message


def test_a_long_cell_is_read_whatever_the_limit_of_the_csv_module_is(tmp_path):
    long = "word " * 40_000
    before = csv.field_size_limit(1000)
    try:
        content = csv_of([["1", long, "A"], ["2", "b", "B"]])
        assert notes_of(tmp_path, content).notes[0].text == long.strip()
        csv.field_size_limit(1000)
        assert read_transcription(content)[0] == (long, None)
    finally:
        csv.field_size_limit(before)


# --- what a message says of the first row ---------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        (["Transcription", "Medical Specialty", "id"], ["Transcription", "Medical Specialty"]),
        (["transcriptions", "label"], ["transcriptions"]),
        (["", "description", "medical_specialty", "text"], ["medical_specialty"]),
        (["TRANSCRIPTION ", "class of the note"], ["TRANSCRIPTION"]),
        (["Transcriptions", "Smith John HIV"], ["Transcriptions"]),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";"], ids=["comma", "semicolon"])
def test_only_near_misses_of_the_wanted_columns_are_shown(tmp_path, header, shown, delimiter):
    with pytest.raises(ValueError, match="no column") as caught:
        notes_of(tmp_path, csv_of([["a"] * len(header)], header, delimiter=delimiter))
    message = str(caught.value).partition("no column")[2]
    quoted = [text for text in re.findall("'(.*?)'", message) if text not in HEADER[1:2]]
    assert quoted == shown


@pytest.mark.parametrize("column", HEADER[1:])
def test_a_missing_column_is_said_with_the_flag_that_names_it(tmp_path, column):
    header = [name if name != column else "other" for name in HEADER]
    flag = {"transcription": "--text-column", "medical_specialty": "--label-column"}[column]
    with pytest.raises(ValueError, match=f"no column '{column}'.*{flag}$"):
        notes_of(tmp_path, csv_of(ROWS, header))


def test_the_page_shows_near_misses_as_training_does():
    with pytest.raises(FileError, match="'Transcriptions'") as caught:
        read_transcription(b"Transcriptions,Smith John HIV\na,b\n")
    assert "Smith" not in str(caught.value)


def test_a_header_is_shown_even_if_the_next_row_has_another_number_of_cells(tmp_path):
    with pytest.raises(ValueError, match="'Transcription', 'Medical Specialty'") as caught:
        notes_of(tmp_path, b"Transcription,Medical Specialty\nknee, swollen,Orthopedic\n")
    assert "knee" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        ["HIV positive", "Surgery"],
        ["Pt 74 y", " HIV positive", " fell at home", "Surgery"],
        ["HIV positive"],
        ["HIV positive since the last visit", "Transcription"],
        ["HIV positive", "Medical specialty", "HIV positive"],
        ["HIV positive", "74", "Transcription"],
        ["HIV positive", "2024-03-01", "Transcription"],
        ["HIV positive" + 30 * "x", "Medical specialty"],
        ["transcription", "transcription", "HIV positive"],
        ["transcription: HIV positive"],
        ["HIV positive", "specialty"],
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_of_a_first_row_that_may_be_a_note_the_number_of_cells_is_given(tmp_path, row, delimiter):
    with pytest.raises(ValueError, match="column") as caught:
        notes_of(tmp_path, csv_of([["knee", "Orthopedic"]], row, delimiter=delimiter))
    message = str(caught.value).partition("notes.csv")[2]
    assert "HIV" not in message
    assert str(len(row)) in re.findall(r"\d+", message)
