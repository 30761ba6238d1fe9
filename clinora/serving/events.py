"""What the page's events share: checks, waiting for the model, and errors in words.

Every handler checks its inputs on the server, since a browser's checks can be bypassed. When a
handler fails, the page shows a reference to the log, since an error's message may quote the note.
"""

import functools
import html
import inspect
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

import gradio as gr
from gradio.context import LocalContext

from clinora.classifier import Prediction
from clinora.notes import clean_text, has_visible
from clinora.serving import report_error
from clinora.serving.activity import ACTIVITY, CLIENT_CLOSED, Activity
from clinora.serving.api import REQUEST_SECONDS, note_error
from clinora.serving.batcher import BusyError
from clinora.serving.gate import MODEL_EVENTS, VISIT_IN_SCOPE
from clinora.serving.observer import Observer
from clinora.serving.proxy import network_of
from clinora.serving.rate_limit import RateLimitError
from clinora.serving.storage import Owner

REFUSED = 422  # status of an event that ends with a message to its visitor
POLL_SECONDS = 0.2  # between checks whether the visitor is still connected
EVENT = "clinora.event"  # key of an event's activity in the ASGI scope of its request


def checked_note(note: str | None) -> str:
    """Return the cleaned note, or raise the message that the page shows if it has none."""
    note = clean_text(note or "")
    if not has_visible(note):
        raise message("Enter a clinical note first.")
    error = note_error(note)
    if error is not None:
        raise message(f"{error} Enter a part of it.")
    return note


class VisitorGoneError(Exception):
    """The visitor has closed the page or the connection."""


def wait_for(future: Future) -> object:
    """Wait for the result of a note or job. After a timeout or a disconnect, cancel it.

    Raises:
        TimeoutError: ``REQUEST_SECONDS`` have passed.
        VisitorGoneError: The visitor has closed the page or the connection.
    """
    end = time.monotonic() + REQUEST_SECONDS
    try:
        while not future.done() and time.monotonic() < end:
            check_visitor()
            wait([future], POLL_SECONDS)
        return future.result(0)
    finally:
        future.cancel()


def client_of_event() -> str:
    """Return the client whose event the current handler processes, or "" outside a request."""
    request = LocalContext.request.get(None)
    if request is None:
        return ""
    return network_of(request.client)


def owner_of_event() -> Owner:
    """Return the owner of the files that the current handler makes: the visit of its event."""
    request = LocalContext.request.get()
    return Owner(request.request.scope[VISIT_IN_SCOPE], client_of_event())


def visitor_is_gone() -> bool:
    """Return whether the visitor has closed the connection that waits for the current event.

    Gradio then marks the event, but has no public name for the mark.
    """
    queue = LocalContext.blocks.get()._queue
    event = queue.event_ids_to_events.get(LocalContext.event_id.get())
    return event is not None and not event.alive


def check_visitor() -> None:
    """Raise VisitorGoneError if the visitor has closed the page or the connection."""
    if visitor_is_gone():
        raise VisitorGoneError


def session_of_event() -> str:
    """Return the session, one page in one browser, whose event the current handler processes."""
    return LocalContext.request.get().session_hash


def message(text: str, status: int = REFUSED) -> gr.Error:
    """Create an error whose text the page shows literally; Gradio shows messages as HTML.

    Args:
        text: The text.
        status: The HTTP status that the API would have, for the log.
    """
    error = gr.Error(html.escape(text, quote=False), print_exception=False)
    error.status = status
    return error


@contextmanager
def error_messages() -> Iterator[None]:
    """Turn each error into a message for the page, without the error's text."""
    try:
        yield
    except gr.Error:
        raise
    except (BusyError, TimeoutError):
        raise message("The service is busy: try again in a moment.", 503) from None
    except VisitorGoneError:
        raise message("The page was closed.", CLIENT_CLOSED) from None
    except Exception as error:
        raise message(f"This did not work; reference {report_error(error)}.", 500) from None


def with_error_messages(handler: Callable) -> Callable:
    """Wrap a handler, a function or a generator, so that the page shows ``error_messages``."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def guarded(*arguments: object) -> Iterator:
            with error_messages():
                yield from handler(*arguments)

    else:

        @functools.wraps(handler)
        def guarded(*arguments: object) -> object:
            with error_messages():
                return handler(*arguments)

    return guarded


# --- the log, the metrics and the rate limit ------------------------------------------------------


def observe_events(blocks: gr.Blocks, observer: Observer) -> None:
    """Wrap the handlers of a page so that each event has its line in the log."""
    for event in blocks.fns.values():
        if event.fn is not None:  # otherwise the event runs in the browser alone
            event.fn = _observed(event.api_name, event.fn, observer)


def admit_notes(notes: int) -> None:
    """Record how many notes the current event is about to classify.

    Raises:
        gr.Error: The user has sent too many notes.
    """
    try:
        _activity().admit(notes)
    except RateLimitError as error:
        raise message(str(error), 429) from None


def count_prediction(prediction: Prediction) -> None:
    """Record the prediction that the current event gives for a note."""
    if LocalContext.request.get(None) is not None:  # inside an event
        _activity().add(prediction)


def _observed(name: str, handler: Callable, observer: Observer) -> Callable:
    @contextmanager
    def observing() -> Iterator[None]:
        scope = LocalContext.request.get().request.scope
        activity = scope[ACTIVITY].begin_event(name)
        scope[EVENT] = activity
        try:
            if name in MODEL_EVENTS:
                admit_notes(1)
            yield
            activity.status = 200
        except gr.Error as error:
            activity.status = getattr(error, "status", REFUSED)
            raise
        except Exception:
            activity.status = 500
            raise
        finally:
            observer.end(activity)

    @functools.wraps(handler)
    def run(*arguments: object) -> object:
        with observing():
            return handler(*arguments)

    @functools.wraps(handler)
    def run_in_steps(*arguments: object) -> Iterator[object]:
        with observing():
            yield from handler(*arguments)

    return run_in_steps if inspect.isgeneratorfunction(handler) else run


def _activity() -> Activity:
    """Return the activity of the event that the current handler processes."""
    return LocalContext.request.get().request.scope[EVENT]
