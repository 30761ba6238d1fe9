"""Limits for each client's events and sessions in Gradio.

Gradio's own limits apply to all clients together, so one client could fill its queue or displace
the sessions of others. Gradio also keeps a list of events for each session, without a limit, and
the state of a session, which holds notes, after its page was closed.
"""

import asyncio
from collections import Counter

import gradio
from fastapi import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from clinora.serving.api import RETRY_AFTER

MOST_EVENTS_OF_A_CLIENT = 16  # waiting or running events of one client
MOST_UNREAD_MESSAGES = 200  # about the events of one client; they hold results, so notes too
MOST_SESSIONS_OF_A_CLIENT = 100  # remembered sessions of one client
MOST_SESSIONS_IN_ALL = 1_000
# How long the state is kept after a page was closed: a connection may break under an open page.
SECONDS_AFTER_CLOSING = 300


class Sessions:
    """Counts each client's events and sessions, and removes the oldest sessions from Gradio.

    Args:
        blocks: The page.
    """

    def __init__(self, blocks: gradio.Blocks) -> None:
        self._blocks = blocks
        self._clients: dict[str, str] = {}  # client of each session, the last used at the end
        self._open_pages: Counter[str] = Counter()  # open heartbeats of each session
        self._closed: dict[str, asyncio.TimerHandle] = {}  # sessions whose state will be removed
        self._joining: Counter[str] = Counter()  # each client's events on the way to Gradio's queue

    def join(self, session: str, client: str, forward: ASGIApp) -> ASGIApp:
        """Return the ASGI app that triggers an event.

        Args:
            session: The session hash under which Gradio keeps the event.
            client: The client that triggers the event.
            forward: Passes the event on to Gradio.

        Raises:
            HTTPException: 503; too many events of this client are waiting or running.
        """
        events = list(self._blocks._queue.event_ids_to_events.values())
        own_events = [event for event in events if self._clients.get(event.session_hash) == client]
        if len(own_events) + self._joining[client] >= MOST_EVENTS_OF_A_CLIENT:
            raise HTTPException(503, "Too many of your events are waiting.", RETRY_AFTER)
        if self._unread_messages(client) >= MOST_UNREAD_MESSAGES:
            raise HTTPException(503, "Too many of your results were not read.", RETRY_AFTER)
        self._clients.pop(session, None)
        self._clients[session] = client
        in_use = {event.session_hash for event in events}
        in_use.add(session)
        own_sessions = [known for known, owner in self._clients.items() if owner == client]
        self._forget_beyond(MOST_SESSIONS_OF_A_CLIENT, own_sessions, in_use)
        self._forget_beyond(MOST_SESSIONS_IN_ALL, list(self._clients), in_use)
        self._joining[client] += 1

        async def join_and_count(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await forward(scope, receive, send)
            finally:
                self._joining[client] -= 1
                if self._joining[client] == 0:
                    del self._joining[client]

        return join_and_count

    def heartbeat(self, session: str, forward: ASGIApp) -> ASGIApp:
        """Return the ASGI app of a page's heartbeat: a request that lasts until the page is closed.

        After ``SECONDS_AFTER_CLOSING``, the session's state is removed, unless the page is back.

        Args:
            session: The session hash under which Gradio keeps the page's state.
            forward: Passes the request on to Gradio.
        """

        async def wait_and_forget(scope: Scope, receive: Receive, send: Send) -> None:
            self._open_pages[session] += 1
            self._keep_state(session)
            try:
                await forward(scope, receive, send)
            finally:
                self._open_pages[session] -= 1
                if self._open_pages[session] == 0:
                    del self._open_pages[session]
                    self._forget_state_later(session)

        return wait_and_forget

    def _unread_messages(self, client: str) -> int:
        """Count the messages about a client's events that no page has fetched."""
        queues = self._blocks._queue.pending_messages_per_session
        sessions = [known for known, owner in self._clients.items() if owner == client]
        return sum(queues[session].qsize() for session in sessions if session in queues)

    def _forget_state_later(self, session: str) -> None:
        has_state = session in self._blocks.state_holder.session_data
        if not has_state and session not in self._blocks._queue.pending_messages_per_session:
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(SECONDS_AFTER_CLOSING, self._forget_state, session)
        self._closed[session] = timer

    def _keep_state(self, session: str) -> None:
        if session in self._closed:
            self._closed.pop(session).cancel()

    def _forget_state(self, session: str) -> None:
        self._keep_state(session)  # the timer is of no more use
        self._blocks.state_holder.session_data.pop(session, None)
        self._blocks.state_holder.time_last_used.pop(session, None)
        self._blocks._queue.pending_messages_per_session.pop(session, None)
        self._blocks._queue.pending_event_ids_session.pop(session, None)

    def _forget_beyond(self, most: int, sessions: list[str], in_use: set[str]) -> None:
        """Remove the oldest idle sessions of a list from Gradio, until ``most`` are left."""
        idle = [session for session in sessions if session not in in_use]
        surplus = max(0, len(sessions) - most)
        for session in idle[:surplus]:
            del self._clients[session]
            self._forget_state(session)
