"""The device, the compute dtype, the memory allocator, and the processes of one training."""

import ctypes
import os
from contextlib import suppress

import torch
import torch.distributed as dist

# Options of glibc's mallopt, with their numbers in malloc.h.
MALLOC_OPTIONS = (
    (-3, 2**25),  # M_MMAP_THRESHOLD
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
    (-8, 1),  # M_ARENA_MAX
)
KEPT_SHAPES = 32  # of matrix products; one layer has fewer


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for new ones; a script calls this first.

    By default glibc returns the memory of large tensors to the kernel and requests it again at
    every step, which slows small models. Tensors above 32 MiB are still mapped one by one. The
    process does not shrink. All threads share one heap: despite these options glibc returns the
    memory of a thread's own heaps, of 64 MiB each, and that made batches on the page slower than
    single notes. With another C library this does nothing.
    """
    with suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        for option, value in MALLOC_OPTIONS:
            glibc.mallopt(option, value)


def keep_few_kernels() -> None:
    """Make oneDNN keep fewer kernels; a script that scores many notes calls this first.

    oneDNN, which multiplies matrices on CPUs, keeps kernels and buffers for each of the last 1,024
    shapes. Batches of notes have thousands of shapes, so memory would grow for a long time. With
    ``KEPT_SHAPES`` it does not, and scoring is not slower. Variables that the user has set stay.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KEPT_SHAPES))


def choose_device(device: str = "auto") -> torch.device:
    """Choose the device: "auto" is CUDA if available, else MPS if available, else the CPU.

    Raises:
        ValueError: This machine has no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [kind for kind, is_available in available.items() if is_available]
    if device == "auto":
        device = usable[0]
    kind, _, _ = device.partition(":")  # "cuda" of "cuda:0"
    if kind not in usable:
        names = ", ".join(usable)
        raise ValueError(f"device {device!r} is not available here: choose auto or one of {names}")
    try:
        return torch.empty(0, device=device).device
    except RuntimeError:  # the number is not that of a device
        raise ValueError(
            f"device {device!r} does not exist: expected an existing number, such as cuda:0"
        ) from None


def choose_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Choose the compute dtype: bfloat16 where the hardware has it, else float16 or float32.

    Args:
        device: The device that the model will be on.
        precision: "auto", "bf16", "fp16" or "fp32".

    Raises:
        ValueError: ``precision`` is none of these.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision in dtypes:
        return dtypes[precision]
    if precision != "auto":
        raise ValueError(f"precision {precision!r}: expected auto, {', '.join(dtypes)}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def world() -> tuple[int, int]:
    """Give this process's rank and the number of processes: (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(values: list[float], device: torch.device) -> list[float]:
    """Sum each number over all processes."""
    _, processes = world()
    if processes == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: object) -> list:
    """Collect a value from every process, in the order of their ranks."""
    _, processes = world()
    if processes == 1:
        return [value]
    values = [None] * processes
    dist.all_gather_object(values, value)
    return values
