"""What is known of each request and event: log, metrics, ids and limits, and never a text."""

import base64
import copy
import json
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import gradio
import httpx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

import clinora
from clinora.serving.app import create_app
from clinora.serving.log import AccessLog
from clinora.serving.passwords import scrypt
from clinora.serving.rate_limit import RateLimit
from tests.served import CANARY, calibration, call, join, running

NOTES = ["Severe chest pain.", "The knee is swollen after a fall.", "CT of the abdomen."]
PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def classifier(small_run):
    """A run that refers some of the notes to a person."""
    classifier = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
    classifier.calibration = calibration(0.0)
    confidences = [prediction.confidence for prediction in classifier(NOTES)]
    classifier.calibration = calibration(sorted(confidences)[1])
    return classifier


class Service:
    """An app with a log, in this process."""

    def __init__(self, classifier, folder, **options):
        self.log = AccessLog(folder / "access.log")
        self.app = create_app(classifier, folder / "flagged", log=self.log, run="demo", **options)

    def __enter__(self):
        self.client = TestClient(self.app, "http://127.0.0.1", raise_server_exceptions=False)
        self.client.__enter__()
        return self

    def __exit__(self, *error):
        self.client.__exit__(*error)
        self.log.close()

    def lines(self):
        """Wait until the log has the lines of all requests that have ended, and read them."""
        wanted = sum(of(self.client.get("/metrics").text, "clinora_requests_total").values())
        wanted += sum(of(self.client.get("/metrics").text, "clinora_events_total").values())
        end = time.monotonic() + 30
        while len(self.log.path.read_text().splitlines()) < wanted and time.monotonic() < end:
            time.sleep(0.01)
        return [json.loads(line) for line in self.log.path.read_text().splitlines()]


@pytest.fixture
def service(classifier, tmp_path):
    with Service(classifier, tmp_path) as service:
        yield service


def of(metrics, name):
    """Read the samples of a name: their values by their labels' values."""
    values = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == name:
                values[tuple(sample.labels.values())] = sample.value
    return values


def basic(name, password=PASSWORD):
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def users(*names):
    return {name: (b"salt", scrypt(PASSWORD, b"salt")) for name in names}


# --- a thousand requests ---


def requests_of(number):
    """Make the arguments of a request; each has the canary in every place that it can have one."""
    note = NOTES[number % 3]
    with_canary = {"notes": [f"{note} {CANARY}"] * (1 + number % 4)}
    kinds = [
        ("POST", "/v1/classify", {"json": with_canary}),
        ("POST", "/v1/classify", {"json": {"note": f"{CANARY} {note}"}}),
        ("POST", "/v1/classify", {"json": {"notes": [f"{CANARY} {note}", " "]}}),
        ("POST", "/v1/classify", {"json": {CANARY: CANARY}}),
        ("POST", "/v1/classify", {"content": CANARY}),
        ("GET", f"/{CANARY}", {}),
        ("GET", f"/assets/{CANARY}", {}),
        ("GET", f"/gradio_api/file=/{CANARY}", {}),
        ("GET", "/health", {}),
        (CANARY.replace("-", ""), "/v1/model", {}),
    ]
    method, path, options = kinds[number % len(kinds)]
    headers = {
        "X-Request-ID": f"{CANARY}_",
        "User-Agent": CANARY,
        "Referer": f"http://{CANARY}/",
        "Cookie": f"clinora_visit={CANARY}",
        "Authorization": basic(CANARY),
        CANARY: CANARY,
    }
    return {"method": method, "url": path, "headers": headers, "params": {CANARY: CANARY}} | options


@pytest.mark.slow
def test_a_thousand_requests_are_a_thousand_lines_and_counted_without_their_text(
    small_run, start, tmp_path
):
    log = tmp_path / "access.log"
    served = start("--run", small_run, "--port", "0", "--log", log)
    with httpx.Client(base_url=served.url(), timeout=60) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: client.request(**requests_of(n)), range(1000)))
        metrics = client.get("/metrics").text
    assert served.end() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = [line for line in lines if line["route"] != "/metrics"]
    assert len(requests) == 1000

    statuses, labels = Counter(), Counter()
    for answer in answers:
        statuses[answer.status_code] += 1
        body = answer.json() if answer.status_code == 200 else {}
        for result in body.get("results", [body]):
            labels[result.get("label")] += 1
    del labels[None]
    assert statuses[200] >= 400 and len(labels) > 1
    assert Counter(line["status"] for line in requests) == statuses
    assert sum((Counter(line["classes"]) for line in requests), Counter()) == labels
    ids = [answer.headers["X-Request-ID"] for answer in answers]
    assert Counter(line["id"] for line in requests) == Counter(ids)

    counted = Counter()
    for (_route, status), number in of(metrics, "clinora_requests_total").items():
        counted[int(status)] += number
    assert counted == statuses
    counted = of(metrics, "clinora_predictions_total")
    assert {label: n for (_adapter, label), n in counted.items() if n} == labels
    assert of(metrics, "clinora_notes_total")[()] == sum(line["notes"] for line in requests)

    for text in (log.read_text(), metrics, served.read("out"), served.read("err")):
        assert CANARY not in text and CANARY.replace("-", "") not in text


# --- a line of the log ---


def test_a_line_says_when_who_what_and_how_many(service, classifier):
    before = datetime.now(UTC)
    service.client.post(
        "/v1/classify", json={"notes": [*NOTES, " "]}, headers={"X-Request-ID": "one"}
    )
    (line,) = [line for line in service.lines() if line["id"] == "one"]
    predictions = classifier(NOTES)
    referred = sum(prediction.refer for prediction in predictions)
    assert 0 < referred < 3
    began = datetime.fromisoformat(line.pop("time"))
    assert began.utcoffset() == timedelta(0)
    assert before - timedelta(milliseconds=1) <= began <= datetime.now(UTC)
    assert 0 < line.pop("ms") < 30_000
    assert line == {
        "id": "one", "user": None, "route": "/v1/classify", "event": None, "method": "POST",
        "adapter": None, "notes": 4, "referred": referred, "status": 200,
        "classes": Counter(prediction.label for prediction in predictions),
    }  # fmt: skip


def test_log_and_metrics_tell_adapters_with_the_same_classes_apart(classifier, tmp_path):
    referred_note = next(note for note in NOTES if classifier([note])[0].refer)
    with Service(classifier, tmp_path, adapters={"other": copy.copy(classifier)}) as service:
        own = service.client.post("/v1/classify", json={"note": referred_note}).json()
        request = {"notes": [referred_note, referred_note], "adapter": "other"}
        service.client.post("/v1/classify", json=request)
        metrics = service.client.get("/metrics").text
        lines = [line for line in service.lines() if line["notes"]]
    assert [(line["adapter"], line["notes"]) for line in lines] == [(None, 1), ("other", 2)]
    predictions = of(metrics, "clinora_predictions_total")
    assert {key: n for key, n in predictions.items() if n} == {
        ("", own["label"]): 1, ("other", own["label"]): 2,
    }  # fmt: skip
    referred = of(metrics, "clinora_referred_total")
    assert referred == {("",): 1, ("other",): 2}


@pytest.mark.parametrize("given", ["a", "0-9-Z", "x" * 64, "6b1f2c1e-0000-4000-8000-000000000000"])
def test_an_id_of_letters_digits_and_hyphens_is_kept(lasting_client, given):
    answer = lasting_client.get("/health", headers={"X-Request-ID": given})
    assert answer.headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 65, b"a b", b"a_b", b"a\tb", b'a"', b"\xe9", b"a,b"])
@pytest.mark.parametrize("path", ["/health", "/nothing", "/v1/classify"])
def test_any_other_id_is_replaced_by_a_new_one(lasting_client, given, path):
    ids = set()
    for headers in ({"X-Request-ID": given}, {"X-Request-ID": given}, {}):
        ids.add(lasting_client.get(path, headers=headers).headers["X-Request-ID"])
    assert len(ids) == 3
    assert all(re.fullmatch("[A-Za-z0-9-]{1,64}", new) for new in ids)


def test_refusals_of_each_kind_have_an_id_a_line_and_a_reason(classifier, tmp_path):
    limit = RateLimit(2)
    options = {"users": users("alice"), "rate_limit": limit}
    with Service(classifier, tmp_path, **options) as service:
        client, alice = service.client, {"Authorization": basic("alice")}
        refused = {
            "host": (400, client.get("/health", headers={"Host": "evil.example"})),
            "unauthorized": (401, client.get("/")),
            "forbidden": (403, client.get("/health", headers={"Origin": "http://evil.example"})),
            "too_large": (413, client.post("/v1/classify", content=b"x" * 10**7, headers=alice)),
            "invalid": (422, client.post("/v1/classify", json={}, headers=alice)),
        }
        client.post("/v1/classify", json={"notes": NOTES}, headers=alice)
        late = client.post("/v1/classify", json={"note": NOTES[0]}, headers=alice)
        refused["rate_limit"] = (429, late)
        for status, answer in refused.values():
            assert answer.status_code == status
        counted = of(client.get("/metrics", headers=alice).text, "clinora_refusals_total")
        assert {reason: n for (reason,), n in counted.items() if n} == dict.fromkeys(refused, 1)
    lines = [json.loads(line) for line in service.log.path.read_text().splitlines()]
    found = {line["id"]: line["status"] for line in lines}
    for status, answer in refused.values():
        assert found[answer.headers["X-Request-ID"]] == status


def test_a_user_is_named_only_with_the_right_password(classifier, tmp_path):
    with Service(classifier, tmp_path, users=users("alice", "bob")) as service:
        for number, header in enumerate(
            [basic("alice"), basic("bob"), basic("alice", "wrong"), basic(CANARY), "", basic("bob")]
        ):
            headers = {"Authorization": header, "X-Request-ID": str(number)}
            service.client.get("/v1/model", headers=headers)
        service.client.get("/health", headers={"Authorization": basic("bob"), "X-Request-ID": "6"})
    lines = [json.loads(line) for line in service.log.path.read_text().splitlines()]
    named = [(line["id"], line["user"], line["status"]) for line in lines]
    assert named == [
        ("0", "alice", 200), ("1", "bob", 200), ("2", None, 401), ("3", None, 401),
        ("4", None, 401), ("5", "bob", 200), ("6", None, 200),
    ]  # fmt: skip


def test_an_error_has_a_line_too(service, monkeypatch):
    def fail(*_):
        raise RuntimeError(CANARY)

    monkeypatch.setattr(clinora.Classifier, "__call__", fail)
    assert service.client.post("/v1/classify", json={"note": NOTES[0]}).status_code == 500
    assert call(service.client, "predict", NOTES[0], None)[0] == "error"
    found = [(x["event"], x["status"], x["classes"]) for x in service.lines() if x["notes"]]
    assert found == [(None, 500, {}), ("predict", 500, {})]


def test_a_client_that_leaves_has_a_line_of_its_own(classifier, tmp_path, monkeypatch):
    may_go_on, began, run = threading.Event(), threading.Event(), classifier.logits

    def wait_and_run(*arguments):
        began.set()
        may_go_on.wait(30)
        return run(*arguments)

    monkeypatch.setattr(classifier, "logits", wait_and_run)
    service = Service(classifier, tmp_path)
    with running(service.app) as port:
        body = json.dumps({"notes": NOTES}).encode()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: gone\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert began.wait(30)
        end = time.monotonic() + 10  # the model is still busy
        while not service.log.path.read_text() and time.monotonic() < end:
            time.sleep(0.01)
        assert service.log.path.read_text()
        may_go_on.set()
    service.log.close()
    (line,) = [json.loads(line) for line in service.log.path.read_text().splitlines()]
    assert (line["id"], line["status"], line["classes"]) == ("gone", 499, {})


# --- events of the page ---


def test_a_classification_on_the_page_is_one_line_with_its_event(service, classifier):
    assert call(service.client, "predict", NOTES[0], None)[0] == "complete"
    assert call(service.client, "predict", " ", None, session="two")[0] == "error"
    lines = service.lines()
    prediction = classifier(NOTES[:1])[0]
    events = [line for line in lines if line["event"] == "predict"]
    found = [(x["status"], x["notes"], x["classes"], x["referred"]) for x in events]
    assert found == [(200, 1, {prediction.label: 1}, int(prediction.refer)), (422, 1, {}, 0)]
    joined = [x for x in lines if x["route"] == "/gradio_api/queue/join" and x["event"] is None]
    assert [x["id"] for x in joined] == [x["id"] for x in events]
    metrics = service.client.get("/metrics").text
    assert of(metrics, "clinora_events_total")[("predict", "200")] == 1
    assert of(metrics, "clinora_predictions_total")[("", prediction.label)] == 1


def test_a_file_is_one_line_with_the_classes_of_its_rows(service, classifier):
    table = "\n".join(["text", *(f'"{note}"' for note in NOTES * 9), '" "']).encode()
    service.client.get("/config")
    (path,) = service.client.post(
        "/gradio_api/upload", files={"files": ("notes.csv", table)}
    ).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert call(service.client, "classify_file", file, "text", [])[0] == "complete"
    (line,) = [line for line in service.lines() if line["event"] == "classify_file"]
    predictions = classifier(NOTES * 9)
    assert line["notes"] == 28
    assert line["classes"] == Counter(prediction.label for prediction in predictions)
    assert line["referred"] == sum(prediction.refer for prediction in predictions)


def test_a_comparison_is_a_line_without_classes(service):
    assert call(service.client, "compare_strengths", NOTES[0], 1.5, None)[0] == "complete"
    (line,) = [line for line in service.lines() if line["event"]]
    assert (line["event"], line["notes"], line["classes"]) == ("compare_strengths", 1, {})


def test_an_event_that_answers_in_steps_is_one_line(classifier, tmp_path, monkeypatch):
    def small_page(*_):
        def steps(note):
            yield note
            yield note * 2
            if note == "fail":
                raise gradio.Error("It failed.", print_exception=False)

        with gradio.Blocks() as page:
            box = gradio.Textbox()
            gradio.Button().click(steps, box, box, api_name="flag")
        return page

    monkeypatch.setattr("clinora.serving.app.build_page", small_page)
    with Service(classifier, tmp_path) as service:
        assert call(service.client, "flag", "note")[0] == "complete"
        assert call(service.client, "flag", "fail", session="two")[0] == "error"
        found = [(line["event"], line["status"]) for line in service.lines() if line["event"]]
    assert found == [("flag", 200), ("flag", 422)]


# --- metrics ---


def test_metrics_tell_of_batches_and_of_the_queue(service, classifier, monkeypatch):
    may_go_on, began, run = threading.Event(), threading.Event(), classifier.logits

    def wait_and_run(*arguments):
        began.set()
        may_go_on.wait(30)
        return run(*arguments)

    monkeypatch.setattr(classifier, "logits", wait_and_run)
    batcher = service.app.state.batcher
    first = batcher.submit(NOTES[:1])
    assert began.wait(30)
    waiting = batcher.submit(NOTES)
    assert of(service.client.get("/metrics").text, "clinora_waiting")[()] == 3
    may_go_on.set()
    for future in (*first, *waiting):
        future.result(30)
    metrics = service.client.get("/metrics").text
    assert of(metrics, "clinora_waiting")[()] == 0
    assert of(metrics, "clinora_batch_notes_count")[()] == 2
    assert of(metrics, "clinora_batch_notes_sum")[()] == 4


def test_metrics_name_the_model_and_count_referrals_and_seconds(service, classifier):
    began = time.perf_counter()
    service.client.post("/v1/classify", json={"notes": NOTES})
    elapsed = time.perf_counter() - began
    metrics = service.client.get("/metrics").text
    (info,) = [f for f in text_string_to_metric_families(metrics) if f.name == "clinora_model_info"]
    wanted = {"run": "demo", "base": "base", "labels": "5", "version": clinora.__version__}
    assert info.samples[0].labels == wanted
    referred = sum(prediction.refer for prediction in classifier(NOTES))
    assert of(metrics, "clinora_referred_total")[("",)] == referred
    route = ("/v1/classify",)
    assert of(metrics, "clinora_request_seconds_count")[route] == 1
    assert 0 < of(metrics, "clinora_request_seconds_sum")[route] <= elapsed


def test_connections_that_bring_no_whole_request_are_counted(classifier, tmp_path):
    service = Service(classifier, tmp_path)
    with running(service.app) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{CANARY}\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    service.log.close()
    counted = of(metrics, "clinora_connections_refused_total")
    assert counted == {("400",): 1, ("408",): 0, ("503",): 0}
    assert CANARY not in metrics


# --- the rate limit ---


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_user_who_sends_too_many_notes_is_told_when_to_try_again(classifier, tmp_path):
    clock = Clock()
    options = {"users": users("alice", "bob"), "rate_limit": RateLimit(6, clock)}
    with Service(classifier, tmp_path, **options) as service:

        def send(name, notes):
            headers = {"Authorization": basic(name)}
            return service.client.post("/v1/classify", json={"notes": notes}, headers=headers)

        assert send("alice", NOTES * 2).status_code == 200
        late = send("alice", NOTES[:1])
        assert (late.status_code, late.headers["Retry-After"]) == (429, "10")
        assert "10 s" in late.json()["detail"]
        assert send("bob", NOTES).status_code == 200  # from the same address
        clock.now = 10
        assert send("alice", NOTES[:1]).status_code == 200
        assert send("alice", NOTES[:1]).status_code == 429


def test_events_of_the_page_count_and_their_message_says_when_to_try_again(classifier, tmp_path):
    clock = Clock()
    with Service(classifier, tmp_path, rate_limit=RateLimit(3, clock)) as service:
        client = service.client
        assert client.post("/v1/classify", json={"note": NOTES[0]}).status_code == 200
        assert call(client, "predict", NOTES[0], None)[0] == "complete"
        assert call(client, "compare_merged", NOTES[0], session="two")[0] == "complete"
        for number, data in enumerate([("predict", NOTES[0], None), ("compare_merged", NOTES[0])]):
            event, answer = call(client, *data, session=f"late{number}")
            assert event == "error"
            assert "Try again in 20 s" in answer["error"]
        assert (
            call(client, "clear", NOTES[0], None, session="three")[0] == "complete"
        )  # uses no model
        clock.now = 20
        assert call(client, "predict", NOTES[0], None, session="four")[0] == "complete"
        statuses = [line["status"] for line in service.lines() if line["event"] == "predict"]
    assert statuses == [200, 429, 200]


def test_a_files_rows_count(classifier, tmp_path):
    clock = Clock()
    with Service(classifier, tmp_path, rate_limit=RateLimit(10, clock)) as service:
        client = service.client
        client.get("/config")
        table = ("text\n" + "fever\n" * 8).encode()
        (path,) = client.post("/gradio_api/upload", files={"files": ("a.csv", table)}).json()
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        assert call(client, "classify_file", file, "text", [])[0] == "complete"
        assert client.post("/v1/classify", json={"notes": NOTES}).status_code == 429
        assert client.post("/v1/classify", json={"notes": NOTES[:2]}).status_code == 200


# --- who may see what ---


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/docs", "/v1/model"])
def test_with_passwords_a_stranger_sees_nothing_of_it(classifier, tmp_path, path):
    with Service(classifier, tmp_path, users=users("alice")) as service:
        for method in ("GET", "HEAD", "POST"):
            assert service.client.request(method, path).status_code == 401
        headers = {"Authorization": basic("alice")}
        assert service.client.get(path, headers=headers).status_code == 200


def test_an_event_of_one_user_is_logged_as_that_users(classifier, tmp_path):
    with Service(classifier, tmp_path, users=users("alice", "bob")) as service:
        service.client.headers["Authorization"] = basic("bob")
        assert call(service.client, "predict", NOTES[0], None)[0] == "complete"
        assert join(service.client, "predict", NOTES[0], None, session="two").status_code == 200
        assert {line["user"] for line in service.lines() if line["event"]} == {"bob"}
