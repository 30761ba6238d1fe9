"""Score tables of any size: every row gets a predicted class, or an error that says why not.

``predict_table`` scores a table in memory. It keeps no state, so that Ray, Spark and others can
call it on parts of a larger table. ``predict_file`` scores a file in constant memory. It writes
numbered parts, and a stopped job goes on at the first missing part.
"""

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from clinora.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from clinora.checkpoint import BUNDLED, read_json, write_atomically
from clinora.classifier import INFERENCE_TOKENS, Classifier, Prediction, group_by_length
from clinora.notes import TEXT_COLUMN, has_visible
from clinora.resume import list_differences
from clinora.run import RUN_FILE
from clinora.tables import MissingColumnError, Row, Table, TableError, as_text, open_table
from clinora.tables.writing import check_format, merge_files, write_table

ROW = "row"  # number of a row in the file, from 1
# The columns of a result, with pandas' types.
RESULTS = {
    "label": "string",
    "confidence": "Float64",
    "refer": "boolean",
    "tokens": "Int64",
    "truncated": "boolean",
    "error": "string",
}

MOST_PADDING = 0.05  # largest share of padding in a batch
ROWS_PER_PART = 2_000
CHARACTERS_PER_PART = 20_000_000  # a part with very long notes has fewer rows

JOB_FILE = "predict.json"
LOCK_FILE = ".lock"
BAR = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"

T = TypeVar("T")


# --- a table in memory --------------------------------------------------------------------------


def predict_table(
    classifier: Classifier,
    frame: pd.DataFrame,
    text_column: str = TEXT_COLUMN,
    keep: Sequence[str] = (),
) -> pd.DataFrame:
    """Score a table: the result has a row for each of its rows, in the same order.

    Args:
        classifier: It is not changed.
        frame: The table.
        text_column: The column of the notes.
        keep: Columns that the result has, too.

    Returns:
        The kept columns; label, confidence, refer, tokens and truncated, as in ``Prediction``; and
        error, which is missing or says why the row has no prediction. The index is the table's.

    Raises:
        ValueError: The table lacks one of the columns, a kept column has the name of a result, the
            head was never trained, or a probability is not finite.
    """
    check_kept(keep)
    for column in (text_column, *keep):
        times = list(frame.columns).count(column)
        if times != 1:
            raise ValueError(f"the table has {times} columns {column!r}: expected one")
    results = score(classifier, encode(classifier, frame[text_column].tolist()))
    scored = pd.DataFrame(results, index=frame.index).astype(RESULTS)
    return pd.concat([frame[list(keep)], scored], axis=1)


def check_kept(keep: Sequence[str]) -> None:
    """Check that kept columns can stand beside those of the result.

    Raises:
        ValueError: One of them has the name of another.
    """
    names = [ROW, *RESULTS]
    for column in keep:
        if column.strip() in names:
            raise ValueError(
                f"column {column!r} cannot be kept: the result has a column of this name"
            )
        names.append(column.strip())


@dataclass(frozen=True, slots=True)
class EncodedNotes:
    """Notes as the model reads them.

    Attributes:
        ids: The ids of each note, as ``Classifier.encode`` gives them; None if it has an error.
        errors: For each note None, or why it cannot be classified.
    """

    ids: list[list[int] | None]
    errors: list[str | None]


def encode(classifier: Classifier, cells: Iterable[object]) -> EncodedNotes:
    """Tokenise the cells of a column of notes; a cell that is not text is an error."""
    notes = EncodedNotes([], [])
    for cell in cells:
        ids = None
        error = None
        text = "" if cell is pd.NA else cell
        if not isinstance(text, (str, int, float, type(None))):
            error = f"the note is not text but of the type {type(cell).__name__}"
        elif not has_visible(as_text(text)):
            error = "the note is empty"
        else:
            ids = classifier.encode(as_text(text))
        notes.ids.append(ids)
        notes.errors.append(error)
    return notes


def score(classifier: Classifier, notes: EncodedNotes) -> dict[str, list]:
    """Classify encoded notes; notes of similar length are computed together.

    Returns:
        The cells of each column of ``RESULTS``; None where a note has no prediction or no error.

    Raises:
        ValueError: The head was never trained, or a probability is not finite.
    """
    predictions = iter(predict_in_groups(classifier, [ids for ids in notes.ids if ids is not None]))
    results: dict[str, list] = {column: [] for column in RESULTS}
    for error in notes.errors:
        row = dict.fromkeys(RESULTS)
        row["error"] = error
        if error is None:
            prediction = next(predictions)
            row["label"] = prediction.label
            row["refer"] = prediction.refer
            row["tokens"] = prediction.tokens
            row["truncated"] = prediction.truncated
            if prediction.confidence is not None:
                row["confidence"] = round(prediction.confidence, 6)
        for column, cell in row.items():
            results[column].append(cell)
    return results


def predict_in_groups(classifier: Classifier, ids: Sequence[list[int]]) -> list[Prediction]:
    """Classify notes, together those of similar length, with little padding."""
    lengths = [min(len(note), classifier.token_limit) for note in ids]
    device = classifier.model.score.weight.device
    order: list[int] = []
    predictions: list[Prediction] = []
    for group in group_by_length(lengths, INFERENCE_TOKENS, device, MOST_PADDING):
        order += group
        predictions += classifier.predict([ids[i] for i in group])
    by_position = dict(zip(order, predictions, strict=True))
    return [by_position[position] for position in range(len(ids))]


# --- a file of any size -------------------------------------------------------------------------


def predict_file(
    classifier: Classifier,
    run: str | Path,
    source: Path,
    out: Path,
    *,
    text_column: str = TEXT_COLUMN,
    keep: Sequence[str] = (),
    output_format: str = "csv",
    resume: bool = False,
    merge: bool = False,
) -> Path:
    """Score the rows of a file and write the results as numbered parts.

    Each result has the row's number, the kept columns and ``RESULTS``. A row that is wrong in the
    file is a result with an error.

    Args:
        classifier: The classifier.
        run: The run that it was loaded from. A job that was begun with another run is not resumed.
        source: A CSV, JSON lines, Parquet or Excel file.
        out: The output folder.
        text_column: The column of the notes.
        keep: Columns of the file that the results have, too.
        output_format: "csv", "jsonl" or "parquet".
        resume: Whether to continue a job in ``out`` at its first missing part.
        merge: Whether to turn the parts into one file at the end.

    Returns:
        The folder of the parts, or the merged file.

    Raises:
        ValueError: The file is not a table with these columns, the folder holds other files or
            another job, or another process writes to it. Parts that were written stay.
        OSError: A file cannot be read or written.
    """
    check_format(output_format)
    check_kept(keep)
    job = identify(
        run,
        source,
        text_column=text_column,
        keep=keep,
        output_format=output_format,
        machine={
            "device": classifier.model.score.weight.device.type,
            "precision": str(classifier.dtype).removeprefix("torch."),
            "quantization": classifier.model.quantization,
        },
    )
    return run_job(
        job,
        lambda table: score_parts(classifier, table, out, output_format),
        source,
        out,
        resume=resume,
        merge=merge,
    )


def run_job(
    job: dict,
    score_table: "Callable[[Table], Generator[ScoredPart, None, None]]",
    source: Path,
    out: Path,
    *,
    resume: bool,
    merge: bool,
) -> Path:
    """Run a job: check the file and the folder, write the missing parts, and merge them.

    Args:
        job: What determines the result, as ``identify`` gives it.
        score_table: Scores the parts of a table in order.
        source: As for ``predict_file``, and so are the others.
        out: The output folder.
        resume: Whether to continue a job.
        merge: Whether to merge the parts.

    Raises:
        ValueError: As for ``predict_file``.
        OSError: A file cannot be read or written.
    """
    text_column = job["options"]["text_column"]
    keep = job["options"]["keep"]
    output_format = job["options"]["format"]
    try:
        with source.open("rb") as file:
            table = open_table(file, [text_column, *keep])
            for column in table.columns:
                table.check(column)
            check_folder(out, resume)
            out.mkdir(parents=True, exist_ok=True)
            with FileLock(out / LOCK_FILE, timeout=0):
                begin(out, job)
                merged = out / f"predictions.{output_format}"
                if not merged.exists():
                    types = result_types(table) if output_format == "parquet" else {}
                    # Closed here, also after an error, so that no thread goes on scoring.
                    with closing(score_table(table)) as parts:
                        write_parts(parts, types)
                if merge:
                    merge_parts(out, merged)
                    return merged
    except Timeout:
        raise ValueError(f"another process writes to {out}: choose another folder") from None
    except MissingColumnError as error:
        flag = "--text-column" if error.column == text_column.strip() else "--keep"
        raise ValueError(f"{source} {error}; give the right one with {flag}") from None
    except TableError as error:
        raise ValueError(f"{source} {error}") from None
    return out


def identify(
    run: str | Path,
    source: Path,
    *,
    text_column: str,
    keep: Sequence[str],
    output_format: str,
    machine: dict[str, str],
) -> dict:
    """Give what determines the bytes of the parts; ``machine`` says where and how to compute.

    Raises:
        OSError: The input or a file of the run cannot be read.
    """
    folder = BUNDLED / "adapter" if str(run) == "bundled" else Path(run)
    files = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE)
    return {
        "input": file_sha256(source),
        "run": {name: file_sha256(folder / name) for name in files},
        "options": {"text_column": text_column, "keep": list(keep), "format": output_format},
        **machine,
        "versions": {"clinora": version("clinora"), "torch": torch.__version__},
    }


def file_sha256(path: Path) -> str:
    """Hash a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(out: Path, resume: bool) -> None:
    """Check that the job overwrites nothing.

    Hidden files do not count: a job that was killed at its very start leaves only these.

    Raises:
        ValueError: The folder holds files, and they are not a job to resume.
    """
    if not out.exists() or (resume and (out / JOB_FILE).is_file()):
        return
    if out.is_dir() and all(path.name.startswith(".") for path in out.iterdir()):
        return
    what = "holds no job to resume, but other files"
    if not resume:
        what = "exists and is not empty"
    raise ValueError(f"{out} {what}: choose another --out, or --resume a job that is in it")


def begin(out: Path, job: dict) -> None:
    """Record what determines the result, or check that it is what the folder's job records.

    Raises:
        ValueError: The folder holds another job.
    """
    for pattern in (".part-*", ".predictions.*", f".{JOB_FILE}.*"):
        for path in out.glob(pattern):  # what a killed process left half-written
            path.unlink()
    if not (out / JOB_FILE).exists():
        write_atomically(out / JOB_FILE, f"{json.dumps(job, indent=2)}\n".encode())
        return
    differences = list_differences(read_json(out / JOB_FILE), job)
    if differences:
        raise ValueError(
            f"{out} holds the results of another job ({'; '.join(differences)}): choose another "
            "--out"
        )


def write_parts(parts: "Iterable[ScoredPart]", types: dict) -> None:
    """Write the parts that were scored, and show a progress bar.

    Raises:
        TableError: From some row on, the file is not a table. Parts that were written stay.
        OSError: A file cannot be read or written.
    """
    rows = 0
    scored = 0
    began = time.perf_counter()
    with tqdm(total=1.0, bar_format=BAR) as bar:
        for part in parts:
            rows += part.rows
            if part.columns is not None:
                write_table(part.path, part.columns, types)
                scored += part.rows
            rate = scored / max(time.perf_counter() - began, 1e-9)
            bar.set_description_str(f"{rows:,} rows, {rate:,.0f} rows/s", refresh=False)
            bar.update(part.share_read - bar.n)


def result_types(table: Table) -> dict:
    """Give pyarrow's types of the results' columns; a kept column has its type in the file."""
    import pyarrow

    types = {name: kind for name, kind in table.types.items() if name in table.columns}
    types[ROW] = pyarrow.int64()
    types["confidence"] = pyarrow.float64()
    types["refer"] = pyarrow.bool_()
    types["tokens"] = pyarrow.int32()
    types["truncated"] = pyarrow.bool_()
    return types


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of a file.

    Attributes:
        path: Where their results are written.
        numbers: The rows' numbers in the file.
        texts: The cells of the column of notes; None if the results are there.
        kept: The cells of the kept columns, by column; empty if the results are there.
        wrong: For each row None, or what is wrong with it.
        share_read: Share of the file up to their end.
    """

    path: Path
    numbers: list[int]
    texts: list | None
    kept: dict[str, list]
    wrong: list[str | None]
    share_read: float


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """The results of a part.

    Attributes:
        path: Where they are written.
        rows: How many rows the part has.
        columns: The cells of each column of the result; None if they were written before.
        share_read: Share of the file up to the part's end.
    """

    path: Path
    rows: int
    columns: dict[str, list] | None
    share_read: float


def read_parts(table: Table, out: Path, output_format: str) -> Iterator[Part]:
    """Read a table in parts; those whose results are there have no texts."""
    first = 1
    for number, rows in enumerate(group_rows(table.select())):
        path = out / f"part-{number:06d}.{output_format}"
        numbers = list(range(first, first + len(rows)))
        first += len(rows)
        texts = None
        kept: dict[str, list] = {}
        wrong = [row.wrong for row in rows]
        if not path.exists():
            _, *columns = table.columns
            texts = [row.cells[0] if row.cells else None for row in rows]
            for position, column in enumerate(columns, 1):
                kept[column] = [row.cells[position] if row.cells else None for row in rows]
        yield Part(path, numbers, texts, kept, wrong, table.share_read())


def score_parts(
    classifier: Classifier, table: Table, out: Path, output_format: str
) -> Generator[ScoredPart, None, None]:
    """Read and score a table in parts, except those whose results are there."""
    # The next part is read and tokenised while the model computes this one.
    parts = read_parts(table, out, output_format)
    for part, notes in ahead((part, encode_part(classifier, part)) for part in parts):
        yield score_part(classifier, part, notes)


def encode_part(classifier: Classifier, part: Part) -> EncodedNotes | None:
    """Tokenise the notes of a part, if its results are missing; a wrong row has an error."""
    if part.texts is None:
        return None
    notes = encode(classifier, part.texts)
    for i, wrong in enumerate(part.wrong):
        if wrong is not None:
            notes.errors[i] = f"the row {wrong}"
    return notes


def score_part(classifier: Classifier, part: Part, notes: EncodedNotes | None) -> ScoredPart:
    """Score the notes of a part, if there are any."""
    columns = None
    if notes is not None:
        columns = {ROW: part.numbers, **part.kept, **score(classifier, notes)}
    return ScoredPart(part.path, len(part.numbers), columns, part.share_read)


def group_rows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Group rows into parts; without rows there is one empty part."""
    group: list[Row] = []
    characters = 0
    groups = 0
    for row in rows:
        group.append(row)
        characters += sum(len(cell) for cell in row.cells if isinstance(cell, str))
        if len(group) == ROWS_PER_PART or characters >= CHARACTERS_PER_PART:
            yield group
            group = []
            characters = 0
            groups += 1
    if group or groups == 0:
        yield group


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Compute each item in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def merge_parts(out: Path, merged: Path) -> None:
    """Turn the parts of a complete job into one file.

    Raises:
        OSError: A file cannot be read or written.
    """
    parts = sorted(out.glob(f"part-*{merged.suffix}"))
    if not merged.exists():
        merge_files(parts, merged)
    for part in parts:
        part.unlink()
