"""The HTTP interface: the published answer, and refusals in words."""

import gzip
import json
import shutil
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

import clinora
from clinora.serving import api
from clinora.serving.app import create_app
from clinora.serving.batcher import MOST_REQUESTS
from clinora.serving.page import CURL, PYTHON
from tests.served import CANARY, running

NOTES = ["Severe chest pain.", "The knee is swollen after a fall."]


def expected(classifier, note):
    prediction = classifier([note])[0]
    return {
        "predicted_class": prediction.index,
        "label": prediction.label,
        "confidence": prediction.confidence,
        "refer": prediction.refer,
        "out_of_distribution": prediction.out_of_distribution,
        "probabilities": pytest.approx(
            dict(zip(classifier.labels, prediction.probabilities, strict=True)), abs=1e-5
        ),
        "tokens": prediction.tokens,
        "tokens_exact": prediction.tokens <= 128,
        "tokens_read": min(prediction.tokens, 128),
    }


def test_a_note_has_its_class_and_all_that_is_known_of_it(client, classifier):
    for note in (*NOTES, "fever " * 200):
        answer = client.post("/v1/classify", json={"note": note})
        assert answer.status_code == 200
        assert answer.json() == expected(classifier, note.strip())


@pytest.fixture
def two_adapters(classifier, small_run, flags_folder):
    """A client of an app that serves a second adapter, whose head prefers the last class."""
    other = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
    other.labels = ("v", "w", "x", "y", "z")
    with torch.no_grad():
        other.model.score.weight[:] = other.model.score.weight.flip(0)
    app = create_app(classifier, flags_folder, adapters={"other": other})
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        client.other = other
        yield client


def test_a_request_chooses_an_adapter_by_its_name(two_adapters, classifier):
    for note in NOTES:
        answer = two_adapters.post("/v1/classify", json={"note": note})
        assert answer.json() == expected(classifier, note)
        answer = two_adapters.post("/v1/classify", json={"note": note, "adapter": "other"})
        assert answer.json() == expected(two_adapters.other, note)
    answer = two_adapters.post("/v1/classify", json={"notes": NOTES, "adapter": "other"})
    assert answer.json()["results"] == [expected(two_adapters.other, note) for note in NOTES]


def test_an_adapter_that_is_not_served_is_refused_with_those_that_are(two_adapters, client):
    for served, words in ((two_adapters, "one of: other"), (client, "none")):
        answer = served.post("/v1/classify", json={"note": NOTES[0], "adapter": CANARY})
        assert answer.status_code == 422
        assert words in answer.json()["detail"]
        assert CANARY not in answer.text


def test_tokens_are_exact_or_at_least_so_many(client, classifier):
    for times in (1, 200):
        note = "fever " * times
        tokens = len(classifier.tokenizer.encode(note))
        told = client.post("/v1/classify", json={"note": note}).json()
        assert told["tokens_exact"] == (told["tokens"] == tokens) == (times == 1)
        assert told["tokens_read"] <= told["tokens"] <= tokens


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


# Nothing of these is seen: spaces, control and format characters, fillers, variation selectors.
INVISIBLE = {
    "nothing": "",
    "white space": " \t\n\u00a0\u3000",
    "zero width": "\u200b\u200c\u200d\u2060",
    "byte-order mark": "\ufeff",
    "direction": "\u200e\u200f\u202e\u2066",
    "NUL": "\0\0",
    "control": "\x1b\x07\x7f\x85",
    "hyphen and joiner": "\u00ad\u034f",
    "fillers": "\u115f\u1160\u3164\uffa0",
    "braille": "\u2800",
    "variation": "\ufe0f\U000e0101",
    "tags": "\U000e0041\U000e007f",
}


@pytest.mark.parametrize("note", INVISIBLE.values(), ids=INVISIBLE)
def test_a_note_with_nothing_visible_is_empty_for_api_and_python(lasting_client, classifier, note):
    answer = lasting_client.post("/v1/classify", json={"note": note})
    assert (answer.status_code, answer.json()) == (422, {"detail": "The note is empty."})
    assert lasting_client.post("/v1/classify", json={"note": f"{note}7"}).status_code == 200
    with pytest.raises(ValueError, match="note 2 of 2 is empty"):
        classifier(["fever", note])


SHAPES = {
    "no key": {},
    "both": {"note": CANARY, "notes": [CANARY]},
    "null": {"note": None},
    "list": {"note": [CANARY]},
    "object": {"note": {"text": CANARY}},
    "number": {"note": 7},
    "text for a list": {"notes": CANARY},
    "no notes": {"notes": []},
    "33 notes": {"notes": [CANARY] * (api.MOST_NOTES + 1)},
    "number in a list": {"notes": [CANARY, 7]},
    "another key": {"note": CANARY, "more": CANARY},
    "array": [CANARY],
    "string": CANARY,
}
BODIES = {name: json.dumps(shape).encode() for name, shape in SHAPES.items()} | {
    "empty": b"",
    "no JSON": CANARY.encode(),
    "cut off": b'{"note": "canary-7f3a',
    "two values": b'{"note": "canary-7f3a"} {}',
    "latin-1": b'{"note": "canary-7f3a caf\xe9"}',
    "UTF-16": '{"note": "canary-7f3a"}'.encode("utf-16"),
    "surrogate in UTF-8": b'{"note": "canary-7f3a \xed\xa0\x80"}',
    "deep array": b"[" * 400_000,
    "deep object": b'{"note":' * 50_000,
    "NaN": b'{"note": NaN}',
    "NaN beside": b'{"note": "canary-7f3a", "more": NaN}',
    "infinity": b'{"note": -Infinity}',
    "long number": b'{"note": ' + b"7" * 10_000 + b"}",
    "large number": b'{"note": 1e999}',
    "key twice": b'{"note": "fever", "note": "canary-7f3a"}',
    "inner key twice": b'{"note": {"canary-7f3a": 1, "canary-7f3a": 2}}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_wrong_body_is_told_what_was_expected_and_not_repeated(
    lasting_client, body, caplog, capfd
):
    headers = {"Content-Type": "application/json"}
    answer = lasting_client.post("/v1/classify", content=body, headers=headers)
    assert answer.status_code == 422
    assert list(answer.json()) == ["detail"]
    assert answer.json()["detail"].endswith(api.EXPECTED)
    assert CANARY not in answer.text + caplog.text + "".join(capfd.readouterr())


def test_half_an_emoji_counts_as_a_replacement_character(lasting_client, classifier):
    """It is a lone surrogate, which no UTF-8 and no tokenizer has; by itself it says nothing."""
    body = b'{"notes": ["fever \\ud83d", "\\ud83d"]}'
    headers = {"Content-Type": "application/json"}
    answer = lasting_client.post("/v1/classify", content=body, headers=headers)
    cut, nothing = answer.json()["results"]
    assert cut == expected(classifier, "fever \ufffd")
    assert nothing == {"error": "The note is empty."}


def test_line_ends_of_windows_do_not_change_the_answer(lasting_client, classifier):
    windows = lasting_client.post("/v1/classify", json={"note": "Fever.\r\nCough.\rPain."})
    assert windows.json() == expected(classifier, "Fever.\nCough.\nPain.")


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "json"]
)
def test_another_content_type_is_told_what_was_expected(lasting_client, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = lasting_client.post("/v1/classify", content=b'{"note": "fever"}', headers=headers)
    assert answer.status_code == 415
    assert list(answer.json()) == ["detail"]
    assert "application/json" in answer.json()["detail"]


@pytest.mark.parametrize("content_type", [None, "", " ;charset=utf-8"])
def test_a_missing_content_type_is_not_told_as_a_wrong_one(lasting_client, content_type):
    body = b'{"note": "fever"}'
    wrong = lasting_client.post("/v1/classify", content=body, headers={"Content-Type": "text/json"})
    headers = {} if content_type is None else {"Content-Type": content_type}
    missing = lasting_client.post("/v1/classify", content=body, headers=headers)
    assert (missing.status_code, wrong.status_code) == (415, 415)
    assert "missing" in missing.json()["detail"]
    assert "missing" not in wrong.json()["detail"]


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "identity, gzip"])
def test_a_compressed_body_is_told_by_the_header_that_says_so(lasting_client, coding):
    body = gzip.compress(b'{"note": "fever"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    answer = lasting_client.post("/v1/classify", content=body, headers=headers)
    assert answer.status_code == 415
    assert "Content-Encoding" in answer.json()["detail"]


@pytest.mark.parametrize("coding", ["", "identity", "Identity"])
def test_a_content_encoding_that_changes_nothing_is_accepted(lasting_client, coding):
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    answer = lasting_client.post("/v1/classify", content=b'{"note": "fever"}', headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_in_utf_8_is_read_with_and_without_a_byte_order_mark(lasting_client, content_type):
    for mark in (b"", b"\xef\xbb\xbf"):
        body = mark + '{"note": "fièvre 👩\u200d⚕️"}'.encode()
        answer = lasting_client.post(
            "/v1/classify", content=body, headers={"Content-Type": content_type}
        )
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "allowed", "others"),
    [
        ("/v1/classify", "POST", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"]),
        ("/health", "GET, HEAD", ["POST", "PUT", "DELETE"]),
        ("/ready", "GET, HEAD", ["POST", "PUT", "DELETE"]),
    ],
)
def test_another_method_is_told_which_one_is_expected(lasting_client, path, allowed, others):
    for method in others:
        answer = lasting_client.request(method, path)
        assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
        if method != "HEAD":  # which has no body
            assert answer.json() == {"detail": f"Expected the method {allowed}."}


def test_head_is_answered_like_get_without_a_body(classifier, tmp_path):
    """Over a real connection: the test client would leave the body out by itself."""
    with running(create_app(classifier, tmp_path)) as port:
        visit = {"Cookie": "clinora_visit=me"}
        table = {"files": ("notes.csv", b"transcription\nfever\n")}
        url = f"http://127.0.0.1:{port}/gradio_api/upload"
        (file,) = httpx.post(url, files=table, headers=visit, timeout=60).json()
        paths = ["/health", "/ready", "/", "/config", "/theme.css", "/favicon.ico"]
        paths += ["/static/img/logo.svg", "/gradio_api/app_id", "/gradio_api/upload_progress"]
        for path in [*paths, f"/gradio_api/file={file}"]:
            get = ask_at_once(port, "GET", path)
            head = ask_at_once(port, "HEAD", path)
            assert get[:2] == head[:2] and get[0] == b"HTTP/1.1 200 OK", path
            assert len(get[2]) > 0 and head[2] == b"", path


@pytest.mark.parametrize("path", ["/gradio_api/heartbeat/one", "/gradio_api/queue/data"])
def test_head_of_a_stream_is_refused_since_a_stream_has_no_end(lasting_client, path):
    answer = lasting_client.head(path, params={"session_hash": "one"})
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET")


def ask_at_once(port, method, path):
    """Ask over a connection of its own: status line, headers but the date, body as it came."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nCookie: clinora_visit=me\r\n"
        request += "Connection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = connection.makefile("rb").read()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    return status, sorted(line for line in headers if not line.startswith(b"date:")), body


def test_it_tells_that_it_is_well(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_a_busy_service_says_when_to_come_back_and_recovers(client, classifier, monkeypatch):
    may_go_on, began, run = threading.Event(), threading.Event(), classifier.logits

    def wait_and_run(*arguments):
        began.set()
        may_go_on.wait(30)
        return run(*arguments)

    monkeypatch.setattr(classifier, "logits", wait_and_run)
    batcher, answers = client.app.state.batcher, []

    def ask():
        answers.append(client.post("/v1/classify", json={"note": NOTES[0]}))

    threads = [threading.Thread(target=ask)]
    threads[0].start()
    began.wait(30)  # it holds the model
    waiting = [batcher.submit(NOTES[:1]) for _ in range(MOST_REQUESTS - 1)]
    threads.append(threading.Thread(target=ask))
    threads[1].start()
    end = time.monotonic() + 30
    while client.get("/ready").status_code == 200 and time.monotonic() < end:
        pass
    for answer in (client.post("/v1/classify", json={"note": NOTES[0]}), client.get("/ready")):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert client.get("/health").status_code == 200
    may_go_on.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 2  # nothing taken was lost
    assert all(future.result(30).label for (future,) in waiting)
    assert client.post("/v1/classify", json={"note": NOTES[0]}).status_code == 200
    assert client.get("/ready").status_code == 200


def test_who_waits_too_long_is_told_so(client, classifier, monkeypatch):
    may_go_on, run = threading.Event(), classifier.logits
    monkeypatch.setattr(classifier, "logits", lambda *a: may_go_on.wait(30) and run(*a))
    monkeypatch.setattr(api, "REQUEST_SECONDS", 0.1)
    answer = client.post("/v1/classify", json={"note": NOTES[0]})
    may_go_on.set()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_an_error_is_told_by_reference(classifier, tmp_path, monkeypatch, caplog):
    def run(*_):
        raise RuntimeError(f"could not do {CANARY}")

    monkeypatch.setattr(classifier, "logits", run)
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


@pytest.mark.slow
def test_the_examples_on_the_page_give_the_prediction(classifier, tmp_path):
    """Run the commands of the tab "API", with the address of a real server."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    note = "Severe chest pain. ECG shows ST elevation."
    prediction = classifier([note])[0]
    assert note in CURL
    assert note in PYTHON
    with running(create_app(classifier, tmp_path)) as port:
        url = f"http://127.0.0.1:{port}"
        by_curl = output_of("bash", "-c", CURL.format(url=url))
        by_python = output_of(sys.executable, "-c", PYTHON.format(url=url))
    answer = json.loads(by_curl)
    assert answer["label"] == prediction.label
    assert answer["predicted_class"] == prediction.index
    assert repr(prediction.label) in by_python


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
