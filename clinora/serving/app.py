"""The app that serves the page, and what keeps it private: who may ask, how much, what is told."""

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gradio
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clinora.classifier import Classifier, Prediction
from clinora.serving import report_error
from clinora.serving.flags import Flags
from clinora.serving.page import CSS, THEME, build_page

MOST_BODY_BYTES = 1_000_000  # of a request
MOST_WAITING = 64  # in the queue before the model
SHUTDOWN_SECONDS = 5  # in which what is being answered may end
# Another name would be another site's, whose owner has it point here (DNS rebinding).
LOOPBACK_NAMES = ["127.0.0.1", "localhost"]

# The page needs inline scripts and styles; nothing may come from or go to another origin.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; frame-ancestors 'none'"
)


def create_app(classifier: Classifier, flags_folder: str | Path) -> FastAPI:
    """Make the app with the page at ``/``, answering requests to loopback names only.

    Args:
        classifier: A trained run.
        flags_folder: Where flagged predictions go; made at the first one.
    """
    # Errors before a handler runs quote what came in, and Gradio prints them.
    quiet = SimpleNamespace(print_exc=lambda: report_error(sys.exception()))
    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        module.traceback = quiet

    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)
    app.add_middleware(Guard, most_bytes=MOST_BODY_BYTES)

    @app.get("/gradio_api/deep_link")
    def deep_link() -> JSONResponse:  # Gradio's writes what is on the page to a file
        return _detail("Not Found", 404)

    page = build_page(one_at_a_time(classifier), classifier.token_limit, Flags(flags_folder))
    page.queue(api_open=False, max_size=MOST_WAITING)
    app = gradio.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"openapi_url": None},
        footer_links=[],
        show_error=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
    )
    app.state.gradio = app.routes[-1].app
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


def one_at_a_time(classifier: Classifier) -> Callable[[str], Prediction]:
    """Make a function that classifies one note, whose callers wait for each other."""
    lock = threading.Lock()

    def classify(note: str) -> Prediction:
        with lock:
            return classifier([note])[0]

    return classify


class Guard:
    """ASGI middleware: limits a request's body, adds the policy, keeps errors out of the log."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

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

        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most_bytes:
                answer = _detail(f"This is too long: at most {self.most_bytes:,} bytes.", 413)
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
