"""The Llama decoder: RMSNorm, rotary positions, grouped-query attention and a gated MLP.

The file reads from top to bottom: configuration, norm, rotary positions, attention, MLP, layer,
model, heads. A few operations have a faster form in ``kernels.py``, and their textbook form stands
there beside it: ``rms_normalize``, ``causal_attention``, ``last_token_attention``, ``gated_silu``.

Parameters have the names that they have on the Hugging Face Hub, so a checkpoint loads without a
converter. The arithmetic follows Transformers' ``LlamaModel`` operation by operation.

Shapes: B batch, T tokens, D width (``hidden_size``), H query heads, K key/value heads, E head
width, I MLP width (``intermediate_size``), V vocabulary, C classes.

A batch of notes is ``ids (B, T)``, padded on the right, and ``lengths (B,)``. No position attends
to a later one, so no real token ever attends to padding, and no attention mask is needed.

Sources: Llama, Touvron et al. 2023, section 2.2; RMSNorm, Zhang & Sennrich 2019, equation 4; RoPE,
Su et al. 2021, section 3.2.2, and its scaling, ``apply_scaling`` in Meta's llama-models;
grouped-query attention, Ainslie et al. 2023, section 2.2; the gated MLP, Shazeer 2020, equation 6.
"""

import json
import math
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clinora.kernels import causal_attention, gated_silu, last_token_attention, rms_normalize

# Llama 3.1 405B has 126 layers and 2.1e9 entries in its largest weight. A damaged configuration
# could ask for so many layers that building them never ends, or for a tensor larger than PyTorch
# can describe.
MOST_LAYERS = 1000
MOST_ENTRIES = 10**11


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """The rope type "llama3": rotary positions for texts longer than those of pretraining.

    ``scale_frequencies`` is its formula. The names are those of the Hub's ``config.json``.

    Raises:
        ValueError: A value is of another type or out of its range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_values(self)
        if self.factor < 1:
            raise ValueError(f"factor is {self.factor}: expected at least 1")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}: expected more than low_freq_factor, "
                f"which is {self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """The shape of a Llama, under the names of the Hub's ``config.json``.

    ``num_key_value_heads`` defaults to ``num_attention_heads`` and ``head_dim`` to
    ``hidden_size / num_attention_heads``. The other defaults are those of Transformers.

    Raises:
        ValueError: A value is of another type or out of its range, sizes do not fit together, or
            there are more than ``MOST_LAYERS`` layers or ``MOST_ENTRIES`` entries in a weight.
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
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _check_values(self)
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(
                f"num_hidden_layers is {self.num_hidden_layers}: expected at most {MOST_LAYERS}"
            )
        width = self.hidden_size
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {heads}: each key head serves the same number of query heads"
            )
        if self.head_dim is None and width % heads:
            raise ValueError(
                f"{heads} num_attention_heads do not divide hidden_size {width}: set head_dim"
            )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", width // heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        rows_of_weights = {
            "vocab_size": self.vocab_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads · head_dim": heads * self.head_dim,
        }
        for name, rows in rows_of_weights.items():
            if rows * width > MOST_ENTRIES:
                raise ValueError(
                    f"{name} is {rows} and hidden_size is {width}: expected a product of at most "
                    f"{MOST_ENTRIES}"
                )

    @classmethod
    def from_json(cls, path: str | Path) -> "LlamaConfig":
        """Read a ``config.json`` that Transformers 5 or an older version wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file does not describe a Llama, or it asks for something that this
                decoder does not do.
        """
        try:
            hub = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(hub, dict):
            raise ValueError(f"{path} holds a {type(hub).__name__}, expected a JSON object")
        if hub.get("model_type") != "llama":
            raise ValueError(f"{path}: model_type is {hub.get('model_type')!r}, expected 'llama'")

        # Each line: what it is, the file's value, the only value that is supported.
        requirements = [
            ("quantization_config", hub.get("quantization_config"), None),
            ("hidden_act", hub.get("hidden_act", "silu"), "silu"),
            ("attention_dropout", hub.get("attention_dropout") or 0.0, 0.0),
        ]
        for what, found, supported in requirements:
            if found != supported:
                raise ValueError(f"{path}: {what} {found!r} is not supported, only {supported!r}")

        theta, scaling = _read_rope(hub, path)
        return _from_json(cls, hub | {"rope_theta": theta, "rope_scaling": scaling}, str(path))


def _read_rope(hub: dict, path: str | Path) -> tuple[object, RopeScaling | None]:
    """Give the θ of a ``config.json``, None if it has none, and its scaling.

    Raises:
        ValueError: The rope type or one of its parameters is not supported, or one is missing.
    """
    # Before Transformers 5, rope_theta was a key of its own, beside rope_scaling. Where a file has
    # both rope_scaling and rope_parameters, Transformers uses rope_scaling.
    rope = hub.get("rope_scaling") or hub.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope parameters {rope!r} are not a JSON object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"{path}: rope type {rope_type!r} is not supported, only 'default' and 'llama3'"
        )
    known = {"rope_type", "type", "rope_theta"}
    scaling = None
    if rope_type == "llama3":
        scaling = _from_json(RopeScaling, rope, f"{path}: rope type 'llama3'")
        known |= {field.name for field in fields(RopeScaling)}
    other = {key: rope[key] for key in rope.keys() - known}
    if other:
        raise ValueError(f"{path}: rope parameters {other!r} are not supported")
    return rope.get("rope_theta", hub.get("rope_theta")), scaling


def _from_json(cls: type, values: dict, where: str) -> Any:
    """Make a ``cls`` from the values of its fields in a JSON object; null means absent.

    Raises:
        ValueError: A value is missing or does not fit.
    """
    given = {}
    missing = []
    for field in fields(cls):
        value = values.get(field.name)
        if value is not None:
            given[field.name] = value
        elif field.default is MISSING:
            missing.append(field.name)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_values(config: LlamaConfig | RopeScaling) -> None:
    """Check the type and range of each field's value. None fits where it is the default.

    Raises:
        ValueError: One does not fit.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None and field.default is None:
            continue
        if field.type is bool:
            expected = "true or false"
            fits = type(value) is bool
        elif field.type is float:
            expected = "a positive number"
            # JSON may write 10000.0 as 10000
            fits = type(value) in (int, float) and 0 < value <= sys.float_info.max
        elif field.type == RopeScaling | None:
            expected = "a RopeScaling"
            fits = isinstance(value, RopeScaling)
        else:
            expected = "a whole number of at least 1"
            fits = type(value) is int and value >= 1
        if not fits:
            raise ValueError(f"{field.name} is {value!r}: expected {expected}")


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of one: y = w · x / √(mean(x²) + ε), (..., D)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms_normalize(x, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps:g}"


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Tensor:
    """Compute RoPE's angles: the entries i and i + E/2 rotate by position · θ^(−2i/E) radians.

    Args:
        positions: (T,) token positions, from 0.
        head_dim: E, even.
        theta: The base θ. The slowest pair makes one turn in about 2πθ tokens.
        scaling: How to lower the frequencies θ^(−2i/E), if at all.

    Returns:
        (T, E), in float32: −angle for the first entry of each pair and +angle for the second, as
        ``rotate`` needs them. bfloat16 cannot tell positions above 256 apart.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / theta**exponents  # (E/2,), in radians per token
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling)
    angles = positions.float()[:, None] * frequencies  # (T, E/2)
    return torch.cat((-angles, angles), -1)


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide RoPE's low frequencies by ``factor``, as Llama 3.1 does for long texts.

    A pair that makes at most ``low_freq_factor`` turns within the original context length is
    slowed down by ``factor``: the positions of a text ``factor`` times as long then give angles
    that pretraining has seen. A pair that makes at least ``high_freq_factor`` turns keeps
    its frequency, which tells neighbours apart. In between, the two are mixed in proportion.

    Args:
        frequencies: (E/2,), in radians per token.
        scaling: The original context length and the three factors.

    Returns:
        (E/2,).
    """
    wavelengths = 2 * math.pi / frequencies  # tokens per turn
    turns = scaling.original_max_position_embeddings / wavelengths
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+E/2}) of each head by their angles a.

    (x_i, x_j) → (x_i cos a − x_j sin a, x_j cos a + x_i sin a). The product of a rotated query and
    a rotated key then depends only on the distance between their positions.

    Args:
        x: (..., E).
        cos: Cosines of ``rotary_angles``, in the dtype of x; they broadcast to its shape.
        sin: Their sines, of the same shape. In the first half of E they are −sin a.

    Returns:
        The shape of x.
    """
    partners = x.roll(x.size(-1) // 2, dims=-1)
    return x * cos + partners * sin


def last_token(x: Tensor, lengths: Tensor) -> Tensor:
    """Pick the last real position of each row: (B, T, D), (B,) → (B, 1, D).

    Raises:
        RuntimeError: A length is below 1 or above T.
    """
    # gather refuses an index outside 0 … T−1; with x[rows, lengths − 1] an index −1 would wrap.
    index = (lengths - 1)[:, None, None].expand(-1, 1, x.size(-1))  # (B, 1, D)
    return x.gather(1, index)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and H/K query heads to each key head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.hidden_size
        query_width = config.num_attention_heads * config.head_dim  # H·E
        key_width = config.num_key_value_heads * config.head_dim  # K·E
        self.q_proj = nn.Linear(width, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, width, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Attend from every position to itself and those before it.

        Args:
            x: (B, T, D).
            cos: Cosines of the rotary angles, (T, H, E) or (T, 1, E).
            sin: Sines of the rotary angles, of the same shape.
            lengths: (B,), to compute ``for_last_token`` instead.

        Returns:
            (B, T, D), or (B, 1, D) with ``lengths``.
        """
        if lengths is not None:
            return self.for_last_token(x, cos, sin, lengths)
        q = rotate(self._split_heads(self.q_proj(x)), cos, sin)  # (B, T, H, E)
        k, v = self._keys_and_values(x, cos, sin)  # (B, K, T, E)
        out = causal_attention(q.transpose(1, 2), k, v)  # (B, H, T, E)
        return self.o_proj(self._join_heads(out))

    def for_last_token(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Tensor:
        """Attend from the last real token of each row alone: (B, T, D), (B,) → (B, 1, D)."""
        position = lengths[:, None] - 1  # (B, 1)
        q = self._split_heads(self.q_proj(last_token(x, lengths)))  # (B, 1, H, E)
        q = rotate(q, cos[position], sin[position])
        k, v = self._keys_and_values(x, cos, sin)  # (B, K, T, E)
        out = last_token_attention(q.transpose(1, 2), k, v, lengths)  # (B, H, 1, E)
        return self.o_proj(self._join_heads(out))

    def _keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        k = self._split_heads(self.k_proj(x))  # (B, T, K, E)
        v = self._split_heads(self.v_proj(x))  # (B, T, K, E)
        heads = k.size(2)  # cos and sin are the same for all heads
        k = rotate(k, cos[:, :heads], sin[:, :heads])
        return k.transpose(1, 2), v.transpose(1, 2)

    def _split_heads(self, x: Tensor) -> Tensor:  # (B, T, heads·E) → (B, T, heads, E)
        return x.unflatten(-1, (-1, self.head_dim))

    def _join_heads(self, x: Tensor) -> Tensor:  # (B, heads, T, E) → (B, T, heads·E)
        return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """The gated MLP: y = W_down(SiLU(W_gate x) ⊙ W_up x), (..., D) → (..., I) → (..., D)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One layer: x ← x + attention(norm(x)), then x ← x + MLP(norm(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the layer.

        Args:
            x: (B, T, D).
            cos: Cosines of the rotary angles, (T, H, E) or (T, 1, E).
            sin: Sines of the rotary angles, of the same shape.
            lengths: (B,), to compute ``for_last_token`` instead. It is called from here, so that
                hooks, checkpointing and ``torch.compile`` on the layer apply to it.

        Returns:
            (B, T, D), or (B, 1, D) with ``lengths``.
        """
        if lengths is not None:
            return self.for_last_token(x, cos, sin, lengths)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))

    def for_last_token(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Tensor:
        """Compute the layer for the last real token of each row alone: (B, T, D) → (B, 1, D).

        Keys and values come from every token. The query, the output projection and the MLP are
        computed for one token: the same numbers for less work.
        """
        attended = self.self_attn(self.input_layernorm(x), cos, sin, lengths)  # (B, 1, D)
        x = last_token(x, lengths) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder without a head.

    Set ``activation_checkpointing`` to True to save only each layer's input for the backward pass
    and compute the rest again there: less memory, about a third more time.
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

        With ``lengths`` the last layer computes the last real token of each row alone
        (``DecoderLayer.for_last_token``).

        Args:
            ids: (B, T) token ids, padded on the right with any id.
            lengths: (B,) number of real tokens in each row, 1 to T.

        Returns:
            (B, T, D), or with ``lengths`` the last real token's (B, D).

        Raises:
            ValueError: The number of lengths is not the number of rows.
            RuntimeError: A length is below 1 or above T.
        """
        # A single length would be broadcast to all rows.
        if lengths is not None and lengths.shape != ids.shape[:1]:
            raise ValueError(
                f"lengths {list(lengths.shape)}, ids {list(ids.shape)}: expected one length per row"
            )
        x = self.embed_tokens(ids)  # (B, T, D)
        positions = torch.arange(ids.size(1), device=ids.device)
        config = self.config
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        # Stored once for each head: a CPU takes twice as long to multiply by a broadcast table.
        heads = config.num_attention_heads
        cos = angles.cos().to(x.dtype)[:, None].repeat(1, heads, 1)  # (T, H, E)
        sin = angles.sin().to(x.dtype)[:, None].repeat(1, heads, 1)  # (T, H, E)
        *layers, last_layer = self.layers
        for layer in layers:
            x = self._run(layer, x, cos, sin)
        if lengths is None:
            x = self._run(last_layer, x, cos, sin)
        else:
            x = self._run(last_layer, x, cos, sin, lengths).squeeze(1)  # (B, 1, D) → (B, D)
        return self.norm(x)

    def _run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        """Call a layer, under activation checkpointing where that is asked for."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class LlamaForCausalLM(nn.Module):
    """Llama with a language-model head; a tied head uses the embedding's own weight."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Llama(config)
        self.quantization = "none"  # load_model changes it if it quantises the weights
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
        return F.linear(x.to(weight.dtype), weight)  # an embedding that trains is float32


class LlamaForSequenceClassification(nn.Module):
    """Llama with a linear classifier on the last real token.

    ``head_trained`` is False while ``score`` holds random numbers. Such a head predicts nothing and
    is not saved. ``load_model``, ``load_adapter`` and ``clinora.training.train`` set the flag;
    after a training loop of your own, set ``model.head_trained = True``.
    """

    def __init__(self, config: LlamaConfig, num_labels: int) -> None:
        super().__init__()
        self.model = Llama(config)
        self.score = nn.Linear(config.hidden_size, num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=config.initializer_range)
        self.head_trained = False
        self.quantization = "none"  # load_model changes it if it quantises the weights

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Classify: ids (B, T) padded on the right, lengths (B,) from 1 to T → logits (B, C)."""
        pooled = self.model(ids, lengths)  # (B, D)
        return self.score(pooled.to(self.score.weight.dtype))  # a head that trains is float32
