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
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

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

# Names that classification heads have in Transformers. A pretrained model gets such a head anew.
HEAD_NAMES = ("classifier", "classification_head", "pre_classifier", "qa_outputs", "score")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """What to adapt, and how. PEFT's name for each value stands in brackets.

    Attributes:
        rank: r, the inner width of A and B [``r``].
        alpha: α, the numerator of the scaling [``lora_alpha``].
        dropout: Probability of dropping an entry of LoRA's input in training [``lora_dropout``].
        targets: Names of the linear layers to adapt: the last segments of their dotted names, as
            many segments as tell the layers apart ("q_proj" for all of them,
            "layers.0.self_attn.q_proj" for one) [``target_modules``].
        also_train: Names, written likewise, of modules whose own parameters are trained, such as
            a new head. A name that the model does not have is skipped [``modules_to_save``].
        rank_stabilized: Whether to scale by α/√r instead of α/r [``use_rslora``].

    Raises:
        ValueError: A value is of another type or out of its range, or there is no target.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    also_train: tuple[str, ...] = ("score",)
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if not _is_whole(self.rank) or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}: expected a whole number of at least 1")
        if not isinstance(self.alpha, numbers.Real) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha!r}: expected a positive number")
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}: expected 0 or more and less than 1")
        for field in ("targets", "also_train"):
            names = getattr(self, field)
            if not _are_names(names):
                raise ValueError(f"{field} is {names!r}: expected a tuple of names")
            # A set has another order in each process.
            object.__setattr__(self, field, tuple(sorted(names) if type(names) is set else names))
        if not self.targets:
            raise ValueError("targets is empty: name at least one linear layer to adapt")
        # A NumPy number becomes a Python number, which JSON can hold.
        object.__setattr__(self, "rank", int(self.rank))
        object.__setattr__(self, "alpha", _python_number(self.alpha))
        object.__setattr__(self, "dropout", _python_number(self.dropout))

    @property
    def scaling(self) -> float:
        """s, the factor of the update: α/r, or α/√r."""
        if self.rank_stabilized:
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _python_number(value: numbers.Real) -> int | float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _are_names(value: object) -> bool:
    if type(value) not in (tuple, list, set):
        return False
    return all(type(name) is str and name for name in value)


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update: y = W·x + b + s·B·A·dropout(x).

    It shares the base layer's ``weight`` and ``bias``, so their names and storage stay the same,
    and it takes over the base layer's hooks. A is drawn from U(−1/√in, 1/√in), and B is zero. Both
    are float32 at least: one step of an optimiser is often too small to change a bfloat16 weight.
    ``strength`` multiplies s. ``called`` tells whether the layer was ever called, and ``bypassed``
    whether the module that holds it ran without calling it.
    """

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
        if not _is_autocast(x.device.type):  # autocast chooses the dtype itself
            x = x.to(self.lora_A.dtype)
        x = dropout(x, self.config.dropout, self.training)
        scaled_B = self.lora_B * (self.config.scaling * self.strength)  # B is a small matrix
        update = F.linear(F.linear(x, self.lora_A), scaled_B)  # (..., r) → (..., out)
        return (y + update).to(y.dtype)

    def extra_repr(self) -> str:
        config = self.config
        trained = self.lora_A.numel() + self.lora_B.numel()
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


def find_targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """Find the layers that ``targets`` name; the keys are their full names.

    Raises:
        ValueError: A target matches no module. The message lists the linear layers that there are.
    """
    for target in targets:
        if not find_modules(model, (target,)):
            linears = [path for path, m in named_modules(model) if type(m) is nn.Linear]
            last_segments = {path.split(".")[-1] for path in linears}
            last_segments.discard("")  # the model itself
            listed = ", ".join(sorted(last_segments)) or "(none)"
            raise ValueError(f"no layer is named {target!r}; this model's linear layers: {listed}")
    return find_modules(model, targets)


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
            ``also_train`` has no parameters, shares weights with a frozen module or contains a
            target.
    """
    if adapted := [name for name, _ in lora_layers(model)]:
        raise ValueError(
            f"this model is already adapted ({len(adapted)} layers, the first is {adapted[0]}): "
            "call merge_lora on it, or load a new one"
        )
    linears = find_targets(model, config.targets)
    insert_lora(model, config, linears, find_modules(model, config.also_train))
    if frozen := _frozen_heads(model):
        names = ", ".join(frozen)
        warnings.warn(
            f"{names} stays frozen. If its weights are new, they stay random: pass "
            f"also_train={tuple(frozen)!r} to train it. If they are trained already, ignore this.",
            stacklevel=2,
        )
    return list(linears)


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
    for name, linear in linears.items():
        check_linear(name, linear)
        largest = min(linear.weight.shape)
        if config.rank > largest:
            raise ValueError(f"rank {config.rank} is too large for {name}: at most {largest}")
    _check_trained_whole(model, trained_whole, linears)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        # It would not average the gradients of parameters that it has not seen.
        raise ValueError("the model is in DistributedDataParallel: apply LoRA before that")

    model.requires_grad_(False)
    # A layer that is used twice is adapted once: both places share the adapted layer.
    adapted_layers = {linear: LoRALinear(linear, config) for linear in linears.values()}
    replace_modules(model, adapted_layers)
    _train_in_float32(trained_whole.values())
    for parent in parents_of(model, linears):
        add_hooks(parent, parent.register_forward_hook(_report_layers_not_called))
    model = unwrap(model)
    model.lora_config = config
    model.means_before_lora = running_means(model)


@contextmanager
def lora_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Multiply the scaling of every layer inside a ``with`` block; blocks nest and restore.

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
    with _no_autocast(layer.weight.device.type):
        update = (layer.lora_B.to(master) @ layer.lora_A.to(master)) * layer.config.scaling
        return (layer.weight.to(master) + update).to(layer.weight.dtype)


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRA layer by a plain ``nn.Linear`` with its merged weight, for good.

    Changes the model, or a part of one, in place and returns it. A module that was trained whole
    gets back the dtype that it had, or that the model was cast to since. Nothing else of LoRA is
    left. To undo it, load the base again: subtracting the update does not restore W (in bfloat16
    nearly a third of its entries differ).

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
        if layer.bypassed and not layer.called and layer.lora_B.any():
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
        lora: The elements of every A and B.
        other: Trainable ones outside A and B, such as a head's.
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
        in_adapter = "lora_A" in segments or "lora_B" in segments
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
            tensors[f"{name}.lora_A"] = whole(layer.lora_A)
            tensors[f"{name}.lora_B"] = whole(layer.lora_B)
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


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a dotted name is one of ``modules`` or lies inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _check_trained_whole(
    model: nn.Module, trained_whole: dict[str, nn.Module], targets: Iterable[str]
) -> None:
    """Refuse a module in ``also_train`` that has no weights, shares them or contains a target."""
    owners = {}  # parameter → the module that trains it
    for name, module in trained_whole.items():
        parameters = list(module.parameters())
        if not parameters:
            raise ValueError(f"{name} has no parameters to train: leave it out of also_train")
        owners.update(dict.fromkeys(parameters, name))
    for name, parameter in named_parameters(model):
        if parameter in owners and not _is_inside(name, trained_whole):
            raise ValueError(
                f"{owners[parameter]} shares its weights with {name}: training it whole would "
                "change the frozen base"
            )
    for name in targets:
        if _is_inside(name, trained_whole):
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
        if _is_autocast(leaf.device.type):  # autocast chooses the dtype itself
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


def _is_autocast(device_type: str) -> bool:
    # The meta device has no autocast, and asking whether it is on raises an error.
    if not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)


def _no_autocast(device_type: str) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _master_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to train a weight in: float32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)
