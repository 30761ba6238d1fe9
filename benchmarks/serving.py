"""Does batching pay? Notes answered a second over HTTP, with batches and one at a time.

    python -m benchmarks.serving

32 clients ask ``/v1/classify`` for a note at a time, each its next when its last is answered, of
the page's own server on this machine. The two ways take turns.
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
from benchmarks.common import spread
from clinora.device import keep_freed_memory
from clinora.serving.app import create_app, serve
from clinora.serving.batcher import MOST_TOGETHER

WORDS = "the patient denies chest pain and reports a swollen knee after the fall on the left side "


def note_of(classifier: clinora.Classifier, tokens: int) -> str:
    """Make a note of about so many tokens."""
    ids = classifier.tokenizer.encode(WORDS * tokens)[:tokens]
    return classifier.tokenizer.decode(ids)


def ask(port: int, body: bytes, end: float) -> list[float]:
    """Ask until the time is up; give the seconds that each answer took."""
    seconds = []
    connection = http.client.HTTPConnection("127.0.0.1", port)
    while time.perf_counter() < end:
        began = time.perf_counter()
        connection.request("POST", "/v1/classify", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}")
        seconds.append(time.perf_counter() - began)
    connection.close()
    return seconds


def load(port: int, note: str, clients: int, duration: float) -> list[float]:
    """Let clients ask at once; give the seconds that each answer took."""
    body = json.dumps({"note": note}).encode()
    end = time.perf_counter() + duration
    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, port, body, end) for _ in range(clients)]
    return [seconds for one in asking for seconds in one.result()]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="bundled", help="a folder that train.py wrote")
    parser.add_argument("--tokens", type=int, nargs="+", default=(60, 500), help="of the notes")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args(argv)
    keep_freed_memory()
    classifier = clinora.Classifier.load(args.run)
    with tempfile.TemporaryDirectory() as flags, socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(classifier, flags)
        threading.Thread(target=serve, args=(app, listener), daemon=True).start()
        port, batcher = listener.getsockname()[1], app.state.batcher
        for tokens in args.tokens:
            note, rates, medians = note_of(classifier, tokens), {}, {}
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
                middle = np.median(medians[together])
                print(
                    f"{tokens} tokens, {together} together: {np.median(found):.0f} notes/s "
                    f"({min(found):.0f}–{max(found):.0f}), median answer {1e3 * middle:.0f} ms"
                )
            ratios = [a / b for a, b in zip(rates[MOST_TOGETHER], rates[1], strict=True)]
            print(f"{tokens} tokens, batched to one at a time: {spread(ratios)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
