"""The page's tabs: highlights, LoRA's inside, many notes."""

import csv
import dataclasses
import html
import io
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

import clinora
from clinora.calibration import Calibration
from clinora.explain import explain
from clinora.run import DataRecord
from clinora.serving.app import create_app
from clinora.serving.batcher import BusyError
from clinora.serving.card import model_card
from clinora.serving.files import MOST_ROWS
from clinora.serving.page import TINYLLAMA
from clinora.serving.server import MOST_BODY_BYTES, MOST_FILE_BYTES
from tests.served import call, join, messages

CANARY = "canary-7f3a"
NOTE = "Severe chest pain. No fever!  ECG: normal.\nThe knee, swollen."


@pytest.fixture(scope="module")
def classifier(small_run):
    return clinora.Classifier.load(small_run, device="cpu", precision="fp32")


@pytest.fixture
def client(classifier, tmp_path):
    with TestClient(create_app(classifier, tmp_path / "flagged"), "http://127.0.0.1") as client:
        client.get("/config")  # brings the visit's cookie, before several threads ask
        yield client


# --- Highlights ---


def test_highlights_rejoin_to_the_note_and_are_the_explanation(client, classifier):
    event, answer = call(client, "predict", f" {NOTE}\n")
    assert event == "complete"
    spans = answer[6]
    assert "".join(span["token"] for span in spans) == NOTE
    expected = [sentence.contribution for sentence in explain(classifier, NOTE)]
    most = max(map(abs, expected))
    assert [s["class_or_confidence"] for s in spans] == pytest.approx(
        [contribution / most for contribution in expected], abs=1e-4
    )


def test_what_was_not_read_is_not_highlighted(client):
    spans = call(client, "predict", "Chest pain. " * 60)[1][6]
    assert "".join(span["token"] for span in spans) == ("Chest pain. " * 60).strip()
    assert spans[0]["class_or_confidence"] is not None
    assert spans[-1]["class_or_confidence"] is None


# --- LoRA's inside ---


@pytest.fixture(scope="module")
def base_probabilities(small_run, classifier):
    """The base without LoRA under the trained head: what strength 0 should give."""
    model = clinora.load_model(small_run.parent / "base", num_labels=5, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(classifier.model.score.weight)
    model.head_trained = True
    base = clinora.Classifier(model, classifier.tokenizer, classifier.labels, token_limit=128)
    return base.probabilities([NOTE])[0][0].tolist()


def shares(table, column):
    return [float(row[column].removesuffix("%")) / 100 for row in table["data"]]


def test_strength_0_is_the_base_and_1_the_adapter(client, classifier, base_probabilities):
    adapted = classifier([NOTE])[0].probabilities
    for strength, expected in ((0, base_probabilities), (1, adapted)):
        _, (table,) = call(client, "compare_strengths", NOTE, strength)
        assert [row[0] for row in table["data"]] == list(classifier.labels)
        assert shares(table, 1) == pytest.approx(base_probabilities, abs=6e-4)
        assert shares(table, 2) == pytest.approx(adapted, abs=6e-4)
        assert shares(table, 3) == pytest.approx(expected, abs=6e-4)
    assert base_probabilities != pytest.approx(adapted, abs=0.01)


def probabilities(client, note, session):
    shares = call(client, "predict", note, session=session)[1][2]["confidences"]
    return {share["label"]: share["confidence"] for share in shares}


def test_people_with_different_strengths_do_not_affect_each_other(client):
    alone = {s: call(client, "compare_strengths", NOTE, s)[1][0]["data"] for s in (0.25, 1.75)}
    predicted = probabilities(client, NOTE, "alone")
    found = []

    def ask(strength, session):
        for _ in range(5):
            _, (table,) = call(client, "compare_strengths", NOTE, strength, session=session)
            found.append(table["data"] == alone[strength])
            # Notes that wait go through the model together, which rounds otherwise.
            found.append(probabilities(client, NOTE, session) == pytest.approx(predicted, abs=1e-5))

    threads = [
        threading.Thread(target=ask, args=(s, f"person{i}at{int(100 * s)}"))
        for i in range(3)
        for s in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_merging_is_compared_and_changes_nothing(client, classifier):
    state = {name: p.clone() for name, p in classifier.model.state_dict().items()}
    _, (told,) = call(client, "compare_merged", NOTE)
    points = float(re.search(r"Largest difference of a probability: ([\d.e-]+) points", told)[1])
    assert points < 0.001  # in float32
    assert "float32" in told
    merged_weight = clinora.merged_weight
    with pytest.MonkeyPatch.context() as patch:  # another weight would show
        patch.setattr(clinora, "merged_weight", lambda layer: 2 * merged_weight(layer))
        (told,) = call(client, "compare_merged", NOTE)[1]
    assert float(re.search(r"probability: ([\d.e-]+) points", told)[1]) > 1
    assert all(torch.equal(p, state[name]) for name, p in classifier.model.state_dict().items())


def test_the_count_is_that_of_the_closed_form_for_both_models(client, classifier):
    _, (table,) = call(client, "count_for_rank", 4, ["q_proj", "up_proj"])
    # The small run: width 32, MLP 48, 2 layers. TinyLlama: 2,048, 5,632 and 22.
    small = 2 * 4 * (32 + 32 + 32 + 48)
    large = 22 * 4 * (2048 + 2048 + 2048 + 5632)
    rows = [[row[0], row[1], row[4]] for row in table["data"]]
    assert rows == [
        ["the loaded base", f"{small:,}", f"{2 * (32 * 32 + 32 * 48):,}"],
        ["TinyLlama", f"{large:,}", f"{22 * (2048 * 2048 + 2048 * 5632):,}"],
    ]
    assert table["data"][1][2] == f"{4 * large / 1e6:,.2f}"
    base = sum(p.numel() for p in clinora.load_model(classifier.model.source.folder).parameters())
    assert table["data"][0][3] == f"{small / base:.3%}"


def test_tinyllama_has_its_published_size():
    from clinora.budget import base_parameters

    assert base_parameters(TINYLLAMA, None) == 1_100_048_384


def test_a_choice_that_cannot_be_is_told(client):
    _, (table,) = call(client, "count_for_rank", 64, ["v_proj"])  # 16 × 32 in the small run
    assert "1 to 16" in table["data"][0][1]
    assert table["data"][1][1] == f"{22 * 64 * (2048 + 256):,}"
    _, (table,) = call(client, "count_for_rank", 8, [])
    assert "targets is empty" in table["data"][0][1]


def test_a_run_whose_targets_are_longer_names_has_its_page(small_run, tmp_path):
    model = clinora.load_model(small_run.parent / "base", num_labels=5)
    targets = ("layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj")
    clinora.apply_lora(model, clinora.LoRAConfig(rank=16, targets=targets))
    model.head_trained = True
    tokenizer = clinora.Tokenizer(small_run.parent / "base" / "tokenizer.model")
    run = clinora.Classifier(model, tokenizer, clinora.PUBLISHED_CLASSES, token_limit=128)
    with TestClient(create_app(run, tmp_path), "http://127.0.0.1") as client:
        assert call(client, "predict", NOTE)[0] == "complete"


# --- Many notes ---


class RefusedError(Exception):
    """A file was not taken; says why."""


def upload(client, text, name="notes.csv"):
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


def classify(client, text, session="one"):
    try:
        data = upload(client, text)
    except RefusedError as refused:
        return str(refused)
    event, told = call(client, "classify_file", data, "transcription", session=session)
    if event == "error":
        return told["error"]
    _, preview, file = told  # the upload is gone
    rows = list(csv.DictReader(io.StringIO(client.get(f"/gradio_api/file={file['path']}").text)))
    assert [row[0] for row in preview["data"]] == [int(row["row"]) for row in rows[:20]]
    return rows


def test_a_file_has_an_answer_for_each_row_and_a_bad_row_its_error(client, classifier):
    notes = [f"{NOTE} {i * 37} {CANARY}" for i in range(160)]
    empty = {40: "", 41: "\u200b\ufeff \u2800"}
    content = table_of([[i, empty.get(i, note)] for i, note in enumerate(notes)])
    content += "only one field\r\n"
    rows = classify(client, content)
    assert [int(row["row"]) for row in rows] == list(range(1, 162))
    assert [rows[i]["error"] for i in empty] == ["The note is empty."] * 2
    assert rows[160]["error"] == "The row has 1 fields, the header 2."
    expected = classifier(notes)
    for i, (row, prediction) in enumerate(zip(rows, expected, strict=False)):
        if i not in empty:
            assert (row["predicted_class"], row["label"], row["error"]) == (
                str(prediction.index), prediction.label, "",
            )  # fmt: skip
            assert row["tokens"] == str(prediction.tokens)
    assert not any(CANARY in value for row in rows for value in row.values())


def test_a_files_confidence_is_rounded_for_reading(classifier, tmp_path, monkeypatch):
    fitted = Calibration(
        weights=(0.2, 0.5), bias=0.1, promise=0.95, threshold=0.7, notes=61, coverage=0.5,
        accuracy=0.97,
    )  # fmt: skip
    monkeypatch.setattr(classifier, "calibration", fitted)
    notes = [f"{NOTE} {i * 37}" for i in range(20)]
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        rows = classify(client, table_of([[i, note] for i, note in enumerate(notes)]))
    for row, prediction in zip(rows, classifier(notes), strict=True):
        assert re.fullmatch(r"0\.\d{1,4}|1\.0", row["confidence"])
        assert float(row["confidence"]) == pytest.approx(prediction.confidence, abs=6e-5)
        assert row["refer"] == str(prediction.refer)


def test_a_files_progress_is_told(client, monkeypatch):
    batcher = client.app.state.batcher
    submit = batcher.submit
    monkeypatch.setattr(batcher, "submit", lambda *a, **k: time.sleep(0.5) or submit(*a, **k))
    file = upload(client, table_of([[i, NOTE] for i in range(40)]))
    assert join(client, "classify_file", file, "transcription", session="one").status_code == 200
    events = json.dumps(list(messages(client, "one")))
    told = re.findall(r'"index":\s*(\d+),\s*"length":\s*(\d+),\s*"unit":\s*"batches"', events)
    assert [(str(i), "3") for i in range(3)] == sorted(set(told))[:3]


def test_no_note_stays_in_a_file_when_its_rows_are_classified(client):
    text = table_of([[1, f"{NOTE} {CANARY}"]])
    folder = Path(upload(client, text)["path"]).parents[1]
    before = {path for path in folder.rglob("*") if path.is_file()}
    rows = classify(client, text)
    assert len(rows) == 1
    after = {path for path in folder.rglob("*") if path.is_file()}
    (added,) = after - before  # the result alone
    assert CANARY.encode() not in added.read_bytes()


def test_equal_files_of_two_people_are_two_files(client):
    text = table_of([[1, NOTE]])
    first, second = upload(client, text), upload(client, text)
    for data in (first, second):
        assert call(client, "classify_file", data, "transcription")[0] == "complete"
    answer = join(client, "classify_file", second, "transcription", session="one")
    assert answer.status_code == 422  # it was removed when it had been read


def test_a_label_that_a_spreadsheet_would_compute_is_made_harmless(classifier, tmp_path):
    model, tokenizer = classifier.model, classifier.tokenizer
    labels = ("=1+1", "+2", "-3", "@four", "five")
    run = clinora.Classifier(model, tokenizer, labels, token_limit=128)
    with TestClient(create_app(run, tmp_path), "http://127.0.0.1") as client:
        rows = classify(client, table_of([[i, f"{NOTE} {i * 37}"] for i in range(20)]))
    assert {row["label"] for row in rows} <= {"'=1+1", "'+2", "'-3", "'@four", "five"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (table_of([[1, NOTE]], header=("id", "note")), "The file has no column 'transcription'"),
        ("transcription\r\n", "The file has no rows"),
        ("", "The file has no rows"),
        (table_of([[1, "é"]]).encode("latin-1"), "The file is not UTF-8"),
        (table_of([[1, "x"]] * (MOST_ROWS + 1)), "The file has more than 2,000 rows"),
    ],
    ids=["column", "rows", "empty", "latin-1", "many"],
)
def test_a_file_that_cannot_be_read_is_told(client, content, told):
    assert told in classify(client, content)


def test_a_file_may_be_larger_than_a_request_but_not_without_bound(client):
    rows = [[i, "x" * 9_000] for i in range(200)]
    assert len(table_of(rows)) > MOST_BODY_BYTES
    assert upload(client, table_of(rows))
    files = {"files": ("notes.csv", b"x" * (MOST_FILE_BYTES + 10_001))}
    assert client.post("/gradio_api/upload", files=files).status_code == 413


def test_files_leave_room_for_others_and_lose_nothing(client, classifier):
    """Three files of 160 rows at once never fill the queue of 64: every single note is taken."""
    text = table_of([[i, f"{NOTE} {i}"] for i in range(160)])
    done, statuses = [], []

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


def test_rows_that_find_no_room_say_so_and_the_others_are_kept(client, monkeypatch):
    batcher = client.app.state.batcher
    submit, calls = batcher.submit, []

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


# --- The model card ---


def test_the_card_tells_data_figures_confidence_and_limits(classifier, small_run, tmp_path):
    card = model_card(classifier, small_run)
    for words in ("not a medical device", "This run has no report", "Not calibrated", "128 tokens"):
        assert words in card
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.md").write_text(
        "# Report\n\nNotes.\n\n```\nthis run 91%\n```\n\n![x](x.png)\n"
    )
    card = model_card(classifier, tmp_path)
    assert "```\nthis run 91%\n```" in card and "x.png" not in card


def test_the_names_in_a_card_are_no_markdown_and_no_html(classifier, small_run, monkeypatch):
    name = "a`b`_c_<form>[x](y)\u202e.csv"
    data = DataRecord(source=f"/data/{name}", split="**texts**", seen=frozenset())
    monkeypatch.setattr(classifier, "data", data)
    card = model_card(classifier, small_run)
    (line,) = [line for line in card.splitlines() if line.startswith("Notes: ")]
    assert not set("`_<[*\u202e") & set(line)
    shown = html.unescape(line).replace("U+202E", "\u202e")
    assert shown.startswith(f"Notes: {name}, split by **texts**; ")


def test_the_bundled_card_has_intervals_and_what_is_possible_at_best():
    card = model_card(clinora.Classifier.load("bundled"), "bundled")
    assert re.search(r"this run +[\d.]+% \[[\d.]+, [\d.]+\]", card)
    assert re.search(r"possible at best +100% +[\d.]+%", card)
    assert re.search(r"Under [\d.]+% a note is referred to a person", card)


def test_the_card_tells_how_the_promise_was_kept(classifier, small_run, monkeypatch):
    fitted = Calibration(
        weights=(0.2, 0.5), bias=0.1, promise=0.95, threshold=0.8, notes=61, coverage=0.5,
        accuracy=0.97,
    )  # fmt: skip
    monkeypatch.setattr(classifier, "calibration", fitted)
    card = model_card(classifier, small_run)
    for words in ("fitted on 61 validation", "Under 80.0%", "50.0% of these notes 97.0%", "95%"):
        assert words in card
    monkeypatch.setattr(classifier, "calibration", dataclasses.replace(fitted, threshold=1.1))
    card = model_card(classifier, small_run)
    assert "110" not in card and "every note is referred to a person" in card
