"""Several adapters on one base: load them beside each other, choose one by a call, add them.

    models = load_adapters(base, {"cardiology": "runs/a", "surgery": "runs/b"})
    models["surgery"](ids, lengths)
    both = add_adapters(base, models, {"cardiology": 0.5, "surgery": 0.5})

Each adapter has a model of its own, and all of them share the weights of the base. A call chooses
an adapter by the model that it calls. Nothing is switched, so threads can use different adapters at
the same time.

Shapes: in and out are the widths of an adapted layer, r its rank.
"""

import copy
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from clinora.adapter import load_adapter, saved_whole
from clinora.llama import LlamaForSequenceClassification
from clinora.lora import LoRAConfig, insert_lora, lora_layers, lora_state_dict
from clinora.modules import find_modules, named_modules, unwrap, without_wrappers
from clinora.variants import DoRALinear


def load_adapters(model: nn.Module, folders: Mapping[str, str | Path]) -> dict[str, nn.Module]:
    """Load several adapters beside each other, each into a model that shares the base's weights.

    Args:
        model: The base, without an adapter; it stays as it is. A Llama's head may have another
            number of classes, because each adapter brings its own head.
        folders: The folders that ``save_adapter`` or PEFT wrote, by the adapter's name.

    Returns:
        A model for each name. Only its A and B, and what the adapter holds whole, are its own.

    Raises:
        CheckpointError: As for ``load_adapter``.
        ValueError: The model is already adapted.
    """
    models = {}
    for name, folder in folders.items():
        whole = saved_whole(folder)
        twin = share_weights(model, but=whole)
        if isinstance(twin, LlamaForSequenceClassification) and "score.weight" in whole:
            _set_classes(twin, len(whole["score.weight"]))
        load_adapter(twin, folder)
        models[name] = twin
    return models


def add_adapters(
    model: nn.Module, models: Mapping[str, nn.Module], weights: Mapping[str, float]
) -> nn.Module:
    """Add adapters with weights: W + Σ w·s·B·A, as one adapter whose rank is the sum of theirs.

    The factors are stacked: A = [A₁; A₂] and B = [w₁·s₁·B₁, w₂·s₂·B₂]. A head, and any other module
    that was trained whole, is the weighted sum of the adapters' modules. Weights that sum to 1 keep
    the scale of a head's logits.

    Args:
        model: The base, without an adapter.
        models: What ``load_adapters`` returned for this base.
        weights: The weight of each adapter that takes part, by name.

    Returns:
        A new model that shares the base's weights.

    Raises:
        ValueError: A name is unknown; no adapter takes part; a weight is not finite; one of the
            adapters is DoRA, whose update is no product of two factors; their modules that were
            trained whole differ in name or shape; or the summed rank is too large for a layer.
    """
    if not weights or not weights.keys() <= models.keys():
        raise ValueError(
            f"the adapters to add are {list(weights)}: expected some of {list(models)}"
        )
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"weights is {dict(weights)}: expected finite numbers")
    stacked_A: dict[str, list[Tensor]] = {}  # layer → (r × in) of each adapter
    stacked_B: dict[str, list[Tensor]] = {}  # layer → (out × r)
    wholes = []  # of each adapter: tensor of a module that was trained whole → its weighted value
    for name, weight in weights.items():
        for layer_name, layer in lora_layers(models[name]):
            if isinstance(layer, DoRALinear):
                raise ValueError(f"{name} is a DoRA adapter: only products B·A can be added")
            A, B = layer.factors(layer.lora_A.detach(), layer.lora_B.detach())
            stacked_A.setdefault(layer_name, []).append(A)
            stacked_B.setdefault(layer_name, []).append(B * (weight * layer.config.scaling))
        wholes.append(_weighted_wholes(models[name], weight))
    shapes = [{key: tensor.shape for key, tensor in whole.items()} for whole in wholes]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "the modules that were trained whole differ in name or shape: only adapters with heads "
            "of the same classes can be added"
        )

    tensors = {key: sum(whole[key] for whole in wholes) for key in wholes[0]}
    ranks = {}
    for layer_name, factors in stacked_A.items():
        tensors[f"{layer_name}.lora_A"] = torch.cat(factors)
        tensors[f"{layer_name}.lora_B"] = torch.cat(stacked_B[layer_name], dim=1)
        ranks[layer_name] = len(tensors[f"{layer_name}.lora_A"])
    first = models[next(iter(weights))]
    largest = max(ranks.values())
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config = LoRAConfig(
        rank=largest,
        alpha=largest,  # the scaling is 1: each part has its own, in B
        dropout=0,
        targets=tuple(ranks),
        also_train=unwrap(first).lora_config.also_train,
        rank_pattern=others,
        alpha_pattern=others,
    )
    added = share_weights(model, but=wholes[0])
    if isinstance(added, LlamaForSequenceClassification) and "score.weight" in tensors:
        _set_classes(added, len(tensors["score.weight"]))
        added.head_trained = unwrap(first).head_trained
    modules = dict(named_modules(added))
    linears = {name: modules[name] for name in ranks}
    insert_lora(added, config, linears, find_modules(added, config.also_train))
    with torch.no_grad():
        for key, own in lora_state_dict(added).items():
            own.copy_(tensors[key])
    return added


def share_weights(model: nn.Module, but: Collection[str]) -> nn.Module:
    """Copy a model so that all parameters share memory with the original's, except those named."""
    bare = unwrap(model)
    shared = {}
    for name, parameter in bare.named_parameters():
        values = parameter.detach()
        if without_wrappers(name) in but:
            values = values.clone()
        shared[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    return copy.deepcopy(bare, shared)


def _weighted_wholes(model: nn.Module, weight: float) -> dict[str, Tensor]:
    whole = {}
    for key, tensor in lora_state_dict(model).items():
        if not key.endswith((".lora_A", ".lora_B")):
            whole[key] = weight * tensor
    return whole


def _set_classes(model: LlamaForSequenceClassification, classes: int) -> None:
    """Give a model a head with another number of classes; its weights come from an adapter."""
    weight = model.score.weight
    model.score = nn.Linear(
        model.score.in_features, classes, bias=False, device=weight.device, dtype=weight.dtype
    )
