"""The app that serves the page, and what keeps it private: who may ask, how much, what is told."""

import asyncio
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
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
from clinora.serving.batcher import Batcher
from clinora.serving.flags import Flags
from clinora.serving.page import CSS, THEME, build_page
from clinora.serving.passwords import Door

MOST_BODY_BYTES = 1_000_000  # of a request
MOST_FILE_BYTES = 5_000_000  # of a file with many notes
FORM_BYTES = 10_000  # around a file
UPLOAD = "/gradio_api/upload"
SHUTDOWN_SECONDS = 30  # in which what is being answered may end
MOST_SESSIONS = 1_000  # whose last prediction is remembered, for a flag
AT_ONCE = 32  # handlers of the page that run; the batcher bounds what reaches the model
MOST_EVENTS = 64  # of the page that wait for a handler
MOST_CONNECTIONS = 500
KEPT_SECONDS = 1800  # of a temporary file; then it is removed
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
    url: str = "http://127.0.0.1:7860",
) -> FastAPI:
    """Make the app: the page at ``/``, the API beside it, one batcher for both.

    Args:
        classifier: A trained run.
        flags_folder: Where flagged predictions go; made at the first one.
        hosts: Names that the app answers to beside those of the loopback address.
        users: Salt and hash of the password of each name that may enter; None: whoever asks.
        card: What the model card says of the run, in Markdown.
        url: Where the app is, for the snippets that the page shows.
    """
    _restrain_gradio()
    batcher = Batcher(classifier)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(Path(os.environ["GRADIO_TEMP_DIR"])))
        yield
        sweeping.cancel()
        await run_in_threadpool(batcher.close)

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    # The last added is the first that a request meets: a stranger's body is not read.
    app.add_middleware(BodyLimit)
    if users is not None:
        app.add_middleware(Door, users=users)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, *hosts])
    app.add_middleware(Guard)
    add_routes(app, batcher)

    page = build_page(batcher, Flags(flags_folder), card, url)
    page.state_session_capacity = MOST_SESSIONS
    page.max_threads = AT_ONCE  # of its own, or waiting handlers would hold up all other routes
    page.queue(api_open=False, max_size=MOST_EVENTS, default_concurrency_limit=AT_ONCE)
    app = gradio.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"openapi_url": None},
        footer_links=[],
        show_error=False,
        blocked_paths=[str(Path(flags_folder).resolve())],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
    )
    # After mounting, so that the server knows it and the browser does not: the browser's message
    # about a file that is too large shows the file's name as HTML.
    page.max_file_size = MOST_FILE_BYTES
    app.state.gradio, app.state.batcher = app.routes[-1].app, batcher
    return app


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve an app on a listening socket until a signal ends it, which is raised again then."""
    # At this level uvicorn does not log requests either.
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        limit_concurrency=MOST_CONNECTIONS,
    )
    Server(config).run(sockets=[listener])


class Server(uvicorn.Server):
    """Uvicorn's, which ends at once although every open page holds a connection."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.gradio.stop_event.set()
        await super().shutdown(sockets)


class Guard:
    """ASGI middleware: refuses what other sites' pages ask, closes routes, keeps errors private.

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
        if _is_closed(scope["path"]):
            await _detail("Not Found", 404)(scope, receive, send_with_policy)
            return
        try:
            await self.app(scope, receive, send_with_policy)
        except Exception as error:  # the server would log its message
            reference = report_error(error)
            if not started:
                answer = _detail(f"This did not work; reference {reference}.", 500)
                await answer(scope, receive, send_with_policy)


class BodyLimit:
    """ASGI middleware: reads a request's body whole, and refuses one that is too long."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["path"] == UPLOAD
        most, frame = (MOST_FILE_BYTES, FORM_BYTES) if upload else (MOST_BODY_BYTES, 0)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most + frame:
                answer = _detail(f"This is too long: at most {most:,} bytes.", 413)
                await answer(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body)}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, receive_whole, send)


def _is_closed(path: str) -> bool:
    """Tell whether Gradio's route would store a page's content, or fetch from elsewhere."""
    return (
        path.startswith(("/gradio_api/deep_link", "/gradio_api/component_server"))
        or "http:" in path
        or "https:" in path
        or "proxy=" in path
    )


def _restrain_gradio() -> None:
    """Keep Gradio from printing what came in, fetching for others, and sharing uploads."""
    # Errors before a handler runs quote what came in, and Gradio prints them.
    quiet = SimpleNamespace(print_exc=lambda: report_error(sys.exception()))
    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        module.traceback = quiet

    # A file given by its address would be fetched by the server.
    async def fetch(*_: object) -> str:
        raise ValueError("nothing is fetched from elsewhere")

    gradio.processing_utils.async_ssrf_protected_download = fetch
    gradio.route_utils.GradioUploadFile = _Upload


class _Upload(gradio.routes.GradioUploadFile):
    """Gradio's, which names a file by its content: two people's equal files would be one."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.sha.update(secrets.token_bytes(16))


async def _sweep(folder: Path) -> None:
    """Remove old temporary files: Gradio forgets those of uploads that failed."""
    while True:
        await asyncio.sleep(KEPT_SECONDS / 6)
        for path in folder.rglob("*"):
            with suppress(OSError):  # another removed it
                if path.is_file() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()


def _detail(text: str, status: int) -> JSONResponse:
    return JSONResponse({"detail": text}, status)
