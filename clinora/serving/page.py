"""What a person sees: a box for a note, the prediction in two forms, examples, and a flag.

Every handler looks at what came in as if nothing had, since the page's own checks run in the
browser, and tells failures by a reference, since a message may quote the note.
"""

import functools
from collections.abc import Callable

import gradio as gr

from clinora.classifier import Prediction
from clinora.notes import Note
from clinora.serving import report_error
from clinora.serving.flags import Flags, FlagsFullError

TITLE = "Clinical Note Classifier"
DESCRIPTION = (
    "This model classifies clinical notes into diagnosis categories. Choose your output format."
)
DISCLAIMER = "Demonstration only, not a medical device."
MOST_CHARACTERS = 100_000

# The published note, then three invented ones, of Orthopedic, Radiology and Surgery.
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

THEME = gr.themes.Default(
    primary_hue="blue",
    secondary_hue="slate",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
.small { opacity: 0.75; font-size: var(--text-sm); }
"""


def build_page(classify: Callable[[str], Prediction], token_limit: int, flags: Flags) -> gr.Blocks:
    """Build the page.

    Args:
        classify: Gives the prediction of one note; may be called from several threads.
        token_limit: How many tokens of a note it reads.
        flags: Where flagged predictions go.
    """

    def predict(note: str | None) -> tuple[dict, str, dict, dict]:
        note = (note or "").strip()
        if not note:
            raise _message("Enter a clinical note first.")
        if len(note) > MOST_CHARACTERS:
            raise _message(
                f"The note has {len(note):,} characters, more than {MOST_CHARACTERS:,}: "
                "enter a part of it."
            )
        prediction = classify(note)
        cut = gr.update(visible=False)
        if prediction.truncated:
            read = f"the first {token_limit:,} were read."
            cut = gr.update(
                value=f"The note has {prediction.tokens:,} tokens; {read}", visible=True
            )
        record = prediction.as_json() | {
            "sha256": Note(note, ()).sha256,
            "tokens": prediction.tokens,
        }
        return prediction.as_json(), prediction.as_text(), cut, record

    def flag(record: dict | None) -> None:
        if record is None:
            raise _message("There is no prediction to flag: submit a note first.")
        try:
            flags.add(record)
        except FlagsFullError:
            raise _message("The file of flags is full: move it away.") from None
        gr.Info("The prediction was flagged, without the note's text.")

    def no_prediction() -> tuple[None, None, dict, None]:
        return None, None, gr.update(visible=False), None

    with gr.Blocks(title=TITLE, delete_cache=(300, 1800)) as page:
        gr.Markdown(f"# {TITLE}\n\n{DESCRIPTION}")
        gr.Markdown(DISCLAIMER, elem_classes="small")
        with gr.Row():
            with gr.Column():
                note = gr.Textbox(label="Enter Clinical Note", lines=8, max_lines=20)
                with gr.Row():
                    clear = gr.Button("Clear", min_width=120)
                    submit = gr.Button("Submit", variant="primary", min_width=120)
            with gr.Column():
                as_json = gr.JSON(label="Predicted Classification in JSON Format")
                as_text = gr.Textbox(label="Prediction in text", interactive=False)
                cut = gr.Markdown(visible=False, elem_classes="small")
                flag_button = gr.Button("Flag")
        # Below both columns: on a phone the outputs follow the box.
        gr.Examples(EXAMPLES, note, cache_examples=False, api_visibility="private")
        record = gr.State()  # of the last prediction, on the server; it holds no text
        outputs = [as_json, as_text, cut, record]
        predicted = submit.click(_told_by_reference(predict), note, outputs, api_name="predict")
        predicted.failure(no_prediction, None, outputs, api_visibility="private")
        # Not gr.ClearButton, which evaluates a string as a script: the policy forbids that.
        clear.click(
            lambda: (None, *no_prediction()), None, [note, *outputs], api_visibility="private"
        )
        flag_button.click(_told_by_reference(flag), record, None, api_name="flag")
    return page


def _message(text: str) -> gr.Error:
    return gr.Error(text, print_exception=False)


def _told_by_reference(handler: Callable) -> Callable:
    @functools.wraps(handler)
    def guarded(*arguments: object) -> object:
        try:
            return handler(*arguments)
        except gr.Error:
            raise
        except Exception as error:
            raise _message(f"This did not work; reference {report_error(error)}.") from None

    return guarded
