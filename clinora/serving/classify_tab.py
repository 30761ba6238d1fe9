"""The page's first tab: one note, its answer, the explanation, flags, and the last notes."""

import threading
from collections.abc import Callable, Iterable, Iterator

import gradio as gr

from clinora.classifier import Prediction
from clinora.explain import effects, parts_of, variants
from clinora.notes import clean_text
from clinora.serving.answer import (
    STALE,
    WAITING,
    answer_card,
    exact_numbers,
    explanation_html,
    unread_banner,
)
from clinora.serving.batcher import Batcher, BusyError
from clinora.serving.events import (
    checked_note,
    client_of_event,
    error_messages,
    message,
    owner_of_event,
    wait_for,
    with_error_messages,
)
from clinora.serving.flags import Flags, FlagsFullError
from clinora.serving.history import Entry, History, history_csv, history_html
from clinora.serving.storage import Storage
from clinora.serving.words import Words

REASONS = ("The class is wrong", "The confidence is wrong", "The highlights mislead", "Other")
# With at most this many parameters, each answer is explained without being asked. An explanation
# classifies a note several dozen times: the bundled base (8 million parameters) takes seconds for
# it, a larger one minutes.
MOST_PARAMETERS = 20_000_000
# At once; more would occupy the handlers that other visitors' notes need.
MOST_EXPLANATIONS = 8
HISTORY_FILE = "last-notes.csv"


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
        self._explaining = threading.BoundedSemaphore(MOST_EXPLANATIONS)

    def predict(self, note: str | None, history: History) -> Iterator[tuple]:
        """Yield the answer, then its explanation, unless the page shows another answer by then.

        One event does both: the browser loses a second one that starts as the first one ends.
        """
        note = checked_note(note)
        prediction = wait_for(self.batcher.submit([note], client=client_of_event())[0])
        entry = Entry.of(note, prediction)
        history.add(entry)
        answer = self._answer(note, prediction, history)
        if not self.explains_itself:
            yield *answer, "", gr.update(visible=True)
            return
        yield *answer, "The explanation is being computed.", gr.update(visible=False)
        try:
            with error_messages():
                explanation = self._explanation(note, entry, history)
        except gr.Error as error:
            explanation = f"No explanation: {error.message}"
            button = gr.update(visible=True)
        else:
            button = gr.skip()
        unchanged = [gr.skip() for _ in answer]
        if history.shown is entry:
            yield *unchanged, explanation, button
        else:
            yield *unchanged, gr.skip(), gr.skip()

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
        for answer in self.predict(cleared, history):
            yield *restored, *answer
            restored = (gr.skip(), gr.skip(), gr.skip())  # the note may have changed since

    def no_answer(self) -> tuple:
        """Return the outputs without an answer, in the order of ``predict``."""
        return WAITING, None, None, None, "", gr.skip(), "", gr.update(visible=False)

    def _answer(self, note: str, prediction: Prediction, history: History) -> tuple:
        unread = unread_banner(note, "".join(parts_of(self.classifier, note)))
        labels = self.classifier.labels
        return (
            answer_card(prediction, self.classifier, self.words, unread),
            prediction.as_json(),
            prediction.as_text(),
            dict(zip(labels, prediction.probabilities, strict=True)),
            exact_numbers(prediction, self.classifier),
            history_html(history, labels),
        )

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
        if not self._explaining.acquire(blocking=False):
            raise BusyError
        futures = []
        try:
            parts = parts_of(self.classifier, note)
            futures = self.batcher.submit(variants(parts), client=client_of_event())
            predictions = []
            for future in progress(futures):
                if history.shown is not entry:
                    return None
                predictions.append(wait_for(future))
        finally:
            self._explaining.release()
            for future in futures:
                future.cancel()
        unread = note[len("".join(parts)) :]
        return explanation_html(effects(parts, predictions), unread, entry.prediction.label)


def classify_tab(batcher: Batcher, flags: Flags, storage: Storage, words: Words) -> None:
    """Add the tab's contents to the page that is being built."""
    labels = batcher.classifier.labels
    answers = Answers(batcher, words)

    def clear(note: str | None, history: History) -> tuple:
        history.clear_answer()
        return note, gr.update(visible=True), None, False, None, *answers.no_answer()

    def clear_failed(history: History) -> tuple:
        history.clear_answer()
        return answers.no_answer()

    def flag(note: str | None, history: History, consent: bool, reason: str | None) -> None:
        if history.shown is None:
            raise message("There is no prediction to flag: submit a note first.")
        if reason not in REASONS:
            raise message("Choose a reason first.")
        record = history.shown.as_record() | {"reason": reason}
        if consent is True:
            note = clean_text(note or "")
            if not history.shown.is_of(note):
                raise message("The note has changed since its prediction: submit it again.")
            record["note"] = note
        try:
            flags.add(record)
        except FlagsFullError:
            raise message("The file of flags is full: move it away.") from None
        with_or_without = "with" if consent is True else "without"
        gr.Info(f"The prediction was flagged, {with_or_without} the note's text.")

    def download(history: History) -> str:
        if not history.entries:
            raise message("There is no note to download: submit a note first.")
        content = history_csv(history, labels)
        return str(storage.add(owner_of_event(), HISTORY_FILE, content).path)

    history = gr.State(History())
    cleared = gr.Textbox(visible=False)  # the note before it was cleared; it stays in the browser
    with gr.Row(elem_classes="note-and-answer"):
        with gr.Column():
            note = gr.Textbox(
                label=words.note, lines=8, max_lines=20, elem_id="note",
                placeholder="Type or paste a note. Ctrl+Enter submits it.",
            )  # fmt: skip
            with gr.Row():
                submit = gr.Button("Submit", variant="primary", min_width=120, elem_id="submit")
                clear_button = gr.Button("Clear", min_width=120)
                undo = gr.Button("Undo", visible=False, min_width=120, elem_id="undo")
            if words.examples:
                examples = gr.Dataset(
                    components=[note], samples=[[example] for example in words.examples],
                    type="index", label="Examples", elem_id="examples",
                )  # fmt: skip
                examples.click(
                    lambda number: words.examples[number], examples, note,
                    api_name="choose_example",
                )  # fmt: skip
        with gr.Column(elem_classes="answer"):
            card = gr.Markdown(WAITING, latex_delimiters=[], elem_id="card")
            as_json = gr.JSON(label="Predicted Classification in JSON Format")
            as_text = gr.Textbox(label="Prediction in text", interactive=False)
            with gr.Accordion("Probabilities", open=False):
                shares = gr.Label(label="Uncalibrated probabilities", num_top_classes=len(labels))
                numbers = gr.Markdown(elem_classes="small")
        with gr.Column(elem_classes="whole-row answer"):
            explanation = gr.Markdown(latex_delimiters=[], elem_id="explanation")
            explain = gr.Button("Explain this answer", visible=False)
    reason = gr.Radio(REASONS, label="Why flag this prediction?")
    consent = gr.Checkbox(False, label="I may store this note's text: keep it with the flag")
    flag_button = gr.Button("Flag")
    with gr.Accordion("The last ten notes of this visit", open=False):
        gr.Markdown(
            "The server keeps the beginnings of these notes in its memory, for you alone, and "
            "forgets them five minutes after you close the page. The CSV file holds the same "
            "texts; the server deletes it after at most 35 minutes.",
            elem_classes="small",
        )
        last_notes = gr.Markdown(history_html(History(), labels), latex_delimiters=[])
        download_button = gr.Button("Make a CSV file")
        file = gr.File(label="The last notes (CSV)", interactive=False)

    outputs = [card, as_json, as_text, shares, numbers, last_notes, explanation, explain]
    # With "multiple", a note can be submitted while the one before is still being explained.
    predicted = submit.click(
        with_error_messages(answers.predict), [note, history], outputs,
        trigger_mode="multiple", show_progress_on=card, api_name="predict",
    )  # fmt: skip
    predicted.failure(clear_failed, history, outputs, api_name="clear_failed_prediction")
    explain.click(
        with_error_messages(answers.explain), [note, history], explanation, api_name="explain"
    )
    # Not gr.ClearButton: it evaluates a string as a script, which the security policy forbids.
    clear_button.click(
        with_error_messages(clear), [note, history],
        [cleared, undo, reason, consent, note, *outputs], api_name="clear",
    )  # fmt: skip
    undo.click(
        with_error_messages(answers.undo), [cleared, history], [note, cleared, undo, *outputs],
        api_name="undo_clear",
    )  # fmt: skip
    flag_button.click(
        with_error_messages(flag), [note, history, consent, reason], None, api_name="flag"
    )
    download_button.click(
        with_error_messages(download), history, file, api_name="download_last_notes"
    )
