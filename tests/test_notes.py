"""Reading notes, classes and sides of the split: against the csv module's own counting."""

import csv
import hashlib
import math
import random
import re
from collections import Counter, defaultdict

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from clinora.commands import eval as eval_command
from clinora.commands import train as train_command
from clinora.notes import (
    PUBLISHED_CLASSES,
    Note,
    are_correct,
    check_class_name,
    check_class_names,
    choose_classes,
    clean_text,
    has_visible,
    is_correct,
    ordinary_case,
    read_notes,
    row_sides,
    side_of,
)

HEADER = "transcription,medical_specialty\n"


@pytest.fixture
def write(tmp_path):
    def write(rows, header=("transcription", "medical_specialty"), name="notes.csv"):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write


@pytest.fixture(scope="module")
def mtsamples(data):
    """Rows of the file with text and label, stripped: (text, label), by the csv module alone."""
    with (data / "mtsamples.csv").open(newline="", encoding="utf-8") as file:
        rows = [(r["transcription"].strip(), r["medical_specialty"].strip())
                for r in csv.DictReader(file)]  # fmt: skip
    return [(text, label) for text, label in rows if text and label]


# --- texts and labels -----------------------------------------------------------------------------


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


def test_a_row_with_nothing_visible_is_without_text(write):
    rows = [("a", "A"), ("\u200b\ufeff", "A"), ("\u3164 \u2800", "B"), ("b", "B")]
    notes = read_notes(write(rows))
    assert [note.text for note in notes.notes] == ["a", "b"]
    assert (notes.rows, notes.without_text) == (4, 2)


ANY_TEXT = strategies.text(strategies.characters(exclude_categories=()))  # also surrogates


@hypothesis.given(ANY_TEXT)
def test_a_clean_text_is_utf8_without_carriage_returns_and_stays_as_it_is(text):
    clean = clean_text(text)
    assert "\r" not in clean.encode().decode()
    assert clean_text(clean) == clean


@hypothesis.given(strategies.text(strategies.characters(exclude_categories=("Cs",))))
def test_cleaning_changes_line_ends_and_the_white_space_around_a_text_alone(text):
    assert clean_text(text) == "\n".join(re.split("\r\n|\r", text)).strip()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("cut \ud83d", "cut \ufffd"),
        ("\ude42 cut", "\ufffd cut"),
        ("\ud83d\ud83d\ude42", "\ufffd\U0001f642"),
        ("\ufefffever", "\ufefffever"),
    ],
    ids=["first half", "second half", "a half and a pair", "byte-order mark"],
)
def test_half_a_character_becomes_the_replacement_character(text, clean):
    assert clean_text(text) == clean


def test_a_text_in_capitals_is_written_in_lower_case_units_included():
    for text in (
        "SEVERE CHEST PAIN SINCE MONDAY. ECG SHOWS ST ELEVATION.",
        "NO EDEMA OF THE LEGS. CONTINUE ASPIRIN 81 mg DAILY AND METOPROLOL 25 mg.",
        "DOULEUR \u00c0 L'\u00c9PAULE GAUCHE DEPUIS LA CHUTE",
    ):
        assert ordinary_case(text) == text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "Severe chest pain. ECG shows ST elevation.",
        "PREOPERATIVE DIAGNOSIS: Torn meniscus, left knee. ANESTHESIA: General.",
        "NSTEMI. CABG X3. DNR.",  # 17 letters: it may be abbreviations alone
        "120/80, 72, 98.6, 16, 97%",
        "\u80f8\u75db\u4e09\u5929\u3002" * 10,
    ],
)
def test_any_other_text_keeps_its_case(text):
    assert ordinary_case(text) == text


SOME_LETTERS = strategies.text("aAbBzZ\u0130\u00df\u03a3\u00c9 .\ud800\U0001f642", max_size=60)


@hypothesis.given(SOME_LETTERS, SOME_LETTERS)
def test_only_texts_of_nine_capitals_in_ten_letters_change_and_never_in_length(first, second):
    """Places in the changed text are places in the text itself."""
    text = first + second.upper()
    letters = re.findall("[A-Za-z]", text)
    is_in_capitals = len(letters) >= 20 and len(re.findall("[A-Z]", text)) >= 0.9 * len(letters)
    changed = ordinary_case(text)
    assert len(changed) == len(text)
    assert changed.casefold() == text.casefold()
    if is_in_capitals:
        assert not re.search("[A-Z]", changed)
    else:
        assert changed == text


def test_no_note_of_mtsamples_changes(data):
    """So what was measured on them before texts in capitals were changed is still valid."""
    notes = read_notes(data / "mtsamples.csv", classes="all").notes
    assert [note for note in notes if ordinary_case(note.text) != note.text] == []


def test_equal_texts_have_equal_hashes_whatever_they_are_written_with():
    ways = ["Fever.\nCough.", " Fever.\r\nCough.\r\n", "Fever.\rCough.\t"]
    expected = hashlib.sha256(b"Fever.\nCough.").hexdigest()
    assert {Note(text, (0,)).sha256 for text in ways} == {expected}


def test_a_prediction_is_correct_when_it_is_one_of_the_labels():
    notes = [Note("a", (2, 0)), Note("b", (1,)), Note("c", (1, 1))]
    assert are_correct(notes, [0, 0, 1]).tolist() == [True, False, True]
    assert [is_correct(notes[0], index) for index in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("words", "classes"),
    [
        (None, None),
        (["3"], 3),
        (["all"], "all"),
        (["A"], ["A"]),
        (["B", "A"], ["A", "B"]),
        (["1", "2"], ["1", "2"]),
        (["²"], ["²"]),
    ],
)
def test_words_of_the_command_line_choose_classes(words, classes):
    assert choose_classes(words) == classes


def test_a_replacement_character_is_not_visible():
    assert not has_visible("\ufffd \ud83d")


@pytest.mark.parametrize("text", ["7", ".", "é", "e\u0301", "痛", "\U0001f468", "€", "\u200b x"])
def test_one_letter_digit_mark_or_symbol_is_visible(text):
    assert has_visible(text)


def test_near_empty_texts_are_counted_and_said(write):
    assert "2 shorter than 50" in str(
        read_notes(write([("x" * 49, "A"), ("x" * 50, "B"), ("y", "B")]))
    )


def test_text_that_pandas_would_take_for_missing_is_kept(write):
    notes = read_notes(write([("NA", "A"), ("None", "B")]))
    assert [n.text for n in notes.notes] == ["NA", "None"]


def test_other_columns_can_be_named(write):
    path = write([("a", "x"), ("b", "y")], header=("text", "label"))
    assert read_notes(path, text_column="text", label_column="label").classes == ("x", "y")


# --- classes --------------------------------------------------------------------------------------


def test_published_classes_are_named_not_counted(write):
    rows = [(f"{name} {i}", name) for name in PUBLISHED_CLASSES for i in range(2)]
    notes = read_notes(write(rows + [(f"more {i}", "General Medicine") for i in range(9)]))
    assert notes.classes == PUBLISHED_CLASSES
    assert notes.other_classes == 9


def test_most_frequent_classes_are_counted(write):
    rows = [("a", "A"), ("b", "B"), ("c", "B"), ("d", "C"), ("e", "C"), ("f", "C")]
    assert read_notes(write(rows), classes=2).classes == ("B", "C")


def test_all_classes_can_be_asked_for(write):
    rows = [(name, name) for name in (*PUBLISHED_CLASSES, "Urology")]
    assert read_notes(write(rows), classes="all").classes == (*PUBLISHED_CLASSES, "Urology")


def test_a_list_of_classes_keeps_its_order_and_is_counted_once(write):
    path = write([("a", "A"), ("b", "B"), ("c", "C")])
    notes = read_notes(path, classes=("C", "A", "C"))
    assert notes.classes == ("C", "A")
    assert {note.text: note.labels for note in notes.notes} == {"a": (1,), "c": (0,)}


@pytest.mark.parametrize(
    "name",
    [
        "Hals\u00a0Nasen\u00a0Ohren",  # no-break spaces
        "内科\u3000外科",  # an ideographic space
        "می\u200cخواهم",  # a zero-width non-joiner, as Persian spells it
        "\U0001f468\u200d\u2695\ufe0f doctor",  # an emoji with a joiner and a variation selector
        "\u2764\ufe0f\u200d\U0001f525",
        "Chirurgie\u202fvisc\u00e9rale",  # a narrow no-break space
        "ക്ഷയം കാന്\u200dസര്\u200d",  # Malayalam, with joiners after viramas, also at the end
        "ශ්\u200dරී",
        "x" * 100,
    ],
)
def test_a_class_name_of_any_script_is_kept(write, name):
    check_class_name(name)
    assert name in read_notes(write([("a", name), ("b", "B")])).classes


@pytest.mark.parametrize(
    "name",
    [
        "A\nB",
        "A\tB",
        "A\x1b[2J",
        "A\x85B",
        "A\u2028B",
        "\u202eA",  # right-to-left override
        "A\u2066B",
        "A\u200fB",
        "A\u200bB",  # zero-width space
        "\ufeffA",
        "A\u00adB",
        "A\u200d",  # joiners that join nothing would make two names look the same
        "\u200dA",
        "A \u200cB",
        "A\u200d\u200dB",
        "ക്\u200d\u200d",
        "\u200dക",
        "A\U000e0041",
        "A\ud800",
        "\u3164",
        "\u2800\ufe0f",
        "",
        "x" * 101,
    ],
)
def test_a_class_name_that_cannot_be_shown_is_refused_without_quoting_it(name):
    with pytest.raises(ValueError, match=r"^it has ") as caught:
        check_class_name(name)
    assert str(caught.value).isascii() and str(caught.value).isprintable()
    assert name not in str(caught.value) or not name


# --- sides ----------------------------------------------------------------------------------------


def test_side_follows_the_hash_of_the_text():
    sides = {}
    for i in range(1000):
        text = f"note {i}"
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % 10
        sides.setdefault(bucket, set()).add(side_of(text))
    expected = {0: {"test"}, 1: {"test"}, 2: {"validation"}}
    assert sides == {bucket: expected.get(bucket, {"training"}) for bucket in range(10)}


def test_a_texts_side_does_not_depend_on_what_stands_beside_it(write):
    rows = [(f"note {i}", "AB"[i % 2]) for i in range(60)]
    whole, part = read_notes(write(rows)), read_notes(write(rows[::-2] + rows[:1]))
    sides = {n.text: side for n, side in zip(whole.notes, whole.sides, strict=True)}
    assert all(sides[n.text] == s for n, s in zip(part.notes, part.sides, strict=True))


@pytest.mark.parametrize("rows", [1, 9, 10, 11, 2603])
def test_the_published_split_rounds_its_tenth_up(rows):
    counts = Counter(row_sides(rows))
    assert counts["test"] == math.ceil(rows / 10)
    assert counts["validation"] == min(math.ceil(rows / 10), rows - counts["test"])
    assert counts.total() == rows


def test_seeds_never_move_the_test_set(write):
    """Nor does any random state that a caller left behind."""
    path, splits = write([(f"note {i}", "AB"[i % 2]) for i in range(60)]), set()
    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        splits.add(tuple(read_notes(path, split=s).split_fingerprint for s in ("texts", "rows")))
    assert len(splits) == 1


def test_split_by_rows_each_row_has_its_own_label_in_the_files_order(write):
    notes = read_notes(write([("a", "A"), ("b", "B"), ("a", "B"), ("a", "A")]), split="rows")
    assert [(n.text, n.filed) for n in notes.notes] == [
        ("a", (0,)), ("b", (1,)), ("a", (1,)), ("a", (0,)),
    ]  # fmt: skip


def test_a_split_of_another_name_is_refused(write):
    with pytest.raises(ValueError, match=r"'thirds'.* texts, rows"):
        read_notes(write([("a", "A"), ("b", "B")]), split="thirds")


# --- fingerprints ---------------------------------------------------------------------------------


SPLIT_HEADER = ("transcription", "medical_specialty", "split")


def test_a_column_of_the_file_decides_the_splits(write):
    names = ("training", "validation", "test", "train", "valid", "Val", "DEV", " Test ")
    rows = [(f"note {i}", "AB"[i % 2], name) for i, name in enumerate(names)]
    notes = read_notes(write(rows, SPLIT_HEADER), split_column="split")
    numbers = {
        side: [int(note.text.split()[1]) for note in notes.on(side)]
        for side in ("training", "validation", "test")
    }
    assert numbers == {"training": [0, 3], "validation": [1, 4, 5, 6], "test": [2, 7]}


def test_equal_texts_in_one_split_are_one_note(write):
    rows = [("a", "A", "test"), ("b", "B", "train"), ("a", "B", "test")]
    notes = read_notes(write(rows, SPLIT_HEADER), split_column="split")
    assert [note.labels for note in notes.on("test")] == [(0, 1)]


def test_a_text_in_several_splits_stays_in_the_one_that_is_measured(write):
    rows = [
        ("a", "A", "train"), ("b", "B", "val"), ("c", "A", "train"),
        ("a", "B", "test"), (" b ", "A", "train"), ("a", "A", "val"), ("a", "A", "train"),
    ]  # fmt: skip
    notes = read_notes(write(rows, SPLIT_HEADER), split_column="split")
    texts_and_labels = {
        side: [(note.text, note.labels) for note in notes.on(side)]
        for side in ("training", "validation", "test")
    }
    assert texts_and_labels == {
        "training": [("c", (0,))],
        "validation": [("b", (1,))],
        "test": [("a", (1,))],  # labels of rows that are left out do not count
    }
    assert notes.repeated == 4


def test_a_cell_that_names_no_split_is_refused_without_quoting_it(write):
    rows = [("a", "A", "test"), ("b", "B", "secret")]
    with pytest.raises(ValueError, match="row 2 ") as caught:
        read_notes(write(rows, SPLIT_HEADER), split_column="split")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_column": "transcription"}, "cannot hold the splits"),
        ({"split_column": "medical_specialty"}, "cannot hold the splits"),
        ({"split_column": "split", "split": "rows"}, "leave out split 'rows'"),
    ],
    ids=str,
)
def test_a_column_of_splits_that_contradicts_another_option_is_refused(write, options, message):
    path = write([("a", "A", "test"), ("b", "B", "train")], SPLIT_HEADER)
    with pytest.raises(ValueError, match=message):
        read_notes(path, **options)


def test_a_row_that_is_left_out_needs_no_split(write):
    rows = [("a", "A", "test"), ("b", "B", "train"), ("", "A", ""), ("c", "", "secret")]
    notes = read_notes(write(rows, SPLIT_HEADER), split_column="split")
    assert (len(notes.notes), notes.without_text) == (2, 2)


def test_a_class_under_a_similar_name_is_not_taken_for_a_missing_one(write):
    path = write([("a", "Surgery"), ("b", "radiology")])
    with pytest.raises(ValueError, match="'radiology'"):
        read_notes(path, classes=("Radiology", "Surgery"), may_lack_classes=True)


def test_a_file_may_lack_classes_where_that_is_allowed_but_not_all(write):
    path = write([("a", "A"), ("b", "B"), ("c", "C")])
    notes = read_notes(path, classes=("B", "C", "D"), may_lack_classes=True)
    assert (notes.classes, len(notes.notes), notes.other_classes) == (("B", "C", "D"), 2, 1)
    with pytest.raises(ValueError, match="no notes of class 'D', 'E'"):
        read_notes(path, classes=("D", "E"), may_lack_classes=True)


def test_fingerprint_ignores_the_order_of_rows_and_sees_a_label(write):
    rows = [("a", "A"), ("b", "B"), ("c", "A")]
    one = read_notes(write(rows)).fingerprint
    assert read_notes(write(rows[::-1])).fingerprint == one
    assert read_notes(write([("a", "B"), ("b", "B"), ("c", "A")])).fingerprint != one
    assert read_notes(write([*rows, ("c", "B")])).fingerprint != one


def test_fingerprint_sees_a_class_that_is_called_otherwise(write):
    fingerprints = {read_notes(write([("a", "A"), ("b", name)])).fingerprint for name in "BC"}
    assert len(fingerprints) == 2


def test_split_fingerprint_sees_a_text_on_another_side(write, monkeypatch):
    path = write([(f"note {i}", "AB"[i % 2]) for i in range(20)])
    before = read_notes(path)
    monkeypatch.setattr(
        "clinora.notes.side_of",
        lambda text: "test" if text == before.on("training")[0].text else side_of(text),
    )
    after = read_notes(path)
    assert after.fingerprint == before.fingerprint
    assert after.split_fingerprint != before.split_fingerprint


# --- MTSamples ------------------------------------------------------------------------------------


def test_mtsamples_texts_have_the_label_sets_that_the_csv_module_finds(data, mtsamples):
    by_text = defaultdict(list)
    for text, label in mtsamples:
        if label in PUBLISHED_CLASSES:
            by_text[text].append(label)
    notes = read_notes(data / "mtsamples.csv")
    assert {n.text: [notes.classes[i] for i in n.filed] for n in notes.notes} == by_text
    several = sum(len(set(labels)) > 1 for labels in by_text.values())
    assert f"{len(by_text):,} different texts in 5 classes ({several:,} with several" in str(notes)


def test_mtsamples_five_most_frequent_are_not_the_published_five(data, mtsamples):
    counts = Counter(label for _, label in mtsamples)
    top = {label for label, _ in counts.most_common(5)}
    assert top - set(PUBLISHED_CLASSES) == {"General Medicine"}  # passes Radiology here
    assert read_notes(data / "mtsamples.csv", classes=5).classes == tuple(sorted(top))
    assert read_notes(data / "mtsamples.csv").classes == PUBLISHED_CLASSES
    assert read_notes(data / "mtsamples.csv", classes="all").classes == tuple(sorted(counts))


def test_mtsamples_counts_of_rows_add_up(data, mtsamples):
    notes = read_notes(data / "mtsamples.csv")
    with (data / "mtsamples.csv").open(newline="", encoding="utf-8") as file:
        rows = sum(1 for _ in csv.reader(file)) - 1
    assert notes.rows == rows
    assert notes.without_text == rows - len(mtsamples)
    assert notes.other_classes == sum(label not in PUBLISHED_CLASSES for _, label in mtsamples)


def test_mtsamples_sides_are_counted_by_hash(data, mtsamples):
    texts = {text for text, label in mtsamples if label in PUBLISHED_CLASSES}
    last = Counter(int(hashlib.sha256(t.encode()).hexdigest(), 16) % 10 for t in texts)
    notes = read_notes(data / "mtsamples.csv")
    assert len(notes.on("test")) == last[0] + last[1]
    assert len(notes.on("validation")) == last[2]
    assert len(notes.on("training")) == sum(last[bucket] for bucket in range(3, 10))


def test_mtsamples_row_split_puts_texts_on_both_sides_and_the_text_split_none(data, mtsamples):
    rows = [(text, label) for text, label in mtsamples if label in PUBLISHED_CLASSES]
    by_row = read_notes(data / "mtsamples.csv", split="rows")
    assert [(n.text, by_row.classes[n.filed[0]]) for n in by_row.notes] == rows
    assert len(by_row.on("test")) == math.ceil(len(rows) / 10)
    by_text = read_notes(data / "mtsamples.csv")
    twins = {}
    for notes in (by_row, by_text):
        training = {n.text for n in notes.on("training")}
        twins[notes.split] = sum(n.text in training for n in notes.on("test"))
    assert twins["texts"] == 0
    assert twins["rows"] > 0


# --- files that are no such file, or hostile ------------------------------------------------------


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "bom.csv"
    path.write_bytes(("\ufeff" + HEADER + "a,A\nb,B\n").encode())
    assert len(read_notes(path).notes) == 2


@pytest.mark.parametrize("formula", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "=1+1"])
def test_a_formula_is_read_as_plain_text(write, formula):
    notes = read_notes(write([(formula, "A"), ("b", formula)]))
    assert notes.notes[0].text == formula
    assert set(notes.classes) == {formula, "A"}


def test_windows_line_ends_give_the_same_notes_and_hashes(tmp_path):
    unix = (HEADER + '"line one\nline two",A\nb,B\n').encode()
    (tmp_path / "unix.csv").write_bytes(unix)
    (tmp_path / "windows.csv").write_bytes(unix.replace(b"\n", b"\r\n"))
    (tmp_path / "mac.csv").write_bytes(unix.replace(b"\n", b"\r"))
    one, *others = (read_notes(tmp_path / f"{name}.csv") for name in ("unix", "windows", "mac"))
    for other in others:
        assert other == one
        assert other.split_fingerprint == one.split_fingerprint


def test_a_note_of_ten_megabytes_is_read(write):
    text = "word " * 2_000_000
    notes = read_notes(write([(text, "A"), ("b", "B")]))
    assert notes.notes[0].text == text.strip()


# Each file holds the words SECRET PATIENT in a note, which no message may say again.
BAD_FILES = {
    "empty": (b"", "is empty"),
    "no rows": (HEADER, "no row has both text and label$"),
    "no text": (HEADER + "  ,A\n,B\n", "no row has both text and label$"),
    "columns the other way round": (
        HEADER + "".join(f"Class {i % 3},SECRET PATIENT {i} has pain\n" for i in range(60)),
        "60 classes for 3 texts: is 'transcription' the column of the notes",
    ),
    "no such column": ("transcriptions,class\nSECRET PATIENT,A\n",
                       r"no column.*'transcriptions'"),
    "no header": ("SECRET PATIENT with a long history of nothing,A\nSECRET PATIENT b,B\n",
                  "no column 'transcription'.* 2 cells"),
    "no header, short notes": ("SECRET PATIENT,Surgery\nknee,Orthopedic\n",
                               "no column 'transcription'.* 2 cells"),
    "no header, a similar word": ("Transcriptions,SECRET PATIENT\nknee,Orthopedic\n",
                                  "no column 'transcription'.* 2 cells.*'Transcriptions'"),
    "no header, commas": ("Pt 74 y, SECRET PATIENT, fell,Surgery\n", "no column 'transcription'"),
    "JSON lines": ('{"medical_specialty": "A", "transcription": "a"}\n{"SECRET PATIENT": "b"}\n',
                   "row 2 .*line 2.* has no 'transcription'"),
    "doubled column": ("transcription,transcription,medical_specialty\nSECRET PATIENT,b,A\n",
                       "2 columns 'transcription'"),
    "header again": (HEADER + "SECRET PATIENT,A\n" + HEADER + "b,B\n", "row 2 .*repeats the head"),
    "one class": (HEADER + "SECRET PATIENT,A\nb,A\n", "leaves 1 class|no notes of class"),
    "one class, which is a note": (HEADER + "a,SECRET PATIENT\nb,SECRET PATIENT\n",
                                   "leaves 1 class|no notes of class"),
    "latin-1 in a line": ((HEADER + "SECRET PATIENT\u20ac,A\n").encode() + b"caf\xe9,B\n",
                          r"not UTF-8 \(in line 3\)"),
    "cut in a letter": ((HEADER + "SECRET PATIENT,A\nb\u20ac").encode()[:-1],
                        r"not UTF-8 \(in line 3\)"),
    "UTF-16": ((HEADER + "SECRET PATIENT,A\n").encode("utf-16"), "UTF-16"),
    "NUL": (HEADER + "a,A\nSECRET PATIENT\0,B\n", "NUL byte in line 3"),
    "open quote": (HEADER + 'a,A\n"SECRET PATIENT,B\n', r"CSV file.*line 3"),
    "text after a quote": (HEADER + '"a" SECRET PATIENT,B\n', r"CSV file.*line 2"),
    "too many fields": (HEADER + "a,A\nSECRET PATIENT,with,commas,A\n",
                        r"row 2 .*line 3\) has 4 fields, the header has 2"),
    "too few fields": (HEADER + '"a\nb",A\nSECRET PATIENT\n',
                       r"row 2 .*line 4\) has 1 field, the header has 2$"),
    "control characters": (HEADER + "SECRET PATIENT,A\x1b[2J\n", "row 1 .*U\\+001B"),
    "class name of 101": (HEADER + "a,SECRET PATIENT" + 87 * "x" + "\n", "at most 100"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_one_clear_line_without_text_of_a_note(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_notes(path)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert type(caught.value) is ValueError  # a UnicodeDecodeError would carry the bytes


@pytest.mark.parametrize("command", [train_command, eval_command], ids=["train", "eval"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_commands_say_no_text_of_a_bad_file(tmp_path, monkeypatch, capsys, command, kind):
    monkeypatch.chdir(tmp_path)
    content, _ = BAD_FILES[kind]
    (tmp_path / "bad.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as caught:
        command.main(["--notes", "bad.csv", "--device", "cpu"])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "bad.csv" in said.err
    assert said.err.count("\n") == 1
    assert "SECRET" not in said.out + said.err


@pytest.mark.parametrize(
    "rows",
    [
        [("short note", "A"), ("short note", "B"), ("short note", "C")],
        [("pain", "Cardiovascular / Pulmonary"), ("knee", "Orthopedic")],
    ],
    ids=["more classes than texts", "classes longer than texts"],
)
def test_few_or_short_notes_are_not_taken_for_classes(write, rows):
    assert len(read_notes(write(rows)).classes) == len(rows)


def test_a_class_name_of_a_hundred_characters_is_kept(write):
    assert read_notes(write([("a", "x" * 100), ("b", "B")])).classes == ("B", "x" * 100)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is an empty folder.*sub-folder"):
        read_notes(tmp_path)


def test_notes_that_may_not_be_downloaded_are_only_looked_for_here(monkeypatch):
    def look(*_names, local_files_only, **_options):
        assert local_files_only
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr("clinora.notes.huggingface_hub.hf_hub_download", look)
    with pytest.raises(ValueError, match="not in the cache"):
        read_notes("mtsamples", download=False)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_notes(tmp_path / "nowhere.csv")


def test_one_column_cannot_be_notes_and_classes(write):
    with pytest.raises(ValueError, match="cannot hold both"):
        read_notes(write([("a", "A"), ("b", "B")]), label_column="transcription")


def test_a_class_without_notes_is_refused_with_similar_ones_of_the_file(write):
    path = write([("a", "Cardiovascular / Pulmonary"), ("b", "HIV positive"), ("c", "Surgery")])
    with pytest.raises(ValueError, match="'cardiovascular/pulmonary'") as caught:
        read_notes(path, classes=("Surgery", "cardiovascular/pulmonary"))
    assert "'Cardiovascular / Pulmonary'" in str(caught.value)
    assert "HIV" not in str(caught.value)


@pytest.mark.parametrize("rows", [2, 50, 101])
def test_classes_that_may_be_notes_are_not_listed(write, rows):
    """The column of the labels may be given wrongly; its cells are then words about a patient."""
    path = write([(f"note {i} of a long text", f"HIV positive {i}") for i in range(rows)])
    with pytest.raises(ValueError, match="'Orthopedic', 'Surgery'") as caught:
        read_notes(path, classes=("Orthopedic", "Surgery"))
    assert "HIV" not in str(caught.value)


def test_the_message_about_a_wrong_class_name_quotes_none():
    for name in ("HIV positive\tman", "HIV positive, " * 20):
        with pytest.raises(ValueError, match="label 1 ") as caught:
            check_class_names(["A", name])
        assert "HIV" not in str(caught.value)
