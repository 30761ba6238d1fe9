"""Clinical notes from CSV files: reading, classes, label sets, and which side a text is on.

Public note collections file the same text under several specialties. Here a note is a text with
the set of its labels, so that no text can stand on both sides of a split.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pandas

NAMED_NOTES = ("bundled", "mtsamples")

BUNDLED_NOTES = Path(__file__).parent / "bundled" / "notes.csv"

# The five specialties of MTSamples that the published results are about, sorted.
PUBLISHED_CLASSES = (
    "Cardiovascular / Pulmonary",
    "Consult - History and Phy.",
    "Orthopedic",
    "Radiology",
    "Surgery",
)

MTSAMPLES = {"repo_id": "harishnair04/mtsamples", "filename": "mtsamples.csv", "rows": 4999}


@dataclass(frozen=True, slots=True)
class Note:
    """A text and the classes that it is filed under.

    Attributes:
        text: The stripped text.
        filed: The class index of each row that holds the text, in the file's order.
    """

    text: str
    filed: tuple[int, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        """The different classes, sorted."""
        return tuple(sorted(set(self.filed)))

    @property
    def sha256(self) -> str:
        """Hash of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def side(self) -> str:
        """Side of the split, by the text's hash alone: "test", "validation" or "training".

        The hash as a number, mod 10: 0 and 1 are test, 2 is validation.
        """
        bucket = int(self.sha256, 16) % 10
        return {0: "test", 1: "test", 2: "validation"}.get(bucket, "training")


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of a file that are filed under the chosen classes.

    Attributes:
        classes: Names of the classes; a label is an index into them.
        notes: The different texts, in the file's order.
        rows: Rows of the file.
        without_text: Rows with no text or no label, left out.
        other_classes: Rows of other classes, left out.
    """

    classes: tuple[str, ...]
    notes: tuple[Note, ...]
    rows: int
    without_text: int
    other_classes: int

    def on(self, side: str) -> list[Note]:
        """List the notes of one side: "training", "validation" or "test"."""
        return [note for note in self.notes if note.side == side]

    @property
    def fingerprint(self) -> str:
        """A sha256 of texts, labels and class names; the order of the rows does not matter."""
        lines = [f"{note.sha256} {note.labels}" for note in self.notes]
        return hashlib.sha256("\n".join([*self.classes, *sorted(lines)]).encode()).hexdigest()

    def __str__(self) -> str:
        several = sum(len(note.labels) > 1 for note in self.notes)
        counts = Counter(note.side for note in self.notes)
        return (
            f"{self.rows:,} rows, {self.without_text:,} without text or label, "
            f"{self.other_classes:,} of other classes; {len(self.notes):,} different texts in "
            f"{len(self.classes)} classes, {several:,} of them filed under several: "
            f"{counts['training']:,} training, {counts['validation']:,} validation, "
            f"{counts['test']:,} test"
        )


def read_notes(
    source: str | Path,
    *,
    text_column: str = "transcription",
    label_column: str = "medical_specialty",
    classes: Sequence[str] | int | None = None,
) -> Notes:
    """Read notes from a CSV file.

    Args:
        source: A UTF-8 CSV file; "bundled"; or "mtsamples", which the Hub is asked for.
        text_column: Name of the column with the texts.
        label_column: Name of the column with the class of each row.
        classes: The classes to keep, or k for the k most frequent. None: the published five if
            the file has them all, else all that it has.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such CSV file, or leaves fewer than two classes. No message holds
            any text of a note.
    """
    path = _find(source)
    table = _read_csv(path, (text_column, label_column))
    if source == "mtsamples" and len(table) != MTSAMPLES["rows"]:
        raise ValueError(
            f"the Hub's mtsamples.csv has {len(table)} rows, expected {MTSAMPLES['rows']}: "
            "download it by hand and give its path"
        )
    texts, labels = table[text_column].str.strip(), table[label_column].str.strip()
    usable = texts.fillna("").ne("") & labels.fillna("").ne("")
    chosen = _choose_classes(Counter(labels[usable]), classes, path)
    index = {name: i for i, name in enumerate(chosen)}
    filed = defaultdict(list)
    for text, label in zip(texts[usable], labels[usable], strict=True):
        if label in index:
            filed[text].append(index[label])
    return Notes(
        classes=chosen,
        notes=tuple(Note(text, tuple(rows)) for text, rows in filed.items()),
        rows=len(table),
        without_text=int((~usable).sum()),
        other_classes=int((usable & ~labels.isin(chosen)).sum()),
    )


def _find(source: str | Path) -> Path:
    if source == "bundled":
        return BUNDLED_NOTES
    if source != "mtsamples":
        return Path(source)
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                MTSAMPLES["repo_id"], MTSAMPLES["filename"], repo_type="dataset"
            )
        )
    except Exception as error:  # the Hub's client raises its own, httpx's and the system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the Hub did not give mtsamples.csv ({reason}): download it by hand and give its path"
        ) from None


def _read_csv(path: Path, columns: tuple[str, str]) -> pandas.DataFrame:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a CSV file")
    try:
        header = pandas.read_csv(path, nrows=0, encoding="utf-8-sig").columns
        if missing := [column for column in columns if column not in header]:
            raise ValueError(
                f"{path} has no column {', '.join(map(repr, missing))}; its columns are: "
                f"{', '.join(map(str, header))}"
            )
        # "NA" and "None" may be a note's text; only nothing at all is missing.
        return pandas.read_csv(
            path, usecols=list(columns), dtype=str, encoding="utf-8-sig",
            keep_default_na=False, na_values=[""],
        )  # fmt: skip
    except pandas.errors.EmptyDataError:
        raise ValueError(f"{path} is empty: expected a CSV file with a header") from None
    except pandas.errors.ParserError:  # pandas' message may quote the file
        raise ValueError(f"{path} is no CSV file: a row does not fit its header") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (at byte {error.start}): convert it first") from None


def _choose_classes(
    counts: Counter, classes: Sequence[str] | int | None, path: Path
) -> tuple[str, ...]:
    if isinstance(classes, int):
        chosen = [name for name, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:classes]]
    elif classes is None:
        published = all(name in counts for name in PUBLISHED_CLASSES)
        chosen = list(PUBLISHED_CLASSES if published else counts)
    else:
        chosen = list(classes)
        if unknown := [name for name in chosen if name not in counts]:
            raise ValueError(
                f"{path} has no notes of class {', '.join(map(repr, unknown))}; it has: "
                f"{', '.join(sorted(counts))}"
            )
    if len(chosen) < 2:
        raise ValueError(
            f"{path} leaves {len(chosen)} class to choose from "
            f"({', '.join(map(repr, chosen)) or 'no row has text and label'}): expected two or more"
        )
    return tuple(sorted(chosen))
