"""The last notes of a session: which are kept, how they are shown, and their file."""

import csv
import io

import pytest

from clinora.classifier import Prediction
from clinora.serving.history import Entry, History, history_csv, history_html

LABELS = ("=Knee", "Hip")


def entry(note, refer=False):
    prediction = Prediction(
        label=LABELS[0], index=0, confidence=0.91234, probabilities=(0.75, 0.25), refer=refer,
        tokens=3, truncated=False,
    )  # fmt: skip
    return Entry.of(note, prediction)


def history_of(*notes):
    history = History()
    for note in notes:
        history.add(entry(note))
    return history


def rows_of(history):
    text = history_csv(history, LABELS).decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_the_last_ten_notes_are_kept_the_newest_first():
    history = history_of(*(f"note {i}" for i in range(12)))
    assert [e.beginning for e in history.entries] == [f"note {i}" for i in range(11, 1, -1)]


def test_the_same_note_twice_in_a_row_is_one_entry():
    assert len(history_of("a", "a").entries) == 1
    assert len(history_of("a", "b", "a").entries) == 3


def test_a_long_note_is_kept_by_its_beginning_alone():
    note = "x" * 2_000 + "y" * 98_000
    history = history_of(note)
    assert history.entries[0].beginning == "x" * 2_000
    assert history.entries[0].is_of(note)
    assert not history.entries[0].is_of(note[:-1])
    assert rows_of(history)[0]["characters"] == "100000"


@pytest.mark.parametrize(("refer", "expected"), [(False, "no"), (True, "yes"), (None, "yes")])
def test_the_file_has_the_note_the_prediction_and_all_probabilities(refer, expected):
    history = History()
    history.add(entry('Knee, "left"\npain', refer))
    (row,) = rows_of(history)
    assert row["note"] == 'Knee, "left"\npain'
    assert row["predicted_class"] == "0"
    assert row["confidence"] == "0.9123"
    assert row["needs_person"] == expected
    assert row["probability of =Knee"] == "0.75"
    assert row["probability of Hip"] == "0.25"


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_no_cell_of_the_file_is_a_formula(start):
    history = history_of(f"{start}cmd|' /C calc'!A0")
    text = history_csv(history, LABELS).decode("utf-8-sig")
    for row in csv.reader(io.StringIO(text, newline="")):
        assert not any(cell.startswith(start) for cell in row)


def test_the_notes_are_shown_literally_side_by_side():
    fragment = history_html(history_of("<b>one</b>\n\ntwo", "three"), LABELS)
    assert fragment.count('class="history-card"') == 2
    assert "&lt;b&gt;one&lt;/b&gt;&#10;&#10;two" in fragment
    assert "\n" not in fragment
    assert fragment.index("three") < fragment.index("two")
