"""The page's tabs: classify and explain a note, LoRA internals, many notes, API, model card.

Every handler checks its inputs on the server, since a browser's checks can be bypassed. When a
handler fails, the page shows a reference to the log, since an error's message may quote the note.
"""

import csv
import functools
import html
import io
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

import gradio as gr
from gradio.context import LocalContext
from torch.func import functional_call

import clinora
from clinora.budget import base_parameters, linear_shapes, lora_targets
from clinora.classifier import Classifier, Prediction
from clinora.explain import Sentence, explain, layer_updates
from clinora.figures import singular_values_figure, updates_figure
from clinora.llama import LlamaConfig
from clinora.notes import Note, clean_text, has_visible
from clinora.serving import report_error
from clinora.serving.api import REQUEST_SECONDS, note_error
from clinora.serving.batcher import MOST_TOGETHER, Batcher, BusyError
from clinora.serving.files import MOST_ROWS, FileError
from clinora.serving.flags import Flags, FlagsFullError
from clinora.serving.proxy import network_of
from clinora.serving.reading import read_in_subprocess
from clinora.serving.storage import Storage
from clinora.tables import spreadsheet_safe

TITLE = "Clinical Note Classifier"
DESCRIPTION = (
    "This model classifies clinical notes into diagnosis categories. Choose your output format."
)
DISCLAIMER = "Demonstration only, not a medical device."
PREVIEW_ROWS = 20
PREVIEW_CHARACTERS = 100  # of a cell
# The columns of a result: the row's number, then the columns that are kept, then these.
ROW = "row"
RESULT_FIELDS = ["predicted_class", "label", "confidence", "refer", "tokens", "truncated", "error"]
TABLE_ENDING = re.compile(r"(?i)(\.(csv|tsv|txt|json|jsonl|ndjson|parquet|xlsx|xlsm))?(\.gz)?$")
POLL_SECONDS = 0.2  # between checks whether the visitor is still connected
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
/* On a phone, columns are stacked, and nothing is cut off. */
.gradio-container .row > .column, .gradio-container .row > .block,
.gradio-container .row > .form > .block { min-width: min(300px, 100%) !important; }
/* On a phone, the examples come last, so that the prediction directly follows the note. */
@media (max-width: 700px) {
  .note-and-answer > .column { display: contents; }
  .note-and-answer > .column > * { flex: 0 0 100%; }
  #examples { order: 1; }
}
.gradio-container :focus-visible { outline: 2px solid var(--color-accent) !important; }
.small { font-size: var(--text-sm); }
.refer p { border-left: 4px solid var(--color-red); padding-left: 12px; font-weight: 600; }
/* Gradio's default breaks words anywhere, and its colour at −1 is too dark to read text on. */
.gradio-container .textfield { word-break: normal; overflow-wrap: anywhere; }
/* Long class names wrap in the predictions, in the heading and beside their bars. */
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
        batcher: Runs the model for all visitors.
        flags: Stores flagged predictions.
        storage: Stores the visitors' files.
        card: The model card, in Markdown.
        url: The page's address, for the examples.
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


# --- one note -----------------------------------------------------------------------------------


def _classify_tab(batcher: Batcher, flags: Flags) -> None:
    classifier = batcher.classifier
    labels = classifier.labels

    def predict(note: str | None) -> tuple:
        note = _checked(note)
        prediction = _wait(batcher.submit([note], client=_client())[0])
        # In the same event: the browser loses a chained event that starts as the last one ends.
        sentences = _wait(batcher.submit_job(lambda: explain(classifier, note), client=_client()))
        record = prediction.as_json() | {
            "confidence": prediction.confidence,
            "sha256": Note(note, ()).sha256,
            "tokens": prediction.tokens,
            "tokens_exact": not prediction.truncated,
        }
        shares = dict(zip(labels, prediction.probabilities, strict=True))
        return (
            prediction.as_json(), prediction.as_text(), shares, _confidence(prediction),
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
            confidence = gr.Textbox(label="Confidence that this class is right", interactive=False)
            shares = gr.Label(label="Uncalibrated probabilities", num_top_classes=len(labels))
    highlighted = gr.HighlightedText(
        label="Sentences for the predicted class (red, above 0) and against it (purple, below 0)",
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
    record = gr.State()  # the last prediction; it stays on the server and holds no note text
    outputs = [as_json, as_text, shares, confidence, verdict, length, highlighted, record]
    empty = (None, None, None, None, "", "", None, None)
    examples.click(lambda number: EXAMPLES[number], examples, note, api_name="choose_example")
    predicted = submit.click(_with_error_messages(predict), note, outputs, api_name="predict")
    predicted.failure(lambda: empty, None, outputs, api_name="clear_failed_prediction")
    # Not gr.ClearButton: it evaluates a string as a script, which the security policy forbids.
    clear.click(
        lambda: (None, *empty, None, False), None,
        [note, *outputs, reason, consent], api_name="clear",
    )  # fmt: skip
    flag_button.click(
        _with_error_messages(flag), [note, record, consent, reason], None, api_name="flag"
    )


def _checked(note: str | None) -> str:
    note = clean_text(note or "")
    if not has_visible(note):
        raise _message("Enter a clinical note first.")
    error = note_error(note)
    if error is not None:
        raise _message(f"{error} Enter a part of it.")
    return note


def _spans(sentences: list[Sentence]) -> list[tuple[str, float | None]]:
    """Scale the sentences' contributions to −1 … 1, the range of the page's colours."""
    largest = 0.0
    for sentence in sentences:
        if sentence.contribution is not None:
            largest = max(largest, abs(sentence.contribution))
    spans = []
    for sentence in sentences:
        share = sentence.contribution
        if share is not None and largest > 0:
            share = share / largest
        spans.append((sentence.text, share))
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


# --- LoRA internals -----------------------------------------------------------------------------


def _internals_tab(batcher: Batcher) -> None:
    classifier = batcher.classifier
    model = classifier.model
    labels = classifier.labels
    lora = model.lora_config
    config = model.model.config
    updates = layer_updates(model)
    adapted = []  # last parts of the names, since a target may be "layers.0.self_attn.q_proj"
    for target in lora.targets:
        name = target.split(".")[-1]
        if name not in adapted:
            adapted.append(name)

    def count(rank: float, targets: list[str] | None) -> list[list[str]]:
        rows = []
        for name, shape in (("the loaded base", config), ("TinyLlama", TINYLLAMA)):
            try:
                layers = lora_targets(shape, int(rank), tuple(targets or ()))
            except ValueError as error:  # its message says which rank and targets are possible
                rows.append([name, str(error), "", "", ""])
                continue
            trained = sum(layer.lora for layer in layers)
            full = sum(layer.full for layer in layers)
            share = trained / base_parameters(shape, None)
            rows.append(
                [name, f"{trained:,}", f"{4 * trained / 1e6:,.2f}", f"{share:.3%}", f"{full:,}"]
            )
        return rows

    def compare_strengths(note: str | None, strength: float) -> list[list[str]]:
        note = _checked(note)
        chosen = min(2.0, max(0.0, float(strength)))

        def job() -> list:
            probabilities = []
            for value in (0.0, 1.0, chosen):
                with clinora.lora_strength(model, value):
                    probabilities.append(classifier([note])[0].probabilities)
            return probabilities

        columns = _wait(batcher.submit_job(job, client=_client()))
        rows = []
        for i, label in enumerate(labels):
            rows.append([label, *(f"{column[i]:.1%}" for column in columns)])
        return rows

    def compare_merged(note: str | None) -> str:
        note = _checked(note)

        def job() -> tuple:
            replaced = {}
            for name, layer in model.named_modules():
                if isinstance(layer, clinora.LoRALinear):
                    replaced[f"{name}.weight"] = clinora.merged_weight(layer)

            def run_merged(*inputs: object) -> object:
                with clinora.lora_disabled(model):
                    return functional_call(model, replaced, inputs)

            ids = classifier.tokenizer.encode(note, classifier.token_limit)
            logits = classifier.logits([ids], run_merged)
            return classifier([note])[0].probabilities, logits.softmax(-1)[0].tolist()

        separate, merged = _wait(batcher.submit_job(job, client=_client()))
        difference = max(abs(p - q) for p, q in zip(separate, merged, strict=True))
        dtype = str(classifier.dtype).removeprefix("torch.")
        return (
            f"Largest difference of a probability: {100 * difference:.2g} points. The merged "
            f"weight {lora.equation} is rounded once, to {dtype}; the model that is served was not "
            "changed."
        )

    gr.Markdown(
        f"The loaded adapter: rank {lora.rank}, α = {lora.alpha:g}, on {', '.join(lora.targets)}. "
        f"In these layers {lora.equation} takes the place of W, with A (r × in) and B (out × r). "
        "ΔW is the difference of both."
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
            _with_error_messages(count), [rank, targets], counts, trigger_mode="always_last",
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
    strengths = _with_error_messages(compare_strengths)
    compare.click(strengths, [note, strength], table, api_name="compare_strengths")
    strength.change(
        strengths, [note, strength], table, trigger_mode="always_last",
        api_name="compare_moved_strength",
    )  # fmt: skip
    merge.click(_with_error_messages(compare_merged), note, merged, api_name="compare_merged")


# --- many notes ---------------------------------------------------------------------------------


def _many_tab(batcher: Batcher, storage: Storage) -> None:
    classifier = batcher.classifier

    def choose_columns(file: dict) -> tuple[dict, dict]:
        try:
            columns = storage.get(file["path"]).columns
        except FileNotFoundError:  # the storage has removed it meanwhile
            raise _message("The file is gone: choose it again.") from None
        return (
            gr.update(choices=columns.names, value=columns.suggested),
            gr.update(choices=columns.names, value=[]),
        )

    def classify_part(part: list[tuple[str, str | None]]) -> list[Prediction | str]:
        """Classify some notes of a file; return the prediction or the error of each."""
        accepted = [note for note, error in part if error is None]
        is_busy = False
        futures = []
        try:
            futures = batcher.submit(accepted, REQUEST_SECONDS, client=_client())
        except BusyError:  # earlier rows of the file keep their predictions
            is_busy = True
        answers = iter(futures)
        results = []
        for _note, error in part:
            if error is not None:
                results.append(error)
            elif is_busy:
                results.append("The service was busy.")
            else:
                try:
                    results.append(_wait(next(answers)))
                except VisitorGoneError:
                    for future in futures:
                        future.cancel()
                    raise
                except Exception as failure:
                    results.append(f"This did not work; reference {report_error(failure)}.")
        return results

    def classify_file(
        file: dict | None,
        column: str | None,
        kept: list[str] | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[None, dict, dict, list[list], dict, str]:
        if file is None:
            raise _message("Choose a file first.")
        if column is None:
            raise _message("Choose the column of the notes first.")
        kept = kept or []
        for name in kept:
            if name in (ROW, *RESULT_FIELDS):
                raise _message(
                    f"The column {name!r} cannot be kept, because the result has a column with "
                    "this name. Give it another name in your file."
                )
        try:
            stored = storage.get(file["path"])
            for name in (column, *kept):
                if name not in stored.columns.names:
                    raise FileError(
                        f"The file has no column {name!r} that can be chosen: choose one of the "
                        "list."
                    )
            rows = read_in_subprocess(stored.path.read_bytes(), column, kept)
        except FileNotFoundError:  # the storage has removed it meanwhile
            raise _message("The file is gone: choose it again.") from None
        except FileError as error:
            raise _message(str(error)) from None
        notes = []
        for row in rows:
            note = clean_text(row.note)
            notes.append((note, row.wrong or note_error(note)))
        results = []
        try:
            for start in progress.tqdm(range(0, len(notes), MOST_TOGETHER), unit="batches"):
                results += classify_part(notes[start : start + MOST_TOGETHER])
        except VisitorGoneError:
            storage.remove(stored)
            raise
        table = [[ROW, *map(spreadsheet_safe, kept), *RESULT_FIELDS]]
        for number, (row, result) in enumerate(zip(rows, results, strict=True), 1):
            table.append([number, *map(spreadsheet_safe, row.kept), *_result_cells(result)])
        out = io.StringIO(newline="")
        csv.writer(out).writerows(table)
        # With a byte-order mark, Excel reads it as UTF-8.
        content = out.getvalue().encode("utf-8-sig")
        download = storage.add(stored.owner, _result_name(stored.path.name), content)
        storage.remove(stored)  # not before: after an error the visitor can try again
        preview = {"headers": table[0], "data": table[1 : PREVIEW_ROWS + 1]}
        return None, *_no_columns(), _counts(results, classifier), preview, str(download.path)

    gr.Markdown(
        f"A table with a header: CSV, JSON lines, Parquet or Excel, at most {MOST_ROWS:,} rows and "
        "5 MB. CSV and JSON lines may be compressed with gzip. The result has a row for each row "
        "of the file, with the columns that you keep; a row that cannot be classified says why."
    )
    # No file_types: when they exclude a file, the browser shows its name as HTML.
    upload = gr.File(label="File of notes")
    with gr.Row():
        column = gr.Dropdown([], value=None, label="Column of the notes")
        kept = gr.Dropdown([], value=[], multiselect=True, label="Columns to keep, such as an id")
    start = gr.Button("Classify all", variant="primary")
    counts = gr.Dataframe(
        headers=["class", "notes", "to refer"], interactive=False, wrap=True,
        label="Notes of each class, and how many of them to refer to a person",
        column_widths=["50%", "22%", "28%"],
    )  # fmt: skip
    preview = gr.Dataframe(
        headers=[ROW, *RESULT_FIELDS], interactive=False, label="The first rows",
        max_chars=PREVIEW_CHARACTERS,
    )  # fmt: skip
    download = gr.File(label="Result (CSV)", interactive=False)
    columns = [column, kept]
    results = [counts, preview, download]
    # Without preprocessing: Gradio's would leave an empty file behind after each event, and would
    # compare the columns with those that it remembers for a session. The gate checks all inputs.
    upload.upload(
        _with_error_messages(choose_columns), upload, columns, preprocess=False,
        api_name="choose_columns",
    )  # fmt: skip
    upload.clear(_no_columns, None, columns, api_name="clear_columns")
    # One file at a time, so that several files do not fill the batcher's queue.
    done = start.click(
        _with_error_messages(classify_file), [upload, *columns], [upload, *columns, *results],
        preprocess=False, concurrency_limit=1, show_progress_on=preview, api_name="classify_file",
    )  # fmt: skip
    done.failure(lambda: (None, None, None), None, results, api_name="clear_failed_file")


def _no_columns() -> tuple[dict, dict]:
    """Return updates that empty both lists of columns.

    They are new each time, because Gradio changes the updates that a handler returns.
    """
    return gr.update(choices=[], value=None), gr.update(choices=[], value=[])


def _result_cells(result: Prediction | str) -> list[object]:
    """Return the cells of a prediction, or of an error, in the order of ``RESULT_FIELDS``."""
    if isinstance(result, str):
        return [*("" for _field in RESULT_FIELDS[:-1]), result]
    confidence = result.confidence
    return [
        result.index,
        spreadsheet_safe(result.label),
        None if confidence is None else round(confidence, 4),
        _yes_or_no(result.refer),
        result.tokens,
        _yes_or_no(result.truncated),
        "",
    ]


def _yes_or_no(value: bool | None) -> str:
    if value is None:
        return ""
    return "yes" if value else "no"


def _counts(results: list[Prediction | str], classifier: Classifier) -> list[list]:
    """Count the notes and those to refer: of each class, of all, and the rows with an error."""
    predictions = [result for result in results if isinstance(result, Prediction)]

    def row(name: str, counted: list[Prediction]) -> list:
        referred = sum(bool(prediction.refer) for prediction in counted)
        return [name, len(counted), "" if classifier.calibration is None else referred]

    rows = []
    for index, label in enumerate(classifier.labels):
        rows.append(row(label, [p for p in predictions if p.index == index]))
    rows.append(row("All classes", predictions))
    rows.append(["Rows with an error", len(results) - len(predictions), ""])
    return rows


def _result_name(name: str) -> str:
    """Derive the result's name from the upload's name: notes.csv.gz becomes notes-classes.csv."""
    stem = TABLE_ENDING.sub("", name) or "notes"
    return f"{stem}-classes.csv"


# --- waiting and errors -------------------------------------------------------------------------


class VisitorGoneError(Exception):
    """The visitor has closed the page or the connection."""


def _wait(future: Future) -> object:
    """Wait for the result of a note or job. After a timeout or a disconnect, cancel it.

    Raises:
        TimeoutError: ``REQUEST_SECONDS`` have passed.
        VisitorGoneError: The visitor has closed the page or the connection.
    """
    end = time.monotonic() + REQUEST_SECONDS
    try:
        while not future.done() and time.monotonic() < end:
            if _visitor_is_gone():
                raise VisitorGoneError
            wait([future], POLL_SECONDS)
        return future.result(0)
    finally:
        future.cancel()


def _client() -> str:
    """Return the client whose event the current handler processes, or "" outside a request."""
    request = LocalContext.request.get(None)
    if request is None:
        return ""
    return network_of(request.client)


def _visitor_is_gone() -> bool:
    """Return whether the visitor has closed the connection that waits for the current event.

    Gradio then marks the event, but has no public name for the mark.
    """
    queue = LocalContext.blocks.get()._queue
    event = queue.event_ids_to_events.get(LocalContext.event_id.get())
    return event is not None and not event.alive


def _message(text: str) -> gr.Error:
    """Create an error whose text the page shows literally; Gradio shows messages as HTML."""
    return gr.Error(html.escape(text, quote=False), print_exception=False)


def _with_error_messages(handler: Callable) -> Callable:
    """Wrap a handler so that the page shows a message for each error, without the error's text."""

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
