"""The state of a session, which holds notes, is forgotten after its page was closed."""

import asyncio
from types import SimpleNamespace

import pytest

from clinora.serving import sessions
from tests.served import run_async

CLOSED = 0.1  # seconds until the state of a closed page is removed


@pytest.fixture
def blocks(monkeypatch):
    """Stand for Gradio's page with the states of two sessions."""
    monkeypatch.setattr(sessions, "SECONDS_AFTER_CLOSING", CLOSED)
    states = {"one": "notes", "two": "notes"}
    return SimpleNamespace(
        state_holder=SimpleNamespace(session_data=states, time_last_used=dict.fromkeys(states, 0))
    )


def open_page(known, session, close):
    """Open a page's heartbeat, which lasts until ``close`` is set."""

    async def forward(_scope, _receive, _send):
        await close.wait()

    return asyncio.create_task(known.heartbeat(session, forward)(None, None, None))


def test_the_state_of_a_closed_page_is_forgotten_after_a_while(blocks):
    async def scenario():
        close, stay = asyncio.Event(), asyncio.Event()
        known = sessions.Sessions(blocks)
        pages = [open_page(known, "one", close), open_page(known, "two", stay)]
        await asyncio.sleep(2 * CLOSED)
        assert set(blocks.state_holder.session_data) == {"one", "two"}
        close.set()
        await pages[0]
        assert set(blocks.state_holder.session_data) == {"one", "two"}
        await asyncio.sleep(2 * CLOSED)
        assert set(blocks.state_holder.session_data) == {"two"}
        assert set(blocks.state_holder.time_last_used) == {"two"}
        stay.set()
        await pages[1]

    run_async(scenario())


def test_the_state_of_a_page_that_comes_back_is_kept(blocks):
    async def scenario():
        broken, close = asyncio.Event(), asyncio.Event()
        known = sessions.Sessions(blocks)
        first = open_page(known, "one", broken)
        await asyncio.sleep(0)
        broken.set()
        await first
        again = open_page(known, "one", close)
        await asyncio.sleep(3 * CLOSED)
        assert "one" in blocks.state_holder.session_data
        close.set()
        await again

    run_async(scenario())


def test_an_app_that_fails_counts_as_closed(blocks):
    async def fail(_scope, _receive, _send):
        raise OSError

    async def scenario():
        known = sessions.Sessions(blocks)
        with pytest.raises(OSError):
            await known.heartbeat("one", fail)(None, None, None)
        await asyncio.sleep(2 * CLOSED)
        assert "one" not in blocks.state_holder.session_data

    run_async(scenario())
