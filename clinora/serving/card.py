"""The model card: what a run is for, how accurate it is, and what it must not be used for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinora.checkpoint import BUNDLED
from clinora.classifier import Classifier
from clinora.evaluation import Estimate
from clinora.report import (
    CrossValidation,
    Measured,
    ReportError,
    in_points,
    is_tf_idf,
    model_rows,
    read_cross_validation,
    read_measured,
    warn_about,
    with_interval,
)

INTENDED_USE = """The model files a clinical note under one of {count} headings: {classes}. It makes
no diagnosis.

Use it to learn how LoRA works, and to see how a classifier of clinical notes behaves. It is a
demonstration, not a medical device: do not base a decision about a person on it."""

ACCURACY = """A prediction is correct if the predicted class is one of the note's labels. In
brackets: 95% intervals. TF-IDF is a linear model on word counts, trained on the same notes as this
model."""

FOLDS = """In {folds} folds: {folds} models were trained in the same way as this one, and each note
was predicted by the model that was trained without it."""

ROWS = """The file of the test notes lists some texts several times, each time with another label.
No model can be correct in more than {best} of these rows, and this model is correct in {rows}."""

CLASSES = """Precision: of the notes predicted as a class, the share that has this label. Recall: of
the notes with a label, the share predicted as this class."""

CONFIDENCE = """The confidence is the calibrated probability that the predicted class is one of the
note's labels. It was fitted on {notes:,} validation notes, which come from the same source as the
training notes. For notes from another source the confidence can be too high."""

REFERRED = """A note with a confidence below {threshold:.1%} is referred to a person. The threshold
is the lowest at which at least {promise:.0%} of the answered validation notes are correct."""

NEVER_ANSWERED = """Every note is referred to a person: at no threshold were {promise:.0%} of the
answered validation notes correct."""

NOT_CALIBRATED = """This run is not calibrated: it claims no confidence. A person must check every
prediction."""

MISSED = (
    """The target is not reached on {name}: fewer than {promise:.0%} of the answers are correct."""
)

OVERCONFIDENCE = """Mean confidence minus the share correct, in points. Above 0, the confidence is
too high:"""

DETECTION = "Such a text is referred to a person if it is recognised, but not all are."
NO_DETECTION = "Such a text is not recognised."
LIMITS = """- It predicts one of its {count} classes for any text, even for one that is unlike
  the notes that it was trained on. {other_text}
- It reads the first {limit:,} tokens (words and parts of words) of a note, and ignores the rest.
- It learned from the notes that are described below. Notes from another hospital, country or time,
  or in another language, are written differently, and the model can be less accurate on them.
- Accuracy was not measured for groups of patients, such as by age, sex or ethnicity.
- Highlighted sentences show what changes this model's prediction. They are not the reasons of a
  clinician."""

# What is known of the notes that have a name of their own.
SOURCES = {
    "bundled": "Fictional notes, which were written for this project.",
    "mtsamples": (
        "MTSamples is a public collection of transcribed sample reports, in English, from one "
        "country. The file does not record when and where they were written."
    ),
}
OTHER_NOTES = "report-"  # the reports on other notes are in report-NAME/, the run's own in report/


@dataclass(frozen=True, slots=True)
class _Reports:
    """What was measured of a run; each of it may be missing.

    Attributes:
        folds: Cross-validation of the same training on all notes.
        test: The run on the test notes of its own file.
        others: The run on other notes, by their names.
        unreadable: Names of the files that are damaged or have another version.
    """

    folds: CrossValidation | None
    test: Measured | None
    others: dict[str, Measured]
    unreadable: list[str]


def model_card(classifier: Classifier, run: str | Path) -> str:
    """Write the model card of a run in Markdown, from ``clinora.json`` and the run's reports.

    Args:
        classifier: The run's classifier.
        run: The run's folder, or "bundled".
    """
    folder = BUNDLED / "adapter" if str(run) == "bundled" else Path(run)
    reports = _read_reports(folder)
    classes = "; ".join(_literal(label) for label in classifier.labels)
    count = len(classifier.labels)
    sections = {
        "Intended use": INTENDED_USE.format(count=count, classes=classes),
        "Accuracy": _accuracy(reports),
        "Confidence": _confidence(classifier, reports),
        "Limits": LIMITS.format(
            count=count,
            limit=classifier.token_limit,
            other_text=NO_DETECTION if classifier.outliers is None else DETECTION,
        ),
        "Data": _data(classifier, reports),
        "Model": _model(classifier),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items()) + "\n"


def _read_reports(folder: Path) -> _Reports:
    """Read all reports in a run's folder, but not those on notes that the run has seen."""
    unreadable = []

    def read(reader: Callable[[Path], Any], report: Path) -> Any:
        try:
            return reader(report)
        except FileNotFoundError:
            return None
        except (OSError, ReportError):
            unreadable.append(report.name)
            return None

    others = {}
    for report in sorted(folder.glob(f"{OTHER_NOTES}*/")):
        measured = read(read_measured, report)
        if measured is not None and not measured.trained_on:
            others[report.name.removeprefix(OTHER_NOTES)] = measured
    own = folder / "report"
    return _Reports(read(read_cross_validation, own), read(read_measured, own), others, unreadable)


def _named(reports: _Reports) -> dict[str, Measured]:
    """Give the notes that the run itself was measured on, by what a table calls them."""
    named = {}
    if reports.test is not None:
        named[f"{reports.test.notes:,} test notes"] = reports.test
    for name, measured in reports.others.items():
        named[f"{measured.notes:,} other notes ({_literal(name)})"] = measured
    return named


def _accuracy(reports: _Reports) -> str:
    """Write the tables of accuracy: on all notes in folds, on test notes and on other notes."""
    parts = [
        f"The report in {_literal(name)} cannot be read: `clinora eval` writes a new one."
        for name in reports.unreadable
    ]
    if reports.test is None and not reports.unreadable:
        parts.append("This run has no report: `clinora eval` writes one.")
    measured = {name: (m.accuracy, m.tf_idf, m.against) for name, m in _named(reports).items()}
    folds = reports.folds
    if folds is not None:
        name = f"all {folds.notes:,} notes, in {folds.folds} folds"
        measured = {name: (folds.accuracy, folds.tf_idf, folds.against)} | measured
    if not measured:
        return "\n\n".join(parts)

    rows = [("notes", "this model", "TF-IDF")]
    differences = []
    for name, (accuracy, tf_idf, against) in measured.items():
        rows.append((name, with_interval(accuracy), with_interval(tf_idf) if tf_idf else "–"))
        if against is not None:
            differences.append(f"- {name}: {_difference(against)}")
    parts.append(_table(rows))
    for name, notes in _named(reports).items():
        for warning in warn_about(notes.notes, notes.trained_on, notes.in_training):
            parts.append(f"**{name}: {warning}**")
    parts.append(ACCURACY)
    if folds is not None:
        parts.append(FOLDS.format(folds=folds.folds))
    if differences:
        lines = "\n".join(differences)
        parts.append(f"This model minus TF-IDF, in points, on the same notes:\n\n{lines}")
    if reports.test is not None:
        parts += _test_notes(reports.test)
    return "\n\n".join(parts)


def _test_notes(test: Measured) -> list[str]:
    """Write what is shown of the test notes alone: simple classifiers, rows and classes."""
    mean, spread = test.before
    simple = [f"- the base before training, with random heads: {mean:.1%} ± {spread:.1%}"]
    for name, share in test.baselines.items():
        if not is_tf_idf(name):  # it stands beside the model already
            simple.append(f"- {_literal(name)}: {with_interval(share)}")
    lines = "\n".join(simple)
    parts = [f"For comparison, the share of the test notes that is correct:\n\n{lines}"]
    if test.best_row_accuracy < 1:
        best = f"{test.best_row_accuracy:.1%}"
        parts.append(ROWS.format(best=best, rows=with_interval(test.row_accuracy)))
    rows = [("class of the test notes", "precision", "recall")]
    for label, (precision, recall) in test.classes.items():
        rows.append((_literal(label), with_interval(precision), with_interval(recall)))
    return [*parts, _table(rows), CLASSES]


def _confidence(classifier: Classifier, reports: _Reports) -> str:
    calibration = classifier.calibration
    if not calibration:
        return NOT_CALIBRATED
    parts = [CONFIDENCE.format(notes=calibration.notes)]
    if calibration.threshold > 1:
        return "\n\n".join([*parts, NEVER_ANSWERED.format(promise=calibration.promise)])
    threshold, promise = calibration.threshold, calibration.promise
    parts.append(REFERRED.format(threshold=threshold, promise=promise))
    rows = [
        ("notes", "answered", "of these, correct"),
        (
            f"{calibration.notes:,} validation notes",
            f"{calibration.coverage:.1%}",
            f"{calibration.accuracy:.1%}",
        ),
    ]
    missed = []
    differences = []
    for name, measured in _named(reports).items():
        if measured.coverage is None:
            continue
        correct = "–"
        if measured.answered_accuracy is not None:
            correct = with_interval(measured.answered_accuracy)
            if measured.answered_accuracy.high < promise:
                missed.append(MISSED.format(promise=promise, name=name))
        rows.append((name, with_interval(measured.coverage), correct))
        differences.append(f"- {name}: {_difference(measured.overconfidence)}")
    parts += [_table(rows), *missed]
    if differences:
        parts.append(OVERCONFIDENCE + "\n\n" + "\n".join(differences))
    return "\n\n".join(parts)


def _data(classifier: Classifier, reports: _Reports) -> str:
    data = classifier.data
    if data is None:
        return "The run does not record its training notes."
    parts = [f"The model was trained and calibrated on {len(data.seen):,} texts."]
    if data.source is not None and data.split is not None:
        name = _literal(Path(data.source).name)
        parts.append(f"Source: {name}, split by {_literal(data.split)}.")
        if data.source in SOURCES:
            parts.append(SOURCES[data.source])
    if reports.test is not None:
        parts.append(_literal(reports.test.about))
    return "\n\n".join(parts)


def _model(classifier: Classifier) -> str:
    rows = [("part", "value")]
    for name, value in model_rows(classifier).items():
        rows.append((_literal(name), _literal(value)))
    return _table(rows)


def _difference(difference: Estimate) -> str:
    """Format a difference and its 95% interval in percentage points."""
    low, high = in_points(difference.low), in_points(difference.high)
    return f"{in_points(difference.value)} [{low}, {high}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, of which the first is the header, as a Markdown table.

    No cell may hold a line break or a vertical bar: ``_literal`` escapes them.
    """
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _literal(text: str) -> str:
    """Escape a text so that Markdown and HTML show it literally, with its invisible characters."""

    def escape(found: re.Match) -> str:
        character = found[0]
        if character.isprintable():
            return f"&#{ord(character)};"
        return f"U+{ord(character):04X}"

    return re.sub(r"[^\w ]|_", escape, text)
