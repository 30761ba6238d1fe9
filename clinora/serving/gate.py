"""What is open: the routes and events of the page, and what each of its inputs may hold.

Gradio has many more routes than the page uses, and trusts what its own page sends. So nothing
reaches it directly. The routes here are the only ones; each event is looked up in the list of those
that the page triggers; each input is checked against its component; and the request that Gradio
receives is written anew from what passed.

A **visit** is one browser at the page, known by a random cookie. What it uploads, what is made for
it and its events are its own: the name under which Gradio keeps a visit's events is derived from
the cookie, so no other visit can name it.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from urllib.parse import urlencode

import gradio
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clinora.serving.files import FileError, read_table
from clinora.serving.proxy import network_of
from clinora.serving.sessions import Sessions
from clinora.serving.storage import Owner, Storage, StoredFile

VISIT_COOKIE = "clinora_visit"
# The standard library needs seconds to read a value of many backslashes (CVE-2024-7592).
VISIT_PATTERN = re.compile(rf"(?:^|; ?){VISIT_COOKIE}=([A-Za-z0-9_-]{{1,64}})(?=;|$)")
MOST_PATH_CHARACTERS = 200  # of one of the page's own files
MOST_TEXT_CHARACTERS = 250_000  # of a text; a handler says more kindly what a note may have
UPLOAD_ROUTE = "/gradio_api/upload"

# Gradio's routes that are open as they are: the page uses them.
PLAIN_ROUTES = (
    "/",
    "/config",  # what "/" holds as JSON, for programs that use the page's protocol
    "/theme.css",
    "/assets/{path:path}",
    "/static/{path:path}",
    "/favicon.ico",
    "/gradio_api/app_id",
)
# The first routes of a visit, which give it its cookie.
FIRST_ROUTES = ("/", "/config")

# The events that the page triggers, by their api_name.
EVENTS = (
    "choose_example",
    "predict",
    "clear_failed_prediction",
    "clear",
    "flag",
    "count_for_rank",
    "count_for_targets",
    "compare_strengths",
    "compare_moved_strength",
    "compare_merged",
    "classify_file",
    "clear_failed_file",
)


class Join(BaseModel):
    """What the page posts to trigger an event; whatever else it posts is left out."""

    fn_index: int
    session_hash: str = Field(pattern="^[a-z0-9]{1,64}$")
    data: list


def add_page(app: FastAPI, blocks: gradio.Blocks, gradio_app: ASGIApp, storage: Storage) -> None:
    """Add the page's routes to an app: all that a browser may ask of Gradio.

    Args:
        app: The app that is served.
        blocks: The page.
        gradio_app: The ASGI app that Gradio made of it; it is reached through these routes alone.
        storage: The files of the visits.

    Raises:
        ValueError: An open event has an input for which there is no check here.
    """
    events = open_events(blocks)
    sessions = Sessions(blocks)
    reading = CapacityLimiter(1)  # files: what one client uploads must not take all processors

    async def forward_plain(request: Request) -> Forward:
        path = request.scope["path"]
        if len(path) > MOST_PATH_CHARACTERS or not path.isprintable():
            raise HTTPException(404)
        fresh = _known_visit(request) is None and path in FIRST_ROUTES
        return Forward(gradio_app, new_visit=secrets.token_urlsafe(16) if fresh else None)

    async def join(request: Request) -> ASGIApp:
        visit = _visit(request)
        try:
            asked = Join.model_validate_json(await request.body())
        except ValidationError:
            raise HTTPException(422, "Expected JSON with fn_index, session_hash, data.") from None
        event = events.get(asked.fn_index)
        if event is None:
            raise HTTPException(404, "There is no such event.")
        if len(asked.data) != len(event.inputs):
            raise HTTPException(422, f"Expected {len(event.inputs)} inputs.")
        data = [
            check_input(component, value, lambda path: storage.find(path, visit))
            for component, value in zip(event.inputs, asked.data, strict=True)
        ]
        session = _session(visit, asked.session_hash)
        body = {"fn_index": asked.fn_index, "session_hash": session, "data": data}
        forward = Forward(gradio_app, body=json.dumps(body).encode())
        return sessions.join(session, network_of(request.client), forward)

    async def queue_data(request: Request) -> Forward:
        session = _session(_visit(request), request.query_params.get("session_hash", ""))
        if session not in blocks._queue.pending_messages_per_session:
            raise HTTPException(404, "No event was triggered, or its result was read.")
        return Forward(gradio_app, query={"session_hash": session})

    async def heartbeat(request: Request) -> Forward:
        session = _session(_visit(request), request.path_params["session"])
        return Forward(gradio_app, path=f"/gradio_api/heartbeat/{session}")

    async def upload(request: Request) -> Response:
        owner = Owner(_visit(request), network_of(request.client))
        try:
            async with request.form(max_files=1, max_fields=0) as form:
                file = form.get("files")
                if not isinstance(file, UploadFile):
                    raise HTTPException(422, "Expected one file.")
                content = await file.read()
                name = file.filename or ""
        except UnicodeError:  # the form's charset may be any of Python's codecs
            raise HTTPException(422, "Expected a form in UTF-8.") from None
        try:
            await to_thread.run_sync(read_table, content, limiter=reading)
        except FileError as error:  # as text: the page shows an answer's body as it is
            return PlainTextResponse(str(error), 422)
        stored = await run_in_threadpool(storage.add, owner, name, content)
        return JSONResponse([str(stored.path)])

    async def upload_progress(_request: Request) -> Response:
        # A file of this size is there before a bar of progress could be seen.
        return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    async def download(request: Request) -> Response:
        stored = storage.find(request.path_params["path"], _visit(request))
        if stored is None:
            raise HTTPException(404)
        return FileResponse(stored.path, media_type="text/csv", filename=stored.path.name)

    for path in PLAIN_ROUTES:
        app.add_route(path, forward_plain, methods=["GET"])
    app.add_route("/gradio_api/queue/join", join, methods=["POST"])
    app.add_route("/gradio_api/queue/data", queue_data, methods=["GET"])
    app.add_route("/gradio_api/heartbeat/{session}", heartbeat, methods=["GET"])
    app.add_route(UPLOAD_ROUTE, upload, methods=["POST"])
    app.add_route("/gradio_api/upload_progress", upload_progress, methods=["GET"])
    app.add_route("/gradio_api/file={path:path}", download, methods=["GET"])


def open_events(blocks: gradio.Blocks) -> dict[int, gradio.blocks.BlockFunction]:
    """Give the open events of a page by their numbers.

    Raises:
        ValueError: One has an input for which there is no check.
    """
    events = {number: fn for number, fn in blocks.fns.items() if fn.api_name in EVENTS}
    for event in events.values():
        for component in event.inputs:
            if type(component) not in CHECKS:
                raise ValueError(f"no check for the input {component} of {event.api_name}")
    return events


# --- what an input may hold ---------------------------------------------------------------------

FindFile = Callable[[object], StoredFile | None]


def check_input(component: gradio.blocks.Block, value: object, find_file: FindFile) -> object:
    """Give what an input's component may read.

    Args:
        component: The component.
        value: What came for it, of any type.
        find_file: Finds the visit's own file at a path.

    Raises:
        HTTPException: 422; it says what was expected and does not repeat the value.
    """
    check = CHECKS[type(component)]
    try:
        return check(component, value, find_file)
    except ExpectedError as expected:
        label = getattr(component, "label", None) or "input"
        raise HTTPException(422, f"{label}: expected {expected}.") from None


class ExpectedError(ValueError):
    """An input does not hold what it should; the message says what was expected."""


def _check_text(_component: gradio.Textbox, value: object, _find: FindFile) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MOST_TEXT_CHARACTERS:
        raise ExpectedError(f"a text of at most {MOST_TEXT_CHARACTERS:,} characters")
    return value


def _check_truth(_component: gradio.Checkbox, value: object, _find: FindFile) -> bool:
    if not isinstance(value, bool):
        raise ExpectedError("true or false")
    return value


def _check_number(component: gradio.Slider, value: object, _find: FindFile) -> float:
    low, high = component.minimum, component.maximum
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # nothing compares with NaN
        raise ExpectedError(f"a number from {low:g} to {high:g}")
    return value


def _check_choice(component: gradio.Radio, value: object, _find: FindFile) -> str | None:
    if value is not None and value not in _choices(component):
        raise ExpectedError("one of the choices")
    return value


def _check_choices(component: gradio.CheckboxGroup, value: object, _find: FindFile) -> list[str]:
    choices = _choices(component)
    if not isinstance(value, list) or any(choice not in choices for choice in value):
        raise ExpectedError("some of the choices")
    if len(set(value)) < len(value):
        raise ExpectedError("each choice once")
    return value


def _choices(component: gradio.Radio | gradio.CheckboxGroup) -> list[str]:
    return [value for _name, value in component.choices]


def _check_file(_component: gradio.File, value: object, find: FindFile) -> dict | None:
    if value is None:
        return None
    stored = find(value.get("path")) if isinstance(value, dict) else None
    if stored is None:
        raise ExpectedError("a file that was uploaded here and is still kept")
    return {
        "path": str(stored.path),
        "orig_name": stored.path.name,
        "size": stored.size,
        "meta": {"_type": "gradio.FileData"},
    }


def _check_example(component: gradio.Dataset, value: object, _find: FindFile) -> int:
    if type(value) is not int or not 0 <= value < len(component.samples):
        raise ExpectedError("the number of an example")
    return value


def _ignore_state(_component: gradio.State, _value: object, _find: FindFile) -> None:
    return None  # it is kept here and never comes from the browser


CHECKS = {
    gradio.Textbox: _check_text,
    gradio.Checkbox: _check_truth,
    gradio.Slider: _check_number,
    gradio.Radio: _check_choice,
    gradio.CheckboxGroup: _check_choices,
    gradio.File: _check_file,
    gradio.Dataset: _check_example,
    gradio.State: _ignore_state,
}


# --- visits and requests ------------------------------------------------------------------------


def _known_visit(request: Request) -> str | None:
    found = VISIT_PATTERN.search(request.headers.get("cookie", ""))
    return found and found[1]


def _visit(request: Request) -> str:
    visit = _known_visit(request)
    if visit is None:
        raise HTTPException(403, "Open the page first, and allow its cookie.")
    return visit


def _session(visit: str, name: str) -> str:
    """Give the name under which Gradio keeps a visit's events."""
    return hashlib.sha256(f"{visit} {name}".encode()).hexdigest()


class Forward:
    """An ASGI answer: Gradio's, to a request written anew.

    Path and method stay as they came unless given. Nothing stays of the query, the body, the
    cookies and the password.
    """

    def __init__(
        self,
        gradio_app: ASGIApp,
        *,
        path: str | None = None,
        query: dict[str, str] | None = None,
        body: bytes = b"",
        new_visit: str | None = None,
    ) -> None:
        self.gradio_app = gradio_app
        self.path = path
        self.query = urlencode(query or {}).encode()
        self.body = body
        self.new_visit = new_visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = dict(scope, query_string=self.query, path_params={})
        if self.path is not None:
            scope.update(path=self.path, raw_path=self.path.encode())
        headers = MutableHeaders(raw=list(scope["headers"]))
        del headers["cookie"]
        del headers["authorization"]
        if self.body:
            headers["content-type"] = "application/json"
            headers["content-length"] = str(len(self.body))
        scope["headers"] = headers.raw
        unread: list[Message] = [{"type": "http.request", "body": self.body}]

        async def receive_new() -> Message:
            return unread.pop() if unread else await receive()

        async def send_with_cookie(message: Message) -> None:
            if self.new_visit is not None and message["type"] == "http.response.start":
                # Not Strict: a link on another site would come without it, and the cookie of the
                # answer would end the visit in another tab.
                cookie = f"{VISIT_COOKIE}={self.new_visit}; HttpOnly; SameSite=Lax; Path=/"
                if scope["scheme"] == "https":
                    cookie += "; Secure"
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        await self.gradio_app(scope, receive_new, send_with_cookie)
