"""No text of a note reaches a log, an error message or a file of the service."""

import json
import re

import httpx
import pytest

from tests.served import CANARY, call


def test_an_error_is_shown_as_a_reference_that_the_log_explains(
    client, classifier, monkeypatch, caplog
):
    def fail(*_):
        raise RuntimeError(f"could not do {CANARY}")

    monkeypatch.setattr(classifier, "logits", fail)
    event, answer = call(client, "predict", CANARY, None)
    assert event == "error"
    assert CANARY not in answer["error"]
    reference = re.search(r"reference (\w{8})\b", answer["error"])[1]
    (line,) = caplog.messages
    assert line.startswith(f"reference {reference}: RuntimeError at tests/test_privacy.py:")
    assert CANARY not in caplog.text


MALFORMED = [
    ("queue/join", {"data": [], "fn_index": 1, "session_hash": "one"}),
    ("queue/join", {"data": [CANARY], "fn_index": 1, "session_hash": CANARY}),
    ("queue/join", {"data": [[CANARY]], "fn_index": 1, "session_hash": "one"}),
    ("call/predict", {"data": []}),
    ("call/predict", {"data": [], "session_hash": CANARY}),
    ("call/predict", {"data": {"note": CANARY}}),
    ("call/predict", {"data": [CANARY, CANARY]}),
    ("call/predict", {"data": [[CANARY]]}),
    ("call/predict", {"data": [f"{CANARY} \ud800"]}),
    ("call/predict", {"data": [{"path": CANARY, "meta": {"_type": "gradio.FileData"}}]}),
    ("call/flag", {"data": [CANARY, CANARY]}),
    ("call/load_example", {"data": [CANARY]}),
    (f"call/{CANARY}", {"data": [CANARY]}),
    (f"call/v2/{CANARY}", {"note": CANARY}),
    ("call/v2/predict", {"note": CANARY}),
    ("call/v2/predict", {CANARY: CANARY}),
    ("run/predict", {"data": [CANARY]}),
    ("queue/join", {"data": [CANARY], "fn_index": 99, "session_hash": CANARY}),
    ("queue/join", {"data": [CANARY], "fn_index": CANARY}),
    ("queue/join", [CANARY]),
    ("upload", {"files": CANARY}),
    ("process_recording", {"data": CANARY}),
    ("component_server", {"data": CANARY, "component_id": 1, "fn_name": CANARY}),
]


def post_malformed(post):
    """Post requests that the page never sends, with CANARY in every part of them."""
    for path, body in MALFORMED:
        post(f"/gradio_api/{path}", json.dumps(body).encode())
    post("/gradio_api/queue/join", b'{"data": ["' + CANARY.encode())


def test_malformed_calls_leave_no_text_in_the_log(client, caplog, capfd):
    client.get("/")

    def post(path, body):
        headers = {"Content-Type": "application/json"}
        answer = client.post(path, content=body, headers=headers)
        assert 400 <= answer.status_code < 500
        assert CANARY not in answer.text

    post_malformed(post)
    out, err = capfd.readouterr()
    assert CANARY not in caplog.text + out + err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_the_process_writes_no_text_to_any_file(served):
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=served.url(), headers=headers, timeout=60) as client:
        note = f"{CANARY} chest pain"
        assert client.post("/v1/classify", json={"note": note}).status_code == 200
        assert call(client, "predict", note, None)[0] == "complete"
        post_malformed(lambda path, body: client.post(path, content=body))
        client.get("/", params={"note": CANARY})
    assert "Traceback" not in served.read("err")
    files = [p for p in served.folder.rglob("*") if p.is_file()]  # its logs among them
    assert [p.name for p in files if CANARY.encode() in p.read_bytes()] == []
