"""Serves the page as its users run it, and uses it as they do: by calls and in a browser."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from clinora.calibration import Calibration
from clinora.serving.server import DEFAULT_LIMITS, Server

ROOT = Path(__file__).parents[1]
UNCHANGED = {"__type__": "update"}  # the value of an output that an event leaves as it is
CANARY = "canary-7f3a"  # part of a note's text, for tests that search where it must not appear


# One white pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAA"
PIXEL += "CklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
PICTURE = f"data:image/png;base64,{PIXEL}"
LESSON_STEP = {
    "step": 1, "steps": 20, "loss": 1.5, "norm": 0.5, "steps_picture": PICTURE,
    "factors_picture": PICTURE,
}  # fmt: skip
# Takes the place of the live lesson's process, and goes on until it is ended.
ENDLESS_LESSON = f"""
import time
while True:
    print({json.dumps(json.dumps(LESSON_STEP))}, flush=True)
    time.sleep(0.1)
"""


def calibration(threshold):
    """Give a calibration that refers the notes whose confidence is below ``threshold``."""
    return Calibration(
        weights=(0.2, 0.5), bias=0.1, promise=0.95, threshold=threshold, notes=61, coverage=0.5,
        accuracy=0.97,
    )  # fmt: skip


def estimate(value):
    """Give a measure with its interval, as ``metrics.json`` holds it."""
    return {"value": value, "low": value - 0.025, "high": value + 0.0125}


def metrics(labels, **changes):
    """Give what ``metrics.json`` holds of a report on 50 notes, as far as a model card shows it."""
    measures = {
        "accuracy": estimate(0.8),
        "classes": [
            {
                "label": label,
                "precision": estimate(0.7 + i / 100),
                "recall": estimate(0.6 + i / 100),
            }
            for i, label in enumerate(labels)
        ],
    }
    return {
        "schema": 1, "about": "Notes: 99 rows.", "notes": 50, "trained_on": 0, "in_training": 0,
        "test_ceiling": 0.625,
        "before": {"any_label_accuracy": [0.25, 0.03]},
        "after": {
            "by_note": measures, "by_row": {"accuracy": estimate(0.55)},
            "overconfidence": {"value": 0.031, "low": 0.011, "high": 0.052},
            "answered": {"promise": 0.95, "coverage": estimate(0.85), "accuracy": estimate(0.9)},
        },
        "baselines": [
            {"name": "majority class", "any_label_accuracy": estimate(0.45)},
            {"name": "TF-IDF + linear model", "any_label_accuracy": estimate(0.84)},
        ],
        "against": {"value": -0.04, "low": -0.06, "high": -0.02},
    } | changes  # fmt: skip


def join(client, api, *data, session):
    """Trigger an event, as the page does: the answer of the queue."""
    config = client.get("/config").json()  # this also brings the visit's cookie
    numbers = {event["api_name"]: event["id"] for event in config["dependencies"]}
    body = {"fn_index": numbers[api], "session_hash": session, "data": data}
    return client.post("/gradio_api/queue/join", json=body)


def call(client, api, *data, session="one"):
    """Trigger an event and wait for its end: ("complete", data) or ("error", …).

    An event may set its outputs in two steps. The data is what the page shows after the last.
    """
    joined = join(client, api, *data, session=session)
    assert joined.status_code == 200, joined.text
    first = None
    for message in messages(client, session):
        if message["msg"] == "process_generating" and first is None:
            first = message["output"]["data"]
        if message["msg"] == "process_completed":
            if not message["success"]:
                return "error", message["output"]
            last = message["output"]["data"]
            if first is None:
                return "complete", last
            steps = zip(first, last, strict=True)
            return "complete", [old if new == UNCHANGED else new for old, new in steps]
    raise AssertionError("the stream ended before the event")


def messages(client, session):
    """Read what the queue says to a session, until its stream ends."""
    answer = client.get("/gradio_api/queue/data", params={"session_hash": session})
    for line in answer.text.splitlines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def read_until(stream, mark):
    """Read a stream's lines up to the first that holds ``mark``."""
    for line in stream:
        if mark in line:
            return
    raise AssertionError(f"the stream ended before {mark}")


# Notes every name looked up and every address connected to, of any library.
SITECUSTOMIZE = """
import sys
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        with open({!r}, "a") as file:
            print(event, arguments[0 if "get" in event else 1], file=file)
sys.addaudithook(hook)
"""


def run_async(coroutine):
    """Run a coroutine in another thread: Playwright keeps an event loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@contextmanager
def running(app, limits=DEFAULT_LIMITS, port=0):
    """Serve an app from a thread of this process; gives its port."""
    listener = socket.create_server(("127.0.0.1", port))
    with listener, running_server(Server(app, limits), listener):
        yield listener.getsockname()[1]


@contextmanager
def running_server(server, listener):
    """Run a server of uvicorn's kind on a socket, in a thread of this process."""
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


class Served:
    """A process of serve.py, in its own folder; its output goes to files there."""

    def __init__(self, folder, *options, temporary):
        self.folder = folder
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(
            SITECUSTOMIZE.format(str(folder / "calls"))
        )
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "serve.py", *options],
            cwd=folder,
            stdout=(folder / "out").open("w"),
            stderr=(folder / "err").open("w"),
            env=os.environ | {"PYTHONPATH": f"{folder}/site", "TMPDIR": str(temporary)},
        )

    def read(self, name):
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    def url(self):
        for _ in range(1200):
            if "\n" in self.read("out"):
                return self.read("out").split()[-1]
            assert self.process.poll() is None, self.read("err")
            time.sleep(0.1)
        raise TimeoutError(self.read("err"))

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)

    def kill(self):
        self.process.kill()
        self.process.wait(60)


class Person:
    """Someone at the page, and what the browser noticed meanwhile."""

    def __init__(self, page, url):
        self.page, self.url, self.complaints, self.strangers = page, url, [], []
        page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._note_request)
        page.goto(url)
        self.note = page.locator("#note textarea")
        self.text = page.get_by_label("Prediction in text")
        self.json = page.locator(".json-holder")
        self.card = page.locator(".answer-card")
        self.explanation = page.locator("#explanation")
        self.wait_until_open()

    def wait_until_open(self):
        """Wait for a page that is being loaded: just opened, it may lose a text or a click."""
        self.note.wait_for()
        self.page.wait_for_timeout(1000)

    def _note_request(self, request):
        own = request.url.startswith((f"{self.url}/", "data:", "blob:"))
        if not own:
            self.strangers.append(request.url)

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def submit(self, note):
        self.note.fill(note)
        self.press("Submit")

    def choose_reason(self, reason):
        self.page.get_by_role("radio", name=reason).check()

    def choose_file(self, file):
        """Choose a file of notes, and wait until its columns can be chosen."""
        from playwright.sync_api import expect

        self.page.locator("input[type=file]:not([accept])").first.set_input_files(file)
        # The name in the table of files: the one on the progress bar may disappear at once.
        self.page.get_by_role("cell", name=file.name[:20]).wait_for()
        expect(self.page.get_by_label("Column of the notes")).not_to_have_value("")

    def choose_column(self, label, name):
        """Choose a column of the file in the list with a label."""
        self.page.get_by_label(label).click()
        self.page.get_by_role("option", name=name, exact=True).click()

    def open(self, tab):
        """Open a tab, from the menu where there is no room for it."""
        button = self.page.get_by_role("tab", name=tab)
        if not button.is_visible():
            self.page.get_by_role("button", name="More tabs").click()
            button = self.page.locator(".overflow-dropdown button", has_text=tab)
        button.click()
