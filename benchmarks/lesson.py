"""The live lesson: how long a second user waits for a prediction while the first one trains.

    python -m benchmarks.lesson

The page is served by a process of its own. The second user classifies one note after the other,
through the page and through ``/v1/classify``, first on the idle server and then while the first
user's lesson runs.
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np

NOTE = (
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction."
)
JSON = {"Content-Type": "application/json"}


class User:
    """A browser on the page."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.connection.request("GET", "/config")
        response = self.connection.getresponse()
        config = json.loads(response.read())
        self.headers = JSON | {"Cookie": response.headers["set-cookie"].partition(";")[0]}
        self.events = {event["api_name"]: event["id"] for event in config["dependencies"]}

    def run(self, event: str, *data: object) -> str:
        """Trigger an event and wait for its end; returns all of its messages."""
        body = {"fn_index": self.events[event], "session_hash": "one", "data": data}
        self.connection.request("POST", "/gradio_api/queue/join", json.dumps(body), self.headers)
        self.connection.getresponse().read()
        url = "/gradio_api/queue/data?session_hash=one"
        self.connection.request("GET", url, headers=self.headers)
        messages = self.connection.getresponse().read().decode()
        if '"success":true' not in messages.rpartition('"msg":"process_completed"')[2]:
            raise RuntimeError(f"the event {event} failed")
        return messages

    def classify_on_page(self) -> None:
        """Submit the note on the page; its explanation belongs to the event."""
        self.run("predict", NOTE, None)

    def classify_over_http(self) -> None:
        """Send the note to the API."""
        self.connection.request("POST", "/v1/classify", json.dumps({"note": NOTE}), JSON)
        response = self.connection.getresponse()
        response.read()
        if response.status != 200:
            raise RuntimeError(f"the response has status {response.status}")


def times_until(ends: Callable[[], bool], classify: Callable[[], None]) -> list[float]:
    """Classify until ``ends`` says so; give the seconds that each prediction took."""
    seconds = []
    while not ends():
        began = time.perf_counter()
        classify()
        seconds.append(time.perf_counter() - began)
        time.sleep(0.05)  # a person does not send the next note at once
    return seconds


def compare(port: int, name: str, seconds: float) -> None:
    """Measure the idle server for some seconds, then during a lesson, and print both."""
    second = User(port)
    classify = getattr(second, name)
    classify()
    end = time.perf_counter() + seconds
    idle = times_until(lambda: time.perf_counter() > end, classify)
    told = []
    lesson = threading.Thread(target=lambda: told.append(User(port).run("train_lesson")))
    began = time.perf_counter()
    lesson.start()
    during = times_until(lambda: not lesson.is_alive(), classify)
    duration = time.perf_counter() - began
    if not told or "All steps are done" not in told[0]:
        raise RuntimeError("the lesson did not reach its end: its time limit was too short here")
    p95 = {}
    for when, found in (("idle", idle), ("lesson", during)):
        median, p95[when] = 1e3 * np.quantile(found, [0.5, 0.95])
        print(f"{name}, {when}: {len(found)} notes, median {median:.0f} ms, p95 {p95[when]:.0f} ms")
    ratio = p95["lesson"] / p95["idle"]
    print(f"{name}: p95 ratio {ratio:.2f}; the lesson took {duration:.1f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Serve, measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="bundled", help="bundled, or a run's folder")
    parser.add_argument("--seconds", type=float, default=20, help="length of the idle measurement")
    args = parser.parse_args(argv)
    command = [sys.executable, "-m", "clinora", "serve", "--port", "0", "--run", args.run]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            port = int(server.stdout.readline().rpartition(":")[2])
            compare(port, "classify_on_page", args.seconds)
            compare(port, "classify_over_http", args.seconds)
        finally:
            server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
