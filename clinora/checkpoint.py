"""Load base weights from a folder or the Hub, and write files atomically.

Everything that is loaded is checked: a missing, unexpected or misshapen tensor is an error that
names it. Files are safetensors and JSON, never pickle. A written file is complete or absent.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clinora.files import START_BYTES, recognise
from clinora.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from clinora.quantize import check_quantization, quantize_nf4

BUNDLED = Path(__file__).parent / "bundled"
NAMED_BASES = ("bundled", "smollm2")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # a base with both is read with the first

EMBEDDING = "model.embed_tokens.weight"

# The dtypes that weights may have. 8-bit floats need a scale, which these files do not hold.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CheckpointError(ValueError):
    """A file is missing or damaged, or does not belong to this model."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model came from.

    Attributes:
        name: "bundled", "smollm2", a folder or a Hub id.
        revision: The Hub's revision; None for a folder.
        folder: The folder with its files on this machine.
    """

    name: str
    revision: str | None
    folder: Path


def find_base(source: str | Path, revision: str | None = None) -> Source:
    """Find a base model; download it from the Hub if ``source`` is not a folder.

    Args:
        source: "bundled", "smollm2", a folder, or a Hub id such as
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0".
        revision: A commit, branch or tag on the Hub; None: the main branch.

    Raises:
        CheckpointError: ``source`` is not a folder and cannot be downloaded from the Hub; it is
            "smollm2", whose folder does not exist; or it is here and ``revision`` is given.
    """
    folder = local_folder(source, revision)
    if str(source) in NAMED_BASES:
        return Source(str(source), None, folder)
    if folder.is_dir():
        return Source(str(folder.resolve()), None, folder)
    patterns = ["config.json", *TOKENIZERS, WEIGHTS, INDEX, "model-*.safetensors"]
    folder = Path(_from_hub(source, revision, patterns))
    return Source(str(source), folder.name, folder)  # the cache names the folder by its commit


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """Give the folder of a base that has a name, or else ``source`` itself as a path.

    Raises:
        CheckpointError: ``source`` is "smollm2", and its folder does not exist; or a revision is
            given for what is not on the Hub.
    """
    if revision is not None and (str(source) in NAMED_BASES or Path(source).exists()):
        raise CheckpointError(
            f"revision {revision} of {source}, which is here: only bases on the Hub have revisions"
        )
    if str(source) == "bundled":
        return BUNDLED / "base"
    if str(source) != "smollm2":
        return Path(source)
    folder = smollm2_folder()
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no {folder}: create the base smollm2 with python -m tools.smollm2 in a "
            "clone of Clinora"
        )
    return folder


def smollm2_folder() -> Path:
    """Give the folder for the base smollm2, in the user's cache; it may not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "clinora" / "smollm2"


def find_config(source: str | Path, revision: str | None = None) -> Path:
    """Find a model's ``config.json``: ``source`` is that file, its folder, or a Hub id.

    Raises:
        CheckpointError: There is no such file, or it is here and ``revision`` is given.
    """
    path = local_folder(source, revision)
    if not path.exists():
        path = Path(_from_hub(source, revision, ["config.json"]))
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise CheckpointError(f"there is no {path}")
    return path


def find_tokenizer(source: str | Path, revision: str | None = None) -> Path:
    """Find a base's tokenizer file without its weights, which may take long to load.

    It is ``tokenizer.model``, or ``tokenizer.json`` if there is no such file. A base that has both,
    such as Llama 2, usually has the same tokenizer in both.

    Args:
        source: "bundled", "smollm2", a folder or a Hub id; of the Hub's files only this one is
            downloaded.
        revision: A commit, branch or tag on the Hub; None: the main branch.

    Raises:
        CheckpointError: There is no such file, another file stands in its place, or the base is
            here and ``revision`` is given.
    """
    folder = local_folder(source, revision)
    is_local = folder.is_dir()
    if is_local:
        _weight_files(folder)  # a folder without weights is not a base
    for name in TOKENIZERS:
        if not is_local:
            folder = Path(_from_hub(source, revision, [name]))
        if (folder / name).is_file():
            _check_kind(folder / name)
            return folder / name
    raise CheckpointError(
        f"{source} holds neither {' nor '.join(TOKENIZERS)}: expected a base with its tokenizer in "
        "one of these files; Transformers writes tokenizer.json from other files with "
        "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)"
    )


def _from_hub(source: str | Path, revision: str | None, patterns: list[str]) -> str:
    try:
        return huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=patterns
        )
    except HFValidationError:
        raise CheckpointError(
            f"there is no folder {source}, and it is not a valid Hub id"
        ) from None
    except Exception as error:  # the Hub's client raises its own errors, httpx's and the system's
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"there is no folder {source}, and it could not be downloaded from the Hub: "
            f"{reason.splitlines()[0]}"
        ) from None


def weights_sha256(folder: Path) -> str:
    """Hash the weight files of a base, in the order of their names, to identify the base.

    Raises:
        CheckpointError: The folder holds no weights, or another file in their place.
    """
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        _check_kind(file)
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class _DrawsNothing(TorchFunctionMode):
    """Skips normal_: on the meta device it does nothing but import PyTorch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.init.normal_:
            return func(*args, **kwargs)
        if "tensor" in kwargs:
            return kwargs["tensor"]
        return args[0]


def load_model(
    source: str | Path,
    *,
    num_labels: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str = "none",
) -> LlamaForCausalLM | LlamaForSequenceClassification:
    """Load a base: a classifier with ``num_labels`` classes, or a causal LM if that is None.

    The model is built on the meta device and its tensors are mapped from the file, so on the CPU
    loading needs little more memory than the file's size. The ``score`` of a classifier is float32.
    If the file has none, it is new and random, and ``head_trained`` is False.

    With ``quantize``, the weights of the decoder's linear layers are quantised one after another
    and frozen; the embedding, the norms, biases and heads are not. Use such a base with LoRA.

    Args:
        source: "bundled", "smollm2", a folder, or a Hub id, which is downloaded.
        num_labels: C, the number of classes.
        revision: A commit, branch or tag on the Hub.
        dtype: Dtype of the weights; None: the file's.
        device: Where to put the weights.
        quantize: "none"; "nf4", 4.5 bits a weight; or "nf4-double", with quantised scales, about
            4.13 bits a weight.

    Raises:
        CheckpointError: The files are missing, damaged or of another model.
        ValueError: ``config.json`` has an option that ``LlamaConfig`` does not support,
            ``num_labels`` is not a number of classes, or ``quantize`` is none of these.
    """
    check_quantization(quantize)
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
    in_files = _read_weights(found.folder)
    names = _standard_names(in_files)
    tensors = {name: in_files[name_in_file] for name_in_file, name in names.items()}
    # A tied language-model head is the embedding, and a classifier has no language-model head.
    lm_head = None
    if num_labels is not None or config.tie_word_embeddings:
        lm_head = tensors.pop("lm_head.weight", None)
    if config.tie_word_embeddings and lm_head is not None:
        # Of two tied weights, Transformers 4 could save this one alone.
        tensors.setdefault(EMBEDDING, lm_head)
    if num_labels is not None:
        if "score.weight" in tensors:
            model.head_trained = True
        else:
            head = torch.empty(num_labels, config.hidden_size)
            tensors["score.weight"] = nn.init.normal_(head, std=config.initializer_range)
    check_tensors(tensors, model.state_dict(), f"the weights in {found.folder}")
    if num_labels is None and lm_head is not None and not _equal(lm_head, tensors[EMBEDDING]):
        raise CheckpointError(
            f"the weights in {found.folder} do not fit the model; lm_head.weight differs from "
            f"{EMBEDDING}, but config.json says that they are tied: set tie_word_embeddings to "
            "false there"
        )
    if dtype is None:
        dtype = tensors[EMBEDDING].dtype
    if quantize != "none":
        linears = _decoder_linears(model)
        for name_in_file, tensor in _read_one_by_one(found.folder):
            name = names.get(name_in_file)
            if name in linears:
                tensors[name] = _quantized(name, tensor.to(device), dtype, quantize)
                linears[name].weight.requires_grad_(False)
    for name, tensor in tensors.items():
        is_head = name == "score.weight"
        tensors[name] = tensor.to(device, torch.float32 if is_head else dtype)
    model.load_state_dict(tensors, assign=True)
    model.source = found
    model.quantization = quantize
    return model


def _decoder_linears(model: LlamaForCausalLM | LlamaForSequenceClassification) -> dict:
    """Give the linear layers of the decoder by the names of their weights."""
    linears = {}
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear):
            linears[f"{name}.weight"] = module
    return linears


def _quantized(name: str, weight: Tensor, dtype: torch.dtype, quantize: str) -> Tensor:
    try:
        return quantize_nf4(weight, dtype, double=quantize == "nf4-double")
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be quantised: {error}") from None


def _standard_names(names: Collection[str]) -> dict[str, str]:
    """Give the names in ``LlamaForCausalLM`` of a base's tensors, by their names in the files.

    A decoder that was saved without a head has names without ``model.``. Old files also hold the
    rotary frequencies, which are left out: the model computes them.
    """
    standard = {}
    for name in names:
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        standard[name] = name
        full_name = f"model.{name}"
        # If the file holds both, the shorter name stays, and is refused as unexpected.
        if name.startswith(("embed_tokens.", "layers.", "norm.")) and full_name not in names:
            standard[name] = full_name
    return standard


def _equal(one: Tensor, other: Tensor) -> bool:
    # torch.equal raises an error for an 8-bit float beside another dtype.
    return one.dtype == other.dtype and torch.equal(one, other)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Map a base's weights into memory, from one file or from all files that the index lists."""
    tensors = {}
    for file, listed in _weight_files(folder).items():
        found = read_tensors(file)
        if listed is not None and found.keys() != listed:
            differing = min(found.keys() ^ listed)
            raise CheckpointError(
                f"{file} does not hold the tensors that {INDEX} lists for it, such as {differing}: "
                "copy both files again"
            )
        tensors |= found
    return tensors


def _read_one_by_one(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Map a base's tensors again, each by itself.

    What was read of a file stays in memory as long as its mapping, so a mapping of the whole file
    would grow to the size of the file.
    """
    for path in _weight_files(folder):
        for name in read_tensors(path):
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """List a base's safetensors files by name, each with the tensors that the index lists for it.

    Without an index there is one file, with None.
    """
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}: expected weights in safetensors files. "
            "Weights in pytorch_model.bin are not read, because a pickle can run code; if you "
            "trust them, convert them with Transformers: "
            "AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(FOLDER), and copy the "
            "tokenizer's files into FOLDER"
        )
    file_of = read_json(folder / INDEX).get("weight_map")
    if not _is_weight_map(file_of):
        raise CheckpointError(f"{folder / INDEX} has no usable weight_map")
    listed = {folder / file: set() for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        listed[folder / file].add(name)
    return listed


def _is_weight_map(value: object) -> bool:
    """Tell whether a value is a dictionary of file names, without folders, that is not empty."""
    if not isinstance(value, dict) or not value:
        return False
    for file in value.values():
        if not isinstance(file, str) or Path(file).name != file:
            return False
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is complete or absent, even if the machine stops half-way.

    Raises:
        OSError: The folder cannot be written or the disk is full; an old file stays unchanged.
    """
    with open_atomically(path) as stream:
        stream.write(data)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears whole when the context ends, or not after an error.

    Raises:
        OSError: The folder cannot be written or the disk is full; an old file stays unchanged.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)  # reading it is only possible by setting it
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
        CheckpointError: The file is missing, cannot be read or does not hold a JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    kind = recognise(content)
    if kind is not None:
        raise CheckpointError(f"{path} {kind}")
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory; a tensor is read from the disk when it is first used.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        _check_kind(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file or is damaged ({error}): copy it again"
        ) from None


def _check_kind(path: Path) -> None:
    """Check that no other file stands in a file's place, such as a Git LFS pointer.

    Raises:
        CheckpointError: One does.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        kind = recognise(file.read(START_BYTES))
    if kind is not None:
        raise CheckpointError(f"{path} {kind}")


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Check that tensors have exactly the expected names and shapes, and fitting dtypes.

    Args:
        found: The tensors, by name.
        expected: Tensors with the expected shapes and dtypes, by name; any float dtype fits
            another.
        what: What is checked, in the plural, for the message.

    Raises:
        CheckpointError: They do not; the message names the first three of each kind of difference.
    """
    wrong_shapes = []
    wrong_dtypes = []
    for name in sorted(expected.keys() & found.keys()):
        tensor = found[name]
        if tensor.shape != expected[name].shape:
            fitting = _shape(expected[name])
            wrong_shapes.append(f"{name} ({_shape(tensor)}, expected {fitting})")
        allowed = _allowed_dtypes(expected[name])
        if tensor.dtype not in allowed:
            fitting = " or ".join(_dtype_name(dtype) for dtype in allowed)
            wrong_dtypes.append(f"{name} ({_dtype_name(tensor.dtype)}, expected {fitting})")
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": wrong_shapes,
        "of another dtype": wrong_dtypes,
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


def _allowed_dtypes(expected: Tensor) -> tuple[torch.dtype, ...]:
    return FLOATS if expected.dtype in FLOATS else (expected.dtype,)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
