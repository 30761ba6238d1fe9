"""The page's first tab: one note, its answer, the explanation, flags, and the last notes."""

from collections.abc import Sequence

import gradio as gr

from clinora.notes import clean_text
from clinora.serving.answer import WAITING
from clinora.serving.answering import Answers
from clinora.serving.batcher import Batcher
from clinora.serving.events import message, owner_of_event, with_error_messages
from clinora.serving.flags import Flags, FlagsFullError
from clinora.serving.history import History, history_csv, history_html
from clinora.serving.storage import Storage
from clinora.serving.words import Words

REASONS = ("The class is wrong", "The confidence is wrong", "The highlights mislead", "Other")
HISTORY_FILE = "last-notes.csv"


def classify_tab(batcher: Batcher, flags: Flags, storage: Storage, words: Words) -> None:
    """Add the tab's contents to the page that is being built."""
    labels = batcher.classifier.labels
    answers = Answers(batcher, words)
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
                clear = gr.Button("Clear", min_width=120)
                undo = gr.Button("Undo", visible=False, min_width=120, elem_id="undo")
            if words.examples:
                _examples(note, words.examples)
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
    reason, consent = _flag_form(note, history, flags)
    last_notes = _last_notes(history, storage, labels)

    outputs = [card, as_json, as_text, shares, numbers, last_notes, explanation, explain]
    # With "multiple", a note can be submitted while the one before is still being explained.
    predicted = submit.click(
        with_error_messages(answers.predict), [note, history], outputs,
        trigger_mode="multiple", show_progress_on=card, api_name="predict",
    )  # fmt: skip
    predicted.failure(answers.fail, history, outputs, api_name="clear_failed_prediction")
    explain.click(
        with_error_messages(answers.explain), [note, history], explanation, api_name="explain"
    )
    # Not gr.ClearButton: it evaluates a string as a script, which the security policy forbids.
    clear.click(
        with_error_messages(answers.clear), [note, history],
        [note, cleared, undo, reason, consent, *outputs], api_name="clear",
    )  # fmt: skip
    undo.click(
        with_error_messages(answers.undo), [cleared, history], [note, cleared, undo, *outputs],
        api_name="undo_clear",
    )  # fmt: skip


def _examples(note: gr.Textbox, examples: Sequence[str]) -> None:
    """Add examples; a click puts one into the note's box."""
    choices = gr.Dataset(
        components=[note], samples=[[example] for example in examples], type="index",
        label="Examples", elem_id="examples",
    )  # fmt: skip
    choices.click(lambda number: examples[number], choices, note, api_name="choose_example")


def _flag_form(note: gr.Textbox, history: gr.State, flags: Flags) -> tuple[gr.Radio, gr.Checkbox]:
    """Add the form that flags the answer that is shown; return its inputs."""

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
        words = "with" if consent is True else "without"
        gr.Info(f"The prediction was flagged, {words} the note's text.")

    reason = gr.Radio(REASONS, label="Why flag this prediction?")
    consent = gr.Checkbox(False, label="I may store this note's text: keep it with the flag")
    button = gr.Button("Flag")
    button.click(with_error_messages(flag), [note, history, consent, reason], None, api_name="flag")
    return reason, consent


def _last_notes(history: gr.State, storage: Storage, labels: Sequence[str]) -> gr.Markdown:
    """Add the last notes, side by side, and their file; return where they are shown."""

    def make_file(history: History) -> str:
        if not history.entries:
            raise message("There is no note to download: submit a note first.")
        content = history_csv(history, labels)
        return str(storage.add(owner_of_event(), HISTORY_FILE, content).path)

    with gr.Accordion("The last ten notes of this visit", open=False):
        gr.Markdown(
            "The server keeps the beginnings of these notes in its memory, for you alone, and "
            "forgets them five minutes after you close the page. The CSV file holds the same "
            "texts; the server deletes it after at most 35 minutes. The percentages are "
            "uncalibrated probabilities.",
            elem_classes="small",
        )
        last_notes = gr.Markdown(history_html(History(), labels), latex_delimiters=[])
        button = gr.Button("Make a CSV file")
        file = gr.File(label="The last notes (CSV)", interactive=False)
    button.click(with_error_messages(make_file), history, file, api_name="download_last_notes")
    return last_notes
