"""The last notes of a session, to compare and to download; they are in the server's memory only."""

import csv
import io
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from clinora.classifier import Prediction
from clinora.notes import Note
from clinora.serving.answer import needs_person, verdict_badge
from clinora.serving.many_tab import RESULT_FIELDS, result_cells
from clinora.serving.words import literal
from clinora.tables import spreadsheet_safe

MOST_ENTRIES = 10
# Of a note, which bounds the memory: 10 notes of each of 1,000 sessions. It suffices to recognise
# a note.
MOST_KEPT_CHARACTERS = 2_000
NO_ENTRIES = '<div class="history"><p>No note was submitted yet.</p></div>'


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A note and its prediction.

    Attributes:
        beginning: The note's first characters.
        characters: How many characters the note has.
        sha256: The hash of the whole note.
        prediction: The prediction.
    """

    beginning: str
    characters: int
    sha256: str
    prediction: Prediction

    @classmethod
    def of(cls, note: str, prediction: Prediction) -> "Entry":
        """Keep what the history needs of a note."""
        return cls(note[:MOST_KEPT_CHARACTERS], len(note), Note(note, ()).sha256, prediction)

    def as_record(self) -> dict:
        """Return what a flag stores of the prediction, without the note's text."""
        return self.prediction.as_json() | {
            "confidence": self.prediction.confidence,
            "sha256": self.sha256,
            "tokens": self.prediction.tokens,
            "tokens_exact": not self.prediction.truncated,
        }

    def is_of(self, note: str) -> bool:
        """Tell whether this is the entry of a note."""
        return Note(note, ()).sha256 == self.sha256


class History:
    """The last notes of one session. Gradio makes one for each session, and forgets it with it.

    Attributes:
        entries: At most ``MOST_ENTRIES``, the newest first.
        shown: The entry whose answer the page shows, or None.
        turn: Is larger after each Submit and Clear.
        cleared: The entry whose answer the page showed before it was cleared, or None.
    """

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque(maxlen=MOST_ENTRIES)
        self.shown: Entry | None = None
        self.turn = 0
        self.cleared: Entry | None = None

    def add(self, entry: Entry) -> None:
        """Add the entry that the page shows now; the same note twice in a row is one entry."""
        if self.entries and self.entries[0].sha256 == entry.sha256:
            self.entries.popleft()
        self.entries.appendleft(entry)
        self.shown = entry


def history_html(history: History, labels: Sequence[str]) -> str:
    """Return the notes side by side, the newest first."""
    if not history.entries:
        return NO_ENTRIES
    cards = []
    for number, entry in enumerate(history.entries, 1):
        prediction = entry.prediction
        rows = []
        for label, probability in zip(labels, prediction.probabilities, strict=True):
            rows.append(f"<li><span>{literal(label)}</span> <span>{probability:.0%}</span></li>")
        beginning = literal(entry.beginning)
        if entry.characters > len(entry.beginning):
            beginning += " …"
        cards.append(
            f'<div class="history-card"><p class="answer-heading">Note {number}</p>'
            f'<p class="history-class">{literal(prediction.label)}</p>'
            f"{verdict_badge(needs_person(prediction))}<ul>{''.join(rows)}</ul>"
            f'<p class="note-text">{beginning}</p></div>'
        )
    return f'<div class="history">{"".join(cards)}</div>'


def history_csv(history: History, labels: Sequence[str]) -> bytes:
    """Return the notes as CSV, the newest first: the note, the prediction, the probabilities."""
    probabilities = [spreadsheet_safe(f"probability of {label}") for label in labels]
    fields = [field for field in RESULT_FIELDS if field != "error"]
    table = [["note", "characters", *fields, "needs_person", *probabilities]]
    for entry in history.entries:
        prediction = entry.prediction
        cells = result_cells(prediction)[: len(fields)]
        row = [spreadsheet_safe(entry.beginning), entry.characters, *cells]
        row.append("yes" if needs_person(prediction) else "no")
        row += [round(probability, 4) for probability in prediction.probabilities]
        table.append(row)
    out = io.StringIO(newline="")
    csv.writer(out).writerows(table)
    # With a byte-order mark, Excel reads it as UTF-8.
    return out.getvalue().encode("utf-8-sig")
