"""The page's words about a run: its title, its purpose, its classes and its examples."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clinora.checkpoint import BUNDLED
from clinora.classifier import Classifier
from clinora.notes import PUBLISHED_CLASSES, clean_text, has_visible
from clinora.serving.api import note_error

TITLE = "Clinical Note Classifier"
DESCRIPTION = (
    "This model classifies clinical notes into diagnosis categories. Choose your output format."
)
NOTE_LABEL = "Enter Clinical Note"
DISCLAIMER = "Demonstration only, not a medical device."
PRIVACY = (
    "Do not paste identifiable data. Text stays on this server; it is stored only if you flag it "
    "and agree."
)
# Of a run with other classes than the published ones.
OTHER_TITLE = "Note Classifier"
OTHER_DESCRIPTION = "This model classifies notes. Choose your output format."
OTHER_NOTE_LABEL = "Enter Note"

# The published example, then three fictional notes: Orthopedic, Radiology and Surgery.
EXAMPLES = (
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction.",
    "Left knee pain and swelling after a twisting injury while skiing. Positive Lachman test, "
    "full range of motion. Suspected anterior cruciate ligament tear; brace and crutches given.",
    "CT of the abdomen and pelvis with contrast. The liver, spleen and kidneys are unremarkable. "
    "No free fluid or lymphadenopathy. Impression: no acute abnormality.",
    "The patient was placed under general anesthesia, prepped and draped. The inflamed appendix "
    "was divided with a stapler and removed. The incisions were closed; blood loss was minimal.",
)
EXAMPLES_FILE = "examples.txt"
MOST_EXAMPLES = 10

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True)
class Words:
    """What the page says about a run.

    Attributes:
        title: The page's title.
        description: What the model does, in one sentence.
        note: The label of the note's box.
        purpose: What it does with a note, with the names of its classes, as HTML.
        unusual: What the page says of a text unlike those that the run was trained on.
        examples: Notes to try.
    """

    title: str
    description: str
    note: str
    purpose: str
    unusual: str
    examples: tuple[str, ...]


def words_about(classifier: Classifier, examples: Sequence[str] = ()) -> Words:
    """Write the page's words about a run.

    A run with the published classes has the published title, description and examples. Another run
    is described by what its record holds: the classes, and the name of the file of its notes.

    Args:
        classifier: The run's classifier.
        examples: The run's own examples, instead of the published ones.
    """
    headings = _headings(classifier.labels)
    if classifier.labels == PUBLISHED_CLASSES:
        return Words(
            TITLE,
            DESCRIPTION,
            NOTE_LABEL,
            f"It files an English note under one of {headings}. It makes no diagnosis.",
            "This does not look like an English clinical note.",
            tuple(examples) or EXAMPLES,
        )
    purpose = f"It files a note under one of {headings}."
    data = classifier.data
    if data is not None and data.source is not None:
        purpose += f" It was trained on {literal(Path(data.source).name)}."
    return Words(
        OTHER_TITLE,
        OTHER_DESCRIPTION,
        OTHER_NOTE_LABEL,
        purpose,
        "This does not look like the notes that the model was trained on.",
        tuple(examples),
    )


def read_examples(run: str | Path) -> list[str]:
    """Read a run's own examples from ``examples.txt`` in its folder, if there is such a file.

    Between two examples stands a line of three or more hyphens.

    Args:
        run: The run's folder, or "bundled".

    Raises:
        ValueError: The file is not UTF-8, an example is empty or too long, or there are too many.
    """
    folder = BUNDLED / "adapter" if str(run) == "bundled" else Path(run)
    file = folder / EXAMPLES_FILE
    if not file.is_file():
        return []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8: save it as UTF-8") from None
    examples = [
        clean_text(part) for part in re.split(r"^-{3,}[ \t]*\r?$", text, flags=re.MULTILINE)
    ]
    if len(examples) > MOST_EXAMPLES:
        raise ValueError(f"{file} has {len(examples)} examples: expected at most {MOST_EXAMPLES}")
    for number, example in enumerate(examples, 1):
        if not has_visible(example):
            raise ValueError(
                f"{file}: example {number} is empty: expected notes separated by lines of ---"
            )
        error = note_error(example)
        if error is not None:
            raise ValueError(f"{file}: example {number}: {error}")
    return examples


def literal(text: str) -> str:
    """Escape a text so that HTML inside Markdown shows it literally, with its line breaks.

    The result is a single line: an empty line would end the HTML, and the rest would be read as
    Markdown.
    """
    return html.escape(text).replace("\n", "&#10;")


def _headings(labels: Sequence[str]) -> str:
    """Write the number and the names of the classes: "two headings: Knee and Hip", as HTML."""
    count = len(labels)
    number = NUMBERS[count - 2] if 2 <= count <= 10 else f"{count:,}"
    names = [f"<b>{literal(label)}</b>" for label in labels]
    return f"{number} headings: {', '.join(names[:-1])} and {names[-1]}"
