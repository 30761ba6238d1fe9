"""The HTTP interface: the published answer, and refusals in words."""

import threading
import time

import pytest
from fastapi.testclient import TestClient

import clinora
from clinora.serving import api
from clinora.serving.app import create_app
from clinora.serving.batcher import MOST_WAITING

CANARY = "canary-7f3a"
NOTES = ["Severe chest pain.", "The knee is swollen after a fall."]


@pytest.fixture(scope="module")
def classifier(small_run):
    return clinora.Classifier.load(small_run, device="cpu", precision="fp32")


@pytest.fixture
def client(classifier, tmp_path):
    with TestClient(create_app(classifier, tmp_path / "flagged"), "http://127.0.0.1") as client:
        yield client


def expected(classifier, note):
    prediction = classifier([note])[0]
    return {
        "predicted_class": prediction.index,
        "label": prediction.label,
        "confidence": prediction.confidence,
        "refer": prediction.refer,
        "probabilities": pytest.approx(
            dict(zip(classifier.labels, prediction.probabilities, strict=True)), abs=1e-5
        ),
        "tokens": prediction.tokens,
        "tokens_read": min(prediction.tokens, 128),
    }


def test_a_note_has_its_class_and_all_that_is_known_of_it(client, classifier):
    for note in (*NOTES, "fever " * 200):
        answer = client.post("/v1/classify", json={"note": note})
        assert answer.status_code == 200
        assert answer.json() == expected(classifier, note.strip())


def test_many_notes_are_answered_in_order_and_a_bad_one_by_its_error(client, classifier):
    long = "x" * (api.MOST_CHARACTERS + 1)
    answer = client.post("/v1/classify", json={"notes": [NOTES[0], " \n", NOTES[1], long]})
    assert answer.status_code == 200
    first, empty, second, too_long = answer.json()["results"]
    assert first == expected(classifier, NOTES[0])
    assert second == expected(classifier, NOTES[1])
    assert empty == {"error": "The note is empty."}
    assert too_long == {"error": "The note has 100,001 characters, more than 100,000."}


def test_notes_that_are_all_bad_are_an_answer_too(client):
    answer = client.post("/v1/classify", json={"notes": ["", " "]})
    assert answer.json() == {"results": [{"error": "The note is empty."}] * 2}


@pytest.mark.parametrize("note", ["", " \t\n"])
def test_an_empty_note_is_refused(client, note):
    answer = client.post("/v1/classify", json={"note": note})
    assert (answer.status_code, answer.json()) == (422, {"detail": "The note is empty."})


@pytest.mark.parametrize(
    "question",
    [
        {},
        {"note": CANARY, "notes": [CANARY]},
        {"note": [CANARY]},
        {"notes": CANARY},
        {"notes": []},
        {"notes": [CANARY] * (api.MOST_NOTES + 1)},
        {"notes": [CANARY, 7]},
        {"note": CANARY, "more": CANARY},
        [CANARY],
        CANARY,
    ],
)
def test_a_wrong_question_is_told_what_was_expected_and_not_repeated(
    client, question, caplog, capfd
):
    answer = client.post("/v1/classify", json=question)
    assert (answer.status_code, answer.json()) == (422, {"detail": api.EXPECTED})
    assert CANARY not in caplog.text + "".join(capfd.readouterr())


def test_what_is_no_json_is_told_so(client):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/classify", content=CANARY, headers=headers)
    assert (answer.status_code, answer.json()) == (422, {"detail": api.EXPECTED})


def test_it_tells_that_it_is_well(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_a_busy_service_says_when_to_come_back_and_recovers(client, classifier, monkeypatch):
    may_go_on, began, run = threading.Event(), threading.Event(), classifier.run

    def wait_and_run(*arguments):
        began.set()
        may_go_on.wait(30)
        return run(*arguments)

    monkeypatch.setattr(classifier, "run", wait_and_run)
    answers = []

    def ask(notes):
        answers.append(client.post("/v1/classify", json={"notes": notes}))

    threads = [threading.Thread(target=ask, args=([NOTES[0]],))]
    threads[0].start()
    began.wait(30)  # it holds the model; 64 more may wait
    for _ in range(MOST_WAITING // api.MOST_NOTES):
        threads.append(threading.Thread(target=ask, args=([NOTES[1]] * api.MOST_NOTES,)))
        threads[-1].start()
    end = time.monotonic() + 30
    while client.get("/ready").status_code == 200 and time.monotonic() < end:
        pass
    for answer in (client.post("/v1/classify", json={"note": NOTES[0]}), client.get("/ready")):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert client.get("/health").status_code == 200
    may_go_on.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3  # nothing taken was lost
    assert client.post("/v1/classify", json={"note": NOTES[0]}).status_code == 200
    assert client.get("/ready").status_code == 200


def test_who_waits_too_long_is_told_so(client, classifier, monkeypatch):
    may_go_on, run = threading.Event(), classifier.run
    monkeypatch.setattr(classifier, "run", lambda *a: may_go_on.wait(30) and run(*a))
    monkeypatch.setattr(api, "REQUEST_SECONDS", 0.1)
    answer = client.post("/v1/classify", json={"note": NOTES[0]})
    may_go_on.set()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_an_error_is_told_by_reference(classifier, tmp_path, monkeypatch, caplog):
    def run(*_):
        raise RuntimeError(f"could not do {CANARY}")

    monkeypatch.setattr(classifier, "run", run)
    app = create_app(classifier, tmp_path)
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.post("/v1/classify", json={"note": CANARY})
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("This did not work; reference ")
    assert "RuntimeError at tests/test_api.py" in caplog.text
    assert CANARY not in caplog.text


def test_one_notes_failure_is_its_own(client, classifier, monkeypatch, caplog):
    call = clinora.Classifier.__call__

    def fail_at_times(self, notes):
        if any(CANARY in note for note in notes):
            raise RuntimeError(CANARY)
        return call(self, notes)

    monkeypatch.setattr(clinora.Classifier, "__call__", fail_at_times)
    results = client.post("/v1/classify", json={"notes": [NOTES[0], CANARY]}).json()["results"]
    monkeypatch.undo()
    assert results[0] == expected(classifier, NOTES[0])
    assert results[1]["error"].startswith("This did not work; reference ")
    assert CANARY not in caplog.text


@pytest.mark.parametrize("path", ["/", "/health", "/config"])
def test_another_sites_page_is_refused(client, path):
    for origin, status in (
        ("https://evil.example", 403), ("http://127.0.0.1:9", 403), ("null", 403),
        ("http://127.0.0.1", 200),
    ):  # fmt: skip
        assert client.get(path, headers={"Origin": origin}).status_code == status
