"""Batching in the server: notes classified per second over HTTP, in batches and one at a time.

    python -m benchmarks.serving

32 clients send notes to ``/v1/classify`` of the page's own server on this machine. Each client
sends one note per request, and its next request after the response to the last. The two ways are
measured in turns.
"""

import argparse
import http.client
import json
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import clinora
from benchmarks.common import NO_LIMIT, spread
from clinora.device import keep_freed_memory
from clinora.serving.app import create_app, serve
from clinora.serving.batcher import MOST_TOGETHER
from clinora.serving.rate_limit import RateLimit

WORDS = "the patient denies chest pain and reports a swollen knee after the fall on the left side "


def note_of(classifier: clinora.Classifier, tokens: int) -> str:
    """Make a note of about ``tokens`` tokens."""
    ids = classifier.tokenizer.encode(WORDS * tokens)[:tokens]
    return classifier.tokenizer.decode(ids)


def send_until(port: int, body: bytes, end: float) -> list[float]:
    """Send requests until the time is up; give the seconds that each response took."""
    seconds = []
    connection = http.client.HTTPConnection("127.0.0.1", port)
    while time.perf_counter() < end:
        began = time.perf_counter()
        connection.request("POST", "/v1/classify", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise RuntimeError(f"the response has status {response.status}")
        seconds.append(time.perf_counter() - began)
    connection.close()
    return seconds


def load(port: int, note: str, clients: int, duration: float) -> list[float]:
    """Let clients send requests at once; give the seconds that each response took."""
    body = json.dumps({"note": note}).encode()
    end = time.perf_counter() + duration
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(send_until, port, body, end) for _ in range(clients)]
    seconds = []
    for future in futures:
        seconds += future.result()
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="bundled", help="bundled, or a run's folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=(60, 500), help="lengths of notes")
    parser.add_argument("--clients", type=int, default=32, help="number of clients")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each way")
    args = parser.parse_args(argv)
    keep_freed_memory()
    classifier = clinora.Classifier.load(args.run)
    with tempfile.TemporaryDirectory() as flags, socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(classifier, flags, rate_limit=RateLimit(NO_LIMIT))
        threading.Thread(target=serve, args=(app, listener), daemon=True).start()
        port = listener.getsockname()[1]
        batcher = app.state.batcher
        for tokens in args.tokens:
            note = note_of(classifier, tokens)
            rates = {}  # notes per second, by the largest batch
            medians = {}  # seconds of a response
            load(port, note, args.clients, 1.0)
            for _ in range(args.repetitions):
                for together in (MOST_TOGETHER, 1):
                    batcher.most_together = together
                    began = time.perf_counter()
                    seconds = load(port, note, args.clients, args.seconds)
                    rate = len(seconds) / (time.perf_counter() - began)
                    rates.setdefault(together, []).append(rate)
                    medians.setdefault(together, []).append(float(np.median(seconds)))
            for together, found in rates.items():
                median = np.median(medians[together])
                print(
                    f"{tokens} tokens, {together} together: {np.median(found):.0f} notes/s "
                    f"({min(found):.0f}–{max(found):.0f}), median response {1e3 * median:.0f} ms"
                )
            pairs = zip(rates[MOST_TOGETHER], rates[1], strict=True)
            ratios = [batched / single for batched, single in pairs]
            print(f"{tokens} tokens, batched to one at a time: {spread(ratios)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
