"""What a run says of itself: tables for the terminal, ``report/`` for the folder."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from clinora.checkpoint import write_atomically
from clinora.classifier import Classifier
from clinora.evaluation import Evaluation, RandomHeads
from clinora.figures import confusion_figure
from clinora.lora import count_parameters


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


def results_table(
    labels: Sequence[str], evaluation: Evaluation, before: RandomHeads | None = None
) -> str:
    """Put accuracy, before and after, and each class's measures into a table."""
    lines = []
    if before is not None:
        lines += [
            f"Before training: {before.any_label_accuracy:.1%} of the notes right "
            f"(mean of {before.heads} random heads, ± {before.spread:.1%}); "
            f"{before.accuracy:.1%} of the rows",
        ]
    lines += [
        f"After training:  {evaluation.any_label_accuracy:.1%} of the notes right "
        f"({evaluation.notes:,} notes; one of a note's labels is named); "
        f"{evaluation.accuracy:.1%} of the {evaluation.rows:,} rows (the row's own label)",
        "",
        f"{'class (by rows)':<30} {'precision':>9} {'recall':>9} {'F1':>9} {'rows':>7}",
    ]
    measures = (evaluation.precision, evaluation.recall, evaluation.f1, evaluation.support)
    for label, precision, recall, f1, rows in zip(labels, *measures, strict=True):
        lines.append(f"{label:<30} {precision:>9.1%} {recall:>9.1%} {f1:>9.1%} {rows:>7,}")
    return "\n".join(lines)


def write_report(
    folder: Path,
    labels: Sequence[str],
    evaluation: Evaluation,
    before: RandomHeads | None = None,
    about: str = "",
) -> None:
    """Write ``metrics.json``, ``report.md`` and ``confusion.png`` into a folder, made if need be.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "schema": 1,
        "labels": list(labels),
        "before": before and asdict(before),
        "after": asdict(evaluation),
    }
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    picture = io.BytesIO()
    confusion_figure(evaluation.confusion, labels).savefig(picture, format="png", dpi=150)
    write_atomically(folder / "confusion.png", picture.getvalue())
    table = results_table(labels, evaluation, before)
    text = f"# Report\n\n{about}\n\n```\n{table}\n```\n\n![confusion matrix](confusion.png)\n"
    write_atomically(folder / "report.md", text.encode())
