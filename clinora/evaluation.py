"""How right a classifier is, on notes that may be filed under several classes.

Shapes: N notes, D width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from clinora.classifier import Classifier
from clinora.lora import lora_disabled
from clinora.notes import Note


@dataclass(frozen=True, slots=True)
class RandomHeads:
    """How right the base is before training, under several random heads.

    Attributes:
        accuracy: Mean share of rows whose own label was named.
        any_label_accuracy: Mean share of notes for which one of their labels was named.
        spread: Standard deviation of ``any_label_accuracy`` between heads.
        heads: How many heads were drawn.
    """

    accuracy: float
    any_label_accuracy: float
    spread: float
    heads: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How right a classifier is.

    Attributes:
        accuracy: Share of rows whose own label was named.
        any_label_accuracy: Share of notes for which one of their labels was named.
        notes: How many notes.
        rows: How many rows of the file hold them.
        precision: Of each class, over rows: of those named so, the share filed so.
        recall: Of each class, over rows: of those filed so, the share named so.
        f1: Harmonic mean of the two.
        support: Rows of each class.
        confusion: (C, C) rows filed under the one class and named the other.
    """

    accuracy: float
    any_label_accuracy: float
    notes: int
    rows: int
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    support: tuple[int, ...]
    confusion: tuple[tuple[int, ...], ...]


def evaluate(classifier: Classifier, notes: Sequence[Note]) -> Evaluation:
    """Classify notes and compare with their labels.

    Raises:
        ValueError: There are no notes, or the head was never trained.
    """
    _require_notes(notes)
    named = np.array([p.index for p in classifier([note.text for note in notes])])
    return score(named, notes, len(classifier.labels))


def score(named: np.ndarray, notes: Sequence[Note], classes: int) -> Evaluation:
    """Compare the class named for each note (N,) with the labels under which it is filed."""
    accuracy, any_label = accuracies(named, notes)
    filed = np.array([label for note in notes for label in note.filed])
    named_by_row = np.repeat(named, [len(note.filed) for note in notes])
    every = list(range(classes))
    precision, recall, f1, support = precision_recall_fscore_support(
        filed, named_by_row, labels=every, zero_division=0.0
    )
    confusion = confusion_matrix(filed, named_by_row, labels=every)
    return Evaluation(
        accuracy=accuracy,
        any_label_accuracy=any_label,
        notes=len(notes),
        rows=len(filed),
        precision=tuple(precision.tolist()),
        recall=tuple(recall.tolist()),
        f1=tuple(f1.tolist()),
        support=tuple(support.tolist()),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def accuracies(named: np.ndarray, notes: Sequence[Note]) -> tuple[float, float]:
    """Shares of rows whose own label, and of notes one of whose labels, was named (N,)."""
    rows = [n == label for n, note in zip(named, notes, strict=True) for label in note.filed]
    any_label = [n in note.labels for n, note in zip(named, notes, strict=True)]
    return float(np.mean(rows)), float(np.mean(any_label))


def evaluate_random_heads(
    classifier: Classifier, notes: Sequence[Note], heads: int = 20, seed: int = 0
) -> RandomHeads:
    """Measure the base before training: its states under random heads, the adapter off.

    One random head says little: on few classes its accuracy is a matter of luck.

    Raises:
        ValueError: There are no notes, or the model has no LoRA layer.
    """
    _require_notes(notes)
    with lora_disabled(classifier.model):
        states = classifier.states([note.text for note in notes])  # (N, D)
    draw = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(heads):
        head = torch.randn(len(classifier.labels), states.size(1), generator=draw)  # (C, D)
        results.append(accuracies((states @ head.T).argmax(-1).numpy(), notes))
    accuracy, any_label = np.mean(results, axis=0)
    spread = np.std(results, axis=0, ddof=1)[1]
    return RandomHeads(float(accuracy), float(any_label), float(spread), heads)


def _require_notes(notes: Sequence[Note]) -> None:
    if not notes:
        raise ValueError("there are no notes to evaluate on")
