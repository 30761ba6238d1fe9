"""Assertions about adapters, for unit tests: what trains, what stays, what merging changes.

They read only parameters and outputs. So they work with any ``nn.Module``, adapted by this package,
by PEFT or by hand, and they need no test framework::

    def test_adapter():
        model = build_model()
        with output_unchanged(model, ids):
            apply_lora(model, LoRAConfig(rank=8))
        assert_trains_exactly(model, ["lora_A", "lora_B", "score"])
        assert_trains_at_most(model, percent=0.2, megabytes=5)
        assert_saves_at_least(model, times=500)
        assert_adapter_takes_part(model, ids)
        with base_unchanged(model), every_layer_learns(model):
            step(model)
        save_adapter(model, folder)
        assert_adapters_equal(load(folder), model)
        assert_merge_moves_at_most(model, 1e-5, ids)

``assert_trains_exactly``, ``assert_trains_at_most`` and ``assert_saves_at_least`` need no weights:
for a model built under ``torch.device("meta")``, even one of 70 billion parameters, they take
seconds.

Each assertion also fails if it would prove nothing: nothing trains, the step changed no parameter,
the block adapted another object, or B is still zero.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clinora.lora import ADAPTER_SEGMENTS, count_parameters, lora_layers, merge_lora
from clinora.modules import named_parameters


def assert_trains_exactly(model: nn.Module, names: Iterable[str]) -> None:
    """Assert that the parameters under ``names`` require a gradient, and no others.

    Args:
        model: Any module, on any device.
        names: Each stands for all parameters whose dotted name contains it as whole segments:
            "lora_A" for every A, "score" for a head, "layers.0.self_attn.q_proj.lora_A" for one.
            A tied parameter matches by any of its names. The copy that PEFT keeps of a module it
            trains (``original_module``) must stay frozen. Empty: everything is frozen.

    Raises:
        AssertionError: Another parameter trains, a named one is frozen, or a name matches nothing.
        ValueError: ``names`` is a string.
    """
    if isinstance(names, str):
        raise ValueError(f"names is the string {names!r}: expected a list of names")
    names = set(names)
    aliases = {}  # parameter → its names; a tied parameter has several
    for alias, parameter in named_parameters(model):
        aliases.setdefault(parameter, []).append(alias)
    unexpected = []
    missing = []
    used = set()
    for parameter, known in aliases.items():
        matching = {name for name in names if _contains_segments(known, name)}
        used |= matching
        is_pefts_copy = "original_module" in known[0].split(".")
        expected = bool(matching) and not is_pefts_copy
        if parameter.requires_grad and not expected:
            unexpected.append(known[0])
        if expected and not parameter.requires_grad:
            missing.append(known[0])
    lines = []
    if unexpected:
        lines.append(_list("trained, but not expected to", unexpected))
    if missing:
        lines.append(_list("expected to train, but frozen", missing))
    unused = sorted(names - used)
    if unused:
        lines.append(_list("expected to train, but no parameter has this name", unused))
    if lines:
        raise AssertionError("\n".join(lines))


def assert_trains_at_most(
    model: nn.Module,
    *,
    parameters: int | None = None,
    percent: float | None = None,
    megabytes: float | None = None,
) -> None:
    """Assert that at most so much of a model trains; a tied parameter counts once.

    Args:
        model: Any module, on any device.
        parameters: The largest number of elements that may train.
        percent: The largest share of all elements (the adapter's included) that may train, from
            0 to 100.
        megabytes: The largest size of what may train, in 10⁶ bytes, each parameter in its own
            dtype, as in an adapter's file. Gradients and the optimiser's state are not counted.

    Raises:
        AssertionError: More trains than a limit allows, or nothing trains at all.
        ValueError: No limit is given.
    """
    given = {"parameters": parameters, "percent": percent, "megabytes": megabytes}
    limits = {unit: limit for unit, limit in given.items() if limit is not None}
    if not limits:
        raise ValueError("no limit is given: expected parameters=, percent= or megabytes=")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = count_parameters(model)
    if not trained:
        raise AssertionError(f"none of {count.total:,} parameters trains: apply the adapter first")
    measured = {
        "parameters": count.trainable,
        "percent": 100 * count.trainable / count.total,
        "megabytes": sum(p.nbytes for p in trained.values()) / 1e6,
    }
    lines = []
    for unit, limit in limits.items():
        if not measured[unit] <= limit:  # not ">", so that a NaN fails
            lines.append(f"{measured[unit]:,.12g} {unit} train, expected at most {limit:,.12g}")
    if lines:
        largest_first = sorted(trained, key=lambda name: trained[name].numel(), reverse=True)
        lines.append(_list("trained, largest first", largest_first))
        raise AssertionError("\n".join(lines))


def assert_saves_at_least(model: nn.Module, *, times: float) -> None:
    """Assert that full fine-tuning would train at least so many times as many parameters.

    Full fine-tuning trains what the model has without its adapter. The copy that PEFT keeps of a
    module that it trains (``original_module``) is not counted again.

    Args:
        model: A model adapted by ``apply_lora``, by PEFT or by hand, on any device.
        times: The smallest ratio of both numbers of parameters.

    Raises:
        AssertionError: The ratio is smaller, or nothing trains at all.
    """
    full = 0
    trained = 0
    for name, parameter in model.named_parameters():
        segments = name.split(".")
        if "original_module" in segments:
            continue
        if ADAPTER_SEGMENTS.isdisjoint(segments):
            full += parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
    if trained == 0:
        raise AssertionError(f"none of {full:,} parameters trains: apply the adapter first")
    if not full / trained >= times:  # not "<", so that a NaN fails
        raise AssertionError(
            f"full fine-tuning trains {full:,} parameters, this model {trained:,}: "
            f"{full / trained:,.4g} times fewer, expected at least {times:,.12g}"
        )


@contextmanager
def base_unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a training step in the ``with`` block leaves the base unchanged, to the bit.

    The base is all parameters that are frozen when the block begins, and all buffers (such as
    BatchNorm's running mean) except those of a module whose own parameters all train. The assertion
    also fails if no trained parameter changed: a step that does nothing cannot change the base, so
    the test would always pass. During the block it keeps a copy of the model.

    Raises:
        AssertionError: Frozen parameters or buffers changed, or no trained parameter changed.
        ValueError: The model is on the meta device.
    """
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device: its weights have no bits to compare")
    base = {}
    trained = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(path, recurse=False))
        for name, parameter in own.items():
            copied = parameter.detach().clone()
            if parameter.requires_grad:
                trained[name] = copied
            else:
                base[name] = copied
        trains_whole = bool(own) and all(p.requires_grad for p in own.values())
        if not trains_whole:
            for name, buffer in module.named_buffers(path, recurse=False):
                base[name] = buffer.clone()
    yield
    now = dict(model.named_parameters(remove_duplicate=False))
    now.update(model.named_buffers(remove_duplicate=False))
    changed = [name for name in base if not _same_bits(base[name], now.get(name))]
    if changed:
        raise AssertionError(
            _list(f"of the base's {len(base)} tensors, these changed", changed) + "\n"
            "Give the optimiser only the trained parameters. If running statistics changed, put "
            "their modules into evaluation mode."
        )
    if all(_same_bits(trained[name], now.get(name)) for name in trained):
        raise AssertionError(
            f"none of the {len(trained)} trained parameters changed, so an unchanged base proves "
            "nothing: does the optimiser have this model's parameters, a learning rate, a step?"
        )


@contextmanager
def every_layer_learns(model: nn.Module) -> Iterator[None]:
    """Assert that training in the ``with`` block changes the B of every adapted layer.

    B is what has to move first: while it is zero, A receives no gradient.

    Raises:
        AssertionError: The B of some layers is what it was, or the model has no B.
    """
    before = {}
    for name, parameter in model.named_parameters():
        if "lora_B" in name.split("."):
            before[name] = parameter.detach().clone()
    if not before:
        raise AssertionError("no parameter is a lora_B: apply the adapter first")
    yield
    now = dict(model.named_parameters())
    unchanged = [name for name in before if _same_bits(before[name], now.get(name))]
    if unchanged:
        raise AssertionError(
            _list(f"of {len(before)} adapted layers, these did not learn", unchanged) + "\n"
            "Does the optimiser have them, and does the model call them?"
        )


def assert_adapters_equal(first: nn.Module, second: nn.Module, limit: float = 0.0) -> None:
    """Assert that two models have the same adapter: all that trains, by name, shape and value.

    Names are compared as this package writes them, so one of the models may be PEFT's. The bases
    are not compared, and scalings only where both layers are of this package. PiSSA and OLoRA are
    saved as LoRA of twice the rank, so what is loaded does not equal what was saved.

    Args:
        first: A model adapted by ``apply_lora``, by PEFT or by hand.
        second: Another one.
        limit: The largest absolute difference allowed between two elements.

    Raises:
        AssertionError: A tensor is in one model alone, or differs; or there is no adapter.
    """
    tensors = _trained(first)
    others = _trained(second)
    if not any("lora_B" in name.split(".") for name in tensors):
        raise AssertionError("no parameter is a lora_B: apply the adapter first")
    lines = []
    if alone := sorted(tensors.keys() - others.keys()):
        lines.append(_list("in the first model alone", alone))
    if alone := sorted(others.keys() - tensors.keys()):
        lines.append(_list("in the second model alone", alone))
    apart = []
    scalings = {name: layer.config.scaling for name, layer in lora_layers(second)}
    for name, layer in lora_layers(first):
        other = scalings.get(name, layer.config.scaling)
        if other != layer.config.scaling:
            apart.append(f"{name} (scaling {layer.config.scaling:g} and {other:g})")
    for name in tensors.keys() & others.keys():
        gap = _largest_gap(tensors[name].detach().cpu(), others[name].detach().cpu())
        if not gap <= limit:  # not ">", so that a NaN fails
            apart.append(f"{name} (by up to {gap:.3g})")
    if apart:
        lines.append(_list("these differ", sorted(apart)))
    if lines:
        raise AssertionError("\n".join(lines))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Collect an adapter's parameters and all else that trains, under this package's names."""
    tensors = {}
    for name, parameter in named_parameters(model):
        segments = name.split(".")
        # PEFT freezes what it loads for inference; a head is then in modules_to_save.
        is_of_adapter = not {*ADAPTER_SEGMENTS, "modules_to_save"}.isdisjoint(segments)
        if not parameter.requires_grad and not is_of_adapter:
            continue
        if segments[:2] == ["base_model", "model"]:
            segments = segments[2:]
        segments = [part for part in segments if part not in ("default", "modules_to_save")]
        if segments[-2:-1] and segments[-2] in ADAPTER_SEGMENTS:
            segments = segments[:-1]  # PEFT's lora_A is a layer with a weight
        tensors[".".join(segments)] = parameter
    return tensors


@contextmanager
def output_unchanged(model: nn.Module, /, *inputs: object, **kwargs: object) -> Iterator[None]:
    """Assert that adapting a model in the ``with`` block leaves its output unchanged, to the bit.

    The output is computed before and after, in evaluation mode and without gradients; each
    module's mode is restored. Of an output with several parts, ``logits`` is compared, or else
    the first tensor. ``get_peft_model`` and ``inject_adapter_in_model`` of PEFT change the model
    that they get, as ``apply_lora`` does, so ``model`` is the same object before and after.

    Args:
        model: Any module.
        *inputs: The arguments to call it with.
        **kwargs: The keyword arguments to call it with.

    Raises:
        AssertionError: The output changed, or the block added nothing to the model.
        ValueError: The model is on the meta device, or returns no tensor.
    """
    before = _output(model, inputs, kwargs)
    parts = _parts(model)  # this reference keeps new parts from getting the id of an old one
    yield
    if [id(part) for part in parts] == [id(part) for part in _parts(model)]:
        raise AssertionError(
            "the block added no module and no parameter to this model, so an unchanged output "
            "proves nothing: did the block adapt a copy, or another object?"
        )
    after = _output(model, inputs, kwargs)
    if before.dtype != after.dtype or not torch.equal(before, after):
        raise AssertionError(
            f"the output was {_form(before)}, is {_form(after)} and moved by up to "
            f"{_largest_gap(before, after):.3g}: a new adapter must add exactly zero"
        )


def assert_adapter_takes_part(model: nn.Module, /, *inputs: object, **kwargs: object) -> None:
    """Assert that every B receives a gradient and moves the output.

    It fails, for example, where a model reads the weight of a layer instead of calling the layer,
    or where activation checkpointing cuts the gradient off. It uses a deep copy and leaves the
    model as it is. The gradient is computed in the mode that the model is in. Outputs are compared
    in evaluation mode, and selected as in ``output_unchanged``; that takes a forward pass per B.

    Args:
        model: A model adapted by ``apply_lora``, by PEFT or by hand.
        *inputs: The arguments to call the model with.
        **kwargs: The keyword arguments to call the model with.

    Raises:
        AssertionError: A B receives no gradient or does not move the output, or there is no B.
        ValueError: The model is on the meta device, or returns no tensor.
    """
    model = copy.deepcopy(model)
    matrices_b = {}
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if "lora_B" in name.split("."):
            matrices_b[name] = parameter
    if not matrices_b:
        raise AssertionError("no parameter is a lora_B: apply the adapter first")
    before = _output(model, inputs, kwargs)
    with torch.enable_grad():
        output = _tensor(model(*inputs, **kwargs))
        if output.requires_grad:
            # Random factors, since the sum of what a softmax or a norm gives may be constant.
            (output * torch.randn_like(output)).sum().backward()
    without_gradient = []
    without_effect = []
    for name, matrix in matrices_b.items():
        if matrix.grad is None or not matrix.grad.any():
            without_gradient.append(name)
        saved = matrix.detach().clone()
        with torch.no_grad():
            matrix.add_(torch.randn_like(matrix))
            after = _output(model, inputs, kwargs)
            matrix.copy_(saved)
        if torch.equal(before, after):
            without_effect.append(name)
    lines = []
    if without_gradient:
        lines.append(_list("these receive no gradient", without_gradient))
    if without_effect:
        lines.append(_list("these do not move the output", without_effect))
    if lines:
        raise AssertionError("\n".join(lines))


def assert_merge_moves_at_most(
    model: nn.Module, limit: float, /, *inputs: object, **kwargs: object
) -> None:
    """Assert that merging LoRA into the weights moves no output element by more than ``limit``.

    It merges a deep copy, with ``merge_lora`` or PEFT, and does not change the model. Outputs are
    computed and selected as in ``output_unchanged``.

    Args:
        model: A model adapted by ``apply_lora``, ``get_peft_model`` or
            ``inject_adapter_in_model``.
        limit: The largest absolute difference allowed, in the output's units.
        *inputs: The arguments to call the model with.
        **kwargs: The keyword arguments to call the model with.

    Raises:
        AssertionError: An element moved further, or every B is zero: then the adapter adds
            nothing, and even a wrong merge moves nothing.
        ValueError: The model is on the meta device, or no known method merges its adapter.
    """
    before = _output(model, inputs, kwargs)
    matrices_b = [p for name, p in model.named_parameters() if "lora_B" in name.split(".")]
    if not any(matrix.any() for matrix in matrices_b):
        raise AssertionError(
            "no lora_B differs from zero, so merging proves nothing: fill B with numbers first"
        )
    merged = _merge(copy.deepcopy(model))
    after = _output(merged, inputs, kwargs)
    moved = _largest_gap(before, after)
    if not moved <= limit:  # not ">", so that a NaN fails
        raise AssertionError(
            f"merging moved the output by up to {moved:.3g}, expected at most {limit:.3g} "
            f"({_form(after)}): round once, or allow for the precision of the weights' dtype"
        )


def _merge(model: nn.Module) -> nn.Module:
    if hasattr(model, "merge_and_unload"):  # from get_peft_model
        return model.merge_and_unload()
    # inject_adapter_in_model adds such layers.
    pefts_layers = []
    for module in model.modules():
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            pefts_layers.append(module)
    if not pefts_layers:
        return merge_lora(model)
    for layer in pefts_layers:
        layer.merge()
    return model


def _contains_segments(aliases: list[str], name: str) -> bool:
    """Tell whether one of a parameter's names contains ``name`` as whole dotted segments."""
    return any(f".{name}." in f".{alias}." for alias in aliases)


def _list(what: str, names: list[str], most: int = 8) -> str:
    listed = ", ".join(names[:most])
    if len(names) > most:
        listed += f" and {len(names) - most} more"
    return f"{what} ({len(names)}): {listed}"


def _parts(model: nn.Module) -> list[nn.Module | nn.Parameter]:
    return [*model.modules(), *model.parameters()]


def _form(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def _same_bits(a: Tensor, b: Tensor | None) -> bool:
    """Compare bits: for torch.equal alone, −0 equals 0 and NaN does not equal itself."""
    if b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b.to(a.device)))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)


def _largest_gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    return (a.double() - b.double()).abs().max().item()


@torch.no_grad()
def _output(model: nn.Module, inputs: tuple, kwargs: dict) -> Tensor:
    """Call the model in evaluation mode, restore each module's mode, and select one tensor."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        tensor = _tensor(model(*inputs, **kwargs))
    finally:
        for module, training in modes.items():
            module.training = training
    if tensor is None or tensor.is_meta:
        raise ValueError("the model gave no tensor, or one on the meta device: nothing to compare")
    return tensor.clone()  # the model may change the tensor that it returned


def _tensor(output: object) -> Tensor | None:
    """Select the tensor itself, ``logits`` among several parts, or else the first tensor."""
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        parts = [output.get("logits"), *output.values()]
    elif isinstance(output, tuple | list):
        parts = output
    else:
        parts = [getattr(output, "logits", None)]
    for part in parts:
        tensor = _tensor(part)
        if tensor is not None:
            return tensor
    return None
