"""One bounded queue for one model, shared by the page, the API and the files of many notes.

A single thread processes the queue. Clients take turns, and so do the requests of one client.
Therefore a client with many notes or requests does not delay a client with few. Notes that wait at
the same time are classified in one batch. Anything else that needs the model (another strength, an
explanation) is a job: a request that runs alone.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from clinora.classifier import Classifier, Prediction

# Limits for one client; the server limits the number of clients.
MOST_REQUESTS = 64  # waiting requests
MOST_WAITING_NOTES = 128  # beyond this limit, requests of one note are still accepted
# Limits for one batch.
MOST_TOGETHER = 16  # notes
MOST_TOKENS = 2048  # tokens, padded to the longest note; a single note may have more

T = TypeVar("T")


class BusyError(Exception):
    """The queue is full or the service is shutting down; nothing was queued."""


@dataclass(eq=False, slots=True)
class _Work:
    """A waiting note or job, and the future of its result."""

    item: str | Callable
    client: str
    future: Future
    classifier: Classifier  # of a note
    tokens: int | None = None  # tokens that the model reads; None until they are counted

    @property
    def is_note(self) -> bool:
        return isinstance(self.item, str)


class Batcher:
    """Runs a classifier, and others that share its base, for many concurrent clients.

    Attributes:
        classifier: The classifier of the notes for which no other is chosen. Only the batcher's
            thread may use a classifier's model.
        most_together: The largest number of notes in a batch.
        most_tokens: The largest number of tokens in a batch, padded to the longest note.

    Args:
        classifier: As above.
        count_batch: Is called with the number of notes of each batch.
    """

    def __init__(
        self, classifier: Classifier, count_batch: Callable[[int], None] = lambda _notes: None
    ) -> None:
        self.classifier = classifier
        self._count_batch = count_batch
        self.most_together = MOST_TOGETHER
        self.most_tokens = MOST_TOKENS
        # One deque per request: its waiting notes, or its job. None is empty; the first is next.
        self._requests: deque[deque[_Work]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        notes: Sequence[str],
        wait: float = 0,
        *,
        client: str = "",
        classifier: Classifier | None = None,
    ) -> list[Future[Prediction]]:
        """Queue the notes of one request: either all of them or none.

        A note whose future is cancelled before its turn is not classified.

        Args:
            notes: At most ``MOST_WAITING_NOTES`` notes.
            wait: Seconds to wait for room in the queue.
            client: Any name that is the same for all requests of one client.
            classifier: Another classifier than the batcher's own, for these notes.

        Raises:
            BusyError: There was no room, or the service is shutting down.
        """
        return self._queue(notes, wait, client, classifier or self.classifier)

    def submit_job(self, job: Callable[[], T], *, client: str = "") -> Future[T]:
        """Queue a function that runs alone on the batcher's thread and may use the model.

        Args:
            job: The function.
            client: As in ``submit``.

        Raises:
            BusyError: There is no room, or the service is shutting down.
        """
        return self._queue([job], 0, client, self.classifier)[0]

    def ready(self, client: str = "") -> bool:
        """Return whether the queue would accept a note of this client now."""
        with self._changed:
            return self._open and self._thread.is_alive() and self._has_room(1, client)

    def waiting(self) -> int:
        """Return the number of notes and jobs that wait."""
        with self._changed:
            return sum(len(request) for request in self._requests)

    def close(self) -> None:
        """Accept no more requests, and finish those in the queue."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join()

    def _queue(
        self, items: Sequence[str | Callable], wait: float, client: str, classifier: Classifier
    ) -> list[Future]:
        request = deque(_Work(item, client, Future(), classifier) for item in items)
        # Collected before the batcher's thread can take work out of the deque.
        futures = [work.future for work in request]
        with self._changed:
            self._changed.wait_for(
                lambda: not self._open or self._has_room(len(items), client), wait
            )
            if not self._open or not self._has_room(len(items), client):
                raise BusyError
            if request:
                self._requests.append(request)
                self._changed.notify_all()
        return futures

    def _has_room(self, items: int, client: str) -> bool:
        """Return whether a request with this many notes fits into the client's limits.

        Cancelled notes do not count.
        """
        requests = 0
        waiting = 0
        for request in self._requests:
            if request[0].client != client:
                continue
            wanted = [work for work in request if not work.future.cancelled()]
            if wanted:
                requests += 1
                waiting += len(wanted)
        if requests >= MOST_REQUESTS:
            return False
        if items <= 1:
            return True
        return waiting + items <= MOST_WAITING_NOTES

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requests or not self._open)
                if not self._requests:
                    return
                self._drop_cancelled()
                candidates = self._candidates()
            # This tokenizes notes, so it must not hold the lock that new requests need.
            batch = self._fitting(candidates)
            with self._changed:
                taken = [work for work in batch if self._take(work)]
                self._changed.notify_all()  # there is room again
            if not taken:
                continue
            if not self._answer(taken):
                # One note failed. Alone, each of the others still gets its prediction.
                for work in taken:
                    self._answer([work])

    def _drop_cancelled(self) -> None:
        """Remove cancelled work from the queue."""
        remaining: deque[deque[_Work]] = deque()
        for request in self._requests:
            cancelled = [work for work in request if work.future.cancelled()]
            for work in cancelled:
                request.remove(work)
                work.future.set_running_or_notify_cancel()
            if request:
                remaining.append(request)
        self._requests = remaining

    def _candidates(self) -> list[_Work]:
        """Choose what may run next: one job, or notes taken from clients and requests in turn.

        If the first request is a job, it runs. Otherwise notes for the classifier of its first note
        are taken, also from requests that stand behind a job or notes for another classifier.
        """
        if not self._requests:
            return []
        first = self._requests[0][0]
        if not first.is_note:
            return [first]
        requests_of_clients: dict[str, list[deque[_Work]]] = {}
        for request in self._requests:
            if request[0].is_note and request[0].classifier is first.classifier:
                requests_of_clients.setdefault(request[0].client, []).append(request)
        notes_of_clients = [_in_turn(requests) for requests in requests_of_clients.values()]
        notes = _in_turn(notes_of_clients)
        return list(itertools.islice(notes, self.most_together))

    def _fitting(self, candidates: list[_Work]) -> list[_Work]:
        """Return the first candidates that fit into one batch: at least one."""
        batch: list[_Work] = []
        longest = 0
        for work in candidates:
            if not work.is_note:
                return [work]
            if work.tokens is None:
                work.tokens = _count(work.item, work.classifier)
            longest = max(longest, work.tokens)
            if batch and longest * (len(batch) + 1) > self.most_tokens:
                break
            batch.append(work)
        return batch

    def _take(self, work: _Work) -> bool:
        """Take a note or a job out of the queue; return False if it was cancelled meanwhile.

        The client goes to the end of the queue, behind all other clients. Its request goes behind
        the client's other requests.
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
        """Run notes or a job and set the results; return False if a batch failed as a whole."""
        items = [work.item for work in taken]
        try:
            if taken[0].is_note:
                self._count_batch(len(items))
                answers = taken[0].classifier(items)
            else:
                job = items[0]
                answers = [job()]
        except Exception as error:
            if len(taken) > 1:
                return False
            taken[0].future.set_exception(error)
            return True
        for work, answer in zip(taken, answers, strict=True):
            work.future.set_result(answer)
        return True


def _count(note: str, classifier: Classifier) -> int:
    """Count the tokens that the model reads of a note."""
    try:
        return min(len(classifier.encode(note)), classifier.token_limit)
    except Exception:  # classifying the note will raise it again, for its caller
        return classifier.token_limit


def _in_turn(sources: Sequence[Iterable[T]]) -> Iterator[T]:
    """Yield the first item of each source, then the second of each, until all are exhausted."""
    for items in itertools.zip_longest(*sources):
        for item in items:
            if item is not None:
                yield item
