"""One bounded queue before one model: page, API and files share it, and none waits for ever.

A single thread works on what the queue holds. Notes that wait together go through the model
together; anything else that needs the model (another strength, an explanation) has it for itself.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from clinora.classifier import Classifier, Prediction

MOST_WAITING = 64  # notes and jobs in the queue
MOST_TOGETHER = 16  # notes that go through the model at once

T = TypeVar("T")


class BusyError(Exception):
    """Too much is waiting, or the service is ending: nothing was queued."""


class Batcher:
    """Runs a classifier for many callers at once.

    Attributes:
        classifier: The run; only the batcher's own thread may use its model.
        most_waiting: How many notes and jobs may wait.
        most_together: How many notes go through the model at once.
    """

    def __init__(self, classifier: Classifier, most_waiting: int = MOST_WAITING) -> None:
        self.classifier, self.most_waiting = classifier, most_waiting
        self.most_together = MOST_TOGETHER
        self._waiting: deque[tuple[Future, str | Callable]] = deque()
        self._changed, self._open = threading.Condition(), True
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, notes: Sequence[str], wait: float = 0) -> list[Future[Prediction]]:
        """Queue notes, all of them or none.

        Args:
            notes: At most ``most_waiting``.
            wait: Seconds to wait for room.

        Raises:
            BusyError: There was no room, or the service is ending.
        """
        return self._put(notes, wait)

    def run(self, job: Callable[[], T]) -> Future[T]:
        """Queue a function that has the model for itself.

        Raises:
            BusyError: There is no room, or the service is ending.
        """
        return self._put([job], 0)[0]

    @property
    def ready(self) -> bool:
        """Whether a note would be queued now."""
        return self._open and self._thread.is_alive() and len(self._waiting) < self.most_waiting

    def close(self) -> None:
        """Take nothing more, and finish what is queued."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join()

    def _put(self, items: Sequence[str | Callable], wait: float) -> list[Future]:
        with self._changed:
            room = self.most_waiting - len(items)
            self._changed.wait_for(lambda: not self._open or len(self._waiting) <= room, wait)
            if not self._open or len(self._waiting) > room:
                raise BusyError
            futures = [Future() for _ in items]
            self._waiting += zip(futures, items, strict=True)
            self._changed.notify_all()
        return futures

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._waiting:
                    return
                taken = [self._waiting[0]]
                if self._is_note(taken[0]):  # with others, also from behind a job
                    notes = (pair for pair in self._waiting if self._is_note(pair))
                    taken = list(itertools.islice(notes, self.most_together))
                for pair in taken:
                    self._waiting.remove(pair)
                self._changed.notify_all()  # there is room again
            # Who has gone away meanwhile has cancelled.
            taken = [pair for pair in taken if pair[0].set_running_or_notify_cancel()]
            if not taken or not self._answer(taken):
                for pair in taken:  # one note's fault is not the others'
                    self._answer([pair])

    @staticmethod
    def _is_note(pair: tuple[Future, str | Callable]) -> bool:
        return isinstance(pair[1], str)

    def _answer(self, taken: list[tuple[Future, str | Callable]]) -> bool:
        """Compute and hand out answers; False if several failed together and none has one."""
        futures, items = zip(*taken, strict=True)
        try:
            answers = self.classifier(items) if self._is_note(taken[0]) else [items[0]()]
        except Exception as error:
            if len(taken) > 1:
                return False
            futures[0].set_exception(error)
            return True
        for future, answer in zip(futures, answers, strict=True):
            future.set_result(answer)
        return True
