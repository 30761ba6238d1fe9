"""From text to prediction. Evaluation, the page, the API and file scoring all use this code.

text → clean text → token ids → batches of similar length → logits → probabilities → calibrated
confidence → prediction.

Shapes: N notes, B batch, T tokens, D width, C classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clinora.adapter import save_adapter
from clinora.calibration import Calibration
from clinora.checkpoint import BUNDLED, CheckpointError, find_base, find_tokenizer, load_model
from clinora.combine import load_adapters
from clinora.device import choose_device, choose_dtype
from clinora.llama import LlamaForSequenceClassification
from clinora.lora import LoRAConfig, apply_lora
from clinora.notes import Note, check_class_names, clean_text, has_visible, ordinary_case
from clinora.outliers import OutlierLimit, load_scorer
from clinora.quantize import QUANTIZATIONS
from clinora.run import BaseRecord, DataRecord, RunRecord, seen_hashes
from clinora.tokenizer import Tokenizer

TOKEN_LIMIT = 512  # tokens of a note that are read, by default
INFERENCE_TOKENS = 8192  # in a padded batch
CPU_PADDING = 256  # tokens; computing this many takes about as long as starting another batch
INFERENCE_NOTES = 1024  # tokenised at a time, to bound the memory for ids


def group_by_length(
    lengths: Sequence[int], tokens: int, device: torch.device, most_padding: float = 1.0
) -> list[list[int]]:
    """Group notes of similar length into batches, to keep padding small.

    On the CPU a further batch costs little, and a note joins a group only if it adds at most
    ``CPU_PADDING`` tokens of padding. On other devices a batch costs more than its padding.

    Args:
        lengths: Tokens of each note.
        tokens: The most tokens that a padded batch may hold; a longer note is a batch by itself.
        device: Where the batches are computed.
        most_padding: The largest share of padding in a batch, if that is more than ``CPU_PADDING``
            tokens.

    Returns:
        Lists of positions in ``lengths``, the shortest notes first.
    """
    most_added = CPU_PADDING if device.type == "cpu" else math.inf
    groups: list[list[int]] = []
    longest = 0  # of the last group
    real = 0  # tokens of the last group without padding
    shortest_first = sorted(range(len(lengths)), key=lambda position: lengths[position])
    for position in shortest_first:
        # This note would be the longest of the last group: the group would be padded to it.
        length = lengths[position]
        size = len(groups[-1]) if groups else 0
        added = size * (length - longest)
        padded = (size + 1) * length
        padding = padded - real - length
        fits = padded <= tokens and padding <= max(CPU_PADDING, most_padding * padded)
        if size > 0 and fits and added <= most_added:
            groups[-1].append(position)
            real += length
        else:
            groups.append([position])
            real = length
        longest = length
    return groups


def pad(notes: Sequence[Sequence[int] | Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad ids on the right with 0, which the model ignores: ids (B, T), lengths (B,)."""
    lengths = torch.tensor([len(note) for note in notes])
    ids = torch.zeros(len(notes), int(lengths.max()), dtype=torch.long)  # (B, T)
    for row, note in zip(ids, notes, strict=True):
        row[: len(note)] = torch.as_tensor(note)
    return ids.to(device), lengths.to(device)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A classifier's prediction for one note.

    Attributes:
        label: Name of the predicted class, the most probable one.
        index: Index of the predicted class.
        confidence: Calibrated probability that ``label`` is one of the note's labels; None if the
            run was not calibrated.
        probabilities: One for each class, by index; they sum to 1.
        refer: Whether to refer the note to a person: ``out_of_distribution`` is true, or the
            confidence is below the run's threshold. Otherwise None if the run was not calibrated.
        tokens: Tokens of the note. For a truncated note, counting stops one token after the limit.
        truncated: Whether the note is longer than the token limit, so that its end was not read.
        out_of_distribution: Whether the text is unlike the notes that the run was trained on; None
            if the run has no limit for that.
    """

    label: str
    index: int
    confidence: float | None
    probabilities: tuple[float, ...]
    refer: bool | None
    tokens: int
    truncated: bool
    out_of_distribution: bool | None = None

    def as_json(self) -> dict[str, int | str]:
        """Give the published form: ``{"predicted_class": 0, "label": "…"}``."""
        return {"predicted_class": self.index, "label": self.label}

    def as_text(self) -> str:
        """Give the published form: ``Predicted Label: …``."""
        return f"Predicted Label: {self.label}"


class Classifier:
    """A model, its tokenizer and its labels: texts in, predictions out.

    Attributes:
        model: The model, with or without LoRA; predictions use it in evaluation mode.
        tokenizer: The base's tokenizer.
        labels: Names of the classes, by index.
        token_limit: How many tokens of a note are read.
        calibration: How confidence is computed; None if the run was not calibrated.
        outliers: The score below which a text is unlike the run's notes; None if none was chosen.
        dtype: The dtype that autocast computes in; by default, that of the base.
        quantization: How the weights of the base were quantised in training: "none", "nf4" or
            "nf4-double".
        data: The notes that the model was trained on; None if they were not recorded.
        training_options: The options that it was trained with, the precision, and the variant and
            rank of LoRA; may be empty.
        versions: The versions of the libraries that trained it; may be empty.

    Raises:
        ValueError: The tokenizer, the labels or the token limit do not fit the model, or the
            labels are not distinct names that can be displayed.
    """

    def __init__(
        self,
        model: LlamaForSequenceClassification,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        token_limit: int,
        calibration: Calibration | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = model.model.config
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size} "
                "embeddings: the tokenizer is not this model's"
            )
        classes = model.score.weight.size(0)
        if len(labels) != classes:
            raise ValueError(f"{len(labels)} labels do not fit a head of {classes} classes")
        check_class_names(labels)
        if not 1 <= token_limit <= config.max_position_embeddings:
            raise ValueError(
                f"token limit {token_limit}: expected 1 to {config.max_position_embeddings}, the "
                "positions that the base was trained for"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.token_limit = token_limit
        self.calibration = calibration
        self.outliers: OutlierLimit | None = None
        self.dtype = dtype or model.model.embed_tokens.weight.dtype
        self.quantization = model.quantization
        self.data: DataRecord | None = None
        self.training_options: dict[str, Any] = {}
        self.versions: dict[str, str] = {}

    @classmethod
    def new(
        cls,
        base: str | Path,
        labels: Sequence[str],
        lora: LoRAConfig | None = LoRAConfig(),  # noqa: B008
        seed: int = 0,
        *,
        revision: str | None = None,
        token_limit: int = TOKEN_LIMIT,
        device: str = "auto",
        precision: str = "auto",
        quantize: str = "none",
    ) -> "Classifier":
        """Assemble an untrained classifier, ready to train.

        Args:
            base: "bundled", "smollm2", a folder or a Hub id.
            labels: Names of the classes.
            lora: How to adapt the model; None adapts nothing, so that the whole model trains.
            seed: Seed of PyTorch's generators, which draw the head and LoRA's A.
            revision: A commit, branch or tag on the Hub.
            token_limit: How many tokens of a note to read.
            device: "auto", "cpu", "cuda" or "mps".
            precision: "auto", "bf16", "fp16" or "fp32".
            quantize: "none", "nf4" or "nf4-double", as in ``load_model``; the last two need LoRA.

        Raises:
            CheckpointError: The base is missing or damaged, or has no tokenizer.
            ValueError: This machine has no such device, or the parts do not fit together.
        """
        if lora is None and quantize != "none":
            raise ValueError(
                f"quantize is {quantize!r}, but quantised weights cannot be trained: give a "
                "LoRAConfig"
            )
        torch.manual_seed(seed)
        chosen_device = choose_device(device)
        # Before the weights, which may take long to load.
        tokenizer = Tokenizer(find_tokenizer(base, revision))
        model = load_model(
            base,
            num_labels=len(labels),
            revision=revision,
            dtype=choose_dtype(chosen_device, precision),
            device=chosen_device,
            quantize=quantize,
        )
        if lora is not None:
            apply_lora(model, lora)
        return cls(model, tokenizer, labels, token_limit)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base: str | Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        quantize: str = "auto",
    ) -> "Classifier":
        """Load a run.

        Args:
            folder: The run's folder, or "bundled" for the adapter in the package.
            base: The base, if it is not where the run recorded it: "bundled", "smollm2", a folder
                or a Hub id.
            device: "auto", "cpu", "cuda" or "mps".
            precision: "auto", "bf16", "fp16" or "fp32".
            quantize: "auto", as in training; or "none", "nf4" or "nf4-double", as in
                ``load_model``.

        Raises:
            CheckpointError: A file is missing or damaged, or the base is not the recorded one.
            ValueError: This machine has no such device, the parts do not fit together, or
                ``quantize`` is none of these.
        """
        (classifier,) = cls.load_several(
            [folder], base=base, device=device, precision=precision, quantize=quantize
        )
        return classifier

    @classmethod
    def load_several(
        cls,
        folders: Sequence[str | Path],
        *,
        base: str | Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        quantize: str = "auto",
    ) -> "list[Classifier]":
        """Load several runs of one base, whose weights they share in memory.

        Args:
            folders: The runs' folders, at least one; "bundled" is the adapter in the package.
            base: The base, if it is not where the first run recorded it: "bundled", "smollm2", a
                folder or a Hub id. It must be the base that every run recorded.
            device: "auto", "cpu", "cuda" or "mps".
            precision: "auto", "bf16", "fp16" or "fp32".
            quantize: "auto", as in training, which must be the same for all runs; or "none",
                "nf4" or "nf4-double", as in ``load_model``.

        Returns:
            A classifier for each folder, in the order of the folders.

        Raises:
            CheckpointError: A file is missing or damaged, the base is not the one that a run
                recorded, or a run's adapter does not fit the base or the run's labels.
            ValueError: There is no folder, this machine has no such device, ``precision`` or
                ``quantize`` is none of these, ``quantize`` is "auto" and the runs were trained on
                weights that were quantised differently, or the base has an option that
                ``LlamaConfig`` does not support.
        """
        if not folders:
            raise ValueError("no run was given: expected at least one folder")
        choices = ("auto", *QUANTIZATIONS)
        if quantize not in choices:
            raise ValueError(f"quantize is {quantize!r}: expected one of {', '.join(choices)}")
        found = [_run_folder(folder) for folder in folders]
        records = [RunRecord.read(folder) for folder in found]
        first = records[0]
        if quantize == "auto":
            quantize = first.quantization
            for folder, record in zip(found, records, strict=True):
                if record.quantization != quantize:
                    raise ValueError(
                        f"{found[0]} was trained on a base with quantize={quantize!r}, {folder} "
                        f"with {record.quantization!r}: say which to use with quantize"
                    )
        revision = None
        if base is None:
            base = first.base.source
            if not Path(base).exists():  # a folder of this name comes before the Hub's base
                revision = first.base.revision
        find_tokenizer(base, revision)  # before the weights, which may take long to download
        source = find_base(base, revision)
        for folder, record in zip(found, records, strict=True):
            record.base.check(source, folder)
        tokenizer = Tokenizer(find_tokenizer(source.folder))
        chosen_device = choose_device(device)
        model = load_model(
            source.folder,
            num_labels=len(first.labels),
            dtype=choose_dtype(chosen_device, precision),
            device=chosen_device,
            quantize=quantize,
        )
        model.source = source
        models = load_adapters(model, {str(folder): folder for folder in found})
        classifiers = []
        for folder, record in zip(found, records, strict=True):
            adapted = models[str(folder)]
            classes = adapted.score.weight.size(0)
            if classes != len(record.labels):
                raise CheckpointError(
                    f"the adapter in {folder} has a head of {classes} classes, its clinora.json "
                    f"has {len(record.labels)} labels: expected the files of one run"
                )
            limit = record.token_limit
            classifier = cls(adapted, tokenizer, record.labels, limit, record.calibration)
            classifier.quantization = record.quantization
            classifier.outliers = record.outliers
            classifier.data = record.data
            classifier.training_options = record.training_options
            classifier.versions = record.versions
            if classifier.outliers is not None:
                load_scorer(chosen_device, classifier.dtype)  # not while the first note waits
            classifiers.append(classifier)
        return classifiers

    def save(self, folder: str | Path) -> None:
        """Write the adapter, the head and ``clinora.json``: all that ``load`` needs but the base.

        Raises:
            ValueError: The head was never trained, or the model has no LoRA layer.
            OSError: The folder cannot be written.
        """
        folder = Path(folder)
        save_adapter(self.model, folder)
        record = RunRecord(
            labels=self.labels,
            token_limit=self.token_limit,
            base=BaseRecord.of(self.model.source),
            quantization=self.quantization,
            calibration=self.calibration,
            outliers=self.outliers,
            data=self.data,
            training_options=self.training_options,
            versions=self.versions,
        )
        record.write(folder)

    def record_training(self, notes: Sequence[Note], options: dict[str, Any]) -> None:
        """Record the notes and options of a training, for ``save``; ``train`` calls this.

        Notes of earlier trainings stay recorded, so that none of them counts as unseen. Their file
        does not, because the model is then trained on more than that file.

        Args:
            notes: The notes that the model is trained, validated or calibrated on.
            options: The training options.
        """
        seen = seen_hashes(notes)
        if self.data is not None:
            seen |= self.data.seen
        self.data = DataRecord(seen=seen)
        self.quantization = self.model.quantization
        self.training_options = options | {"precision": str(self.dtype).removeprefix("torch.")}
        lora: LoRAConfig | None = getattr(self.model, "lora_config", None)
        if lora is not None:  # PiSSA is saved as LoRA of another rank
            self.training_options |= {"variant": lora.variant, "rank": lora.rank}
        self.versions = {"clinora": version("clinora"), "torch": torch.__version__}

    def __repr__(self) -> str:
        source = getattr(self.model, "source", None)
        base = source.name if source else None
        return (
            f"Classifier(base={base!r}, labels={self.labels!r}, token_limit={self.token_limit}, "
            f"dtype={self.dtype}, calibrated={self.calibration is not None})"
        )

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """Classify notes.

        Raises:
            ValueError: A note is empty, or the head was never trained.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string: expected a list of notes")
        for i, text in enumerate(texts):
            if not has_visible(text):
                raise ValueError(f"note {i + 1} of {len(texts)} is empty: it has no visible text")
        predictions = []
        for ids in self._encode(texts, self.token_limit + 1):
            predictions += self.predict(ids)
        return predictions

    def encode(self, text: str) -> list[int]:
        """Clean and tokenise a note for ``predict``: ids, at most one beyond the token limit."""
        return self._encode_note(text, self.token_limit + 1)

    def predict(self, ids: Sequence[Sequence[int]]) -> list[Prediction]:
        """Classify notes from their token ids, as ``encode`` gives them.

        Raises:
            ValueError: The head was never trained, or a probability is not finite.
        """
        if not ids:
            return []
        probabilities = self._probabilities(ids)
        confidences = [None] * len(ids)
        referrals = [None] * len(ids)
        if self.calibration is not None:
            confidences = self.calibration.confidence(probabilities).tolist()
            referrals = [confidence < self.calibration.threshold for confidence in confidences]
        unlike = [None] * len(ids)
        if self.outliers is not None:
            unlike = (self.outlier_scores(ids) < self.outliers.limit).tolist()
            referrals = [outlier or refer for outlier, refer in zip(unlike, referrals, strict=True)]
        predictions = []
        for i, index in enumerate(probabilities.argmax(-1).tolist()):
            prediction = Prediction(
                label=self.labels[index],
                index=index,
                confidence=confidences[i],
                probabilities=tuple(probabilities[i].tolist()),
                refer=referrals[i],
                tokens=len(ids[i]),
                truncated=len(ids[i]) > self.token_limit,
                out_of_distribution=unlike[i],
            )
            predictions.append(prediction)
        return predictions

    def probabilities(self, texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """Give the probabilities of all classes, (N, C) float32, and the tokens of each note.

        Args:
            texts: The notes.

        Raises:
            ValueError: The head was never trained, or a probability is not finite.
        """
        parts = [np.empty((0, len(self.labels)), np.float32)]  # so that no notes give (0, C)
        tokens = []
        for ids in self._encode(texts, None):
            parts.append(self._probabilities(ids))
            tokens += [len(note) for note in ids]
        return np.concatenate(parts), tokens

    def _probabilities(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Give the probabilities of notes, of which at most the token limit is read: (N, C)."""
        if not self.model.head_trained:
            raise ValueError("this model's head was never trained: predictions would be random")
        read = [note[: self.token_limit] for note in ids]
        probabilities = self.logits(read).softmax(-1).numpy()
        if not np.isfinite(probabilities).all():
            raise ValueError("the model's probabilities are not finite: try --precision fp32")
        return probabilities

    def outlier_scores(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Score how much notes are like clinical notes, from their token ids: (N,) float32.

        ``OutlierScorer`` reads what the classifier reads, with a tokenizer of its own.
        """
        scorer = load_scorer(self.model.score.weight.device, self.dtype)
        texts = [self.tokenizer.decode(note[: self.token_limit]) for note in ids]
        return self._run(scorer.encode(texts), scorer).numpy()

    def logits(
        self, ids: Sequence[Sequence[int] | Tensor], model: Callable | None = None
    ) -> Tensor:
        """Give the logits of all classes: token ids of N notes → (N, C) float32, on the CPU.

        Args:
            ids: The ids of each note, at most the token limit.
            model: Called instead of the classifier's own model, with ids (B, T) and lengths (B,).
        """
        return self._run(ids, model or self.model)

    def states(self, texts: Sequence[str]) -> Iterator[Tensor]:
        """Give the head's input, the states of each note's last real token.

        Yields:
            (n, D) float32 for each part of n notes.
        """
        for ids in self._encode(texts, self.token_limit):
            yield self._run(ids, self.model.model)

    def autocast(self) -> AbstractContextManager:
        """Give a context that autocasts to ``dtype``; for float32 it does nothing."""
        device = self.model.score.weight.device.type
        if self.dtype == torch.float32:
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, self.dtype)

    def _encode(self, texts: Sequence[str], limit: int | None) -> Iterator[list[list[int]]]:
        """Clean and tokenise notes, at most ``INFERENCE_NOTES`` at a time."""
        for start in range(0, len(texts), INFERENCE_NOTES):
            part = texts[start : start + INFERENCE_NOTES]
            yield [self._encode_note(text, limit) for text in part]

    def _encode_note(self, text: str, limit: int | None) -> list[int]:
        return self.tokenizer.encode(ordinary_case(clean_text(text)), limit)

    @torch.inference_mode()
    def _run(self, ids: Sequence[Sequence[int] | Tensor], model: Callable) -> Tensor:
        """Run a model over token ids in batches of similar length, in evaluation mode: (N, …)."""
        device = self.model.score.weight.device
        training = self.model.training
        self.model.eval()
        order: list[int] = []
        outputs: list[Tensor] = []
        try:
            for group in group_by_length([len(note) for note in ids], INFERENCE_TOKENS, device):
                padded, lengths = pad([ids[i] for i in group], device)
                with self.autocast():
                    output = model(padded, lengths)
                order += group
                outputs.append(output.float().cpu())
        finally:
            self.model.train(training)
        in_groups = torch.cat(outputs)
        result = torch.empty_like(in_groups)
        result[order] = in_groups
        return result


def _run_folder(run: str | Path) -> Path:
    """Give the folder of a run: "bundled" or a path.

    Raises:
        CheckpointError: There is no such folder.
    """
    folder = BUNDLED / "adapter" if str(run) == "bundled" else Path(run)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no run {folder}: train one with clinora train --run {folder}"
        )
    return folder
