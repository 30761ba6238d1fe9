"""Faster or leaner forms of the operations that ``llama.py`` and ``lora.py`` call.

Each kernel's docstring holds its textbook form: a few lines that compute the same, up to rounding.
Read those lines first; the rest of this file only saves time or memory.

The special forms serve ordinary training and prediction. Under ``torch.compile``, which fuses
plain operations itself, and under the transforms of ``torch.func`` (``grad``, ``vmap``, ``jvp``, …)
a kernel falls back on plain PyTorch operations. A second derivative (``create_graph=True``) is
computed from plain operations, too.

Shapes: B batch, T tokens, D width, H query heads, K key/value heads, E head width, I MLP width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TILED_FROM = 48  # tokens; shorter notes use PyTorch's attention in both passes
# e⁻⁶⁰ is negligible beside the largest probability of a row. Without this bound, probabilities of
# very low scores would be denormal numbers, with which a CPU computes up to 90 times more slowly.
LOWEST_SCORE = -60.0


def _in_torch_func() -> bool:
    """Tell whether a transform of torch.func is at work, outside torch.compile."""
    # PyTorch has no public name for this question.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def needs_plain_operations() -> bool:
    """Tell whether torch.compile or a transform of torch.func is at work."""
    return torch.compiler.is_compiling() or _in_torch_func()


def _gradients_to_differentiate(
    plain: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute gradients through plain operations, so that they can be differentiated again.

    PyTorch's ``once_differentiable`` would refuse a second derivative only in part: where the
    incoming gradient is a constant, it silently gives zero.
    """
    # If one tensor is passed as two inputs, its two aliases still get separate gradients.
    aliases = [x.view_as(x) for x in inputs]
    wanted = [alias for alias in aliases if alias.requires_grad]
    found = torch.autograd.grad(plain(*aliases), wanted, grad, create_graph=True)
    gradient_of = dict(zip(wanted, found, strict=True))
    return tuple(gradient_of.get(alias) for alias in aliases)


# --- RMSNorm without its weight -----------------------------------------------------------------


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """Divide each vector by its root mean square (Zhang & Sennrich 2019, equation 4).

    Textbook form::

        def rms_normalize(x, eps):
            return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    The squares are computed in float32. In half precision their mean would keep 8 or 11 bits,
    and in float16 the square of a number above 255 would be infinite.

    Args:
        x: (..., D).
        eps: ε, added to the mean square.

    Returns:
        (..., D), in the dtype of x.
    """
    if x.element_size() == 2 and not needs_plain_operations():
        return HalfPrecisionNorm.apply(x, eps)
    return _plain_norm(x, eps)


def _plain_norm(x: Tensor, eps: float) -> Tensor:
    h = x.float()
    scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
    return (h * scale).to(x.dtype)


class HalfPrecisionNorm(torch.autograd.Function):
    """``rms_normalize`` that saves x in half precision, where autograd would save float32(x).

    With g the gradient of x / rms(x), the gradient of x is g / rms(x) − x · mean(g ⊙ x) / rms(x)³.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        # In place, and with one dtype in each operation: a CPU takes three times as long where
        # PyTorch has to mix dtypes.
        h = x.float()
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True)  # (..., 1)
        scale = torch.rsqrt(length**2 / x.size(-1) + eps)
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return h.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors  # scale (..., 1) float32
        if torch.is_grad_enabled():  # create_graph=True
            plain = partial(_plain_norm, eps=ctx.eps)
            (dx,) = _gradients_to_differentiate(plain, (x,), grad)
            return dx, None
        h = x.float()
        g = grad.float()
        mean = torch.linalg.vecdot(g, h)[..., None] / x.size(-1)  # (..., 1)
        factor = mean * scale * scale * scale  # scale**3 alone could underflow
        return g.mul_(scale).addcmul_(h, factor, value=-1).to(x.dtype), None


# --- Attention ----------------------------------------------------------------------------------


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention, softmax(q·kᵀ / √E)·v; H/K query heads share each key head.

    Textbook form::

        def causal_attention(q, k, v):
            k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, H, T, E)
            v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
            scores = q @ k.mT / q.size(-1) ** 0.5  # (B, H, T, T)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    Args:
        q: (B, H, T, E).
        k: (B, K, T, E).
        v: (B, K, T, E).

    Returns:
        (B, H, T, E). Position t has attended to positions 0 to t.
    """
    on_cpu_in_bfloat16 = q.device.type == "cpu" and _are_bfloat16(q, k, v)
    if on_cpu_in_bfloat16 and q.size(2) >= TILED_FROM and not needs_plain_operations():
        return TiledAttention.apply(q, k, v)
    return _attend(q, k, v, is_causal=True)


def last_token_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Compute causal attention for one query in each row, the one of its last real token.

    Textbook form::

        def last_token_attention(q, k, v, lengths):
            k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, H, T, E)
            v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
            scores = q @ k.mT / q.size(-1) ** 0.5  # (B, H, 1, T)
            padding = torch.arange(k.size(2)) >= lengths[:, None, None, None]
            return scores.masked_fill(padding, -torch.inf).softmax(-1) @ v

    Args:
        q: (B, H, 1, E). The query of row b stands at position lengths[b] − 1.
        k: (B, K, T, E).
        v: (B, K, T, E).
        lengths: (B,), from 1 to T.

    Returns:
        (B, H, 1, E). Row b has attended to its first lengths[b] positions.
    """
    # is_causal would place the single query at position 0; a mask says what it attends to.
    positions = torch.arange(k.size(2), device=k.device)
    mask = positions < lengths[:, None, None, None]  # (B, 1, 1, T)
    return _attend(q, k, v, attn_mask=mask)


def _are_bfloat16(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.bfloat16 for x in tensors)


def _attend(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """Call PyTorch's attention: q (B, H, n, E), k and v (B, K, T, E) → (B, H, n, E)."""
    if _in_torch_func():
        return _plain_attention(q, k, v, **mask)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """Attend by plain operations: PyTorch's fused attention does not support all transforms."""
    grouped = q.size(1) != k.size(1)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask)


class TiledAttention(torch.autograd.Function):
    """Causal attention with a backward pass in tiles: on the CPU in bfloat16.

    The forward pass is PyTorch's, which also gives the log-sum-exp L of each row of scores. With it
    the backward pass computes the probabilities again (Dao et al. 2022, section 3.1). Scores Z and
    probabilities P are float32, because bfloat16 would round a score of 8 by up to 0.016. PyTorch's
    own backward pass rounds more. With dX for the gradient of X and sums over a row:

        P = exp(Q·Kᵀ/√E − L)    dV = Pᵀ·dO    dZ = P ⊙ (dO·Vᵀ − Σ dO ⊙ O)
        dQ = dZ·K/√E    dK = dZᵀ·Q/√E

    A tile is n query rows of b notes. It needs the S keys up to its last row and no others, so
    most scores of later positions are never computed. The G = H/K query heads that share a key
    head are rows of one matrix product: a tile of queries is (b, K, G·n, E).
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # autocast is off inside
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.size(1) // k.size(1)
        # No public function of PyTorch also returns the log-sum-exp. This one, unlike
        # scaled_dot_product_attention, reads q as if its last stride were 1.
        queries = q if q.stride(-1) == 1 else q.contiguous()
        keys = k.repeat_interleave(group, 1)  # (B, H, T, E), a copy
        values = v.repeat_interleave(group, 1)
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, is_causal=True
        )  # (B, H, T, E), (B, H, T)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum_exp = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            plain = partial(_plain_attention, is_causal=True)
            return _gradients_to_differentiate(plain, (q, k, v), grad)
        key_heads = k.size(1)
        scale = q.size(-1) ** -0.5
        # 1/√E multiplies K in Q·Kᵀ; in dQ and dK it multiplies V and O once, which dZ contains.
        keys = k.contiguous()  # (B, K, T, E)
        scaled_keys = keys.float() * scale
        scaled_values = v.contiguous().float() * scale
        sums = torch.linalg.vecdot(grad.float(), out.float()) * scale  # (B, H, T)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(scaled_keys)
        dv = torch.zeros_like(scaled_keys)
        for notes, rows in _tiles(q):
            seen = slice(rows.stop)
            queries = _stack_heads(q[notes, :, rows], key_heads)  # (b, K, G·n, E)
            d_o = _stack_heads(grad[notes, :, rows], key_heads)  # (b, K, G·n, E)
            log_sums = _stack_heads(log_sum_exp[notes, :, rows, None], key_heads)  # (b, K, G·n, 1)
            row_sums = _stack_heads(sums[notes, :, rows, None], key_heads)  # (b, K, G·n, 1)
            p = queries.float() @ scaled_keys[notes, :, seen].mT  # (b, K, G·n, S)
            p.sub_(log_sums).clamp_(min=LOWEST_SCORE).exp_()
            _zero_later_keys(p, rows)
            d_p = d_o.float() @ scaled_values[notes, :, seen].mT  # (b, K, G·n, S)
            d_z = d_p.sub_(row_sums).mul_(p).to(q.dtype)
            dv[notes, :, seen] += (p.to(q.dtype).mT @ d_o).float()
            dk[notes, :, seen] += (d_z.mT @ queries).float()
            dq[notes, :, rows] = (d_z @ keys[notes, :, seen]).view_as(dq[notes, :, rows])
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _tiles(q: Tensor, rows: int = 128) -> Iterator[tuple[slice, slice]]:
    """Cut B and T into tiles; several short notes share one while its scores take at most 4 MB."""
    _, heads, tokens, _ = q.shape
    notes = max(1, 2**20 // (rows * heads * tokens))
    for b in range(0, q.size(0), notes):
        for t in range(0, tokens, rows):
            yield slice(b, b + notes), slice(t, min(t + rows, tokens))


def _stack_heads(x: Tensor, key_heads: int) -> Tensor:
    """Stack the rows of query heads that share a key head: (b, H, n, E) → (b, K, G·n, E)."""
    return x.reshape(x.size(0), key_heads, -1, x.size(3))


def _zero_later_keys(p: Tensor, rows: slice) -> None:
    """Set the probabilities of keys after each query's own to zero: p (b, K, G·n, S)."""
    n = rows.stop - rows.start
    p.unflatten(2, (-1, n))[..., rows].tril_()  # the keys before the tile come before all its rows


# --- The gate of the MLP ------------------------------------------------------------------------


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply ``up`` by SiLU(gate) = gate·sigmoid(gate) (Shazeer 2020, equation 5).

    Textbook form::

        def gated_silu(gate, up):
            return gate * torch.sigmoid(gate) * up

    Args:
        gate: (..., I).
        up: (..., I).

    Returns:
        (..., I).
    """
    if needs_plain_operations():
        return _plain_gated_silu(gate, up)
    return GatedSiLU.apply(gate, up)


def _plain_gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class GatedSiLU(torch.autograd.Function):
    """``gated_silu`` that saves gate and up; autograd would save SiLU(gate) as a third tensor."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return _gradients_to_differentiate(_plain_gated_silu, ctx.saved_tensors, grad)
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


# --- Dropout ------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each entry with probability p and divide the others by 1 − p, in training only.

    Textbook form::

        def dropout(x, p, training):
            if not training:
                return x
            kept = torch.rand_like(x) >= p
            return x * kept / (1 - p)

    On the CPU one random byte decides each entry, in a fifth of the time of ``F.dropout``. A byte
    has 256 values, so p is rounded to d/256 with d at most 255, and what is kept is divided by
    exactly 1 − d/256. The mask takes one byte for each entry.

    Args:
        x: Any shape.
        p: Probability of dropping an entry, 0 ≤ p < 1.
        training: Whether to drop at all.

    Returns:
        The shape and dtype of x.
    """
    dropped = min(round(256 * p), 255)  # of a byte's 256 values
    if not training or dropped == 0 or x.device.type != "cpu" or needs_plain_operations():
        return F.dropout(x, p, training)
    # random_ needs these bounds: by default it never sets the top bit of an int64, and every
    # eighth byte would be below 128.
    noise = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
    lanes = noise.view(torch.int8)[: x.numel()].view(x.shape)  # uniform in −128 … 127
    kept = lanes.clamp_(dropped - 129, dropped - 128).sub_(dropped - 129)  # 0 or 1
    return Masked.apply(x, kept, 256 / (256 - dropped))


class Masked(torch.autograd.Function):
    """x · mask · factor, with a mask of bytes; the gradient of x is g · mask · factor.

    x and the mask have the same shape. The mask is cast to the dtype of x first, because a CPU
    takes twice as long to multiply numbers of two dtypes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.factor = factor
        return mask.to(x.dtype).mul_(x).mul_(factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return mask.to(grad.dtype).mul_(grad).mul_(ctx.factor), None, None
