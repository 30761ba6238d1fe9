"""The page's tab for many notes: a file goes in, a table of predictions comes back."""

import csv
import io
import re

import gradio as gr

from clinora.classifier import Classifier, Prediction
from clinora.notes import clean_text
from clinora.serving import report_error
from clinora.serving.api import REQUEST_SECONDS, note_error
from clinora.serving.batcher import MOST_TOGETHER, Batcher, BusyError
from clinora.serving.events import (
    VisitorGoneError,
    admit_notes,
    client_of_event,
    count_prediction,
    message,
    wait_for,
    with_error_messages,
)
from clinora.serving.files import MOST_ROWS, FileError
from clinora.serving.reading import read_in_subprocess
from clinora.serving.storage import Storage
from clinora.tables import spreadsheet_safe

PREVIEW_ROWS = 20
PREVIEW_CHARACTERS = 100  # of a cell
# The columns of a result: the row's number, then the columns that are kept, then these.
ROW = "row"
RESULT_FIELDS = ["predicted_class", "label", "confidence", "refer", "tokens", "truncated", "error"]
TABLE_ENDING = re.compile(r"(?i)(\.(csv|tsv|txt|json|jsonl|ndjson|parquet|xlsx|xlsm))?(\.gz)?$")


def many_tab(batcher: Batcher, storage: Storage) -> None:
    """Add the tab's contents to the page that is being built."""
    classifier = batcher.classifier

    def choose_columns(file: dict) -> tuple[dict, dict]:
        try:
            columns = storage.get(file["path"]).columns
        except FileNotFoundError:  # the storage has removed it meanwhile
            raise message("The file is gone: choose it again.") from None
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
            futures = batcher.submit(accepted, REQUEST_SECONDS, client=client_of_event())
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
                    prediction = wait_for(next(answers))
                    count_prediction(prediction)
                    results.append(prediction)
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
            raise message("Choose a file first.")
        if column is None:
            raise message("Choose the column of the notes first.")
        kept = kept or []
        for name in kept:
            if name in (ROW, *RESULT_FIELDS):
                raise message(
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
            raise message("The file is gone: choose it again.") from None
        except FileError as error:
            raise message(str(error)) from None
        notes = []
        for row in rows:
            note = clean_text(row.note)
            notes.append((note, row.wrong or note_error(note)))
        admit_notes(len(notes))
        results = []
        try:
            for start in progress.tqdm(range(0, len(notes), MOST_TOGETHER), unit="batches"):
                results += classify_part(notes[start : start + MOST_TOGETHER])
        except VisitorGoneError:
            storage.remove(stored)
            raise
        table = [[ROW, *map(spreadsheet_safe, kept), *RESULT_FIELDS]]
        for number, (row, result) in enumerate(zip(rows, results, strict=True), 1):
            table.append([number, *map(spreadsheet_safe, row.kept), *result_cells(result)])
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
        with_error_messages(choose_columns), upload, columns, preprocess=False,
        api_name="choose_columns",
    )  # fmt: skip
    upload.clear(_no_columns, None, columns, api_name="clear_columns")
    # One file at a time, so that several files do not fill the batcher's queue.
    done = start.click(
        with_error_messages(classify_file), [upload, *columns], [upload, *columns, *results],
        preprocess=False, concurrency_limit=1, show_progress_on=preview, api_name="classify_file",
    )  # fmt: skip
    done.failure(lambda: (None, None, None), None, results, api_name="clear_failed_file")


def _no_columns() -> tuple[dict, dict]:
    """Return updates that empty both lists of columns.

    They are new each time, because Gradio changes the updates that a handler returns.
    """
    return gr.update(choices=[], value=None), gr.update(choices=[], value=[])


def result_cells(result: Prediction | str) -> list[object]:
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
