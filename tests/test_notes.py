"""Reading notes, classes and sides of the split."""

import csv
import hashlib

import pytest

from clinora.notes import PUBLISHED_CLASSES, Note, read_notes


@pytest.fixture
def write(tmp_path):
    def write(rows, header=("transcription", "medical_specialty"), name="notes.csv"):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write


def test_text_filed_twice_is_one_note_with_two_labels(write):
    notes = read_notes(write([("knee", "B"), (" knee ", " A"), ("heart", "A"), ("knee", "B")]))
    assert notes.classes == ("A", "B")
    assert [(n.text, n.filed, n.labels) for n in notes.notes] == [
        ("knee", (1, 0, 1), (0, 1)),
        ("heart", (0,), (0,)),
    ]


def test_rows_without_text_or_label_are_counted_and_left_out(write):
    notes = read_notes(write([("a", "A"), ("", "A"), ("   ", "B"), ("b", "B"), ("c", "")]))
    assert (notes.rows, notes.without_text, len(notes.notes)) == (5, 3, 2)


def test_text_that_pandas_would_take_for_missing_is_kept(write):
    notes = read_notes(write([("NA", "A"), ("None", "B")]))
    assert [n.text for n in notes.notes] == ["NA", "None"]


def test_published_classes_are_named_not_counted(write):
    rows = [(f"{name} {i}", name) for name in PUBLISHED_CLASSES for i in range(2)]
    notes = read_notes(write(rows + [(f"more {i}", "General Medicine") for i in range(9)]))
    assert notes.classes == PUBLISHED_CLASSES
    assert notes.other_classes == 9


def test_most_frequent_classes_are_counted(write):
    rows = [("a", "A"), ("b", "B"), ("c", "B"), ("d", "C"), ("e", "C"), ("f", "C")]
    assert read_notes(write(rows), classes=2).classes == ("B", "C")


def test_other_columns_can_be_named(write):
    path = write([("a", "x"), ("b", "y")], header=("text", "label"))
    assert read_notes(path, text_column="text", label_column="label").classes == ("x", "y")


def test_side_follows_the_hash_of_the_text():
    sides = {}
    for i in range(1000):
        text = f"note {i}"
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % 10
        sides.setdefault(bucket, set()).add(Note(text, (0,)).side)
    expected = {0: {"test"}, 1: {"test"}, 2: {"validation"}}
    assert sides == {bucket: expected.get(bucket, {"training"}) for bucket in range(10)}


def test_fingerprint_ignores_the_order_of_rows_and_sees_a_label(write):
    rows = [("a", "A"), ("b", "B"), ("c", "A")]
    one = read_notes(write(rows)).fingerprint
    assert read_notes(write(rows[::-1])).fingerprint == one
    assert read_notes(write([*rows, ("c", "B")])).fingerprint != one


def test_mtsamples_has_the_counts_that_the_csv_module_finds(data):
    by_text = {}
    with (data / "mtsamples.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            label, text = row["medical_specialty"].strip(), row["transcription"].strip()
            if text and label in PUBLISHED_CLASSES:
                by_text.setdefault(text, set()).add(label)
    notes = read_notes(data / "mtsamples.csv")
    assert {n.text: {notes.classes[i] for i in n.labels} for n in notes.notes} == by_text


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "bom.csv"
    path.write_bytes("\ufefftranscription,medical_specialty\na,A\nb,B\n".encode())
    assert len(read_notes(path).notes) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"text,medical_specialty\na,A\n", "no column 'transcription'.*text"),
        (b"transcription,medical_specialty\n", "no row has text and label"),
        (b"transcription,medical_specialty\na,A\nb,A\n", "leaves 1 class"),
        (b"transcription,medical_specialty\n\xff\xfe,A\nb,B\n", "not UTF-8"),
        (b'transcription,medical_specialty\n"a,A\n', "no CSV file"),
    ],
    ids=["empty", "column", "no rows", "one class", "latin-1", "open quote"],
)
def test_bad_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_notes(path)
    assert "\n" not in str(caught.value)


def test_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_notes(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_notes(tmp_path / "nowhere.csv")


def test_class_without_notes_is_refused_with_those_that_there_are(write):
    with pytest.raises(ValueError, match=r"'C'; it has: A, B"):
        read_notes(write([("a", "A"), ("b", "B")]), classes=("A", "C"))


def test_no_text_of_a_note_stands_in_an_error(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text('transcription,medical_specialty\na,A\nSECRET,x,y,z\n"SECRET\n')
    with pytest.raises(ValueError) as caught:
        read_notes(path)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None
