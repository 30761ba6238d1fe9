"""What do attackers cost the others? Answers of the service with and without each attack.

    python -m benchmarks.siege

Starts ``serve.py`` on the loopback address and attacks it from 127.0.0.1. A client at 127.0.0.2
sends short notes, one after the other, before each attack and during it. Takes under three minutes.
On systems where 127.0.0.2 is not an address of the machine (macOS), this does not run.
"""

import argparse
import base64
import http.client
import json
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from clinora.serving.batcher import MOST_TOKENS
from clinora.serving.passwords import scrypt

ROOT = Path(__file__).parents[1]
ATTACKER = "127.0.0.1"
CLIENT = "127.0.0.2"
NOTES = [
    "Chest pain and shortness of breath. ECG shows ST elevation.",
    "Left knee pain and swelling after a twisting injury.",
    "CT of the abdomen with contrast shows no free fluid.",
    "The appendix was divided with a stapler and removed.",
]
LONG_NOTE = "The patient denies chest pain and reports a swollen knee after the fall. " * 400
PASSWORD = "correct horse battery"


class Client:
    """A client of ``/v1/classify`` with one connection of its own.

    Args:
        port: Of the service.
        address: Where the client comes from.
        credentials: Its name and password, ``name:password``.
    """

    def __init__(self, port: int, address: str, credentials: str | None = None) -> None:
        self.connection = http.client.HTTPConnection(
            "127.0.0.1", port, timeout=60, source_address=(address, 0)
        )
        self.headers = {"Content-Type": "application/json"}
        if credentials is not None:
            encoded = base64.b64encode(credentials.encode()).decode()
            self.headers["Authorization"] = f"Basic {encoded}"

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
    """Start serve.py and give its process and port."""
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
    """Keep guessing a password, each guess another one."""
    done = threading.Event()

    def guess(number: int) -> None:
        tries = 0
        while not done.is_set():
            client = Client(port, ATTACKER, f"user0:guess {number} {tries}")
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
    """Give the seconds that the largest batch of long notes takes: the median of five."""
    client = Client(port, CLIENT)
    _, answer = client.post({"note": LONG_NOTE})
    notes = [LONG_NOTE] * (MOST_TOKENS // answer["tokens_read"])
    took = []
    for _ in range(5):
        began = time.perf_counter()
        client.post({"notes": notes})
        took.append(time.perf_counter() - began)
    client.close()
    return float(np.median(took))


def many_clients(port: int, count: int, seconds: float) -> None:
    """Let clients ask at once, and compare each answer with that of its note alone."""
    alone = Client(port, CLIENT)
    expected = {note: alone.post({"note": note})[1] for note in NOTES}
    alone.close()
    end = time.perf_counter() + seconds

    def ask(start: int) -> list[float]:
        """Give of each answer how far its probabilities are from those of the note alone."""
        client = Client(port, CLIENT)
        apart = []
        while time.perf_counter() < end:
            note = NOTES[(start + len(apart)) % len(NOTES)]
            status, answer = client.post({"note": note})
            apart.append(_difference(answer, expected[note]) if status == 200 else float("inf"))
        client.close()
        return apart

    with ThreadPoolExecutor(count) as pool:
        apart = [difference for one in pool.map(ask, range(count)) for difference in one]
    print(
        f"{count} clients for {seconds:g} s: {len(apart)} asked, "
        f"{sum(np.isfinite(apart))} answered; largest difference of a probability from the "
        f"note's own answer {max(apart):.1e}",
        flush=True,
    )


def _difference(answer: dict, expected: dict) -> float:
    pairs = zip(answer["probabilities"].values(), expected["probabilities"].values(), strict=True)
    return max(abs(a - b) for a, b in pairs)


def log_in(port: int, users: range) -> None:
    """Log each user in from the client's address, and print the seconds that it took."""
    took = []
    for user in users:  # a header that was right before would be admitted at once
        client = Client(port, CLIENT, f"user{user}:{PASSWORD}")
        began = time.perf_counter()
        status, _ = client.post({"note": NOTES[0]})
        took.append(time.perf_counter() - began)
        client.close()
        if status != 200:
            raise RuntimeError(f"the right password was answered with status {status}")
    print(
        f"{len(took)} right passwords: median {np.median(took):.2f} s, longest {max(took):.2f} s",
        flush=True,
    )


def password_line(user: int) -> str:
    """Give the line of a user in a password file."""
    salt = secrets.token_bytes(16)
    return f"user{user}:{salt.hex()}:{scrypt(PASSWORD, salt).hex()}\n"


def end_with_everything_open(process: subprocess.Popen, port: int) -> None:
    """Open streams, half requests and one accepted request; end the service, print the seconds."""
    answered: list[tuple[int, float]] = []

    def ask() -> None:
        client = Client(port, CLIENT)
        status, _ = client.post({"notes": [LONG_NOTE] * 32})
        answered.append((status, time.perf_counter()))

    with ExitStack() as open_connections:
        head = b"Host: 127.0.0.1\r\nCookie: clinora_visit=x\r\n"
        for request in (
            b"GET /gradio_api/heartbeat/one HTTP/1.1\r\n" + head + b"\r\n",
            b"GET /gradio_api/queue/data?session_hash=one HTTP/1.1\r\n" + head + b"\r\n",
            b"POST /v1/classify HTTP/1.1\r\n" + head + b"Content-Length: 1000\r\n\r\n{",
            b"GET / HTTP/1.1\r\nX-Slow: ",
        ):
            for _ in range(5):
                open_connections.enter_context(_connect(port)).sendall(request)
        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        ended = time.perf_counter()
        asking.join(60)
    (status, at) = answered[0]
    said = process.stderr.read()
    print(
        f"end with everything open: the accepted request got status {status}; the exit came "
        f"{ended - at:.1f} s after it, status {process.returncode}, on stderr: {said!r}"
    )


def main(argv: list[str] | None = None) -> int:
    """Attack, measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="bundled", help="a folder that train.py wrote")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--clients-seconds", type=float, default=20.0, help="of 32 clients at once")
    args = parser.parse_args(argv)
    with service("--run", args.run) as (process, port):
        print(f"the largest batch of long notes, alone: {1e3 * batch_seconds(port):.0f} ms")
        quiet = measure(port, args.seconds)
        report("no attack", quiet)
        with slow_connections(port, 200):
            report("200 slow connections", measure(port, args.seconds), quiet)
        with greedy_clients(port, 3):
            report("3 clients of 32 long notes each", measure(port, args.seconds), quiet)
        many_clients(port, 32, args.clients_seconds)
        end_with_everything_open(process, port)
    with tempfile.TemporaryDirectory() as folder:
        passwords = Path(folder) / "passwords.txt"
        passwords.write_text("".join(map(password_line, range(20))))
        options = ["--allow-host", "notes.example", "--auth-file", str(passwords)]
        with service("--run", args.run, *options) as (_, port):
            print("no attack: ", end="")
            log_in(port, range(10))
            with wrong_passwords(port, 16):
                print("16 clients guess passwords: ", end="")
                log_in(port, range(10, 20))
    return 0


if __name__ == "__main__":
    sys.exit(main())
