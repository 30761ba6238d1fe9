"""The server: how much of it one client may hold, for how long, and how the service ends.

uvicorn itself waits without a limit for a client that sends its request byte by byte, or that does
not read its answer. Here each of these has a deadline.
"""

import asyncio
import gc
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_BODY_BYTES = 1_000_000  # of a request
MOST_FILE_BYTES = 5_000_000  # of a file with many notes
FORM_BYTES = 10_000  # around a file

# The stream that delivers the results of the page's events; all other streams are endless.
EVENT_STREAM = "/gradio_api/queue/data"
DELIVERY_SECONDS = 1  # for the last result to reach its stream
# New connections that are taken at once. They are counted only after that, and a process may have
# 1,024 files open.
BACKLOG = 128


Network = IPv4Network | IPv6Network


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much of the server a client may hold, and for how long.

    Attributes:
        connections: Open connections of all clients together.
        connections_of_address: Open connections of one address.
        seconds: Time for the headers of a request. A body, and an answer that the client has to
            read, may take this long plus the time that ``bytes_per_second`` gives.
        bytes_per_second: The slowest client that is served.
        largest_body: Bytes that a body of unknown or larger size has time for.
        shutdown_seconds: Time at the end of the service for the requests that were accepted. A
            request to the API takes at most 30 s.
        last_seconds: Time at the end of the service for a client to read its answer.
    """

    connections: int = 500
    connections_of_address: int = 100
    seconds: float = 10
    bytes_per_second: float = 20_000
    largest_body: int = MOST_FILE_BYTES + FORM_BYTES
    shutdown_seconds: float = 35
    last_seconds: float = 3

    def seconds_for(self, size: int) -> float:
        """Give the time that a client has to send or to read ``size`` bytes."""
        return self.seconds + size / self.bytes_per_second


DEFAULT_LIMITS = Limits()


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve an app on a listening socket until a signal ends it; the signal is raised again then.

    Args:
        app: The app of ``create_app``.
        listener: A socket that listens.
    """
    # All that is loaded stays until the end: the garbage collector would look through it once more
    # then, for 1.5 s.
    gc.freeze()
    Server(app).run(sockets=[listener])


class Connection(H11Protocol):
    """uvicorn's connection, with a deadline for all that the client sends and reads.

    Attributes:
        address: The client's address.
        stream: The path of the event stream that the connection sends now, if any.
    """

    def __init__(
        self, *, limits: Limits, trusted_proxies: Sequence[Network], **of_uvicorn: Any
    ) -> None:
        super().__init__(**of_uvicorn)
        self.address = ""
        self.stream: str | None = None
        self._limits = limits
        self._trusted_proxies = trusted_proxies
        self._whole_app = self.app
        self.app = self._run_app
        self._ending = False
        # What is arriving: the state of the client's side, and the request before it or its own.
        self._arriving: tuple | None = (h11.IDLE, None)
        self._read_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing: not all was sent at once
        # asyncio sets this only where it made the listening socket itself. Without it the body of
        # an answer waits 40 ms, until the client has acknowledged the headers.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.client is not None:
            self.address = self.client[0]
        if self._is_one_too_many():
            self._close(503)
            return
        self._read_deadline = self.loop.call_later(self._limits.seconds, self._close, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop(self._read_deadline)
        self._stop(self._write_deadline)

    def handle_events(self) -> None:
        super().handle_events()
        arriving = self._what_is_arriving()
        if arriving == self._arriving:
            return
        self._arriving = arriving
        self._stop(self._read_deadline)
        if arriving is None:
            return
        size = 0
        if self.conn.their_state is h11.SEND_BODY:
            size = self._size_of_body()
        self._read_deadline = self.loop.call_later(self._limits.seconds_for(size), self._close, 408)

    def send_400_response(self, msg: str) -> None:
        self._close(400)  # uvicorn's own fails where the request was answered before its body's end

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._write_deadline)
        self._write_deadline = None

    def shutdown(self) -> None:
        """Close the connection, or let it end after the request that is being answered."""
        if not self._ending:
            self._ending = True
            if self._write_deadline is not None:
                self._write_deadline.cancel()
                self._wait_for_reader()
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            self._close(503)
            return
        super().shutdown()

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app. Notes whether the answer is a stream; a cancelled request is not logged."""
        self.stream = None

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                if kind.startswith("text/event-stream"):
                    self.stream = scope["path"]
            await send(message)

        with suppress(asyncio.CancelledError):
            await self._whole_app(scope, receive, send_and_note)

    def _is_one_too_many(self) -> bool:
        if len(self.connections) > self._limits.connections:
            return True
        if any(ip_address(self.address) in network for network in self._trusted_proxies):
            return False  # it brings the requests of many clients
        beside = [other for other in self.connections if other.address == self.address]
        return len(beside) > self._limits.connections_of_address

    def _what_is_arriving(self) -> tuple | None:
        """Identify the headers or the body that the client is sending; None: it sends nothing."""
        state = self.conn.their_state
        begun, _ = self.conn.trailing_data
        if state is h11.SEND_BODY or (state is h11.IDLE and begun):
            return state, self.cycle
        return None

    def _size_of_body(self) -> int:
        announced = dict(self.headers).get(b"content-length")
        if announced is None:
            return self._limits.largest_body
        return min(int(announced), self._limits.largest_body)

    def _wait_for_reader(self) -> None:
        """Give the client some time to read what is ready for it."""
        seconds = self._limits.seconds_for(self.transport.get_write_buffer_size())
        if self._ending:
            seconds = self._limits.last_seconds
        self._write_deadline = self.loop.call_later(seconds, self.transport.abort)

    def _close(self, status: int) -> None:
        """Close the connection, with a status if no answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("Content-Length", "0"), ("Connection", "close")]
            head = self.conn.send(h11.Response(status_code=status, headers=headers))
            self.transport.write(head + self.conn.send(h11.EndOfMessage()))
        if self.cycle is not None:
            self.cycle.disconnected = True  # what the app still sends is dropped
        self.transport.close()

    @staticmethod
    def _stop(deadline: asyncio.TimerHandle | None) -> None:
        if deadline is not None:
            deadline.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, which ends soon although clients keep their connections open."""

    def __init__(
        self,
        app: FastAPI,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        trusted_proxies = app.state.trusted_proxies
        config = uvicorn.Config(
            app,
            http=partial(Connection, limits=limits, trusted_proxies=trusted_proxies),
            proxy_headers=False,  # uvicorn's would believe whoever is on this machine
            ws="none",
            lifespan="on",
            backlog=BACKLOG,
            # Warnings would let a stranger fill the log; requests are not logged either.
            log_level="error",
        )
        super().__init__(config)
        self._limits = limits

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._close_connections()
        await super().shutdown(sockets)

    async def _close_connections(self) -> None:
        """Answer the requests that were accepted; close everything else at once."""
        connections = self.server_state.connections
        tasks = self.server_state.tasks
        end = time.monotonic() + self._limits.shutdown_seconds
        last_event = time.monotonic()
        while (connections or tasks) and not self.force_exit and time.monotonic() < end:
            if self._events_are_running():
                last_event = time.monotonic()
            results_to_come = time.monotonic() - last_event < DELIVERY_SECONDS
            for connection in list(connections):
                connection.shutdown()
                delivers = connection.stream == EVENT_STREAM and results_to_come
                if connection.stream is not None and not delivers:
                    connection.transport.close()
            await asyncio.sleep(0.1)
        for connection in list(connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # the connections learn that they are lost
        # asyncio would log what is cancelled now as errors.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        for task in list(tasks):
            task.cancel()

    def _events_are_running(self) -> bool:
        """Tell whether the page's queue waits for or works on an event."""
        queue = self.config.app.state.gradio.get_blocks()._queue
        return len(queue) > 0 or queue.get_active_worker_count() > 0
