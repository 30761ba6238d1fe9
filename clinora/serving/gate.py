"""The open routes and events of the page, and the checks of their inputs.

Gradio has many more routes than the page uses, and it trusts the requests of its page. Therefore no
request reaches Gradio directly. Only the routes in this module exist. An event must be on the list
of those that the page triggers, and each input must pass the check of its component. Gradio then
receives a new request that holds only checked values.

A **visit** is one browser on the page, identified by a random cookie. The files that a visit
uploads, its results and its events belong to it alone: the session hash under which Gradio keeps
the events is derived from the cookie, so another visit cannot use it.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from urllib.parse import urlencode, urlsplit
from weakref import WeakValueDictionary

import gradio
from anyio import CapacityLimiter
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clinora.serving.api import RETRY_AFTER
from clinora.serving.files import MOST_COLUMNS, MOST_NAME_CHARACTERS, FileError
from clinora.serving.proxy import network_of
from clinora.serving.reading import check_in_subprocess
from clinora.serving.sessions import Sessions
from clinora.serving.storage import Owner, Storage, StoredFile

VISIT_COOKIE = "clinora_visit"
VISIT_IN_SCOPE = "clinora.visit"  # key of an event's visit in the ASGI scope of its request
# A pattern, because http.cookies needs seconds for a value of many backslashes (CVE-2024-7592).
VISIT_PATTERN = re.compile(rf"(?:^|; ?){VISIT_COOKIE}=([A-Za-z0-9_-]{{1,64}})(?=;|$)")
MOST_PATH_CHARACTERS = 200  # in the path of a file of the page
MOST_TEXT_CHARACTERS = 250_000  # in a text; the handlers have a lower limit for notes
MOST_WAITING_UPLOADS = 4  # of one address; each holds its file in memory
UPLOAD_ROUTE = "/gradio_api/upload"

# Gradio's routes that the page uses unchanged.
PLAIN_ROUTES = (
    "/",
    "/config",  # the content of "/" as JSON, for programs that use the page's protocol
    "/theme.css",
    "/assets/{path:path}",
    "/static/{path:path}",
    "/favicon.ico",
    "/gradio_api/app_id",
)
# A visit starts at one of these routes and gets its cookie there.
FIRST_ROUTES = ("/", "/config")

# The events that the page triggers, by their api_name.
EVENTS = (
    "choose_example",
    "flag",
    "download_last_notes",
    "predict",
    "clear_failed_prediction",
    "explain",
    "clear",
    "undo_clear",
    "count_for_rank",
    "count_for_targets",
    "train_lesson",
    "stop_lesson",
    "open_internals",
    "choose_result",
    "show_weights",
    "compare_strengths",
    "compare_moved_strength",
    "compare_merged",
    "show_attention",
    "show_attention_layer",
    "show_attention_head",
    "choose_columns",
    "clear_columns",
    "classify_file",
    "clear_failed_file",
)
# Events that use the model for one note, which counts towards the rate limit. A file counts by its
# rows.
MODEL_EVENTS = (
    "predict",
    "explain",
    "compare_strengths",
    "compare_moved_strength",
    "compare_merged",
    "show_attention",
    "show_attention_layer",
    "show_attention_head",
)


class Join(BaseModel):
    """The fields of the request that triggers an event; other fields are ignored."""

    fn_index: int
    session_hash: str = Field(pattern="^[a-z0-9]{1,64}$")
    data: list


def add_page(app: FastAPI, blocks: gradio.Blocks, gradio_app: ASGIApp, storage: Storage) -> None:
    """Add the page's routes to an app. A browser can reach Gradio only through them.

    Args:
        app: The app that is served.
        blocks: The page.
        gradio_app: The ASGI app that Gradio made from the page.
        storage: The files of the visits.

    Raises:
        ValueError: This module has no check for an input of an open event.
    """
    events = open_events(blocks)
    sessions = Sessions(blocks)
    # Below a sub-path, the other applications of the same host do not get the cookie.
    cookie_path = urlsplit(blocks.root_path).path or "/"
    reading = CapacityLimiter(1)  # one upload at a time: they must not occupy all processors
    # Uploads of one address are queued among themselves, so that other addresses wait for at most
    # one of them.
    own_files: WeakValueDictionary[str, CapacityLimiter] = WeakValueDictionary()

    async def forward_plain(request: Request) -> Forward:
        path = request.scope["path"]
        if len(path) > MOST_PATH_CHARACTERS or not path.isprintable():
            raise HTTPException(404)
        cookie = None
        if path in FIRST_ROUTES and _known_visit(request) is None:
            cookie = _new_cookie(cookie_path, request.scope["scheme"])
        return Forward(gradio_app, cookie=cookie)

    async def join(request: Request) -> ASGIApp:
        visit = _visit(request)
        try:
            # Pydantic's own parser refuses half a surrogate pair, which clean_text replaces.
            received = Join.model_validate(json.loads(await request.body()))
        except (ValueError, RecursionError):  # ValidationError is a ValueError
            raise HTTPException(422, "Expected JSON with fn_index, session_hash, data.") from None
        event = events.get(received.fn_index)
        if event is None:
            raise HTTPException(404, "There is no such event.")
        if len(received.data) != len(event.inputs):
            raise HTTPException(422, f"Expected {len(event.inputs)} inputs.")

        def find_file(path: object) -> StoredFile | None:
            return storage.find(path, visit)

        data = [
            check_input(component, value, find_file)
            for component, value in zip(event.inputs, received.data, strict=True)
        ]
        session = _session(visit, received.session_hash)
        body = {"fn_index": received.fn_index, "session_hash": session, "data": data}
        forward = Forward(gradio_app, body=json.dumps(body).encode(), visit=visit)
        return sessions.join(session, network_of(request.client), forward)

    async def queue_data(request: Request) -> Forward:
        _refuse_head(request)
        session = _session(_visit(request), request.query_params.get("session_hash", ""))
        if session not in blocks._queue.pending_messages_per_session:
            raise HTTPException(404, "No event was triggered, or its result was already read.")
        return Forward(gradio_app, query={"session_hash": session})

    async def heartbeat(request: Request) -> ASGIApp:
        _refuse_head(request)
        session = _session(_visit(request), request.path_params["session"])
        return sessions.heartbeat(
            session, Forward(gradio_app, path=f"/gradio_api/heartbeat/{session}")
        )

    async def upload(request: Request) -> Response:
        owner = Owner(_visit(request), network_of(request.client))
        try:
            async with request.form(max_files=1, max_fields=0) as form:
                file = form.get("files")
                if not isinstance(file, UploadFile):
                    raise HTTPException(422, "Expected one file.")
                content = await file.read()
                name = file.filename or ""
        except UnicodeError:  # a form may choose any of Python's codecs as its charset
            raise HTTPException(422, "Expected a form in UTF-8.") from None
        own = own_files.setdefault(owner.address, CapacityLimiter(1))
        if own.statistics().tasks_waiting >= MOST_WAITING_UPLOADS:
            return PlainTextResponse("The service is busy: try again.", 503, RETRY_AFTER)
        try:
            async with own:
                if await request.is_disconnected():  # the file of a client that left is not read
                    return Response()
                async with reading:
                    if await request.is_disconnected():
                        return Response()
                    columns = await run_in_threadpool(check_in_subprocess, content)
        except FileError as error:  # plain text, since the page shows the response body unchanged
            return PlainTextResponse(str(error), 422)
        stored = await run_in_threadpool(storage.add, owner, name, content, columns)
        return JSONResponse([str(stored.path)])

    async def upload_progress(_request: Request) -> Response:
        # A file of this size is uploaded before a progress bar would be visible.
        return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    async def download(request: Request) -> Response:
        stored = storage.find(request.path_params["path"], _visit(request))
        if stored is None:
            raise HTTPException(404)
        # The guard's nosniff header keeps the browser from guessing another type.
        kind = "text/csv" if stored.columns is None else "application/octet-stream"
        return FileResponse(stored.path, media_type=kind, filename=stored.path.name)

    for path in PLAIN_ROUTES:
        app.add_route(path, forward_plain, methods=["GET"])
    app.add_route("/gradio_api/queue/join", join, methods=["POST"])
    app.add_route("/gradio_api/queue/data", queue_data, methods=["GET"])
    app.add_route("/gradio_api/heartbeat/{session}", heartbeat, methods=["GET"])
    app.add_route(UPLOAD_ROUTE, upload, methods=["POST"])
    app.add_route("/gradio_api/upload_progress", upload_progress, methods=["GET"])
    app.add_route("/gradio_api/file={path:path}", download, methods=["GET"])


def open_events(blocks: gradio.Blocks) -> dict[int, gradio.blocks.BlockFunction]:
    """Return the open events of a page by their numbers.

    Raises:
        ValueError: This module has no check for an input of an open event.
    """
    events = {number: fn for number, fn in blocks.fns.items() if fn.api_name in EVENTS}
    for event in events.values():
        for component in event.inputs:
            if type(component) not in CHECKS:
                raise ValueError(f"no check for the input {component} of {event.api_name}")
    return events


# --- checks of the inputs -----------------------------------------------------------------------

FindFile = Callable[[object], StoredFile | None]


class ExpectedError(ValueError):
    """The value of an input is not valid; the message says what was expected."""


def check_input(component: gradio.blocks.Block, value: object, find_file: FindFile) -> object:
    """Check the value of an input, and return it in the form that Gradio expects.

    Args:
        component: The component that the value is for.
        value: The received value, of any type.
        find_file: Returns the visit's file at a path, or None.

    Raises:
        HTTPException: 422; the detail says what was expected and does not repeat the value.
    """
    check = CHECKS[type(component)]
    try:
        return check(component, value, find_file)
    except ExpectedError as expected:
        label = getattr(component, "label", None) or "input"
        raise HTTPException(422, f"{label}: expected {expected}.") from None


def _check_text(_component: gradio.Textbox, value: object, _find: FindFile) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MOST_TEXT_CHARACTERS:
        raise ExpectedError(f"a text of at most {MOST_TEXT_CHARACTERS:,} characters")
    return value


def _check_boolean(_component: gradio.Checkbox, value: object, _find: FindFile) -> bool:
    if not isinstance(value, bool):
        raise ExpectedError("true or false")
    return value


def _check_number(component: gradio.Slider, value: object, _find: FindFile) -> float:
    low = component.minimum
    high = component.maximum
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and low <= value <= high:  # False for NaN
        return value
    raise ExpectedError(f"a number from {low:g} to {high:g}")


def _check_choice(
    component: gradio.Radio | gradio.Dropdown, value: object, _find: FindFile
) -> str | None:
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


def _check_dropdown(
    component: gradio.Dropdown, value: object, find: FindFile
) -> str | list[str] | None:
    """Check a choice of a fixed list, or names of columns if the list begins empty.

    The handler checks that the file has these columns.
    """
    if component.choices:
        return _check_choice(component, value, find)
    if value is None:
        return None
    if not component.multiselect:
        if not _is_name(value):
            raise ExpectedError("the name of a column")
        return value
    if not isinstance(value, list) or len(value) > MOST_COLUMNS or not all(map(_is_name, value)):
        raise ExpectedError("names of columns")
    if len(set(value)) < len(value):
        raise ExpectedError("each column once")
    return value


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MOST_NAME_CHARACTERS


def _choices(component: gradio.Radio | gradio.CheckboxGroup | gradio.Dropdown) -> list[str]:
    return [value for _name, value in component.choices]


def _check_file(_component: gradio.File, value: object, find: FindFile) -> dict | None:
    if value is None:
        return None
    stored = None
    if isinstance(value, dict):
        stored = find(value.get("path"))
    if stored is None or stored.columns is None:  # a result is no upload
        raise ExpectedError("a file that was uploaded here and is still kept")
    return {
        "path": str(stored.path),
        "orig_name": stored.path.name,
        "size": stored.size,
        "meta": {"_type": "gradio.FileData"},
    }


def _check_example(component: gradio.Dataset, value: object, _find: FindFile) -> int:
    is_number = type(value) is int  # isinstance would accept True
    if is_number and 0 <= value < len(component.samples):
        return value
    raise ExpectedError("the number of an example")


def _ignore_state(_component: gradio.State, _value: object, _find: FindFile) -> None:
    return None  # the state is kept on the server, so the browser's value is ignored


CHECKS = {
    gradio.Textbox: _check_text,
    gradio.Checkbox: _check_boolean,
    gradio.Slider: _check_number,
    gradio.Radio: _check_choice,
    gradio.CheckboxGroup: _check_choices,
    gradio.Dropdown: _check_dropdown,
    gradio.File: _check_file,
    gradio.Dataset: _check_example,
    gradio.State: _ignore_state,
}


# --- visits and requests ------------------------------------------------------------------------


def _known_visit(request: Request) -> str | None:
    found = VISIT_PATTERN.search(request.headers.get("cookie", ""))
    if found is None:
        return None
    return found[1]


def _new_cookie(path: str, scheme: str) -> str:
    """Return the Set-Cookie header that starts a visit."""
    # Not Strict: a browser that follows a link from another site would then send no cookie, and the
    # new cookie in the response would end the visit in another tab.
    visit = secrets.token_urlsafe(16)
    cookie = f"{VISIT_COOKIE}={visit}; HttpOnly; SameSite=Lax; Path={path}"
    if scheme == "https":
        cookie += "; Secure"
    return cookie


def _visit(request: Request) -> str:
    visit = _known_visit(request)
    if visit is None:
        raise HTTPException(403, "Open the page first, and allow its cookie.")
    return visit


def _refuse_head(request: Request) -> None:
    """Refuse a HEAD request for a stream: a stream has no end, and reading it changes it."""
    if request.method == "HEAD":
        raise HTTPException(405, headers={"Allow": "GET"})


def _session(visit: str, name: str) -> str:
    """Return the session hash under which Gradio keeps a visit's events."""
    return hashlib.sha256(f"{visit} {name}".encode()).hexdigest()


class Forward:
    """An ASGI response: sends Gradio a new request and passes on its answer.

    The new request keeps the method, and the path unless another is given. It keeps neither the
    query nor the body, the cookies and the password. Most of Gradio's routes do not know HEAD, so
    it becomes GET; the server leaves out the body of the answer.
    """

    def __init__(
        self,
        gradio_app: ASGIApp,
        *,
        path: str | None = None,
        query: dict[str, str] | None = None,
        body: bytes = b"",
        cookie: str | None = None,
        visit: str | None = None,
    ) -> None:
        self.gradio_app = gradio_app
        self.path = path
        self.query = b"" if query is None else urlencode(query).encode()
        self.body = body
        self.cookie = cookie
        self.visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = dict(scope, query_string=self.query, path_params={})
        scope[VISIT_IN_SCOPE] = self.visit  # for the owner of the files that a handler makes
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
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
            if unread:
                return unread.pop()
            return await receive()

        async def send_with_cookie(message: Message) -> None:
            if self.cookie is not None and message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("set-cookie", self.cookie)
            await send(message)

        await self.gradio_app(scope, receive_new, send_with_cookie)
