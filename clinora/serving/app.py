"""The app that serves the page, and what keeps it private: who may ask, how much, what is told."""

import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import gradio
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clinora.classifier import Classifier
from clinora.serving import report_error
from clinora.serving.api import add_routes
from clinora.serving.batcher import MOST_WAITING, Batcher
from clinora.serving.flags import Flags
from clinora.serving.page import CSS, THEME, build_page
from clinora.serving.passwords import Door

MOST_BODY_BYTES = 1_000_000  # of a request
MOST_FILE_BYTES = 5_000_000  # of a file with many notes
UPLOAD = "/gradio_api/upload"
SHUTDOWN_SECONDS = 30  # in which what is being answered may end
MOST_SESSIONS = 1_000  # whose last prediction is remembered, for a flag
AT_ONCE = 32  # handlers of the page that run; the batcher bounds what reaches the model
# Another name would be another site's, whose owner has it point here (DNS rebinding).
LOOPBACK_NAMES = ["127.0.0.1", "localhost"]

# The page needs inline scripts and styles; nothing may come from or go to another origin.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; frame-ancestors 'none'"
)


def create_app(
    classifier: Classifier,
    flags_folder: str | Path,
    *,
    hosts: Sequence[str] = (),
    users: dict[str, tuple[bytes, bytes]] | None = None,
    card: str = "",
) -> FastAPI:
    """Make the app: the page at ``/``, the API beside it, one batcher for both.

    Args:
        classifier: A trained run.
        flags_folder: Where flagged predictions go; made at the first one.
        hosts: Names that the app answers to beside those of the loopback address.
        users: Salt and hash of the password of each name that may enter; None: whoever asks.
        card: What the model card says of the run, in Markdown.
    """
    # Errors before a handler runs quote what came in, and Gradio prints them.
    quiet = SimpleNamespace(print_exc=lambda: report_error(sys.exception()))
    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        module.traceback = quiet

    batcher = Batcher(classifier)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close)

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    # The last added is the first that a request meets.
    if users is not None:
        app.add_middleware(Door, users=users)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, *hosts])
    app.add_middleware(Guard)
    add_routes(app, batcher)

    @app.get("/gradio_api/deep_link")
    def deep_link() -> JSONResponse:  # Gradio's writes what is on the page to a file
        return _detail("Not Found", 404)

    page = build_page(batcher, Flags(flags_folder), card)
    page.state_session_capacity = MOST_SESSIONS
    page.queue(api_open=False, max_size=MOST_WAITING, default_concurrency_limit=AT_ONCE)
    app = gradio.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"openapi_url": None},
        footer_links=[],
        show_error=False,
        max_file_size=MOST_FILE_BYTES,
        blocked_paths=[str(Path(flags_folder).resolve())],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
    )
    app.state.gradio, app.state.batcher = app.routes[-1].app, batcher
    return app


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve an app on a listening socket until a signal ends it, which is raised again then."""
    # At this level uvicorn does not log requests either.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    Server(config).run(sockets=[listener])


class Server(uvicorn.Server):
    """Uvicorn's, which ends at once although every open page holds a connection."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.gradio.stop_event.set()
        await super().shutdown(sockets)


class Guard:
    """ASGI middleware: refuses other sites' pages and long bodies, and keeps errors private.

    Another site's page could have a browser that is logged in here ask for it: its requests carry
    that site's Origin.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_policy(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
            await send(message)

        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin and origin.partition("://")[2] != headers.get("host"):
            await _detail("Another site's page asked.", 403)(scope, receive, send_with_policy)
            return
        most = MOST_FILE_BYTES if scope["path"] == UPLOAD else MOST_BODY_BYTES
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                answer = _detail(f"This is too long: at most {most:,} bytes.", 413)
                await answer(scope, receive, send_with_policy)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body)}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        try:
            await self.app(scope, receive_whole, send_with_policy)
        except Exception as error:  # the server would log its message
            reference = report_error(error)
            if not started:
                answer = _detail(f"This did not work; reference {reference}.", 500)
                await answer(scope, receive, send_with_policy)


def _detail(text: str, status: int) -> JSONResponse:
    return JSONResponse({"detail": text}, status)
