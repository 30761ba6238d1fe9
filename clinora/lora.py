"""LoRA for any PyTorch model: y = W·x + s·B·A·x, where W is frozen and only A and B are trained.

A (r × in) and B (out × r) are written as in Hu et al. 2021, section 4.1. The scaling s is α/r, or
α/√r if it is rank-stabilised (Kalajdzievski 2023, section 3). B starts at zero, so the output of a
newly adapted model equals its base's to the bit.

There is no merged state that could go wrong: ``merge_lora`` replaces the adapted layers by plain
``nn.Linear`` layers for good. The only switch, ``lora_strength``, multiplies s.

Shapes: in and out are the widths of the adapted layer, r its rank.
"""

import math
import numbers
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from clinora.kernels import dropout
from clinora.modules import (
    add_hooks,
    find_modules,
    gathered,
    hand_over_hooks,
    is_whole,
    named_modules,
    named_parameters,
    parents_of,
    remove_hooks,
    replace_modules,
    running_means,
    unwrap,
    without_wrappers,
)
from clinora.targets import (
    HEAD_NAMES,
    check_linear,
    check_pattern_matches,
    find_targets,
    first_match,
    is_inside,
    short_names,
)

# One of these is in the name of every parameter of an adapter, of ours as of PEFT's.
ADAPTER_SEGMENTS = {"lora_A", "lora_B", "lora_magnitude_vector"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """What to adapt, and how. PEFT's name for each value stands in brackets.

    Attributes:
        rank: r, the inner width of A and B [``r``].
        alpha: α, the numerator of the scaling [``lora_alpha``].
        dropout: Probability of dropping an entry of LoRA's input in training [``lora_dropout``].
        targets: Names of the linear layers to adapt: the last segments of their dotted names, as
            many segments as tell the layers apart ("q_proj" for all of them,
            "layers.0.self_attn.q_proj" for one). A string is a regular expression for the whole
            name, or "all-linear" for every linear layer but a head [``target_modules``].
        also_train: Names, written as in a tuple of targets, of modules whose own parameters are
            trained, such as a new head. A name that the model does not have is skipped
            [``modules_to_save``].
        rank_stabilized: Whether to scale by α/√r instead of α/r [``use_rslora``].
        layers: Adapt only these decoder layers, counted from 0; None adapts all. The number of a
            module's layer is the first number in its name [``layers_to_transform``].
        rank_pattern: Other ranks for some layers. A key is a regular expression for the end of a
            name; the first key that matches counts [``rank_pattern``].
        alpha_pattern: Other values of α for some layers, likewise [``alpha_pattern``].

    Raises:
        ValueError: A value is of another type or out of its range, or there is no target.
    """

    variant: ClassVar[str] = "LoRA"  # its name in tables

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    also_train: tuple[str, ...] = ("score",)
    rank_stabilized: bool = False
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}: expected 0 or more and less than 1")
        self._set("rank", _checked_rank("rank", self.rank))
        self._set("alpha", _checked_alpha("alpha", self.alpha))
        self._set("dropout", _python_number(self.dropout))
        self._set("also_train", _checked_names("also_train", self.also_train))
        if isinstance(self.targets, str):
            _check_pattern("targets", self.targets)
        else:
            self._set("targets", _checked_names("targets", self.targets))
        if not self.targets:
            raise ValueError("targets is empty: name at least one linear layer to adapt")
        if self.layers is not None:
            self._set("layers", _checked_layers(self.layers))
        self._set(
            "rank_pattern", _checked_pattern("rank_pattern", self.rank_pattern, _checked_rank)
        )
        alphas = _checked_pattern("alpha_pattern", self.alpha_pattern, _checked_alpha)
        self._set("alpha_pattern", alphas)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def scaling(self) -> float:
        """s, the factor of the update: α/r, or α/√r."""
        if self.rank_stabilized:
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank

    @property
    def equation(self) -> str:
        """The weight that takes the place of W, for people to read."""
        return f"W + (α/{'√r' if self.rank_stabilized else 'r'})·B·A"

    def for_layer(self, name: str) -> "LoRAConfig":
        """Give the configuration of one layer, with the rank and α that the patterns choose."""
        rank = first_match(self.rank_pattern, name, self.rank)
        alpha = first_match(self.alpha_pattern, name, self.alpha)
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        """Check that the configuration fits a layer.

        Raises:
            ValueError: The rank exceeds the smaller side of the layer's weight.
        """
        largest = min(linear.weight.shape)
        if self.rank > largest:
            raise ValueError(f"rank {self.rank} is too large for {name}: at most {largest}")

    def new_layer(self, linear: nn.Linear) -> "LoRALinear":
        """Create the layer that takes the place of a linear layer; variants.py has other kinds."""
        return LoRALinear(linear, self)


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update: y = W·x + b + s·B·A·dropout(x).

    It shares the base layer's ``weight`` and ``bias``, so their names and storage stay the same,
    and it takes over the base layer's hooks. A is drawn from U(−1/√in, 1/√in), and B is zero. Both
    are float32 at least: one step of an optimiser is often too small to change a bfloat16 weight.
    ``strength`` multiplies s. ``called`` tells whether the layer was ever called, and ``bypassed``
    whether the module that holds it ran without calling it.
    """

    trained = ("lora_A", "lora_B")  # names of the trained parameters

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        master = {"device": base.weight.device, "dtype": _master_dtype(base.weight)}
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, **master))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, **master))
        # PEFT's call. With a = √5 it draws from U(−1/√in, 1/√in).
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.config = config
        self.strength = 1.0
        self.called = False
        self.bypassed = False
        self.train(base.training)  # a new module is in training mode and would drop out
        hand_over_hooks(base, self)
        add_hooks(self, self.register_forward_pre_hook(_note_call))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) → (..., out), in the dtype of the base layer's output."""
        y = F.linear(x, self.weight, self.bias)
        if self.strength == 0:
            return y
        if not is_autocast(x.device.type):  # autocast chooses the dtype itself
            x = x.to(self.lora_A.dtype)
        x = dropout(x, self.config.dropout, self.training)
        A, B = self.factors(self.lora_A, self.lora_B)
        scaled_B = B * (self.config.scaling * self.strength)  # B is a small matrix
        update = F.linear(F.linear(x, A), scaled_B)  # (..., r) → (..., out)
        return (y + update).to(y.dtype)

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Give the factors of the update, from what is trained; variants.py has other ones."""
        return A, B

    def adapted(self, weight: Tensor) -> Tensor:
        """Give the weight of the adapted layer, W + s·B·A, in the dtype of ``weight``."""
        A, B = self.factors(self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype))
        return weight + (B @ A) * self.config.scaling

    def extra_repr(self) -> str:
        config = self.config
        trained = sum(getattr(self, name).numel() for name in self.trained)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={config.rank}, alpha={config.alpha:g}, "
            f"scaling={config.scaling:g}, dropout={config.dropout:g}, "
            f"trains {trained:,} beside {self.weight.numel():,}"
        )


def _note_call(layer: LoRALinear, _inputs: object) -> None:
    """Hook: note that the model calls the layer, and does not read its weight instead.

    The hook itself has a use, too. In evaluation mode ``nn.TransformerEncoderLayer`` has a fast
    path that reads the weights of its linear layers and never calls them, so it would skip LoRA.
    PyTorch does not take that path when a layer inside has a hook.
    """
    if not torch.compiler.is_compiling():  # a compiled graph should not write attributes
        layer.called = True


def apply_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Put LoRA around the target layers and freeze everything else except ``config.also_train``.

    Changes the model in place and stores the configuration as ``model.lora_config``. If it raises
    an error, the model is unchanged.

    A module in ``also_train`` gets float32 weights and computes in float32. Outside autocast its
    output is cast to the dtype that its weights had, because the frozen layers after it expect
    that dtype. A head therefore gives float32 logits only if it was float32 before, as the heads
    of ``load_model`` are.

    Warns:
        UserWarning: A module with the usual name of a classification head stays frozen, although
            it may be new. Later: the module that holds an adapted layer ran without calling it.

    Returns:
        The full names of the adapted layers.

    Raises:
        ValueError: A target does not exist or is not a plain linear layer (``check_linear``); the
            rank exceeds a layer's smaller side; the model is adapted already; or a module in
            ``also_train`` has no parameters, has quantised weights, shares weights with a frozen
            module or contains a target.
    """
    if adapted := [name for name, _ in lora_layers(model)]:
        raise ValueError(
            f"this model is already adapted ({len(adapted)} layers, the first is {adapted[0]}): "
            "call merge_lora on it, or load a new one"
        )
    linears = find_targets(model, config.targets, config.layers, heads=config.also_train)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        check_pattern_matches(pattern, linears)
    config = replace(config, targets=_found_targets(model, config, linears), layers=None)
    insert_lora(model, config, linears, find_modules(model, config.also_train))
    if frozen := _frozen_heads(model):
        names = ", ".join(frozen)
        warnings.warn(
            f"{names} stays frozen. If its weights are new, they stay random: pass "
            f"also_train={tuple(frozen)!r} to train it. If they are trained already, ignore this.",
            stacklevel=2,
        )
    return list(linears)


def _found_targets(
    model: nn.Module, config: LoRAConfig, linears: Mapping[str, nn.Linear]
) -> tuple[str, ...]:
    """Give names that stand for exactly the layers that were found: the given ones if they do."""
    if isinstance(config.targets, str):
        return short_names(model, linears)
    if find_modules(model, config.targets).keys() != linears.keys():
        return short_names(model, linears)
    return config.targets


def insert_lora(
    model: nn.Module,
    config: LoRAConfig,
    linears: dict[str, nn.Linear],
    trained_whole: dict[str, nn.Module],
) -> None:
    """Do what ``apply_lora`` does, for layers that were found already and without its warning.

    Args:
        model: The model, changed in place.
        config: Its rank, alpha and dropout are used, and it becomes ``model.lora_config``.
        linears: The layers to adapt, by name.
        trained_whole: The modules to train whole, by name.

    Raises:
        ValueError: As for ``apply_lora``. The model is unchanged.
    """
    own = {name: config.for_layer(name) for name in linears}  # with the rank and α of the layer
    for name, linear in linears.items():
        check_linear(name, linear)
        own[name].check_layer(name, linear)
    _check_same_in_all_places(linears, own)
    _check_trained_whole(model, trained_whole, linears)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        # It would not average the gradients of parameters that it has not seen.
        raise ValueError("the model is in DistributedDataParallel: apply LoRA before that")

    model.requires_grad_(False)
    # A layer that is used twice is adapted once: both places share the adapted layer.
    adapted_layers = {}
    for name, linear in linears.items():
        if linear not in adapted_layers:
            adapted_layers[linear] = own[name].new_layer(linear)
    replace_modules(model, adapted_layers)
    _train_in_float32(trained_whole.values())
    for parent in parents_of(model, linears):
        add_hooks(parent, parent.register_forward_hook(_report_layers_not_called))
    model = unwrap(model)
    model.lora_config = config
    model.means_before_lora = running_means(model)


@contextmanager
def lora_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Multiply the update of every layer inside a ``with`` block; blocks nest and restore.

    1 is the adapter as trained. 0 gives the base's layers (a trained head stays on). It changes
    the model itself, so all threads see it. With activation checkpointing the backward pass
    computes layers again and belongs inside the block.

    Raises:
        ValueError: The model has no LoRA layer.
    """
    before = {layer: layer.strength for layer in _require_lora(model)}
    try:
        for layer in before:
            layer.strength = strength
        yield
    finally:
        for layer, value in before.items():
            layer.strength = value


def lora_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Switch the adapter off inside a ``with`` block: ``lora_strength(model, 0)``."""
    return lora_strength(model, 0.0)


@torch.no_grad()
def merged_weight(layer: LoRALinear) -> Tensor:
    """W' = W + s·B·A, computed in float32 and rounded once to W's dtype: a new (out, in) tensor.

    It is the adapter as trained, whatever ``lora_strength`` is at the time.
    """
    master = _master_dtype(layer.weight)
    with no_autocast(layer.weight.device.type):
        return layer.adapted(layer.weight.to(master)).to(layer.weight.dtype)


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRA layer by a plain ``nn.Linear`` with its merged weight, for good.

    Changes the model, or a part of one, in place and returns it. A module that was trained whole
    gets back the dtype that it had, or that the model was cast to since. Nothing else of LoRA is
    left. To undo it, load the base again: subtracting the update does not restore W.

    A weight in bfloat16 or float16 is rounded, which loses a part of a small ΔW. Of a random ΔW of
    rank 8, ‖(W' − W) − ΔW‖/‖ΔW‖ in bfloat16 is 1% where ‖ΔW‖/‖W‖ is 20%, about a sixth where it is
    1%, and three quarters where it is 0.1%. With a float32 weight it is negligible.

    Raises:
        ValueError: The model has no LoRA layer; or it ran without ever calling a layer whose B is
            not zero, so that merging would change what it computes.
    """
    if isinstance(model, LoRALinear):
        raise ValueError("this is one LoRA layer: merge the model that holds it")
    _require_lora(model)
    for name, layer in lora_layers(model):
        if not is_whole(layer):
            raise ValueError(f"{name} is cut into shards by FSDP: save the adapter and merge later")
        is_skipped = layer.bypassed and not layer.called
        if is_skipped and not torch.equal(merged_weight(layer), layer.weight):
            raise ValueError(
                f"{name} had no effect: the model never calls it, and merging would change what "
                "the model computes. Leave this layer out of the targets"
            )
    layers = dict(lora_layers(model))
    for parent in parents_of(model, layers):
        remove_hooks(parent)
    merged = {}
    for layer in dict.fromkeys(layers.values()):  # once, even if it is used twice
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
        linear.bias = layer.bias
        remove_hooks(layer)
        hand_over_hooks(layer, linear)
        merged[layer] = linear.train(layer.training)
    replace_modules(model, merged)
    for _, module in named_modules(model):
        if "dtype_outside" in dict(module.named_buffers(recurse=False)):
            _restore_dtype(module)
    for name in ("lora_config", "means_before_lora"):
        vars(unwrap(model)).pop(name, None)  # a part of an adapted model has none
    return model


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many parameters a model has; ``print`` shows a table.

    Attributes:
        total: All parameters, tied ones counted once.
        trainable: Those that require a gradient.
        lora: The elements of every A and B, and of DoRA's magnitudes.
        other: Trainable ones outside these, such as a head's.
    """

    total: int
    trainable: int
    lora: int
    other: int

    def __str__(self) -> str:
        rows = {
            "parameters": self.total,
            "frozen": self.total - self.trainable,
            "trainable": self.trainable,
            "LoRA's A and B": self.lora,
            "trained whole": self.other,
        }
        total = max(self.total, 1)  # a model may have no parameters
        return "\n".join(f"{name:<15} {n:>15,} {n / total:>9.3%}" for name, n in rows.items())


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, tied ones once; adapters of PEFT count as LoRA, too."""
    total = 0
    trainable = 0
    lora = 0
    other = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        segments = name.split(".")
        in_adapter = not ADAPTER_SEGMENTS.isdisjoint(segments)
        total += size
        if parameter.requires_grad:
            trainable += size
        if in_adapter:
            lora += size
        if parameter.requires_grad and not in_adapter:
            other += size
    return ParameterCount(total, trainable, lora, other)


def lora_parameter_count(out_features: int, in_features: int, rank: int) -> int:
    """Count what LoRA trains for one layer: r·(out + in), where full training has out·in.

    >>> lora_parameter_count(10_000, 20_000, 8)
    240000
    """
    return rank * (out_features + in_features)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Collect what an adapter consists of: every A and B, and the modules in ``also_train``.

    For a part of an adapted model, it collects what lies in that part. If FSDP has cut the
    parameters into shards, every process must call this, as the shards are gathered.

    Returns:
        The tensors under the names that they have without wrappers, such as torch.compile's;
        detached, and not copied unless they were gathered.

    Raises:
        ValueError: The model has no LoRA layer.
    """
    config = _require_lora(model)[0].config
    tensors = {}
    with gathered(model) as whole:
        for name, layer in lora_layers(model):
            for part in layer.trained:
                tensors[f"{name}.{part}"] = whole(getattr(layer, part))
            if tensors[f"{name}.lora_A"].shape != (layer.config.rank, layer.in_features):
                raise ValueError(
                    f"{name} is cut into shards: call this on the model that FSDP returned"
                )
        for name, module in find_modules(model, config.also_train).items():
            for inner, tensor in module.state_dict().items():
                tensors[f"{name}.{without_wrappers(inner)}"] = whole(tensor)
    return tensors


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield every LoRA layer with its name; one that is used twice has two names."""
    for name, module in named_modules(model):
        if isinstance(module, LoRALinear):
            yield name, module


def layers_without_gradient(model: nn.Module) -> list[str]:
    """Name the LoRA layers whose B has no gradient, or one of zeros, after a backward pass."""
    idle = []
    for name, layer in lora_layers(model):
        gradient = layer.lora_B.grad
        if gradient is None or not gradient.any():
            idle.append(name)
    return idle


def _require_lora(model: nn.Module) -> list[LoRALinear]:
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise ValueError("this model has no LoRA layer: apply_lora or load_adapter first")
    return layers


def _frozen_heads(model: nn.Module) -> list[str]:
    """Find what looks like a new classification head that does not train.

    Random weights cannot be told from trained ones, so the name decides. A model of this package
    knows whether its head is trained (``head_trained``).
    """
    if getattr(unwrap(model), "head_trained", False):
        return []
    frozen = []
    for name, module in find_modules(model, HEAD_NAMES).items():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen.append(name)
    return frozen


def _check_same_in_all_places(
    linears: Mapping[str, nn.Linear], configs: Mapping[str, LoRAConfig]
) -> None:
    """Refuse a layer that is used twice and has different configurations under its names."""
    first_name = {}
    for name, linear in linears.items():
        first = first_name.setdefault(linear, name)
        if configs[name] != configs[first]:
            raise ValueError(f"{first} and {name} are one layer, with two ranks or values of alpha")


def _check_trained_whole(
    model: nn.Module, trained_whole: dict[str, nn.Module], targets: Iterable[str]
) -> None:
    """Refuse a module in ``also_train`` that cannot be trained whole or contains a target."""
    owners = {}  # parameter → the module that trains it
    for name, module in trained_whole.items():
        parameters = list(module.parameters())
        if not parameters:
            raise ValueError(f"{name} has no parameters to train: leave it out of also_train")
        # Quantised weights say that they cannot be trained.
        if not all(getattr(parameter, "trainable", True) for parameter in parameters):
            raise ValueError(f"{name} holds quantised weights: leave it out of also_train")
        owners.update(dict.fromkeys(parameters, name))
    for name, parameter in named_parameters(model):
        if parameter in owners and not is_inside(name, trained_whole):
            raise ValueError(
                f"{owners[parameter]} shares its weights with {name}: training it whole would "
                "change the frozen base"
            )
    for name in targets:
        if is_inside(name, trained_whole):
            raise ValueError(f"{name} is in targets and in also_train: leave one of them out")


def _train_in_float32(modules: Iterable[nn.Module]) -> None:
    """Train all parameters of some modules in float32, inside a model of another dtype."""
    called = []
    for module in modules:
        called += _called_modules(module)
    # Before the first is cast: two modules may share parameters, or one may lie in another.
    dtypes = {module: next(module.parameters()).dtype for module in called}
    for module, dtype in dtypes.items():
        for parameter in module.requires_grad_(True).parameters():
            parameter.data = parameter.data.to(_master_dtype(parameter))
        first = next(module.parameters())
        if first.dtype == dtype or hasattr(module, "dtype_outside"):
            continue  # nothing to cast, or an earlier adapter's casts are still there
        # These empty buffers record both dtypes. A cast such as model.half() casts them, too.
        for name, recorded in (("dtype_inside", first.dtype), ("dtype_outside", dtype)):
            buffer = torch.empty(0, dtype=recorded, device=first.device)
            module.register_buffer(name, buffer, persistent=False)
        cast_inputs = module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        cast_output = module.register_forward_hook(_cast_output)
        add_hooks(module, cast_inputs, cast_output)


def _called_modules(module: nn.Module) -> list[nn.Module]:
    """Return the module itself; of a ModuleList or ModuleDict, which is not called, its parts."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [module] if any(True for _ in module.parameters()) else []
    called = []
    for child in module.children():
        called += _called_modules(child)
    return called


def _restore_dtype(module: nn.Module) -> None:
    """Undo ``_train_in_float32`` and keep what was learned."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(module.dtype_outside.dtype)
    del module.dtype_inside
    del module.dtype_outside
    remove_hooks(module)


def _cast_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hook: the frozen layers before the module pass activations in their own dtype."""
    return _cast((args, kwargs), module.dtype_inside.dtype)


def _cast_output(module: nn.Module, _inputs: tuple, output: object) -> object:
    """Hook: the frozen layers after the module expect their own dtype."""
    return _cast(output, module.dtype_outside.dtype)


def _cast(value: object, dtype: torch.dtype) -> object:
    """Cast the floating-point tensors in tuples, lists and dictionaries."""

    def cast(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if is_autocast(leaf.device.type):  # autocast chooses the dtype itself
            return leaf
        return leaf.to(dtype)

    return tree_map(cast, value)


def _report_layers_not_called(parent: nn.Module, _inputs: tuple, _output: object) -> None:
    """Hook: warn, once, if a module ran without calling a LoRA layer that it holds."""
    if torch.compiler.is_compiling():
        return
    for name, layer in parent.named_children():
        if isinstance(layer, LoRALinear) and not layer.called and not layer.bypassed:
            layer.bypassed = True
            warnings.warn(
                f"{type(parent).__name__} did not call its layer {name}: LoRA has no effect there "
                "if it reads the layer's weight instead",
                stacklevel=2,
            )


def is_autocast(device_type: str) -> bool:
    """Tell whether autocast is on for a type of device."""
    # The meta device has no autocast, and asking whether it is on raises an error.
    if not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager:
    """Give a context in which autocast is off for a type of device."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _master_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to train a weight in: float32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


# --- Checks of LoRAConfig ------------------------------------------------------------------------


# Each check returns the value in the form that is kept: a NumPy number becomes a Python number,
# which JSON can hold.


def _checked_rank(name: str, rank: object) -> int:
    if not _is_whole(rank) or rank < 1:
        raise ValueError(f"{name} is {rank!r}: expected a whole number of at least 1")
    return int(rank)


def _checked_alpha(name: str, alpha: object) -> int | float:
    if not isinstance(alpha, numbers.Real) or not 0 < alpha < math.inf:
        raise ValueError(f"{name} is {alpha!r}: expected a positive number")
    return _python_number(alpha)


def _checked_names(name: str, names: object) -> tuple[str, ...]:
    if not _is_list_of(str, names) or "" in names:
        raise ValueError(f"{name} is {names!r}: expected a tuple of names")
    # A set has another order in each process.
    return tuple(sorted(names) if type(names) is set else names)


def _checked_layers(layers: object) -> tuple[int, ...]:
    if not _is_list_of(numbers.Integral, layers) or not layers or min(layers) < 0:
        raise ValueError(f"layers is {layers!r}: expected a tuple of layer numbers, from 0")
    return tuple(sorted({int(layer) for layer in layers}))


def _checked_pattern(name: str, pattern: object, check: Callable) -> dict:
    if not isinstance(pattern, Mapping):
        raise ValueError(f"{name} is {pattern!r}: expected a dictionary of names and values")
    for key in pattern:
        _check_pattern(name, key)
    return {key: check(f"{name}[{key!r}]", value) for key, value in pattern.items()}


def _check_pattern(name: str, pattern: object) -> None:
    if type(pattern) is not str:
        raise ValueError(f"{name} holds {pattern!r}: expected a regular expression")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name} holds {pattern!r}, which is not a valid regular expression: {error}"
        ) from None


def _is_list_of(kind: type, values: object) -> bool:
    if type(values) not in (tuple, list, set):
        return False
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _python_number(value: numbers.Real) -> int | float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)
