"""What the page's events share: checks, waiting for the model, and errors in words.

Every handler checks its inputs on the server, since a browser's checks can be bypassed. When a
handler fails, the page shows a reference to the log, since an error's message may quote the note.
"""

import functools
import html
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

import gradio as gr
from gradio.components.plot import PlotData
from gradio.context import LocalContext
from matplotlib.figure import Figure

from clinora.notes import clean_text, has_visible
from clinora.serving import report_error
from clinora.serving.api import REQUEST_SECONDS, note_error
from clinora.serving.batcher import BusyError
from clinora.serving.pictures import data_url
from clinora.serving.proxy import network_of

# Options of an event that draws: one picture at a time, for all visitors together, so that drawing
# does not slow down the server's other threads.
DRAWING = {"concurrency_limit": 1, "concurrency_id": "drawing"}
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


def message(text: str) -> gr.Error:
    """Create an error whose text the page shows literally; Gradio shows messages as HTML."""
    return gr.Error(html.escape(text, quote=False), print_exception=False)


def with_error_messages(handler: Callable) -> Callable:
    """Wrap a handler, which may be a generator, so that the page shows a message for each error.

    The message does not contain the error's text.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def guarded_steps(*arguments: object) -> Iterator[object]:
            with _errors_as_messages():
                yield from handler(*arguments)

        return guarded_steps

    @functools.wraps(handler)
    def guarded(*arguments: object) -> object:
        with _errors_as_messages():
            return handler(*arguments)

    return guarded


@contextmanager
def _errors_as_messages() -> Iterator[None]:
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


@dataclass(frozen=True, slots=True)
class Filling:
    """Components, and the function that gives their first values in the same order."""

    outputs: Sequence[gr.components.Component]
    values: Callable[[], Sequence]


def fill_when_opened(tab: gr.Tab, fillings: Sequence[Filling], api_name: str) -> None:
    """Fill components when a visitor opens a tab for the first time.

    The values are computed once for all visitors, when the first of them opens the tab, so that a
    slow computation does not delay the start.

    Args:
        tab: The tab.
        fillings: What to fill. All of it is one event, because the browser may lose one of several
            events that start together.
        api_name: The name of the event.
    """
    outputs = [output for filling in fillings for output in filling.outputs]
    is_filled = gr.State(False)

    @functools.cache
    def first_values() -> list:
        return [value for filling in fillings for value in filling.values()]

    def fill(filled: bool) -> tuple:
        if filled:  # a visitor may have changed them meanwhile
            return True, *(gr.skip() for _ in outputs)
        return True, *first_values()

    # Only one visitor at a time, so that the values are not computed several times at once.
    tab.select(
        with_error_messages(fill), is_filled, [is_filled, *outputs], concurrency_limit=1,
        api_name=api_name,
    )  # fmt: skip


def plot_of(picture: str) -> PlotData:
    """Return what gr.Plot shows for a picture, given as a data URL."""
    return PlotData(type="matplotlib", plot=picture)


def draw(figure: Figure) -> PlotData:
    """Draw a figure and return what gr.Plot shows."""
    return plot_of(data_url(figure))
