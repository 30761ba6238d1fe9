"""Assertions about adapters, for unit tests: what trains, what stays, what merging moves.

They read nothing but parameters and outputs, so they hold for any ``nn.Module``, adapted by this
package, by PEFT or by hand, and they need no test framework::

    def test_adapter():
        model = build_model()
        with output_unchanged(model, ids):
            apply_lora(model, LoRAConfig(rank=8))
        assert_trains_exactly(model, ["lora_A", "lora_B", "score"])
        assert_trains_at_most(model, percent=0.2, megabytes=5)
        with base_unchanged(model):
            step(model)
        assert_merge_moves_at_most(model, 1e-5, ids)

``assert_trains_exactly`` and ``assert_trains_at_most`` need no weights: build the model under
``torch.device("meta")``, and a 70B shape is checked in seconds.

Each of these also fails where it would show nothing: nothing trains, the step moved nothing, the
block adapted another object, the adapter is still zero.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clinora.lora import count_parameters, merge_lora


def assert_trains_exactly(model: nn.Module, names: Iterable[str]) -> None:
    """Assert that the parameters under ``names`` require a gradient, and no others.

    Args:
        model: Any module, on any device.
        names: Each stands for all parameters whose dotted name holds it as whole segments:
            "lora_A" for every A, "score" for a head, "layers.0.self_attn.q_proj.lora_A" for one.
            A tied parameter goes by any of its names. The copy that PEFT keeps of a module
            trained whole (``original_module``) must stay frozen. Empty: all is frozen.

    Raises:
        AssertionError: Something else trains, something named is frozen, or a name fits nothing.
        ValueError: ``names`` is a string.
    """
    if isinstance(names, str):
        raise ValueError(f"names is the string {names!r}: expected a list of names")
    names, aliases = set(names), {}  # aliases: parameter → its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    unused, unexpected, missing = names.copy(), [], []
    for parameter, known in aliases.items():
        wanted = {n for n in names if any(f".{n}." in f".{alias}." for alias in known)}
        unused -= wanted
        expected = bool(wanted) and "original_module" not in known[0].split(".")
        if parameter.requires_grad != expected:
            (missing if expected else unexpected).append(known[0])
    lines = [
        _list("trained, but not expected to", unexpected),
        _list("expected to train, but frozen", missing),
        _list("expected to train, but no parameter is named so", sorted(unused)),
    ]
    if any(lines):
        raise AssertionError("\n".join(filter(None, lines)))


def assert_trains_at_most(
    model: nn.Module,
    *,
    parameters: int | None = None,
    percent: float | None = None,
    megabytes: float | None = None,
) -> None:
    """Assert how little of a model trains, tied parameters counted once.

    Args:
        model: Any module, on any device.
        parameters: The most elements that may train.
        percent: Their largest share of all elements, adapter included, from 0 to 100.
        megabytes: Their largest size in 10⁶ bytes, each in its own dtype, as an adapter's file
            holds them; gradients and the optimiser's state come on top.

    Raises:
        AssertionError: More trains than a limit allows, or nothing trains at all.
        ValueError: No limit is given.
    """
    limits = {"parameters": parameters, "percent": percent, "megabytes": megabytes}
    if set(limits.values()) == {None}:
        raise ValueError("no limit is given: expected parameters=, percent= or megabytes=")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = count_parameters(model)
    if not trained:
        raise AssertionError(f"none of {count.total:,} parameters trains: apply the adapter first")
    came = {
        "parameters": count.trainable,
        "percent": 100 * count.trainable / count.total,
        "megabytes": sum(p.numel() * p.element_size() for p in trained.values()) / 1e6,
    }
    lines = [
        f"{came[what]:,.12g} {what} train, expected at most {limit:,.12g}"
        for what, limit in limits.items()
        if limit is not None and not came[what] <= limit
    ]
    if lines:
        largest = sorted(trained, key=lambda name: -trained[name].numel())
        raise AssertionError("\n".join((*lines, _list("trained, the largest first", largest))))


@contextmanager
def base_unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a training step in the ``with`` block leaves the base as it is, to the bit.

    The base is what is frozen when the block begins, and every buffer, such as BatchNorm's
    running mean, but those of a module whose own parameters all train. A block that moved no
    trained parameter either fails too: a base cannot change in a step that does nothing, so the
    test would pass whatever the code did. A copy of the model is kept meanwhile.

    Raises:
        AssertionError: Frozen parameters or buffers changed, or no trained parameter moved.
        ValueError: The model is on the meta device.
    """
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device: its weights have no bits to compare")
    base, trained = {}, {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(path, recurse=False))
        for name, parameter in own.items():
            (trained if parameter.requires_grad else base)[name] = parameter.detach().clone()
        if not own or not all(p.requires_grad for p in own.values()):
            base |= {name: b.clone() for name, b in module.named_buffers(path, recurse=False)}
    yield
    now = dict(model.named_parameters(remove_duplicate=False))
    now |= dict(model.named_buffers(remove_duplicate=False))
    if changed := [name for name in base if not _same_bits(base[name], now.get(name))]:
        raise AssertionError(
            f"{_list(f'the base changed, of its {len(base)} tensors these', changed)}\n"
            "Optimise trained parameters alone; put running statistics into evaluation mode."
        )
    if all(_same_bits(trained[name], now.get(name)) for name in trained):
        raise AssertionError(
            f"none of the {len(trained)} trained parameters moved, so an unchanged base shows "
            "nothing: was the optimiser given this model's parameters, a learning rate, a step?"
        )


@contextmanager
def output_unchanged(model: nn.Module, /, *inputs: object, **kwargs: object) -> Iterator[None]:
    """Assert that adapting a model in the ``with`` block leaves its output as it is, to the bit.

    The output is computed in evaluation mode, without gradients, before and after; each module's
    mode is put back. Of an output with several parts the ``logits`` are compared, or else the
    first tensor. ``get_peft_model`` and ``inject_adapter_in_model`` of PEFT change the model that
    they are given, as ``apply_lora`` does, so ``model`` names the same object before and after.

    Args:
        model: Any module.
        *inputs: What to call it with.
        **kwargs: Likewise.

    Raises:
        AssertionError: The output changed, or the block put nothing into the model.
        ValueError: The model is on the meta device, or returns no tensor.
    """
    before, parts = _output(model, inputs, kwargs), _parts(model)
    yield
    if list(map(id, parts)) == list(map(id, _parts(model))):
        raise AssertionError(
            "the block put no module and no parameter into this model, so an unchanged output "
            "shows nothing: was a copy of it adapted, or another object?"
        )
    after = _output(model, inputs, kwargs)
    if before.dtype != after.dtype or not torch.equal(before, after):
        raise AssertionError(
            f"the output was {_form(before)}, is {_form(after)} and moved by up to "
            f"{_largest_gap(before, after):.3g}: a new adapter must add exactly zero"
        )


def assert_merge_moves_at_most(
    model: nn.Module, limit: float, /, *inputs: object, **kwargs: object
) -> None:
    """Assert that merging LoRA into the weights moves no element of the output beyond ``limit``.

    Merges a deep copy, by ``merge_lora`` or by PEFT, and leaves the model as it is. Outputs are
    computed and picked as in ``output_unchanged``.

    Args:
        model: A model adapted by ``apply_lora``, ``get_peft_model`` or
            ``inject_adapter_in_model``.
        limit: The largest absolute difference allowed, in the output's units.
        *inputs: What to call the model with.
        **kwargs: Likewise.

    Raises:
        AssertionError: Some element moved further, or there is no B other than zero: merging an
            adapter that adds nothing moves nothing, whatever merging does.
        ValueError: The model is on the meta device, or has B but nothing that merges it.
    """
    before = _output(model, inputs, kwargs)
    if not any(p.any() for name, p in model.named_parameters() if "lora_B" in name.split(".")):
        raise AssertionError(
            "no lora_B differs from zero, so merging shows nothing: fill B with numbers first"
        )
    after = _output(_merge(copy.deepcopy(model)), inputs, kwargs)
    if not (moved := _largest_gap(before, after)) <= limit:  # a NaN is no less than a limit
        raise AssertionError(
            f"merging moved the output by up to {moved:.3g}, expected at most {limit:.3g} "
            f"({_form(after)}): round once, or allow for what the weights' dtype can hold"
        )


def _merge(model: nn.Module) -> nn.Module:
    if hasattr(model, "merge_and_unload"):  # get_peft_model
        return model.merge_and_unload()
    layers = [m for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")]
    for layer in layers:  # inject_adapter_in_model
        layer.merge()
    return model if layers else merge_lora(model)


def _list(what: str, names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} ({len(names)}): {', '.join(names[:most])}{more}" if names else ""


def _parts(model: nn.Module) -> list[nn.Module | nn.Parameter]:
    return [*model.modules(), *model.parameters()]


def _form(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def _same_bits(a: Tensor, b: Tensor | None) -> bool:
    """Compare bits: torch.equal takes −0 for 0, and no NaN for itself."""
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (x.detach().to(a.device).contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def _largest_gap(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.shape == b.shape else math.inf


@torch.no_grad()
def _output(model: nn.Module, inputs: tuple, kwargs: dict) -> Tensor:
    """Call the model in evaluation mode, restore each module's mode, and pick the tensor."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        tensor = _tensor(model(*inputs, **kwargs))
    finally:
        for module, training in modes.items():
            module.training = training
    if tensor is None or tensor.is_meta:
        raise ValueError("nothing to compare: the model gave no tensor, or one on the meta device")
    return tensor.clone()  # the model may own what it returned


def _tensor(output: object) -> Tensor | None:
    """Pick the tensor itself, the logits among several, or else the first."""
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        parts = (output.get("logits"), *output.values())
    else:
        parts = output if isinstance(output, tuple | list) else (getattr(output, "logits", None),)
    return next((found for found in map(_tensor, parts) if found is not None), None)
