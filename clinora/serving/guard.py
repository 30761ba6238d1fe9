"""What every request meets first: refusals of other sites, headers, and limits of a body."""

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
STATIC_ROUTES = ("/assets/", "/static/", "/theme.css")  # the same for everybody


class Guard:
    """ASGI middleware: refuses what other sites' pages ask, sends headers, keeps errors private.

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
        if origin and origin.partition("://")[2] != headers.get("host"):
            answer = JSONResponse({"detail": "Another site's page asked."}, 403)
            await answer(scope, receive, send_with_headers)
            return
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:  # the server would log its message
            reference = report_error(error)
            if not started:
                detail = f"This did not work; reference {reference}."
                await JSONResponse({"detail": detail}, 500)(scope, receive, send_with_headers)


class BodyLimit:
    """ASGI middleware: reads a request's body whole, and refuses one that is too long."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = MOST_FILE_BYTES + FORM_BYTES if scope["path"] == UPLOAD_ROUTE else MOST_BODY_BYTES
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
                await JSONResponse({"detail": detail}, 413)(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body)}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, receive_whole, send)
