"""Middleware for every request: cross-site refusal, response headers and body size limits."""

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clinora.serving import report_error
from clinora.serving.gate import UPLOAD_ROUTE
from clinora.serving.server import FORM_BYTES, MOST_BODY_BYTES, MOST_FILE_BYTES

# The page needs inline scripts and styles; nothing may come from or go to another origin.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
STATIC_ROUTES = ("/assets/", "/static/", "/theme.css")  # identical for all users, so cacheable


class Guard:
    """ASGI middleware: refuses requests from other sites' pages, adds headers, hides error texts.

    A page of another site could send requests through a browser that is logged in here. The Origin
    header of such a request gives the other site. It has to agree with the Host header, port
    included: pages on another port of the same machine are another site too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if not scope["path"].startswith(STATIC_ROUTES):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        headers = Headers(scope=scope)
        origin = headers.get("origin")
        host = headers.get("host")
        if origin and origin.partition("://")[2] != host:
            detail = (
                f"Requests from another site's page are refused: the Origin header is {origin}, "
                f"the Host header {host}. A proxy has to pass on the Host header unchanged, with "
                "its port (in nginx: proxy_set_header Host $http_host)."
            )
            response = JSONResponse({"detail": detail}, 403)
            await response(scope, receive, send_with_headers)
            return
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:  # uvicorn would log the error's message
            reference = report_error(error)
            if not started:
                detail = f"This did not work; reference {reference}."
                response = JSONResponse({"detail": detail}, 500)
                await response(scope, receive, send_with_headers)


class BodyLimit:
    """ASGI middleware: reads the whole request body first, and refuses one that is too long."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = MOST_BODY_BYTES
        if scope["path"] == UPLOAD_ROUTE:
            limit = MOST_FILE_BYTES + FORM_BYTES
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                detail = f"This is too long: at most {limit:,} bytes."
                response = JSONResponse({"detail": detail}, 413)
                await response(scope, receive, send)
                return
        unread: list[Message] = [{"type": "http.request", "body": bytes(body)}]

        async def receive_body() -> Message:
            if unread:
                return unread.pop()
            return await receive()

        await self.app(scope, receive_body, send)
