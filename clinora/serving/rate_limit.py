"""How many notes a minute each user may send."""

import math
import threading
import time
from collections.abc import Callable

# A person can send a few files of 2,000 notes in a minute. A program can send more.
NOTES_PER_MINUTE = 10_000
MOST_REMEMBERED = 10_000  # users or networks
CLOCK_ERROR = 1e-6  # seconds; more than what the clock's arithmetic rounds


class RateLimitError(Exception):
    """A user has sent too many notes; the message says when to try again.

    Attributes:
        seconds: Time after which the same request is accepted.
    """

    def __init__(self, notes_per_minute: int, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(
            f"You have sent more than {notes_per_minute:,} notes a minute, the limit of this "
            f"service. Try again in {seconds:,} s."
        )


class RateLimit:
    """A token bucket for each user: it holds N notes and gains N / 60 each second.

    A request needs as many notes in the bucket as it has, or a full bucket if it has more than N.
    It takes all its notes out, so a request of more than N notes leaves a debt.

    Args:
        notes_per_minute: N.
        clock: Returns the time in seconds.

    Raises:
        ValueError: N is less than 1.
    """

    def __init__(
        self,
        notes_per_minute: int = NOTES_PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if notes_per_minute < 1:
            raise ValueError(f"--rate-limit {notes_per_minute}: expected 1 note a minute or more")
        self.notes_per_minute = notes_per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._full_at: dict[str, float] = {}  # the time when a user's bucket is full again

    def take(self, user: str, notes: int) -> None:
        """Take a request's notes out of a user's bucket.

        Args:
            user: Any name that is the same for all requests of one user.
            notes: Number of notes in the request.

        Raises:
            RateLimitError: The bucket has too few notes; none was taken.
        """
        seconds_per_note = 60 / self.notes_per_minute
        with self._lock:
            now = self._clock()
            full_at = max(now, self._full_at.get(user, now))
            needed = min(notes, self.notes_per_minute) * seconds_per_note
            wait = full_at - now + needed - 60
            if wait > CLOCK_ERROR:
                raise RateLimitError(self.notes_per_minute, math.ceil(wait - CLOCK_ERROR))
            self._full_at[user] = full_at + notes * seconds_per_note
            if len(self._full_at) > MOST_REMEMBERED:
                self._forget(now)

    def _forget(self, now: float) -> None:
        """Forget the users whose buckets are full, or else the one whose bucket is full first."""
        full = [user for user, full_at in self._full_at.items() if full_at <= now]
        for user in full or [min(self._full_at, key=self._full_at.get)]:
            del self._full_at[user]
