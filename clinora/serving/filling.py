"""Fills a tab's components when a visitor opens it, and draws the figures that they show."""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.components.plot import PlotData
from matplotlib.figure import Figure

from clinora.serving.events import with_error_messages
from clinora.serving.pictures import data_url

# One picture at a time, for all visitors together, so that drawing does not slow down the server's
# other threads.
_drawing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Filling:
    """Components, and the function that gives their first values in the same order."""

    outputs: Sequence[gr.components.Component]
    values: Callable[[], Sequence]


def fill_when_opened(
    tab: gr.Tab, fillings: Sequence[Filling], filled: gr.State, api_name: str
) -> None:
    """Fill components when a visitor opens a tab for the first time.

    The values are computed once for all visitors, when the first of them opens the tab, so that a
    slow computation does not delay the start. What a visitor asks for meanwhile stays: see
    ``fills``.

    Args:
        tab: The tab.
        fillings: What to fill. All of it is one event, because the browser may lose one of several
            events that start together.
        filled: The state of a visit that holds the numbers of its filled components, a set.
        api_name: The name of the event.
    """
    outputs = [output for filling in fillings for output in filling.outputs]

    @functools.cache
    def first_values() -> list:
        return [value for filling in fillings for value in filling.values()]

    def fill(filled: set[int]) -> list:
        values = first_values()
        shown = [
            gr.skip() if output._id in filled else value
            for output, value in zip(outputs, values, strict=True)
        ]
        filled.update(output._id for output in outputs)
        return shown

    # Only one visitor at a time, so that the values are not computed several times at once.
    tab.select(with_error_messages(fill), filled, outputs, concurrency_limit=1, api_name=api_name)


def fills(outputs: Sequence[gr.components.Component], handler: Callable) -> Callable:
    """Wrap a handler so that its outputs stay as they are if the filling ends after it has begun.

    Args:
        outputs: The event's outputs.
        handler: The handler. The wrapped one has one more input, the state ``filled``.
    """

    def run(*arguments: object) -> object:
        *inputs, filled = arguments
        added = {output._id for output in outputs} - filled
        filled |= added
        try:
            return handler(*inputs)
        except BaseException:
            filled -= added  # it has no answer: the filling may fill them
            raise

    return with_error_messages(run)


def plot_of(picture: str) -> PlotData:
    """Return what gr.Plot shows for a picture, given as a data URL."""
    return PlotData(type="matplotlib", plot=picture)


def draw(figure: Figure) -> PlotData:
    """Draw a figure and return what gr.Plot shows."""
    with _drawing:
        return plot_of(data_url(figure))
