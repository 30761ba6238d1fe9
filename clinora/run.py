"""A run on disk: only this module knows the keys of ``clinora.json``.

A run identifies its base by the sha256 of the base's weights, tokenizer and configuration.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from clinora.calibration import Calibration
from clinora.checkpoint import (
    CheckpointError,
    Source,
    find_tokenizer,
    read_json,
    weights_sha256,
    write_atomically,
)
from clinora.llama import LlamaConfig
from clinora.notes import (
    LABEL_COLUMN,
    NAMED_NOTES,
    TEXT_COLUMN,
    Note,
    Notes,
    check_class_names,
)
from clinora.outliers import OutlierLimit
from clinora.quantize import check_quantization

RUN_FILE = "clinora.json"
SCHEMA = 1
# Of a DataRecord, in the order in which they are written.
DATA_NAMES = ("source", "text_column", "label_column", "split", "split_column")
HASH_DIGITS = 16  # of a text's sha256 in hexadecimal; enough to distinguish texts


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseRecord:
    """The base that a run was trained on.

    Attributes:
        source: "bundled", "smollm2", a folder or a Hub id.
        revision: The Hub's commit; None for a folder.
        sha256: Of the weights.
        tokenizer_sha256: Of the tokenizer's file, ``tokenizer.model`` or ``tokenizer.json``.
        config_sha256: Of the values in ``config.json``.
    """

    source: str
    revision: str | None
    sha256: str
    tokenizer_sha256: str
    config_sha256: str

    @classmethod
    def of(cls, source: Source) -> "BaseRecord":
        """Record a base; raises what ``base_hashes`` raises."""
        return cls(source=source.name, revision=source.revision, **base_hashes(source))

    def check(self, source: Source, run: Path) -> None:
        """Check that a base is the recorded one.

        Raises:
            CheckpointError: Its weights, tokenizer or configuration differ.
        """
        found = base_hashes(source)
        files = {
            "sha256": "weights",
            "tokenizer_sha256": find_tokenizer(source.folder).name,
            "config_sha256": "config.json",
        }
        for name, file in files.items():
            if found[name] != getattr(self, name):
                raise CheckpointError(
                    f"the {file} in {source.folder} is not what {run} was trained on "
                    f"({self.source}, sha256 {self.sha256[:12]}…): give the right base with --base"
                )


def base_hashes(source: Source) -> dict[str, str]:
    """Give the sha256 of a base's weights, tokenizer and configuration.

    For the configuration, the values are hashed, so its formatting does not matter.

    Raises:
        CheckpointError: The folder holds no weights or no tokenizer.
        FileNotFoundError: It holds no configuration.
        ValueError: The configuration is not a Llama's.
    """
    tokenizer = find_tokenizer(source.folder).read_bytes()  # before the weights, which take long
    weights = weights_sha256(source.folder)
    config = LlamaConfig.from_json(source.folder / "config.json")
    values = dataclasses.asdict(config)
    if config.rope_scaling is None:
        del values["rope_scaling"]  # runs that are older than this field do not have it in the hash
    values = json.dumps(values, sort_keys=True).encode()
    return {
        "sha256": weights,
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "config_sha256": hashlib.sha256(values).hexdigest(),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecord:
    """The notes that a run was trained on. Only ``seen`` is recorded for every run.

    Attributes:
        seen: The first 16 hexadecimal digits of the sha256 of each text that the run was trained,
            validated or calibrated on.
        source: "bundled", "mtsamples" or the path of the file.
        text_column: The file's column of the texts.
        label_column: The file's column of the classes.
        split: "texts" or "rows".
        split_column: The file's column of the splits, if it decided them.
        fingerprint: ``Notes.fingerprint`` of the file.
        split_fingerprint: ``Notes.split_fingerprint`` of the file.
    """

    seen: frozenset[str]
    source: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    split: str | None = None
    split_column: str | None = None
    fingerprint: str | None = None
    split_fingerprint: str | None = None

    def has_seen(self, note: Note) -> bool:
        """Tell whether the run was trained, validated or calibrated on this text."""
        return note.sha256[:HASH_DIGITS] in self.seen

    def columns_in(self, source: str) -> tuple[str, str]:
        """Give the columns of texts and classes to read in ``source``.

        They are the run's own, except in other named notes, such as "bundled", which have the usual
        columns.
        """
        if source in NAMED_NOTES and source != self.source:
            return TEXT_COLUMN, LABEL_COLUMN
        return self.text_column or TEXT_COLUMN, self.label_column or LABEL_COLUMN

    def is_split_of(self, notes: Notes) -> bool:
        """Tell whether the run was trained on the training and validation notes of this file."""
        if self.fingerprint is None:
            return self.seen == seen_hashes([*notes.on("training"), *notes.on("validation")])
        recorded = (self.fingerprint, self.split_fingerprint)
        return recorded == (notes.fingerprint, notes.split_fingerprint)


def seen_hashes(notes: Sequence[Note]) -> frozenset[str]:
    """Give the hashes of notes as ``DataRecord.seen`` holds them."""
    return frozenset(note.sha256[:HASH_DIGITS] for note in notes)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """The content of ``clinora.json``.

    Attributes:
        labels: Names of the classes, by index.
        token_limit: The most tokens of a note that are read.
        base: The base model.
        quantization: How its weights were quantised in training: "none", "nf4" or "nf4-double".
        calibration: How confidence is computed; None if the run was not calibrated.
        outliers: The score below which a text is unlike the run's notes; None if none was chosen.
        data: The notes that it was trained on; None if they were not recorded.
        training_options: The options of ``TrainingConfig``, the precision, and the variant and rank
            of LoRA; may be empty.
        versions: The versions of the libraries that trained it; may be empty.
    """

    labels: tuple[str, ...]
    token_limit: int
    base: BaseRecord
    quantization: str
    calibration: Calibration | None
    outliers: OutlierLimit | None
    data: DataRecord | None
    training_options: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read ``clinora.json`` from a run's folder.

        Raises:
            CheckpointError: The file is missing, has another schema, or lacks a valid value.
        """
        path = folder / RUN_FILE
        # If the training was not recorded, the file has none of the first three. Older runs have no
        # limit for outliers.
        defaults = {
            "notes": None, "training": {}, "versions": {}, "quantization": "none", "outliers": None,
        }  # fmt: skip
        values = defaults | read_json(path)
        if values.get("schema") != SCHEMA:
            raise CheckpointError(f"{path}: schema {values.get('schema')!r}, expected {SCHEMA}")
        labels = _take(values, "labels", list, path)
        quantization = _take(values, "quantization", str, path)
        try:
            check_quantization(quantization)
            check_class_names(labels)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(
            labels=tuple(labels),
            token_limit=_take(values, "token_limit", int, path),
            base=_read_base(_take(values, "base", dict, path), path),
            quantization=quantization,
            calibration=_read_calibration(_take(values, "calibration", dict | None, path), path),
            outliers=_read_outliers(_take(values, "outliers", dict | None, path), path),
            data=_read_data(_take(values, "notes", dict | None, path), path),
            training_options=_read_training(values, path),
            versions=_take(values, "versions", dict, path),
        )

    def write(self, folder: Path) -> None:
        """Write ``clinora.json`` into a run's folder.

        Raises:
            OSError: The folder cannot be written.
        """
        values = {}
        if self.data is not None:
            values["notes"] = _data_as_json(self.data)
        if self.training_options:
            values["training"] = self.training_options
        if self.versions:
            values["versions"] = self.versions
        values["schema"] = SCHEMA
        values["labels"] = list(self.labels)
        values["base"] = dataclasses.asdict(self.base)
        if self.quantization != "none":
            values["quantization"] = self.quantization
        values["token_limit"] = self.token_limit
        values["calibration"] = None
        if self.calibration is not None:
            values["calibration"] = dataclasses.asdict(self.calibration)
        if self.outliers is not None:
            values["outliers"] = dataclasses.asdict(self.outliers)
        write_atomically(folder / RUN_FILE, (json.dumps(values, indent=2) + "\n").encode())


def _take(values: dict, name: str, kind: type | UnionType, path: Path) -> Any:
    """Give a value that must exist and have the type ``kind``."""
    if name not in values or not isinstance(values[name], kind):
        raise CheckpointError(f"{path}: {name} is missing or has the wrong type")
    return values[name]


def _read_base(values: dict, path: Path) -> BaseRecord:
    _take(values, "revision", str | None, path)
    for name in ("source", "sha256", "tokenizer_sha256", "config_sha256"):
        _take(values, name, str, path)
    return BaseRecord(
        source=values["source"],
        revision=values["revision"],
        sha256=values["sha256"],
        tokenizer_sha256=values["tokenizer_sha256"],
        config_sha256=values["config_sha256"],
    )


def _read_calibration(values: dict | None, path: Path) -> Calibration | None:
    if values is None:
        return None
    try:
        return Calibration(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: calibration: {error}") from None


def _read_outliers(values: dict | None, path: Path) -> OutlierLimit | None:
    if values is None:
        return None
    try:
        return OutlierLimit(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: outliers: {error}") from None


def _read_training(values: dict, path: Path) -> dict[str, Any]:
    options = _take(values, "training", dict, path)
    _take({"seed": 0} | options, "seed", int, path)
    return options


def _read_data(values: dict | None, path: Path) -> DataRecord | None:
    if values is None:
        return None
    seen = _take(values, "seen", list, path)
    if not all(isinstance(sha256, str) for sha256 in seen):
        raise CheckpointError(f"{path}: seen holds values that are not strings")
    # A run that was trained from Python has no file, so none of the other values.
    fingerprints = _take({"fingerprints": {}} | values, "fingerprints", dict, path)
    fingerprints = {"notes": None, "split": None} | fingerprints
    others = dict.fromkeys(DATA_NAMES) | values
    return DataRecord(
        seen=frozenset(seen),
        fingerprint=_take(fingerprints, "notes", str | None, path),
        split_fingerprint=_take(fingerprints, "split", str | None, path),
        **{name: _take(others, name, str | None, path) for name in DATA_NAMES},
    )


def _data_as_json(data: DataRecord) -> dict[str, Any]:
    """Give the recorded values, in the order in which they are written."""
    values = {}
    for name in DATA_NAMES:
        value = getattr(data, name)
        if value is not None:
            values[name] = value
    if data.fingerprint is not None:
        values["fingerprints"] = {"notes": data.fingerprint, "split": data.split_fingerprint}
    values["seen"] = sorted(data.seen)
    return values
