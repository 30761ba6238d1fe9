"""What a run says of itself: tables for the terminal, ``report/`` for the folder."""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from clinora.checkpoint import write_atomically
from clinora.classifier import Classifier
from clinora.evaluation import Answers, Estimate, Measures, Results
from clinora.figures import (
    confusion_figure,
    coverage_figure,
    length_figure,
    reliability_figure,
    training_figure,
)
from clinora.lora import count_parameters
from clinora.notes import Note

METRICS_SCHEMA = 1
MISTAKES = 20
EXCERPT = 300  # characters of a mistaken note, where its text is asked for


def model_table(classifier: Classifier) -> str:
    """Describe a classifier's model, adapter and head, a line each."""
    model = classifier.model
    config, lora, count = model.model.config, model.lora_config, count_parameters(model)
    heads = f"{config.num_attention_heads} heads, {config.num_key_value_heads} for keys and values"
    rows = {
        "model type": "Llama decoder with a sequence classification head",
        "base": model.source.name,
        "parameters": f"{count.total:,}",
        "layers": f"{config.num_hidden_layers} decoder layers, {heads}",
        "width": f"{config.hidden_size:,} (MLP {config.intermediate_size:,})",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "positions": f"rotary, up to {config.max_position_embeddings:,}; "
        f"{classifier.token_limit:,} tokens of a note are read",
        "activation": "SiLU, gated",
        "norm": f"RMSNorm, eps {config.rms_norm_eps:g}",
        "LoRA": f"{', '.join(lora.targets)}; rank {lora.rank}, alpha {lora.alpha:g}, "
        f"dropout {lora.dropout:g}",
        "head": f"Linear({config.hidden_size} → {len(classifier.labels)})",
        "trainable": f"{count.trainable:,} parameters, {count.trainable / count.total:.3%}: "
        f"{count.lora:,} LoRA, {count.other:,} head",
    }
    return "\n".join(f"  {name:<12} {value}" for name, value in rows.items())


def results_table(results: Results) -> str:
    """Say how right the run is, beside its base, simpler classifiers and what is possible."""
    after, before = results.after, results.before
    rows = [
        (
            f"before training ({before.heads} random heads)",
            f"{before.any_label_accuracy[0]:.1%} ± {before.any_label_accuracy[1]:.1%}",
            f"{before.accuracy[0]:.1%} ± {before.accuracy[1]:.1%}",
        ),
        *((b.name, _say(b.any_label_accuracy), _say(b.accuracy)) for b in results.baselines),
        ("this run", _say(after.by_note.accuracy), _say(after.by_row.accuracy)),
        (
            "possible at best",
            "100%" if results.split == "texts" else f"{results.test_ceiling:.1%}",
            f"{results.ceiling:.1%}",
        ),
    ]
    lines = [
        f"{results.notes:,} notes, filed in {results.rows:,} rows{_seen(results)}",
        "",
        f"{'':<34} {'notes right':<24} {'rows right':<24}".rstrip(),
        *(f"{name:<34} {notes:<24} {of_rows:<24}".rstrip() for name, notes, of_rows in rows),
        "",
        "A note is right when it is filed under the class named. A row has one label: a text filed",
        "under two classes is wrong in one of its rows whatever is answered, so no function of the",
        f"text is right in more than {results.ceiling:.1%} of the file's rows of these classes, or",
        f"in {results.test_ceiling:.1%} of those measured here. In brackets: 95% intervals.",
        "After ±: the standard deviation between the random heads.",
    ]
    if results.against is not None:
        value, low, high = (100 * x for x in results.against)
        lines += [
            f"Against the better TF-IDF baseline: {value:+.1f} points of the notes right "
            f"[{low:+.1f}, {high:+.1f}].",
        ]
    lines += ["", *_confidence_lines(results), "", *class_table(after.by_note)]
    return "\n".join(lines)


def class_table(measures: Measures) -> list[str]:
    """Put each class's figures into lines of a table."""
    width = max(30, *(len(c.label) for c in measures.classes))
    lines = [
        "Precision: of what is named so, the share right. Recall: of what is filed so, the share",
        "named so. A right note counts in the named class, a wrong one of k classes 1/k in each.",
        f"{'class':<{width}} {'precision':<20} {'recall':<20} {'F1':<20} {'notes':>7}",
    ]
    for c in measures.classes:
        figures = " ".join(f"{_say(e):<20}" for e in (c.precision, c.recall, c.f1))
        support = f"{c.support:,.1f}".removesuffix(".0")
        lines.append(f"{c.label:<{width}} {figures} {support:>7}")
    lines.append(f"{'mean F1 of the classes':<{width}} {_say(measures.macro_f1)}")
    return lines


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
    """Write ``metrics.json``, ``report.md`` and its figures into a folder, made if need be.

    Args:
        folder: Where to.
        results: What was measured.
        answers: What the classifier said of each note.
        notes: The notes measured on.
        token_limit: How many tokens of a note were read.
        about: A sentence on the notes.
        steps: The lines of ``metrics.jsonl``, for the figure of training.
        show_text: Whether to quote the beginnings of mistaken notes.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mistakes = find_mistakes(answers, notes, results.labels)
    metrics = {"schema": METRICS_SCHEMA, "about": about, **_plain(results), "mistakes": mistakes}
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "metrics.json", text.encode())

    figures = {"confusion": confusion_figure(results.after.by_note.confusion, results.labels)}
    answered = results.after.answered
    if answered is not None:
        confidence = answers.confidence, answers.right
        figures["reliability"] = reliability_figure(*confidence)
        figures["coverage"] = coverage_figure(*confidence, answered.threshold, answered.promise)
    figures["length"] = length_figure(answers.tokens, answers.right, token_limit)
    if steps:
        validations = [step for step in steps if "validation_loss" in step]
        figures["training"] = training_figure(steps, validations)
    for name, figure in figures.items():
        write_atomically(folder / f"{name}.png", png(figure))
    excerpts = {note.sha256: note.text for note in notes} if show_text else {}
    parts = [
        f"# Report\n\n{about}",
        f"```\n{results_table(results)}\n```",
        *(f"![{name}]({name}.png)" for name in figures),
        f"## The most confident mistakes ({len(mistakes)})",
        # As code: nothing in a class name or a note is read as Markdown or HTML.
        "\n".join(("```", *(_mistake(mistake, excerpts) for mistake in mistakes), "```")),
    ]
    write_atomically(folder / "report.md", ("\n\n".join(parts) + "\n").encode())


def find_mistakes(answers: Answers, notes: Sequence[Note], labels: Sequence[str]) -> list[dict]:
    """List the wrong answers that were most confident, without the notes' text."""
    sure = answers.top if answers.confidence is None else answers.confidence
    wrong = [int(i) for i in np.argsort(-sure, kind="stable") if not answers.right[i]]
    return [
        {
            "sha256": notes[i].sha256,
            "named": labels[answers.named[i]],
            "filed": [labels[label] for label in notes[i].labels],
            "confidence": None if answers.confidence is None else float(answers.confidence[i]),
            "probability": float(answers.top[i]),
            "tokens": int(answers.tokens[i]),
        }
        for i in wrong[:MISTAKES]
    ]


def read_steps(path: Path) -> list[dict]:
    """Read ``metrics.jsonl``; nothing if it is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def png(figure: Figure) -> bytes:
    """Draw a figure as a PNG file's bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _confidence_lines(results: Results) -> list[str]:
    answered, after = results.after.answered, results.after
    if answered is None:
        return [
            "Not calibrated (too few validation notes): no confidence is claimed, and no note is "
            "referred."
        ]
    value, low, high = (100 * x for x in after.overconfidence)
    error, top = after.calibration_error.value, after.top_calibration_error.value
    lines = [
        f"Mean confidence minus the share right: {value:+.1f} points [{low:+.1f}, {high:+.1f}].",
        f"In tenths of the notes by confidence the two differ by {error:.1%} on average; had the",
        f"largest probability been taken for the confidence, by {top:.1%}.",
    ]
    if answered.accuracy is None:
        return [*lines, "The threshold was never reached: every note is referred to a person."]
    return [
        *lines,
        f"Answered at a confidence of {answered.threshold:.1%} or more: "
        f"{answered.coverage.value:.1%} of the notes, {_say(answered.accuracy)} of them right "
        f"(promised: {answered.promise:.0%}).",
        f"The other {1 - answered.coverage.value:.1%} are referred to a person.",
    ]


def _seen(results: Results) -> str:
    seen, same, said = results.trained_on, results.in_training, ""
    if seen:
        said += f"\nNOT A TEST: the run was trained or calibrated on {seen:,} of these notes"
    if same:
        said += f"\n{same:,} of these notes' texts also stand among the training notes"
    return said


def _mistake(mistake: dict, excerpts: dict[str, str]) -> str:
    sure = mistake["probability"] if mistake["confidence"] is None else mistake["confidence"]
    line = (
        f"{sure:.1%} {mistake['named']}; filed under {', '.join(mistake['filed'])}; "
        f"{mistake['tokens']:,} tokens; sha256 {mistake['sha256'][:16]}"
    )
    excerpt = " ".join(excerpts.get(mistake["sha256"], "")[:EXCERPT].split())
    return f"{line}\n    {excerpt}" if excerpt else line


def _say(estimate: Estimate) -> str:
    value, low, high = estimate
    return f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _plain(value: object) -> object:
    """Turn measures into what JSON holds; an estimate becomes value, low and high."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
