"""What one client may hold of Gradio: events that wait or run, and sessions that are remembered.

Gradio bounds both for all clients together, so one client could fill its queue or push the sessions
of others out of its memory. Of each session it also keeps a list of events, without a bound.
"""

from collections import Counter

import gradio
from fastapi import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from clinora.serving.api import RETRY_AFTER

MOST_EVENTS = 16  # of one client that wait or run
MOST_SESSIONS = 100  # of one client that are remembered
MOST_SESSIONS_IN_ALL = 1_000


class Sessions:
    """Counts the events and sessions of each client, and makes Gradio forget its oldest sessions.

    Args:
        blocks: The page.
    """

    def __init__(self, blocks: gradio.Blocks) -> None:
        self._blocks = blocks
        self._clients: dict[str, str] = {}  # of each session, the last used at the end
        self._joining: Counter[str] = Counter()  # each client's events, not yet in Gradio's queue

    def join(self, session: str, client: str, forward: ASGIApp) -> ASGIApp:
        """Give the ASGI answer that triggers an event.

        Args:
            session: The name under which Gradio keeps the event.
            client: The client that triggers it.
            forward: Passes the event on to Gradio.

        Raises:
            HTTPException: 503; too many events of this client wait or run.
        """
        running = list(self._blocks._queue.event_ids_to_events.values())
        own_events = [e for e in running if self._clients.get(e.session_hash) == client]
        if len(own_events) + self._joining[client] >= MOST_EVENTS:
            raise HTTPException(503, "Too many of your events are waiting.", RETRY_AFTER)
        self._clients.pop(session, None)
        self._clients[session] = client
        in_use = {event.session_hash for event in running} | {session}
        own_sessions = [known for known, owner in self._clients.items() if owner == client]
        self._forget_beyond(MOST_SESSIONS, own_sessions, in_use)
        self._forget_beyond(MOST_SESSIONS_IN_ALL, list(self._clients), in_use)
        self._joining[client] += 1

        async def join_and_count(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await forward(scope, receive, send)
            finally:
                self._joining[client] -= 1
                if not self._joining[client]:
                    del self._joining[client]

        return join_and_count

    def _forget_beyond(self, most: int, sessions: list[str], in_use: set[str]) -> None:
        """Make Gradio forget the oldest idle ones of some sessions, until ``most`` are left."""
        idle = [session for session in sessions if session not in in_use]
        for session in idle[: max(0, len(sessions) - most)]:
            del self._clients[session]
            self._blocks._queue.pending_messages_per_session.pop(session, None)
            self._blocks._queue.pending_event_ids_session.pop(session, None)
            self._blocks.state_holder.session_data.pop(session, None)
            self._blocks.state_holder.time_last_used.pop(session, None)
