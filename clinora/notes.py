"""Clinical notes from files: reading, cleaning, label sets and splits.

Public collections of notes file the same text under several specialties. Here a note is a text with
all its labels, so that no text is in two splits. The published split, in which each row is an
example with its own label, is supported for comparison.
"""

import hashlib
import math
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import numpy as np

from clinora.tables import MissingColumnError, TableError, as_text, open_table
from clinora.tables.table import is_similar

NAMED_NOTES = ("bundled", "mtsamples")

BUNDLED_NOTES = Path(__file__).parent / "bundled" / "notes.csv"

# The five specialties of MTSamples in the published results, sorted.
PUBLISHED_CLASSES = (
    "Cardiovascular / Pulmonary",
    "Consult - History and Phy.",
    "Orthopedic",
    "Radiology",
    "Surgery",
)

MTSAMPLES = {"repo_id": "harishnair04/mtsamples", "filename": "mtsamples.csv", "rows": 4999}

TEXT_COLUMN = "transcription"
LABEL_COLUMN = "medical_specialty"
SPLITS = ("texts", "rows")
SIDES = ("training", "validation", "test")
# How the column of the splits may name them, in lower case.
SIDE_OF_NAME = {
    "training": "training",
    "train": "training",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
SHORT = 50  # characters; shorter texts rarely allow a prediction
LONGEST_TEXT_FILE = 4_000_000  # bytes of a note in a folder
LONGEST_CLASS_NAME = 100  # characters; a longer one is a note, not a class

MOSTLY = 0.9  # share of capitals among the letters of a text that is all in capitals
FEWEST_LETTERS = 20  # a shorter text may be abbreviations alone
_CAPITALS = string.ascii_uppercase.encode()

# What clean_text writes in place of a lone surrogate.
REPLACEMENT = "\ufffd"

# Letters and symbols that are drawn as nothing: Hangul fillers, the Braille pattern without dots
# and the musical null notehead.
BLANK_LETTERS = frozenset("\u115f\u1160\u3164\uffa0\u2800\U0001d159")

# Control, format and surrogate characters, line and paragraph separators.
UNSHOWABLE_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))

# The zero-width non-joiner and joiner, as Persian, Indic scripts and emoji need them.
JOINERS = frozenset("\u200c\u200d")
VIRAMA = 9  # combining class of the sign that ends an Indic consonant


def clean_text(text: str) -> str:
    r"""Clean a note before it is hashed or tokenised, wherever it comes from.

    Windows line ends become ``\n``, so that they do not change the note's hash and tokens. A lone
    surrogate, half of a character that was cut in UTF-16, becomes U+FFFD, because UTF-8 cannot
    encode it. White space around the text is removed.

    >>> clean_text(" Chest pain.\r\nNo fever.\n")
    'Chest pain.\nNo fever.'
    """
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def ordinary_case(text: str) -> str:
    """Write a text that is all in capitals in lower case; any other text stays as it is.

    A model that learned from notes in ordinary case reads words in capitals as other words, often
    letter by letter. A text counts as all in capitals if it has at least 20 letters A–Z and a–z,
    since a shorter text may be abbreviations alone, and if at least 90% of these are capitals,
    since units such as mg may be in lower case. The number of characters stays the same.

    >>> ordinary_case("NO CHEST PAIN. ASPIRIN 81 mg DAILY.")
    'no chest pain. aspirin 81 mg daily.'
    >>> ordinary_case("NSTEMI. CXR clear.")
    'NSTEMI. CXR clear.'
    """
    content = text.encode(errors="replace")
    capitals = len(content) - len(content.translate(None, _CAPITALS))
    letters = capitals + len(content) - len(content.translate(None, _CAPITALS.lower()))
    if letters < FEWEST_LETTERS or capitals < MOSTLY * letters:
        return text
    return "".join(_lower(character) for character in text)


def _lower(character: str) -> str:
    low = character.lower()
    return low if len(low) == 1 else character  # in lower case, İ would be two characters


def has_visible(text: str) -> bool:
    """Tell whether a text has at least one visible letter, digit, punctuation mark or symbol.

    These do not count: spaces, control and format characters (zero-width space, byte-order mark,
    NUL), combining marks and variation selectors on their own, letters that are drawn as nothing,
    and U+FFFD, which stands for a lost character.
    """
    return any(_is_visible(character) for character in text)


def _is_visible(character: str) -> bool:
    if character in BLANK_LETTERS or character == REPLACEMENT:
        return False
    return unicodedata.category(character)[0] in "LNPS"


def check_class_name(name: str) -> None:
    """Check that a class name can be displayed.

    Raises:
        ValueError: The name has nothing visible, more than 100 characters, or a control or format
            character, such as one that changes the direction of the text. The message does not
            quote the name, which may be a note in the wrong column.
    """
    if len(name) > LONGEST_CLASS_NAME:
        raise ValueError(f"it has {len(name):,} characters, expected at most {LONGEST_CLASS_NAME}")
    for i, character in enumerate(name):
        if character in JOINERS and _joins(name[max(0, i - 1) : i], name[i + 1 : i + 2]):
            continue
        if unicodedata.category(character) in UNSHOWABLE_CATEGORIES:
            raise ValueError(
                f"it has the control or format character U+{ord(character):04X}, expected "
                "characters that can be seen"
            )
    if not has_visible(name):
        raise ValueError("it has nothing visible, expected a name")


def _joins(before: str, after: str) -> bool:
    """Tell whether a joiner between two characters shapes them: in a word, or after a virama.

    Elsewhere it is invisible, and two names that look the same would be different. At an end of the
    name, the character is "".
    """
    if before and unicodedata.combining(before) == VIRAMA:
        return True
    return all(side and not side.isspace() and side not in JOINERS for side in (before, after))


def check_class_names(labels: Sequence[str]) -> None:
    """Check the names of a run's classes, as ``read_notes`` checks those of a file.

    Raises:
        ValueError: They are not distinct names that can be displayed. The message quotes none of
            them.
    """
    if not all(isinstance(label, str) for label in labels):
        raise ValueError("labels are not strings: expected names")
    if len(set(labels)) < len(labels):
        raise ValueError("labels are not different names")
    for i, label in enumerate(labels):
        try:
            check_class_name(label)
        except ValueError as error:
            raise ValueError(f"label {i} is not a class name: {error}") from None


def text_sha256(text: str) -> str:
    """Hash a text as ``clean_text`` gives it, in hexadecimal."""
    return hashlib.sha256(clean_text(text).encode()).hexdigest()


def side_of(text: str) -> str:
    """Give the split of a text, by its hash alone: "test", "validation" or "training".

    It is the sha256 as a number, mod 10: 0 and 1 are test, 2 is validation, the rest is training.
    """
    remainder = int(text_sha256(text), 16) % 10
    if remainder < 2:
        return "test"
    if remainder == 2:
        return "validation"
    return "training"


@dataclass(frozen=True, slots=True)
class Note:
    """A text and the classes that it is filed under.

    Attributes:
        text: The text as ``clean_text`` gives it.
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
        return text_sha256(self.text)


def is_correct(note: Note, predicted: int) -> bool:
    """Tell whether a predicted class, given by its index, is one of the note's labels."""
    return predicted in note.labels


def are_correct(notes: Sequence[Note], predicted: Sequence[int]) -> np.ndarray:
    """Tell for each note whether its predicted class is one of its labels: (N,) bool."""
    pairs = zip(notes, predicted, strict=True)
    return np.array([is_correct(note, index) for note, index in pairs], bool)


def soft_targets(notes: Sequence[Note], classes: int) -> np.ndarray:
    """Give the training targets, 1/k for each of a note's k labels: (N, C) float32."""
    targets = np.zeros((len(notes), classes), np.float32)
    for row, note in zip(targets, notes, strict=True):
        row[list(note.labels)] = 1 / len(note.labels)
    return targets


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of a file that have one of the chosen classes.

    Attributes:
        classes: Names of the classes; a label is an index into them.
        notes: The different texts, in the file's order; with split "rows", one note for each row.
        sides: The split of each note: "training", "validation" or "test".
        split: "texts" or "rows".
        rows: Number of rows in the file.
        without_text: Number of rows without visible text or without a label, which are left out.
        other_classes: Number of rows of other classes, which are left out.
        repeated: Number of rows that are left out because a split that is measured has their text.
    """

    classes: tuple[str, ...]
    notes: tuple[Note, ...]
    sides: tuple[str, ...]
    split: str
    rows: int
    without_text: int
    other_classes: int
    repeated: int

    def on(self, side: str) -> list[Note]:
        """List the notes of one split: "training", "validation" or "test"."""
        pairs = zip(self.notes, self.sides, strict=True)
        return [note for note, its_side in pairs if its_side == side]

    def order_of(self, side: str) -> str:
        """Give a sha256 of the notes of one split in their order, for results that are lists."""
        return text_sha256(" ".join(note.sha256 for note in self.on(side)))

    @property
    def fingerprint(self) -> str:
        """A sha256 of texts, labels and class names; the order of the rows does not matter."""
        lines = (f"{note.sha256} {note.labels}" for note in self.notes)
        return text_sha256("\n".join([*self.classes, *sorted(lines)]))

    @property
    def split_fingerprint(self) -> str:
        """A sha256 of the split of each text."""
        pairs = zip(self.notes, self.sides, strict=True)
        lines = sorted(f"{note.sha256} {side}" for note, side in pairs)
        return text_sha256("\n".join(lines))

    def __str__(self) -> str:
        counts = Counter(self.sides)
        several = sum(len(note.labels) > 1 for note in self.notes)
        short = sum(len(note.text) < SHORT for note in self.notes)
        if self.split == "texts":
            what = "different texts"
            labels = f" ({several:,} with several labels)"
        else:
            what = "rows, each with its own label,"
            labels = ""
        sizes = ", ".join(f"{counts[side]:,} {side}" for side in SIDES)
        repeated = f", {self.repeated:,} repeated in other splits" if self.repeated else ""
        return (
            f"{self.rows:,} rows, {self.without_text:,} without text or label, "
            f"{self.other_classes:,} of other classes{repeated}; {len(self.notes):,} {what} in "
            f"{len(self.classes)} classes{labels}, {short:,} shorter than {SHORT} characters; "
            f"{sizes}"
        )


def read_notes(
    source: str | Path,
    *,
    text_column: str = TEXT_COLUMN,
    label_column: str = LABEL_COLUMN,
    classes: Sequence[str] | int | str | None = None,
    split: str = "texts",
    split_column: str | None = None,
    may_lack_classes: bool = False,
    download: bool = True,
) -> Notes:
    """Read notes from a file or folder.

    Args:
        source: A CSV file in UTF-8 (with commas, semicolons or tabs), JSON lines, Parquet or Excel;
            a folder with one sub-folder of text files for each class; "bundled"; or "mtsamples",
            which is downloaded from the Hub.
        text_column: Name of the column with the texts.
        label_column: Name of the column with the class of each row.
        classes: The names of the classes to keep, in the order of their indices; k for the k most
            frequent; or "all". None: the published five if the file has all of them, else all
            classes of the file. Without names the classes are sorted.
        split: "texts": equal texts are one note, and its hash decides its split. "rows": each row
            is a note with its own label, a random tenth of them test and another tenth validation,
            as published; equal texts may be in several splits.
        split_column: Name of a column that gives the split of each row, instead of the hash:
            training, validation or test (or train, valid, val, dev). A text in several splits stays
            in test, else in validation: its rows in the others are left out.
        may_lack_classes: Whether some of the named ``classes`` need not be in the file.
        download: Whether "mtsamples" may be downloaded if it is not here.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a table with these columns, fewer than two classes are left,
            or the column of the splits names no split in a row. No message contains the text of a
            note.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    if text_column == label_column:
        raise ValueError(f"column {text_column!r} cannot hold both the notes and their classes")
    if split_column in (text_column, label_column):
        raise ValueError(f"column {split_column!r} cannot hold the splits, too")
    if split_column is not None and split == "rows":
        raise ValueError(f"column {split_column!r} gives the splits: leave out split 'rows'")
    path = find_notes(source, download=download)
    filed = defaultdict(list)  # by text, (row, class) of each row that holds it
    side_in_file = {}  # by text, with a column of the splits
    rows = 0
    without_text = 0
    repeated = 0
    if path.is_dir():
        if split_column is not None:
            raise ValueError(f"{path} is a folder and has no column {split_column!r} of splits")
        content = _read_folder(path)
    else:
        content = _read_rows(path, text_column, label_column, split_column)
    for row, text, label, side in content:
        rows += 1
        if not label or not has_visible(text):
            without_text += 1
            continue
        kept_side = side_in_file.setdefault(text, side)
        if kept_side != side:
            # What is measured must not be learned from, so the later of SIDES keeps the text.
            if SIDES.index(side) < SIDES.index(kept_side):
                repeated += 1
                continue
            repeated += len(filed[text])
            filed[text].clear()
            side_in_file[text] = side
        filed[text].append((row, label))
    if source == "mtsamples" and rows != MTSAMPLES["rows"]:
        raise ValueError(
            f"the Hub's mtsamples.csv has {rows} rows, expected {MTSAMPLES['rows']}: "
            "download it by hand and give its path"
        )
    counts = Counter()  # by class, the number of rows
    for places in filed.values():
        counts.update(label for _, label in places)
    # If there are more classes than texts, and they are longer, the columns are probably swapped.
    # Then the "classes" are notes, and no message may show them.
    if len(counts) > len(filed) and _mean_length(counts) > _mean_length(filed):
        raise ValueError(
            f"{path} has {len(counts):,} classes for {len(filed):,} texts: is {text_column!r} the "
            f"column of the notes, and {label_column!r} that of their classes?"
        )
    chosen = _select_classes(counts, classes, path, may_lack_classes)
    index_of = {name: index for index, name in enumerate(chosen)}
    notes = []
    row_of_note = []  # with split "rows"
    for text, places in filed.items():
        kept = [(row, index_of[label]) for row, label in places if label in index_of]
        if split == "rows":
            for row, index in kept:
                notes.append(Note(text, (index,)))
                row_of_note.append(row)
        elif kept:
            notes.append(Note(text, tuple(index for _, index in kept)))
    if split == "rows":
        notes = [notes[i] for i in np.argsort(row_of_note)]
        sides = row_sides(len(notes))
    elif split_column is not None:
        sides = [side_in_file[note.text] for note in notes]
    else:
        sides = [side_of(note.text) for note in notes]
    return Notes(
        classes=chosen,
        notes=tuple(notes),
        sides=tuple(sides),
        split=split,
        rows=rows,
        without_text=without_text,
        other_classes=sum(count for name, count in counts.items() if name not in index_of),
        repeated=repeated,
    )


def choose_classes(words: Sequence[str] | None) -> Sequence[str] | int | str | None:
    """Turn the words of a command line into the ``classes`` argument of ``read_notes``.

    Args:
        words: Names, in any order; one number k, for the k most frequent; "all"; or None.
    """
    if words is None:
        return None
    if list(words) == ["all"]:
        return "all"
    if len(words) == 1 and words[0].isdecimal():
        return int(words[0])
    return sorted(words)


def _mean_length(words: Collection[str]) -> float:
    return sum(len(word) for word in words) / max(1, len(words))


def row_sides(rows: int) -> list[str]:
    """Split rows at random, always in the same way: a tenth, rounded up, is test.

    This gives 261 of 2,603 test rows, as published. The next tenth is validation.
    """
    tenth = math.ceil(rows / 10)
    sides = np.full(rows, "training", dtype=object)
    order = np.random.default_rng(0).permutation(rows)
    sides[order[:tenth]] = "test"
    sides[order[tenth : 2 * tenth]] = "validation"
    return sides.tolist()


def find_notes(source: str | Path, *, download: bool = True) -> Path:
    """Give the path of "bundled", of "mtsamples", which is downloaded once, or of a file.

    Raises:
        ValueError: MTSamples cannot be downloaded, or is not here and may not be downloaded.
    """
    if source == "bundled":
        return BUNDLED_NOTES
    if source != "mtsamples":
        return Path(source)
    try:
        path = huggingface_hub.hf_hub_download(
            MTSAMPLES["repo_id"],
            MTSAMPLES["filename"],
            repo_type="dataset",
            local_files_only=not download,
        )
    except Exception as error:  # the Hub's client raises its own errors, httpx's and the system's
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"mtsamples.csv could not be downloaded from the Hub ({reason.splitlines()[0]}): "
            "download it by hand and give its path"
        ) from None
    return Path(path)


def _read_rows(
    path: Path, text_column: str, label_column: str, split_column: str | None
) -> Iterator[tuple[int, str, str, str | None]]:
    """Read the rows of a file.

    Yields:
        The row's number (from 1, the header not counted), its clean text, its label, and its split
        if there is a column of the splits and the row has text and label.
    """
    flags = {text_column: "--text-column", label_column: "--label-column"}
    if split_column is not None:
        flags[split_column] = "--split-column"
    try:
        with path.open("rb") as file:
            for number, row in enumerate(open_table(file, list(flags)).select(), 1):
                if row.wrong is not None:
                    place = "" if row.line is None else f" (it begins in line {row.line})"
                    raise ValueError(f"row {number} of {path}{place} {row.wrong}")
                cells = [as_text(cell) for cell in row.cells]
                text = clean_text(cells[0])
                label = cells[1].strip()
                if label:
                    _check_row_label(label, number, path, label_column)
                side = None
                if split_column is not None and label and has_visible(text):
                    side = _read_side(cells[2], number, path, split_column)
                yield number, text, label, side
    except MissingColumnError as error:
        flag = next(flag for name, flag in flags.items() if name.strip() == error.column)
        raise ValueError(f"{path} {error}; give the right one with {flag}") from None
    except TableError as error:
        raise ValueError(f"{path} {error}") from None


def _read_folder(folder: Path) -> Iterator[tuple[int, str, str, None]]:
    """Read a folder with one sub-folder for each class, whose text files are the notes.

    Hidden files, whose names begin with a dot, are left out.

    Yields:
        As ``_read_rows``, in the order of the files' names.
    """
    number = 0
    if not _visible(folder):
        raise ValueError(f"{folder} is an empty folder: expected one sub-folder for each class")
    for sub_folder in _visible(folder):
        if not sub_folder.is_dir():
            raise ValueError(
                f"{folder} is a folder with the file {sub_folder.name!r} in it: expected one "
                "sub-folder for each class, and nothing else"
            )
        try:
            check_class_name(sub_folder.name)
        except ValueError as error:
            raise ValueError(
                f"the name of a sub-folder of {folder} is not a class name: {error}"
            ) from None
        for file in _visible(sub_folder):
            if not file.is_file():
                raise ValueError(f"{file} is not a file: expected only text files")
            if file.stat().st_size > LONGEST_TEXT_FILE:
                raise ValueError(
                    f"{file} has more than {LONGEST_TEXT_FILE:,} bytes: expected one note"
                )
            try:
                text = file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                raise ValueError(f"{file} is not a text file in UTF-8") from None
            number += 1
            yield number, clean_text(text), sub_folder.name.strip(), None


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read_side(name: str, row: int, path: Path, split_column: str) -> str:
    side = SIDE_OF_NAME.get(name.strip().lower())
    if side is None:
        raise ValueError(
            f"row {row} of {path} has no split in the column {split_column!r}: expected "
            f"{', '.join(SIDES)}"
        )
    return side


def _check_row_label(label: str, row: int, path: Path, label_column: str) -> None:
    try:
        check_class_name(label)
    except ValueError as error:
        raise ValueError(
            f"row {row} of {path} has no valid class name: {error}; is {label_column!r} the "
            "column of the classes?"
        ) from None


def _select_classes(
    counts: Counter, classes: Sequence[str] | int | str | None, path: Path, may_lack: bool
) -> tuple[str, ...]:
    """Select the classes to keep; ``counts`` has the number of rows of each class in the file."""
    if not counts:
        raise ValueError(f"{path}: no row has both text and label")
    if isinstance(classes, int):
        chosen = sorted(_most_frequent(counts, classes))
    elif classes == "all":
        chosen = sorted(counts)
    elif classes is not None:
        chosen = list(dict.fromkeys(classes))  # a run's labels keep their indices
        _check_chosen(chosen, counts, path, may_lack)
    elif all(name in counts for name in PUBLISHED_CLASSES):
        chosen = sorted(PUBLISHED_CLASSES)
    else:
        chosen = sorted(counts)
    if len(chosen) < 2:
        raise ValueError(f"{path} leaves {len(chosen)} class to choose from: expected two or more")
    return tuple(chosen)


def _most_frequent(counts: Counter, k: int) -> list[str]:
    """Give the k classes with the most rows; equally frequent classes are taken by name."""
    if k < 2:
        raise ValueError(f"the {k} most frequent classes: expected two or more")
    by_name = sorted(counts)
    # Sorting is stable: equally frequent classes stay in the order of their names.
    by_frequency = sorted(by_name, key=lambda name: counts[name], reverse=True)
    return by_frequency[:k]


def _check_chosen(chosen: Sequence[str], counts: Counter, path: Path, may_lack: bool) -> None:
    """Check that a file has the chosen classes.

    If it may lack some, it needs one of them, and no class whose name is similar to a missing one.

    The error shows similar classes of the file but no others, because they may be notes in the
    wrong column.
    """
    unknown = [name for name in chosen if name not in counts]
    if not unknown:
        return
    similar = []
    for name in sorted(counts):
        if name not in chosen and any(is_similar(name, wanted) for wanted in unknown):
            similar.append(repr(name))
    if may_lack and not similar and len(unknown) < len(chosen):
        return
    if similar:
        hint = f"similar classes of the file: {', '.join(similar)[:500]}"
    else:
        hint = "no class of the file has a similar name"
    raise ValueError(
        f"{path} has no notes of class {', '.join(map(repr, unknown))} ({hint}): choose classes "
        "that it has"
    )
