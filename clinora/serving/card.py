"""The model card: what a run was made from, how right it is, and what it is not for."""

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

It knows {classes} classes and names one of them for any text, also for one that is no clinical
note. It reads English, the first {limit:,} tokens of a note. Where and when its notes were written
decides what it knows; other hospitals write differently. The sentences marked as speaking for or
against an answer are a first-order estimate, not a reason that a clinician would give.
"""


def model_card(classifier: Classifier, run: str | Path) -> str:
    """Write a run's card in Markdown, from what ``clinora.json`` and its report say.

    Args:
        classifier: The run, loaded.
        run: Its folder, or "bundled".
    """
    folder = BUNDLED / "adapter" if str(run) == "bundled" else Path(run)
    calibration = classifier.calibration
    trained_on = classifier.data
    data = "Not recorded."
    if trained_on is not None:
        data = f"{len(trained_on.seen):,} texts were trained and calibrated on."
        if trained_on.source is not None and trained_on.split is not None:
            name = _literal(Path(trained_on.source).name)
            data = f"Notes: {name}, split by {_literal(trained_on.split)}; {data}"
    figures = "This run has no report: `clinora eval` writes one."
    report = folder / "report" / "report.md"
    if report.is_file():
        _, _, rest = report.read_text(encoding="utf-8").partition("```\n")
        table, *_ = re.split(r"^```$", rest, maxsplit=1, flags=re.MULTILINE)
        figures = _block(table.rstrip())
    confidence = "Not calibrated: no confidence is claimed, and no note is referred to a person."
    if calibration:
        confidence = (
            "The confidence is the calibrated probability that a note is filed under the class "
            f"named, fitted on {calibration.notes:,} validation notes. "
        )
        if calibration.threshold > 1:
            confidence += (
                f"On these it was never right in {calibration.promise:.0%} of what it would "
                "answer, so every note is referred to a person."
            )
        else:
            confidence += (
                f"Under {calibration.threshold:.1%} a note is referred to a person: of the other "
                f"{calibration.coverage:.1%} of these notes {calibration.accuracy:.1%} were right "
                f"(promised: {calibration.promise:.0%})."
            )
    return CARD.format(
        data=data,
        figures=figures,
        confidence=confidence,
        model=_block(model_table(classifier)),
        classes=len(classifier.labels),
        limit=classifier.token_limit,
    )


def _literal(text: str) -> str:
    """Write a text so that Markdown and HTML show it as it is, and invisible characters too."""

    def write(found: re.Match) -> str:
        code = ord(found[0])
        return f"&#{code};" if found[0].isprintable() else f"U+{code:04X}"

    return re.sub(r"[^\w ]|_", write, text)


def _block(text: str) -> str:
    """Write lines as a block of code, which no line of theirs can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
