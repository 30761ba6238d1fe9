"""LoRA for any PyTorch model: h = W·x + s·B·A·x, with W frozen and only A and B trained.

A (r × in) and B (out × r) are written as in Hu et al. 2021, section 4.1; s = α/r, or α/√r with
rank-stabilised scaling (Kalajdzievski 2023, section 3). B starts at zero, so an adapted model
starts out equal to its base, to the bit.

There is no merged state to get wrong: ``merge_lora`` puts plain ``nn.Linear`` layers back, for
good, and the one switch, ``lora_strength``, multiplies s.

Shapes: in and out are the widths of the adapted layer, r its rank.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """What to adapt, and how.

    Attributes:
        rank: r, the inner width of A and B.
        alpha: α, the numerator of the scaling.
        dropout: Probability with which an entry of LoRA's input is dropped in training.
        targets: Names of the linear layers to adapt: the last segments of their dotted names, as
            many as tell them apart ("q_proj", or "layers.0.self_attn.q_proj" for one of them).
        also_train: Names, likewise, of modules to train whole, such as a new head; a name that
            the model lacks is skipped.
        rank_stabilized: Scale by α/√r in place of α/r.

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
        for name in ("targets", "also_train"):
            came = getattr(self, name)
            if type(came) not in (tuple, list, set) or not all(type(n) is str and n for n in came):
                raise ValueError(f"{name} is {came!r}: expected a tuple of names")
            object.__setattr__(self, name, tuple(came))
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}: expected a whole number of at least 1")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha!r}: expected a positive number")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}: expected 0 or more and less than 1")
        if not self.targets:
            raise ValueError("targets is empty: name at least one linear layer to adapt")

    @property
    def scaling(self) -> float:
        """s, the factor of the update: α/r, or α/√r."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each entry with probability p and divide the others by 1 − p, in training alone.

    On the CPU a random byte decides, which takes a fifth of PyTorch's time: p is rounded to
    d/256, d at most 255, and what is kept is divided by exactly 1 − d/256. The mask is a byte an
    entry.
    """
    dropped = min(round(256 * p), 255)  # of a byte's 256 values
    if not training or dropped == 0 or x.device.type != "cpu":
        return F.dropout(x, p, training)
    # without its bounds random_ never sets the top bit, so that every eighth byte is below 128
    noise = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
    lanes = noise.view(torch.int8)[: x.numel()].view(x.shape)  # −128 … 127
    kept = lanes.clamp_(dropped - 129, dropped - 128).sub_(dropped - 129)  # 0 or 1
    return x * kept * (256 / (256 - dropped))


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update: y = W·x + b + s·B·A·dropout(x).

    It shares the base layer's ``weight`` and ``bias``, so their names and storage stay what they
    were. A is drawn from U(−1/√in, 1/√in) and B is zero, both float32 at least: a step of the
    optimiser is too small for a bfloat16 weight to keep. ``strength`` multiplies s.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        master = {"device": base.weight.device, "dtype": _master_dtype(base.weight)}
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, **master))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, **master))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√in), as PEFT draws it
        self.config = config
        self.strength = 1.0
        self.train(base.training)  # or a model in evaluation mode would drop out
        # PyTorch's TransformerEncoderLayer reads the weight past this forward, but for a hook
        self.register_forward_pre_hook(_no_change)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) → (..., out), in the dtype of the base layer's output."""
        y = F.linear(x, self.weight, self.bias)
        if self.strength == 0:
            return y
        if not _autocasts(x.device.type):  # autocast chooses the dtype itself
            x = x.to(self.lora_A.dtype)
        x = dropout(x, self.config.dropout, self.training)
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)  # (..., r) → (..., out)
        return (y + update * (self.config.scaling * self.strength)).to(y.dtype)

    def extra_repr(self) -> str:
        c, (out, width), bias = self.config, self.weight.shape, self.bias is not None
        return (
            f"in_features={width}, out_features={out}, bias={bias}, rank={c.rank}, "
            f"alpha={c.alpha:g}, scaling={c.scaling:g}, dropout={c.dropout:g}, "
            f"trains {self.lora_A.numel() + self.lora_B.numel():,} beside {self.weight.numel():,}"
        )


def find_modules(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Find the modules whose dotted names end in one of ``names``, whole segments compared."""
    modules = model.named_modules(remove_duplicate=False)
    return {p: m for p, m in modules if any(f".{p}".endswith(f".{name}") for name in names)}


def target_linears(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Find the linear layers that ``targets`` name, by their full names.

    Raises:
        ValueError: A target names nothing (the message lists what there is), or no nn.Linear.
    """
    found = find_modules(model, targets)
    for target in targets:
        if not find_modules(model, (target,)):
            linears = {n.split(".")[-1] for n, m in model.named_modules() if type(m) is nn.Linear}
            there = ", ".join(sorted(linears - {""})) or "(none)"
            raise ValueError(f"no layer is named {target!r}; this model's linear layers: {there}")
    for name, module in found.items():
        if type(module) is not nn.Linear:  # a subclass may compute something else
            raise ValueError(f"{name} is a {type(module).__name__}: only nn.Linear can be adapted")
    return found


def apply_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Put LoRA around the target layers and freeze all the rest but ``config.also_train``.

    Changes the model in place and remembers the configuration as ``model.lora_config``. On an
    error the model is left as it was.

    A module of ``also_train`` keeps float32 weights and computes in float32, but outside autocast
    hands on the dtype that its weights had, which is what the frozen base around it expects. So a
    head gives float32 logits if it is float32 already, as those of ``load_model`` are.

    Returns:
        The full names of the adapted layers.

    Raises:
        ValueError: A target is not there or no nn.Linear, the rank exceeds a layer's smaller
            side, the model is adapted already, or a module of ``also_train`` has no parameters,
            shares weights with a frozen one or holds a target.
    """
    if adapted := [name for name, _ in _lora_layers(model)]:
        where = f"{adapted[0]} and {len(adapted) - 1} more layers"
        raise ValueError(f"adapted already, at {where}: merge_lora it, or start from a fresh model")
    linears = target_linears(model, config.targets)
    for name, linear in linears.items():
        if config.rank > (most := min(linear.weight.shape)):
            raise ValueError(f"rank {config.rank} is too large for {name}: at most {most}")
    heads = find_modules(model, config.also_train)
    _check_heads(model, heads, linears)

    model.requires_grad_(False)
    wrapped = {linear: LoRALinear(linear, config) for linear in linears.values()}
    for name, linear in linears.items():
        model.set_submodule(name, wrapped[linear])
    for head in dict.fromkeys(heads.values()):
        first = next(head.parameters())  # prepend: a hook of an earlier adapter has the last word
        head.register_forward_hook(partial(_cast, first.dtype), prepend=True)
        for parameter in head.requires_grad_(True).parameters():
            parameter.data = parameter.data.to(_master_dtype(parameter))
        cast = partial(_cast_inputs, first.dtype)  # another dtype by now
        head.register_forward_pre_hook(cast, with_kwargs=True)
    model.lora_config = config
    return list(linears)


@contextmanager
def lora_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Multiply every layer's scaling inside a ``with`` block; nests, and restores.

    1 is the adapter as trained, 0 the base's layers (a trained head stays on). It changes the
    model itself: while one thread holds a strength, the others see it too. With activation
    checkpointing the backward pass computes layers again, so it belongs inside the block.

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
    """W' = W + s·B·A, in float32, rounded once to W's dtype: a new (out, in) tensor.

    It is the adapter as trained, whatever ``lora_strength`` says at the time.
    """
    with torch.autocast(layer.weight.device.type, enabled=False):
        update = (layer.lora_B @ layer.lora_A) * layer.config.scaling
        return (layer.weight.to(update.dtype) + update).to(layer.weight.dtype)


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRA layer by a plain ``nn.Linear`` of its merged weight, for good.

    Changes the model, or a part of one, in place and returns it. To undo it, load the base again:
    subtracting the update would not give W back (in bfloat16 nearly a third of it would differ).

    Raises:
        ValueError: The model has no LoRA layer.
    """
    _require_lora(model)
    merged = {}
    for name, layer in list(_lora_layers(model)):
        if layer not in merged:
            linear = nn.Linear(*reversed(layer.weight.shape), bias=False, device="meta")
            linear.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
            linear.bias = layer.bias
            merged[layer] = linear.train(layer.training)
        model.set_submodule(name, merged[layer])
    vars(model).pop("lora_config", None)  # a part of an adapted model has none
    return model


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many parameters a model has; ``print`` shows a table.

    Attributes:
        total: All of them, tied ones once.
        trainable: Those that require a gradient.
        lora: The elements of all A and B.
        other: Trainable ones outside A and B, such as the head's.
    """

    total: int
    trainable: int
    lora: int
    other: int

    def __str__(self) -> str:
        names = ("parameters", "frozen", "trainable", "LoRA's A and B", "trained whole")
        counts = (self.total, self.total - self.trainable, self.trainable, self.lora, self.other)
        rows, total = zip(names, counts, strict=True), max(self.total, 1)
        return "\n".join(f"{name:<15} {n:>15,} {n / total:>9.3%}" for name, n in rows)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, tied ones once; PEFT's adapters are counted as LoRA too."""
    total = trainable = lora = other = 0
    for name, parameter in model.named_parameters():
        n, trained = parameter.numel(), parameter.requires_grad
        adapter = not {"lora_A", "lora_B"}.isdisjoint(name.split("."))
        total, trainable, lora = total + n, trainable + n * trained, lora + n * adapter
        other += n * (trained and not adapter)
    return ParameterCount(total, trainable, lora, other)


def lora_parameter_count(out_features: int, in_features: int, rank: int) -> int:
    """Count what LoRA trains for one layer: r·(out + in), where full training has out·in.

    >>> lora_parameter_count(10_000, 20_000, 8)
    240000
    """
    return rank * (out_features + in_features)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Collect what an adapter consists of: every A and B, and the modules trained whole.

    Given a part of an adapted model, it collects that part's share.

    Returns:
        The tensors under their names in ``model.state_dict()``, detached, not copied.

    Raises:
        ValueError: The model has no LoRA layer.
    """
    config = _require_lora(model)[0].config
    names = {f"{name}.{ab}" for name, _ in _lora_layers(model) for ab in ("lora_A", "lora_B")}
    for name, head in find_modules(model, config.also_train).items():
        names |= {f"{name}.{inner}" for inner in head.state_dict()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _autocasts(kind: str) -> bool:  # the meta device knows no autocast
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _no_change(*_: object) -> None: ...


def _master_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    return _cast(dtype, module, args), {k: _cast(dtype, module, x) for k, x in kwargs.items()}


def _cast(dtype: torch.dtype, module: nn.Module, *values: object) -> object:
    """Cast a tensor or those in a tuple: the last value, which for a hook is what came out."""
    x = values[-1]
    if isinstance(x, tuple):
        return tuple(_cast(dtype, module, inner) for inner in x)
    floating = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(dtype) if floating and not _autocasts(x.device.type) else x


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    modules = model.named_modules(remove_duplicate=False)
    return ((name, module) for name, module in modules if isinstance(module, LoRALinear))


def _require_lora(model: nn.Module) -> list[LoRALinear]:
    layers = [layer for _, layer in _lora_layers(model)]
    if not layers:
        raise ValueError("this model has no LoRA layer: apply_lora or load_adapter first")
    return layers


def _check_heads(model: nn.Module, heads: dict[str, nn.Module], linears: dict) -> None:
    """Refuse to train whole what has no weights, is also a target, or a frozen module shares."""
    if empty := [name for name, head in heads.items() if not list(head.parameters())]:
        raise ValueError(f"{empty[0]} has no parameters to train: leave it out of also_train")
    owned = {p: name for name, head in heads.items() for p in head.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in owned and not any(f"{name}.".startswith(f"{head}.") for head in heads):
            raise ValueError(
                f"{owned[parameter]} shares its weights with {name}: training it whole would "
                "change the frozen base"
            )
    for name in linears:
        if any(f"{name}.".startswith(f"{head}.") for head in heads):
            raise ValueError(f"{name} is in targets and in also_train: leave one of them out")
