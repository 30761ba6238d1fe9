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

from clinora.notes import clean_text, has_visible
from clinora.serving import report_error
from clinora.serving.api import REQUEST_SECONDS, note_error
from clinora.serving.batcher import BusyError
from clinora.serving.proxy import network_of
from clinora.serving.storage import Owner

VISIT_IN_SCOPE = "clinora.visit"  # the key of an event's visit in the scope of its request
POLL_SECONDS = 0.2  # between checks whether the visitor is still connected


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
            if visitor_is_gone():
                raise VisitorGoneError
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


def message(text: str) -> gr.Error:
    """Create an error whose text the page shows literally; Gradio shows messages as HTML."""
    return gr.Error(html.escape(text, quote=False), print_exception=False)


@contextmanager
def error_messages() -> Iterator[None]:
    """Turn each error into a message for the page, without the error's text."""
    try:
        yield
    except gr.Error:
        raise
    except (BusyError, TimeoutError):
        raise message("The service is busy: try again in a moment.") from None
    except VisitorGoneError:
        raise message("The page was closed.") from None
    except Exception as error:
        raise message(f"This did not work; reference {report_error(error)}.") from None


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
