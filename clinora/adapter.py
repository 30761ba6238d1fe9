"""Adapters on disk in PEFT's layout: PEFT reads what we write, and we read what PEFT writes."""

import json
import re
import warnings
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
    ADAPTER_SEGMENTS,
    LoRAConfig,
    LoRALinear,
    insert_lora,
    lora_layers,
    lora_state_dict,
)
from clinora.modules import (
    find_modules,
    gathered,
    named_modules,
    named_parameters,
    running_means,
    unwrap,
    without_wrappers,
)
from clinora.targets import ALL_LINEAR, check_linear, find_targets
from clinora.variants import DoRAConfig, OLoRAConfig, PiSSAConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# PEFT's own two wrappers around a model give every tensor's name this prefix.
PEFT_PREFIX = "base_model.model."

# PEFT's options that are used here, or that do not change the result.
PEFT_INFORMATION = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "modules_to_save",
    "layers_to_transform", "rank_pattern", "alpha_pattern", "use_dora",
    "init_lora_weights", "auto_mapping", "peft_version", "runtime_config",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
# Values that switch any other option off.
PEFT_NEUTRAL = (None, False, [], {}, "none")
# The supported values of init_lora_weights. These change nothing but A and B ...
PEFT_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")
# ... and these subtract B·A from the base's weights, too.
PEFT_SHIFTS = {"pissa": PiSSAConfig, "olora": OLoRAConfig}
# The types of the options that are used here; null is allowed too.
PEFT_TYPES = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "use_rslora": (bool,),
    "modules_to_save": (list,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "use_dora": (bool,),
}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter and the head as PEFT would, so that PEFT reads them.

    A model wrapped by ``torch.compile``, activation checkpointing, DistributedDataParallel or FSDP
    gives the same files as the bare model. With FSDP every process must call this.

    Writes ``adapter_model.safetensors`` and ``adapter_config.json`` into ``folder``,
    which is created if it does not exist; each file is replaced as a whole.

    A classifier's head must be trained, because ``load_adapter`` treats a saved head as trained.
    ``clinora.training.train`` sets ``model.head_trained``; after your own training loop, set it
    to True.

    Raises:
        ValueError: ``apply_lora`` has not adapted this model; its head was never trained or is
            itself adapted; or it trains a parameter that is not part of the adapter.
        OSError: The folder cannot be written.

    Warns:
        UserWarning: Running statistics, such as those of BatchNorm, have changed since
            ``apply_lora`` and are not part of the adapter.
    """
    bare = unwrap(model)
    state = lora_state_dict(model)
    # Not hasattr: a wrapper of another library may pass on the attributes of the model inside.
    if "lora_config" not in vars(bare):
        raise ValueError(
            "only a whole model that was adapted with apply_lora can be saved as an adapter: give "
            "the model itself, without the wrapper of another library"
        )
    config: LoRAConfig = bare.lora_config
    if isinstance(config, PiSSAConfig):
        config = config.as_lora()
    _check_not_tied(bare, find_modules(bare, config.also_train))
    if isinstance(bare, LlamaForSequenceClassification):
        if isinstance(unwrap(bare.score), LoRALinear):  # PEFT and load_adapter expect a whole head
            raise ValueError("score, the head, is in targets: put it into also_train instead")
        if not bare.head_trained:
            raise ValueError(
                "this model's head was never trained: train it, or set head_trained = True on the "
                "model itself (inside any wrapper) after your own training loop"
            )
        score = unwrap(bare.score)
        with gathered(model) as whole:
            state["score.weight"] = whole(score.weight)  # even if it was not trained here
        if state["score.weight"].shape != (score.out_features, score.in_features):
            raise ValueError("score is cut into shards: call this on the model that FSDP returned")
    _check_all_saved(bare, state)
    source: Source | None = getattr(bare, "source", None)
    saved_whole = list(find_modules(bare, config.also_train))
    if "score.weight" in state and "score" not in saved_whole:
        saved_whole.append("score")
    kinds = {LlamaForSequenceClassification: "SEQ_CLS", LlamaForCausalLM: "CAUSAL_LM"}
    # Only the keys that matter: older versions of PEFT warn about keys that they do not know.
    options = {
        "peft_type": "LORA",
        "task_type": kinds.get(type(bare)),
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
        "modules_to_save": saved_whole or None,
    }
    if isinstance(config, DoRAConfig):
        options["use_dora"] = True
    if config.rank_pattern:
        options["rank_pattern"] = dict(config.rank_pattern)
    if config.alpha_pattern:
        options["alpha_pattern"] = dict(config.alpha_pattern)
    for name, layer in lora_layers(bare):
        A = f"{name}.lora_A"
        B = f"{name}.lora_B"
        state[A], state[B] = layer.factors(state[A], state[B])
    tensors = {}
    for name, tensor in state.items():
        # A layer used in two places has two names; safetensors refuses tensors that share memory.
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        tensors[_to_peft(name)] = copied
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ADAPTER_WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / ADAPTER_CONFIG, (json.dumps(options, indent=2) + "\n").encode())


def _check_all_saved(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Compare what training changes with what is saved: raise or warn about what would be lost."""
    whole = find_modules(model, model.lora_config.also_train)
    for name, module in find_modules(model, model.lora_config.targets).items():
        if type(module) is nn.Linear and not any(f"{name}.".startswith(f"{w}.") for w in whole):
            raise ValueError(
                f"{name} is one of the targets but has no LoRA any more: save the adapter before "
                "you merge a part of the model"
            )
    saved = set()
    lost = {}  # parameter → its name
    for name, parameter in named_parameters(model):
        if name in state:
            saved.add(parameter)
        elif parameter.requires_grad:
            lost[parameter] = name
    names = [name for parameter, name in lost.items() if parameter not in saved]
    if names:
        raise ValueError(
            f"{', '.join(names)} would be lost: training changes it, but the adapter holds only A, "
            "B and the modules in also_train. Name its module in also_train, or freeze it"
        )
    before = model.means_before_lora
    for name, mean in running_means(model).items():
        if name not in before or f"{name}.running_mean" in state:
            continue
        if not torch.equal(mean, before[name].to(mean)):  # .to: the model may have been cast
            warnings.warn(
                f"the adapter does not hold the running statistics of {name}, which training has "
                "changed: the loaded model will compute something else. Name the module in "
                "also_train, or keep it in evaluation mode while training",
                stacklevel=3,
            )


def _check_not_tied(model: nn.Module, trained_whole: dict[str, nn.Module]) -> None:
    """Refuse a trained embedding that is the head, too: PEFT trains a copy that is not the head.

    Raises:
        ValueError: The model is tied and its embedding is trained whole.
    """
    if isinstance(model, LlamaForCausalLM) and model.lm_head is None:
        for name, module in trained_whole.items():
            if module is model.model.embed_tokens:
                raise ValueError(
                    f"{name} cannot be trained whole here: it is also the model's head"
                )


def load_adapter(model: nn.Module, folder: str | Path) -> LoRAConfig:
    """Apply LoRA to a model and load the weights that ``save_adapter`` or PEFT wrote.

    Returns:
        The adapter's configuration, which is also ``model.lora_config``.

    Raises:
        CheckpointError: A file is missing or damaged, does not belong to this model, or has an
            unsupported option. The model stays unchanged.
        ValueError: The model is already adapted.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model is already adapted: call merge_lora on it, or load a new one")
    config_path = Path(folder, ADAPTER_CONFIG)
    options = read_json(config_path)
    config = _lora_config(options, model, config_path)
    path = Path(folder, ADAPTER_WEIGHTS)
    tensors = {}
    for peft_name, tensor in read_tensors(path).items():
        name = _from_peft(peft_name)
        if name in tensors:
            raise CheckpointError(f"{path} holds {name} under two names")
        tensors[name] = tensor
    source: Source | None = getattr(unwrap(model), "source", None)
    base = source.name if source else None
    trained_on = options.get("base_model_name_or_path")
    what = f"the tensors in {path} (made for the base {trained_on}; this model is {base})"
    targets = _peft_targets(model, options)
    if not targets:
        wanted = options["target_modules"]
        raise CheckpointError(f"{config_path}: no layer of this model matches the targets {wanted}")
    trained_whole = _peft_modules_to_save(model, options)
    try:
        check_tensors(tensors, _adapter_tensors(targets, trained_whole, config), what)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{name} in {path} has values that are not finite")
        _check_not_tied(unwrap(model), trained_whole)
        insert_lora(model, config, targets, trained_whole)
    except CheckpointError:
        raise
    except ValueError as error:  # from lora.py, which does not know the file
        raise CheckpointError(f"{config_path}: {error}") from None
    with torch.no_grad():
        for name, own in lora_state_dict(model).items():
            own.copy_(tensors[name])
    bare = unwrap(model)
    if isinstance(bare, LlamaForSequenceClassification) and "score.weight" in tensors:
        bare.head_trained = True
    return config


def saved_whole(folder: str | Path) -> dict[str, Tensor]:
    """Read the tensors of the modules that an adapter holds whole, such as a head.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    whole = {}
    for peft_name, tensor in read_tensors(Path(folder, ADAPTER_WEIGHTS)).items():
        name = _from_peft(peft_name)
        if ADAPTER_SEGMENTS.isdisjoint(name.split(".")):
            whole[name] = tensor
    return whole


def _peft_targets(model: nn.Module, options: dict) -> dict[str, nn.Module]:
    """Find the layers that PEFT adapts: the targets, except inside modules that are saved whole."""
    whole = options.get("modules_to_save") or ()
    targets = options["target_modules"]
    layers = _peft_layers(options)
    if targets == ALL_LINEAR:
        return find_targets(model, ALL_LINEAR, heads=tuple(whole))
    found = {}
    for path, module in named_modules(model):
        if isinstance(targets, str):  # a regular expression over whole names
            matches = re.fullmatch(targets, path) is not None
        else:
            matches = any(f".{path}".endswith(f".{target}") for target in targets)
        if layers and path not in targets and _peft_layer_number(path) not in layers:
            matches = False
        if matches and not any(f".{name}." in f".{path}." for name in whole):
            found[path] = module
    return found


def _peft_layers(options: dict) -> list:
    """Give the numbers of the layers that PEFT adapts; an empty list stands for all."""
    layers = options.get("layers_to_transform")
    if layers is None:
        return []
    return layers if isinstance(layers, list) else [layers]


def _peft_layer_number(path: str) -> int | None:
    """Give the number of a module's layer: the first that has two segments in front, as in PEFT."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return int(found[1]) if found else None


def _peft_modules_to_save(model: nn.Module, options: dict) -> dict[str, nn.Module]:
    """Find the modules that PEFT saves whole: "classifier" matches "pre_classifier", too."""
    endings = tuple(options.get("modules_to_save") or ())
    found = {}
    for path, module in named_modules(model):
        if path.endswith(endings) and any(True for _ in module.parameters()):
            found[path] = module
    return found


def _adapter_tensors(
    targets: dict[str, nn.Module], trained_whole: dict[str, nn.Module], config: LoRAConfig
) -> dict[str, Tensor]:
    """Give the names and shapes of an adapter's tensors, on the meta device.

    Raises:
        ValueError: A target cannot be adapted.
    """
    expected = {}
    for name, linear in targets.items():
        check_linear(name, linear)
        out, width = linear.weight.shape
        rank = config.for_layer(name).rank
        expected[f"{name}.lora_A"] = torch.empty(rank, width, device="meta")
        expected[f"{name}.lora_B"] = torch.empty(out, rank, device="meta")
        if isinstance(config, DoRAConfig):
            expected[f"{name}.lora_magnitude_vector"] = torch.empty(out, device="meta")
    for name, module in trained_whole.items():
        for parameter_name, tensor in module.state_dict().items():
            expected[f"{name}.{without_wrappers(parameter_name)}"] = tensor
    return expected


def _to_peft(name: str) -> str:
    if name.endswith((".lora_A", ".lora_B")):
        return f"{PEFT_PREFIX}{name}.weight"
    return f"{PEFT_PREFIX}{name}"


def _from_peft(name: str) -> str:
    """Undo ``_to_peft``; files saved by hand may also hold the adapter's name, "default"."""
    name = re.sub(r"\.(lora_[AB])(\.default)?\.weight$", r".\1", name)
    name = re.sub(r"\.(lora_magnitude_vector)(\.default)?(\.weight)?$", r".\1", name)
    return name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default.", ".")


def _lora_config(options: dict, model: nn.Module, path: Path) -> LoRAConfig:
    """Translate PEFT's adapter_config.json; unsupported options raise an error that names them."""
    if options.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {options.get('peft_type')!r}, expected 'LORA'")
    for key, value in options.items():
        if key not in PEFT_INFORMATION and not _is_one_of(value, PEFT_NEUTRAL):
            raise CheckpointError(f"{path}: {key} = {value!r} is not supported")
    initialisation = options.get("init_lora_weights", True)
    kind: type[LoRAConfig] = LoRAConfig
    if isinstance(initialisation, str) and initialisation in PEFT_SHIFTS:
        kind = PEFT_SHIFTS[initialisation]
    elif not _is_one_of(initialisation, PEFT_INITIALISATIONS):
        raise CheckpointError(
            f"{path}: init_lora_weights = {initialisation!r} is not supported: it also changes the "
            "base"
        )
    if options.get("use_dora"):
        if kind is not LoRAConfig:
            raise CheckpointError(f"{path}: use_dora with {initialisation!r} is not supported")
        kind = DoRAConfig
    layers = _peft_layers(options)
    if not all(type(layer) is int for layer in layers):
        raise CheckpointError(f"{path}: layers_to_transform is {layers!r}, expected whole numbers")
    for key, types in PEFT_TYPES.items():
        value = options.get(key)
        if value is not None and not _has_type(value, types):
            expected = " or ".join(kind.__name__ for kind in types).replace("list", "list of str")
            raise CheckpointError(f"{path}: {key} is {value!r}, expected {expected}")
    # Without these, PEFT would silently use its defaults, and so another scaling.
    lacking = [key for key in ("r", "lora_alpha", "target_modules") if not options.get(key)]
    if lacking:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)}")
    targets = options["target_modules"]
    whole = options.get("modules_to_save") or ()
    try:
        if isinstance(targets, str) or layers:
            targets = _peft_targets(model, options)
        # PEFT finds more by these names than find_modules does: the others get their full names.
        found = _peft_modules_to_save(model, options)
        others = [name for name in found if name not in find_modules(model, whole)]
        return kind(
            rank=options["r"],
            alpha=options["lora_alpha"],
            dropout=options.get("lora_dropout") or 0.0,
            targets=tuple(dict.fromkeys(targets)),  # without repetitions
            also_train=tuple(dict.fromkeys([*whole, *others])),
            rank_stabilized=bool(options.get("use_rslora")),
            rank_pattern=options.get("rank_pattern") or {},
            alpha_pattern=options.get("alpha_pattern") or {},
        )
    except (ValueError, re.error) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _has_type(value: object, types: tuple[type, ...]) -> bool:
    """Tell whether a value has exactly one of the types; a list must hold only strings."""
    if type(value) not in types:
        return False
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return True


def _is_one_of(value: object, choices: tuple) -> bool:
    """Compare types as well as values: with ``in`` alone, 0 equals False and 1 equals True."""
    return any(type(value) is type(choice) and value == choice for choice in choices)
