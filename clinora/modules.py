"""Modules inside a model: their names under wrappers, their places, their hooks.

A model may be wrapped, as a whole or in part, by ``torch.compile``, activation checkpointing,
DistributedDataParallel or FSDP. The names here are those of the bare model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

# Under these names torch.compile, activation checkpointing and FSDP hold the module they wrap.
WRAPPER_SEGMENTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


# --- Names and places ---------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """Give the model inside torch.compile, DistributedDataParallel, FSDP or checkpointing."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
            continue
        wrapped = [child for name, child in model.named_children() if name in WRAPPER_SEGMENTS]
        if not wrapped:
            return model
        model = wrapped[0]


def without_wrappers(name: str) -> str:
    """Give a dotted name as it is without wrappers: "0._orig_mod.q_proj" → "0.q_proj"."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules with their names, without wrappers; one in two places has two names."""
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        if unwrap(module) is module:
            yield without_wrappers(path), module


def find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Find the modules whose dotted names end in one of ``names``, comparing whole segments."""
    found = {}
    for path, module in named_modules(model):
        # The leading dots keep "proj" from matching "q_proj".
        if any(f".{path}".endswith(f".{name}") for name in names):
            found[path] = module
    return found


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules into the places of some, wherever these stand."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(path, replacements[module])


@contextmanager
def gathered(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Make parameters whole inside a ``with`` block, where FSDP has cut them into shards.

    Every process must enter the block.

    Yields:
        A function that gives a whole tensor, detached, and not copied unless it was gathered.
    """
    is_fsdp1 = any("_fsdp_wrapped_module" in name.split(".") for name, _ in model.named_modules())
    if not is_fsdp1:
        yield _whole
        return
    # Importing it takes half as long as importing torch.
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        yield lambda tensor: tensor.detach().clone()  # after the block the tensor is a shard again


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor, of fully_shard (FSDP2)
        return tensor.full_tensor()
    return tensor


def batches_tracked(model: nn.Module) -> dict[str, int]:
    """Count the batches that went into running statistics, such as BatchNorm's, by module."""
    counts = {}
    for name, module in named_modules(model):
        count = getattr(module, "num_batches_tracked", None)
        if isinstance(count, Tensor) and not count.is_meta:
            counts[name] = int(count)
    return counts


# --- Hooks --------------------------------------------------------------------------------------


def add_hooks(module: nn.Module, *handles: RemovableHandle) -> None:
    """Remember hooks of ours, for ``remove_hooks``."""
    module.lora_hooks = [*getattr(module, "lora_hooks", []), *handles]


def remove_hooks(module: nn.Module) -> None:
    """Remove the hooks that ``add_hooks`` remembered."""
    for handle in vars(module).pop("lora_hooks", []):
        handle.remove()


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of the one that it replaces.

    They share the dictionaries of hooks, so whoever registered a hook can still remove it.
    """
    for name, value in vars(old).items():
        if "_hook" in name and name in vars(new):
            vars(new)[name] = value
