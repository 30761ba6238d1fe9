"""A trained run, from texts to predictions: one path for evaluation, page and API.

Shapes: N notes, B batch, T tokens, D width, C classes.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clinora.checkpoint import (
    BUNDLED,
    CheckpointError,
    find_base,
    load_adapter,
    load_model,
    read_json,
    save_adapter,
    weights_sha256,
    write_atomically,
)
from clinora.llama import LlamaForSequenceClassification
from clinora.tokenizer import Tokenizer

RUN_FILE = "clinora.json"
SCHEMA = 1
INFERENCE_TOKENS = 8192  # of a padded batch


def choose_device(device: str = "auto") -> torch.device:
    """Choose where to compute: "auto" is CUDA or MPS if there is one, else the CPU.

    Raises:
        ValueError: This machine has no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available.get(device.partition(":")[0], False):
        there = ", ".join(name for name, there in available.items() if there)
        raise ValueError(f"device {device!r} is not available here: choose auto or one of {there}")
    return torch.device(device)


def choose_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Choose the compute dtype: bfloat16 where the hardware has it, else float16 or float32.

    Args:
        device: Where the model will be.
        precision: "auto", "bf16", "fp16" or "fp32".

    Raises:
        ValueError: It is none of these.
    """
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision in named:
        return named[precision]
    if precision != "auto":
        raise ValueError(f"precision {precision!r}: expected auto, {', '.join(named)}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(model: torch.nn.Module) -> AbstractContextManager:
    """Autocast to the dtype in which the model's frozen base is held; nothing for float32."""
    weight = model.model.embed_tokens.weight
    half = weight.dtype != torch.float32
    return torch.autocast(weight.device.type, weight.dtype if half else None, enabled=half)


def group_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Group notes of like length, so that little is padded.

    Args:
        lengths: Tokens of each note.
        tokens: The most that a padded batch may hold; a longer note stands alone.

    Returns:
        Lists of positions in ``lengths``, shortest notes first.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad(notes: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad ids on the right with 0, which nothing reads: ids (B, T), lengths (B,)."""
    lengths = torch.tensor([len(note) for note in notes])
    ids = torch.zeros(len(notes), int(lengths.max()), dtype=torch.long)  # (B, T)
    for row, note in zip(ids, notes, strict=True):
        row[: len(note)] = torch.tensor(note)
    return ids.to(device), lengths.to(device)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a classifier says of one note.

    Attributes:
        label: Name of the most probable class.
        index: Its number.
        confidence: Calibrated probability that the note is filed under ``label``; None if the
            run was not calibrated.
        probabilities: Of all classes, by index; they sum to 1.
        refer: Whether a person should decide; None if the run has no threshold.
        tokens: Tokens of the whole note.
        truncated: Whether the note is longer than the token limit, so that its end was not read.
    """

    label: str
    index: int
    confidence: float | None
    probabilities: tuple[float, ...]
    refer: bool | None
    tokens: int
    truncated: bool

    def as_json(self) -> dict[str, int | str]:
        """Give the published form: ``{"predicted_class": 0, "label": "…"}``."""
        return {"predicted_class": self.index, "label": self.label}

    def as_text(self) -> str:
        """Give the published form: ``Predicted Label: …``."""
        return f"Predicted Label: {self.label}"


class Classifier:
    """A model, its tokenizer and its labels: texts in, predictions out.

    Attributes:
        model: The classifier, with or without LoRA; used in evaluation mode.
        tokenizer: The base's.
        labels: Names of the classes, by index.
        token_limit: How many tokens of a note are read.
        about: What ``clinora.json`` records beside these (data, versions, …).
    """

    def __init__(
        self,
        model: LlamaForSequenceClassification,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        token_limit: int,
        about: dict | None = None,
    ) -> None:
        config = model.model.config
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size} "
                "embeddings: they do not belong together"
            )
        if not 1 <= token_limit <= config.max_position_embeddings:
            raise ValueError(
                f"token limit {token_limit}: expected 1 to {config.max_position_embeddings}, the "
                "positions that the base was trained for"
            )
        self.model, self.tokenizer = model, tokenizer
        self.labels, self.token_limit = tuple(labels), token_limit
        self.about = about or {}

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base: str | Path | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> "Classifier":
        """Load a run.

        Args:
            folder: What training wrote, or "bundled" for the adapter that comes along.
            base: Where the base is, if not where the run recorded it.
            device: "auto", "cpu", "cuda" or "mps".
            precision: "auto", "bf16", "fp16" or "fp32".

        Raises:
            CheckpointError: A file is missing or damaged, or the base is another one.
            ValueError: This machine has no such device, or the parts do not fit together.
        """
        folder = BUNDLED / "adapter" if str(folder) == "bundled" else Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"there is no run {folder}: train.py --run {folder} makes one")
        run = read_json(folder / RUN_FILE)
        if run.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{folder / RUN_FILE}: schema {run.get('schema')!r}, expected {SCHEMA}"
            )
        try:
            labels, limit, recorded = run["labels"], run["token_limit"], run["base"]
            source = find_base(base or recorded["source"], None if base else recorded["revision"])
            sha256 = recorded["sha256"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / RUN_FILE} lacks {error}") from None
        came = weights_sha256(source.folder)
        if came != sha256:
            raise CheckpointError(
                f"the weights in {source.folder} (sha256 {came[:12]}…) are not those that {folder} "
                f"was trained on ({recorded['source']}, sha256 {sha256[:12]}…): give the right "
                "one with --base"
            )
        where = choose_device(device)
        model = load_model(
            source.folder,
            num_labels=len(labels),
            dtype=choose_dtype(where, precision),
            device=where,
        )
        model.source = source
        load_adapter(model, folder)
        tokenizer = Tokenizer(source.folder / "tokenizer.model")
        return cls(model, tokenizer, labels, limit, about=run)

    def save(self, folder: str | Path) -> None:
        """Write adapter, head and ``clinora.json``: all that ``load`` needs beside the base.

        Raises:
            OSError: The folder cannot be written.
        """
        folder = Path(folder)
        save_adapter(self.model, folder)
        source = self.model.source
        run = self.about | {
            "schema": SCHEMA,
            "labels": list(self.labels),
            "base": {
                "source": source.name,
                "revision": source.revision,
                "sha256": weights_sha256(source.folder),
            },
            "token_limit": self.token_limit,
        }
        write_atomically(folder / RUN_FILE, (json.dumps(run, indent=2) + "\n").encode())

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """Classify notes.

        Raises:
            ValueError: A note is empty, or the head was never trained.
        """
        if isinstance(texts, str):
            raise ValueError("expected a list of notes, not one string")
        if not self.model.head_trained:
            raise ValueError("this model's head was never trained: its answers would be random")
        for i, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"note {i + 1} of {len(texts)} is empty")
        ids = [self.tokenizer.encode(text) for text in texts]
        logits = self.run([note[: self.token_limit] for note in ids])  # (N, C)
        predictions = []
        for note, row in zip(ids, logits.softmax(-1).tolist(), strict=True):
            index = max(range(len(row)), key=row.__getitem__)
            predictions.append(
                Prediction(
                    label=self.labels[index],
                    index=index,
                    confidence=None,
                    probabilities=tuple(row),
                    refer=None,
                    tokens=len(note),
                    truncated=len(note) > self.token_limit,
                )
            )
        return predictions

    def states(self, texts: Sequence[str]) -> Tensor:
        """Give the last real token's state, the head's input: (N, D), float32, on the CPU."""
        ids = [self.tokenizer.encode(text, self.token_limit) for text in texts]
        return self.run(ids, self.model.model)

    @torch.inference_mode()
    def run(self, ids: Sequence[Sequence[int]], module: torch.nn.Module | None = None) -> Tensor:
        """Run the model, or its decoder, over token ids in batches of like length: (N, …)."""
        module = module or self.model
        device = self.model.score.weight.device
        training = self.model.training
        self.model.eval()
        outputs: list[Tensor] = [torch.empty(0)] * len(ids)
        try:
            for group in group_by_length([len(note) for note in ids], INFERENCE_TOKENS):
                with autocast(self.model):
                    output = module(*pad([ids[i] for i in group], device))
                for i, row in zip(group, output.float().cpu(), strict=True):
                    outputs[i] = row
        finally:
            self.model.train(training)
        return torch.stack(outputs) if outputs else torch.empty(0, 0)
