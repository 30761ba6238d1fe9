"""Parameters and bytes of fine-tuning a Llama, in closed form: no weights, no model, no torch.

LoRA at rank r trains r·(out + in) numbers beside a frozen weight of out·in, so it saves as long
as r·(out + in) < out·in (Hu et al. 2021, section 4.1). What training holds in memory:

    weights      frozen ones in the base's dtype, trained ones in float32
    gradients    4 bytes a trained parameter
    optimiser    8 bytes a trained parameter: AdamW's two moments
    activations  what the forward pass saves for the backward pass

Three methods share the formulas: ``lora`` (A, B and the head), ``head`` (the head alone) and
``full`` (everything). ``bf16`` is autocast to bfloat16, on a bfloat16 base or, in full training,
on float32 weights; ``fp32`` is float32 throughout. Left out is what lives for a moment or outside
the model: the loss, a gradient on its way, autocast's copies of trained weights (in full training
2 more bytes a weight), the allocator's slack.

    python -m clinora.budget config.json --rank 8 --targets q_proj v_proj

Shapes: B batch, T tokens, D width, H query heads, K key/value heads, E head width, I MLP width,
V vocabulary, C classes, L layers, r rank; N is a number of positions, B·T or in the last layer B.
``config`` is any object with the Hub's field names, such as a ``LlamaConfig``. 1 MB is 10⁶ bytes.
"""

import argparse
from dataclasses import dataclass
from typing import Any

METHODS = ("lora", "head", "full")
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}  # of a frozen weight, and of what a product computes
MASTER_BYTES = 4  # of a trained weight, and of its gradient: float32 always
ADAMW_BYTES = 8  # of a trained weight's two moments
TILED_FROM = 48  # tokens: from here a CPU computes bfloat16 attention in tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuning:
    """What is trained, in which precision, on batches of which shape.

    Attributes:
        method: "lora", "head" or "full".
        batch: B, notes in a batch.
        tokens: T, tokens a note, padding included.
        precision: "bf16" or "fp32".
        rank: r, for "lora" alone.
        targets: Names of the linear layers that LoRA adapts, for "lora" alone. Its dropout is
            taken to be on.

    Raises:
        ValueError: A value is unknown or out of its range.
    """

    method: str
    batch: int
    tokens: int
    precision: str
    rank: int = 0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, known in {"method": METHODS, "precision": tuple(ELEMENT_BYTES)}.items():
            if (came := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {came!r}: expected one of {', '.join(known)}")
        for name in ("batch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")

    @property
    def full(self) -> bool:
        """Whether every parameter is trained."""
        return self.method == "full"

    @property
    def adapted(self) -> tuple[str, ...]:
        """The targets, or none where LoRA is not the method."""
        return self.targets if self.method == "lora" else ()

    @property
    def computed(self) -> int:
        """Bytes of an element that a matrix product reads or writes."""
        return ELEMENT_BYTES[self.precision]

    @property
    def residual(self) -> int:
        """Bytes of an element of the residual stream, which keeps the embedding's dtype."""
        return MASTER_BYTES if self.full else self.computed


# --- parameters ---------------------------------------------------------------------------------


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Name the seven linear layers of a decoder layer and give their shapes (out, in)."""
    D, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim  # H·E
    keys = config.num_key_value_heads * config.head_dim  # K·E
    qkv = {"q_proj": (queries, D), "k_proj": (keys, D), "v_proj": (keys, D)}
    mlp = {"gate_proj": (inner, D), "up_proj": (inner, D), "down_proj": (D, inner)}
    return qkv | {"o_proj": (D, queries)} | mlp


def base_parameters(config: Any, num_labels: int | None) -> int:
    """Count a Llama: V·D + L·(Σ out·in + 2·D) + D + head, with Σ over the seven linear layers.

    Args:
        config: The shape of the Llama.
        num_labels: C, for a head of C·D; None: the language model's, V·D unless it is tied.

    Returns:
        All parameters, biases included where the configuration asks for them.

    Raises:
        ValueError: ``num_labels`` is below 1.
    """
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"the number of labels is {num_labels}: expected at least 1")
    D, V = config.hidden_size, config.vocab_size
    layer = 2 * D  # the weights of its two norms
    for name, (out, width) in linear_shapes(config).items():
        mlp = name in ("gate_proj", "up_proj", "down_proj")
        biased = config.mlp_bias if mlp else config.attention_bias
        layer += out * width + out * biased
    rows = num_labels if num_labels is not None else 0 if config.tie_word_embeddings else V
    return V * D + config.num_hidden_layers * layer + D + rows * D


def break_even_rank(out_features: int, in_features: int) -> int:
    """Find the largest r with r·(out + in) < out·in: above it LoRA trains no less than W has.

    >>> break_even_rank(10_000, 20_000)
    6666
    """
    return (out_features * in_features - 1) // (out_features + in_features)


def _held_bytes(frozen: int, trained: int, precision: str) -> tuple[int, int, int]:
    """Bytes of the weights, of the gradients and of AdamW's moments."""
    weights = ELEMENT_BYTES[precision] * frozen + MASTER_BYTES * trained
    return weights, MASTER_BYTES * trained, ADAMW_BYTES * trained


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted linear layer, in all decoder layers together.

    Attributes:
        name: Its name, such as "q_proj".
        out_features: out.
        in_features: in.
        layers: L, how many there are.
        rank: r.
    """

    name: str
    out_features: int
    in_features: int
    layers: int
    rank: int

    @property
    def full(self) -> int:
        """What full training trains here: L·out·in."""
        return self.layers * self.out_features * self.in_features

    @property
    def lora(self) -> int:
        """What LoRA trains here: L·r·(out + in)."""
        return self.layers * self.rank * (self.out_features + self.in_features)

    def held_bytes(self, method: str, precision: str) -> tuple[int, int, int]:
        """Bytes of weights, gradients and AdamW's moments here, a base's biases aside."""
        trained = {"lora": self.lora, "head": 0, "full": self.full}[method]
        return _held_bytes(0 if method == "full" else self.full, trained, precision)

    @property
    def times_fewer(self) -> float:
        """By how much LoRA trains less: out·in / (r·(out + in))."""
        return self.full / self.lora


def lora_targets(config: Any, rank: int, targets: tuple[str, ...]) -> list[Target]:
    """Look up what LoRA adapts; the sum of their ``lora`` is what it trains.

    Raises:
        ValueError: There is no target, a target is not one of the seven linear layers, or the
            rank is below 1 or above the smaller side of one of them.
    """
    shapes = linear_shapes(config)
    if not targets:
        raise ValueError("targets is empty: name at least one linear layer to adapt")
    found = []
    for name in dict.fromkeys(targets):
        if name not in shapes:
            raise ValueError(f"no layer is named {name!r}; there are: {', '.join(shapes)}")
        out, width = shapes[name]
        most = min(out, width)
        if not 1 <= rank <= most:
            raise ValueError(f"rank {rank} does not fit {name}, {out} × {width}: 1 to {most} does")
        found.append(Target(name, out, width, config.num_hidden_layers, rank))
    return found


# --- saved activations: one function a part -----------------------------------------------------
# An operation saves only what the gradients that it passes on need. ``live`` says whether the
# part's input carries a gradient: it does not below the first trained parameter.


def saved_activation_bytes(config: Any, tuning: FineTuning) -> int:
    """Count the bytes that a forward pass on (B, T) tokens saves for the backward pass.

    Each tensor counts once, parameters and autocast's copies of them not at all. As in
    ``LlamaForSequenceClassification``, the last layer asks for one position a row. In
    bfloat16, attention is the CPU's; flash attention on a GPU keeps its output, too.

    Raises:
        ValueError: As ``lora_targets``.
    """
    if tuning.method == "lora":
        lora_targets(config, tuning.rank, tuning.targets)  # for its checks alone
    B, T, D, L = tuning.batch, tuning.tokens, config.hidden_size, config.num_hidden_layers
    above = tuning.method != "head"  # whether a gradient comes down as far as the second layer
    saved = sum(
        _layer_bytes(config, tuning, live=above if layer else tuning.full, last=layer == L - 1)
        for layer in range(L if above else 0)
    )
    if above and (L > 1 or tuning.full or "k_proj" in tuning.adapted):
        saved += _rotation_bytes(config, tuning, T)  # one table for all layers
    saved += 8 * B * T if tuning.full else 0  # the embedding's gradient needs the ids, int64
    return saved + _norm_bytes(tuning, B, D, above) + tuning.computed * B * D  # the head's input


def _layer_bytes(config: Any, tuning: FineTuning, live: bool, last: bool) -> int:
    """Add up a decoder layer; the last one has keys and values everywhere, the rest once a row."""
    B, T, D = tuning.batch, tuning.tokens, config.hidden_size
    N = B if last else B * T
    q, k, v, o = (live or f"{name}_proj" in tuning.adapted for name in "qkvo")
    attended = q or k or v
    after = attended or o  # whether x carries a gradient once attention is added
    return (
        _norm_bytes(tuning, B * T, D, live)
        + _input_bytes(tuning, B * T, D, readers=2 if last else 3)
        + (_last_token_bytes(tuning, D) if last and live else 0)
        + _lora_bytes(config, tuning, "q_proj", N, live)
        + _lora_bytes(config, tuning, "k_proj", B * T, live)
        + _lora_bytes(config, tuning, "v_proj", B * T, live)
        + (_rotation_bytes(config, tuning, B) if q and last else 0)
        + (_attention_bytes(config, tuning, last) if attended else 0)
        + _lora_bytes(config, tuning, "o_proj", N, attended)
        + _norm_bytes(tuning, N, D, after)
        + _input_bytes(tuning, N, D, readers=2)
        + _mlp_bytes(config, tuning, N, after)
    )


def _norm_bytes(tuning: FineTuning, N: int, D: int, live: bool) -> int:
    """RMSNorm, w ⊙ (x·s) with s = 1/rms, float32: x's gradient needs x and s, w's x·s."""
    trained = 4 * N * D if tuning.full else 0
    return tuning.residual * N * D + 4 * N + trained if live else 0


def _input_bytes(tuning: FineTuning, N: int, D: int, readers: int) -> int:
    """A trained W's gradient needs the input; a frozen W needs none, as x's gradient is Wᵀ·dy.

    Autocast casts the float32 norm(x) anew for each layer that reads it.
    """
    copies = readers if tuning.precision == "bf16" else 1
    return copies * tuning.computed * N * D if tuning.full else 0


def _last_token_bytes(tuning: FineTuning, D: int) -> int:
    """The last layer gathers a position a row from x and norm(x): each keeps its input and index.

    That costs nothing where another part keeps the same tensor: the norm x, the trained k_proj a
    float32 norm(x). A trained q_proj keeps what was gathered.
    """
    kept = not tuning.full or tuning.precision == "bf16"
    gathered = kept * tuning.residual * tuning.batch * tuning.tokens * D
    return gathered + 2 * 8 * tuning.batch + _input_bytes(tuning, tuning.batch, D, readers=1)


def _lora_bytes(config: Any, tuning: FineTuning, name: str, N: int, live: bool) -> int:
    """LoRA, B·A·(m ⊙ x): A's gradient needs m ⊙ x, B's A·(m ⊙ x), and x's the mask m.

    Each adapted layer drops out for itself, with a mask of a byte an entry.
    """
    if name not in tuning.adapted:
        return 0
    _, width = linear_shapes(config)[name]
    mask = (N * width // 8 + 1) * 8 if live else 0  # drawn 8 bytes at a time
    return tuning.computed * (N * width + N * tuning.rank) + mask


def _rotation_bytes(config: Any, tuning: FineTuning, rows: int) -> int:
    """RoPE, x ⊙ cos + turned(x) ⊙ sin: x's gradient needs cos and sin, (rows, E) each."""
    return 2 * tuning.residual * rows * config.head_dim


def _attention_bytes(config: Any, tuning: FineTuning, last: bool) -> int:
    """Attention, softmax(q·kᵀ/√E)·v: q, k, v, the output, and a log-sum-exp.

    From a float32 log-sum-exp for each query and head, flash attention computes the T × T scores
    again. A CPU computes a bfloat16 model's in tiles, from q, k and v alone (in full training the
    rotary angles are float32, and so are q and k). A trained o_proj keeps the same output. The
    last layer's single queries need a mask.
    """
    B, T, E = tuning.batch, tuning.tokens, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    queries, keys = B * H * (1 if last else T), B * K * T
    if tuning.residual == 2 and T >= TILED_FROM and not last:
        return tuning.computed * (queries + 2 * keys) * E
    mask = B * T if last else 0
    return tuning.computed * ((2 * queries + 2 * keys) * E + mask) + 4 * queries


def _mlp_bytes(config: Any, tuning: FineTuning, N: int, live: bool) -> int:
    """The MLP, W_down(SiLU(g) ⊙ u) with g = W_gate x and u = W_up x.

    g's gradient needs g and u, u's needs g, and W_down's needs the product.
    """
    gate, up = (live or name in tuning.adapted for name in ("gate_proj", "up_proj"))
    kept = 2 * (gate or up) + tuning.full
    return (
        kept * tuning.computed * N * config.intermediate_size
        + _lora_bytes(config, tuning, "gate_proj", N, live)
        + _lora_bytes(config, tuning, "up_proj", N, live)
        + _lora_bytes(config, tuning, "down_proj", N, gate or up)
    )


# --- the whole ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What one way of fine-tuning holds in memory, in parameters and bytes.

    Attributes:
        method: "lora", "head" or "full".
        parameters: All of them, LoRA's included.
        trainable: Those that are trained.
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


def budget(config: Any, tuning: FineTuning, num_labels: int) -> Budget:
    """Add up parameters and bytes of fine-tuning a classifier.

    Raises:
        ValueError: As ``lora_targets``, or ``num_labels`` is below 1.
    """
    parameters = base_parameters(config, num_labels)
    trainable = parameters if tuning.full else num_labels * config.hidden_size
    if tuning.method == "lora":
        lora = sum(t.lora for t in lora_targets(config, tuning.rank, tuning.targets))
        parameters, trainable = parameters + lora, trainable + lora
    frozen = parameters - trainable
    weights, gradients, optimizer = _held_bytes(frozen, trainable, tuning.precision)
    return Budget(
        method=tuning.method,
        parameters=parameters,
        trainable=trainable,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=saved_activation_bytes(config, tuning),
    )


def main(argv: list[str] | None = None) -> None:
    """Print the budget of a model as tables: ``python -m clinora.budget --help``."""
    from clinora.checkpoint import find_config
    from clinora.llama import LlamaConfig
    from clinora.lora import LoRAConfig

    lora = LoRAConfig()  # for its defaults
    parser = argparse.ArgumentParser(
        prog="python -m clinora.budget",
        description="Parameters and bytes of fine-tuning a Llama, without loading it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("source", help="a config.json, a folder that has one, or a Hub id")
    add("--revision", help="revision of the Hub id")
    add("--rank", type=int, default=lora.rank, help="LoRA's rank")
    add("--targets", nargs="+", default=lora.targets, help="linear layers that LoRA adapts")
    add("--labels", type=int, default=5, help="classes of the head")
    add("--batch", type=int, default=4, help="notes in a batch")
    add("--tokens", type=int, default=512, help="tokens a note")
    add("--precision", choices=ELEMENT_BYTES, default="bf16", help="precision to train in")
    flags = parser.parse_args(argv)
    adapter = {"rank": flags.rank, "targets": tuple(flags.targets)}
    batches = {"batch": flags.batch, "tokens": flags.tokens, "precision": flags.precision}
    try:
        config = LlamaConfig.from_json(find_config(flags.source, flags.revision))
        targets = lora_targets(config, **adapter)
        tunings = [FineTuning(method=method, **adapter, **batches) for method in METHODS]
        budgets = [budget(config, tuning, flags.labels) for tuning in tunings]
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    shape = f"{flags.batch} × {flags.tokens} tokens, {flags.labels} classes, {flags.precision}"
    print(_target_table(targets), _bytes_table(targets, flags.precision), sep="\n\n")
    print(f"\n{shape}; MB:", _budget_table(budgets), sep="\n")


def _target_table(targets: list[Target]) -> str:
    lora = f"LoRA r={targets[0].rank}"
    rows = [("target", "out × in", "layers", "full", lora, "times fewer", "saves up to r")]
    for t in targets:
        out, width = t.out_features, t.in_features
        counts = f"{t.layers}", f"{t.full:,}", f"{t.lora:,}", f"{t.times_fewer:,.1f}"
        rows.append((t.name, f"{out:,} × {width:,}", *counts, f"{break_even_rank(out, width):,}"))
    full, lora = sum(t.full for t in targets), sum(t.lora for t in targets)
    rows.append(("all", "", "", f"{full:,}", f"{lora:,}", f"{full / lora:,.1f}", ""))
    return _table(rows)


def _bytes_table(targets: list[Target], precision: str) -> str:
    held = ("weights", "gradients", "AdamW")
    rows = [(f"MB, {precision}", *(f"{m} {what}" for m in ("LoRA", "full") for what in held))]
    sizes = {t.name: [*t.held_bytes("lora", precision), *t.held_bytes("full", precision)]
             for t in targets}  # fmt: skip
    sizes["all"] = [sum(column) for column in zip(*sizes.values(), strict=True)]
    rows += [(name, *(f"{size / 1e6:,.1f}" for size in row)) for name, row in sizes.items()]
    return _table(rows)


def _budget_table(budgets: list[Budget]) -> str:
    rows = [("", "trainable", "share", "weights", "gradients", "AdamW", "activations", "total")]
    for b in budgets:
        sizes = b.weights, b.gradients, b.optimizer, b.activations, b.total
        counts = f"{b.trainable:,}", f"{b.trainable / b.parameters:.3%}"
        rows.append((b.method, *counts, *(f"{size / 1e6:,.1f}" for size in sizes)))
    return _table(rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


if __name__ == "__main__":
    main()
