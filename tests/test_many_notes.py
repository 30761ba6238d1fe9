"""The tab "Many notes": a file of notes, classified row by row."""

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import openpyxl
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from fastapi.testclient import TestClient

import clinora
from clinora.notes import Note, read_notes
from clinora.serving import reading
from clinora.serving.app import create_app
from clinora.serving.batcher import BusyError
from clinora.serving.files import MOST_ROWS
from clinora.serving.server import MOST_BODY_BYTES, MOST_FILE_BYTES
from clinora.serving.storage import Storage
from clinora.training import encode
from tests.served import CANARY, calibration, call, join, messages

NOTE = "Severe chest pain. No fever!  ECG: normal.\nThe knee, swollen."


class RefusedError(Exception):
    """An upload was refused; the message is the answer's text."""


@pytest.fixture
def client(visitor):
    """Someone new to one app, which takes longer to make than most of these tests."""
    return visitor


def upload(client, text, name="notes.csv"):
    """Upload a file; give what the page sends for it with an event."""
    data = text if isinstance(text, bytes) else text.encode()
    client.get("/config")  # brings the visit's cookie
    answer = client.post("/gradio_api/upload", files={"files": (name, data)})
    if answer.status_code != 200:
        raise RefusedError(answer.text)
    (path,) = answer.json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def table_of(rows, header=("id", "transcription")):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def classify(client, text, session="one", **options):
    """Upload and classify a file; give the rows of the result, or the message of an error."""
    answer = ask(client, text, session, **options)
    if isinstance(answer, str):
        return answer
    _upload, _column, _kept, _counts, preview, file = answer
    content = client.get(f"/gradio_api/file={file['path']}").content
    assert content.startswith(b"\xef\xbb\xbf")  # without it, Excel reads no umlauts
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
    assert [row[0] for row in preview["data"]] == [int(row["row"]) for row in rows[:20]]
    return rows


def ask(client, text, session="one", column="transcription", kept=(), name="notes.csv"):
    """Upload and classify a file; give what the page shows, or the message of an error."""
    try:
        data = upload(client, text, name)
    except RefusedError as refused:
        return str(refused)
    event, answer = call(client, "classify_file", data, column, list(kept), session=session)
    if event == "error":
        return answer["error"]
    return answer


def test_each_row_has_a_prediction_or_an_error(client, classifier):
    notes = [f"{NOTE} {i * 37} {CANARY}" for i in range(160)]
    empty = {40: "", 41: "\u200b\ufeff \u2800"}
    content = table_of([[i, empty.get(i, note)] for i, note in enumerate(notes)])
    content += "only one field\r\n"
    rows = classify(client, content)
    assert [int(row["row"]) for row in rows] == list(range(1, 162))
    assert [rows[i]["error"] for i in empty] == ["The note is empty."] * 2
    assert rows[160]["error"] == "The row has 1 field, the header has 2."
    expected = classifier(notes)
    for i, (row, prediction) in enumerate(zip(rows, expected, strict=False)):
        if i not in empty:
            assert row["predicted_class"] == str(prediction.index)
            assert row["label"] == prediction.label
            assert row["tokens"] == str(prediction.tokens)
            assert row["error"] == ""
    assert not any(CANARY in value for row in rows for value in row.values())


def test_the_confidence_in_a_file_is_rounded(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.7))
    notes = [f"{NOTE} {i * 37}" for i in range(20)]
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        rows = classify(client, table_of([[i, note] for i, note in enumerate(notes)]))
    for row, prediction in zip(rows, classifier(notes), strict=True):
        assert re.fullmatch(r"0\.\d{1,4}|1\.0", row["confidence"])
        assert float(row["confidence"]) == pytest.approx(prediction.confidence, abs=6e-5)
        assert row["refer"] == {True: "yes", False: "no"}[prediction.refer]
    assert len({row["refer"] for row in rows}) == 2


def test_the_progress_of_a_file_is_shown(client, monkeypatch):
    batcher = client.app.state.batcher
    submit = batcher.submit
    monkeypatch.setattr(batcher, "submit", lambda *a, **k: time.sleep(0.5) or submit(*a, **k))
    file = upload(client, table_of([[i, NOTE] for i in range(40)]))
    joined = join(client, "classify_file", file, "transcription", [], session="one")
    assert joined.status_code == 200
    events = json.dumps(list(messages(client, "one")))
    shown = re.findall(r'"index":\s*(\d+),\s*"length":\s*(\d+),\s*"unit":\s*"batches"', events)
    assert sorted(set(shown))[:3] == [("0", "3"), ("1", "3"), ("2", "3")]


def test_after_classification_no_file_holds_a_note(client):
    text = table_of([[1, f"{NOTE} {CANARY}"]])
    folder = Path(upload(client, text)["path"]).parents[1]
    before = {path for path in folder.rglob("*") if path.is_file()}
    rows = classify(client, text)
    assert len(rows) == 1
    after = {path for path in folder.rglob("*") if path.is_file()}
    (added,) = after - before  # the result alone
    assert CANARY.encode() not in added.read_bytes()


def test_equal_uploads_are_separate_files(client):
    text = table_of([[1, NOTE]])
    first = upload(client, text)
    second = upload(client, text)
    for data in (first, second):
        assert call(client, "classify_file", data, "transcription", [])[0] == "complete"
    answer = join(client, "classify_file", second, "transcription", [], session="one")
    assert answer.status_code == 422  # it was removed when it had been read


def test_a_label_that_looks_like_a_formula_is_escaped(classifier, tmp_path):
    labels = ("=1+1", "+two", "-three", "@four", "five")
    run = clinora.Classifier(classifier.model, classifier.tokenizer, labels, token_limit=128)
    with TestClient(create_app(run, tmp_path), "http://127.0.0.1") as client:
        rows = classify(client, table_of([[i, f"{NOTE} {i * 37}"] for i in range(20)]))
    assert {row["label"] for row in rows} <= {"'=1+1", "'+two", "'-three", "'@four", "five"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (table_of([[1, NOTE]], header=("id", "note")), "The file has no column 'transcription'"),
        ("transcription\r\n", "The file has no rows"),
        ("", "The file is empty"),
        (table_of([[1, "é"]]).encode("latin-1"), "The file is not UTF-8"),
        (table_of([[1, "x"]] * (MOST_ROWS + 1)), "The file has more than 2,000 rows"),
        (table_of([[1, NOTE]], header=("transcription",) * 2), "no column whose name"),
        (table_of([[1, 2, NOTE]], header=("id", *("transcription",) * 2)), "has no column"),
        (table_of([[1, "a"], [2, "b"]]) + '3,"never closed\r\n4,d\r\n', "begins in line 4 "),
        (table_of([[1, NOTE]]).encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04" + table_of([[1, NOTE]]).encode(), "Excel"),
        ('{\n"transcription": "fever"}\n', "JSON"),
    ],
    ids=[
        "column", "rows", "empty", "latin-1", "many", "alone twice", "twice", "quote", "utf-16",
        "xlsx", "json",
    ],
)  # fmt: skip
def test_an_unreadable_file_gives_a_message(client, content, words):
    assert words in classify(client, content)


def test_every_row_has_its_place_in_the_result(client):
    rows = classify(client, "transcription\r\nfever\r\n\r\ncough\r\n")
    assert [row["error"] for row in rows] == ["", "The note is empty.", ""]


def test_a_repeated_header_is_no_note(client):
    table = "\ufefftranscription ,id\r\nfever,1\r\n"
    rows = classify(client, table * 2)
    assert ["header" in row["error"] for row in rows] == [False, True, False]
    assert rows[1]["label"] == ""


def test_a_file_of_one_column_needs_no_quotes(client, classifier):
    notes = ["Kopfschmerzen, Fieber", "Husten; Schnupfen"]
    rows = classify(client, "transcription\n" + "".join(f"{note}\n" for note in notes))
    assert [row["label"] for row in rows] == [answer.label for answer in classifier(notes)]


@pytest.mark.parametrize("delimiter", [";", "\t"], ids=["semicolon", "tab"])
def test_a_file_with_another_delimiter_has_the_same_result(client, delimiter):
    table = [["transcription", "id"], *([f"{NOTE}; {i},{i}", i] for i in range(3))]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(table)
    expected = classify(client, table_of(table[1:], header=table[0]))
    assert classify(client, text.getvalue()) == expected
    assert not any(row["error"] for row in expected)


@pytest.mark.parametrize(
    "content",
    [
        'transcription,BP (sys;dia;mean)\r\n"Fever, cough",120\r\n',
        "transcription,BP (sys;dia;mean)\r\nFever,120;80;93\r\n",
        'weight, kg;height, cm;transcription\r\n70;180;"Fever; cough"\r\n',
        'transcription;a, b, c\r\n"Fever; cough";"x"\r\n',
        'transcription,a;b\r\n"Fever, cough",x\r\n',
        'transcription,"specialty (A; B; C)"\n\n"Pain; ""bad"" x","A"\n',
    ],
)
def test_a_header_with_several_delimiters_is_read_with_the_one_of_its_columns(client, content):
    assert [row["error"] for row in classify(client, content)] == [""]


@pytest.mark.parametrize(
    ("pasted", "plain"),
    [
        ("Fever.\r\nCough.\r\n", "Fever.\nCough."),
        ("Fever.\rCough.", "Fever.\nCough."),
        ("Knee pain \udbc0 after a fall.", "Knee pain \ufffd after a fall."),
        ("\udc00", None),
    ],
    ids=["Windows", "Mac", "half a character", "half a character alone"],
)
def test_a_pasted_text_has_the_same_result_everywhere(client, classifier, tmp_path, pasted, plain):
    def post(path, body):
        return client.post(
            path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )

    answer = post("/v1/classify", {"notes": [pasted]}).json()["results"][0]
    config = client.get("/config").json()
    numbers = {event["api_name"]: event["id"] for event in config["dependencies"]}
    event = {"fn_index": numbers["predict"], "session_hash": "one", "data": [pasted, None]}
    assert post("/gradio_api/queue/join", event).status_code == 200
    shown, *_ = [m["output"] for m in messages(client, "one") if "output" in m]
    if plain is None:
        assert answer["error"] == "The note is empty."
        assert shown["error"] == "Enter a clinical note first."
        with pytest.raises(ValueError, match="note 1 of 1 is empty"):
            classifier([pasted])
        return
    expected = classifier([plain])[0]
    assert classifier([pasted]) == [expected]
    assert list(answer["probabilities"].values()) == list(expected.probabilities)
    assert shown["data"][1] == expected.as_json()
    by_label = {row["label"]: row["confidence"] for row in shown["data"][3]["confidences"]}
    assert [by_label[label] for label in classifier.labels] == list(expected.probabilities)
    ids = classifier.tokenizer.encode(plain)
    assert encode(classifier, [Note(pasted, (0,))]).ids[0].tolist() == ids

    if pasted.isascii():  # UTF-8, and so a file, cannot hold half a character
        header = ("transcription", "medical_specialty")
        content = table_of([[pasted, "A"], ["rash", "B"]], header)
        (tmp_path / "notes.csv").write_bytes(content.encode())
        assert read_notes(tmp_path / "notes.csv").notes[0].text == plain
        row = classify(client, content)[0]
        assert (row["label"], row["tokens"]) == (expected.label, str(len(ids)))


def test_a_file_may_be_larger_than_a_request_but_not_without_bound(client):
    rows = [[i, "x" * 9_000] for i in range(200)]
    assert len(table_of(rows)) > MOST_BODY_BYTES
    assert upload(client, table_of(rows))
    files = {"files": ("notes.csv", b"x" * (MOST_FILE_BYTES + 10_001))}
    assert client.post("/gradio_api/upload", files=files).status_code == 413


def test_three_large_files_leave_room_for_single_notes(client, classifier):
    """Three files of 160 rows each do not fill the queue of 64: every single note is accepted."""
    text = table_of([[i, f"{NOTE} {i}"] for i in range(160)])
    done = []
    statuses = []

    def one(session):
        done.append(classify(client, text, session))

    files = [threading.Thread(target=one, args=(session,)) for session in "abc"]
    for thread in files:
        thread.start()
    while any(thread.is_alive() for thread in files):
        statuses.append(client.post("/v1/classify", json={"note": "fever"}).status_code)
    assert set(statuses) == {200} and len(statuses) > 3
    assert [len(rows) for rows in done] == [160] * 3
    assert not any(row["error"] for rows in done for row in rows)


def test_rows_that_are_refused_have_an_error_and_the_others_a_prediction(client, monkeypatch):
    batcher = client.app.state.batcher
    submit = batcher.submit
    calls = []

    def full_at_times(notes, *arguments, **options):
        calls.append(len(notes))
        if len(calls) == 2:
            raise BusyError
        return submit(notes, *arguments, **options)

    monkeypatch.setattr(batcher, "submit", full_at_times)
    rows = classify(client, table_of([[i, f"{NOTE} {i}"] for i in range(40)]))
    assert [row["error"] for row in rows] == [""] * 16 + ["The service was busy."] * 16 + [""] * 8
    assert all(bool(row["label"]) != bool(row["error"]) for row in rows)


def test_a_row_that_is_far_too_long_is_a_row_with_an_error(client):
    rows = classify(client, table_of([[1, "x" * 1_100_000], [2, NOTE]]))
    assert rows[0]["error"] == "The note has 1,100,000 characters, more than 100,000."
    assert rows[1]["error"] == ""


# --- the columns ----------------------------------------------------------------------------------

HEADER = ["case", "date", "text"]
CASES = [
    ["-3", "2026-03-01", f"{NOTE} a"],
    ["007", "", f"{NOTE} b"],
    ["=1+1", "2026-03-03", f"{NOTE} c"],
    ["+49 30 1", "2026-03-04", ""],
]
KEPT = ["-3", "007", "'=1+1", "'+49 30 1"]


def json_lines():
    rows = (dict(zip(HEADER, row, strict=True)) for row in CASES)
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def parquet():
    columns = zip(*CASES, strict=True)
    table = pyarrow.table(dict(zip(HEADER, map(list, columns), strict=True)))
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def workbook(rows=(HEADER, *CASES)):
    book = openpyxl.Workbook()
    for number, row in enumerate(rows, 1):
        for place, cell in enumerate(row, 1):
            book.active.cell(number, place, cell).data_type = "s"  # "=1+1" is a text here
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


FILES = {
    "cases.csv": table_of(CASES, HEADER).encode(),
    "cases.csv.gz": gzip.compress(table_of(CASES, HEADER).encode()),
    "cases.jsonl": json_lines(),
    "cases.jsonl.gz": gzip.compress(json_lines()),
    "cases.parquet": parquet(),
    "cases.xlsx": workbook(),
}


def offered(client, content, name="notes.csv"):
    """Upload a file; give the choices and the value of both lists of columns."""
    event, answer = call(client, "choose_columns", upload(client, content, name))
    assert event == "complete"
    lists = []
    for update in answer:
        lists.append(([value for _name, value in update["choices"]], update["value"]))
    return lists


@pytest.mark.parametrize("name", FILES)
def test_the_columns_of_any_table_are_offered_and_an_id_is_kept(client, classifier, name):
    column, kept = offered(client, FILES[name], name)
    assert column == (HEADER, "text")
    assert kept == (HEADER, [])
    rows = classify(client, FILES[name], column="text", kept=["case"], name=name)
    assert list(rows[0])[:3] == ["row", "case", "predicted_class"]
    assert [row["case"] for row in rows] == KEPT
    labels = [prediction.label for prediction in classifier([row[2] for row in CASES[:3]])]
    assert [row["label"] for row in rows] == [*labels, ""]
    assert [row["error"] for row in rows] == ["", "", "", "The note is empty."]


@pytest.mark.parametrize(
    ("header", "names", "suggested"),
    [
        (("x", "transcription", "y"), ["x", "transcription", "y"], "transcription"),
        (("x", "notes", "y"), ["x", "notes", "y"], "notes"),
        (("x", "x", "y"), ["y"], "y"),
        (("", "x", "y"), ["x", "y"], "x"),
    ],
)
def test_of_the_columns_the_one_with_the_notes_is_suggested(client, header, names, suggested):
    content = table_of([["knee", "Knee pain and fever.", "a"]] * 3, header)
    assert offered(client, content) == [(names, suggested), (names, [])]


def test_the_usual_name_is_suggested_whatever_the_lengths_are(client):
    content = table_of([["a long text about a knee", "fever"]], ("summary", "transcription"))
    assert offered(client, content)[0][1] == "transcription"


def test_a_wrong_choice_keeps_the_file(client):
    data = upload(client, table_of([[1, NOTE]]))
    wrong = [("text", []), ("transcription", ["case"]), (None, []), ("transcription", ["label"])]
    messages_shown = []
    for column, kept in wrong:
        event, answer = call(client, "classify_file", data, column, kept)
        assert event == "error"
        messages_shown.append(answer["error"])
    assert "no column 'text'" in messages_shown[0]
    assert "no column 'case'" in messages_shown[1]
    assert "column" in messages_shown[2]
    assert "'label' cannot be kept" in messages_shown[3]
    assert call(client, "classify_file", data, "transcription", ["id"])[0] == "complete"


def test_every_file_leaves_both_lists_of_columns_empty(client):
    for event in ("classify_file", "clear_columns", "classify_file", "clear_columns"):
        if event == "classify_file":
            answer = ask(client, table_of([[1, NOTE]]), kept=["id"])[1:3]
        else:
            answer = call(client, event)[1]
        assert [update["choices"] for update in answer] == [[], []]
        assert [update["value"] for update in answer] == [None, []]


def test_a_file_can_be_classified_again_if_its_result_could_not_be_stored(client, monkeypatch):
    data = upload(client, table_of([[1, NOTE]]))

    def fail(*_arguments):
        raise OSError

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Storage, "add", fail)
        event, answer = call(client, "classify_file", data, "transcription", [])
    assert event == "error"
    assert "reference" in answer["error"]
    assert call(client, "classify_file", data, "transcription", [])[0] == "complete"
    assert not Path(data["path"]).exists()


def test_after_an_error_the_page_keeps_the_file_and_its_columns(client):
    config = client.get("/config").json()
    labels = {part["id"]: part["props"].get("label") for part in config["components"]}
    (event,) = [e for e in config["dependencies"] if e["api_name"] == "clear_failed_file"]
    cleared = {labels[number] for number in event["outputs"]}
    assert len(cleared) == 3
    assert not cleared & {"File of notes", "Column of the notes", "Columns to keep, such as an id"}


@pytest.mark.parametrize(
    "name",
    ["row", "predicted_class", "label", "confidence", "refer", "tokens", "truncated", "error"],
)
def test_a_column_with_the_name_of_a_results_column_is_not_kept(client, name):
    shown = ask(client, table_of([[1, NOTE]], (name, "transcription")), kept=[name])
    assert f"'{name}' cannot be kept" in shown


def test_the_name_of_a_column_is_no_html(client):
    shown = ask(client, table_of([[1, NOTE]]), column="<img src=x>")
    assert "&lt;img src=x&gt;" in shown
    assert "<" not in shown


def test_a_kept_columns_name_that_looks_like_a_formula_is_escaped(client):
    rows = classify(client, table_of([[1, NOTE]], ("=1+1", "transcription")), kept=["=1+1"])
    assert rows[0]["'=1+1"] == "1"


def test_columns_to_keep_may_not_hold_more_than_a_result_may(client):
    rows = [["x" * 1_500, NOTE] for _ in range(1_500)]
    content = gzip.compress(table_of(rows).encode())
    shown = ask(client, content, kept=["id"])
    assert "more than 2,000,000 characters" in shown
    assert len(classify(client, content)) == 1_500


# --- the result -----------------------------------------------------------------------------------


def test_counts_stand_above_the_preview(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.7))
    notes = [f"{NOTE} {i * 37} {CANARY}" for i in range(30)]
    content = table_of([*([i, note] for i, note in enumerate(notes)), [30, ""], [31, " "]])
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        answer = ask(client, content)
        config = client.get("/config").json()
    classes = Counter()
    referred = Counter()
    for prediction in classifier(notes):
        classes[prediction.label] += 1
        referred[prediction.label] += prediction.confidence < 0.7
    assert 0 < referred.total() < 30
    expected = [[label, classes[label], referred[label]] for label in classifier.labels]
    expected += [["All classes", 30, referred.total()], ["Rows with an error", 2, ""]]
    assert answer[3]["data"] == expected
    assert CANARY not in json.dumps(answer)
    (event,) = [e for e in config["dependencies"] if e["api_name"] == "classify_file"]
    assert event["outputs"] == sorted(event["outputs"])  # as on the page


def test_a_result_is_no_upload(client):
    *_, file = ask(client, table_of([[1, NOTE]]))
    kind = client.get(f"/gradio_api/file={file['path']}").headers["content-type"]
    assert kind.startswith("text/csv")
    data = {"path": file["path"], "meta": {"_type": "gradio.FileData"}}
    assert join(client, "classify_file", data, "label", [], session="one").status_code == 422


def test_without_calibration_nothing_is_said_of_referring(client, classifier):
    assert classifier.calibration is None
    answer = ask(client, table_of([[1, NOTE]]))
    assert {row[2] for row in answer[3]["data"]} == {""}
    assert classify(client, table_of([[1, NOTE]]))[0]["refer"] == ""


def test_a_row_says_whether_its_note_was_cut(client, classifier):
    long = "fever " * (classifier.token_limit + 5)
    rows = classify(client, table_of([[1, NOTE], [2, long]]))
    assert [row["truncated"] for row in rows] == ["no", "yes"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("notes.csv", "notes-classes.csv"),
        ("my notes 2.CSV.GZ", "my notes 2-classes.csv"),
        ("a.b.jsonl", "a.b-classes.csv"),
        ("notes", "notes-classes.csv"),
        (".csv", "csv-classes.csv"),
        ("../../etc/<b>.csv", "_.._etc__b_-classes.csv"),
        ("x" * 300 + ".csv", "x" * 188 + "-classes.csv"),
    ],
)
def test_the_name_of_the_result_is_made_of_the_files(client, name, expected):
    *_, file = ask(client, table_of([[1, NOTE]]), name=name)
    assert Path(file["path"]).name == expected
    header = client.get(f"/gradio_api/file={file['path']}").headers["content-disposition"]
    assert header.startswith("attachment")


# --- files that take too much ---------------------------------------------------------------------

WORKSHEET = (
    '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{}'
    "</sheetData></worksheet>"
)


def workbook_with(sheet):
    """Give a workbook whose sheet is replaced by another."""
    source = zipfile.ZipFile(io.BytesIO(workbook()))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            content = source.read(name)
            archive.writestr(name, sheet if name == "xl/worksheets/sheet1.xml" else content)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: gzip.compress(b"transcription\n" + b"x" * 300_000_000),
        lambda: gzip.compress(b"transcription\n" + b"x\n" * 49_000_000),
        lambda: gzip.compress(b'{"transcription":[' + b"[]," * 30_000_000 + b"[]]}"),
        lambda: workbook_with(WORKSHEET.format('<row><c r="ZZZ5"/></row>' * 600_000)),
        lambda: workbook_with(WORKSHEET.format('<row r="9999999999"><c><v>1</v></c></row>')),
    ],
    ids=["gzip of one line", "gzip of many lines", "nested JSON", "wide rows", "far row"],
)
def test_a_small_file_that_takes_too_much_is_refused_and_others_go_on(client, make):
    content = make()
    assert len(content) < 500_000
    answers = []
    start = time.monotonic()
    asking = threading.Thread(target=lambda: answers.append(ask(client, content)))
    asking.start()
    waited = []
    while asking.is_alive():
        before = time.monotonic()
        assert client.post("/v1/classify", json={"note": "fever"}).status_code == 200
        waited.append(time.monotonic() - before)
        time.sleep(0.1)
    asking.join()
    assert time.monotonic() - start < 30
    assert max(waited) < 5
    assert re.search("unpacks to more than|too much time or memory", answers[0])
    assert classify(client, table_of([[1, NOTE]]))[0]["error"] == ""


def test_a_file_that_takes_longer_than_the_limit_is_refused_and_its_process_ends(
    client, monkeypatch
):
    monkeypatch.setattr(reading, "MOST_SECONDS", 0.001)  # Python alone takes longer to start
    assert "too much time or memory" in ask(client, table_of([[1, NOTE]]))
    lines = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not any("clinora.serving.reading" in line for line in lines)


# Fails as a fault in a reader would: the error's message quotes the file.
FAULT = """
import clinora.serving.files
def fail(content, *arguments):
    raise {}(content.decode())
clinora.serving.files.check_table = fail
"""


@pytest.mark.parametrize(
    ("error", "shown", "logged"),
    [
        ("OverflowError", "reference", "OverflowError at "),
        ("MemoryError", "too much time or memory", None),
        ("SystemExit", "reference", "status 1"),
    ],
)
def test_only_a_limit_is_reported_as_too_much(
    client, monkeypatch, tmp_path, caplog, error, shown, logged
):
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(error))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    message = ask(client, table_of([[1, CANARY]]))
    assert shown in message
    assert CANARY not in message + caplog.text
    if logged is None:
        assert caplog.text == ""
    else:
        assert logged in caplog.text


def test_names_of_columns_pass_between_the_processes_as_utf_8():
    content = b'{"half a character \\udbc0": "x", "\\u00e9": "y"}\n'
    assert reading.check_in_subprocess(content).names == ["half a character \ufffd", "\u00e9"]


def test_the_process_that_reads_a_file_starts_without_pytorch():
    code = "import sys, clinora.serving.reading as reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
