"""The page as a person uses it, and what it must not do: leak a note, or answer a stranger."""

import csv
import dataclasses
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient

import clinora
from clinora.calibration import Calibration
from clinora.commands import serve as serve_command
from clinora.serving.api import MOST_CHARACTERS
from clinora.serving.app import create_app
from clinora.serving.flags import Flags, FlagsFullError
from clinora.serving.page import CURL, EXAMPLES, PYTHON, REASONS
from clinora.serving.server import DEFAULT_LIMITS, MOST_BODY_BYTES
from clinora.serving.sessions import MOST_EVENTS
from tests.served import ROOT, Person, call, join

PUBLISHED_NOTE = (
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction."
)
CANARY = "canary-7f3a"  # stands for a note's text, where that must not appear


@pytest.fixture(scope="module")
def classifier(small_run):
    return clinora.Classifier.load(small_run)


@pytest.fixture
def flags_folder(tmp_path):
    return tmp_path / "flagged"


@pytest.fixture
def client(classifier, flags_folder):
    app = create_app(classifier, flags_folder)
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def calibration(threshold):
    return Calibration(
        weights=(0.2, 0.5), bias=0.1, promise=0.95, threshold=threshold, notes=60, coverage=0.5,
        accuracy=0.95,
    )  # fmt: skip


# --- What it says ---


@pytest.mark.parametrize("note", EXAMPLES)
def test_both_outputs_have_the_published_form(client, classifier, note):
    expected = classifier([note])[0]
    event, (as_json, as_text, *_) = call(client, "predict", note)
    assert event == "complete"
    assert as_json == {"predicted_class": expected.index, "label": expected.label}
    assert as_text == f"Predicted Label: {expected.label}"


def test_the_published_example_has_the_published_answer(flags_folder):
    app = create_app(clinora.Classifier.load("bundled"), flags_folder)
    with TestClient(app, "http://127.0.0.1") as client:
        _, (as_json, as_text, *_) = call(client, "predict", PUBLISHED_NOTE)
    assert as_json == {"predicted_class": 0, "label": "Cardiovascular / Pulmonary"}
    assert as_text == "Predicted Label: Cardiovascular / Pulmonary"


def test_the_published_note_is_the_first_example():
    assert EXAMPLES[0] == PUBLISHED_NOTE


@pytest.mark.parametrize("note", ["", " \n\t", None, "\u200b\ufeff\u3164", "\0\x1b"])
def test_an_empty_note_is_told(client, note):
    event, told = call(client, "predict", note)
    assert (event, told["error"]) == ("error", "Enter a clinical note first.")


def test_a_note_beyond_the_most_characters_is_refused_and_one_at_it_is_read(client):
    assert call(client, "predict", "x" * MOST_CHARACTERS)[0] == "complete"
    event, told = call(client, "predict", "x" * (MOST_CHARACTERS + 1))
    assert (event, "100,001 characters" in told["error"]) == ("error", True)


def test_the_tokens_of_a_note_and_those_read_are_told(client, classifier):
    told = call(client, "predict", "fever " * 300)[1][5]
    assert told == "The note has more than 128 tokens; the first 128 were read."
    tokens = len(classifier.tokenizer.encode("fever"))
    told = call(client, "predict", "fever")[1][5]
    assert told == f"The note has {tokens} tokens; all were read."


def test_all_probabilities_and_the_confidence_are_told(classifier, flags_folder, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.9999))
    app = create_app(classifier, flags_folder)
    with TestClient(app, "http://127.0.0.1") as client:
        shares, sure, verdict = call(client, "predict", "fever")[1][2:5]
    expected = classifier(["fever"])[0]
    told = {share["label"]: share["confidence"] for share in shares["confidences"]}
    shares = dict(zip(classifier.labels, expected.probabilities, strict=True))
    assert told == pytest.approx(shares, abs=1e-3)
    assert sure == f"{expected.confidence:.1%}"
    assert expected.refer
    assert verdict == (
        f"Refer to a person: the confidence of {expected.confidence:.1%} is under this run's "
        "threshold of 100.0%."
    )


def test_a_run_that_never_kept_its_promise_refers_every_note(classifier, flags_folder, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=2.0))
    with TestClient(create_app(classifier, flags_folder), "http://127.0.0.1") as client:
        verdict = call(client, "predict", "fever")[1][4]
    assert (
        verdict == "Refer to a person: this run was never right often enough to answer by itself."
    )


def test_an_uncalibrated_run_claims_no_confidence_and_refers_nobody(client):
    sure, verdict = call(client, "predict", "fever")[1][3:5]
    assert (sure, verdict) == ("not calibrated", "")


def test_a_client_with_too_many_events_is_refused_at_once(client, classifier, monkeypatch):
    may_go_on, logits = threading.Event(), classifier.logits
    monkeypatch.setattr(classifier, "logits", lambda *a: may_go_on.wait(30) and logits(*a))
    answers = [join(client, "predict", "fever", session=f"s{i}") for i in range(MOST_EVENTS + 1)]
    may_go_on.set()
    assert [answer.status_code for answer in answers] == [200] * MOST_EVENTS + [503]


# --- Flags ---


def test_a_flag_holds_prediction_reason_and_hash_and_the_text_only_with_consent(
    client, classifier, flags_folder
):
    note = f"{CANARY} chest pain"
    expected = classifier([note])[0]
    record = {
        "predicted_class": expected.index,
        "label": expected.label,
        "confidence": None,
        "sha256": clinora.Note(note, ()).sha256,
        "tokens": expected.tokens,
        "tokens_exact": True,
        "reason": REASONS[1],
    }
    call(client, "predict", f"  {note}\n")
    assert not flags_folder.exists()  # made at the first flag
    file = flags_folder / "flags.jsonl"
    for consent, more in ((False, {}), (True, {"note": note})):
        assert call(client, "flag", f"{note} ", None, consent, REASONS[1])[0] == "complete"
        flagged = json.loads(file.read_text().splitlines()[-1])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", flagged.pop("time"))
        assert flagged == record | more


def test_a_flag_needs_one_of_the_reasons(client, flags_folder):
    call(client, "predict", "fever")
    assert call(client, "flag", "fever", None, False, None)[0] == "error"
    for reason in ("", CANARY, [REASONS[0]]):
        answer = join(client, "flag", "fever", None, False, reason, session="one")
        assert answer.status_code == 422
    assert not flags_folder.exists()


def test_another_note_is_not_stored_with_the_flag_of_the_last(client, flags_folder):
    call(client, "predict", "fever")
    event, told = call(client, "flag", f"fever {CANARY}", None, True, REASONS[0])
    assert (event, told["error"].startswith("The note has changed")) == ("error", True)
    assert not flags_folder.exists()


def test_nothing_to_flag_is_told_and_a_caller_cannot_make_it_up(client, flags_folder):
    call(client, "predict", "fever", session="another")
    event, told = call(client, "flag", "fever", None, True, REASONS[0])
    assert (event, told["error"].startswith("There is no prediction")) == ("error", True)
    event, _ = call(client, "flag", "fever", {"label": CANARY}, True, REASONS[0])
    assert event == "error" and not flags_folder.exists()


def test_flags_are_appended_in_a_folder_and_file_of_their_owners_alone(flags_folder):
    old = os.umask(0)
    try:
        for i in range(2):
            Flags(flags_folder).add({"i": i})
    finally:
        os.umask(old)
    file = flags_folder / "flags.jsonl"
    assert stat.S_IMODE(flags_folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [json.loads(line)["i"] for line in file.read_text().splitlines()] == [0, 1]


def test_flags_do_not_follow_a_link(flags_folder, tmp_path):
    flags_folder.mkdir()
    (tmp_path / "other").write_text("as it was")
    (flags_folder / "flags.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(OSError):
        Flags(flags_folder).add({})
    assert (tmp_path / "other").read_text() == "as it was"


def test_flags_make_what_was_there_before_private(flags_folder):
    flags_folder.mkdir(mode=0o755)
    file = flags_folder / "flags.jsonl"
    file.touch(mode=0o644)
    Flags(flags_folder).add({})
    assert stat.S_IMODE(flags_folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_flags_are_not_written_into_a_pipe(flags_folder):
    flags_folder.mkdir()
    os.mkfifo(flags_folder / "flags.jsonl")
    with pytest.raises(OSError):
        Flags(flags_folder).add({})


def test_flags_end_at_their_largest_size(client, flags_folder):
    flags = Flags(flags_folder, most_bytes=100)
    flags.add({"i": 0})
    with pytest.raises(FlagsFullError, match="100 bytes"):
        flags.add({"i": "x" * 60})
    assert len(flags.path.read_text().splitlines()) == 1
    with flags.path.open("ab") as file:
        file.truncate(10_000_000)  # the page's own limit
    call(client, "predict", "fever")
    event, told = call(client, "flag", "fever", None, False, REASONS[0])
    assert (event, told["error"]) == ("error", "The file of flags is full: move it away.")


# --- Who may ask, and for what ---


@pytest.mark.parametrize("path", ["/", "/gradio_api/info", "/nothing"])
def test_another_sites_name_is_refused(client, path):
    assert client.get(path, headers={"Host": "evil.example"}).status_code == 400
    assert client.get(path, headers={"Host": "localhost:7860"}).status_code != 400


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/nothing"])
def test_every_answer_carries_the_policy(client, path):
    for headers in [{}, {"Host": "evil.example"}, {"Origin": "https://evil.example"}]:
        answer = client.get(path, headers=headers).headers
        policy = answer["Content-Security-Policy"]
        for part in ("default-src 'self'", "connect-src 'self'", "form-action 'self'"):
            assert part in policy
        assert "unsafe-eval" not in policy
        assert answer["X-Content-Type-Options"] == "nosniff"
        assert answer["Referrer-Policy"] == "no-referrer"
        assert (answer.get("Cache-Control") == "no-store") == (path != "/theme.css")


# --- What is told of errors ---


def test_an_error_is_told_by_a_reference_that_the_log_explains(
    client, classifier, monkeypatch, caplog
):
    def run(*_):
        raise RuntimeError(f"could not do {CANARY}")

    monkeypatch.setattr(classifier, "logits", run)
    event, told = call(client, "predict", CANARY)
    reference = re.fullmatch(r"This did not work; reference (\w{8})\.", told["error"])[1]
    (line,) = caplog.messages
    assert line.startswith(f"reference {reference}: RuntimeError at tests/test_serving.py:")
    assert event == "error"
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
    """Post what no page sends."""
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


# --- clinora serve ---


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Run the command's main here; the handlers of signals are put back."""
    monkeypatch.chdir(tmp_path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield serve_command.main
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--run", "missing"], "there is no run missing"),
        (["--run", "{run}", "--base", "{run}"], "neither model.safetensors nor"),
        (["--run", "{run}", "--device", "abacus"], "device 'abacus'"),
        (["--run", "{run}", "--precision", "fp1"], "precision 'fp1'"),
        (["--port", "{taken}"], "in use"),
        (["--port", "99999"], "99999"),
        (["--host", "notes.example"], "--host notes.example: expected an IPv4 address"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to other machines"),
        (["--host", "0.0.0.0", "--auth-file", "x"], "and --allow-host"),
        (["--allow-host", "notes.example"], "give --auth-file"),
        (["--allow-host", "*", "--auth-file", "x"], "--allow-host *: expected a name alone"),
        (["--allow-host", "https://a", "--auth-file", "x"], "expected a name alone"),
        (["--auth-file", "missing"], "missing"),
        (["--trusted-proxy", "*"], "--trusted-proxy: expected an address or a network"),
        (["--trusted-proxy", "10.0.0.1/8"], "has host bits set"),
        (["--trusted-proxy", "127.0.0.1", "--trusted-proxy", "a.example"], "a.example"),
    ],
)
def test_what_cannot_be_served_gives_one_line_and_status_2(serve, small_run, capsys, options, told):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        values = {"run": small_run, "taken": listener.getsockname()[1]}
        options = [option.format(**values) for option in options]
        with pytest.raises(SystemExit) as ended:
            serve(["--port", "0", *options])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("clinora serve: ")
    assert told in err


@pytest.mark.slow
def test_importing_brings_no_gradio_and_does_nothing():
    code = "import sys, clinora.commands.serve; print([m for m in sys.modules if 'gradio' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.slow
def test_a_missing_run_ends_the_process_with_one_line(start):
    served = start("--run", "missing", "--port", "0")
    assert served.process.wait(120) == 2
    assert served.read("out") == ""
    assert re.fullmatch(r"serve\.py: there is no run missing.*\n", served.read("err"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_cleanly_even_with_the_page_open(
    small_run, start, tmp_path, number, status
):
    served = start("--run", small_run, "--port", "0")
    cookie = {"Cookie": "clinora_visit=me"}
    heartbeat = urllib.request.Request(f"{served.url()}/gradio_api/heartbeat/one", headers=cookie)
    with urllib.request.urlopen(heartbeat) as stream:
        stream.readline()
        temporary = next(p for p in (tmp_path / "tmp").glob("clinora-*") if p.is_dir())
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
        assert served.end(number) == status
    assert served.read("err") == ""
    assert re.fullmatch(r"Clinora: http://127\.0\.0\.1:\d+\n", served.read("out"))
    assert not temporary.exists()


@pytest.mark.slow
def test_a_signal_while_it_is_starting_ends_it_cleanly(small_run, start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    served = start("--run", small_run, "--port", str(port))
    for _ in range(1200):
        time.sleep(0.05)
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            pass
    assert served.end() == 0
    assert (served.read("out"), served.read("err")) == ("", "")


@pytest.mark.slow
def test_it_listens_on_the_loopback_address_alone(served):
    sockets = psutil.Process(served.process.pid).net_connections()
    listening = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


@pytest.mark.slow
def test_the_process_writes_no_text_to_any_file(served):
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=served.url(), headers=headers, timeout=60) as client:
        note = f"{CANARY} chest pain"
        assert client.post("/v1/classify", json={"note": note}).status_code == 200
        assert call(client, "predict", note)[0] == "complete"
        post_malformed(lambda path, body: client.post(path, content=body))
        client.get("/", params={"note": CANARY})
    assert "Traceback" not in served.read("err")
    files = [p for p in served.folder.rglob("*") if p.is_file()]  # its logs among them
    assert [p.name for p in files if CANARY.encode() in p.read_bytes()] == []


# --- Under load ---


class Asking(threading.Thread):
    """A client that asks for one note after the other; answers are (status, label)."""

    def __init__(self, url, notes, seconds, many=1):
        super().__init__()
        self.address, self.notes, self.many = url.removeprefix("http://"), notes, many
        self.end, self.answers, self.once = time.monotonic() + seconds, [], False

    def run(self):
        try:
            self.ask()
        except Exception as error:  # an answer that was lost
            self.answers.append((repr(error), None, None))

    def ask(self):
        connection = http.client.HTTPConnection(self.address, timeout=60)
        for i in itertools.count():
            if time.monotonic() > self.end or (self.once and i):
                break
            note = self.notes[i % len(self.notes)]
            body = {"note": note} if self.many == 1 else {"notes": [note] * self.many}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/classify", json.dumps(body), headers)
            answer = connection.getresponse()
            told = json.loads(answer.read())
            found = [told] if self.many == 1 else told.get("results", [told])
            self.answers += [(answer.status, note, one.get("label")) for one in found]


def clients(count, *arguments):
    asking = [Asking(*arguments) for _ in range(count)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return [answer for thread in asking for answer in thread.answers]


@pytest.mark.slow
def test_32_clients_for_20_seconds_lose_nothing_and_the_memory_stays(served, classifier):
    notes = [f"{note} {word}" for note in EXAMPLES for word in ("fever", "fracture", "chest")]
    labels = {
        note: prediction.label for note, prediction in zip(notes, classifier(notes), strict=True)
    }
    process = psutil.Process(served.process.pid)
    clients(32, served.url(), notes, 2)  # what a first use holds
    before = process.memory_info().rss
    answers = clients(32, served.url(), notes, 20)
    assert process.memory_info().rss - before < 100e6
    assert len(answers) > 320
    assert {status for status, *_ in answers} == {200}
    assert all(label == labels[note] for _, note, label in answers)


@pytest.mark.slow
def test_overload_is_told_and_passes(served, classifier):
    labels = {note: classifier([note])[0].label for note in EXAMPLES}
    answers = clients(8, served.url(), EXAMPLES, 3, 32)  # 256 notes at once, where 64 may wait
    statuses = {status for status, *_ in answers}
    assert statuses == {200, 503}
    assert all(label == labels[note] for status, note, label in answers if status == 200)
    assert {status for status, *_ in clients(1, served.url(), EXAMPLES, 1)} == {200}


# --- In a browser, as a person clicks ---

TABS = ("LoRA internals", "Many notes", "API", "Model card")
LABELS = ("Enter Clinical Note", "Predicted Classification in JSON Format", "Prediction in text")


@pytest.mark.slow
def test_the_page_has_the_published_words(person):
    from playwright.sync_api import expect

    expect(person.page).to_have_title("Clinical Note Classifier")
    heading = person.page.get_by_role("heading", level=1)
    expect(heading).to_have_text("Clinical Note Classifier")
    for text in (
        "This model classifies clinical notes into diagnosis categories. "
        "Choose your output format.",
        "Demonstration only, not a medical device.",
        "Examples",
        *LABELS,
    ):
        expect(person.page.get_by_text(text, exact=True)).to_be_visible()
    for name in ("Clear", "Submit", "Flag"):
        expect(person.page.get_by_role("button", name=name, exact=True)).to_be_visible()


@pytest.mark.slow
def test_an_example_is_filled_in_submitted_and_cleared(person, classifier):
    from playwright.sync_api import expect

    for example in EXAMPLES:
        prediction = classifier([example])[0]
        person.page.get_by_role("button", name=example[:40]).click()
        expect(person.note).to_have_value(example)
        person.press("Submit")
        expect(person.text).to_have_value(prediction.as_text())
        expect(person.json).to_contain_text(f'"label": "{prediction.label}"')
        expect(person.json).to_contain_text(f'"predicted_class": {prediction.index}')
    expect(person.highlighted).to_be_visible()
    person.press("Clear")
    for box in (person.note, person.text, person.page.get_by_label("Confidence that")):
        expect(box).to_have_value("")
    for output in (person.json, person.highlighted, person.page.get_by_text("all were read")):
        expect(output).not_to_be_visible()


@pytest.mark.slow
def test_a_person_flags(person, served, classifier):
    from playwright.sync_api import expect

    person.press("Flag")
    expect(person.page.get_by_text("There is no prediction to flag")).to_be_visible()
    person.submit(f"{CANARY} knee pain")
    expect(person.text).not_to_have_value("")
    person.press("Flag")
    expect(person.page.get_by_text("Choose a reason first.")).to_be_visible()
    person.choose_reason(REASONS[0])
    person.press("Flag")
    expect(person.page.get_by_text("was flagged, without the note's text")).to_be_visible()
    file = served.folder / "flagged" / "flags.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    label = classifier([f"{CANARY} knee pain"])[0].label
    assert json.loads(file.read_text().splitlines()[-1])["label"] == label
    assert CANARY not in file.read_text()
    person.page.get_by_role("checkbox", name="I may store this note's text").check()
    person.press("Flag")
    expect(person.page.get_by_text("was flagged, with the note's text")).to_be_visible()
    assert json.loads(file.read_text().splitlines()[-1])["note"] == f"{CANARY} knee pain"
    person.press("Clear")
    expect(person.page.get_by_role("checkbox", name="I may store")).not_to_be_checked()
    file.unlink()  # the note was meant to be there


@pytest.mark.slow
def test_an_empty_note_gives_a_message_and_leaves_no_stale_prediction(person):
    from playwright.sync_api import expect

    person.submit("fever")
    expect(person.text).not_to_have_value("")
    person.submit("   ")
    expect(person.page.get_by_text("Enter a clinical note first.")).to_be_visible()
    expect(person.text).to_have_value("")
    expect(person.json).not_to_be_visible()
    person.press("Flag")
    expect(person.page.get_by_text("There is no prediction to flag")).to_be_visible()


@pytest.mark.slow
def test_a_long_note_is_told_below_the_outputs(person):
    from playwright.sync_api import expect

    person.submit("fever " * 300)
    told = person.page.get_by_text("The note has more than 128 tokens; the first 128 were read.")
    expect(told).to_be_visible()
    person.submit("fever")
    expect(told).not_to_be_visible()
    expect(person.page.get_by_text(re.compile(r"tokens; all were read"))).to_be_visible()


@pytest.mark.slow
def test_a_note_that_is_far_too_long_is_told(person):
    from playwright.sync_api import expect

    person.submit("fever")
    expect(person.text).not_to_have_value("")
    person.submit("x" * (MOST_BODY_BYTES + 1))
    expect(person.page.get_by_text("This is too long: at most 1,000,000 bytes.")).to_be_visible()
    expect(person.text).to_have_value("")
    assert "413" in person.complaints.pop()


@pytest.mark.slow
def test_a_script_in_a_note_does_nothing(person):
    from playwright.sync_api import expect

    person.submit(f"<img src=/{CANARY} onerror='window.ran=1'><script>window.ran=1</script>")
    expect(person.text).not_to_have_value("")
    expect(person.highlighted).to_contain_text("onerror")
    person.choose_reason(REASONS[0])
    person.press("Flag")
    expect(person.page.get_by_text("was flagged")).to_be_visible()
    assert person.page.evaluate("window.ran") is None
    assert person.page.locator(f"img[src*={CANARY}]").count() == 0


@pytest.mark.slow
def test_on_a_phone_the_prediction_comes_into_view(person):
    from playwright.sync_api import expect

    person.page.set_viewport_size({"width": 390, "height": 700})
    person.submit("fever")
    expect(person.json).to_be_in_viewport()
    boxes = [box.bounding_box() for box in (person.note, person.json, person.highlighted)]
    assert all(box["width"] > 250 for box in boxes)  # below each other, over the whole width
    assert boxes == sorted(boxes, key=lambda box: box["y"])
    for tab in (None, *TABS):
        if tab:
            person.open(tab)
        width = person.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, tab
        if tab == "LoRA internals":
            pictures = person.page.locator("img")
            expect(pictures).to_have_count(2)
            assert all(one.bounding_box()["width"] > 250 for one in pictures.all())


@pytest.mark.slow
def test_nothing_outside_this_machine_was_asked_for(served, person):
    person.submit("fever")
    calls = served.read("calls").splitlines()
    assert [c for c in calls if not re.search(r"127\.0\.0\.1|localhost", c)] == []


@pytest.mark.slow
def test_by_keyboard_alone_a_note_is_classified_and_flagged(person, classifier):
    from playwright.sync_api import expect

    keyboard = person.page.keyboard
    person.note.focus()
    keyboard.type("chest pain")
    for _ in range(2):  # past Clear
        keyboard.press("Tab")
    keyboard.press("Enter")
    expect(person.text).to_have_value(classifier(["chest pain"])[0].as_text())
    person.page.get_by_role("radio").first.focus()
    keyboard.press("Space")
    for _ in range(len(REASONS) + 1):  # past the other reasons and the consent
        keyboard.press("Tab")
    keyboard.press("Enter")
    expect(person.page.get_by_text("was flagged, without")).to_be_visible()


@pytest.mark.slow
def test_the_sentences_are_highlighted(person):
    from playwright.sync_api import expect

    note = "Severe chest pain. The knee, swollen."
    person.submit(note)
    expect(person.highlighted).to_contain_text("Severe chest pain.")
    text = person.highlighted.inner_text().replace("\n", "")
    assert text.split() == note.split()
    colours = person.highlighted.locator(".score-token").evaluate_all(
        "spans => spans.map(s => getComputedStyle(s).backgroundColor)"
    )
    assert len(set(colours)) == 2


@pytest.mark.slow
def test_rank_and_strength_are_chosen_by_keyboard(person):
    from playwright.sync_api import expect

    person.open("LoRA internals")
    table = person.page.get_by_role("grid", name="What LoRA would train")
    expect(table).to_contain_text(f"{22 * 4 * (2048 + 2048 + 2048 + 256):,}")  # r = 4
    person.page.get_by_role("slider", name="Rank r").focus()
    person.page.keyboard.press("ArrowRight")
    expect(table).to_contain_text(f"{22 * 5 * (2048 + 2048 + 2048 + 256):,}")

    strengths = person.page.get_by_role("grid", name="Probabilities")
    person.page.get_by_role("slider", name="Strength").focus()
    person.page.keyboard.press("Home")
    expect(strengths).to_contain_text("Radiology")
    cells = strengths.inner_text().split("Radiology")[1].split()[:3]
    assert cells[0] == cells[2] != cells[1]  # strength 0 is the base
    person.page.keyboard.press("End")
    expect(strengths).not_to_contain_text("\n".join(cells))
    person.press("Merge and compare")
    expect(person.page.get_by_text("Largest difference of a probability")).to_be_visible()


@pytest.mark.slow
def test_a_file_of_160_notes_is_classified_and_downloaded(person, classifier, tmp_path):
    from playwright.sync_api import expect

    notes = [f"{EXAMPLES[i % 4]} Visit {i}." for i in range(160)]
    file = tmp_path / "notes.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["transcription"], *([note] for note in notes)])
    person.open("Many notes")
    upload = person.page.get_by_role("button", name="Click to upload")
    upload.get_by_test_id("file-upload").set_input_files(file)
    # Its row: the name on the bar of progress may be gone before anyone looks.
    expect(person.page.get_by_role("cell", name="notes.csv")).to_be_visible()
    person.press("Classify all")
    link = person.page.locator("a[download]").last
    expect(person.page.get_by_role("cell", name="classes.csv")).to_be_visible()
    with person.page.expect_download() as download:
        link.click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    assert [row["label"] for row in rows] == [p.label for p in classifier(notes)]


@pytest.mark.slow
def test_an_unsure_answer_is_referred_in_words(chromium, small_run, start, tmp_path):
    from playwright.sync_api import expect

    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    about = json.loads((run / "clinora.json").read_text())
    about["calibration"] = dataclasses.asdict(calibration(threshold=0.9999))
    (run / "clinora.json").write_text(json.dumps(about))
    served = start("--run", run, "--port", "0")
    page = chromium.new_page()
    person = Person(page, served.url())
    person.submit("fever")
    confidence = clinora.Classifier.load(run)(["fever"])[0].confidence
    expect(page.get_by_label("Confidence that")).to_have_value(f"{confidence:.1%}")
    expect(page.get_by_text("Refer to a person")).to_be_visible()
    page.close()


@pytest.mark.slow
def test_beyond_this_machine_the_browser_is_asked_for_a_password(
    chromium, small_run, start, tmp_path
):
    salt = b"0123456789abcdef"
    found = hashlib.scrypt(b"correct horse", salt=salt, n=2**14, r=8, p=1)
    passwords = tmp_path / "passwords.txt"
    passwords.write_text(f"alice:{salt.hex()}:{found.hex()}\n")
    options = ["--host", "0.0.0.0", "--allow-host", "notes.example", "--port", "0"]
    options += ["--auth-file", passwords, "--run", small_run]
    served = start(*options)
    url = served.url().replace("notes.example", "127.0.0.1")
    known = {"username": "alice", "password": "correct horse"}
    for credentials, status in ((None, 401), (known, 200)):
        context = chromium.new_context(http_credentials=credentials)
        assert context.request.get(url).status == status
        context.close()
    context = chromium.new_context(http_credentials=known)
    person = Person(context.new_page(), url)
    person.submit("fever")
    expected = clinora.Classifier.load(small_run)(["fever"])[0].as_text()
    from playwright.sync_api import expect

    expect(person.text).to_have_value(expected)
    context.close()


@pytest.mark.slow
def test_the_snippets_give_the_published_answer(served, classifier):
    note = "Severe chest pain. ECG shows ST elevation."
    expected = classifier([note])[0]
    url = served.url()
    for words, snippet in ((["bash", "-c"], CURL), ([sys.executable, "-c"], PYTHON)):
        assert note in snippet
        if shutil.which(words[0] if words[0] != "bash" else "curl") is None:
            pytest.skip("curl is not installed")
        snippet = snippet.format(url=url)
        done = subprocess.run([*words, snippet], capture_output=True, text=True, check=True)
        assert expected.label in done.stdout
        if words[0] == "bash":
            told = json.loads(done.stdout)
            assert told["label"] == expected.label and told["predicted_class"] == expected.index
        else:
            assert repr(expected.label) in done.stdout


# --- The examples for those who run it ---


def test_the_examples_start_it_with_options_that_it_has():
    unit = (ROOT / "examples" / "clinora.service").read_text()
    (start,) = re.findall(r"^ExecStart=\S+ \S+serve\.py (.*)$", unit, re.MULTILINE)
    containerfile = (ROOT / "examples" / "Containerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.*\])$", containerfile, re.MULTILINE)
    for words in (start.split(), json.loads(command)):
        args = serve_command.build_parser().parse_args(words)
        assert args.host == "0.0.0.0" and args.auth_file and args.allow_host
    seconds = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])
    assert seconds > DEFAULT_LIMITS.shutdown_seconds


def test_gradios_limits_are_set(client):
    blocks = client.app.state.gradio.get_blocks()
    assert blocks.state_session_capacity == 1_000
    assert blocks.blocked_paths and not blocks.allowed_paths
