"""Write a run's measures: tables for the terminal, and the files of ``report/``; read the files."""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from clinora.checkpoint import write_atomically
from clinora.classifier import Classifier
from clinora.evaluation import Answers, ClassMeasures, Estimate, Measures, Results
from clinora.figures import (
    confusion_figure,
    coverage_figure,
    length_figure,
    reliability_figure,
    training_figure,
)
from clinora.lora import count_parameters
from clinora.notes import Note

METRICS = "metrics.json"
METRICS_SCHEMA = 1
CROSS_VALIDATION = "cross_validation.json"
CROSS_VALIDATION_SCHEMA = 1
MISTAKES = 20  # incorrect predictions listed
EXCERPT = 300  # characters quoted of a note with an incorrect prediction, if requested
FEWEST_TEST = 30  # notes; fewer allow no conclusion


def model_rows(classifier: Classifier) -> dict[str, str]:
    """Describe a classifier's model, adapter and head: the names of the parts and their values."""
    model = classifier.model
    config = model.model.config
    lora = model.lora_config
    count = count_parameters(model)
    share = count.trainable / count.total
    base = model.source.name
    if model.quantization != "none":
        base += f", quantised as {model.quantization}"
    return {
        "model type": "Llama decoder with a sequence classification head",
        "base": base,
        "parameters": f"{count.total:,}",
        "layers": f"{config.num_hidden_layers} decoder layers, {config.num_attention_heads} heads, "
        f"{config.num_key_value_heads} for keys and values",
        "width": f"{config.hidden_size:,} (MLP {config.intermediate_size:,})",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "positions": f"rotary, up to {config.max_position_embeddings:,}; "
        f"{classifier.token_limit:,} tokens of a note are read",
        "activation": "SiLU, gated",
        "norm": f"RMSNorm, eps {config.rms_norm_eps:g}",
        lora.variant: f"{', '.join(lora.targets)}; rank {lora.rank}, alpha {lora.alpha:g}, "
        f"dropout {lora.dropout:g}",
        "head": f"Linear({config.hidden_size} → {len(classifier.labels)})",
        "trainable": f"{count.trainable:,} parameters, {share:.3%}: "
        f"{count.lora:,} LoRA, {count.other:,} head",
    }


def model_table(classifier: Classifier) -> str:
    """Describe a classifier's model, adapter and head, one line each."""
    rows = model_rows(classifier)
    return "\n".join(f"  {name:<12} {value}" for name, value in rows.items())


def results_table(results: Results) -> str:
    """Compare the run with its base, with simpler classifiers and with the best possible.

    If no text of the file has several labels, a prediction is correct for the note exactly if it is
    correct for its rows. Then the table has one column and no ceiling.
    """
    several_labels = results.ceiling < 1
    warnings = warn_about(results.notes, results.trained_on, results.in_training)
    lines = [f"{results.notes:,} notes in {results.rows:,} rows", *warnings, ""]
    lines += _accuracy_table(results, several_labels)
    lines += [
        "",
        "A note is correct if the predicted class is one of its labels.",
        "In brackets: 95% intervals. After ±: the standard deviation between the random heads.",
    ]
    if several_labels:
        best = f"{results.ceiling:.1%}"
        lines += [
            "A row has one label: a text with two labels is incorrect in one of its rows whatever",
            f"is predicted. No function of the text is correct in more than {best} of the file's",
            f"rows of these classes, or in {results.test_ceiling:.1%} of the rows measured here.",
        ]
    if results.against is not None:
        gain = results.against
        lines.append(
            f"Against the TF-IDF baseline: {in_points(gain.value)} points of the notes "
            f"correct [{in_points(gain.low)}, {in_points(gain.high)}]."
        )
    for baseline in results.baselines:
        if baseline.settings:
            lines.append(f"{baseline.name}: {baseline.settings}.")
    lines += ["", *_confidence_lines(results), "", *class_table(results.after.by_note)]
    return "\n".join(lines)


def _accuracy_table(results: Results, several_labels: bool) -> list[str]:
    """Format a table of any-label accuracy and, with several labels, accuracy over rows."""
    before = results.before
    rows = [
        ("", "notes correct", "rows correct"),
        (
            f"before training ({before.heads} random heads)",
            _mean_and_spread(before.any_label_accuracy),
            _mean_and_spread(before.accuracy),
        ),
    ]
    for baseline in results.baselines:
        of_notes = with_interval(baseline.any_label_accuracy)
        rows.append((baseline.name, of_notes, with_interval(baseline.accuracy)))
    after = results.after
    rows.append(
        ("this run", with_interval(after.by_note.accuracy), with_interval(after.by_row.accuracy))
    )
    if several_labels:
        # In a split by rows each note has one label, so the ceiling for notes is that for rows.
        of_notes = "100%" if results.split == "texts" else f"{results.test_ceiling:.1%}"
        rows.append(("possible at best", of_notes, f"{results.ceiling:.1%}"))
    lines = []
    for name, of_notes, of_rows in rows:
        line = f"{name:<34} {of_notes:<24}"
        if several_labels:
            line += f" {of_rows}"
        lines.append(line.rstrip())
    return lines


def warn_about(notes: int, trained_on: int, in_training: int) -> list[str]:
    """Write one line for each reason not to draw conclusions from measures.

    Args:
        notes: Number of notes measured.
        trained_on: Number of these notes that the run was trained or calibrated on.
        in_training: Number of these notes whose text is also in the training split.
    """
    lines = []
    if notes < FEWEST_TEST:
        lines.append(f"Fewer than {FEWEST_TEST} notes: no conclusion is possible.")
    if trained_on:
        lines.append(
            f"NOT A TEST: the run was trained or calibrated on {trained_on:,} of these notes"
        )
    if in_training:
        lines.append(f"{in_training:,} of these notes' texts are also among the training notes")
    return lines


def class_table(measures: Measures) -> list[str]:
    """Format the measures of each class as the lines of a table."""
    longest_label = max(len(one_class.label) for one_class in measures.classes)
    width = max(30, longest_label)
    lines = [
        "Precision: of the notes predicted as a class, the share that is of it. Recall: of the",
        "notes of a class, the share predicted as it. A correct note is of its predicted class; an",
        "incorrect note with k labels counts as 1/k in each of them.",
        f"{'class':<{width}} {'precision':<20} {'recall':<20} {'F1':<20} {'notes':>7}",
    ]
    lines += [_class_line(one_class, width) for one_class in measures.classes]
    lines.append(f"{'mean F1 of the classes':<{width}} {with_interval(measures.macro_f1)}")
    return lines


def _class_line(measures: ClassMeasures, width: int) -> str:
    label = measures.label
    precision = with_interval(measures.precision)
    recall = with_interval(measures.recall)
    f1 = with_interval(measures.f1)
    support = f"{measures.support:,.1f}".removesuffix(".0")
    return f"{label:<{width}} {precision:<20} {recall:<20} {f1:<20} {support:>7}"


def write_report(
    folder: Path,
    results: Results,
    answers: Answers,
    notes: Sequence[Note],
    *,
    token_limit: int,
    about: str,
    steps: Sequence[dict] = (),
    show_text: bool = False,
) -> None:
    """Write ``metrics.json``, ``report.md`` and its figures into a folder; create it if missing.

    Args:
        folder: Where to write.
        results: The measures.
        answers: The predictions for each note.
        notes: The notes that were measured.
        token_limit: The most tokens of a note that were read.
        about: A sentence on the notes.
        steps: The lines of ``metrics.jsonl``, for the training figure.
        show_text: Whether to quote the beginning of each note with an incorrect prediction.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mistakes = find_mistakes(answers, notes, results.labels)
    metrics = {"schema": METRICS_SCHEMA, "about": about, **_plain(results), "mistakes": mistakes}
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / METRICS, text.encode())

    figures = _figures(results, answers, token_limit, steps)
    for name, figure in figures.items():
        write_atomically(folder / f"{name}.png", png(figure))
    excerpts = {note.sha256: note.text for note in notes} if show_text else {}
    # In a code block, so that no class name or note is rendered as Markdown or HTML.
    listed = ["```", *(_mistake(mistake, excerpts) for mistake in mistakes), "```"]
    parts = [
        f"# Report\n\n{about}",
        f"```\n{results_table(results)}\n```",
        *(f"![{name}]({name}.png)" for name in figures),
        f"## The most confident mistakes ({len(mistakes)})",
        "\n".join(listed),
    ]
    write_atomically(folder / "report.md", ("\n\n".join(parts) + "\n").encode())


def _figures(
    results: Results, answers: Answers, token_limit: int, steps: Sequence[dict]
) -> dict[str, Figure]:
    """Draw the figures of a report, by the names of their files."""
    confusion = results.after.by_note.confusion
    figures = {"confusion": confusion_figure(confusion, results.labels)}
    answered = results.after.answered
    if answered is not None:
        figures["reliability"] = reliability_figure(answers.confidence, answers.correct)
        figures["coverage"] = coverage_figure(
            answers.confidence, answers.correct, answered.threshold, answered.promise
        )
    figures["length"] = length_figure(answers.tokens, answers.correct, token_limit)
    if steps:
        validations = [step for step in steps if "validation_loss" in step]
        figures["training"] = training_figure(steps, validations)
    return figures


def find_mistakes(answers: Answers, notes: Sequence[Note], labels: Sequence[str]) -> list[dict]:
    """List the most confident incorrect predictions, without the notes' text."""
    calibrated = answers.confidence is not None
    certainty = answers.confidence if calibrated else answers.top
    most_certain_first = np.argsort(-certainty, kind="stable").tolist()
    incorrect = [i for i in most_certain_first if not answers.correct[i]]
    mistakes = []
    for i in incorrect[:MISTAKES]:
        mistakes.append(
            {
                "sha256": notes[i].sha256,
                "named": labels[answers.predicted[i]],
                "filed": [labels[label] for label in notes[i].labels],
                "confidence": float(answers.confidence[i]) if calibrated else None,
                "probability": float(answers.top[i]),
                "tokens": int(answers.tokens[i]),
            }
        )
    return mistakes


def read_steps(path: Path) -> list[dict]:
    """Read the lines of ``metrics.jsonl``; an empty list if there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def png(figure: Figure) -> bytes:
    """Render a figure as the bytes of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _confidence_lines(results: Results) -> list[str]:
    """Describe how well the confidence is calibrated, and what the threshold does."""
    after = results.after
    answered = after.answered
    if answered is None:
        return [
            "Not calibrated (too few validation notes): no confidence is claimed, and no note is "
            "referred because of it."
        ]
    over = after.overconfidence
    error = after.calibration_error.value
    top = after.top_calibration_error.value
    lines = [
        f"Mean confidence minus the share correct: {in_points(over.value)} points "
        f"[{in_points(over.low)}, {in_points(over.high)}].",
        f"Expected calibration error (10 bins): {error:.1%}; of the uncalibrated largest "
        f"probability: {top:.1%}.",
    ]
    if answered.accuracy is None:
        lines.append("No note reaches the threshold: every note is referred to a person.")
        return lines
    coverage = answered.coverage.value
    lines += [
        f"Answered at a confidence of {answered.threshold:.1%} or more: {coverage:.1%} of the "
        f"notes, {with_interval(answered.accuracy)} of them correct "
        f"(target: {answered.promise:.0%}).",
        f"The other {1 - coverage:.1%} are referred to a person.",
    ]
    return lines


def _mistake(mistake: dict, excerpts: dict[str, str]) -> str:
    certainty = mistake["confidence"]
    if certainty is None:
        certainty = mistake["probability"]
    line = (
        f"{certainty:.1%} predicted: {mistake['named']}; labels: {', '.join(mistake['filed'])}; "
        f"{mistake['tokens']:,} tokens; sha256 {mistake['sha256'][:16]}"
    )
    excerpt = " ".join(excerpts.get(mistake["sha256"], "")[:EXCERPT].split())
    return f"{line}\n    {excerpt}" if excerpt else line


def with_interval(share: Estimate) -> str:
    """Format a share and its 95% interval in percent."""
    return f"{share.value:.1%} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _mean_and_spread(shares: tuple[float, float]) -> str:
    mean, spread = shares
    return f"{mean:.1%} ± {spread:.1%}"


def in_points(difference: float) -> str:
    """Format a difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}"


def _plain(value: object) -> object:
    """Convert measures to JSON's types; an estimate becomes an object of value, low and high."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


# --- reading the files ----------------------------------------------------------------------------


class ReportError(ValueError):
    """A file of a report is damaged, or another version of Clinora wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The measures in ``metrics.json`` that a model card shows.

    Attributes:
        about: A sentence on the file of the notes.
        notes: Number of notes measured.
        trained_on: Number of these notes that the run was trained or calibrated on.
        in_training: Number of these notes whose text is also in the training split.
        accuracy: Any-label accuracy.
        row_accuracy: Accuracy over the rows of the file.
        best_row_accuracy: The largest that any function of the text can have on these rows.
        before: Any-label accuracy of the base: the mean over random heads, the standard deviation.
        baselines: Any-label accuracy of simpler classifiers, by their names.
        against: Accuracy minus that of the best linear model on TF-IDF, paired; None without one.
        overconfidence: Mean confidence minus the share correct; None without calibration.
        promise: The share of the answered notes that should be correct; None without calibration.
        coverage: The share of the notes that are answered; None without calibration.
        answered_accuracy: The share of the answered notes that is correct; None if there is none.
        classes: Precision and recall of each class, by its name.
    """

    about: str
    notes: int
    trained_on: int
    in_training: int
    accuracy: Estimate
    row_accuracy: Estimate
    best_row_accuracy: float
    before: tuple[float, float]
    baselines: dict[str, Estimate]
    against: Estimate | None
    overconfidence: Estimate | None
    promise: float | None
    coverage: Estimate | None
    answered_accuracy: Estimate | None
    classes: dict[str, tuple[Estimate, Estimate]]

    @property
    def tf_idf(self) -> Estimate | None:
        """Any-label accuracy of the best linear model on TF-IDF; None without one."""
        found = [share for name, share in self.baselines.items() if is_tf_idf(name)]
        return max(found, default=None)


def is_tf_idf(baseline: str) -> bool:
    """Tell whether a baseline is a linear model on TF-IDF; older reports have two of them."""
    return baseline.startswith("TF-IDF")


def read_measured(folder: Path) -> Measured:
    """Read the measures from ``metrics.json`` in a report's folder.

    Raises:
        FileNotFoundError: There is no such file.
        ReportError: It is damaged, or another version of Clinora wrote it.
    """
    path = folder / METRICS
    values = _read_json(path, METRICS_SCHEMA)
    try:
        after = values["after"]
        answered = after["answered"] or {}
        return Measured(
            about=str(values["about"]),
            notes=int(values["notes"]),
            trained_on=int(values["trained_on"]),
            in_training=int(values["in_training"]),
            accuracy=_estimate(after["by_note"]["accuracy"]),
            row_accuracy=_estimate(after["by_row"]["accuracy"]),
            best_row_accuracy=float(values["test_ceiling"]),
            before=tuple(map(float, values["before"]["any_label_accuracy"])),
            baselines={
                str(baseline["name"]): _estimate(baseline["any_label_accuracy"])
                for baseline in values["baselines"]
            },
            against=_estimate(values["against"]),
            overconfidence=_estimate(after["overconfidence"]),
            promise=float(answered["promise"]) if answered else None,
            coverage=_estimate(answered.get("coverage")),
            answered_accuracy=_estimate(answered.get("accuracy")),
            classes={
                str(one_class["label"]): (
                    _estimate(one_class["precision"]),
                    _estimate(one_class["recall"]),
                )
                for one_class in after["by_note"]["classes"]
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path}: a value is missing or has the wrong type ({error}): `clinora eval` writes a "
            "new report"
        ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossValidation:
    """Measures over all notes of a file, each predicted by a training without it.

    Attributes:
        about: A sentence on the file of the notes.
        notes: Number of notes.
        folds: Number of trainings.
        before: Any-label accuracy of the base, the mean over random heads.
        accuracy: Any-label accuracy of the trained classifiers.
        of_folds: The same in each fold.
        tf_idf: Any-label accuracy of the linear model on TF-IDF.
        tf_idf_of_folds: The same in each fold.
        against: ``accuracy`` minus ``tf_idf``, paired.
    """

    about: str
    notes: int
    folds: int
    before: float
    accuracy: Estimate
    of_folds: tuple[float, ...]
    tf_idf: Estimate
    tf_idf_of_folds: tuple[float, ...]
    against: Estimate


def write_cross_validation(folder: Path, measures: CrossValidation) -> None:
    """Write ``cross_validation.json`` into a folder.

    Raises:
        OSError: The folder cannot be written.
    """
    values = {"schema": CROSS_VALIDATION_SCHEMA, **_plain(measures)}
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / CROSS_VALIDATION, text.encode())


def read_cross_validation(folder: Path) -> CrossValidation:
    """Read what ``write_cross_validation`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ReportError: It is damaged, or another version of Clinora wrote it.
    """
    path = folder / CROSS_VALIDATION
    values = _read_json(path, CROSS_VALIDATION_SCHEMA)
    try:
        return CrossValidation(
            about=str(values["about"]),
            notes=int(values["notes"]),
            folds=int(values["folds"]),
            before=float(values["before"]),
            accuracy=_estimate(values["accuracy"]),
            of_folds=tuple(map(float, values["of_folds"])),
            tf_idf=_estimate(values["tf_idf"]),
            tf_idf_of_folds=tuple(map(float, values["tf_idf_of_folds"])),
            against=_estimate(values["against"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path}: a value is missing or has the wrong type ({error})") from None


def _read_json(path: Path, schema: int) -> dict:
    """Read a JSON object of a schema."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict) or values.get("schema") != schema:
        raise ReportError(f"{path}: expected an object with schema {schema}")
    return values


def _estimate(values: dict | None) -> Estimate | None:
    if values is None:
        return None
    return Estimate(*(float(values[field]) for field in Estimate._fields))
