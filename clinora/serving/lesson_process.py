"""Runs the live lesson in a process of its own: one at a time, for a limited time.

The process has its own copy of the bundled base, one thread and a low priority. The served
model is not in it, the server's threads do not wait for it, and its memory is free when it ends.
It ends when the lesson is over, when its visitor stops it or leaves, after the time limit, and with
the server.
"""

import dataclasses
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from clinora.serving import type_and_place
from clinora.serving.pictures import data_url
from clinora.serving.reading import environment_of_process

_log = logging.getLogger(__name__)

MOST_SECONDS = 60
NICENESS = 10  # about a tenth of a processor's time, as long as the server needs that processor
POLL_SECONDS = 0.2  # between checks whether the lesson has to stop
MOST_SHOWN = 64  # rows and columns of a matrix: with more, single entries could not be seen
# The absolute values of A, B and s·B·A that have the full colour. They are the same at all steps,
# so that the pictures show how the matrices grow. After 20 steps, 99% of the entries lie within
# 0.077, 0.039 and 0.010.
COLOUR_LIMITS = (0.08, 0.04, 0.01)


class LessonTakenError(Exception):
    """Another visitor has the lesson now."""


class LessonStoppedError(Exception):
    """The visitor stopped the lesson."""


class LessonTimeError(Exception):
    """The lesson took longer than its time limit."""


class LessonFailedError(Exception):
    """The lesson's process failed; the reason was logged."""


class Lessons:
    """Gives the lesson to one visitor at a time.

    Attributes:
        seconds: The time limit of a lesson.
        command: Starts the process; it writes what ``run`` yields, a line of JSON for each part.
    """

    def __init__(self) -> None:
        self.seconds: float = MOST_SECONDS
        self.command = [sys.executable, "-P", "-m", "clinora.serving.lesson_process"]
        self._lock = threading.Lock()  # of _running
        # The visitor who has the lesson, and what stops this run of it and no other.
        self._running: tuple[str, threading.Event] | None = None

    def run(self, visitor: str, check_visitor: Callable[[], None]) -> Iterator[dict]:
        """Run the lesson for a visitor.

        Args:
            visitor: Any name, for ``stop``.
            check_visitor: Called several times a second; it raises an error if the visitor has
                left, and this error ends the lesson.

        Yields:
            For each step, from 0: step, steps (how many there are), loss (nats; None at step 0),
            norm (the largest ‖s·B·A‖ of a layer), and two pictures as data URLs: steps_picture and
            factors_picture. At the end: the fields of ``lesson.Comparison``.

        Raises:
            LessonTakenError: Another visitor has the lesson.
            LessonStoppedError: ``stop`` was called for this visitor.
            LessonTimeError: The time limit has passed.
            LessonFailedError: The process failed.
        """
        stop = threading.Event()
        with self._lock:
            if self._running is not None:
                raise LessonTakenError
            self._running = (visitor, stop)
        try:
            end = time.monotonic() + self.seconds
            with _process(self.command) as lines:
                while True:
                    check_visitor()
                    if stop.is_set():
                        raise LessonStoppedError
                    if time.monotonic() > end:
                        raise LessonTimeError
                    try:
                        line = lines.get(timeout=POLL_SECONDS)
                    except queue.Empty:
                        continue
                    part = _read(line)
                    yield part
                    if "difference" in part:
                        return
        finally:
            with self._lock:
                self._running = None

    def stop(self, visitor: str) -> None:
        """Stop the lesson if this visitor has it."""
        with self._lock:
            running = self._running
        if running is None:
            return
        owner, stop = running
        if owner == visitor:
            stop.set()  # of this run, even if it has ended and another visitor's has begun


@contextmanager
def _process(command: Sequence[str]) -> Iterator[queue.SimpleQueue]:
    """Start the process, give the queue of its lines, and end it."""
    lines: queue.SimpleQueue = queue.SimpleQueue()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # it ends when this end of the pipe is closed
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment_of_process(),
    )

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(b"")

    reader = threading.Thread(target=read, daemon=True)
    with process:
        reader.start()
        try:
            yield lines
        finally:
            process.kill()
            reader.join()


def _read(line: bytes) -> dict:
    """Read a line of the process; the empty line means that the process has ended."""
    part = json.loads(line or b'{"failure": "the process ended"}')
    if "failure" in part:
        _log.error("the live lesson failed: %s", part["failure"])
        raise LessonFailedError
    return part


# --- in the process -----------------------------------------------------------------------------


def _main() -> None:
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    try:
        from clinora.serving.lesson import teach

        for part in teach():
            print(json.dumps(_as_json(part)), flush=True)
    except Exception as error:
        print(json.dumps({"failure": type_and_place(error)}), flush=True)


def _end_with_the_server() -> None:
    sys.stdin.read()  # until the server closes the pipe or ends
    os._exit(0)


def _as_json(part: object) -> dict:
    """Give a moment with its pictures, or the comparison, in the form that ``run`` yields."""
    from clinora.lora_figures import factors_figure, steps_figure
    from clinora.serving.lesson import STEPS, Comparison

    if isinstance(part, Comparison):
        return dataclasses.asdict(part)
    matrices = {}
    for name, group in part.matrices.items():
        matrices[name] = tuple(matrix[:MOST_SHOWN, :MOST_SHOWN].numpy() for matrix in group)
    return {
        "step": part.step,
        "steps": STEPS,
        "loss": part.losses[-1] if part.losses else None,
        "norm": max(values[-1] for values in part.norms.values()),
        "steps_picture": data_url(steps_figure(part.losses, part.norms, STEPS)),
        "factors_picture": data_url(factors_figure(matrices, COLOUR_LIMITS)),
    }


if __name__ == "__main__":
    _main()
