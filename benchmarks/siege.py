"""Attacks on the service: a client's response times without an attack and during each attack.

    python -m benchmarks.siege

This starts ``serve.py`` on the loopback address and attacks it from 127.0.0.1. A client at
127.0.0.2 sends short notes, one after the other, before the attacks and during each of them. It
takes less than three minutes. It does not run where 127.0.0.2 is not an address of the machine
(macOS).
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

from benchmarks.common import NO_LIMIT
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
    """A client of ``/v1/classify`` with its own connection.

    Args:
        port: Port of the service.
        address: The client's address.
        credentials: The user's name and password, ``name:password``.
    """

    def __init__(self, port: int, address: str, credentials: str | None = None) -> None:
        self.connection = http.client.HTTPConnection(
            "127.0.0.1", port, timeout=60, source_address=(address, 0)
        )
        self.headers = {"Content-Type": "application/json"}
        if credentials is not None:
            encoded = base64.b64encode(credentials.encode()).decode()
            self.headers["Authorization"] = f"Basic {encoded}"

    def post(self, body: dict) -> tuple[int, dict]:
        """Send a request body; give the response's status and body."""
        self.connection.request("POST", "/v1/classify", json.dumps(body), self.headers)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


# --- the service --------------------------------------------------------------------------------


@contextmanager
def service(*options: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Run serve.py in the ``with`` block; give its process and port."""
    command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", *options]
    # The attackers and the client have one address, so that the limit would refuse the client.
    command += ["--rate-limit", str(NO_LIMIT)]
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
    """Send short notes from the client's address; give the seconds that each response took."""
    client = Client(port, CLIENT)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        note = NOTES[len(times) % len(NOTES)]
        began = time.perf_counter()
        status, _ = client.post({"note": note})
        if status != 200:
            raise RuntimeError(f"the response to the client's note has status {status}")
        times.append(time.perf_counter() - began)
    client.close()
    return np.array(times)


def report(what: str, times: np.ndarray, quiet: np.ndarray | None = None) -> None:
    """Print the median and 95th percentile of times, and their ratios to those without attack."""
    median, p95 = np.percentile(times, (50, 95))
    line = f"{what:<34} {len(times):>5} responses, median {1e3 * median:6.1f} ms, "
    line += f"95th percentile {1e3 * p95:6.1f} ms"
    if quiet is not None:
        quiet_median, quiet_p95 = np.percentile(quiet, (50, 95))
        line += f"  ({median / quiet_median:.2f} and {p95 / quiet_p95:.2f} times)"
    print(line, flush=True)


# --- the attacks --------------------------------------------------------------------------------


@contextmanager
def slow_connections(port: int, count: int) -> Iterator[None]:
    """Keep ``count`` connections open that send one byte of their headers each second."""
    done = threading.Event()
    held: list[socket.socket] = []

    def send_slowly() -> None:
        while not done.is_set():
            for connection in list(held):
                try:
                    connection.send(b"x")
                except OSError:  # the service closed it at its deadline: open another one below
                    held.remove(connection)
            while len(held) < count and not done.is_set():
                connection = _connect(port)
                held.append(connection)
                connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
            done.wait(1)

    thread = threading.Thread(target=send_slowly)
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
    """Send requests of 32 long notes from ``count`` clients, one after the other."""
    done = threading.Event()

    def send_requests() -> None:
        while not done.is_set():
            client = Client(port, ATTACKER)
            client.post({"notes": [LONG_NOTE] * 32})
            client.close()

    with ThreadPoolExecutor(count) as pool:
        for _ in range(count):
            pool.submit(send_requests)
        time.sleep(2)
        yield
        done.set()


@contextmanager
def wrong_passwords(port: int, count: int) -> Iterator[None]:
    """Guess passwords from ``count`` clients, each guess another one."""
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


# --- measurements -------------------------------------------------------------------------------


def batch_seconds(port: int) -> float:
    """Give the seconds that the largest batch of long notes takes: the median of five."""
    client = Client(port, CLIENT)
    _, response = client.post({"note": LONG_NOTE})
    notes = [LONG_NOTE] * (MOST_TOKENS // response["tokens_read"])
    times = []
    for _ in range(5):
        began = time.perf_counter()
        client.post({"notes": notes})
        times.append(time.perf_counter() - began)
    client.close()
    return float(np.median(times))


def many_clients(port: int, count: int, seconds: float) -> None:
    """Let clients send notes at once, and compare each prediction with that of the note alone."""
    alone = Client(port, CLIENT)
    expected = {}
    for note in NOTES:
        _, expected[note] = alone.post({"note": note})
    alone.close()
    end = time.perf_counter() + seconds

    def send_notes(start: int) -> list[float]:
        """Give, for each request, the difference from the note alone; infinity for an error."""
        client = Client(port, CLIENT)
        differences = []
        while time.perf_counter() < end:
            note = NOTES[(start + len(differences)) % len(NOTES)]
            status, response = client.post({"note": note})
            if status == 200:
                differences.append(_difference(response, expected[note]))
            else:
                differences.append(float("inf"))
        client.close()
        return differences

    differences = []
    with ThreadPoolExecutor(count) as pool:
        for of_client in pool.map(send_notes, range(count)):
            differences += of_client
    print(
        f"{count} clients for {seconds:g} s: {len(differences)} requests, "
        f"{sum(np.isfinite(differences))} classified; largest difference of a probability from "
        f"that of the note alone {max(differences):.1e}",
        flush=True,
    )


def _difference(response: dict, expected: dict) -> float:
    """Give the largest difference between the probabilities in two responses."""
    pairs = zip(response["probabilities"].values(), expected["probabilities"].values(), strict=True)
    return max(abs(found - wanted) for found, wanted in pairs)


def log_in(port: int, users: range) -> None:
    """Log in each user from the client's address, and print the seconds that it took."""
    times = []
    # Each user logs in once: a header that was accepted before is admitted at once.
    for user in users:
        client = Client(port, CLIENT, f"user{user}:{PASSWORD}")
        began = time.perf_counter()
        status, _ = client.post({"note": NOTES[0]})
        times.append(time.perf_counter() - began)
        client.close()
        if status != 200:
            raise RuntimeError(f"the response to the right password has status {status}")
    print(
        f"{len(times)} correct passwords: median {np.median(times):.2f} s, "
        f"longest {max(times):.2f} s",
        flush=True,
    )


def password_line(user: int) -> str:
    """Make a user's line of a password file."""
    salt = secrets.token_bytes(16)
    return f"user{user}:{salt.hex()}:{scrypt(PASSWORD, salt).hex()}\n"


def end_with_everything_open(process: subprocess.Popen, port: int) -> None:
    """Stop the service with streams, half requests and a request open; print how long it took."""
    responses: list[tuple[int, float]] = []  # status, and when it arrived

    def send_request() -> None:
        client = Client(port, CLIENT)
        status, _ = client.post({"notes": [LONG_NOTE] * 32})
        responses.append((status, time.perf_counter()))

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
        thread = threading.Thread(target=send_request)
        thread.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        ended = time.perf_counter()
        thread.join(60)
    status, arrived = responses[0]
    stderr = process.stderr.read()
    print(
        f"stop with everything open: the accepted request got status {status}; the service ended "
        f"{ended - arrived:.1f} s after it, exit status {process.returncode}, stderr: {stderr!r}"
    )


def main(argv: list[str] | None = None) -> int:
    """Attack, measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="bundled", help="bundled, or a run's folder")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each measurement")
    parser.add_argument(
        "--clients-seconds", type=float, default=20.0, help="length of that of 32 clients at once"
    )
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
