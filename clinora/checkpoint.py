"""Bases from a folder or the Hub, and adapters on disk in PEFT's layout.

Whatever is loaded is checked whole: a missing, extra or wrongly shaped tensor is an error that
names it. Files are safetensors and JSON, never pickle, and appear whole or not at all.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clinora.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from clinora.lora import (
    LoRAConfig,
    LoRALinear,
    find_modules,
    insert_lora,
    lora_state_dict,
    target_linears,
)

BUNDLED = Path(__file__).parent / "bundled"

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# PEFT names every tensor as if the model stood two wrappers deep.
PEFT_PREFIX = "base_model.model."

# What a floating tensor may be held in: eight bits would need a scale that no plain file has.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CheckpointError(ValueError):
    """A file of weights, or the configuration beside it, is not what it has to be."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model came from.

    Attributes:
        name: "bundled", a folder or a Hub id.
        revision: The Hub's revision; None for a folder.
        folder: Where its files lie on this machine.
    """

    name: str
    revision: str | None
    folder: Path


def find_base(source: str | Path, revision: str | None = None) -> Source:
    """Find a base model, downloading it from the Hub if ``source`` is no folder.

    Args:
        source: "bundled", a folder, or a Hub id such as "TinyLlama/TinyLlama-1.1B-Chat-v1.0".
        revision: A commit, branch or tag of the Hub; None is its main branch.

    Raises:
        CheckpointError: It is no folder and cannot be had from the Hub.
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
        dtype: What to hold the weights in; None is the file's.
        device: Where to.

    Raises:
        CheckpointError: The files are missing, damaged or not this model's.
        ValueError: ``config.json`` asks for what ``LlamaConfig`` does not do, or ``num_labels`` is
            no number of classes.
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
    tensors = {}
    for file, names in _weight_files(found.folder).items():
        came = _read_tensors(file)
        if names is not None and (differing := came.keys() ^ names):
            raise CheckpointError(
                f"{file} and the index beside it disagree about {min(differing)}: copy both again"
            )
        tensors |= came
    # Left out on purpose: old files' rotary buffers, which the model computes; a tied head, which
    # is the embedding; the language-model head, for a classifier.
    ignored = {n for n in tensors if n.endswith(".rotary_emb.inv_freq")}
    if num_labels is not None or config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    expected = model.state_dict()
    if num_labels is not None and "score.weight" not in tensors:
        tensors["score.weight"] = nn.init.normal_(
            torch.empty(num_labels, config.hidden_size), std=config.initializer_range
        )
    elif num_labels is not None:
        model.head_trained = True
    _check_tensors(tensors, expected, f"the weights in {found.folder}")
    if dtype is None:
        dtype = tensors["model.embed_tokens.weight"].dtype
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device, torch.float32 if name == "score.weight" else dtype)
    model.load_state_dict(tensors, assign=True)
    model.source = found
    return model


class _DrawsNothing(TorchFunctionMode):
    """Skips normal_: on the meta device it fills nothing, yet imports PyTorch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        return named.get("tensor", *args[:1]) if func is nn.init.normal_ else func(*args, **named)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter and the head as PEFT would, so that PEFT reads them.

    Writes ``adapter_model.safetensors`` (float32) and ``adapter_config.json`` into ``folder``,
    which is made if need be; each file is replaced as a whole.

    A classifier's head must have been trained, as whoever loads the adapter takes it to be.
    ``clinora.training.train`` notes that it was; after a training loop of your own, set
    ``model.head_trained = True``.

    Raises:
        ValueError: ``apply_lora`` has not adapted this model, or its head was never trained or
            is itself adapted.
        OSError: The folder cannot be written.
    """
    state = lora_state_dict(model)
    if not hasattr(model, "lora_config"):
        raise ValueError("only a whole model that apply_lora adapted can be saved as an adapter")
    config: LoRAConfig = model.lora_config
    if isinstance(model, LlamaForSequenceClassification):
        if isinstance(model.score, LoRALinear):  # no one could load it: a head comes whole
            raise ValueError("score is in targets, which a head cannot be: put it into also_train")
        if not model.head_trained:
            raise ValueError(
                "this model's head was never trained: train it, or set model.head_trained = True "
                "if a training loop of your own did"
            )
        state["score.weight"] = model.score.weight  # the head travels even where it did not train
    source: Source | None = getattr(model, "source", None)
    whole = list(find_modules(model, config.also_train))
    if "score.weight" in state and "score" not in whole:
        whole.append("score")
    kinds = {LlamaForSequenceClassification: "SEQ_CLS", LlamaForCausalLM: "CAUSAL_LM"}
    # The keys that decide, no more: an older PEFT warns of keys that it does not know.
    peft = {
        "peft_type": "LORA",
        "task_type": kinds.get(type(model)),
        "base_model_name_or_path": source and source.name,
        "revision": source and source.revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": config.rank_stabilized,
        "modules_to_save": whole or None,
    }
    # Copies, as a layer at two places has two names and safetensors refuses shared memory.
    as_written = {"memory_format": torch.contiguous_format}
    tensors = {_to_peft(name): t.detach().cpu().clone(**as_written) for name, t in state.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ADAPTER_WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / ADAPTER_CONFIG, (json.dumps(peft, indent=2) + "\n").encode())


def load_adapter(model: nn.Module, folder: str | Path) -> LoRAConfig:
    """Apply LoRA to a model and fill it from what ``save_adapter`` or PEFT wrote.

    Returns:
        The adapter's configuration, also ``model.lora_config``.

    Raises:
        CheckpointError: A file is missing or damaged, does not belong to this model, or asks for
            what this library does not do. The model is left as it was.
        ValueError: The model is adapted already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model is adapted already: merge_lora it, or start from a fresh one")
    about = Path(folder, ADAPTER_CONFIG)
    peft = read_json(about)
    config = _lora_config(peft, model, about)
    path = Path(folder, ADAPTER_WEIGHTS)
    tensors = {}
    for name, tensor in _read_tensors(path).items():
        if _from_peft(name) in tensors:
            raise CheckpointError(f"{path} holds {_from_peft(name)} under two names")
        tensors[_from_peft(name)] = tensor
    source = getattr(model, "source", None)
    made_for = f"made for the base {peft.get('base_model_name_or_path')}"
    try:
        _check_tensors(
            tensors,
            _adapter_tensors(model, config),
            f"{path} ({made_for}; this model is {source and source.name})",
        )
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise CheckpointError(f"{path} holds numbers that are not finite: {broken[0]}")
        insert_lora(model, config)
    except CheckpointError:
        raise
    except ValueError as error:  # from LoRA, which knows of no file
        raise CheckpointError(f"{about}: {error}") from None
    model.load_state_dict(tensors, strict=False)  # checked above; strict would ask for the base
    if isinstance(model, LlamaForSequenceClassification) and "score.weight" in tensors:
        model.head_trained = True
    return config


def _adapter_tensors(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    """Name what an adapter for this model consists of: meta tensors of the right shapes."""
    expected = {}
    for name, linear in target_linears(model, config.targets).items():
        out, width = linear.weight.shape
        expected[f"{name}.lora_A"] = torch.empty(config.rank, width, device="meta")
        expected[f"{name}.lora_B"] = torch.empty(out, config.rank, device="meta")
    for name, head in find_modules(model, config.also_train).items():
        expected |= {f"{name}.{inner}": tensor for inner, tensor in head.state_dict().items()}
    return expected


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
    where = read_json(folder / INDEX).get("weight_map")  # tensor → file
    files = set(where.values()) if isinstance(where, dict) and _are_names(where.values()) else ()
    if not files or any(Path(file).name != file for file in files):
        raise CheckpointError(f"{folder / INDEX} has no usable weight_map")
    return {folder / file: {n for n, f in where.items() if f == file} for file in sorted(files)}


def _are_names(values: Iterable) -> bool:
    return all(isinstance(value, str) for value in values)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory; nothing is read from the disk until it is used."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file or is damaged ({error}): copy it again"
        ) from None


def _check_tensors(came: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Refuse a set of tensors that is not exactly the expected one, naming the first few."""
    both = sorted(expected.keys() & came.keys())
    wrong = {
        "missing": sorted(expected.keys() - came.keys()),
        "unexpected": sorted(came.keys() - expected.keys()),
        "of another shape": [
            f"{name} ({_shape(came[name])}, expected {_shape(expected[name])})"
            for name in both
            if came[name].shape != expected[name].shape
        ],
        "of another dtype": [
            f"{name} ({_list(came[name].dtype)}, expected {_list(*_allowed(expected[name]))})"
            for name in both
            if came[name].dtype not in _allowed(expected[name])
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


def _to_peft(name: str) -> str:
    lora = name.endswith((".lora_A", ".lora_B"))
    return f"{PEFT_PREFIX}{name}.weight" if lora else f"{PEFT_PREFIX}{name}"


def _from_peft(name: str) -> str:
    """Undo ``_to_peft``; an adapter's name ("default") may stand in files saved by hand."""
    name = re.sub(r"\.(lora_[AB])(\.default)?\.weight$", r".\1", name)
    return name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default.", ".")


# What PEFT writes that says nothing of the arithmetic, and the values that ask for nothing.
PEFT_INFORMATION = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "modules_to_save",
    "init_lora_weights", "auto_mapping", "peft_version", "runtime_config",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
PEFT_NEUTRAL = (None, False, [], {}, "none")
# Other initialisations change the base's weights too, and these names do not say how.
PEFT_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")
# What is used must be of these types, or null.
PEFT_TYPES = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "use_rslora": (bool,),
    "modules_to_save": (list,),
}


def _lora_config(peft: dict, model: nn.Module, path: Path) -> LoRAConfig:
    """Translate PEFT's adapter_config.json, refusing by name what is not done here."""
    if peft.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {peft.get('peft_type')!r}, expected 'LORA'")
    for key, value in peft.items():
        if key not in PEFT_INFORMATION and not _is_one_of(value, PEFT_NEUTRAL):
            raise CheckpointError(f"{path}: {key} = {value!r} is not supported")
    if not _is_one_of(peft.get("init_lora_weights", True), PEFT_INITIALISATIONS):
        raise CheckpointError(
            f"{path}: init_lora_weights = {peft['init_lora_weights']!r} changes the base, too: "
            "not supported"
        )
    for key, types in PEFT_TYPES.items():
        value = peft.get(key)
        fits = type(value) in types and (type(value) is not list or _are_names(value))
        if value is not None and not fits:
            expected = " or ".join(kind.__name__ for kind in types).replace("list", "list of str")
            raise CheckpointError(f"{path}: {key} is {value!r}, expected {expected}")
    # PEFT falls back on defaults for these, and would scale by another factor without a word.
    if lacking := [key for key in ("r", "lora_alpha", "target_modules") if not peft.get(key)]:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)}")
    targets = peft["target_modules"]
    try:
        if isinstance(targets, str):  # a regular expression over whole names
            targets = [n for n, _ in model.named_modules() if re.fullmatch(targets, n)]
        return LoRAConfig(
            rank=peft["r"],
            alpha=peft["lora_alpha"],
            dropout=peft.get("lora_dropout") or 0.0,
            targets=tuple(dict.fromkeys(targets)),
            also_train=tuple(dict.fromkeys(peft.get("modules_to_save") or ())),
            rank_stabilized=bool(peft.get("use_rslora")),
        )
    except (ValueError, re.error) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _is_one_of(value: object, choices: tuple) -> bool:
    """Tell 0 from False and 1 from True, which ``in`` does not."""
    return any(type(value) is type(choice) and value == choice for choice in choices)
