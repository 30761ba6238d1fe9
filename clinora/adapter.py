"""Adapters on disk in PEFT's layout: PEFT reads the adapters written here, and the reverse."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from clinora.checkpoint import (
    CheckpointError,
    Source,
    check_tensors,
    read_json,
    read_tensors,
    write_atomically,
)
from clinora.llama import LlamaForCausalLM, LlamaForSequenceClassification
from clinora.lora import (
    LoRAConfig,
    LoRALinear,
    find_modules,
    insert_lora,
    lora_state_dict,
    target_linears,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# PEFT names every tensor as if the model stood two wrappers deep.
PEFT_PREFIX = "base_model.model."

# Options of PEFT that are used here or do not change what is computed, and the values with which
# other options are off.
PEFT_INFORMATION = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "modules_to_save",
    "init_lora_weights", "auto_mapping", "peft_version", "runtime_config",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
PEFT_NEUTRAL = (None, False, [], {}, "none")
# Other initialisations also change the base's weights.
PEFT_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")
# The types of the options that are used here; null is allowed too.
PEFT_TYPES = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "use_rslora": (bool,),
    "modules_to_save": (list,),
}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter and the head as PEFT would, so that PEFT reads them.

    Writes ``adapter_model.safetensors`` (float32) and ``adapter_config.json`` into ``folder``,
    which is made if need be; each file is replaced as a whole.

    A classifier's head must have been trained: whoever loads the adapter assumes that it was.
    ``clinora.training.train`` sets ``model.head_trained``; after your own training loop, set it
    to True.

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
        if isinstance(model.score, LoRALinear):  # PEFT and load_adapter expect a whole head
            raise ValueError("score is in targets, which a head cannot be: put it into also_train")
        if not model.head_trained:
            raise ValueError(
                "this model's head was never trained: train it, or set model.head_trained = True "
                "if a training loop of your own did"
            )
        state["score.weight"] = model.score.weight  # saved even if it was not trained here
    source: Source | None = getattr(model, "source", None)
    whole = list(find_modules(model, config.also_train))
    if "score.weight" in state and "score" not in whole:
        whole.append("score")
    kinds = {LlamaForSequenceClassification: "SEQ_CLS", LlamaForCausalLM: "CAUSAL_LM"}
    # Only the keys that matter: an older PEFT warns of keys that it does not know.
    peft = {
        "peft_type": "LORA",
        "task_type": kinds.get(type(model)),
        "base_model_name_or_path": source.name if source else None,
        "revision": source.revision if source else None,
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
    tensors = {}
    for name, tensor in state.items():
        # A copy: a layer in two places has two names, and safetensors refuses shared memory.
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        tensors[_to_peft(name)] = copied
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ADAPTER_WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / ADAPTER_CONFIG, (json.dumps(peft, indent=2) + "\n").encode())


def load_adapter(model: nn.Module, folder: str | Path) -> LoRAConfig:
    """Apply LoRA to a model and fill it from what ``save_adapter`` or PEFT wrote.

    Returns:
        The adapter's configuration, also ``model.lora_config``.

    Raises:
        CheckpointError: A file is missing or damaged, does not belong to this model, or has an
            option that is not supported. The model is left as it was.
        ValueError: The model is adapted already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model is adapted already: merge_lora it, or start from a fresh one")
    about = Path(folder, ADAPTER_CONFIG)
    peft = read_json(about)
    config = _lora_config(peft, model, about)
    path = Path(folder, ADAPTER_WEIGHTS)
    tensors = {}
    for name, tensor in read_tensors(path).items():
        if _from_peft(name) in tensors:
            raise CheckpointError(f"{path} holds {_from_peft(name)} under two names")
        tensors[_from_peft(name)] = tensor
    source: Source | None = getattr(model, "source", None)
    base = source.name if source else None
    what = f"{path} (made for the base {peft.get('base_model_name_or_path')}; this model is {base})"
    try:
        check_tensors(tensors, _adapter_tensors(model, config), what)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{path} holds numbers that are not finite: {name}")
        insert_lora(model, config)
    except CheckpointError:
        raise
    except ValueError as error:  # from lora.py, which does not know the file
        raise CheckpointError(f"{about}: {error}") from None
    model.load_state_dict(tensors, strict=False)  # checked above; strict would ask for the base
    if isinstance(model, LlamaForSequenceClassification) and "score.weight" in tensors:
        model.head_trained = True
    return config


def _adapter_tensors(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    """List the tensors of an adapter for this model, as meta tensors of their shapes."""
    expected = {}
    for name, linear in target_linears(model, config.targets).items():
        out, width = linear.weight.shape
        expected[f"{name}.lora_A"] = torch.empty(config.rank, width, device="meta")
        expected[f"{name}.lora_B"] = torch.empty(out, config.rank, device="meta")
    for name, head in find_modules(model, config.also_train).items():
        for inner, tensor in head.state_dict().items():
            expected[f"{name}.{inner}"] = tensor
    return expected


def _to_peft(name: str) -> str:
    lora = name.endswith((".lora_A", ".lora_B"))
    return f"{PEFT_PREFIX}{name}.weight" if lora else f"{PEFT_PREFIX}{name}"


def _from_peft(name: str) -> str:
    """Undo ``_to_peft``; names in files saved by hand may have the adapter's name, "default"."""
    name = re.sub(r"\.(lora_[AB])(\.default)?\.weight$", r".\1", name)
    return name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default.", ".")


def _lora_config(peft: dict, model: nn.Module, path: Path) -> LoRAConfig:
    """Translate PEFT's adapter_config.json; unsupported options raise an error that names them."""
    if peft.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {peft.get('peft_type')!r}, expected 'LORA'")
    for key, value in peft.items():
        if key not in PEFT_INFORMATION and not _is_one_of(value, PEFT_NEUTRAL):
            raise CheckpointError(f"{path}: {key} = {value!r} is not supported")
    if not _is_one_of(peft.get("init_lora_weights", True), PEFT_INITIALISATIONS):
        raise CheckpointError(
            f"{path}: init_lora_weights = {peft['init_lora_weights']!r} is not supported: it also "
            "changes the base"
        )
    for key, types in PEFT_TYPES.items():
        value = peft.get(key)
        fits = type(value) in types and (
            type(value) is not list or all(isinstance(item, str) for item in value)
        )
        if value is not None and not fits:
            expected = " or ".join(kind.__name__ for kind in types).replace("list", "list of str")
            raise CheckpointError(f"{path}: {key} is {value!r}, expected {expected}")
    # PEFT silently uses its defaults for these, and would scale by another factor.
    lacking = [key for key in ("r", "lora_alpha", "target_modules") if not peft.get(key)]
    if lacking:
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
