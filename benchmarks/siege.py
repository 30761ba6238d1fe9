"""What do attackers cost the others? Answers of the service with and without each attack.

    python -m benchmarks.siege

Starts ``serve.py`` on the loopback address and attacks it from 127.0.0.1. A client at 127.0.0.2
sends short notes, one after the other, before each attack and during it. Takes under three minutes.
On systems where 127.0.0.2 is not an address of the machine (macOS), this does not run.
"""

import base64
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
ATTACKER = "127.0.0.1"
CLIENT = "127.0.0.2"
NOTES = [
    "Chest pain and shortness of breath. ECG shows ST elevation.",
    "Left knee pain and swelling after a twisting injury.",
    "CT of the abdomen with contrast shows no free fluid.",
    "The appendix was divided with a stapler and removed.",
]
LONG_NOTE = ("The patient denies chest pain and reports a swollen knee after the fall. " * 500)[:30_000]
PASSWORD = "correct horse battery"


class Client:
    """A client of ``/v1/classify`` with one connection of its own."""

    def __init__(self, port: int, address: str, password: str | None = None) -> None:
        self.connection = http.client.HTTPConnection(
            "127.0.0.1", port, timeout=60, source_address=(address, 0)
        )
        self.headers = {"Content-Type": "application/json"}
        if password is not None:
            credentials = base64.b64encode(f"alice:{password}".encode()).decode()
            self.headers["Authorization"] = f"Basic {credentials}"

    def post(self, question: dict) -> tuple[int, dict]:
        """Ask; give the status and the answer."""
        self.connection.request("POST", "/v1/classify", json.dumps(question), self.headers)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


# --- the service --------------------------------------------------------------------------------


@contextmanager
def service(*options: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start serve.py and give its process and port; its output goes nowhere."""
    command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", *options]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"serve.py did not start: {process.stderr.read()}")
            yield process, int(line.rpartition(":")[2])
        finally:
            process.kill()
            process.communicate()


def measure(port: int, seconds: float) -> np.ndarray:
    """Send short notes from the client's address; give the seconds of each answer."""
    client = Client(port, CLIENT)
    took = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        status, _ = client.post({"note": NOTES[len(took) % len(NOTES)]})
        if status != 200:
            raise RuntimeError(f"the client's note was answered with status {status}")
        took.append(time.perf_counter() - began)
    client.close()
    return np.array(took)


def report(what: str, took: np.ndarray, quiet: np.ndarray | None = None) -> None:
    """Print median and 95th percentile, and their ratios to those without an attack."""
    median, late = np.percentile(took, (50, 95))
    line = f"{what:<34} {len(took):>5} answers, median {1e3 * median:6.1f} ms, "
    line += f"95th percentile {1e3 * late:6.1f} ms"
    if quiet is not None:
        quiet_median, quiet_late = np.percentile(quiet, (50, 95))
        line += f"  ({median / quiet_median:.2f} and {late / quiet_late:.2f} times)"
    print(line, flush=True)


# --- the attacks --------------------------------------------------------------------------------


@contextmanager
def slow_connections(port: int, count: int) -> Iterator[None]:
    """Hold connections that send a byte of their headers each second, as many as one may have."""
    done = threading.Event()
    held: list[socket.socket] = []

    def trickle() -> None:
        while not done.is_set():
            for connection in list(held):
                try:
                    connection.send(b"x")
                except OSError:  # closed at its deadline: come again
                    held.remove(connection)
            while len(held) < count and not done.is_set():
                held.append(_connect(port))
                held[-1].sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
            done.wait(1)

    thread = threading.Thread(target=trickle)
    thread.start()
    time.sleep(2)
    yield
    done.set()
    thread.join()
    for connection in held:
        connection.close()


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10, source_address=(ATTACKER, 0))


@contextmanager
def greedy_clients(port: int, count: int) -> Iterator[None]:
    """Keep requests of 32 long notes coming, the next as soon as one is answered."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            client = Client(port, ATTACKER)
            client.post({"notes": [LONG_NOTE] * 32})
            client.close()

    with ThreadPoolExecutor(count) as pool:
        for _ in range(count):
            pool.submit(ask)
        time.sleep(2)
        yield
        done.set()


@contextmanager
def wrong_passwords(port: int, count: int) -> Iterator[None]:
    """Keep guessing alice's password, each guess another one."""
    done = threading.Event()

    def guess(number: int) -> None:
        tries = 0
        while not done.is_set():
            client = Client(port, ATTACKER, f"guess {number} {tries}")
            client.post({"note": "fever"})
            client.close()
            tries += 1

    with ThreadPoolExecutor(count) as pool:
        for number in range(count):
            pool.submit(guess, number)
        time.sleep(2)
        yield
        done.set()


# --- what is measured ---------------------------------------------------------------------------


def batch_seconds(port: int) -> float:
    """Give the seconds of one request of one long note alone: the median of five."""
    client = Client(port, CLIENT)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        client.post({"note": LONG_NOTE})
        took.append(time.perf_counter() - began)
    client.close()
    return float(np.median(took))


def many_clients(port: int, count: int, seconds: float) -> None:
    """Let clients ask at once, and compare each answer with that of its note alone."""
    alone = Client(port, CLIENT)
    expected = {note: alone.post({"note": note})[1]["probabilities"] for note in NOTES}
    alone.close()
    end = time.perf_counter() + seconds

    def ask(start: int) -> tuple[int, int, float]:
        client = Client(port, CLIENT)
        asked, equal, apart = 0, 0, 0.0
        while time.perf_counter() < end:
            note = NOTES[(start + asked) % len(NOTES)]
            status, answer = client.post({"note": note})
            asked += 1
            if status == 200:
                gaps = [abs(answer["probabilities"][k] - p) for k, p in expected[note].items()]
                apart = max(apart, *gaps)
                equal += max(gaps) < 0.01  # bfloat16 rounds otherwise in another batch
        client.close()
        return asked, equal, apart

    with ThreadPoolExecutor(count) as pool:
        rows = list(pool.map(ask, range(count)))
    asked, equal, apart = sum(r[0] for r in rows), sum(r[1] for r in rows), max(r[2] for r in rows)
    print(
        f"{count} clients for {seconds:g} s: {asked} asked, {equal} answered as alone; largest "
        f"difference of a probability {apart:.1e}",
        flush=True,
    )
