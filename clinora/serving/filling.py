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

# Options of the events that change what a filling fills: one after the other, in the order in which
# they were started. So an answer that a visitor asks for stays, even if the filling ends late.
IN_ORDER = {"concurrency_id": "filling", "concurrency_limit": 1}


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

    # In order means also one visitor at a time: the values are not computed several times at once.
    tab.select(
        with_error_messages(fill), is_filled, [is_filled, *outputs], api_name=api_name, **IN_ORDER
    )


def plot_of(picture: str) -> PlotData:
    """Return what gr.Plot shows for a picture, given as a data URL."""
    return PlotData(type="matplotlib", plot=picture)


def draw(figure: Figure) -> PlotData:
    """Draw a figure and return what gr.Plot shows."""
    with _drawing:
        return plot_of(data_url(figure))
