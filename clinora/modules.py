"""Modules inside a model: their names without wrappers, their places, their hooks.

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
    """Return the model inside torch.compile, DistributedDataParallel, FSDP or checkpointing."""
    inner = _wrapped(model)
    while inner is not None:
        model = inner
        inner = _wrapped(model)
    return model


def _wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper holds; None if the module is not a wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return module.module
    for name, child in module.named_children():
        if name in WRAPPER_SEGMENTS:
            return child
    return None


def without_wrappers(name: str) -> str:
    """Return a dotted name without the segments of wrappers: "0._orig_mod.weight" → "0.weight"."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules but wrappers, with their names; one that is used twice has two names."""
    seen = {}  # path, wrappers included → name, module
    for path, module in model.named_modules(remove_duplicate=False):
        parent_path, _, segment = path.rpartition(".")
        if path == "":
            name = ""
        else:
            parent_name, parent = seen[parent_path]
            if _wrapped(parent) is module:
                name = parent_name
            else:
                name = f"{parent_name}.{segment}" if parent_name else segment
        seen[path] = name, module
        if _wrapped(module) is None:
            yield name, module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters with their names; a tied parameter has several names."""
    for module_name, module in named_modules(model):
        yield from module.named_parameters(module_name, recurse=False, remove_duplicate=False)


def find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Find the modules whose dotted names end in one of ``names``, comparing whole segments."""
    found = {}
    for path, module in named_modules(model):
        # The leading dots keep "proj" from matching "q_proj".
        if any(f".{path}".endswith(f".{name}") for name in names):
            found[path] = module
    return found


def parents_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return the modules that hold the ones with these names, each once."""
    modules = dict(named_modules(model))
    parents = [modules[name.rpartition(".")[0]] for name in names]
    return list(dict.fromkeys(parents))


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they occur."""
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


def is_whole(linear: nn.Module) -> bool:
    """Tell whether a layer's weights are whole, and not shards of FSDP."""
    for parameter in linear.parameters(recurse=False):
        if parameter.numel() == 0 or hasattr(parameter, "full_tensor"):  # a DTensor
            return False
    return linear.weight.shape == (linear.out_features, linear.in_features)


def running_means(model: nn.Module) -> dict[str, Tensor]:
    """Copy the running means of normalisation layers, such as BatchNorm, by module."""
    means = {}
    for name, module in named_modules(model):
        mean = getattr(module, "running_mean", None)
        if isinstance(mean, Tensor) and not mean.is_meta:
            means[name] = mean.clone()
    return means


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
