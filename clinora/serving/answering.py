"""Answers the notes of the page's first tab: the prediction, its explanation, Clear and Undo."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import gradio as gr

from clinora.explain import effects, parts_of, variants
from clinora.notes import clean_text, ordinary_case
from clinora.serving import report_error
from clinora.serving.answer import (
    STALE,
    WAITING,
    answer_card,
    exact_numbers,
    explanation_html,
    fingerprint,
    unread_banner,
)
from clinora.serving.api import REQUEST_SECONDS
from clinora.serving.batcher import Batcher, BusyError
from clinora.serving.events import (
    checked_note,
    client_of_event,
    count_prediction,
    error_messages,
    message,
    wait_for,
)
from clinora.serving.history import Entry, History, history_html
from clinora.serving.words import Words

# With at most this many parameters, each answer is explained without being asked. The bundled base
# has 8 million. An explanation classifies a note about as often as it has parts (``MOST_PARTS``),
# which takes long with a larger base.
MOST_PARAMETERS = 20_000_000
# At once; more would occupy the handlers that other visitors' notes need.
MOST_EXPLANATIONS = 8
MOST_OF_A_CLIENT = 2


class Answers:
    """The handlers of the tab's events that need the model.

    Args:
        batcher: Runs the model for all visitors.
        words: The page's words about the run.
    """

    def __init__(self, batcher: Batcher, words: Words) -> None:
        self.batcher = batcher
        self.classifier = batcher.classifier
        self.words = words
        model = self.classifier.model
        self.explains_itself = sum(p.numel() for p in model.parameters()) <= MOST_PARAMETERS
        self._explaining: Counter[str] = Counter()  # explanations being computed, by client
        self._lock = threading.Lock()  # of this counter

    def predict(self, note: str | None, history: History) -> Iterator[tuple]:
        """Yield the answer, then its explanation, unless the page shows another answer by then.

        One event does both: the browser loses a second one that starts as the first one ends.
        """
        history.turn += 1
        turn = history.turn
        text = checked_note(note)
        try:
            prediction = wait_for(self.batcher.submit([text], client=client_of_event())[0])
        except Exception as error:
            if turn == history.turn:
                raise
            report_error(error)  # the page waits for the answer to another note
            yield _no_change(8)
            return
        count_prediction(prediction)
        if turn < history.turn:  # the page was cleared, or waits for the answer to another note
            yield _no_change(8)
            return
        entry = Entry.of(text, prediction)
        history.add(entry)
        yield from self._show(note, text, entry, history)

    def _show(self, note: str, text: str, entry: Entry, history: History) -> Iterator[tuple]:
        """Yield an answer, then its explanation, unless the page shows another answer by then.

        Args:
            note: The note as the page has it.
            text: The cleaned note.
            entry: The note's entry in the history.
            history: The visit's notes.
        """
        prediction = entry.prediction
        unread = unread_banner(text, "".join(parts_of(self.classifier, text)))
        labels = self.classifier.labels
        answer = (
            answer_card(
                prediction,
                self.classifier,
                self.words,
                fingerprint(note),
                in_capitals=ordinary_case(text) != text,
                unread=unread,
            ),
            prediction.as_json(),
            prediction.as_text(),
            dict(zip(labels, prediction.probabilities, strict=True)),
            exact_numbers(prediction, self.classifier),
            history_html(history, labels),
        )
        if not self.explains_itself:
            yield *answer, "", gr.update(visible=True)
            return
        yield *answer, "The explanation is being computed.", gr.update(visible=False)
        try:
            with error_messages():
                explanation = self._explanation(text, entry, history)
        except gr.Error as error:
            explanation = f"No explanation: {error.message}"
            button = gr.update(visible=True)
        else:
            button = gr.skip()
        if history.shown is entry:
            # What the reader has opened in a text stays open. The JSON and the probabilities are
            # repeated: Gradio writes the difference of two such values into the value on the page.
            kept = [value if isinstance(value, dict) else gr.skip() for value in answer]
            yield *kept, explanation, button
        else:
            yield _no_change(8)

    def explain(
        self,
        note: str | None,
        history: History,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:
        """Return the explanation of the answer that the page shows."""
        note = checked_note(note)
        if history.shown is None:
            raise message("There is no answer to explain: submit a note first.")
        if not history.shown.is_of(note):
            raise message(STALE)
        explanation = self._explanation(note, history.shown, history, progress.tqdm)
        if explanation is None:
            raise message(STALE)
        return explanation

    def undo(self, cleared: str | None, history: History) -> Iterator[tuple]:
        """Yield the note that was cleared, and its answer if the page showed one for this text."""
        restored = (cleared, None, gr.update(visible=False))
        if history.cleared is None or not history.cleared.is_of(clean_text(cleared or "")):
            yield *restored, *self.no_answer()
            return
        history.turn += 1
        history.add(history.cleared)
        for answer in self._show(cleared, clean_text(cleared), history.cleared, history):
            yield *restored, *answer
            restored = _no_change(3)  # the note may have changed since

    def clear(self, note: str | None, history: History) -> tuple:
        """Empty the page, and keep the note for ``undo``."""
        kept = (gr.skip(), gr.skip())
        if note:
            history.cleared = history.shown
            kept = (note, gr.update(visible=True))
        history.shown = None
        history.turn += 1
        return None, *kept, None, False, *self.no_answer()

    def fail(self, history: History) -> tuple:
        """Remove the answer to the note before, after a note that has no answer."""
        history.shown = None
        return self.no_answer()

    def no_answer(self) -> tuple:
        """Return the outputs without an answer, in the order of ``predict``."""
        return WAITING, None, None, None, "", gr.skip(), "", gr.update(visible=False)

    def _explanation(
        self,
        note: str,
        entry: Entry,
        history: History,
        progress: Callable[[list], Iterable] = iter,
    ) -> str | None:
        """Explain an answer; give up, with None, when the page shows it no longer.

        Raises:
            BusyError: Too many answers are being explained, or the batcher's queue is full.
        """
        futures = []
        with self._one_explanation(client_of_event()):
            end = time.monotonic() + REQUEST_SECONDS
            try:
                parts = parts_of(self.classifier, note)
                futures = self.batcher.submit(variants(parts), client=client_of_event())
                predictions = []
                for future in progress(futures):
                    if history.shown is not entry:
                        return None
                    if time.monotonic() > end:
                        raise TimeoutError
                    predictions.append(wait_for(future))
            finally:
                for future in futures:
                    future.cancel()
        unread = note[len("".join(parts)) :]
        explained = effects(parts, predictions, entry.prediction.index)
        return explanation_html(explained, unread, entry.prediction.label)

    @contextmanager
    def _one_explanation(self, client: str) -> Iterator[None]:
        """Count a client's explanation while it is computed.

        Raises:
            BusyError: Too many are being computed, of this client or of all.
        """
        with self._lock:
            own = self._explaining[client]
            if own >= MOST_OF_A_CLIENT or self._explaining.total() >= MOST_EXPLANATIONS:
                raise BusyError
            self._explaining[client] += 1
        try:
            yield
        finally:
            with self._lock:
                self._explaining[client] -= 1
                if self._explaining[client] == 0:
                    del self._explaining[client]


def _no_change(outputs: int) -> tuple:
    """Return updates that change nothing, new each time, because Gradio changes them."""
    return tuple(gr.skip() for _ in range(outputs))
