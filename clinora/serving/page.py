"""What a person sees: a note classified and explained, LoRA's inside, files, API, model card.

Every handler checks its inputs, since the page's own checks run in the browser. It reports a
failure by a reference, since an error's message may quote the note.
"""

import csv
import functools
import html
import io
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

import gradio as gr
from gradio.context import LocalContext
from gradio.data_classes import FileData
from torch.func import functional_call

import clinora
from clinora.budget import base_parameters, linear_shapes, lora_targets
from clinora.classifier import Classifier, Prediction
from clinora.explain import Sentence, explain, layer_updates
from clinora.figures import singular_values_figure, updates_figure
from clinora.llama import LlamaConfig
from clinora.notes import Note, clean_text, has_visible
from clinora.serving import report_error
from clinora.serving.api import REQUEST_SECONDS, describe, refuse
from clinora.serving.batcher import MOST_TOGETHER, Batcher, BusyError
from clinora.serving.files import MOST_ROWS, FileError, read_table
from clinora.serving.flags import Flags, FlagsFullError
from clinora.serving.proxy import network_of
from clinora.serving.storage import Storage

TITLE = "Clinical Note Classifier"
DESCRIPTION = (
    "This model classifies clinical notes into diagnosis categories. Choose your output format."
)
DISCLAIMER = "Demonstration only, not a medical device."
PREVIEW_ROWS = 20
LOOK_SECONDS = 0.2  # between looks whether the visitor is still there
REASONS = ("The class is wrong", "The confidence is wrong", "The highlights mislead", "Other")

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

TINYLLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)

THEME = gr.themes.Default(
    primary_hue="blue",
    secondary_hue="slate",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { max-width: min(1080px, 100vw) !important; margin: 0 auto !important; }
.gradio-container .column, .gradio-container .block { min-width: 0 !important; max-width: 100%; }
/* On a phone what stands side by side stands one below the other, and nothing is cut off. */
.gradio-container .row > .column, .gradio-container .row > .block,
.gradio-container .row > .form > .block { min-width: min(300px, 100%) !important; }
/* There the examples come last: what was found follows the note. */
@media (max-width: 700px) {
  .note-and-answer > .column { display: contents; }
  .note-and-answer > .column > * { flex: 0 0 100%; }
  #examples { order: 1; }
}
.gradio-container :focus-visible { outline: 2px solid var(--color-accent) !important; }
.small { font-size: var(--text-sm); }
.refer p { border-left: 4px solid var(--color-red); padding-left: 12px; font-weight: 600; }
/* Gradio's breaks words anywhere, and is too dark to read on at −1. */
.gradio-container .textfield { word-break: normal; overflow-wrap: anywhere; }
/* Long class names wrap, in the answers, in the heading and beside their bars. */
.gradio-container .output-class, .gradio-container .confidence-set .text,
.gradio-container .json-node .content { overflow-wrap: anywhere; min-width: 0; }
.gradio-container .score-token { --pale: color-mix(in srgb, var(--body-background-fill) 40%, #0000);
  background-image: linear-gradient(var(--pale), var(--pale)); }
"""

CURL = """curl -s {url}/v1/classify \\
  -H 'Content-Type: application/json' \\
  -d '{{"note": "Severe chest pain. ECG shows ST elevation."}}'"""
PYTHON = """import httpx

note = "Severe chest pain. ECG shows ST elevation."
print(httpx.post("{url}/v1/classify", json={{"note": note}}).json())"""
API_WORDS = """`GET /health` and `GET /ready` tell whether the service is alive and has room for a
note. `POST /v1/classify` takes `{"note": "…"}` or `{"notes": ["…", …]}`. Where `tokens_exact` is
false, the note is longer than what is read, and has at least `tokens` tokens. A busy service
answers 503 with `Retry-After`. Where a password file is in use, page and API ask for name and
password (`curl -u NAME`, `httpx.post(…, auth=(name, password))`)."""


def build_page(batcher: Batcher, flags: Flags, storage: Storage, card: str, url: str) -> gr.Blocks:
    """Build the page.

    Args:
        batcher: Runs the model for all.
        flags: Where flagged predictions go.
        storage: Keeps the files of those who visit.
        card: The model card, in Markdown.
        url: Where the page is, for the snippets.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n\n{DESCRIPTION}")
        gr.Markdown(DISCLAIMER, elem_classes="small")
        with gr.Tab("Classify"):
            _classify_tab(batcher, flags)
        with gr.Tab("LoRA internals"):
            _internals_tab(batcher)
        with gr.Tab("Many notes"):
            _many_tab(batcher, storage)
        with gr.Tab("API"):
            gr.Markdown(API_WORDS)
            gr.Code(CURL.format(url=url), language="shell", label="curl", interactive=False)
            gr.Code(PYTHON.format(url=url), language="python", label="Python", interactive=False)
        with gr.Tab("Model card"):
            gr.Markdown(card, latex_delimiters=[])
    return page


# --- a note -------------------------------------------------------------------------------------


def _classify_tab(batcher: Batcher, flags: Flags) -> None:
    classifier, labels = batcher.classifier, batcher.classifier.labels

    def predict(note: str | None) -> tuple:
        note = _checked(note)
        prediction = _wait(batcher.submit([note], client=_client())[0])
        # In the same event: the browser loses one that begins as the last of a chain ends.
        sentences = _wait(batcher.submit_job(lambda: explain(classifier, note), client=_client()))
        record = prediction.as_json() | {
            "confidence": prediction.confidence,
            "sha256": Note(note, ()).sha256,
            "tokens": prediction.tokens,
            "tokens_exact": not prediction.truncated,
        }
        shares = dict(zip(labels, prediction.probabilities, strict=True))
        return (
            prediction.as_json(), prediction.as_text(), shares, _sure(prediction),
            _verdict(prediction, classifier), _length(prediction, classifier), _spans(sentences),
            record,
        )  # fmt: skip

    def flag(note: str | None, record: dict | None, consent: bool, reason: str | None) -> None:
        if record is None:
            raise _message("There is no prediction to flag: submit a note first.")
        if reason not in REASONS:
            raise _message("Choose a reason first.")
        record = record | {"reason": reason}
        if consent is True:
            note = clean_text(note or "")
            if Note(note, ()).sha256 != record["sha256"]:
                raise _message("The note has changed since its prediction: submit it again.")
            record["note"] = note
        try:
            flags.add(record)
        except FlagsFullError:
            raise _message("The file of flags is full: move it away.") from None
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
            sure = gr.Textbox(label="Confidence that this class is right", interactive=False)
            shares = gr.Label(label="Uncalibrated probabilities", num_top_classes=len(labels))
    highlighted = gr.HighlightedText(
        label="Sentences that spoke for the answer (red, above 0) and against it (purple, below 0)",
        show_legend=True,
    )
    gr.Markdown(
        "The colours are an estimate (gradient × input, summed over a sentence), not a reason that "
        "a clinician would give.",
        elem_classes="small",
    )
    reason = gr.Radio(REASONS, label="Why flag this prediction?")
    consent = gr.Checkbox(False, label="I may store this note's text: keep it with the flag")
    flag_button = gr.Button("Flag")
    record = gr.State()  # of the last prediction, on the server; it holds no text
    outputs = [as_json, as_text, shares, sure, verdict, length, highlighted, record]
    empty = (None, None, None, None, "", "", None, None)
    examples.click(EXAMPLES.__getitem__, examples, note, api_name="choose_example")
    predicted = submit.click(_told_by_reference(predict), note, outputs, api_name="predict")
    predicted.failure(lambda: empty, None, outputs, api_name="clear_failed_prediction")
    # Not gr.ClearButton, which evaluates a string as a script: the policy forbids that.
    clear.click(
        lambda: (None, *empty, None, False), None,
        [note, *outputs, reason, consent], api_name="clear",
    )  # fmt: skip
    flag_button.click(
        _told_by_reference(flag), [note, record, consent, reason], None, api_name="flag"
    )


def _checked(note: str | None) -> str:
    note = clean_text(note or "")
    if not has_visible(note):
        raise _message("Enter a clinical note first.")
    if why := refuse(note):
        raise _message(f"{why} Enter a part of it.")
    return note


def _spans(sentences: list[Sentence]) -> list[tuple[str, float | None]]:
    """Scale contributions to −1 … 1, as the page colours them."""
    read = [abs(s.contribution) for s in sentences if s.contribution is not None]
    most = max(read, default=0) or 1
    return [(s.text, None if s.contribution is None else s.contribution / most) for s in sentences]


def _sure(prediction: Prediction) -> str:
    return "not calibrated" if prediction.confidence is None else f"{prediction.confidence:.1%}"


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


# --- LoRA's inside ------------------------------------------------------------------------------


def _internals_tab(batcher: Batcher) -> None:
    classifier = batcher.classifier
    model, labels = classifier.model, classifier.labels
    lora, config = model.lora_config, model.model.config
    updates = layer_updates(model)
    # A target may be a longer name, such as "layers.0.self_attn.q_proj".
    adapted = list(dict.fromkeys(target.split(".")[-1] for target in lora.targets))

    def count(rank: float, targets: list[str] | None) -> list[list[str]]:
        rows = []
        for name, shape in (("the loaded base", config), ("TinyLlama", TINYLLAMA)):
            try:
                layers = lora_targets(shape, int(rank), tuple(targets or ()))
            except ValueError as error:  # says what would fit
                rows.append([name, str(error), "", "", ""])
                continue
            trained, full = (sum(getattr(t, kind) for t in layers) for kind in ("lora", "full"))
            share = trained / base_parameters(shape, None)
            rows.append(
                [name, f"{trained:,}", f"{4 * trained / 1e6:,.2f}", f"{share:.3%}", f"{full:,}"]
            )
        return rows

    def compare_strengths(note: str | None, strength: float) -> list[list[str]]:
        note, strength = _checked(note), min(2.0, max(0.0, float(strength)))

        def job() -> list:
            columns = []
            for s in (0.0, 1.0, strength):
                with clinora.lora_strength(model, s):
                    columns.append(classifier([note])[0].probabilities)
            return columns

        columns = _wait(batcher.submit_job(job, client=_client()))
        return [
            [label, *(f"{column[i]:.1%}" for column in columns)] for i, label in enumerate(labels)
        ]

    def compare_merged(note: str | None) -> str:
        note = _checked(note)

        def job() -> tuple:
            replaced = {}
            for name, layer in model.named_modules():
                if isinstance(layer, clinora.LoRALinear):
                    replaced[f"{name}.weight"] = clinora.merged_weight(layer)
                    replaced[f"{name}.lora_B"] = layer.lora_B.new_zeros(layer.lora_B.shape)
            ids = classifier.tokenizer.encode(note, classifier.token_limit)
            merged = classifier.logits([ids], lambda *x: functional_call(model, replaced, x))
            return classifier([note])[0].probabilities, merged.softmax(-1)[0].tolist()

        beside, merged = _wait(batcher.submit_job(job, client=_client()))
        apart = max(abs(a - b) for a, b in zip(beside, merged, strict=True))
        return (
            f"Largest difference of a probability: {100 * apart:.2g} points. The merged weight "
            f"W + (α/r)·B·A is rounded once, to {str(classifier.dtype).removeprefix('torch.')}; "
            "the model that is served was not changed."
        )

    gr.Markdown(
        f"The loaded adapter: rank {lora.rank}, α = {lora.alpha:g}, on {', '.join(lora.targets)}. "
        "It adds (α/r)·B·A to each of these weights W, with A (r × in) and B (out × r)."
    )
    with gr.Row():
        rank = gr.Slider(1, max(64, lora.rank), lora.rank, step=1, label="Rank r")
        targets = gr.CheckboxGroup(
            list(linear_shapes(config)), value=adapted, label="Layers to adapt"
        )
    counts = gr.Dataframe(
        count(lora.rank, adapted), interactive=False, label="What LoRA would train",
        headers=["base", "parameters r·(in + out)", "MB as float32", "of the base",
                 "full training of these layers"],
    )  # fmt: skip
    for chosen, event in ((rank, "count_for_rank"), (targets, "count_for_targets")):
        chosen.change(
            _told_by_reference(count), [rank, targets], counts, trigger_mode="always_last",
            api_name=event,
        )  # fmt: skip
    with gr.Row():
        gr.Plot(updates_figure(updates), format="png", show_label=False)
        gr.Plot(singular_values_figure(updates), format="png", show_label=False)
    note = gr.Textbox(EXAMPLES[0], label="A note to try strengths on", lines=3, max_lines=8)
    strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the adapter")
    table = gr.Dataframe(
        headers=["class", "base (0)", "adapter (1)", "chosen strength"], interactive=False,
        label="Probabilities; the trained head stays on", wrap=True,
        column_widths=["40%", "20%", "20%", "20%"],
    )  # fmt: skip
    compare = gr.Button("Compare strengths")
    merge = gr.Button("Merge and compare")
    merged = gr.Markdown()
    strengths = _told_by_reference(compare_strengths)
    compare.click(strengths, [note, strength], table, api_name="compare_strengths")
    strength.change(
        strengths, [note, strength], table, trigger_mode="always_last",
        api_name="compare_moved_strength",
    )  # fmt: skip
    merge.click(_told_by_reference(compare_merged), note, merged, api_name="compare_merged")


# --- many notes ---------------------------------------------------------------------------------


def _many_tab(batcher: Batcher, storage: Storage) -> None:
    classifier = batcher.classifier
    told = ["predicted_class", "label", "confidence", "refer", "tokens", "tokens_exact"]
    header = ["row", *told, "error"]

    def classify_file(
        path: str | None,
        column: str | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[None, list[list], str]:
        if path is None:
            raise _message("Choose a CSV file first.")
        try:
            owner, content = storage.take(path)
        except FileNotFoundError:  # it waited for too long
            raise _message("The file is gone: choose it again.") from None
        notes = _notes_of(content, (column or "").strip())
        rows = []
        for start in progress.tqdm(range(0, len(notes), MOST_TOGETHER), unit="batches"):
            part = notes[start : start + MOST_TOGETHER]
            good = [note for note, why in part if not why]
            try:
                futures = batcher.submit(good, REQUEST_SECONDS, client=_client())
            except BusyError:  # what is done is not lost
                futures = []
                part = [(note, why or "The service was busy.") for note, why in part]
            answers = iter(futures)
            for _, why in part:
                row = [len(rows) + 1, *("" for _ in told), why or ""]
                if not why:
                    try:
                        found = describe(_wait(next(answers)), classifier)
                        row[1:-1] = [_cell(found[name]) for name in told]
                    except VisitorGoneError:
                        for future in futures:
                            future.cancel()
                        raise
                    except Exception as error:
                        row[-1] = f"This did not work; reference {report_error(error)}."
                rows.append(row)
        out = io.StringIO(newline="")
        csv.writer(out).writerows([header, *rows])
        result = storage.add(owner, "classes.csv", out.getvalue().encode())
        return None, rows[:PREVIEW_ROWS], str(result.path)

    gr.Markdown(
        f"A CSV file with a header, at most {MOST_ROWS:,} rows and 5 MB. The answer has a row for "
        "each, without the notes' text; a row that cannot be classified says why."
    )
    # Without file_types: the browser's message about a file of another type shows its name as HTML.
    upload = gr.File(label="CSV file")
    upload.preprocess = _path_of  # Gradio's own leaves an empty file behind at each event
    column = gr.Textbox("transcription", label="Column of the notes")
    start = gr.Button("Classify all", variant="primary")
    preview = gr.Dataframe(headers=header, interactive=False, label="The first rows")
    download = gr.File(label="Classes", interactive=False)
    outputs = [upload, preview, download]
    # One file after the other, so that together they do not fill the batcher's queue.
    done = start.click(
        _told_by_reference(classify_file), [upload, column], outputs, concurrency_limit=1,
        show_progress_on=preview, api_name="classify_file",
    )  # fmt: skip
    done.failure(lambda: (None, None, None), None, outputs, api_name="clear_failed_file")


def _path_of(upload: FileData | None) -> str | None:
    return None if upload is None else upload.path


def _notes_of(content: bytes, column: str) -> list[tuple[str, str | None]]:
    """Read a file's notes, each with the reason why it cannot be classified, if there is one."""
    try:
        table = read_table(content)
    except FileError as error:
        raise _message(str(error)) from None
    if column not in table.header:
        raise _message(
            f"The file has no column {column!r}: correct the name and choose the file again."
        )
    place = table.header.index(column)
    notes = []
    for row in table.rows:
        if len(row) != len(table.header):
            notes.append(("", f"The row has {len(row)} fields, the header {len(table.header)}."))
        else:
            note = clean_text(row[place])
            notes.append((note, refuse(note)))
    return notes


def _cell(value: object) -> object:
    """Round a number for reading, and keep a spreadsheet from reading a text as a formula."""
    if isinstance(value, float):
        return round(value, 4)
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


# --- what goes wrong ----------------------------------------------------------------------------


class VisitorGoneError(Exception):
    """Nobody waits for the answer any more."""


def _wait(future: Future) -> object:
    """Wait for an answer; one that nobody waits for any more and is not begun is not computed.

    Raises:
        TimeoutError: Time is up.
        VisitorGoneError: The visitor has closed the page or the connection.
    """
    end = time.monotonic() + REQUEST_SECONDS
    try:
        while not future.done() and time.monotonic() < end:
            if _visitor_is_gone():
                raise VisitorGoneError
            wait([future], LOOK_SECONDS)
        return future.result(0)
    finally:
        future.cancel()


def _client() -> str:
    """Name the client whose event this handler works on; "" if nobody's request is at hand."""
    request = LocalContext.request.get(None)
    return "" if request is None else network_of(request.client)


def _visitor_is_gone() -> bool:
    """Tell whether the connection on which this handler's answer is awaited was closed.

    Gradio marks the event then, but has no public name for this.
    """
    queue = LocalContext.blocks.get()._queue
    event = queue.event_ids_to_events.get(LocalContext.event_id.get())
    return event is not None and not event.alive


def _message(text: str) -> gr.Error:
    """Make an error that the page shows as this text: Gradio shows messages as HTML."""
    return gr.Error(html.escape(text, quote=False), print_exception=False)


def _told_by_reference(handler: Callable) -> Callable:
    @functools.wraps(handler)
    def guarded(*arguments: object) -> object:
        try:
            return handler(*arguments)
        except gr.Error:
            raise
        except (BusyError, TimeoutError):
            raise _message("The service is busy: try again in a moment.") from None
        except VisitorGoneError:
            raise _message("The page was closed.") from None
        except Exception as error:
            raise _message(f"This did not work; reference {report_error(error)}.") from None

    return guarded
