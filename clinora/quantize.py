"""NF4: the frozen weights of a base in 4 bits (Dettmers et al. 2023, "QLoRA", sections 2 and 3).

A weight is cut into blocks of 64 numbers, row after row. A block has one scale s, its largest
absolute value, and each of its numbers has a code of 4 bits, the index of the nearest of the 16
values of a table:

    w ≈ TABLE[c] · s    with    s = max |w|    and    c = argmin |w/s − TABLE[c]|

The table holds quantiles of a normal distribution: it is denser where normally distributed weights
are. With a float32 scale this takes 4 + 32/64 = 4.5 bits a weight. Double quantisation stores the
scales in 8 bits, too (section 3), which gives about 4.13 bits.

Codes and scales equal those of bitsandbytes; of the 8-bit scales, bitsandbytes on the CPU takes
the second nearest value for about one in 500. A linear layer computes with the dequantised weight,
which exists during its forward pass and again during its backward pass, but not between them,
unless torch.compile decides to keep it.

>>> weight = quantize_nf4(torch.tensor([[0.5, -1.0, 0.0, 2.0]]))
>>> weight.dequantize()
tensor([[ 0.4922, -1.0501,  0.0000,  2.0000]])
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clinora.kernels import needs_plain_operations

# The values that bitsandbytes publishes: quantiles of N(0, 1) divided by the largest, with a zero.
TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale, if they are quantised, too
CELLS = 64  # for each unit of w/s; narrower than the smallest distance of the table's midpoints
CHUNK = 2048  # blocks; a CPU's cache holds what is computed for them

IN_PLACE = (
    "a weight in NF4 cannot be changed in place: load the base again, or call dequantize() for a "
    "tensor that can be changed"
)

# The choices, on the command line and in Python.
QUANTIZATIONS = ("none", "nf4", "nf4-double")


class NF4Tensor(Tensor):
    """A frozen weight in 4 bits that other code can use as a tensor of its shape and dtype.

    ``F.linear`` keeps only the codes for the backward pass. ``clone``, ``detach``, a move to
    another device and a cast to another floating-point dtype keep the codes, too. Any other
    operation, such as ``weight + update``, reads the dequantised weight and gives a plain tensor.

    Attributes:
        codes: (blocks, 32) uint8. A byte holds the codes of two weights, the first in its upper
            half. The last block is filled up with zeros.
        scales: s of each block, (blocks,): float32, or uint8 codes if they are quantised.
        scales_of_scales: Of each 256 scales if they are quantised, float32; otherwise None.
        mean_scale: The mean of the scales if they are quantised, a float32 number; otherwise None.
        scale_table: The 256 values of quantised scales, float32; otherwise None.

    Raises:
        ValueError: An operation would change the weight in place, or write it to a file.
    """

    trainable = False  # lora.py asks for this
    codes: Tensor
    scales: Tensor
    scales_of_scales: Tensor | None
    mean_scale: Tensor | None
    scale_table: Tensor | None

    def __new__(
        cls, parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> "NF4Tensor":
        device = parts["codes"].device
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor.scales_of_scales = None
        tensor.mean_scale = None
        tensor.scale_table = None
        vars(tensor).update(parts)
        return tensor

    def dequantize(self) -> Tensor:
        """Compute the weight, TABLE[c]·s in float32 and rounded once to the dtype."""
        blocks = len(self.codes)
        out = torch.empty(blocks, BLOCK, dtype=self.dtype, device=self.device)
        pairs = _pairs(self.device)
        scales = self._float_scales()
        # In one piece where each operation costs the start of a kernel, or is compiled.
        on_cpu = self.device.type == "cpu" and not torch.compiler.is_compiling()
        chunk = CHUNK if on_cpu else blocks
        chunks = zip(self.codes.split(chunk), scales.split(chunk), out.split(chunk), strict=True)
        for codes, chunk_scales, chunk_out in chunks:
            values = pairs.index_select(0, codes.flatten().int())  # one number for two weights
            values = values.view(torch.float32).view(-1, BLOCK)
            chunk_out.copy_(values.mul_(chunk_scales[:, None]))
        return out.flatten()[: self.numel()].view(self.shape)

    def _float_scales(self) -> Tensor:
        """Give s of each block: (blocks,) float32."""
        if self.mean_scale is None:
            return self.scales
        values = self.scale_table[self.scales.int()]
        blocks = F.pad(values, (0, -len(values) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        blocks = blocks * self.scales_of_scales[:, None]
        return blocks.flatten()[: len(values)] + self.mean_scale

    def _with_parts(
        self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> "NF4Tensor":
        parts = {name: change(getattr(self, name)) for name in self.__tensor_flatten__()[0]}
        return NF4Tensor(parts, self.shape, dtype or self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Name the tensors that it consists of: torch.compile and ``Module.to`` ask for them."""
        names = ["codes", "scales"]
        if self.mean_scale is not None:
            names += ["scales_of_scales", "mean_scale", "scale_table"]
        return names, self.dtype

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size, _stride: tuple[int, ...]
    ) -> "NF4Tensor":
        return NF4Tensor(parts, shape, dtype)

    def storage(self) -> None:
        """Refuse what safetensors asks for, as there is no such tensor in memory.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a weight in NF4 is not written to a file: save the adapter with save_adapter, or "
            "call merge_lora or dequantize() first"
        )

    def __repr__(self) -> str:
        kind = "nf4" if self.mean_scale is None else "nf4-double"
        return f"NF4Tensor({kind}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func == Tensor.data.__set__:
            raise ValueError(IN_PLACE)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return args[0]._with_parts(lambda part: part)
        if func is aten.clone.default:
            return args[0]._with_parts(torch.clone)
        if func is aten._to_copy.default:
            dtype = kwargs.get("dtype") or args[0].dtype
            if dtype.is_floating_point:
                device = kwargs.get("device")
                return args[0]._with_parts(lambda part: part.to(device, copy=True), dtype)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, NF4Tensor):
                raise ValueError(IN_PLACE)
        args, kwargs = tree_map_only(NF4Tensor, NF4Tensor.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with an NF4 weight; the names of the arguments are PyTorch's."""
    if not isinstance(weight, NF4Tensor):  # the input or the bias is one
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(input, weight, bias)
    if weight.requires_grad:
        raise ValueError(
            "a weight in NF4 cannot be trained: freeze it with requires_grad_(False), as "
            "apply_lora does, or load the base without quantisation"
        )
    if needs_plain_operations():
        return F.linear(input, weight.dequantize(), bias)
    return QuantizedLinear.apply(input, weight, bias)


class QuantizedLinear(torch.autograd.Function):
    """y = W·x + b, where both passes dequantise W; with g the gradient of y, that of x is Wᵀ·g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.dequantize(), bias)  # autocast acts on it as on any linear layer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        grad_x = None
        grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.dequantize().to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.size(-1)).sum(0)
        return grad_x, None, grad_bias


@torch.no_grad()
def quantize_nf4(
    weight: Tensor, dtype: torch.dtype | None = None, double: bool = False
) -> NF4Tensor:
    """Quantise a weight to c = argmin |w/s − TABLE[c]| and s = max |w| over each block of 64.

    Where w/s lies half-way between two values, the lower one is taken.

    Args:
        weight: Any shape. Its numbers count as they are, whatever ``dtype`` is.
        dtype: The dtype of the dequantised weight; None: that of ``weight``.
        double: Whether to quantise the scales, too: the mean of all is subtracted, and of each
            block of 256 the largest absolute value becomes a scale.

    Raises:
        ValueError: A number is not finite.
    """
    flat = weight.detach().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    lower, midpoint = _cells(weight.device)
    codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(blocks), dtype=torch.float32, device=weight.device)
    chunks = zip(blocks.split(CHUNK), codes.split(CHUNK), scales.split(CHUNK), strict=True)
    for numbers, chunk_codes, chunk_scales in chunks:
        numbers = numbers.float()
        torch.amax(numbers.abs(), 1, out=chunk_scales)
        if not chunk_scales.isfinite().all():
            raise ValueError("the weight holds a number that is not finite")
        # As bitsandbytes does it: a product with 1/s, and no division by the zero of a zero block.
        units = numbers.mul_(1 / chunk_scales.clamp(min=1e-38)[:, None]).clamp_(-1, 1)
        cells = ((units + 1) * CELLS).int().flatten()
        found = lower.index_select(0, cells)
        found += units.flatten() > midpoint.index_select(0, cells)
        chunk_codes.copy_((found[::2] << 4 | found[1::2]).view(chunk_codes.shape))
    parts = {"codes": codes, "scales": scales}
    if double:
        parts |= _quantize_scales(scales)
    return NF4Tensor(parts, weight.shape, dtype or weight.dtype)


def _quantize_scales(scales: Tensor) -> dict[str, Tensor]:
    """Quantise the scales (blocks,) to 8 bits."""
    mean = scales.mean()
    rest = scales - mean
    blocks = F.pad(rest, (0, -len(rest) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = blocks.abs().amax(1)
    units = blocks * (1 / largest.clamp(min=1e-38))[:, None]
    table = _scale_table(scales.device)
    midpoints = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(units, midpoints).to(torch.uint8)
    codes = codes.flatten()[: len(rest)].contiguous()
    return {
        "scales": codes,
        "scales_of_scales": largest,
        "mean_scale": mean,
        "scale_table": table,
    }


def quantized_bytes(weights: int, quantize: str) -> int:
    """Count the bytes of a quantised weight: 32 a block of 64 numbers, and those of its scales.

    Args:
        weights: How many numbers it holds.
        quantize: "nf4" (4 bytes a scale) or "nf4-double" (1 byte a scale, 4 bytes for each 256 of
            them, and 4 for their mean).
    """
    blocks = -(-weights // BLOCK)
    codes = blocks * BLOCK // 2
    if quantize == "nf4":
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // SCALE_BLOCK) + 4


def check_quantization(quantize: str) -> None:
    """Check the name of a quantisation.

    Raises:
        ValueError: It is not one of ``QUANTIZATIONS``.
    """
    if quantize not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise ValueError(f"quantize is {quantize!r}: expected one of {known}")


# --- Tables -------------------------------------------------------------------------------------


def _pairs(device: torch.device) -> Tensor:
    """For each byte, the two values of its codes, as one number of 8 bytes: (256,) int64.

    A CPU looks up one number of 8 bytes in half the time of two of 4.
    """
    table = torch.tensor(TABLE)
    both = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)  # (256, 2)
    return both.view(torch.int64).flatten().to(device)


def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of 2·64 + 1 cells of w/s: the lowest code, and the midpoint from which the next one.

    A cell has at most one midpoint between two values of the table, so one comparison decides: a
    fifth of the time of a binary search, which a CPU cannot predict.
    """
    table = torch.tensor(TABLE)
    midpoints = (table[1:] + table[:-1]) / 2
    starts = torch.arange(2 * CELLS + 1) / CELLS - 1
    lower = torch.bucketize(starts, midpoints)
    after_last = torch.full((1,), torch.inf)
    midpoint = torch.cat([midpoints, after_last])[lower]
    return lower.to(device, torch.uint8), midpoint.to(device)


@lru_cache  # the weights on one device share it
def _scale_table(device: torch.device) -> Tensor:
    """The 256 values of a quantised scale (Dettmers et al. 2022, "8-bit optimizers", section 1.3).

    In each decade from 10⁻⁷ to 1 they lie at equal distances, twice as many as in the one below.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [centres, -centres]
    return torch.cat(values).sort().values.to(device)
