"""Base weights from a folder or the Hub, and files that appear whole.

Whatever is loaded is checked completely: a missing, unexpected or misshapen tensor is an error that
names it. Files are safetensors and JSON, never pickle, and appear whole or not at all.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clinora.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

BUNDLED = Path(__file__).parent / "bundled"

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


# The dtypes of a floating tensor: eight bits would need a scale, which a plain file does not have.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CheckpointError(ValueError):
    """A file of weights, or the configuration beside it, is not what it should be."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model came from.

    Attributes:
        name: "bundled", a folder or a Hub id.
        revision: The Hub's revision; None for a folder.
        folder: The folder with its files on this machine.
    """

    name: str
    revision: str | None
    folder: Path


def find_base(source: str | Path, revision: str | None = None) -> Source:
    """Find a base model, downloading it from the Hub if ``source`` is not a folder.

    Args:
        source: "bundled", a folder, or a Hub id such as "TinyLlama/TinyLlama-1.1B-Chat-v1.0".
        revision: A commit, branch or tag of the Hub; None is its main branch.

    Raises:
        CheckpointError: It is not a folder and cannot be downloaded from the Hub.
    """
    if str(source) == "bundled":
        return Source("bundled", None, BUNDLED / "base")
    if Path(source).is_dir():
        return Source(str(Path(source).resolve()), None, Path(source))
    patterns = ["config.json", "tokenizer.model", WEIGHTS, INDEX, "model-*.safetensors"]
    folder = Path(_from_hub(source, revision, patterns))
    return Source(str(source), folder.name, folder)  # the cache names the folder by its commit


def find_config(source: str | Path, revision: str | None = None) -> Path:
    """Find a model's ``config.json``: that file itself, a folder's, or the Hub's.

    Raises:
        CheckpointError: There is none.
    """
    path = BUNDLED / "base" if str(source) == "bundled" else Path(source)
    if not path.exists():
        path = Path(_from_hub(source, revision, ["config.json"]))
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"there is no {path}")
    return path


def _from_hub(source: str | Path, revision: str | None, patterns: list[str]) -> str:
    try:
        return huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=patterns
        )
    except HFValidationError:
        raise CheckpointError(f"there is no folder {source}, and it is no id of the Hub") from None
    except Exception as error:  # the Hub's client raises its own, httpx's and the system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"there is no folder {source}, and the Hub did not give it: {reason}"
        ) from None


def weights_sha256(folder: Path) -> str:
    """Hash a base's weight files, in the order of their names, to tell one base from another.

    Raises:
        CheckpointError: The folder holds no weights.
    """
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_model(
    source: str | Path,
    *,
    num_labels: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> LlamaForCausalLM | LlamaForSequenceClassification:
    """Load a base: a classifier with ``num_labels`` classes, or a causal LM if that is None.

    The model is built on the meta device and takes its tensors from the memory map, so on the CPU
    loading costs little more than the file's size. A classifier's ``score`` is the file's, or new
    and random (``head_trained`` says which), and float32.

    Args:
        source: "bundled", a folder, or a Hub id, which is downloaded.
        num_labels: C, the number of classes.
        revision: The Hub's revision.
        dtype: Dtype of the weights; None is the file's.
        device: Where to load them.

    Raises:
        CheckpointError: The files are missing, damaged or of another model.
        ValueError: ``config.json`` has an option that ``LlamaConfig`` does not support, or
            ``num_labels`` is not a number of classes.
    """
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise ValueError(
            f"num_labels is {num_labels!r}: expected a whole number of at least 1, or None for a "
            "causal LM"
        )
    found = find_base(source, revision)
    config = LlamaConfig.from_json(find_config(found.folder))
    with torch.device("meta"), _DrawsNothing():
        if num_labels is None:
            model = LlamaForCausalLM(config)
        else:
            model = LlamaForSequenceClassification(config, num_labels)
    tensors = _read_weights(found.folder)
    # Not used: rotary buffers of old files, which the model computes; a tied head, which is the
    # embedding; the language-model head, for a classifier.
    for name in list(tensors):
        if name.endswith(".rotary_emb.inv_freq"):
            del tensors[name]
    if num_labels is not None or config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    expected = model.state_dict()
    if num_labels is not None and "score.weight" not in tensors:
        tensors["score.weight"] = nn.init.normal_(
            torch.empty(num_labels, config.hidden_size), std=config.initializer_range
        )
    elif num_labels is not None:
        model.head_trained = True
    check_tensors(tensors, expected, f"the weights in {found.folder}")
    if dtype is None:
        dtype = tensors["model.embed_tokens.weight"].dtype
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device, torch.float32 if name == "score.weight" else dtype)
    model.load_state_dict(tensors, assign=True)
    model.source = found
    return model


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Map a base's weights into memory, from one file or from those that its index lists."""
    tensors = {}
    for file, listed in _weight_files(folder).items():
        found = read_tensors(file)
        if listed is not None and found.keys() != listed:
            differing = min(found.keys() ^ listed)
            raise CheckpointError(
                f"{file} and the index beside it disagree about {differing}: copy both again"
            )
        tensors |= found
    return tensors


class _DrawsNothing(TorchFunctionMode):
    """Skips normal_: on the meta device it fills nothing, yet imports PyTorch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.init.normal_:
            return func(*args, **kwargs)
        return kwargs["tensor"] if "tensor" in kwargs else args[0]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, even if the machine stops half-way.

    Raises:
        OSError: The folder cannot be written or the disk is full; the old file is untouched.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)  # it can only be read by setting it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """List a base's safetensors files, by name, with the tensors that an index says they hold."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}: expected weights in safetensors"
        )
    file_of = read_json(folder / INDEX).get("weight_map")
    usable = isinstance(file_of, dict) and len(file_of) > 0
    if not usable or not all(_is_file_name(file) for file in file_of.values()):
        raise CheckpointError(f"{folder / INDEX} has no usable weight_map")
    listed = {folder / file: set() for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        listed[folder / file].add(name)
    return listed


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory; nothing is read from the disk until it is used."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file or is damaged ({error}): copy it again"
        ) from None


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Check that a set of tensors is exactly the expected one.

    Raises:
        CheckpointError: It is not; the message names the first few that differ.
    """
    both = sorted(expected.keys() & found.keys())
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} ({_shape(found[name])}, expected {_shape(expected[name])})"
            for name in both
            if found[name].shape != expected[name].shape
        ],
        "of another dtype": [
            f"{name} ({_list(found[name].dtype)}, expected {_list(*_allowed(expected[name]))})"
            for name in both
            if found[name].dtype not in _allowed(expected[name])
        ],
    }
    parts = []
    for kind, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{kind}: {', '.join(names[:3])}{more}")
    if parts:
        raise CheckpointError(f"{what} do not fit the model; {'; '.join(parts)}")


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape))


def _allowed(expected: Tensor) -> tuple[torch.dtype, ...]:
    return FLOATS if expected.dtype in FLOATS else (expected.dtype,)


def _list(*dtypes: torch.dtype) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
