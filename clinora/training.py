"""The training loop: plain PyTorch with automatic mixed precision, on one process or several.

A step learns from ``notes_per_step`` notes, whatever their lengths. They are drawn at random
without replacement; when all notes have been drawn, drawing starts again. The loss of a step is the
mean of its notes' losses, so every note counts the same. The notes are divided among the processes,
and on each process into batches of similar length, whose gradients add up. This division changes
only rounding, and which inputs dropout sets to zero.

A checkpoint holds everything that determines the next step: the trained parameters, AdamW's
moments, the scaler, the number of finished steps and every random state. A run that was killed and
resumed ends with the same bits as one that was not.

Shapes: N notes, n of them on one process, B batch, C classes.
"""

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clinora.calibration import FEWEST_VALIDATION
from clinora.checkpoint import write_atomically
from clinora.classifier import Classifier, group_by_length, pad
from clinora.device import gathered, summed, world
from clinora.lora import layers_without_gradient
from clinora.notes import Note, are_correct, clean_text, ordinary_case, soft_targets, text_sha256
from clinora.resume import State
from clinora.run import RUN_FILE

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How to train; each field is a flag of ``train.py``.

    Attributes:
        steps: The most optimiser steps; training may stop early.
        notes_per_step: Notes that a step learns from, on all processes together.
        tokens_per_batch: The most tokens of a padded batch. Fewer need less memory. A note with
            more tokens is a batch by itself.
        learning_rate: AdamW's learning rate at its peak, after the warm-up.
        lora_plus_ratio: LoRA+ (Hayou et al. 2024, section 4): the learning rate of B, and of DoRA's
            magnitudes, is this many times that of A and of the head.
        warmup: Share of the steps in which the learning rate rises, from 0 to below 1.
        weight_decay: AdamW's weight decay, relative to the learning rate.
        clip: The gradient of all trained parameters is scaled down to at most this L2 norm.
        validate_every: Steps from one validation to the next.
        patience: Training stops after this many validations without a new best one.
        checkpoint_every: Steps from one checkpoint to the next.
        activation_checkpointing: Whether the backward pass recomputes the activations.
        seed: Seed of the head, LoRA, the order of the notes and dropout.

    Raises:
        ValueError: A number is out of its range.
    """

    steps: int = field(default=200, metadata={"help": "optimiser steps"})
    notes_per_step: int = field(
        default=16, metadata={"help": "notes that a step learns from, on all processes together"}
    )
    tokens_per_batch: int = field(
        default=8192,
        metadata={
            "help": "most tokens that go through the model at once; a step adds up the gradients "
            "of as many batches as its notes need, so fewer tokens need less memory"
        },
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "peak learning rate"})
    lora_plus_ratio: float = field(
        default=1.0, metadata={"help": "LoRA+: learning rate of B, as a multiple of A's"}
    )
    warmup: float = field(default=0.1, metadata={"help": "share of the steps for warm-up"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    validate_every: int = field(default=50, metadata={"help": "steps between validations"})
    patience: int = field(
        default=5, metadata={"help": "stop after this many validations without a new best one"}
    )
    checkpoint_every: int = field(default=50, metadata={"help": "steps between checkpoints"})
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations: less memory, more time"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the head, LoRA, order and dropout"})

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "notes_per_step",
            "tokens_per_batch",
            "learning_rate",
            "lora_plus_ratio",
            "clip",
            "validate_every",
            "patience",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: expected more than 0")
        if self.learning_rate > 1:
            raise ValueError(f"learning_rate is {self.learning_rate}: expected at most 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: expected 0 or more and less than 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}: expected 0 or more")


class InterruptedTraining(Exception):
    """A signal stopped training after a step, and a checkpoint was written.

    The arguments are a message and the signal's number.
    """


def train(
    classifier: Classifier,
    training: Sequence[Note],
    validation: Sequence[Note],
    config: TrainingConfig,
    run_folder: str | Path,
    *,
    identity: dict | None = None,
    resume: bool = False,
) -> None:
    """Train the trainable parameters of the classifier's model and keep the best ones.

    The best parameters are those with the lowest validation loss. With fewer than 50 validation
    notes, training keeps the last parameters and does not stop early. Under torchrun, every process
    calls this with the same arguments.

    Args:
        classifier: Its model is trained in place.
        training: Notes to learn from.
        validation: Notes to validate on; may be empty.
        config: How to train.
        run_folder: The folder for ``metrics.jsonl`` and ``checkpoint/``. The file holds a JSON
            object per step: step, loss (nats), learning rate, notes, tokens, share of padding,
            seconds, and after a validation its loss and accuracy.
        identity: What else determines the result: the base, and how LoRA adapts it. A checkpoint
            with another identity is refused.
        resume: Whether to continue from the run's last intact checkpoint.

    Raises:
        ValueError: There are no training notes, a label is not one of the classifier's, a step has
            fewer notes than there are processes, or the folder holds a run but ``resume`` is False.
        CheckpointError: All checkpoints are damaged, or they belong to other data, another
            configuration, another classifier or another version of this loop.
        FloatingPointError: The loss or the gradient is not finite.
        InterruptedTraining: Ctrl-C or SIGTERM stopped training.
        OSError: A file cannot be written. The message names the last checkpoint, which is intact.
    """
    run_folder = Path(run_folder)
    check_notes(classifier, training, validation)
    check_processes(config)
    check_folder(run_folder, resume)
    classifier.record_training([*training, *validation], dataclasses.asdict(config))
    seed_dropout(config.seed)
    examples = encode(classifier, training)
    held_out = encode(classifier, validation)
    learner = Learner(classifier, config)
    identity = identify(classifier, training, validation, config) | (identity or {})
    state = State(
        run_folder / "checkpoint", learner.trained, [learner.optimizer], learner.scaler, identity
    )
    if resume:
        state.load()
    notes_of_steps = islice(draw_notes(len(training), config), state.step, None)
    with (
        naming_checkpoint(state),
        Interruption(learner.device) as interruption,
        Log(run_folder / METRICS, state, config.steps) as log,
    ):
        while not finished(state, config) and not interruption.requested():
            batches = divide(examples, next(notes_of_steps), config, learner.device)
            loss = learner.forward_and_backward(examples, batches)
            learning_rate = learner.step(state.step + 1, loss)
            state.step += 1

            metrics = {"step": state.step, "loss": loss, "learning_rate": learning_rate}
            metrics |= count_tokens(examples, batches)
            if held_out.notes and validation_is_due(state, config):
                metrics |= validate(classifier, held_out)
                if len(held_out.notes) >= FEWEST_VALIDATION:
                    state.keep_if_best(metrics["validation_loss"])
            log.write(metrics)
            if checkpoint_is_due(state, config):
                save(state, log)
        # Even after the last step: what follows training may take long.
        if interruption.requested():
            save(state, log)
            message = f"stopped after step {state.step}. {state.last_checkpoint()}"
            raise InterruptedTraining(message, interruption.number)
    state.keep_best()
    classifier.model.eval()
    classifier.model.head_trained = True


# --- before the first step ----------------------------------------------------------------------


def check_notes(
    classifier: Classifier, training: Sequence[Note], validation: Sequence[Note]
) -> None:
    """Check that there are training notes and that the classifier has all labels of the notes.

    Raises:
        ValueError: One of these fails. The message gives the note's position, never its text.
    """
    if not training:
        raise ValueError("there are no training notes: expected at least one")
    classes = len(classifier.labels)
    for split, notes in (("training", training), ("validation", validation)):
        for position, note in enumerate(notes):
            if not note.labels:
                raise ValueError(f"{split} note {position} has no label: expected one or more")
            if min(note.labels) < 0 or max(note.labels) >= classes:
                raise ValueError(
                    f"{split} note {position} has the labels {note.labels}, but the classifier has "
                    f"the labels 0 to {classes - 1}: create the classifier with the classes of the "
                    "notes"
                )


def check_processes(config: TrainingConfig) -> None:
    """Check that every process gets a note of each step.

    Raises:
        ValueError: A step has fewer notes than there are processes.
    """
    _, processes = world()
    if config.notes_per_step < processes:
        raise ValueError(
            f"notes_per_step is {config.notes_per_step}, but there are {processes} processes: "
            "expected at least one note for each"
        )


def check_folder(run_folder: Path, resume: bool) -> None:
    """Check that training would not write over another run.

    Raises:
        ValueError: The folder holds a run, and it is not to be resumed.
    """
    holds_run = (run_folder / METRICS).exists() or (run_folder / RUN_FILE).exists()
    # No process goes on, and writes, before all have looked.
    if any(gathered(holds_run)) and not resume:
        raise ValueError(f"{run_folder} holds a run: choose another folder, or resume the run")


def seed_dropout(seed: int) -> None:
    """Seed PyTorch's generators, differently on each process so that dropout differs."""
    rank, _ = world()
    torch.manual_seed(seed + rank)


def identify(
    classifier: Classifier,
    training: Sequence[Note],
    validation: Sequence[Note],
    config: TrainingConfig,
) -> dict[str, object]:
    """Give what determines the result, for checkpoints, except the base and LoRA.

    "order" is a hash of the notes and their labels, in their order.
    """
    _, processes = world()
    notes = [f"{note.sha256} {note.labels}" for note in [*training, *validation]]
    return {
        "training": dataclasses.asdict(config),
        "processes": processes,
        "order": text_sha256("\n".join(notes)),
        "labels": classifier.labels,
        "token_limit": classifier.token_limit,
        "precision": str(classifier.dtype).removeprefix("torch."),
        "quantization": classifier.quantization,
        "device": classifier.model.score.weight.device.type,
    }


@dataclass(frozen=True, slots=True)
class Examples:
    """Notes as the model reads them.

    Attributes:
        notes: The notes, in their order.
        ids: Token ids of each note, int32 to save memory: at most a quarter of a list's.
        targets: (N, C) float32, the share of each class.
    """

    notes: Sequence[Note]
    ids: Sequence[Tensor]
    targets: Tensor


def encode(classifier: Classifier, notes: Sequence[Note]) -> Examples:
    """Tokenise notes up to the token limit."""
    ids = []
    for note in notes:
        # As in prediction; notes from a file are already clean.
        text = ordinary_case(clean_text(note.text))
        tokens = classifier.tokenizer.encode(text, classifier.token_limit)
        ids.append(torch.tensor(tokens, dtype=torch.int32))
    shares = soft_targets(notes, len(classifier.labels))
    return Examples(notes, ids, torch.from_numpy(shares))


# --- the notes of a step, and their batches -----------------------------------------------------


def draw_notes(count: int, config: TrainingConfig) -> Iterator[list[int]]:
    """Draw the notes of each step at random, without end.

    A note is drawn again only when all others have been drawn, too.

    Args:
        count: Number of notes.
        config: Its ``notes_per_step`` and ``seed`` are used.

    Yields:
        ``notes_per_step`` positions from 0 to ``count`` − 1.
    """
    generator = torch.Generator().manual_seed(config.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < config.notes_per_step:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[: config.notes_per_step]
        del waiting[: config.notes_per_step]


Batches = list[list[list[int]]]  # [process][batch][row]: a position in Examples


def divide(
    examples: Examples, notes: Sequence[int], config: TrainingConfig, device: torch.device
) -> Batches:
    """Divide the notes of a step among the processes, and those of a process into batches.

    Each process gets notes of all lengths, so that none waits long for the others.

    Args:
        examples: All training notes.
        notes: Positions in ``examples``.
        config: Its ``tokens_per_batch`` is used.
        device: Where the batches are computed.

    Returns:
        The batches of each process.
    """
    _, processes = world()
    shortest_first = sorted(notes, key=lambda i: len(examples.ids[i]))
    batches = []
    for rank in range(processes):
        share = shortest_first[rank::processes]
        lengths = [len(examples.ids[i]) for i in share]
        groups = group_by_length(lengths, config.tokens_per_batch, device)
        batches.append([[share[i] for i in group] for group in groups])
    return batches


def count_tokens(examples: Examples, batches: Batches) -> dict[str, float]:
    """Count the notes and tokens of a step; padding is a share of its padded tokens."""
    notes = 0
    tokens = 0
    padded = 0
    for batch in chain.from_iterable(batches):
        lengths = [len(examples.ids[i]) for i in batch]
        notes += len(batch)
        tokens += sum(lengths)
        padded += len(batch) * max(lengths)
    return {"notes": notes, "tokens": tokens, "padding": round(1 - tokens / padded, 4)}


# --- forward and backward, step -----------------------------------------------------------------


class Learner:
    """Computes the gradient of a step's notes and updates the trained parameters.

    On several processes, DistributedDataParallel averages the gradients. In float16, a scaler keeps
    small gradients from becoming zero. Neither changes the definition of a step.

    Attributes:
        trained: The trainable parameters, by name.
        optimizer: AdamW for all trained parameters.
        scaler: Scales the loss; has no effect unless the compute dtype is float16.
        device: The model's device.
    """

    def __init__(self, classifier: Classifier, config: TrainingConfig) -> None:
        self.classifier = classifier
        self.config = config
        self.model = classifier.model
        self.model.model.activation_checkpointing = config.activation_checkpointing
        self.device = self.model.score.weight.device
        self.trained: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self.trained[name] = parameter
        self.optimizer = new_optimizer(self.trained, config)
        is_float16 = classifier.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_float16)
        self.rank, self.processes = world()
        self.parallel = self.model
        if self.processes > 1:
            # init_sync would send the frozen base to every process, which has it already.
            self.parallel = DistributedDataParallel(self.model, init_sync=False)

    def forward_and_backward(self, examples: Examples, batches: Batches) -> float:
        """Compute the gradient of a step's notes and return their mean loss (nats per note)."""
        self.model.train()
        mine = batches[self.rank]
        total = torch.zeros((), device=self.device)
        for batch in mine:
            is_last = batch is mine[-1]
            with self.averaging_gradients(is_last):
                loss = self.loss(examples, batch) / self.config.notes_per_step
                # Averaging divides the gradient by the number of processes, so multiply by it here.
                self.scaler.scale(loss * self.processes).backward()
            total += loss.detach()
        (loss,) = summed([total.item()], self.device)
        return loss

    def loss(self, examples: Examples, batch: Sequence[int]) -> Tensor:
        """Compute the sum of the cross-entropies of a batch's notes (nats)."""
        ids, lengths = pad([examples.ids[i] for i in batch], self.device)  # (B, T), (B,)
        with self.classifier.autocast():
            logits = self.parallel(ids, lengths)  # (B, C)
        shares = examples.targets[batch].to(self.device)  # (B, C)
        return F.cross_entropy(logits.float(), shares, reduction="sum")

    def averaging_gradients(self, is_last: bool) -> AbstractContextManager:
        """Give a context that averages gradients over the processes only at a step's last batch."""
        if self.processes > 1 and not is_last:
            return self.parallel.no_sync()
        return nullcontext()

    def step(self, number: int, loss: float) -> float:
        """Update the parameters with the clipped gradient and return the learning rate.

        Raises:
            FloatingPointError: The loss or the gradient is not finite. No parameter has changed.
        """
        if number == 1 and self.rank == 0:
            report_layers_without_gradient(self.model)
        learning_rate = self.config.learning_rate * learning_rate_factor(number, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip).item()
        # The scaler skips a step whose scaled gradient is infinite, and lowers its factor.
        norm_is_valid = math.isfinite(norm) or self.scaler.is_enabled()
        if not math.isfinite(loss) or not norm_is_valid:
            raise FloatingPointError(
                f"the loss is {loss} and the norm of the gradient is {norm} at step {number}: try "
                "a lower --learning-rate or --precision fp32"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return learning_rate


def new_optimizer(trained: dict[str, nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Create AdamW; each group of parameters has a ``ratio`` that multiplies the learning rate.

    As in PEFT's LoRA+, B and DoRA's magnitudes learn at ``lora_plus_ratio`` times the rate.
    """
    slow = []
    fast = []
    for name, parameter in trained.items():
        if name.endswith((".lora_B", ".lora_magnitude_vector")):
            fast.append(parameter)
        else:
            slow.append(parameter)
    groups = [{"params": slow, "ratio": 1.0}]
    if fast:
        groups.append({"params": fast, "ratio": config.lora_plus_ratio})
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def report_layers_without_gradient(model: nn.Module) -> None:
    """Print which adapted layers got no gradient: LoRA cannot learn anything there."""
    names = layers_without_gradient(model)
    if names:
        tqdm.write(f"LoRA gets no gradient in {', '.join(names)}: it learns nothing there.")


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Give the share of the peak at a step, from 1: a linear warm-up, then a cosine towards 0."""
    warmup = round(config.warmup * config.steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup - 1) / max(1, config.steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


# --- validation, and when to validate, stop and save --------------------------------------------


def validate(classifier: Classifier, held_out: Examples) -> dict[str, float]:
    """Compute mean loss (nats) and any-label accuracy; each process takes a share of the notes."""
    rank, processes = world()
    notes = held_out.notes[rank::processes]
    loss = 0.0
    correct = 0
    if notes:
        logits = classifier.logits(held_out.ids[rank::processes])
        log_p = logits.log_softmax(-1)  # (n, C)
        loss = -(log_p * held_out.targets[rank::processes]).sum().item()
        predicted = log_p.argmax(-1).tolist()
        correct = int(are_correct(notes, predicted).sum())
    device = classifier.model.score.weight.device
    loss, correct, count = summed([loss, correct, len(notes)], device)
    return {"validation_loss": loss / count, "validation_accuracy": correct / count}


def validation_is_due(state: State, config: TrainingConfig) -> bool:
    """Tell whether to validate after this step: every ``validate_every`` steps and at the end."""
    return state.step % config.validate_every == 0 or state.step == config.steps


def finished(state: State, config: TrainingConfig) -> bool:
    """Tell whether all steps are done, or ``patience`` validations brought no new best one."""
    return state.step >= config.steps or state.worse >= config.patience


def checkpoint_is_due(state: State, config: TrainingConfig) -> bool:
    """Tell whether to save after this step: every ``checkpoint_every`` steps and at the end."""
    return state.step % config.checkpoint_every == 0 or finished(state, config)


# --- log and save -------------------------------------------------------------------------------


class Log(AbstractContextManager):
    """Writes a line for each step to ``metrics.jsonl`` and shows it, on the first process only.

    Args:
        path: The file. For a resumed run, it keeps the lines up to the checkpoint's step.
        state: The state of the training.
        steps: The most steps that there will be.
    """

    def __init__(self, path: Path, state: State, steps: int) -> None:
        self.path = path
        self.state = state
        self.steps = steps
        rank, _ = world()
        self.is_first = rank == 0

    def __enter__(self) -> "Log":
        if self.is_first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = []
            if self.state.step > 0:  # the killed run may have left later or half-written lines
                lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = lines[: self.state.step]
            write_atomically(self.path, "".join(kept).encode())
            self.file = self.path.open("a", encoding="utf-8")
            # The bar comes last, so that an error message does not appear behind it.
            self.progress = Progress(self.state.step, self.steps, self.state.elapsed())
        return self

    def write(self, metrics: dict) -> None:
        """Write and show a step's metrics, with the seconds of training so far."""
        if self.is_first:
            metrics = metrics | {"seconds": round(self.state.elapsed(), 3)}
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
            self.progress.show(metrics)

    def sync(self) -> None:
        """Force the lines to the disk."""
        if self.is_first:
            os.fsync(self.file.fileno())

    def __exit__(self, *_: object) -> None:
        if self.is_first:
            self.progress.bar.close()
            self.file.close()


class Progress:
    """Shows the progress of training on standard error.

    A terminal gets a bar. A narrow terminal cuts it off at the right, so the most important values
    come first. Anything else, such as a file, gets a line every ten steps.

    Args:
        done: Finished steps.
        steps: The most steps that there will be.
        seconds: Training time so far.
    """

    BAR = "{desc}, {remaining} left |{bar:20}| {n_fmt}/{total_fmt} steps, {rate_fmt}{postfix}"
    LINE = "{desc}, {remaining} left, {n_fmt}/{total_fmt} steps, {rate_fmt}{postfix}"
    STEPS_PER_LINE = 10

    def __init__(self, done: int, steps: int, seconds: float) -> None:
        self.seconds = seconds
        self.details: dict[str, str] = {}
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            desc="training",
            total=steps,
            initial=done,
            unit="step",
            bar_format=self.BAR if self.is_terminal else self.LINE,
            dynamic_ncols=self.is_terminal,
            delay=0 if self.is_terminal else math.inf,  # seconds; show() prints the lines
        )

    def show(self, metrics: dict) -> None:
        """Show a step."""
        passed = max(metrics["seconds"] - self.seconds, 0.001)
        self.seconds = metrics["seconds"]
        self.details["tokens/s"] = f"{metrics['tokens'] / passed:,.0f}"
        self.details["padding"] = f"{metrics['padding']:.0%}"
        if "validation_loss" in metrics:
            self.details["validation"] = f"{metrics['validation_loss']:.3f}"
        self.bar.set_description_str(f"loss {metrics['loss']:.3f}", refresh=False)
        self.bar.set_postfix(self.details, refresh=False)
        self.bar.update()
        if not self.is_terminal and metrics["step"] % self.STEPS_PER_LINE == 0:
            print(self.bar, file=sys.stderr, flush=True)


def save(state: State, log: Log) -> None:
    """Write a checkpoint once the lines of its steps are on the disk."""
    log.sync()
    state.save()


# --- interruptions and errors -------------------------------------------------------------------


@contextmanager
def naming_checkpoint(state: State) -> Iterator[None]:
    """Add the name of the last checkpoint to an error that ends training."""
    try:
        yield
    except (OSError, FloatingPointError) as error:
        raise type(error)(f"{error}. {state.last_checkpoint()}") from error


class Interruption(AbstractContextManager):
    """Catches SIGINT and SIGTERM, so that training can stop after a step.

    A second Ctrl-C stops it at once.

    Args:
        device: Device on which the processes exchange whether one of them caught a signal.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.caught: list[int] = []
        self.handlers_before = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.handlers_before[number] = signal.signal(number, self.catch)
            except ValueError:  # outside the main thread: Python allows no handlers there
                break
        return self

    def catch(self, number: int, _: object) -> None:
        """Handle a signal."""
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught.append(number)

    def requested(self) -> bool:
        """Tell whether any process caught a signal; every process must call this."""
        (caught,) = summed([len(self.caught)], self.device)
        return caught > 0

    @property
    def number(self) -> int:
        """The number of the first caught signal; SIGTERM if only another process caught one."""
        return self.caught[0] if self.caught else signal.SIGTERM

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
