"""Parameters and bytes of fine-tuning a Llama, in closed form: no model is built.

LoRA at rank r trains r·(out + in) numbers beside a frozen weight of out·in, so it saves as long
as r·(out + in) < out·in (Hu et al. 2021, section 4.1). Training holds in memory:

    weights      frozen ones in the base's dtype or in NF4, trained ones in float32
    gradients    4 bytes for each trained parameter
    optimiser    8 bytes for each trained parameter: AdamW's two moments
    activations  what the forward pass saves for the backward pass

The method says what is trained: ``lora`` (A, B and the head), ``head`` (the head alone) or ``full``
(everything). ``bf16`` is autocast to bfloat16, on a bfloat16 base or, in full training, on float32
weights; ``fp32`` is float32 throughout. The formulas leave out what exists only briefly or outside
the model: the loss, gradients of activations, autocast's copies of trained weights (in full
training 2 more bytes for each weight), and the allocator's overhead.

    clinora budget config.json --rank 8 --targets q_proj v_proj

Shapes: B batch, T tokens, D width, H query heads, K key/value heads, E head width, I MLP width,
V vocabulary, C classes, L layers, r rank. N is a number of positions: B·T, or B in the last layer.
1 MB is 10⁶ bytes.
"""

from dataclasses import dataclass

from clinora.llama import LlamaConfig
from clinora.quantize import check_quantization, quantized_bytes

METHODS = ("lora", "head", "full")
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}  # a frozen weight, or an element in a matrix product
FLOAT32_BYTES = 4
MASTER_BYTES = FLOAT32_BYTES  # a trained weight, or its gradient
ADAMW_BYTES = 8  # the two moments of a trained weight
INDEX_BYTES = 8  # a token id or a position: int64


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuning:
    """What is trained, in which precision, and the shape of a batch.

    Attributes:
        method: "lora", "head" or "full".
        batch: B, notes in a batch.
        tokens: T, tokens of each note, padding included.
        precision: "bf16" or "fp32".
        rank: r, for "lora" only.
        targets: Names of the linear layers that LoRA adapts, for "lora" only. Its dropout is
            assumed to be on.
        quantize: "none", "nf4" or "nf4-double": how the weights of the decoder's linear layers are
            quantised; not for "full".

    Raises:
        ValueError: A value is unknown or out of its range, or "full" comes with quantised weights.
    """

    method: str
    batch: int
    tokens: int
    precision: str
    rank: int = 0
    targets: tuple[str, ...] = ()
    quantize: str = "none"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.precision not in ELEMENT_BYTES:
            known = ", ".join(ELEMENT_BYTES)
            raise ValueError(f"precision is {self.precision!r}: expected one of {known}")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: expected at least 1")
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}: expected at least 1")
        check_quantization(self.quantize)
        if self.full and self.quantize != "none":
            raise ValueError(
                "quantised weights cannot be trained: give quantize='none' with 'full'"
            )

    @property
    def full(self) -> bool:
        """Whether every parameter is trained."""
        return self.method == "full"

    @property
    def adapted(self) -> tuple[str, ...]:
        """The targets if the method is LoRA, otherwise none."""
        return self.targets if self.method == "lora" else ()

    @property
    def computed(self) -> int:
        """Bytes of an element that a matrix product reads or writes."""
        return ELEMENT_BYTES[self.precision]

    @property
    def residual(self) -> int:
        """Bytes of an element of the residual stream, which has the embedding's dtype."""
        return MASTER_BYTES if self.full else self.computed


# --- parameters ---------------------------------------------------------------------------------


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Give the names and shapes (out, in) of the seven linear layers of a decoder layer."""
    width = config.hidden_size
    inner = config.intermediate_size
    query_width = config.num_attention_heads * config.head_dim  # H·E
    key_width = config.num_key_value_heads * config.head_dim  # K·E
    return {
        "q_proj": (query_width, width),
        "k_proj": (key_width, width),
        "v_proj": (key_width, width),
        "o_proj": (width, query_width),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def base_parameters(config: LlamaConfig, num_labels: int | None) -> int:
    """Count parameters: V·D + L·(Σ out·in + 2·D) + D + head, with Σ over the seven linear layers.

    Args:
        config: The shape of the Llama.
        num_labels: C, for a head of C·D. None: the language-model head, V·D unless it is tied.

    Returns:
        The number of all parameters, biases included if the configuration has them.

    Raises:
        ValueError: ``num_labels`` is below 1.
    """
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"the number of labels is {num_labels}: expected at least 1")
    width = config.hidden_size
    embedding = config.vocab_size * width
    layer = 2 * width  # the weights of its two norms
    for name, (out_features, in_features) in linear_shapes(config).items():
        layer += out_features * in_features
        in_mlp = name in ("gate_proj", "up_proj", "down_proj")
        has_bias = config.mlp_bias if in_mlp else config.attention_bias
        if has_bias:
            layer += out_features
    if num_labels is not None:
        head = num_labels * width
    elif config.tie_word_embeddings:
        head = 0
    else:
        head = config.vocab_size * width
    return embedding + config.num_hidden_layers * layer + width + head


def break_even_rank(out_features: int, in_features: int) -> int:
    """Find the largest rank r at which LoRA trains fewer parameters than W has.

    It is the largest r with r·(out + in) < out·in.

    >>> break_even_rank(10_000, 20_000)
    6666
    """
    return (out_features * in_features - 1) // (out_features + in_features)


def _linear_bytes(weights: int, precision: str, quantize: str) -> int:
    """Count the bytes of the frozen weight of a decoder's linear layer."""
    if quantize == "none":
        return ELEMENT_BYTES[precision] * weights
    return quantized_bytes(weights, quantize)


def _held_bytes(frozen_bytes: int, trained: int) -> tuple[int, int, int]:
    """Count the bytes of weights, gradients and AdamW's moments."""
    return frozen_bytes + MASTER_BYTES * trained, MASTER_BYTES * trained, ADAMW_BYTES * trained


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted linear layer, in all decoder layers together.

    Attributes:
        name: Its name, such as "q_proj".
        out_features: out.
        in_features: in.
        layers: L, the number of decoder layers.
        rank: r.
    """

    name: str
    out_features: int
    in_features: int
    layers: int
    rank: int

    @property
    def full(self) -> int:
        """Parameters that full training trains here: L·out·in."""
        return self.layers * self.out_features * self.in_features

    @property
    def lora(self) -> int:
        """Parameters that LoRA trains here: L·r·(out + in)."""
        return self.layers * self.rank * (self.out_features + self.in_features)

    def held_bytes(
        self, method: str, precision: str, quantize: str = "none"
    ) -> tuple[int, int, int]:
        """Count the bytes of weights, gradients and AdamW's moments here, without biases."""
        if method == "full":
            return _held_bytes(0, self.full)
        each = self.out_features * self.in_features
        frozen_bytes = self.layers * _linear_bytes(each, precision, quantize)
        return _held_bytes(frozen_bytes, self.lora if method == "lora" else 0)

    @property
    def times_fewer(self) -> float:
        """How many times fewer parameters LoRA trains: out·in / (r·(out + in))."""
        return self.full / self.lora


def lora_targets(config: LlamaConfig, rank: int, targets: tuple[str, ...]) -> list[Target]:
    """List the layers that LoRA adapts; the sum of their ``lora`` is the parameters it trains.

    Raises:
        ValueError: There is no target, a target is not one of the seven linear layers, or the
            rank is below 1 or above the smaller side of one of them.
    """
    shapes = linear_shapes(config)
    if not targets:
        raise ValueError("targets is empty: name at least one linear layer to adapt")
    found = []
    for name in dict.fromkeys(targets):  # each name once
        if name not in shapes:
            known = ", ".join(shapes)
            raise ValueError(f"no layer is named {name!r}: expected one of {known}")
        out, width = shapes[name]
        largest = min(out, width)
        if not 1 <= rank <= largest:
            raise ValueError(f"rank {rank} does not fit {name} ({out} × {width}): 1 to {largest}")
        found.append(Target(name, out, width, config.num_hidden_layers, rank))
    return found


# --- saved activations: one function for each part ----------------------------------------------
# An operation saves only what it needs for the gradients that it passes on. ``live`` says whether
# the part's input needs a gradient. It does not if no parameter below the part is trained.


def saved_activation_bytes(config: LlamaConfig, tuning: FineTuning) -> int:
    """Count the bytes that a forward pass on (B, T) tokens saves for the backward pass.

    Each tensor counts once; parameters and autocast's copies of them do not count. As in
    ``LlamaForSequenceClassification``, the last layer computes one position of each row. bfloat16
    attention is counted as on a CPU; on a GPU, flash attention also saves its output.

    Raises:
        ValueError: As ``lora_targets``.
    """
    B = tuning.batch
    T = tuning.tokens
    D = config.hidden_size
    saved = tuning.computed * B * D  # the head's input
    if tuning.method == "head":  # no gradient reaches the decoder
        return saved
    if tuning.method == "lora":
        lora_targets(config, tuning.rank, tuning.targets)  # checks the rank and the targets
    last = config.num_hidden_layers - 1
    for layer in range(config.num_hidden_layers):
        live = tuning.full or layer > 0
        saved += _layer_bytes(config, tuning, live=live, last=layer == last)
    if last > 0 or tuning.full or "k_proj" in tuning.adapted:
        saved += _rotation_bytes(config, tuning, T)  # one table for all layers
    if tuning.full:
        saved += INDEX_BYTES * B * T  # the embedding's gradient needs the ids
    return saved + _norm_bytes(tuning, B, D, live=True)


def _layer_bytes(config: LlamaConfig, tuning: FineTuning, live: bool, last: bool) -> int:
    """Add up one decoder layer; the last one computes all keys and values, but one query a row."""
    B = tuning.batch
    T = tuning.tokens
    D = config.hidden_size
    N = B if last else B * T
    query_live = live or "q_proj" in tuning.adapted
    key_live = live or "k_proj" in tuning.adapted
    value_live = live or "v_proj" in tuning.adapted
    attended_live = query_live or key_live or value_live
    after_live = attended_live or "o_proj" in tuning.adapted  # x plus the output of attention

    saved = _norm_bytes(tuning, B * T, D, live)
    saved += _input_bytes(tuning, B * T, D, readers=2 if last else 3)
    if last and live:
        saved += _last_token_bytes(tuning, D)
    saved += _lora_bytes(config, tuning, "q_proj", N, live)
    saved += _lora_bytes(config, tuning, "k_proj", B * T, live)
    saved += _lora_bytes(config, tuning, "v_proj", B * T, live)
    if last and query_live:
        saved += _rotation_bytes(config, tuning, B)
    if attended_live:
        saved += _attention_bytes(config, tuning, last)
    saved += _lora_bytes(config, tuning, "o_proj", N, attended_live)
    saved += _norm_bytes(tuning, N, D, after_live)
    saved += _input_bytes(tuning, N, D, readers=2)
    saved += _mlp_bytes(config, tuning, N, after_live)
    return saved


def _norm_bytes(tuning: FineTuning, N: int, D: int, live: bool) -> int:
    """RMSNorm, w ⊙ (x·s) with s = 1/rms in float32.

    The gradient of x needs x and s. The gradient of w needs x·s.
    """
    if not live:
        return 0
    saved = tuning.residual * N * D + FLOAT32_BYTES * N
    if tuning.full:
        saved += FLOAT32_BYTES * N * D
    return saved


def _input_bytes(tuning: FineTuning, N: int, D: int, readers: int) -> int:
    """The input of linear layers: a trained W needs it for its gradient, a frozen W does not.

    Autocast makes a new copy of the float32 norm(x) for each layer that reads it.
    """
    if not tuning.full:
        return 0
    copies = readers if tuning.precision == "bf16" else 1
    return copies * tuning.computed * N * D


def _last_token_bytes(tuning: FineTuning, D: int) -> int:
    """The last layer selects one position of each row, from x and from norm(x).

    Each selection saves an index. It also saves the tensor that it selects from, unless another
    part does: the norm saves x, and a trained k_proj saves a float32 norm(x). A trained q_proj
    saves the selected positions.
    """
    B = tuning.batch
    T = tuning.tokens
    saved = 2 * INDEX_BYTES * B
    saved += _input_bytes(tuning, B, D, readers=1)
    if not tuning.full or tuning.precision == "bf16":
        saved += tuning.residual * B * T * D
    return saved


def _lora_bytes(config: LlamaConfig, tuning: FineTuning, name: str, N: int, live: bool) -> int:
    """LoRA, B·A·(m ⊙ x), where m is dropout's mask of one byte for each entry.

    The gradient of A needs m ⊙ x and s·B, that of B needs A·(m ⊙ x), and that of x needs m. Each
    adapted layer has its own mask.
    """
    if name not in tuning.adapted:
        return 0
    out, width = linear_shapes(config)[name]
    saved = tuning.computed * (N * width + N * tuning.rank + out * tuning.rank)
    if live:
        saved += (N * width // 8 + 1) * 8  # the mask is drawn 8 bytes at a time
    return saved


def _rotation_bytes(config: LlamaConfig, tuning: FineTuning, rows: int) -> int:
    """RoPE, x ⊙ cos + roll(x) ⊙ sin: the gradient of x needs cos and sin, each (rows, H, E)."""
    return 2 * tuning.residual * rows * config.num_attention_heads * config.head_dim


def _attention_bytes(config: LlamaConfig, tuning: FineTuning, last: bool) -> int:
    """Attention, softmax(q·kᵀ/√E)·v: q, k, v, the output and a float32 log-sum-exp.

    From the log-sum-exp of each query and head, flash attention computes the T × T scores again. A
    trained o_proj saves the same output. The last layer, with one query for each row, needs a mask.
    """
    B = tuning.batch
    T = tuning.tokens
    E = config.head_dim
    query_positions = B if last else B * T
    queries = query_positions * config.num_attention_heads  # vectors of width E
    keys = B * T * config.num_key_value_heads
    saved = tuning.computed * (2 * queries + 2 * keys) * E + FLOAT32_BYTES * queries
    if last:
        saved += tuning.computed * B * T
    return saved


def _mlp_bytes(config: LlamaConfig, tuning: FineTuning, N: int, live: bool) -> int:
    """The MLP, W_down(SiLU(g) ⊙ u) with g = W_gate x and u = W_up x.

    The gradient of g needs g and u, that of u needs g, and that of W_down needs the product.
    """
    gate_live = live or "gate_proj" in tuning.adapted
    up_live = live or "up_proj" in tuning.adapted
    product_live = gate_live or up_live
    tensors = 0  # of shape (N, I)
    if product_live:
        tensors += 2  # g and u
    if tuning.full:
        tensors += 1  # the product
    saved = tensors * tuning.computed * N * config.intermediate_size
    saved += _lora_bytes(config, tuning, "gate_proj", N, live)
    saved += _lora_bytes(config, tuning, "up_proj", N, live)
    saved += _lora_bytes(config, tuning, "down_proj", N, product_live)
    return saved


# --- the whole ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The parameters of one method of fine-tuning, and the bytes that they need in memory.

    Attributes:
        method: "lora", "head" or "full".
        parameters: All parameters, LoRA's included.
        trainable: The parameters that are trained.
        weights: Bytes of the weights.
        gradients: Bytes of the gradients.
        optimizer: Bytes of AdamW's moments.
        activations: Bytes saved for the backward pass.
    """

    method: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def budget(config: LlamaConfig, tuning: FineTuning, num_labels: int) -> Budget:
    """Add up parameters and bytes of fine-tuning a classifier.

    Raises:
        ValueError: As ``lora_targets``, or ``num_labels`` is below 1.
    """
    parameters = base_parameters(config, num_labels)
    trainable = parameters if tuning.full else num_labels * config.hidden_size
    if tuning.method == "lora":
        targets = lora_targets(config, tuning.rank, tuning.targets)
        adapter = sum(target.lora for target in targets)
        parameters += adapter
        trainable += adapter
    frozen_bytes = ELEMENT_BYTES[tuning.precision] * (parameters - trainable)
    if tuning.quantize != "none":
        for out_features, in_features in linear_shapes(config).values():
            each = out_features * in_features
            saved = _linear_bytes(each, tuning.precision, "none")
            saved -= _linear_bytes(each, tuning.precision, tuning.quantize)
            frozen_bytes -= config.num_hidden_layers * saved
    weights, gradients, optimizer = _held_bytes(frozen_bytes, trainable)
    return Budget(
        method=tuning.method,
        parameters=parameters,
        trainable=trainable,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=saved_activation_bytes(config, tuning),
    )


if __name__ == "__main__":
    import sys

    from clinora.commands.budget import main

    sys.exit(main(prog="python -m clinora.budget"))
