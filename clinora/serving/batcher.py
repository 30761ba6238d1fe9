"""One bounded queue before one model: page, API and files share it, and none waits for ever.

A single thread works on what the queue holds. Clients take turns, and so do the requests of one
client, so that many notes or requests of one client do not hold up the few of another. Notes that
wait together go through the model together; anything else that needs the model (another strength,
an explanation) is a request too and has the model for itself.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from clinora.classifier import Classifier, Prediction

# Of one client. The server bounds how many clients there are.
MOST_REQUESTS = 64  # that wait
MOST_WAITING = 128  # notes that wait; beyond them a request of one note still finds room
MOST_TOGETHER = 16  # notes that go through the model at once
MOST_TOKENS = 2048  # of these notes, padded to the longest; a note alone may have more

T = TypeVar("T")


class BusyError(Exception):
    """Too much is waiting, or the service is ending: nothing was queued."""


@dataclass(eq=False, slots=True)
class _Work:
    """A note or a job that waits, and the future of its answer."""

    item: str | Callable
    client: str
    future: Future
    tokens: int | None = None  # that the model reads; None: not counted yet

    @property
    def is_note(self) -> bool:
        return isinstance(self.item, str)


class Batcher:
    """Runs a classifier for many callers at once.

    Attributes:
        classifier: The run; only the batcher's own thread may use its model.
        most_together: How many notes go through the model at once.
        most_tokens: How many tokens they have together, padded to the longest.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.most_together = MOST_TOGETHER
        self.most_tokens = MOST_TOKENS
        # What waits of each request, notes or a job, never nothing; the first has the next turn.
        self._requests: deque[deque[_Work]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(
        self, notes: Sequence[str], wait: float = 0, *, client: str = ""
    ) -> list[Future[Prediction]]:
        """Queue the notes of one request, all of them or none.

        A note whose future is cancelled before its turn is not computed.

        Args:
            notes: At most ``MOST_WAITING``.
            wait: Seconds to wait for room.
            client: Who asks: any name, the same for all requests of a client.

        Raises:
            BusyError: There was no room, or the service is ending.
        """
        return self._queue(notes, wait, client)

    def submit_job(self, job: Callable[[], T], *, client: str = "") -> Future[T]:
        """Queue a function that has the model for itself.

        Args:
            job: The function.
            client: As in ``submit``.

        Raises:
            BusyError: There is no room, or the service is ending.
        """
        return self._queue([job], 0, client)[0]

    def ready(self, client: str = "") -> bool:
        """Tell whether a note of this client would be queued now."""
        with self._changed:
            return self._open and self._thread.is_alive() and self._has_room(1, client)

    def close(self) -> None:
        """Take nothing more, and finish what is queued."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join()

    def _queue(self, items: Sequence[str | Callable], wait: float, client: str) -> list[Future]:
        waiting = deque(_Work(item, client, Future()) for item in items)
        futures = [work.future for work in waiting]  # now: the thread takes work out of the deque
        with self._changed:
            self._changed.wait_for(
                lambda: not self._open or self._has_room(len(items), client), wait
            )
            if not self._open or not self._has_room(len(items), client):
                raise BusyError
            if waiting:
                self._requests.append(waiting)
                self._changed.notify_all()
        return futures

    def _has_room(self, items: int, client: str) -> bool:
        """Tell whether a client's request of so many notes finds room; cancelled ones need none."""
        counts = []
        for request in self._requests:
            if request[0].client != client:
                continue
            wanted = [work for work in request if not work.future.cancelled()]
            if wanted:
                counts.append(len(wanted))
        if len(counts) >= MOST_REQUESTS:
            return False
        return items <= 1 or sum(counts) + items <= MOST_WAITING

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requests or not self._open)
                if not self._requests:
                    return
                self._forget_gone()
                candidates = self._candidates()
            fitting = self._fitting(candidates)  # it tokenises: others may queue meanwhile
            with self._changed:
                taken = [work for work in fitting if self._take(work)]
                self._changed.notify_all()  # there is room again
            if taken and not self._answer(taken):
                for work in taken:  # one note's fault is not the others'
                    self._answer([work])

    def _forget_gone(self) -> None:
        for request in self._requests:
            for work in [work for work in request if work.future.cancelled()]:
                request.remove(work)
                work.future.set_running_or_notify_cancel()
        self._requests = deque(request for request in self._requests if request)

    def _candidates(self) -> list[_Work]:
        """Choose what may go next: a job, or notes, one of each client and request in turn.

        Notes do not wait for the jobs between them; the job that comes first has the next turn.
        """
        if not self._requests:
            return []
        first = self._requests[0][0]
        if not first.is_note:
            return [first]
        of_clients: dict[str, list[deque[_Work]]] = {}
        for request in self._requests:
            if request[0].is_note:
                of_clients.setdefault(request[0].client, []).append(request)
        notes = _in_turn([_in_turn(requests) for requests in of_clients.values()])
        return list(itertools.islice(notes, self.most_together))

    def _fitting(self, candidates: list[_Work]) -> list[_Work]:
        """Give the first candidates that go through the model together, at least one."""
        longest = 0
        for i, work in enumerate(candidates):
            if not work.is_note:
                return [work]
            if work.tokens is None:
                work.tokens = self._count(work.item)
            longest = max(longest, work.tokens)
            if i > 0 and longest * (i + 1) > self.most_tokens:
                return candidates[:i]
        return candidates

    def _count(self, note: str) -> int:
        try:
            return len(self.classifier.tokenizer.encode(note, self.classifier.token_limit))
        except Exception:  # its caller is told when it is classified
            return self.classifier.token_limit

    def _take(self, work: _Work) -> bool:
        """Take a note or a job out of the queue; False if its caller has gone meanwhile.

        The next turn of its client is after those of all other clients, and the next turn of its
        request is after those of the client's other requests.
        """
        request = next(request for request in self._requests if work in request)
        self._requests.remove(request)
        request.remove(work)
        others = [waiting for waiting in self._requests if waiting[0].client != work.client]
        own = [waiting for waiting in self._requests if waiting[0].client == work.client]
        if request:
            own.append(request)
        self._requests = deque(others + own)
        return work.future.set_running_or_notify_cancel()

    def _answer(self, taken: list[_Work]) -> bool:
        """Compute and hand out answers; False if several failed together and none has one."""
        items = [work.item for work in taken]
        try:
            answers = self.classifier(items) if taken[0].is_note else [items[0]()]
        except Exception as error:
            if len(taken) > 1:
                return False
            taken[0].future.set_exception(error)
            return True
        for work, answer in zip(taken, answers, strict=True):
            work.future.set_result(answer)
        return True


def _in_turn(sources: Sequence[Iterable[T]]) -> Iterator[T]:
    """Give one item of each source, then another of each, until all are given."""
    for round_of_items in itertools.zip_longest(*sources):
        yield from (item for item in round_of_items if item is not None)
