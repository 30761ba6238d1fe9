"""The training loop: plain PyTorch with automatic mixed precision, on one process or several.

A step is a *global batch*: ``accumulate`` batches on each process. Its loss is the sum over all
its notes divided by their number, so how they are dealt to batches and processes changes nothing
but rounding.

Whatever decides the next step is in a checkpoint: the trained parameters, AdamW's moments, the
scaler, the place in the order of notes, every random state. A run that was killed and resumed
ends with the bits of one that was not.

Shapes: N notes, B batch, C classes.
"""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clinora.calibration import FEWEST_VALIDATION
from clinora.checkpoint import write_atomically
from clinora.classifier import Classifier, group_by_length, pad
from clinora.device import summed, world
from clinora.notes import Note, are_correct, soft_targets, text_sha256
from clinora.resume import State

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How to train; each field is a flag of ``train.py``.

    Raises:
        ValueError: A number is out of its range.
    """

    steps: int = field(default=200, metadata={"help": "optimiser steps"})
    tokens_per_batch: int = field(
        default=8192, metadata={"help": "the most tokens of a padded batch on each process"}
    )
    accumulate: int = field(default=1, metadata={"help": "batches of a step on each process"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak, after the warm-up"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    validate_every: int = field(default=50, metadata={"help": "steps between validations"})
    patience: int = field(
        default=5, metadata={"help": "validations without a better one before training stops"}
    )
    checkpoint_every: int = field(default=50, metadata={"help": "steps between checkpoints"})
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations again: less memory, more time"}
    )
    seed: int = field(default=0, metadata={"help": "of head, LoRA, order and dropout"})

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_batch", "accumulate", "learning_rate", "clip",
                     "validate_every", "patience", "checkpoint_every"):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        if self.learning_rate > 1:
            raise ValueError(f"learning_rate is {self.learning_rate}: expected at most 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: expected 0 or more and less than 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}: expected 0 or more")


class InterruptedTraining(Exception):
    """A signal, the second argument, ended training after a step, whose checkpoint was written."""


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


def train(
    classifier: Classifier,
    notes: Sequence[Note],
    validation: Sequence[Note],
    config: TrainingConfig,
    run: Path,
    *,
    identity: dict | None = None,
    resume: bool = False,
) -> None:
    """Train what is trainable in the classifier's model; keep what validated best.

    Under torchrun every process calls this with the same arguments.

    Args:
        classifier: Its model is trained in place.
        notes: What to train on.
        validation: What to validate on; if there are fewer than 50, the last step's parameters
            are kept, and training does not stop early.
        config: How.
        run: The run's folder, for ``metrics.jsonl`` (a JSON line a step: step, loss, learning
            rate, notes, tokens, padding, seconds; at a validation its loss and accuracy) and
            ``checkpoint/``.
        identity: What else decides the result (data, base, LoRA): a checkpoint of another
            identity is refused.
        resume: Go on from the run's last whole checkpoint.

    Raises:
        ValueError: There are no notes.
        CheckpointError: There is no whole checkpoint, or it is of another data, config or base.
        FloatingPointError: The loss is not finite.
        InterruptedTraining: Ctrl-C or SIGTERM came.
        OSError: A file cannot be written; the last checkpoint, which it names, is whole.
    """
    if not notes:
        raise ValueError("there are no notes to train on")
    run.mkdir(parents=True, exist_ok=True)
    classifier.record_training([*notes, *validation], dataclasses.asdict(config))
    rank, processes = world()
    model, device = classifier.model, classifier.model.score.weight.device
    model.model.activation_checkpointing = config.activation_checkpointing
    ids, held_out = encode(classifier, notes), encode(classifier, validation)
    wanted = torch.from_numpy(soft_targets(notes, len(classifier.labels))).to(device)  # (N, C)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=config.weight_decay)
    # float16 gradients underflow without it
    scaler = torch.amp.GradScaler(device.type, enabled=classifier.dtype == torch.float16)
    torch.manual_seed(config.seed + rank)  # of dropout, which differs between processes
    order = text_sha256(" ".join(note.sha256 for note in [*notes, *validation]))
    identity = {"training": dataclasses.asdict(config), "processes": processes, "order": order} | (
        identity or {}
    )
    state = State(run / "checkpoint", trained, [optimizer], scaler, identity)
    if resume:
        state.load()
    parallel = model
    if processes > 1:  # averages gradients; init_sync would send the frozen base, too
        parallel = DistributedDataParallel(model, init_sync=False)
    each = config.accumulate * processes  # batches of a step
    dealer = batches([len(note) for note in ids], config.tokens_per_batch, config.seed)
    dealer = islice(dealer, state.step * each, None)

    log, stop = Log(run / METRICS, state, config.steps, silent=rank != 0), 0
    with naming_checkpoint(state), signals() as caught, log:
        while not stop and state.step < config.steps and state.worse < config.patience:
            model.train()
            step, dealt = state.step + 1, list(islice(dealer, each))
            count, mine = sum(map(len, dealt)), dealt[rank::processes]
            rate = config.learning_rate * learning_rate_factor(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses, padded = torch.zeros((), device=device), 0
            for batch in mine:
                inputs = pad([ids[n] for n in batch], device)
                waits = processes > 1 and batch is not mine[-1]  # the last shares the gradients
                with parallel.no_sync() if waits else nullcontext():
                    with classifier.autocast():
                        logits = parallel(*inputs)  # (B, C)
                    loss = F.cross_entropy(logits.float(), wanted[batch], reduction="sum") / count
                    scaler.scale(loss * processes).backward()  # averaging divides by processes
                losses += loss.detach()
                padded += inputs[0].numel()
            tokens = sum(len(ids[n]) for batch in dealt for n in batch)
            loss, padded, stop = summed([losses.item(), padded, len(caught)], device)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(trained.values(), config.clip).item()
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise FloatingPointError(  # of infinite scaled gradients the scaler takes care
                    f"the loss is {loss} and the gradient's norm {norm} at step {step}: try a "
                    f"lower --learning-rate or --precision fp32. {state.last_checkpoint()}"
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            state.step = step
            point = {"step": step, "loss": loss, "learning_rate": rate, "notes": count}
            point |= {"tokens": tokens, "padding": round(1 - tokens / padded, 4)}
            if validation and (step % config.validate_every == 0 or step == config.steps):
                point |= validate(classifier, validation, held_out)
                if len(validation) >= FEWEST_VALIDATION:
                    state.judge(point["validation_loss"])
            log(point)
            ended = step == config.steps or state.worse == config.patience
            if stop or ended or step % config.checkpoint_every == 0:
                log.sync()
                state.save()
        if not stop:  # a signal may have come since the last step's sum
            (stop,) = summed([len(caught)], device)
    if stop:
        number = caught[0] if caught else signal.SIGTERM  # another process caught it
        message = f"stopped after step {state.step}. {state.last_checkpoint()}"
        raise InterruptedTraining(message, number)
    state.keep_best()
    model.eval()
    model.head_trained = True


def encode(classifier: Classifier, notes: Sequence[Note]) -> list[Tensor]:
    """Tokenise notes, cut at the token limit: int32, a quarter of a list's memory or less."""
    encoded = (classifier.tokenizer.encode(note.text, classifier.token_limit) for note in notes)
    return [torch.tensor(ids, dtype=torch.int32) for ids in encoded]


def validate(classifier: Classifier, notes: Sequence[Note], ids: Sequence[Tensor]) -> dict:
    """Give mean loss (nats) and any-label accuracy; each process computes its share of notes."""
    rank, processes = world()
    notes, ids = notes[rank::processes], ids[rank::processes]
    loss = right = 0.0
    if notes:
        log_p = classifier.logits(ids).log_softmax(-1)  # (n, C)
        wanted = torch.from_numpy(soft_targets(notes, log_p.size(1)))
        loss = -(log_p * wanted).sum().item()
        named = log_p.argmax(-1).tolist()
        right = int(are_correct(notes, named).sum())
    loss, right, count = summed([loss, right, len(notes)], classifier.model.score.weight.device)
    return {"validation_loss": loss / count, "validation_accuracy": right / count}


# --- what a person sees -------------------------------------------------------------------------


class Log:
    """A line of ``metrics.jsonl`` and a stroke of the progress bar for each step.

    Args:
        path: The file. Of a resumed run it keeps the lines of the steps that the checkpoint has.
        state: Counts steps and seconds.
        steps: How many there will be.
        silent: Neither writes nor shows: every process but the first.
    """

    def __init__(self, path: Path, state: State, steps: int, silent: bool) -> None:
        self.path, self.state, self.steps, self.silent = path, state, steps, silent
        self.shown, self.last = {}, state.elapsed()

    def __enter__(self) -> "Log":
        if not self.silent:
            kept = []
            if self.state.step:  # a kill may have cut the last line, or left lines beyond
                kept = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomically(self.path, "".join(kept[: self.state.step]).encode())
            self.file = self.path.open("a", encoding="utf-8")
        self.bar = tqdm(  # now that nothing can fail: an error has a line of its own
            total=self.steps, initial=self.state.step, desc="training", unit="step",
            disable=self.silent,
        )  # fmt: skip
        return self

    def __call__(self, point: dict) -> None:
        """Tell of a step."""
        if self.silent:
            return
        seconds = self.state.elapsed()
        self.file.write(json.dumps(point | {"seconds": round(seconds, 3)}) + "\n")
        self.file.flush()
        rate, self.last = point["tokens"] / max(seconds - self.last, 1e-9), seconds
        self.shown |= {
            "loss": f"{point['loss']:.3f}",
            "tokens/s": f"{rate:,.0f}",
            "padding": f"{point['padding']:.0%}",
        }
        if "validation_loss" in point:
            self.shown["validation"] = f"{point['validation_loss']:.3f}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def sync(self) -> None:
        """Bring the lines to the disk: a checkpoint relies on those of its steps."""
        if not self.silent:
            os.fsync(self.file.fileno())

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if not self.silent:
            self.file.close()


@contextmanager
def naming_checkpoint(state: State) -> Iterator[None]:
    """Say which checkpoint is the last when a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{error}. {state.last_checkpoint()}") from error


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, for the loop to end after its step.

    A second Ctrl-C ends at once.
    """
    caught: list[int] = []

    def catch(number: int, _: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {n: signal.signal(n, catch) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
