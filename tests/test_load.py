"""Many clients at once: each request has an answer, and an overloaded service recovers."""

import http.client
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

import clinora
from clinora.serving import sessions
from clinora.serving.batcher import MOST_TOGETHER
from clinora.serving.sessions import MOST_EVENTS_OF_A_CLIENT
from clinora.serving.words import EXAMPLES
from tests.served import join


@pytest.fixture(scope="module")
def classifier(small_run):
    """The run, loaded with the same defaults as in the process that serves it."""
    return clinora.Classifier.load(small_run)


class Client(threading.Thread):
    """A client that sends one request after the other, for some seconds.

    Each request holds one of the notes, ``copies`` times. ``answers`` has a (status, note, label)
    for each answer; a request that got no answer has its error in place of the status.
    """

    def __init__(self, url, notes, seconds, copies=1):
        super().__init__()
        self.address = url.removeprefix("http://")
        self.notes = notes
        self.copies = copies
        self.end = time.monotonic() + seconds
        self.answers = []

    def run(self):
        try:
            self.send_requests()
        except Exception as error:
            self.answers.append((repr(error), None, None))

    def send_requests(self):
        connection = http.client.HTTPConnection(self.address, timeout=60)
        headers = {"Content-Type": "application/json"}
        for note in itertools.cycle(self.notes):
            if time.monotonic() > self.end:
                break
            body = {"note": note} if self.copies == 1 else {"notes": [note] * self.copies}
            connection.request("POST", "/v1/classify", json.dumps(body), headers)
            answer = connection.getresponse()
            content = json.loads(answer.read())
            for result in content.get("results", [content]):
                self.answers.append((answer.status, note, result.get("label")))


def answers_of(count, *arguments):
    """Run some clients at once; give the answers of all of them."""
    clients = [Client(*arguments) for _ in range(count)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return [answer for client in clients for answer in client.answers]


@pytest.mark.slow
def test_32_clients_for_6_seconds_get_all_answers(served, classifier):
    notes = [f"{note} {word}" for note in EXAMPLES for word in ("fever", "fracture", "chest")]
    labels = {note: classifier([note])[0].label for note in notes}
    answers = answers_of(32, served.url(), notes, 6)
    assert len(answers) > 32
    assert {status for status, *_ in answers} == {200}
    assert all(label == labels[note] for _, note, label in answers)


def send(url, body, times):
    """Send the same request some times over one connection; give the statuses of the answers."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    statuses = []
    for _ in range(times):
        connection.request("POST", "/v1/classify", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    connection.close()
    return statuses


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_answers(served):
    """Of one note, so that batches have few shapes: PyTorch keeps memory for each shape."""
    note = EXAMPLES[0]
    for copies in range(1, MOST_TOGETHER + 1):
        assert send(served.url(), json.dumps({"notes": [note] * copies}), 1) == [200]
    body = json.dumps({"note": note})
    process = psutil.Process(served.process.pid)
    memory = []
    for times in (20, 100):
        with ThreadPoolExecutor(32) as clients:
            answers = clients.map(send, [served.url()] * 32, [body] * 32, [times] * 32)
        assert list(answers) == [[200] * times] * 32
        memory.append(process.memory_info().rss)
    assert memory[1] - memory[0] < 3e6


@pytest.mark.slow
def test_overload_is_answered_with_503_and_passes(served, classifier):
    labels = {note: classifier([note])[0].label for note in EXAMPLES}
    answers = answers_of(8, served.url(), EXAMPLES, 1.5, 32)  # 256 notes at once; 64 may wait
    statuses = {status for status, *_ in answers}
    assert statuses == {200, 503}
    assert all(label == labels[note] for status, note, label in answers if status == 200)
    assert {status for status, *_ in answers_of(1, served.url(), EXAMPLES, 1)} == {200}


def test_a_client_with_too_many_events_is_refused_at_once(client, classifier, monkeypatch):
    may_go_on = threading.Event()
    logits = classifier.logits
    monkeypatch.setattr(classifier, "logits", lambda *a: may_go_on.wait(30) and logits(*a))
    most = MOST_EVENTS_OF_A_CLIENT
    answers = [join(client, "predict", "fever", None, session=f"s{i}") for i in range(most + 1)]
    may_go_on.set()
    assert [answer.status_code for answer in answers] == [200] * most + [503]


def test_a_client_that_does_not_read_its_results_is_refused(client, monkeypatch):
    monkeypatch.setattr(sessions, "MOST_UNREAD_MESSAGES", 10)
    details = []
    for _ in range(30):
        answer = join(client, "clear", "fever", None, session="one")
        details.append(answer.json().get("detail", ""))
        time.sleep(0.05)
    assert details[0] == ""
    assert "not read" in details[-1]
