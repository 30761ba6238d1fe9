"""No client keeps others waiting: those who hang up, on a real port, where this can be noticed."""

import http.client
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from clinora.serving import gate, sessions
from clinora.serving.app import create_app
from clinora.serving.batcher import MOST_REQUESTS
from clinora.serving.gate import VISIT_COOKIE
from tests.served import CANARY, running

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def served(classifier, tmp_path, monkeypatch):
    """The address of an app on a free port, its batcher, and the notes that were computed."""
    computed = []
    run = type(classifier).__call__

    def note_and_run(self, notes):
        computed.extend(notes)
        return run(self, notes)

    monkeypatch.setattr(type(classifier), "__call__", note_and_run)
    app = create_app(classifier, tmp_path / "flagged")
    with running(app) as port:
        yield SimpleNamespace(
            address=f"127.0.0.1:{port}",
            batcher=app.state.batcher,
            computed=computed,
            page=app.state.gradio.get_blocks(),
        )


@pytest.fixture
def go_on(served):
    """The model is held until this event is set."""
    event = threading.Event()
    began = threading.Event()
    served.batcher.submit_job(lambda: began.set() or event.wait(60))
    began.wait(30)
    yield event
    event.set()


def ask(address, *notes):
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/v1/classify", json.dumps({"notes": notes}), JSON)
    return connection


def test_notes_of_clients_that_hang_up_are_not_computed(served, go_on, caplog, capfd):
    for _ in range(2 * MOST_REQUESTS):  # more than may wait at a time
        ask(served.address, CANARY, CANARY, CANARY).close()
    time.sleep(1)
    staying = ask(served.address, "fever", "cough")  # finds room again
    time.sleep(1)
    go_on.set()
    results = json.loads(staying.getresponse().read())["results"]
    assert [bool(result["label"]) for result in results] == [True, True]
    assert served.computed == ["fever", "cough"]
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")  # nothing went wrong


class Visitor:
    """A browser at the page that triggers one event and waits for its answer."""

    def __init__(self, address, source="127.0.0.1"):
        self.connection = http.client.HTTPConnection(
            address, timeout=60, source_address=(source, 0)
        )
        self.connection.request("GET", "/config")
        answer = self.connection.getresponse()
        assert answer.status == 200
        headers = answer.headers
        config = json.loads(answer.read())
        self.cookie = headers["set-cookie"].partition(";")[0]
        assert self.cookie.startswith(VISIT_COOKIE)
        self.events = {event["api_name"]: event["id"] for event in config["dependencies"]}

    def upload(self, text):
        self.send_upload(text)
        answer = self.connection.getresponse()
        told = answer.read()
        assert answer.status == 200, told
        (path,) = json.loads(told)
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def send_upload(self, text):
        """Begin to upload a file; the answer is not read."""
        boundary = "part"
        body = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.csv"'
            f"\r\n\r\n{text}\r\n--{boundary}--\r\n"
        )
        kind = f"multipart/form-data; boundary={boundary}"
        headers = {"Content-Type": kind, "Cookie": self.cookie}
        self.connection.request("POST", "/gradio_api/upload", body, headers)

    def join(self, event, *data, session="one"):
        """Trigger an event; give the status."""
        body = {"fn_index": self.events[event], "session_hash": session, "data": data}
        headers = JSON | {"Cookie": self.cookie}
        self.connection.request("POST", "/gradio_api/queue/join", json.dumps(body), headers)
        answer = self.connection.getresponse()
        answer.read()
        return answer.status

    def trigger(self, event, *data):
        """Trigger an event, and begin to read the stream of its answer."""
        assert self.join(event, *data) == 200
        self.listen()

    def listen(self):
        """Begin to read the stream of an answer."""
        headers = {"Cookie": self.cookie}
        self.connection.request("GET", "/gradio_api/queue/data?session_hash=one", headers=headers)
        self.stream = self.connection.getresponse()

    def leave(self):
        self.stream.close()
        self.connection.close()


def test_a_note_whose_visitor_leaves_is_not_computed(served, go_on, monkeypatch, caplog):
    queued = threading.Semaphore(0)
    futures = []
    for name in ("submit", "submit_job"):
        queue = getattr(served.batcher, name)

        def note_and_queue(*arguments, queue=queue, **options):
            found = queue(*arguments, **options)
            futures.extend(found if isinstance(found, list) else [found])
            queued.release()
            return found

        monkeypatch.setattr(served.batcher, name, note_and_queue)
    leaving = [Visitor(served.address) for _ in range(4)]
    for visitor in leaving[:3]:
        visitor.trigger("predict", CANARY, None)
    leaving[3].trigger("compare_strengths", CANARY, 0.5, None)
    for _ in leaving:
        assert queued.acquire(timeout=30)
    staying = Visitor(served.address)
    staying.trigger("predict", "fever", None)
    assert queued.acquire(timeout=30)
    for visitor in leaving:
        visitor.leave()
    end = time.monotonic() + 10  # long before those who stay are told that the service is busy
    while sum(future.cancelled() for future in futures) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    assert [future.cancelled() for future in futures] == [True] * 4 + [False]
    go_on.set()
    assert '"success":true' in staying.stream.read().decode()
    staying.leave()
    assert set(served.computed) == {"fever"}
    assert caplog.messages == []  # leaving is no error


def test_what_needs_no_model_is_answered_while_others_wait_for_it(served, go_on):
    waiting = Visitor(served.address)
    waiting.trigger("compare_strengths", "fever", 0.5, None)
    other = Visitor(served.address)
    start = time.monotonic()
    other.trigger("choose_result", "8", None)
    assert '"success":true' in other.stream.read().decode()
    assert time.monotonic() - start < 15  # long before the other is told that the service is busy
    go_on.set()
    assert '"success":true' in waiting.stream.read().decode()


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")
def test_one_address_does_not_fill_the_pages_queue(served, go_on):
    greedy = [Visitor(served.address) for _ in range(4)]
    statuses = {visitor.join("predict", "fever", None) for visitor in greedy * 40}
    assert statuses == {200, 503}
    other = Visitor(served.address, "127.0.0.2")
    other.trigger("predict", "fever", None)
    go_on.set()
    assert '"success":true' in other.stream.read().decode()


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")
def test_many_sessions_of_one_address_push_out_no_others(served, monkeypatch):
    """Gradio keeps the messages of 2,000 sessions; here of 120, to save time.

    Gradio has no public name for its queue, nor for what it remembers of each session.
    """
    queue = served.page._queue
    queue.pending_messages_per_session.max_size = 120
    other = Visitor(served.address, "127.0.0.2")
    other.join("predict", "fever", None)
    greedy = Visitor(served.address)
    monkeypatch.setattr(sessions, "MOST_UNREAD_MESSAGES", 10_000)  # another limit, met before
    accepted = 0
    end = time.monotonic() + 60
    while accepted < 150 and time.monotonic() < end:
        accepted += greedy.join("clear", "fever", None, session=f"s{accepted}") == 200
    assert accepted == 150
    assert len(queue.pending_event_ids_session) < 110  # the memory does not grow either
    other.connection.close()  # it was idle: listen() opens a new one
    other.listen()
    assert '"success":true' in other.stream.read().decode()


def test_a_file_whose_visitor_leaves_is_given_up(served, classifier, monkeypatch):
    run = classifier.logits
    monkeypatch.setattr(classifier, "logits", lambda *a: time.sleep(0.1) or run(*a))
    visitor = Visitor(served.address)
    file = visitor.upload("transcription\n" + f"{CANARY}\n" * 1600)  # 100 times 16
    visitor.trigger("classify_file", file, "transcription", [])
    end = time.monotonic() + 30
    while not served.computed and time.monotonic() < end:
        time.sleep(0.05)
    visitor.leave()
    time.sleep(1)
    computed = len(served.computed)
    time.sleep(1)
    assert 0 < computed == len(served.computed) < 1600
    assert not Path(file["path"]).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")
def test_a_client_that_uploads_many_files_delays_others_by_one(served, monkeypatch):
    done = []

    def read_slowly(content):
        time.sleep(0.5)
        done.append(content)

    monkeypatch.setattr(gate, "check_in_subprocess", read_slowly)
    greedy = [Visitor(served.address) for _ in range(5)]
    other = Visitor(served.address, "127.0.0.2")
    uploads = [threading.Thread(target=visitor.upload, args=("greedy",)) for visitor in greedy]
    for upload in uploads:
        upload.start()
    time.sleep(0.3)  # all of them wait, but the one that is being read
    other.upload("modest")
    for upload in uploads:
        upload.join(60)
    assert len(done) == 6
    assert done.index(b"modest") <= 2


def test_uploads_of_clients_that_hang_up_are_not_read(served, monkeypatch):
    go_on = threading.Event()
    began = threading.Event()
    read = []

    def read_slowly(content):
        read.append(content)
        began.set()
        go_on.wait(60)

    monkeypatch.setattr(gate, "check_in_subprocess", read_slowly)
    first, *leaving, staying = [Visitor(served.address) for _ in range(4)]
    answers = []
    uploads = [threading.Thread(target=lambda: answers.append(first.upload("first")))]
    uploads[0].start()
    assert began.wait(30)
    for visitor in leaving:
        visitor.send_upload("leaving")
    time.sleep(0.5)
    for visitor in leaving:
        visitor.connection.close()
    uploads.append(threading.Thread(target=lambda: answers.append(staying.upload("staying"))))
    uploads[1].start()
    time.sleep(0.5)
    go_on.set()
    for upload in uploads:
        upload.join(60)
    assert len(answers) == 2
    assert read == [b"first", b"staying"]


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")
def test_of_one_address_few_uploads_wait(served, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(gate, "check_in_subprocess", lambda _content: go_on.wait(60) and None)
    waiting = [Visitor(served.address) for _ in range(1 + gate.MOST_WAITING_UPLOADS)]
    for visitor in waiting:
        visitor.send_upload("waiting")
    time.sleep(0.5)
    refused = Visitor(served.address)
    refused.send_upload("one more")
    answer = refused.connection.getresponse()
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    other = Visitor(served.address, "127.0.0.2")
    other.send_upload("of another address")
    go_on.set()
    for visitor in (*waiting, other):
        assert visitor.connection.getresponse().status == 200
