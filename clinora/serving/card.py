"""The model card: the data and accuracy of a run, and what it must not be used for."""

import re
from pathlib import Path

from clinora.checkpoint import BUNDLED
from clinora.classifier import Classifier
from clinora.report import model_table

CARD = """## Intended use

To learn how LoRA works, and to show how a classifier of clinical notes behaves. It is a
demonstration, not a medical device: no decision about a person may rest on it.

## Data

{data}

## Figures

{figures}

## Confidence

{confidence}

## Model

{model}

## Limits

It knows {classes} classes and predicts one of them for any text, also for a text that is not a
clinical note. It reads English, the first {limit:,} tokens of a note. Where and when its notes were
written decides what it knows; other hospitals write differently. The sentences highlighted
for or against a prediction are a first-order estimate, not a reason that a clinician would give.
"""


def model_card(classifier: Classifier, run: str | Path) -> str:
    """Write the model card of a run in Markdown, from ``clinora.json`` and the run's report.

    Args:
        classifier: The run's classifier.
        run: The run's folder, or "bundled".
    """
    folder = BUNDLED / "adapter" if str(run) == "bundled" else Path(run)
    return CARD.format(
        data=_data(classifier),
        figures=_figures(folder / "report" / "report.md"),
        confidence=_confidence(classifier),
        model=_block(model_table(classifier)),
        classes=len(classifier.labels),
        limit=classifier.token_limit,
    )


def _data(classifier: Classifier) -> str:
    data = classifier.data
    if data is None:
        return "Not recorded."
    seen = f"{len(data.seen):,} texts were trained and calibrated on."
    if data.source is None or data.split is None:
        return seen
    name = _literal(Path(data.source).name)
    return f"Notes: {name}, split by {_literal(data.split)}; {seen}"


def _figures(report: Path) -> str:
    """Quote the report's first block of code, which is its table of results."""
    if not report.is_file():
        return "This run has no report: `clinora eval` writes one."
    _before, _fence, rest = report.read_text(encoding="utf-8").partition("```\n")
    parts = re.split(r"^```$", rest, maxsplit=1, flags=re.MULTILINE)
    return _block(parts[0].rstrip())


def _confidence(classifier: Classifier) -> str:
    calibration = classifier.calibration
    if not calibration:
        return "Not calibrated: no confidence is claimed, and no note is referred to a person."
    meaning = (
        "The confidence is the calibrated probability that the predicted class is one of the "
        f"note's labels, fitted on {calibration.notes:,} validation notes. "
    )
    if calibration.threshold > 1:
        return meaning + (
            f"On these it was never right in {calibration.promise:.0%} of what it would "
            "answer, so every note is referred to a person."
        )
    return meaning + (
        f"Under {calibration.threshold:.1%} a note is referred to a person: of the other "
        f"{calibration.coverage:.1%} of these notes {calibration.accuracy:.1%} were right "
        f"(target: {calibration.promise:.0%})."
    )


def _literal(text: str) -> str:
    """Escape a text so that Markdown and HTML show it literally, with its invisible characters."""

    def escape(found: re.Match) -> str:
        character = found[0]
        if character.isprintable():
            return f"&#{ord(character)};"
        return f"U+{ord(character):04X}"

    return re.sub(r"[^\w ]|_", escape, text)


def _block(text: str) -> str:
    """Write a text as a Markdown code block that nothing in the text can close."""
    lengths = [len(backticks) for backticks in re.findall("`+", text)]
    fence = "`" * max(3, max(lengths, default=0) + 1)
    return f"{fence}\n{text}\n{fence}"
