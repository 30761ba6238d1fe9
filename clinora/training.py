"""The training loop: plain PyTorch with automatic mixed precision.

Shapes: N notes, B batch, C classes.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clinora.classifier import Classifier, autocast, group_by_length, pad
from clinora.notes import Note


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How to train; each field is a flag of ``train.py``.

    Raises:
        ValueError: A number is out of its range.
    """

    steps: int = field(default=300, metadata={"help": "optimiser steps"})
    tokens_per_step: int = field(default=8192, metadata={"help": "tokens of a padded batch"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak, after the warm-up"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    seed: int = field(default=0, metadata={"help": "of head, LoRA, order and dropout"})

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: expected 0 or more and less than 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}: expected 0 or more")


def batches(lengths: Sequence[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """Deal notes into batches, epoch after epoch, for ever, in an order that the seed decides.

    A batch holds notes of like length, so that little is padded: each epoch is shuffled, cut into
    stretches of some batches, sorted within each stretch, and its batches shuffled again.

    Args:
        lengths: (N,) tokens of each note.
        tokens: The most that a padded batch may hold; a longer note stands alone.
        seed: Of the shuffling.

    Yields:
        Positions in ``lengths``.
    """
    draw = torch.Generator().manual_seed(seed)
    stretch = max(1, 16 * tokens * len(lengths) // sum(lengths))  # notes in about 16 batches
    while True:
        order = torch.randperm(len(lengths), generator=draw).tolist()
        epoch = []
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            groups = group_by_length([lengths[i] for i in part], tokens)
            epoch += [[part[i] for i in group] for group in groups]
        for i in torch.randperm(len(epoch), generator=draw).tolist():
            yield epoch[i]


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak at a step from 1 on: linear warm-up, then a cosine down to 0."""
    warmup = round(config.warmup * config.steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup - 1) / max(1, config.steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def soft_targets(notes: Sequence[Note], classes: int) -> Tensor:
    """Give a note under k classes the target 1/k for each of them: (N, C)."""
    targets = torch.zeros(len(notes), classes)
    for row, note in zip(targets, notes, strict=True):
        row[list(note.labels)] = 1 / len(note.labels)
    return targets


def train(
    classifier: Classifier, notes: Sequence[Note], config: TrainingConfig, metrics: Path
) -> None:
    """Train what ``apply_lora`` left trainable in the classifier's model.

    Args:
        classifier: Its model is trained in place.
        notes: What to train on.
        config: How.
        metrics: A file for a JSON line a step: step, loss, learning rate, notes, tokens, seconds.

    Raises:
        ValueError: There are no notes.
        FloatingPointError: The loss is not finite.
        OSError: The file cannot be written.
    """
    if not notes:
        raise ValueError("there are no notes to train on")
    model = classifier.model
    device = model.score.weight.device
    torch.manual_seed(config.seed)
    ids = [classifier.tokenizer.encode(note.text, classifier.token_limit) for note in notes]
    targets = soft_targets(notes, len(classifier.labels)).to(device)  # (N, C)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    half = model.model.embed_tokens.weight.dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half)  # float16 gradients underflow
    order = batches([len(note) for note in ids], config.tokens_per_step, config.seed)
    model.train()
    began = time.perf_counter()
    with (
        metrics.open("w", encoding="utf-8") as log,
        tqdm(total=config.steps, desc="training", unit="step") as bar,
    ):
        for step, batch in zip(range(1, config.steps + 1), order, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_factor(step, config)
            with autocast(model):
                logits = model(*pad([ids[i] for i in batch], device))  # (B, C)
            loss = F.cross_entropy(logits.float(), targets[batch])
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {step}: try a lower --learning-rate or "
                    "--precision fp32"
                )
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trainable, config.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            point = {
                "step": step,
                "loss": loss.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "notes": len(batch),
                "tokens": sum(len(ids[i]) for i in batch),
                "seconds": round(time.perf_counter() - began, 3),
            }
            log.write(json.dumps(point) + "\n")
            bar.set_postfix(loss=f"{point['loss']:.3f}", refresh=False)
            bar.update()
    model.eval()
    model.head_trained = True
