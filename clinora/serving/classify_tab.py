"""The page's first tab: one note, its prediction, its explanation, and flags."""

import gradio as gr

from clinora.classifier import Classifier, Prediction
from clinora.explain import Part, leave_one_out
from clinora.notes import Note, clean_text
from clinora.serving.batcher import Batcher
from clinora.serving.events import (
    checked_note,
    client_of_event,
    message,
    wait_for,
    with_error_messages,
)
from clinora.serving.flags import Flags, FlagsFullError

REASONS = ("The class is wrong", "The confidence is wrong", "The highlights mislead", "Other")

# The published example, then three fictional notes: Orthopedic, Radiology and Surgery.
EXAMPLES = [
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction.",
    "Left knee pain and swelling after a twisting injury while skiing. Positive Lachman test, "
    "full range of motion. Suspected anterior cruciate ligament tear; brace and crutches given.",
    "CT of the abdomen and pelvis with contrast. The liver, spleen and kidneys are unremarkable. "
    "No free fluid or lymphadenopathy. Impression: no acute abnormality.",
    "The patient was placed under general anesthesia, prepped and draped. The inflamed appendix "
    "was divided with a stapler and removed. The incisions were closed; blood loss was minimal.",
]


def classify_tab(batcher: Batcher, flags: Flags) -> None:
    """Add the tab's contents to the page that is being built."""
    classifier = batcher.classifier
    labels = classifier.labels

    def predict(note: str | None) -> tuple:
        note = checked_note(note)
        prediction = wait_for(batcher.submit([note], client=client_of_event())[0])
        # In the same event: the browser loses a chained event that starts as the last one ends.
        parts = wait_for(
            batcher.submit_job(lambda: leave_one_out(classifier, note), client=client_of_event())
        )
        record = prediction.as_json() | {
            "confidence": prediction.confidence,
            "sha256": Note(note, ()).sha256,
            "tokens": prediction.tokens,
            "tokens_exact": not prediction.truncated,
        }
        shares = dict(zip(labels, prediction.probabilities, strict=True))
        return (
            prediction.as_json(), prediction.as_text(), shares, _confidence(prediction),
            _verdict(prediction, classifier), _length(prediction, classifier), _spans(parts),
            record,
        )  # fmt: skip

    def flag(note: str | None, record: dict | None, consent: bool, reason: str | None) -> None:
        if record is None:
            raise message("There is no prediction to flag: submit a note first.")
        if reason not in REASONS:
            raise message("Choose a reason first.")
        record = record | {"reason": reason}
        if consent is True:
            note = clean_text(note or "")
            if Note(note, ()).sha256 != record["sha256"]:
                raise message("The note has changed since its prediction: submit it again.")
            record["note"] = note
        try:
            flags.add(record)
        except FlagsFullError:
            raise message("The file of flags is full: move it away.") from None
        words = "with" if consent is True else "without"
        gr.Info(f"The prediction was flagged, {words} the note's text.")

    with gr.Row(elem_classes="note-and-answer"):
        with gr.Column():
            note = gr.Textbox(label="Enter Clinical Note", lines=8, max_lines=20)
            with gr.Row():
                clear = gr.Button("Clear", min_width=120)
                submit = gr.Button("Submit", variant="primary", min_width=120)
            length = gr.Markdown(elem_classes="small")
            examples = gr.Dataset(
                components=[note], samples=[[example] for example in EXAMPLES], type="index",
                label="Examples", elem_id="examples",
            )  # fmt: skip
        with gr.Column():
            as_json = gr.JSON(label="Predicted Classification in JSON Format")
            as_text = gr.Textbox(label="Prediction in text", interactive=False)
            verdict = gr.Markdown(elem_classes="refer")
            confidence = gr.Textbox(label="Confidence that this class is right", interactive=False)
            shares = gr.Label(label="Uncalibrated probabilities", num_top_classes=len(labels))
    highlighted = gr.HighlightedText(
        label="Sentences for the predicted class (red, above 0) and against it (purple, below 0)",
        show_legend=True,
    )
    gr.Markdown(
        "A value is how far the probability of the predicted class falls without the sentence. It "
        "is not a reason that a clinician would give.",
        elem_classes="small",
    )
    reason = gr.Radio(REASONS, label="Why flag this prediction?")
    consent = gr.Checkbox(False, label="I may store this note's text: keep it with the flag")
    flag_button = gr.Button("Flag")
    record = gr.State()  # the last prediction; it stays on the server and holds no note text
    outputs = [as_json, as_text, shares, confidence, verdict, length, highlighted, record]
    empty = (None, None, None, None, "", "", None, None)
    examples.click(lambda number: EXAMPLES[number], examples, note, api_name="choose_example")
    predicted = submit.click(with_error_messages(predict), note, outputs, api_name="predict")
    predicted.failure(lambda: empty, None, outputs, api_name="clear_failed_prediction")
    # Not gr.ClearButton: it evaluates a string as a script, which the security policy forbids.
    clear.click(
        lambda: (None, *empty, None, False), None,
        [note, *outputs, reason, consent], api_name="clear",
    )  # fmt: skip
    flag_button.click(
        with_error_messages(flag), [note, record, consent, reason], None, api_name="flag"
    )


def _spans(parts: list[Part]) -> list[tuple[str, float | None]]:
    """Give each part with its effect as a share, from −1 to 1, the range of the page's colours."""
    spans = []
    for part in parts:
        share = None if part.effect is None else part.effect / 100
        spans.append((part.text, share))
    return spans


def _confidence(prediction: Prediction) -> str:
    if prediction.confidence is None:
        return "not calibrated"
    return f"{prediction.confidence:.1%}"


def _verdict(prediction: Prediction, classifier: Classifier) -> str:
    if not prediction.refer:
        return ""
    threshold = classifier.calibration.threshold
    if threshold > 1:
        return "Refer to a person: this run was never right often enough to answer by itself."
    return (
        f"Refer to a person: the confidence of {prediction.confidence:.1%} is under this run's "
        f"threshold of {threshold:.1%}."
    )


def _length(prediction: Prediction, classifier: Classifier) -> str:
    if not prediction.truncated:
        return f"The note has {prediction.tokens:,} tokens; all were read."
    limit = classifier.token_limit
    return f"The note has more than {limit:,} tokens; the first {limit:,} were read."
