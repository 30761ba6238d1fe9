"""What one client may hold of the server, and how the service ends, all over real sockets."""

import gc
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import clinora
from clinora.serving import gate
from clinora.serving.app import create_app
from clinora.serving.server import Connection, Limits
from tests.served import read_until, running

ROOT = Path(__file__).parents[1]
# Each request is of one visit: the service takes any name for it.
HEADERS = b"Host: 127.0.0.1\r\nCookie: clinora_visit=one\r\nContent-Type: application/json\r\n"
NOTE = json.dumps({"note": "chest pain"}).encode()
OTHER_ADDRESS = "127.0.0.2"


def get(path):
    """Give the bytes of a request."""
    return f"GET {path} HTTP/1.1\r\n".encode() + HEADERS + b"\r\n"


def post(body, announced=None, path="/v1/classify"):
    """Give the bytes of a request with a body; ``announced`` is its Content-Length."""
    length = len(body) if announced is None else announced
    head = f"POST {path} HTTP/1.1\r\n".encode() + HEADERS
    return head + f"Content-Length: {length}\r\n\r\n".encode() + body


HEALTH = get("/health")
# An event of the page, and the stream that brings its result.
PREDICT = gate.EVENTS.index("predict")
EVENT = {"fn_index": PREDICT, "data": ["knee pain", None], "session_hash": "one"}
CALL = post(json.dumps(EVENT).encode(), path="/gradio_api/queue/join")
EVENTS = get("/gradio_api/queue/data?session_hash=one")


@pytest.fixture
def start(small_run, tmp_path):
    """Start a server with limits of its own; gives its port."""

    def start_with(trusted_proxies=(), **limits):
        run = clinora.Classifier.load(small_run)
        app = create_app(run, tmp_path / "flagged", trusted_proxies=trusted_proxies)
        return running(app, Limits(**limits))

    return start_with


@contextmanager
def connected(port, sent=b"", address="127.0.0.1", **options):
    with socket.socket() as client:
        client.settimeout(30)
        if "receive_buffer" in options:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["receive_buffer"])
        client.bind((address, 0))
        client.connect(("127.0.0.1", port))
        client.sendall(sent)
        yield client


def status_of(client):
    """Read one answer; its status, or None where the connection ended without one."""
    answer = http.client.HTTPResponse(client)
    try:
        answer.begin()
        answer.read()
    except (ConnectionError, http.client.HTTPException):
        return None
    return answer.status


def ask(port, address="127.0.0.1"):
    with connected(port, HEALTH, address) as client:
        return status_of(client)


def trickle(client, text, pause, seconds):
    """Send byte after byte until the server answers or closes; gives the seconds that it took.

    It gives up after ``seconds``.
    """
    began = time.monotonic()
    for byte in text:
        if time.monotonic() - began > seconds:
            break
        try:
            client.sendall(bytes([byte]))
            client.settimeout(pause)
            client.recv(1, socket.MSG_PEEK)
            break  # an answer, or the end
        except TimeoutError:
            continue
        except ConnectionError:
            break
    client.settimeout(30)
    return time.monotonic() - began


# --- Deadlines ---


def test_headers_that_trickle_are_closed_while_others_are_answered(start):
    with start(seconds=1) as port, connected(port, b"GET / HTTP/1.1\r\n") as client:
        answers = []
        beside = threading.Timer(0.5, lambda: answers.append(ask(port)))
        beside.start()
        seconds = trickle(client, b"X: " + b"a" * 1000, 0.05, 10)
        beside.join()
        assert 0.5 < seconds < 8
        assert status_of(client) == 408
        assert answers == [200]


def test_a_connection_on_which_nothing_comes_is_closed(start):
    with start(seconds=1) as port, connected(port) as client:
        began = time.monotonic()
        status_of(client)
        assert 0.5 < time.monotonic() - began < 8


def test_the_headers_of_a_second_request_have_the_same_deadline(start):
    with start(seconds=1) as port, connected(port, HEALTH) as client:
        assert status_of(client) == 200
        seconds = trickle(client, b"GET / HTTP/1.1\r\nX: " + b"a" * 1000, 0.05, 10)
        assert 0.5 < seconds < 8
        assert status_of(client) == 408


@pytest.mark.parametrize("size", ["announced", "chunked", "announced_as_huge"])
def test_a_body_that_trickles_is_closed(start, size):
    """10,000 bytes may take 1 + 10,000 / 10,000 seconds, and no body more."""
    head = b"POST /v1/classify HTTP/1.1\r\n" + HEADERS
    sent = {
        "announced": post(b"{", announced=10_000),
        "chunked": head + b"Transfer-Encoding: chunked\r\n\r\n1000\r\n",
        "announced_as_huge": post(b"{", announced=10**15),
    }[size]
    limits = {"seconds": 1, "bytes_per_second": 10_000, "largest_body": 10_000}
    with start(**limits) as port, connected(port, sent) as client:
        seconds = trickle(client, b" " * 1000, 0.05, 10)
        assert 1.5 < seconds < 8
        assert status_of(client) == 408
        assert ask(port) == 200


def test_a_body_at_an_honest_rate_gets_through_beyond_the_time_for_headers(start):
    body = NOTE + b" " * 10_000
    with (
        start(seconds=1, bytes_per_second=1_000) as port,
        connected(port, post(b"", announced=len(body))) as client,
    ):
        for i in range(0, len(body), 500):
            client.sendall(body[i : i + 500])
            time.sleep(0.1)
        assert status_of(client) == 200


def test_a_body_that_goes_on_after_its_answer_is_closed(start):
    """The name in Host is refused before the body is read."""
    sent = post(b"{", announced=10_000).replace(b"127.0.0.1", b"evil.test")
    limits = {"seconds": 1, "bytes_per_second": 10_000}
    with start(**limits) as port, connected(port, sent) as client:
        assert status_of(client) == 400
        assert 1 < trickle(client, b" " * 1000, 0.05, 10) < 8


def test_a_client_that_does_not_read_its_answers_is_closed(start):
    """It asks for far more than the system's buffers hold, and reads after the deadline."""
    many = 300
    page = get("/")
    limits = {"seconds": 1, "bytes_per_second": 1_000_000}
    with start(**limits) as port:
        with connected(port, page) as client:
            answer = http.client.HTTPResponse(client)
            answer.begin()
            size = len(answer.read())
        assert many * size > 15e6
        with connected(port, page * many, receive_buffer=4096) as client:
            time.sleep(4)
            read = 0
            try:
                while piece := client.recv(1_000_000):
                    read += len(piece)
            except ConnectionError:
                pass
        assert read < many * size / 2


def test_a_stream_is_no_unfinished_request(start):
    sent = get("/gradio_api/heartbeat/one")
    with start(seconds=0.5) as port, connected(port, sent) as client:
        stream = client.makefile("rb")
        read_until(stream, b"ALIVE")
        client.settimeout(3)
        with pytest.raises(TimeoutError):  # open, and silent until the next sign of life
            while client.recv(1000).strip():
                pass
            pytest.fail("the stream was closed")


def test_what_is_no_http_after_an_answer_leaves_nothing_in_the_log(start, caplog, capfd):
    sent = b"POST / HTTP/1.1\r\nHost: evil.test\r\nTransfer-Encoding: chunked\r\n\r\n"
    with caplog.at_level(logging.WARNING), start() as port, connected(port, sent) as client:
        assert status_of(client) == 400
        client.sendall(b"this is not the size of a chunk\r\n")
        assert status_of(client) is None
    assert caplog.records == []
    assert capfd.readouterr().err == ""  # uvicorn's own handler


# --- Parts of the connections ---


@contextmanager
def held(port, many, address="127.0.0.1"):
    """Hold connections on which a request has begun."""
    clients = [socket.create_connection(("127.0.0.1", port), 30, (address, 0)) for _ in range(many)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\n")
    time.sleep(0.3)
    yield
    for client in clients:
        client.close()
    time.sleep(0.3)


def test_an_address_has_a_part_of_the_connections_and_others_get_in(start):
    with start(connections_of_address=3) as port:
        with held(port, 2):
            assert ask(port) == 200
        with held(port, 3):
            assert ask(port) in (503, None)
            assert ask(port, OTHER_ADDRESS) == 200
        assert ask(port) == 200


def test_a_trusted_proxy_is_not_held_to_the_part_of_an_address(start):
    with start([OTHER_ADDRESS], connections_of_address=3) as port:
        with held(port, 6, OTHER_ADDRESS):
            assert ask(port, OTHER_ADDRESS) == 200
        with held(port, 3):
            assert ask(port) in (503, None)


def test_all_connections_together_are_bounded(start):
    """A trusted proxy's too."""
    with start([OTHER_ADDRESS], connections=4, connections_of_address=3) as port:
        with held(port, 2), held(port, 2, OTHER_ADDRESS):
            assert ask(port) in (503, None)
            assert ask(port, OTHER_ADDRESS) in (503, None)
        assert ask(port) == 200


# --- The end ---

# Each pass through the model takes some seconds.
SERVE = """
import signal, socket, sys, time
import clinora
from clinora.serving import gate
from clinora.serving.app import create_app
from clinora.serving.server import serve

classifier = clinora.Classifier.load(sys.argv[1])
logits = classifier.logits

def logits_slowly(ids, *rest):
    time.sleep(float(sys.argv[2]))
    return logits(ids, *rest)

classifier.logits = logits_slowly
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    serve(create_app(classifier, "flagged"), listener)
"""


@pytest.fixture
def process(small_run, tmp_path):
    """Start a process that serves; each pass through its model takes some seconds."""
    started = []

    def begin(seconds):
        served = subprocess.Popen(
            [sys.executable, "-c", SERVE, small_run, str(seconds)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "err").open("w"),
        )
        started.append(served)
        port = int(served.stdout.readline())
        assert ask(port) == 200  # the listener holds the request until the server has started
        return served, port

    yield begin
    for served in started:
        served.kill()
        served.wait(60)
        served.stdout.close()


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_closes_the_rest(process, tmp_path):
    served, port = process(4)
    with (
        connected(port, post(NOTE)) as accepted,
        connected(port, CALL) as result,
        connected(port, get("/gradio_api/heartbeat/two")) as stream,
        connected(port, post(b"{", announced=1000)) as half_body,
        connected(port, b"GET / HTTP/1.1\r\nHost: 127") as half_headers,
        connected(port, HEALTH) as idle,
        connected(port, get("/") * 300, receive_buffer=4096),
    ):
        assert status_of(result) == 200
        result.sendall(EVENTS)
        time.sleep(1)
        served.send_signal(signal.SIGTERM)
        stream.settimeout(2)
        while stream.recv(10_000):  # its beginning; then it is closed
            pass
        assert status_of(half_body) in (503, None)
        assert half_headers.recv(1000) == b""
        assert status_of(idle) == 200
        assert idle.recv(1000) == b""
        assert served.poll() is None
        delivered = b""
        while piece := result.recv(10_000):
            delivered += piece
        assert b"process_completed" in delivered and b"Predicted Label" in delivered
        assert status_of(accepted) == 200
        assert served.wait(5) == 0
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_on_a_connection_that_sent_a_stream_before(process):
    served, port = process(2)
    with connected(port, CALL) as client:
        for next_request in (EVENTS, post(NOTE)):
            assert status_of(client) == 200
            client.sendall(next_request)
        time.sleep(0.5)
        served.send_signal(signal.SIGTERM)
        assert status_of(client) == 200
        assert served.wait(5) == 0


@pytest.mark.slow
def test_sigterm_does_not_wait_for_a_stream_that_has_no_result_to_deliver(process, tmp_path):
    served, port = process(0)
    with connected(port, CALL) as joined, connected(port) as first, connected(port) as second:
        assert status_of(joined) == 200
        first.sendall(EVENTS)
        read_until(first.makefile("rb"), b"process_completed")
        second.sendall(EVENTS)
        second.settimeout(2)
        with pytest.raises(TimeoutError):  # it waits for a next event
            while second.recv(10_000):
                pass
            pytest.fail("the stream was closed")
        served.send_signal(signal.SIGTERM)
        assert served.wait(5) == 0
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.slow
def test_what_lasts_too_long_is_dropped_at_the_end_without_a_word(
    start, caplog, capfd, monkeypatch
):
    """A request to the API, and an event of the page."""
    run = clinora.Classifier.__call__

    def run_slowly(self, *arguments):
        time.sleep(4)
        return run(self, *arguments)

    monkeypatch.setattr(clinora.Classifier, "__call__", run_slowly)
    with caplog.at_level(logging.WARNING), ExitStack() as clients:
        with start(shutdown_seconds=0.5) as port:
            joined = clients.enter_context(connected(port, CALL))
            assert status_of(joined) == 200
            clients.enter_context(connected(port, EVENTS))
            asking = clients.enter_context(connected(port, post(NOTE)))
            time.sleep(0.5)
        assert status_of(asking) is None
        gc.collect()  # asyncio reports errors that nobody saw when it forgets them
    assert caplog.records == []
    assert capfd.readouterr().err == ""  # uvicorn's own handler


def test_an_answer_is_sent_at_once(start, monkeypatch):
    """Without TCP_NODELAY its body waits until the client has acknowledged its headers."""
    delayed = []
    accept = Connection.connection_made

    def accept_and_note(connection, transport):
        accept(connection, transport)
        accepted = transport.get_extra_info("socket")
        delayed.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0)

    monkeypatch.setattr(Connection, "connection_made", accept_and_note)
    with start() as port:
        assert ask(port) == 200
    assert delayed == [False]
