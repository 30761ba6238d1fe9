"""The server: connection limits, deadlines for clients, and the shutdown of the service.

uvicorn waits without a limit for a client that sends its request byte by byte or does not read the
response. Here both have a deadline.
"""

import asyncio
import gc
import socket
import time
from collections.abc import Callable, Sequence
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

Network = IPv4Network | IPv6Network

MOST_BODY_BYTES = 1_000_000  # in a request
MOST_FILE_BYTES = 5_000_000  # in an uploaded file of many notes
FORM_BYTES = 10_000  # for the form fields around a file

# The stream that delivers the results of the page's events. All other streams are endless.
EVENT_STREAM = "/gradio_api/queue/data"
DELIVERY_SECONDS = 1  # time for the last result to reach its stream
# The queue of new connections. All of it is accepted before any is counted, and a process may have
# 1,024 open files.
BACKLOG = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits for connections and for slow clients.

    Attributes:
        connections: Open connections of all clients together.
        connections_of_address: Open connections of one address.
        seconds: Time to send the headers of a request. To send a body or to read a response, a
            client has this time plus the time that ``bytes_per_second`` gives.
        bytes_per_second: Speed of the slowest client that is served.
        largest_body: Size in bytes that is assumed for a body of unknown or larger size.
        shutdown_seconds: Time that accepted requests have to finish at shutdown. A request to the
            API takes at most 30 s.
        last_seconds: Time that a client has to read its response at shutdown.
    """

    connections: int = 500
    connections_of_address: int = 100
    seconds: float = 10
    bytes_per_second: float = 20_000
    largest_body: int = MOST_FILE_BYTES + FORM_BYTES
    shutdown_seconds: float = 35
    last_seconds: float = 3

    def seconds_for(self, size: int) -> float:
        """Return the time in seconds that a client has to send or read ``size`` bytes."""
        return self.seconds + size / self.bytes_per_second


DEFAULT_LIMITS = Limits()


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve an app until a signal ends the service; the signal is then raised again.

    Args:
        app: The app that ``create_app`` returned.
        listener: A listening socket.
    """
    # Everything loaded so far stays until the end. Otherwise the garbage collector would examine
    # it once more at exit, for 1.5 s.
    gc.freeze()
    Server(app).run(sockets=[listener])


class Connection(H11Protocol):
    """uvicorn's connection, with deadlines for the data that the client sends and reads.

    Attributes:
        address: The client's address.
        stream: The path of the event stream that the connection is sending, or None.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        trusted_proxies: Sequence[Network],
        count_refused: Callable[[int], None],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.address = ""
        self.stream: str | None = None
        self._limits = limits
        self._trusted_proxies = trusted_proxies
        self._count_refused = count_refused
        self._inner_app = self.app
        self.app = self._run_app
        self._is_ending = False
        # The headers or the body that the client is sending, as _find_arriving identifies them.
        self._arriving: tuple | None = (h11.IDLE, None)
        self._read_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # With this limit, pause_writing is called whenever some data could not be sent at once.
        transport.set_write_buffer_limits(high=0)
        # asyncio sets TCP_NODELAY only if it created the listening socket. Without it, the body of
        # a response waits 40 ms until the client has acknowledged the headers.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.client is not None:
            self.address = self.client[0]
        if self._exceeds_limits():
            self._close(503)
            return
        self._read_deadline = self.loop.call_later(self._limits.seconds, self._close, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop(self._read_deadline)
        self._stop(self._write_deadline)

    def handle_events(self) -> None:
        super().handle_events()
        arriving = self._find_arriving()
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
        # uvicorn's method fails if the response was sent before the end of the request body.
        self._close(400)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._write_deadline)
        self._write_deadline = None

    def shutdown(self) -> None:
        """Close the connection, or close it after the current response."""
        if not self._is_ending:
            self._is_ending = True
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
        """Run the app and record the path of an event stream."""
        self.stream = None

        async def record_stream_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                content_type = Headers(raw=message["headers"]).get("content-type", "")
                if content_type.startswith("text/event-stream"):
                    self.stream = scope["path"]
            await send(message)

        with suppress(asyncio.CancelledError):  # otherwise a cancelled request would be logged
            await self._inner_app(scope, receive, record_stream_and_send)

    def _exceeds_limits(self) -> bool:
        """Return whether there are too many connections with this one."""
        if len(self.connections) > self._limits.connections:
            return True
        if any(ip_address(self.address) in network for network in self._trusted_proxies):
            return False  # a proxy forwards the requests of many clients
        of_address = [other for other in self.connections if other.address == self.address]
        return len(of_address) > self._limits.connections_of_address

    def _find_arriving(self) -> tuple | None:
        """Identify the headers or the body that the client is sending; None if neither.

        The pair holds the state of the client's side of the connection, and the request: a body's
        own, or for headers the one before them.
        """
        state = self.conn.their_state
        unparsed, _ = self.conn.trailing_data
        sends_body = state is h11.SEND_BODY
        sends_headers = state is h11.IDLE and len(unparsed) > 0
        if sends_body or sends_headers:
            return state, self.cycle
        return None

    def _size_of_body(self) -> int:
        announced = dict(self.headers).get(b"content-length")
        if announced is None:
            return self._limits.largest_body
        return min(int(announced), self._limits.largest_body)

    def _wait_for_reader(self) -> None:
        """Set the deadline for the client to read the data in the write buffer."""
        seconds = self._limits.seconds_for(self.transport.get_write_buffer_size())
        if self._is_ending:
            seconds = self._limits.last_seconds
        self._write_deadline = self.loop.call_later(seconds, self.transport.abort)

    def _close(self, status: int) -> None:
        """Close the connection, and send this status if no response has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("Content-Length", "0"), ("Connection", "close")]
            head = self.conn.send(h11.Response(status_code=status, headers=headers))
            self.transport.write(head + self.conn.send(h11.EndOfMessage()))
            self._count_refused(status)
        if self.cycle is not None:
            self.cycle.disconnected = True  # further data from the app is dropped
        self.transport.close()

    @staticmethod
    def _stop(deadline: asyncio.TimerHandle | None) -> None:
        if deadline is not None:
            deadline.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, which shuts down soon although clients keep connections open."""

    def __init__(self, app: FastAPI, limits: Limits = DEFAULT_LIMITS) -> None:
        connection = partial(
            Connection,
            limits=limits,
            trusted_proxies=app.state.trusted_proxies,
            count_refused=app.state.metrics.count_connection,
        )
        config = uvicorn.Config(
            app,
            http=connection,
            proxy_headers=False,  # uvicorn would trust the headers of any client on this machine
            ws="none",
            lifespan="on",
            backlog=BACKLOG,
            # With warnings, any client could fill the log. Requests are not logged either.
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
        """Finish the accepted requests, and close all other connections at once."""
        connections = self.server_state.connections
        tasks = self.server_state.tasks
        end = time.monotonic() + self._limits.shutdown_seconds
        last_event = time.monotonic()
        while (connections or tasks) and not self.force_exit and time.monotonic() < end:
            if self._events_are_running():
                last_event = time.monotonic()
            delivers_results = time.monotonic() - last_event < DELIVERY_SECONDS
            for connection in list(connections):
                connection.shutdown()
                if connection.stream is None:
                    continue
                if connection.stream == EVENT_STREAM and delivers_results:
                    continue
                connection.transport.close()
            await asyncio.sleep(0.1)
        for connection in list(connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # lets connection_lost run
        # Otherwise asyncio would log the cancelled tasks as errors.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        for task in list(tasks):
            task.cancel()

    def _events_are_running(self) -> bool:
        """Return whether an event of the page is waiting or running."""
        queue = self.config.app.state.gradio.get_blocks()._queue
        return len(queue) > 0 or queue.get_active_worker_count() > 0
