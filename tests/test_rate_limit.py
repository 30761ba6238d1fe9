"""How many notes a user may send in a time that the test tells."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinora.serving import rate_limit
from clinora.serving.rate_limit import RateLimit, RateLimitError


class Clock:
    now = 1_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def seconds_until_accepted(limit, user, notes):
    """Send notes; give 0 if they were accepted, or the seconds to wait."""
    try:
        limit.take(user, notes)
    except RateLimitError as error:
        return error.seconds
    return 0


def test_a_minutes_notes_are_accepted_at_once_and_one_more_is_not(clock):
    limit = RateLimit(60, clock)
    assert [seconds_until_accepted(limit, "alice", 1) for _ in range(60)] == [0] * 60
    assert seconds_until_accepted(limit, "alice", 1) == 1


def test_it_is_accepted_after_the_seconds_that_were_told_and_no_earlier(clock):
    limit = RateLimit(7, clock)
    for _ in range(50):
        wait = seconds_until_accepted(limit, "alice", 3)
        if wait > 0:
            clock.now += wait - 1
            assert seconds_until_accepted(limit, "alice", 3) == 1
            clock.now += 1
            assert seconds_until_accepted(limit, "alice", 3) == 0


def test_users_do_not_share_a_limit(clock):
    limit = RateLimit(5, clock)
    limit.take("alice", 5)
    limit.take("bob", 5)
    assert seconds_until_accepted(limit, "alice", 1) > 0


def test_what_was_refused_costs_nothing(clock):
    limit = RateLimit(10, clock)
    limit.take("alice", 6)
    for _ in range(20):
        assert seconds_until_accepted(limit, "alice", 5) > 0
    limit.take("alice", 4)


def test_more_notes_than_a_minutes_are_accepted_after_a_pause_and_paid_for_later(clock):
    """Otherwise a request of 32 notes would be refused for ever under a limit of 10."""
    limit = RateLimit(10, clock)
    limit.take("alice", 32)
    assert seconds_until_accepted(limit, "alice", 1) == (32 - 10 + 1) * 6
    assert seconds_until_accepted(limit, "alice", 32) == 32 * 6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 12)), max_size=60))
def test_in_no_time_are_more_notes_accepted_than_one_bucket_and_what_it_gains(requests):
    clock = Clock()
    limit = RateLimit(12, clock)
    accepted = []
    for pause, notes in requests:
        clock.now += pause
        if seconds_until_accepted(limit, "alice", notes) == 0:
            accepted.append((clock.now, notes))
    for first in range(len(accepted)):
        for last in range(first, len(accepted)):
            seconds = accepted[last][0] - accepted[first][0]
            notes = sum(notes for _, notes in accepted[first : last + 1])
            assert notes <= 12 + seconds * 12 / 60 + 1e-3


def test_of_many_users_those_are_forgotten_whose_limit_is_furthest(clock, monkeypatch):
    monkeypatch.setattr(rate_limit, "MOST_REMEMBERED", 10)
    limit = RateLimit(5, clock)
    limit.take("alice", 5)
    limit.take("bob", 1)
    assert seconds_until_accepted(limit, "bob", 5) > 0
    for number in range(100):
        limit.take(f"user {number}", 2)
    assert seconds_until_accepted(limit, "bob", 5) == 0
    assert seconds_until_accepted(limit, "alice", 1) > 0


@pytest.mark.parametrize("notes", [0, -1])
def test_a_limit_that_accepts_nothing_is_an_error(notes):
    with pytest.raises(ValueError, match=f"--rate-limit {notes}: expected 1"):
        RateLimit(notes)
