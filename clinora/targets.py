"""Which layers of a model LoRA adapts: names as PEFT writes them, and what can be adapted."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from clinora.modules import find_modules, is_whole, named_modules

ALL_LINEAR = "all-linear"
# Names that classification heads have in Transformers. A pretrained model gets such a head anew.
HEAD_NAMES = ("classifier", "classification_head", "pre_classifier", "qa_outputs", "score")

Value = TypeVar("Value")


def read_targets(words: Sequence[str]) -> tuple[str, ...] | str:
    """Read the targets of a command line: names of layers, or "all-linear" alone."""
    if list(words) == [ALL_LINEAR]:
        return ALL_LINEAR
    return tuple(words)


def find_targets(
    model: nn.Module,
    targets: tuple[str, ...] | str,
    layers: tuple[int, ...] | None = None,
    heads: tuple[str, ...] = (),
) -> dict[str, nn.Module]:
    """Find the layers to adapt; the keys are their full names.

    Args:
        model: The model, with or without wrappers.
        targets: The last segments of names; or a regular expression for the whole name; or
            "all-linear" for every linear layer outside heads.
        layers: Numbers of the decoder layers to stay in; None for all.
        heads: Names of further heads, beside the usual ones and ``lm_head``.

    Raises:
        ValueError: A target matches no module, or no layer is left. The message lists the linear
            layers that there are.
    """
    linears = [path for path, m in named_modules(model) if type(m) is nn.Linear]
    listed = ", ".join(_last_segments(linears)) or "(none)"
    if targets == ALL_LINEAR:
        outputs = find_modules(model, (*HEAD_NAMES, "lm_head", *heads))
        names = [name for name in linears if name and not is_inside(name, outputs)]
    elif isinstance(targets, str):
        names = [path for path, _ in named_modules(model) if re.fullmatch(targets, path)]
    else:
        for target in targets:
            if not find_modules(model, (target,)):
                raise ValueError(
                    f"no layer is named {target!r}; this model's linear layers: {listed}"
                )
        names = list(find_modules(model, targets))
    where = ""
    if isinstance(targets, str) and find_modules(model, (targets,)):
        where = (
            " (a string is a regular expression for the whole name; to adapt every layer with this "
            f"name, give the tuple {(targets,)})"
        )
    if layers is not None:
        names = [name for name in names if layer_number(name) in layers]
        where += f" in the layers {', '.join(map(str, layers))}"
    if not names:
        raise ValueError(
            f"no layer matches {targets!r}{where}; this model's linear layers: {listed}"
        )
    modules = dict(named_modules(model))
    # A layer that is used twice is adapted in both places, so it is found under both names.
    chosen = {modules[name] for name in names}
    return {name: module for name, module in modules.items() if module in chosen}


def layer_number(name: str) -> int | None:
    """Give the first number in a dotted name: "layers.3.self_attn.q_proj" → 3."""
    for segment in name.split("."):
        if segment.isdecimal():
            return int(segment)
    return None


def short_names(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Give the last segments of names if they stand for exactly these modules, else the names."""
    short = tuple(_last_segments(names))
    if set(find_modules(model, short)) == set(names):
        return short
    return tuple(names)


def _last_segments(names: Iterable[str]) -> list[str]:
    segments = {name.split(".")[-1] for name in names}
    return sorted(segments - {""})  # "" is the model itself


def first_match(pattern: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """Give the value of the first key that is a regular expression for the end of a name.

    As in PEFT's ``rank_pattern``, "q_proj" and "layers.0.self_attn.q_proj" match whole segments.
    """
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return otherwise


def check_pattern_matches(pattern: str, names: Iterable[str]) -> None:
    """Check that a key of a pattern matches at least one name.

    Raises:
        ValueError: It matches none, so it would have no effect.
    """
    if not any(first_match({pattern: True}, name, False) for name in names):
        raise ValueError(f"the pattern {pattern!r} matches none of the layers to adapt")


def check_linear(name: str, module: nn.Module) -> None:
    """Check that a module is a plain linear layer, so that LoRA can take its place.

    Raises:
        ValueError: It is of another class; it holds other tensors, as after pruning, weight
            normalisation or spectral normalisation; FSDP has cut its weight into shards; or its
            ``forward`` was replaced.
    """
    if type(module) is not nn.Linear:  # a subclass may compute something else
        raise ValueError(f"{name} is a {type(module).__name__}: only nn.Linear can be adapted")
    own = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    if others := sorted(own - {"weight", "bias"}):
        raise ValueError(
            f"{name} also holds {', '.join(others)}, as pruned and normalised layers do: make it "
            "a plain layer first, for example with torch.nn.utils.prune.remove, "
            "remove_weight_norm or remove_spectral_norm"
        )
    if not isinstance(module.weight, nn.Parameter):
        raise ValueError(f"the weight of {name} is not a parameter: only plain layers are adapted")
    if not is_whole(module):
        raise ValueError(f"the weight of {name} is cut into shards: apply LoRA before FSDP")
    if "forward" in vars(module):  # accelerate replaces it to move weights between devices
        raise ValueError(
            f"another function replaces the forward method of {name}, as accelerate's offloading "
            "does: apply LoRA before that"
        )


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a dotted name is one of ``modules`` or lies inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
