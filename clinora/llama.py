"""The Llama decoder: RMSNorm, rotary positions, grouped-query attention, SiLU MLP.

Parameters carry the names that they have on the Hugging Face Hub, so a checkpoint loads without a
converter, and the arithmetic follows Transformers' ``LlamaModel`` operation by operation.

Shapes: B batch, T tokens, D width (``hidden_size``), H query heads, K key/value heads, E head
width, I MLP width (``intermediate_size``), V vocabulary, C classes.

A batch of notes is ``ids (B, T)``, padded on the right, and ``lengths (B,)``. No position sees a
later one, so no real token ever sees the padding: there is no attention mask to pass.

Sources: Llama, Touvron et al. 2023, section 2.2; RMSNorm, Zhang & Sennrich 2019, equation 4; RoPE,
Su et al. 2021, section 3.2.2; grouped-query attention, Ainslie et al. 2023, section 2.2; the gated
MLP, Shazeer 2020, equation 6.
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """The shape of a Llama, under the names of the Hub's ``config.json``.

    ``num_key_value_heads`` defaults to ``num_attention_heads`` and ``head_dim`` to
    ``hidden_size / num_attention_heads``. The other defaults are those of Transformers.

    Raises:
        ValueError: A value is of another type or out of its range, or sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for f in fields(self):
            x, expected = getattr(self, f.name), "a whole number of at least 1"
            fits = (type(x) is int and x >= 1) or x is f.default  # None, filled in below
            if f.type is float:  # JSON may write 10000.0 as 10000
                fits, expected = type(x) in (int, float) and 0 < x < torch.inf, "a positive number"
            if f.type is bool:
                fits, expected = type(x) is bool, "true or false"
            if not fits:
                raise ValueError(f"{f.name} is {x!r}: expected {expected}")
        D, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and D % H:
            raise ValueError(f"{H} num_attention_heads do not divide hidden_size {D}: set head_dim")
        if K and H % K:  # each key head serves the same number of query heads
            raise ValueError(f"num_key_value_heads {K} does not divide num_attention_heads {H}")
        object.__setattr__(self, "num_key_value_heads", K or H)
        object.__setattr__(self, "head_dim", self.head_dim or D // H)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")

    @classmethod
    def from_json(cls, path: str | Path) -> "LlamaConfig":
        """Read a ``config.json``, of Transformers 5 or older.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no Llama's, or asks for something that this decoder does not do.
        """
        try:
            hub = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        kind = hub.get("model_type") if isinstance(hub, dict) else type(hub).__name__
        if kind != "llama":
            raise ValueError(f"{path}: model_type is {kind!r}, expected 'llama'")
        # Before Transformers 5, rope_theta stood alone and rope_scaling beside it. Where a file has
        # both kinds, Transformers goes by rope_scaling.
        rope = hub.get("rope_scaling") or hub.get("rope_parameters") or {}
        rope = dict(rope) if isinstance(rope, dict) else {"rope_type": rope}
        rope_type = rope.pop("rope_type", rope.pop("type", "default"))
        hub["rope_theta"] = rope.pop("rope_theta", hub.get("rope_theta"))
        unsupported = {
            "quantization_config": (hub.get("quantization_config"), None),
            "hidden_act": (hub.get("hidden_act", "silu"), "silu"),
            "attention_dropout": (hub.get("attention_dropout") or 0.0, 0.0),
            "rope type": (rope_type, "default"),
            "rope parameters": (rope, {}),
        }
        for what, (came, expected) in unsupported.items():
            if came != expected:
                raise ValueError(f"{path}: {what} {came!r} is not supported, only {expected!r}")
        known = {f.name: hub[f.name] for f in fields(cls) if hub.get(f.name) is not None}
        if missing := {f.name for f in fields(cls) if f.default is MISSING} - known.keys():
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


class HalfNorm(torch.autograd.Function):
    """n = x / rms(x), (..., D), of a half-precision x, squared in float32.

    Saved is x as it came, where autograd would save float32(x). With g the gradient of n, that
    of x is (g − n · mean(g ⊙ n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)  # (..., 1), float32
        ctx.save_for_backward(x, scale)
        return (x * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        n, g = x * scale, grad.float()
        g -= n * (g * n).mean(-1, keepdim=True)
        return (g * scale).to(x.dtype), None


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of one: y = w · x / √(mean(x²) + ε), (..., D)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.element_size() == 2:  # there the mean of squares would keep 8 or 11 bits
            return self.weight * HalfNorm.apply(x, self.eps)
        h = x.float()
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (h * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps:g}"


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles by which RoPE turns the pair of entries i and i + E/2: position · θ^(−2i/E), radians.

    Args:
        positions: (T,) token positions, from 0.
        head_dim: E, even.
        theta: The base θ; the slowest pair needs about 2πθ tokens for a turn.

    Returns:
        (T, E), float32, its two halves equal. In bfloat16, positions above 256 would collapse into
        each other.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)  # (T, E/2)
    return torch.cat((angles, angles), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+E/2}) of each head by their angles.

    (x_i, x_j) → (x_i cos − x_j sin, x_j cos + x_i sin), so that the product of a rotated query
    and a rotated key depends on the distance of their positions alone.

    Args:
        x: (..., T, E).
        cos: Cosines of the angles, (..., T, E), in x's dtype.
        sin: Sines, likewise.

    Returns:
        (..., T, E).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Grouped-query attention: softmax(q·kᵀ / √E)·v, H/K query heads to a key head.

    Args:
        q: (B, H, T, E), or (B, H, 1, E) with ``lengths``.
        k: (B, K, T, E).
        v: (B, K, T, E).
        lengths: (B,). None: every position sees itself and those before it. Given: the one
            query of row b stands at position lengths[b] − 1 and sees the first lengths[b] keys.

    Returns:
        The shape of q.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) >= 48:  # faster there
        return TiledAttention.apply(q, k, v)
    grouped = q.size(1) != k.size(1)
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    # with one query, is_causal would let it see position 0 alone
    seen = torch.arange(k.size(2), device=k.device) < lengths[:, None, None, None]  # (B, 1, 1, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)


class TiledAttention(torch.autograd.Function):
    """Causal attention as plain matrix products: in bfloat16 on the CPU, faster than PyTorch's.

    A tile of query rows meets the keys up to its end alone: most of the future is never computed.
    The G = H/K query heads of a key head are rows of one product. Scores and probabilities P are
    float32: bfloat16 would round a score of 8 by up to 0.016. Saved are q, k and v; the backward
    pass computes each tile of P again (Dao et al. 2022, section 3.1). A tile is n rows of b notes,
    (b, K, G·n, E), and sees S keys.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        keys, values = k.contiguous(), v.contiguous().float()  # (B, K, T, E)
        out = torch.empty_like(q)
        for note, tile in _tiles(q):
            p = _probabilities(_rows(q[note, :, tile], k), keys[note], tile)  # (b, K, G·n, S)
            out[note, :, tile] = (p @ values[note, :, : tile.stop]).view_as(out[note, :, tile])
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        # of d_p, and with it of d_s, the scale of the scores is a factor
        keys, values = k.contiguous(), v.contiguous().float() * q.size(-1) ** -0.5
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(values), torch.zeros_like(values)
        for note, tile in _tiles(q):
            seen = slice(tile.stop)
            queries, d_o = (_rows(x[note, :, tile], k) for x in (q, grad))  # (b, K, G·n, E)
            p = _probabilities(queries, keys[note], tile)  # (b, K, G·n, S)
            d_p = d_o.float() @ values[note, :, seen].mT
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype, grad_input=d_p).to(q.dtype)
            dv[note, :, seen] += p.to(q.dtype).mT @ d_o
            dk[note, :, seen] += d_s.mT @ queries
            dq[note, :, tile] = (d_s @ keys[note, :, seen]).view_as(dq[note, :, tile])
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _tiles(q: Tensor, rows: int = 64) -> Iterator[tuple[slice, slice]]:
    """Cut B and T so that a tile's scores, about 1 MB, stay in a core's cache."""
    notes = max(1, 2**18 // (rows * q.size(1) * q.size(2)))
    for b in range(0, q.size(0), notes):
        yield from ((slice(b, b + notes), slice(t, t + rows)) for t in range(0, q.size(2), rows))


def _rows(x: Tensor, k: Tensor) -> Tensor:  # (b, H, n, E) → (b, K, G·n, E)
    return x.reshape(x.size(0), k.size(1), -1, x.size(3))


def _probabilities(queries: Tensor, keys: Tensor, tile: slice) -> Tensor:  # → (b, K, G·n, S)
    scores = (queries.float() * keys.size(-1) ** -0.5) @ keys[:, :, : tile.stop].float().mT
    rows = scores.size(-1) - tile.start
    scores.unflatten(2, (-1, rows))[..., tile] += torch.full((rows, rows), -torch.inf).triu(1)
    return torch.softmax(scores, -1, out=scores)


def last_token(x: Tensor, lengths: Tensor) -> Tensor:
    """Pick the last real position of each row: (B, T, D), (B,) → (B, 1, D)."""
    # gather refuses an index outside 0 … T−1, where x[rows, lengths − 1] would wrap around
    return x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, x.size(-1)))


class Attention(nn.Module):
    """Causal self-attention with rotary positions and H/K query heads to a key head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Attend: x (B, T, D), cos and sin (T, E) → (B, T, D), or (B, 1, D) with lengths."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))  # (B, K, T, E)
        k = rotate(k, cos, sin)
        if lengths is not None:
            x, last = last_token(x, lengths), lengths[:, None, None] - 1  # (B, 1, D), (B, 1, 1)
            cos, sin = cos[last], sin[last]  # (B, 1, 1, E)
        q = rotate(self._heads(self.q_proj(x)), cos, sin)  # (B, H, T or 1, E)
        return self.o_proj(attention(q, k, v, lengths).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:  # (B, T, heads·E) → (B, heads, T, E)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GatedSiLU(torch.autograd.Function):
    """SiLU(g) ⊙ u, (..., I); saves g and u and computes SiLU(g) again, where autograd saves it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad


class MLP(nn.Module):
    """The gated MLP: y = W_down(SiLU(W_gate x) ⊙ W_up x), (..., D) → (..., I) → (..., D)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One layer: x ← x + attention(norm(x)), then x ← x + MLP(norm(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One step: x (B, T, D) → (B, T, D), or (B, 1, D) with lengths."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, lengths)
        x = (x if lengths is None else last_token(x, lengths)) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder without a head.

    Set ``activation_checkpointing`` to True to keep only each layer's input for the backward pass
    and compute the rest again: less memory, about a third more time.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute hidden states.

        With ``lengths`` the last layer still makes every key and value, but queries, the output
        projection and the MLP for the last real token alone: the same numbers for less work.

        Args:
            ids: (B, T) token ids, padded on the right with any id.
            lengths: (B,) real tokens of each row, 1 to T.

        Returns:
            (B, T, D), or with ``lengths`` the last real token's (B, D).

        Raises:
            ValueError: There are not as many lengths as rows.
            RuntimeError: A length is below 1 or above T.
        """
        if lengths is not None and lengths.shape != ids.shape[:1]:  # a single one would broadcast
            raise ValueError(f"lengths {[*lengths.shape]}, ids {[*ids.shape]}: expected one a row")
        x = self.embed_tokens(ids)  # (B, T, D)
        positions = torch.arange(ids.size(1), device=ids.device)
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (T, E)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers, start=1):
            inputs = (x, cos, sin, lengths if i == len(self.layers) else None)
            x = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        return self.norm(x if lengths is None else x.squeeze(1))  # (B, 1, D) → (B, D)


class LlamaForCausalLM(nn.Module):
    """Llama with the language-model head; a tied head is the embedding itself, read backwards."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Llama(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=config.initializer_range)

    def forward(self, ids: Tensor) -> Tensor:
        """Score the next token at every position: ids (B, T) → logits (B, T, V)."""
        x = self.model(ids)  # (B, T, D)
        if self.lm_head is not None:
            return self.lm_head(x)
        weight = self.model.embed_tokens.weight
        return F.linear(x.to(weight.dtype), weight)  # a trained embedding is float32


class LlamaForSequenceClassification(nn.Module):
    """Llama with a linear classifier on the last real token.

    ``head_trained`` is False while ``score`` holds random numbers: such a head predicts nothing and
    is not saved. ``load_model``, ``load_adapter`` and ``clinora.training.train`` set it; whoever
    trains with a loop of their own sets ``model.head_trained = True``.
    """

    def __init__(self, config: LlamaConfig, num_labels: int) -> None:
        super().__init__()
        self.model = Llama(config)
        self.score = nn.Linear(config.hidden_size, num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=config.initializer_range)
        self.head_trained = False

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Classify: ids (B, T) padded on the right, lengths (B,) from 1 to T → logits (B, C)."""
        pooled = self.model(ids, lengths)  # (B, D)
        return self.score(pooled.to(self.score.weight.dtype))  # a trained head stays float32
