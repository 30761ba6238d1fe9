"""Where to compute: device, dtype, memory allocator, and the processes of one training."""

import ctypes
from contextlib import suppress

import torch
import torch.distributed as dist

# Numbers and values of M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX in glibc's malloc.h.
MALLOC_OPTIONS = ((-3, 2**25), (-1, 2**31 - 1), (-8, 1))


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for new ones; a script calls this first.

    By default glibc returns the memory of large tensors to the kernel and asks for it again at
    every step, which slows small models. Tensors above 32 MiB are still mapped one by one. The
    process does not shrink. All threads share one heap: glibc returns the memory of a thread's own
    heaps, of 64 MiB each, despite these options, which made the page slower with batches than
    without. With another C library this does nothing.
    """
    with suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        for option, value in MALLOC_OPTIONS:
            glibc.mallopt(option, value)


def choose_device(device: str = "auto") -> torch.device:
    """Choose where to compute: "auto" is CUDA or MPS if there is one, else the CPU.

    Raises:
        ValueError: This machine has no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available.get(device.partition(":")[0], False):
        there = ", ".join(name for name, there in available.items() if there)
        raise ValueError(f"device {device!r} is not available here: choose auto or one of {there}")
    try:
        return torch.empty(0, device=device).device
    except RuntimeError:  # no such number
        raise ValueError(
            f"device {device!r} is not there: expected a number that exists, such as cuda:0"
        ) from None


def choose_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Choose the compute dtype: bfloat16 where the hardware has it, else float16 or float32.

    Args:
        device: Where the model will be.
        precision: "auto", "bf16", "fp16" or "fp32".

    Raises:
        ValueError: It is none of these.
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
    if world()[1] == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: object) -> list:
    """Collect a value of every process, in the order of their ranks."""
    if world()[1] == 1:
        return [value]
    values = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values
