"""A trained run, from texts to predictions: one path for evaluation, page and API.

Shapes: N notes, B batch, T tokens, D width, C classes.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clinora.adapter import load_adapter, save_adapter
from clinora.calibration import Calibration
from clinora.checkpoint import (
    BUNDLED,
    CheckpointError,
    find_base,
    load_model,
    read_json,
    write_atomically,
)
from clinora.device import choose_device, choose_dtype
from clinora.llama import LlamaForSequenceClassification
from clinora.notes import check_class_name, has_visible
from clinora.run import BOUND, RUN_FILE, SCHEMA, base_hashes
from clinora.tokenizer import Tokenizer

INFERENCE_TOKENS = 8192  # of a padded batch
INFERENCE_NOTES = 1024  # tokenised at a time: the memory for ids does not grow with the notes


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


def pad(notes: Sequence[Sequence[int] | Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad ids on the right with 0, which nothing reads: ids (B, T), lengths (B,)."""
    lengths = torch.tensor([len(note) for note in notes])
    ids = torch.zeros(len(notes), int(lengths.max()), dtype=torch.long)  # (B, T)
    for row, note in zip(ids, notes, strict=True):
        row[: len(note)] = torch.as_tensor(note)
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
        tokens: Tokens of the note; of a truncated one those that were read and one more, since the
            rest is not counted: it has at least so many.
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
        calibration: How sure its answers are; None if the run was not calibrated.
        about: What ``clinora.json`` records beside these (data, versions, …).
        dtype: What autocast computes in; unless told, that of the base.

    Raises:
        ValueError: The tokenizer, the labels or the token limit do not fit the model, or the
            labels are not different names that can be shown.
    """

    def __init__(
        self,
        model: LlamaForSequenceClassification,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        token_limit: int,
        calibration: Calibration | None = None,
        about: dict | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = model.model.config
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size} "
                "embeddings: they do not belong together"
            )
        if len(labels) != (classes := model.score.weight.size(0)):
            raise ValueError(f"{len(labels)} labels do not fit a head of {classes} classes")
        _check_labels(labels)
        if not 1 <= token_limit <= config.max_position_embeddings:
            raise ValueError(
                f"token limit {token_limit}: expected 1 to {config.max_position_embeddings}, the "
                "positions that the base was trained for"
            )
        self.model, self.tokenizer = model, tokenizer
        self.labels, self.token_limit = tuple(labels), token_limit
        self.calibration, self.about = calibration, about or {}
        self.dtype = dtype or model.model.embed_tokens.weight.dtype

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
            FileNotFoundError: The base has no tokenizer.
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
        fields = {"labels": list, "token_limit": int, "base": dict, "calibration": dict | None}
        for name, kind in fields.items():
            if not isinstance(run.get(name), kind) or name not in run:
                raise CheckpointError(f"{folder / RUN_FILE}: {name} is missing or of another kind")
        labels, limit, recorded = run["labels"], run["token_limit"], run["base"]
        try:
            _check_labels(labels)
        except ValueError as error:
            raise CheckpointError(f"{folder / RUN_FILE}: {error}") from None
        try:
            calibration = run["calibration"] and Calibration(**run["calibration"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / RUN_FILE}: calibration: {error}") from None
        try:
            source = find_base(base or recorded["source"], None if base else recorded["revision"])
            expected = {name: str(recorded[name]) for name in BOUND}
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / RUN_FILE} is not whole: {error}") from None
        if (came := base_hashes(source)) != expected:
            what = next(BOUND[name] for name in came if came[name] != expected[name])
            raise CheckpointError(
                f"the {what} in {source.folder} is not what {folder} was trained on "
                f"({recorded['source']}, sha256 {expected['sha256'][:12]}…): give the right base "
                "with --base"
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
        return cls(model, tokenizer, labels, limit, calibration, about=run)

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
            "base": {"source": source.name, "revision": source.revision, **base_hashes(source)},
            "token_limit": self.token_limit,
            "calibration": self.calibration and dataclasses.asdict(self.calibration),
        }
        write_atomically(folder / RUN_FILE, (json.dumps(run, indent=2) + "\n").encode())

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """Classify notes.

        Raises:
            ValueError: A note is empty, or the head was never trained.
        """
        if isinstance(texts, str):
            raise ValueError("expected a list of notes, not one string")
        for i, text in enumerate(texts):
            if not has_visible(text):
                raise ValueError(f"note {i + 1} of {len(texts)} is empty: it has nothing visible")
        probabilities, tokens = self.probabilities(texts, self.token_limit + 1)
        confidence = self.calibration and self.calibration.confidence(probabilities).tolist()
        named = probabilities.argmax(-1).tolist() if tokens else []
        return [
            Prediction(
                label=self.labels[index],
                index=index,
                confidence=confidence and confidence[i],
                probabilities=tuple(probabilities[i].tolist()),
                refer=confidence and confidence[i] < self.calibration.threshold,
                tokens=tokens[i],
                truncated=tokens[i] > self.token_limit,
            )
            for i, index in enumerate(named)
        ]

    def probabilities(
        self, texts: Sequence[str], most_counted: int | None = None
    ) -> tuple[np.ndarray, list[int]]:
        """Give the probabilities of all classes, (N, C) float32, and the tokens of each note.

        Args:
            texts: The notes.
            most_counted: How many tokens of a note are counted at most, above the token limit; the
                rest is not tokenised. None: all are counted.

        Raises:
            ValueError: The head was never trained, or an answer is not finite.
        """
        if not self.model.head_trained:
            raise ValueError("this model's head was never trained: its answers would be random")
        rows, tokens = [np.empty((0, len(self.labels)), np.float32)], []
        for ids in self._encode(texts, most_counted):
            rows.append(self.run([note[: self.token_limit] for note in ids]).softmax(-1).numpy())
            tokens += map(len, ids)
        probabilities = np.concatenate(rows)
        if not np.isfinite(probabilities).all():
            raise ValueError("the model's answers are not finite numbers: try --precision fp32")
        return probabilities, tokens

    def autocast(self) -> AbstractContextManager:
        """Autocast to ``dtype``; nothing for float32."""
        half = self.dtype != torch.float32
        device = self.model.score.weight.device.type
        return torch.autocast(device, self.dtype if half else None, enabled=half)

    def states(self, texts: Sequence[str]) -> Iterator[Tensor]:
        """Give the last real token's states, the head's input, in parts of (n, D), float32."""
        for ids in self._encode(texts, self.token_limit):
            yield self.run(ids, self.model.model)

    def _encode(self, texts: Sequence[str], limit: int | None) -> Iterator[list[list[int]]]:
        for start in range(0, len(texts), INFERENCE_NOTES):
            part = texts[start : start + INFERENCE_NOTES]
            yield [self.tokenizer.encode(text, limit) for text in part]

    @torch.inference_mode()
    def run(
        self, ids: Sequence[Sequence[int] | Tensor], module: torch.nn.Module | None = None
    ) -> Tensor:
        """Run the model, or its decoder, over token ids in batches of like length: (N, …)."""
        module = module or self.model
        device = self.model.score.weight.device
        training = self.model.training
        self.model.eval()
        outputs: list[Tensor] = [None] * len(ids)
        try:
            for group in group_by_length([len(note) for note in ids], INFERENCE_TOKENS):
                with self.autocast():
                    output = module(*pad([ids[i] for i in group], device))
                for i, row in zip(group, output.float().cpu(), strict=True):
                    outputs[i] = row
        finally:
            self.model.train(training)
        return torch.stack(outputs)


def _check_labels(labels: Sequence[str]) -> None:
    """Check the names of a run's classes, as ``read_notes`` checks those of a file.

    Raises:
        ValueError: They are not different names that can be shown. The message names the label
            with escapes, at most 60 characters of it.
    """
    if not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise ValueError("labels are not different names")
    for i, label in enumerate(labels):
        try:
            check_class_name(label)
        except ValueError as error:
            raise ValueError(f"label {i} ({ascii(label)[:60]}) is no class name: {error}") from None
