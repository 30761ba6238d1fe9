"""The live lesson: 20 steps of LoRA on the bundled base and notes, then merging, with pictures.

This is the training alone. ``lesson_process.py`` runs it in a process of its own, so it uses
neither the served model nor the server's threads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clinora.classifier import Classifier
from clinora.lora import LoRAConfig, lora_layers, merge_lora
from clinora.notes import are_correct, read_notes
from clinora.training import Examples, Learner, TrainingConfig, divide, draw_notes, encode

STEPS = 20
TOKEN_LIMIT = 64  # so that a step takes a fraction of a second on one thread
SHOWN_LAYERS = 2  # their matrices are drawn
SEED = 0


@dataclass(frozen=True, slots=True)
class Moment:
    """The lesson after some of its steps.

    Attributes:
        step: Number of finished steps.
        losses: The mean loss of each finished step's notes (nats).
        norms: For each adapted layer by its name, ‖s·B·A‖ after 0, 1, … steps (Frobenius norms).
        matrices: For the first adapted layers by their names: A (r × in), B (out × r) and s·B·A.
    """

    step: int
    losses: list[float]
    norms: dict[str, list[float]]
    matrices: dict[str, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The classifier before training, after it, and after merging, on notes that it did not see.

    Attributes:
        notes: Number of test notes.
        losses: Their mean loss (nats) before training, after it, and after merging.
        accuracies: Their any-label accuracy at the same three times.
        difference: The largest difference of a probability between the last two.
    """

    notes: int
    losses: tuple[float, float, float]
    accuracies: tuple[float, float, float]
    difference: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean loss (nats), any-label accuracy and probabilities (N, C) of the test notes."""

    loss: float
    accuracy: float
    probabilities: Tensor


def teach() -> Iterator[Moment | Comparison]:
    """Train a new classifier, and show it before the first step and after each step.

    Yields:
        ``STEPS`` + 1 moments, then the comparison with the merged classifier.
    """
    notes = read_notes("bundled")
    classifier = Classifier.new(
        "bundled", notes.classes, LoRAConfig(), SEED,
        token_limit=TOKEN_LIMIT, device="cpu", precision="fp32",
    )  # fmt: skip
    training = encode(classifier, notes.on("training"))
    test = encode(classifier, notes.on("test"))
    config = TrainingConfig(steps=STEPS, notes_per_step=8, learning_rate=5e-3, seed=SEED)
    learner = Learner(classifier, config)
    notes_of_steps = draw_notes(len(training.notes), config)
    losses: list[float] = []
    norms: dict[str, list[float]] = {}
    yield _look(classifier, losses, norms)
    before = _measure(classifier, test)
    for step in range(1, STEPS + 1):
        batches = divide(training, next(notes_of_steps), config, learner.device)
        loss = learner.forward_and_backward(training, batches)
        learner.step(step, loss)  # AdamW, with a clipped gradient and a schedule of learning rates
        losses.append(loss)
        yield _look(classifier, losses, norms)
    yield _merge_and_compare(classifier, test, before)


@torch.no_grad()
def _look(classifier: Classifier, losses: list[float], norms: dict[str, list[float]]) -> Moment:
    """Measure every adapted layer: append its norm to ``norms``, and copy the first matrices."""
    matrices = {}
    for name, layer in lora_layers(classifier.model):
        A = layer.lora_A
        B = layer.lora_B
        update = layer.config.scaling * (B @ A)  # (out, in)
        norms.setdefault(name, []).append(update.norm().item())
        if len(matrices) < SHOWN_LAYERS:
            matrices[name] = (A.clone(), B.clone(), update)
    return Moment(
        step=len(losses),
        losses=list(losses),
        norms={name: list(values) for name, values in norms.items()},
        matrices=matrices,
    )


def _merge_and_compare(classifier: Classifier, test: Examples, before: Measured) -> Comparison:
    """Merge LoRA into the weights, for good, and compare the classifier with what it was."""
    separate = _measure(classifier, test)
    merge_lora(classifier.model)
    merged = _measure(classifier, test)
    results = (before, separate, merged)
    return Comparison(
        notes=len(test.notes),
        losses=tuple(result.loss for result in results),
        accuracies=tuple(result.accuracy for result in results),
        difference=(separate.probabilities - merged.probabilities).abs().max().item(),
    )


def _measure(classifier: Classifier, test: Examples) -> Measured:
    """Classify the test notes."""
    log_p = classifier.logits(test.ids).log_softmax(-1)  # (N, C)
    losses = -(log_p * test.targets).sum(-1)  # (N,)
    correct = are_correct(test.notes, log_p.argmax(-1).tolist())
    return Measured(losses.mean().item(), float(correct.mean()), log_p.exp())
