"""The decoder against Transformers, float64 formulas and its own promises."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.func import functional_call, grad

from clinora.llama import (
    DecoderLayer,
    Llama,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RMSNorm,
    RopeScaling,
    last_token,
    rotary_angles,
    rotate,
    scale_frequencies,
)
from clinora.lora import LoRAConfig, apply_lora

LLAMA3 = {  # a config's values for θ = 500 and heads of 8: one pair is kept, one mixed, two slowed
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 24,
}
SHAPES = {
    "grouped": {},
    "ungrouped": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "head_dim": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "one layer": {"num_hidden_layers": 1},
}
# An eighth of each width, a 32nd of the positions, a 64th of the vocabulary, fewer layers.
FAMILY = {
    "TinyLlama-1.1B": {
        "hidden_size": 256, "intermediate_size": 704, "vocab_size": 500,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 64,
    },
    "Llama-2-7B": {
        "hidden_size": 512, "intermediate_size": 1376, "vocab_size": 500,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 128,
    },
    "Llama-3.2-1B": {
        "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2004, "head_dim": 8,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
        },
    },
    "SmolLM2-135M": {
        "hidden_size": 72, "intermediate_size": 192, "vocab_size": 768,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "SmolLM2-360M": {
        "hidden_size": 120, "intermediate_size": 320, "vocab_size": 768,
        "num_attention_heads": 15, "num_key_value_heads": 5, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
}  # fmt: skip
LENGTHS = (13, 1, 29, 7)  # odd ones, a single token, a row without padding
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytestmark = pytest.mark.usefixtures("one_thread")

any_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def small(**changes) -> LlamaConfig:
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**shape | changes)


def exact_hidden_states(
    weights: dict[str, torch.Tensor], config: transformers.LlamaConfig, ids: torch.Tensor
) -> torch.Tensor:
    """Llama's equations, each in float64: RoPE by complex numbers, attention with a full mask."""
    width, heads = config.head_dim, config.num_attention_heads
    rope = config.rope_parameters

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        rms = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return x / rms * weights[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def split(x: torch.Tensor) -> torch.Tensor:  # (B, T, heads·E) → (B, H, T, E)
        x = x.unflatten(-1, (-1, width)).transpose(1, 2)
        return x.repeat_interleave(heads // x.size(1), dim=1)

    x = weights["embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        h, attn = norm(x, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn"
        q, k, v = (split(linear(h, f"{attn}.{name}_proj")) for name in "qkv")
        out = exact_attention(turn(q, rope), turn(k, rope), v).transpose(1, 2).flatten(2)
        x = x + linear(out, f"{attn}.o_proj")
        h, mlp = norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp"
        gate = linear(h, f"{mlp}.gate_proj")
        h = gate / (1 + torch.exp(-gate)) * linear(h, f"{mlp}.up_proj")
        x = x + linear(h, f"{mlp}.down_proj")
    return norm(x, "norm")


def in_float64(theirs: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    weights = {name: p.detach().double() for name, p in theirs.model.named_parameters()}
    return exact_hidden_states(weights, theirs.config, ids)


def exact_frequencies(width: int, rope: dict) -> torch.Tensor:
    """Radians per token of each pair, in float64; the cases of "llama3" one by one."""
    frequencies = []
    for i in range(0, width, 2):
        f = rope["rope_theta"] ** (-i / width)
        if rope["rope_type"] == "llama3":
            wavelength = 2 * math.pi / f
            original = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > original / low:
                f = f / rope["factor"]
            elif wavelength >= original / high:
                s = (original / wavelength - low) / (high - low)
                f = f * ((1 - s) / rope["factor"] + s)
        frequencies.append(f)
    return torch.tensor(frequencies, dtype=torch.float64)


def turn(x: torch.Tensor, rope: dict) -> torch.Tensor:
    """Multiply each pair, as a complex number, by e^{i m θ_j} (Su et al. 2021, equation 12)."""
    half = x.size(-1) // 2
    frequency = exact_frequencies(x.size(-1), rope)
    angle = torch.arange(x.size(-2), dtype=torch.float64)[:, None] * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), -1)


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention written out, one key head to each query head."""
    scores = torch.einsum("bhte,bhse->bhts", q, k) / math.sqrt(q.size(-1))
    weights = scores.exp() * torch.ones(scores.shape[-2:], dtype=q.dtype).tril()
    return torch.einsum("bhts,bhse->bhte", weights / weights.sum(-1, keepdim=True), v)


def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.size(1))


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# Against Transformers


@any_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_equal_transformers_to_the_bit(twins, notes, shape, dtype):
    ours, theirs = twins(dtype=dtype, **shape)
    for tokens in (1, 2, 7, 33):
        ids, _ = notes((tokens, tokens, tokens))
        with torch.no_grad():
            assert torch.equal(ours.model(ids), theirs.model(ids).last_hidden_state), tokens


@any_shape
@pytest.mark.parametrize("tied", [False, True])
def test_language_model_logits_equal_transformers_to_the_bit(twins, notes, shape, tied):
    ours, theirs = twins(num_labels=None, tie_word_embeddings=tied, **shape)
    ids, _ = notes((17, 17))
    with torch.no_grad():
        assert torch.equal(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("name", FAMILY)
def test_each_model_of_the_family_equals_transformers_to_the_bit(twins, notes, name):
    shape = FAMILY[name]
    rope = shape.get("rope_parameters", {})
    tokens = rope.get("original_max_position_embeddings", 0) + 70
    ours, theirs = twins(num_labels=None, **shape)
    ids, _ = notes((tokens, tokens), vocab_size=shape["vocab_size"])
    with torch.no_grad():
        assert torch.equal(ours.model(ids), theirs.model(ids).last_hidden_state)
        assert torch.equal(ours(ids), theirs(ids).logits)


@any_shape
def test_classifying_every_position_equals_transformers_to_the_bit(twins, notes, shape):
    ours, theirs = twins(**shape)
    ids, lengths = notes(LENGTHS)
    with torch.no_grad():
        logits = ours.score(ours.model(ids))[torch.arange(len(ids)), lengths - 1]
        assert torch.equal(logits, theirs(ids).logits)


@any_shape
def test_classification_is_that_of_transformers(twins, notes, difference, shape):
    ours, theirs = twins(**shape)
    ids, lengths = notes(LENGTHS)
    with torch.no_grad():
        assert difference(ours(ids, lengths), theirs(ids).logits) <= 1e-6


def test_attention_mask_of_transformers_is_not_needed(twins, notes, difference):
    ours, theirs = twins()
    ids, lengths = notes(LENGTHS)
    mask = (ids != 0).long()
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask).logits
        assert difference(ours(ids, lengths), logits) <= 2e-6


@any_shape
def test_float32_follows_the_equations_in_float64(twins, notes, difference, shape):
    ours, theirs = twins(**shape)
    ids, _ = notes((33, 33))
    with torch.no_grad():
        assert difference(ours.model(ids), in_float64(theirs, ids)) <= 2e-6


@pytest.mark.parametrize("lengths", [LENGTHS * 3, (200, 130, 65, 48)], ids=["short", "tiled"])
@any_shape
def test_bfloat16_is_as_exact_as_transformers(twins, notes, shape, lengths):
    ours, theirs = twins(dtype=torch.bfloat16, **shape)
    ids, lengths = notes(lengths)
    last = torch.arange(len(ids)), lengths - 1
    with torch.no_grad():
        exact = in_float64(theirs, ids)
        bound = 1.2 * rms(theirs.model(ids).last_hidden_state[last] - exact[last])
        assert 0 < bound < 0.05 * rms(exact)  # else the bound would hold for anything
        assert rms(ours.model(ids)[last] - exact[last]) <= bound
        assert rms(ours.model(ids, lengths) - exact[last]) <= bound


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LINEARS], ids=["q and v", "all seven"])
@pytest.mark.parametrize(
    "shape", [*SHAPES.values(), {"tie_word_embeddings": True}], ids=[*SHAPES, "tied"]
)
def test_gradients_are_those_of_peft(adapted_twins, notes, shape, targets):
    """Within 1e-6, at gradients of up to 0.7; 4e-7 was seen over four seeds.

    Relative to a parameter's own largest gradient, the last-token path is up to 2e-6 away: where
    gradients cancel, both are some 5e-6 of that from float64 (see below).
    """
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, targets=targets)
    ours, theirs, pairs = adapted_twins(lora, **shape)
    ids, lengths = notes(LENGTHS * 4)
    cross_entropy(theirs(ids).logits).backward()
    assert all(p.grad.abs().max() > 1e-3 for p in pairs.values())  # else it would show nothing

    full = ours.score(ours.model(ids))[torch.arange(len(ids)), lengths - 1]
    for logits in (full, ours(ids, lengths)):
        ours.zero_grad()
        cross_entropy(logits).backward()
        for name, parameter in ours.named_parameters():
            assert (parameter.grad is not None) == (name in pairs), name
            if name in pairs:
                assert (parameter.grad - pairs[name].grad).abs().max() <= 1e-6, name


def test_gradients_are_those_of_float64(adapted_twins, notes, difference):
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, targets=LINEARS)
    ours, theirs, pairs = adapted_twins(lora)
    ids, lengths = notes(LENGTHS)
    trained = {name: p.detach().double().requires_grad_() for name, p in pairs.items()}
    weights = {name: p.detach().double() for name, p in ours.model.named_parameters()}
    for name in [n.removesuffix(".lora_A") for n in trained if n.endswith("lora_A")]:
        update = 2.0 * trained[f"{name}.lora_B"] @ trained[f"{name}.lora_A"]  # alpha 8 / rank 4
        weights[name.removeprefix("model.") + ".weight"] += update
    pooled = exact_hidden_states(weights, theirs.config, ids)[torch.arange(len(ids)), lengths - 1]
    cross_entropy(pooled @ trained["score.weight"].T).backward()
    cross_entropy(ours(ids, lengths)).backward()
    for name, parameter in ours.named_parameters():
        if name in pairs:
            assert difference(parameter.grad, trained[name].grad) <= 2e-5, name


def test_state_dict_has_the_names_of_the_hub(twins):
    for shape in ({}, SHAPES["biases"]):
        ours, theirs = twins(**shape)
        assert ours.state_dict().keys() == theirs.state_dict().keys()


# Batches and the last real token


@any_shape
def test_a_note_alone_and_in_a_batch_agree(twins, notes, difference, shape):
    ours, _ = twins(**shape)
    ids, lengths = notes(LENGTHS)
    with torch.no_grad():
        alone = [ours(row[None, :n], n[None]) for row, n in zip(ids, lengths.unbind(), strict=True)]
        assert difference(ours(ids, lengths), torch.cat(alone)) <= 2e-6


@any_shape
def test_last_token_path_gives_what_the_full_path_gives(twins, notes, difference, shape):
    ours, _ = twins(**shape)
    ids, lengths = notes(LENGTHS)
    with torch.no_grad():
        full = ours.model(ids)[torch.arange(len(ids)), lengths - 1]
        assert difference(ours.model(ids, lengths), full) <= 1e-6


def test_any_id_may_pad(twins, notes):
    ours, _ = twins()
    ids, lengths = notes(LENGTHS)
    other = torch.where(torch.arange(ids.size(1)) < lengths[:, None], ids, 42)
    with torch.no_grad():
        assert torch.equal(ours(ids, lengths), ours(other, lengths))


def test_a_real_pad_token_at_the_end_counts(twins, notes):
    """Transformers pools by id, and skips a real last token that equals the padding."""
    ours, _ = twins()
    ids, _ = notes((9,))
    ids[0, -1] = 0
    with torch.no_grad():
        logits = ours(ids, torch.tensor([9]))
        assert torch.allclose(logits[0], ours.score(ours.model(ids))[0, -1], atol=1e-6)
        assert not torch.allclose(logits, ours(ids, torch.tensor([8])), atol=1e-3)


@pytest.mark.parametrize("lengths", [[7], [7, 7], [[7], [7], [7]], 7])
def test_as_many_lengths_as_rows_or_an_error(notes, lengths):
    """A single one was taken for every row's."""
    ids, _ = notes((7, 7, 7))
    with pytest.raises(ValueError, match=r"lengths .*\[3, 7\]"):
        Llama(small())(ids, torch.tensor(lengths))


@pytest.mark.parametrize("length", [0, -1, 8])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_length_outside_the_batch_raises(notes, length, layers):
    model = Llama(small(num_hidden_layers=layers))
    ids, _ = notes((7, 7))
    with pytest.raises(RuntimeError, match=r"out of bounds"):
        model(ids, torch.tensor([7, length]))


def test_last_token_picks_rows_by_their_lengths():
    x = torch.arange(12.0).reshape(2, 3, 2)
    picked = last_token(x, torch.tensor([1, 3]))
    assert picked.tolist() == [[[0.0, 1.0]], [[10.0, 11.0]]]


@pytest.mark.parametrize("t", [0, 5, 15])
def test_a_later_token_changes_nothing_before_it(twins, notes, t):
    ours, _ = twins()
    ids, _ = notes((16, 16))
    changed = ids.clone()
    changed[0, t] = 3 + (ids[0, t] - 2) % 94
    with torch.no_grad():
        before, after = ours.model(ids), ours.model(changed)
    same = (before == after).all(-1)
    assert same[1].all() and same[0, :t].all()
    assert not same[0, t:].any()


# What is put around a layer applies to the last-token path, too


def test_hooks_of_every_part_see_the_last_token_path(twins, notes):
    ours, _ = twins()
    seen = []
    parts = (ours.model.layers[-1], ours.model.layers[-1].self_attn, ours.model.layers[-1].mlp)
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: seen.append((module, output)))
    ours(*notes(LENGTHS))
    assert {module for module, _ in seen} == set(parts)
    assert {output.shape for _, output in seen} == {(len(LENGTHS), 1, 64)}


def test_pytorchs_checkpoint_wrapper_changes_no_gradient(adapted_twins, notes):
    ours, _, pairs = adapted_twins(LoRAConfig(rank=4, dropout=0.0))
    ids, lengths = notes(LENGTHS)
    ours(ids, lengths).square().sum().backward()
    plain = [p.grad.clone() for n, p in ours.named_parameters() if n in pairs]
    ours.zero_grad()
    apply_activation_checkpointing(ours, check_fn=lambda part: isinstance(part, DecoderLayer))
    passes = []
    for layer in ours.model.layers:
        layer.register_forward_pre_hook(lambda module, _: passes.append(module))
        layer.self_attn.register_forward_pre_hook(lambda module, _: passes.append(module))
    ours(ids, lengths).square().sum().backward()
    wrapped = [p.grad for p in ours.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(plain, wrapped, strict=True))
    assert [passes.count(layer.self_attn) for layer in ours.model.layers] == [2, 2, 2]


def test_a_compiled_last_layer_computes_what_the_plain_one_does(twins, notes, difference):
    ours, _ = twins()
    ids, lengths = notes(LENGTHS)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        plain = ours(ids, lengths)
        torch.compiler.reset()
        ours.model.layers[-1].compile(backend=backend, fullgraph=True)
        assert difference(ours(ids, lengths), plain) <= 1e-6
    assert len(graphs) == 1


# PyTorch's transforms


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def adapted(twins, fill_b):
    """Make a model with LoRA whose B is not zero."""

    def make(dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = LINEARS, layers=2):
        ours, _ = twins(dtype=dtype, num_hidden_layers=layers)
        ours.score.float()
        apply_lora(ours, LoRAConfig(rank=2, dropout=0.0, targets=targets))
        return fill_b(ours)

    return make


# In bfloat16 the sum over tokens rounds in another order, and attention's backward pass goes
# through tiles.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=str
)
def test_gradients_of_each_note_sum_to_the_batchs(adapted, notes, difference, dtype, tolerance):
    model = adapted(dtype)
    ids, lengths = notes((60, 1, 49, 7))
    labels = torch.tensor([0, 1, 2, 3])

    def loss(parameters, ids, length, label):
        logits = functional_call(model, parameters, (ids[None], length[None]))
        return nn.functional.cross_entropy(logits, label[None])

    parameters = {name: p.detach() for name, p in trained(model).items()}
    each = torch.vmap(grad(loss), (None, 0, 0, 0))(parameters, ids, lengths, labels)
    nn.functional.cross_entropy(model(ids, lengths), labels, reduction="sum").backward()
    for name, parameter in trained(model).items():
        assert each[name].shape == (4, *parameter.shape)
        assert difference(each[name].sum(0), parameter.grad) <= tolerance, name


def test_torch_func_grad_is_the_gradient_of_backward(adapted, notes, difference):
    model = adapted()
    batch = notes(LENGTHS)
    parameters = {name: p.detach() for name, p in trained(model).items()}
    found = grad(lambda p: functional_call(model, p, batch).square().sum())(parameters)
    model(*batch).square().sum().backward()
    for name, parameter in trained(model).items():
        assert difference(found[name], parameter.grad) <= 1e-5, name


def compiled_step_follows_the_plain_one(model, notes, difference, backend, autocast, tolerance):
    """Compile forward and loss as one graph, run its backward pass, and compare gradients."""
    ids, lengths = notes((60, 1, 49, 7))

    def loss(ids, lengths):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(ids, lengths)
        return cross_entropy(logits.float())

    results = []
    torch.compiler.reset()
    for step in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        model.zero_grad()
        value = step(ids, lengths)
        value.backward()
        results.append([value, *(p.grad for p in trained(model).values())])
    for plain, compiled in zip(*results, strict=True):
        assert plain.any() and difference(compiled, plain) <= tolerance


@pytest.mark.parametrize(
    "dtype, autocast, tolerance",
    [(torch.float32, False, 1e-5), (torch.bfloat16, True, 0.06)],
    ids=["fp32", "bf16"],
)
def test_a_lora_step_compiles_as_one_graph(adapted, notes, difference, dtype, autocast, tolerance):
    model = adapted(dtype, targets=("v_proj",)).train()
    compiled_step_follows_the_plain_one(model, notes, difference, "aot_eager", autocast, tolerance)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_lora_step_compiles_to_machine_code(adapted, notes, difference):
    model = adapted(torch.bfloat16, targets=("v_proj",), layers=1).train()
    compiled_step_follows_the_plain_one(model, notes, difference, "inductor", True, 0.06)


# RoPE


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotation_is_multiplication_by_complex_numbers(theta):
    x = torch.randn(2, 3, 50, 16, dtype=torch.float64)
    angles = rotary_angles(torch.arange(50), 16, theta).double()
    turned = turn(x, {"rope_type": "default", "rope_theta": theta})
    assert torch.allclose(rotate(x, angles.cos(), angles.sin()), turned, atol=2e-5)


def test_angles_of_a_hand_computed_head():
    angles = rotary_angles(torch.tensor([0, 1, 300]), 4, 10_000.0)
    assert angles.dtype == torch.float32
    expected = torch.tensor([[0.0] * 4, [-1.0, -0.01, 1.0, 0.01], [-300.0, -3.0, 300.0, 3.0]])
    assert torch.allclose(angles, expected, rtol=1e-6)


# Head width, factor, low_freq_factor, high_freq_factor, original positions.
LLAMA3_SCALINGS = {
    "Llama-3.1-8B": (128, 8.0, 1.0, 4.0, 8192),
    "Llama-3.2-1B": (64, 32.0, 1.0, 4.0, 8192),
    "another": (32, 1.5, 0.3, 10, 100),
}
any_scaling = pytest.mark.parametrize(
    "width, factor, low, high, original", LLAMA3_SCALINGS.values(), ids=LLAMA3_SCALINGS
)


@any_scaling
def test_scaled_frequencies_are_those_of_the_three_cases(width, factor, low, high, original):
    scaling = RopeScaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    rope = {"rope_type": "llama3", "rope_theta": 5e5} | dataclasses.asdict(scaling)
    exact = exact_frequencies(width, rope)
    plain = exact_frequencies(width, {"rope_type": "default", "rope_theta": 5e5})
    kept = exact == plain
    slowed = exact == plain / factor
    assert kept.any() and slowed.any() and not (kept | slowed).all()  # each case occurs
    scaled = scale_frequencies(plain.float(), scaling).double()
    assert torch.allclose(scaled, exact, rtol=1e-6, atol=0)


@any_scaling
def test_scaled_angles_equal_transformers_to_the_bit(width, factor, low, high, original):
    scaling = RopeScaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            head_dim=width,
            max_position_embeddings=131_072,
            rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}
            | dataclasses.asdict(scaling),
        )
    )
    positions = torch.arange(0, 131_072, 7)
    cos, sin = theirs(torch.zeros(1), positions[None])
    angles = rotary_angles(positions, width, 5e5, scaling)
    half = width // 2
    assert torch.equal(angles.cos(), cos[0])
    assert torch.equal(angles.sin()[:, half:], sin[0, :, half:])
    assert torch.equal(-angles.sin()[:, :half], sin[0, :, :half])


@pytest.mark.parametrize("scaling", [LLAMA3, "llama3"])
def test_a_scaling_of_another_type_is_refused(scaling):
    with pytest.raises(ValueError, match=r"rope_scaling is .*: expected a RopeScaling"):
        small(rope_scaling=scaling)


def test_rotated_product_depends_on_the_distance_alone():
    q, k = torch.randn(2, 16, dtype=torch.float64)
    frequencies = torch.logspace(0, -3, 8, dtype=torch.float64)
    angles = torch.arange(64)[:, None] * torch.cat((-frequencies, frequencies))
    cos, sin = angles.cos(), angles.sin()
    products = rotate(q.expand(64, -1), cos, sin) @ rotate(k.expand(64, -1), cos, sin).T
    for distance in (-40, -1, 0, 3, 17):
        assert products.diagonal(distance).std() < 1e-12
    assert products.std() > 0.1


def test_rotation_keeps_lengths():
    x = torch.randn(5, 8, dtype=torch.float64)
    half = torch.randn(5, 4, dtype=torch.float64)
    angles = torch.cat((-half, half), -1)
    assert torch.allclose(rotate(x, angles.cos(), angles.sin()).norm(dim=-1), x.norm(dim=-1))


# Norm


@pytest.mark.parametrize("width", [16, 300])
def test_half_precision_norm_has_the_gradient_of_float64(width):
    x = (3 * torch.randn(50, width)).bfloat16().requires_grad_()
    norm = RMSNorm(width, eps=1e-5).bfloat16()
    nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    grad = torch.randn(50, width).bfloat16()
    ours = torch.autograd.grad(norm(x), (x, norm.weight), grad)

    y, w = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    exact = w * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for a, b in zip(ours, torch.autograd.grad(exact, (y, w), grad.double()), strict=True):
        assert rms(a - b) <= 0.005 * rms(b)


def test_norm_of_a_hand_computed_vector():
    norm = RMSNorm(2, eps=0.0)
    nn.init.constant_(norm.weight, 10.0)
    y = norm(torch.tensor([[3.0, 4.0]]))  # root mean square √12.5
    assert torch.allclose(y, torch.tensor([[30.0, 40.0]]) / math.sqrt(12.5))


def test_epsilon_of_the_norm_is_inside_the_root():
    y = RMSNorm(4, eps=1e-2)(torch.zeros(4) + 1e-3)
    assert torch.allclose(y, torch.tensor(1e-3) / math.sqrt(1e-6 + 1e-2))


def test_norm_squares_in_float32():
    """In float16 the squares of numbers above 255 are infinite."""
    y = RMSNorm(4, eps=0.0)(torch.full((4,), 1000.0, dtype=torch.float16))
    assert y.tolist() == [1.0] * 4


# Training


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients_to_the_bit(adapted_twins, notes, dropout):
    ours, _, pairs = adapted_twins(LoRAConfig(rank=4, dropout=dropout))
    ids, lengths = notes(LENGTHS)
    ours.train()
    gradients = []
    for ours.model.activation_checkpointing in (False, True):
        torch.manual_seed(3)
        ours.zero_grad()
        ours(ids, lengths).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in ours.named_parameters() if n in pairs})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in pairs)
    assert all(gradients[1][name].any() for name in pairs)


@pytest.mark.parametrize("training, passes", [(True, 2), (False, 1)])
def test_checkpointing_computes_each_layer_again_in_training_alone(notes, training, passes):
    model = LlamaForSequenceClassification(small(), 3).train(training)
    model.model.activation_checkpointing = True
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda module, _: calls.append(module))
    ids, lengths = notes((5, 3))
    model(ids, lengths).sum().backward()
    assert [calls.count(layer.self_attn) for layer in model.model.layers] == [passes, passes]


def test_checkpointing_needs_no_gradient_to_enter_it(adapted_twins, notes):
    """With a frozen embedding, reentrant checkpointing silently gave no gradients at all."""
    ours, _, _ = adapted_twins(LoRAConfig(rank=2), num_hidden_layers=1)
    ours.train().model.activation_checkpointing = True
    ids, lengths = notes((5, 3))
    ours(ids, lengths).sum().backward()
    assert ours.model.layers[0].self_attn.q_proj.lora_B.grad.any()


def test_a_new_model_has_an_untrained_head():
    assert LlamaForSequenceClassification(small(), 3).head_trained is False


def test_initial_weights_have_the_configured_spread():
    model = LlamaForCausalLM(small(vocab_size=4000, initializer_range=0.05, attention_bias=True))
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not model.model.layers[0].self_attn.q_proj.bias.any()


def test_a_classification_head_in_float32_reads_a_bfloat16_base(notes):
    model = LlamaForSequenceClassification(small(), 3).bfloat16()
    model.score.float()
    assert model(*notes((4, 2))).dtype == torch.float32


# Configuration

OLD = {  # as TinyLlama's
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 20000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 32000,
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "initializer_range",
)


@pytest.fixture
def config_file(tmp_path):
    """Write a config.json: OLD with changes; a change to ``...`` takes the key out."""

    def write(**changes):
        path = tmp_path / "config.json"
        kept = {key: value for key, value in (OLD | changes).items() if value is not ...}
        path.write_text(json.dumps(kept))
        return path

    return write


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": ..., "rope_theta": ..., "rms_norm_eps": ...},
        {"num_key_value_heads": None, "head_dim": None},
        {"head_dim": 128, "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": ..., "rope_theta": ..., "torch_dtype": ..., "dtype": "bfloat16",
         "rope_parameters": {"rope_theta": 30000.0, "rope_type": "default"}},
        {"rope_scaling": {"type": "default"},
         "rope_parameters": {"rope_theta": 30000.0, "rope_type": "default"}},
        {"rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"}},
        {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": LLAMA3},
        {"rope_interleaved": False, "is_llama_config": True},
    ],
    ids=["old", "absent", "null", "all", "scaling named default", "new", "both", "old llama3",
         "new llama3", "keys of SmolLM2"],
)  # fmt: skip
def test_config_reads_what_transformers_reads(config_file, changes):
    path = config_file(**changes)
    ours, theirs = LlamaConfig.from_json(path), transformers.LlamaConfig.from_pretrained(path)
    assert [getattr(ours, name) for name in SIZES] == [getattr(theirs, name) for name in SIZES]
    rope = {"rope_theta": ours.rope_theta, "rope_type": "default"}
    if ours.rope_scaling is not None:
        rope |= dataclasses.asdict(ours.rope_scaling) | {"rope_type": "llama3"}
    assert rope == {key: theirs.rope_parameters[key] for key in rope}
    assert theirs.rope_parameters.keys() <= rope.keys() | {"type"}


def test_config_reads_what_transformers_writes(tmp_path):
    transformers.LlamaConfig(
        num_attention_heads=4, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    ).save_pretrained(tmp_path)
    assert "rope_parameters" in (tmp_path / "config.json").read_text()
    assert LlamaConfig.from_json(tmp_path / "config.json").rope_theta == 5e5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
        ({"model_type": ...}, "model_type is None"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config \{'bits': 4\}"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "dynamic", "type": "dynamic"}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
         "rope type 'llama3' lacks high_freq_factor, low_freq_factor, original_max_position_emb"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
         "rope type 'llama3' lacks original_max_position_embeddings"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor is '8': expected a positive number"),
        ({"rope_scaling": LLAMA3 | {"factor": 0.5}}, "factor is 0.5: expected at least 1"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 0}}, "low_freq_factor is 0: expected a pos"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}},
         "high_freq_factor is 0.5: expected more than low_freq_factor, which is 0.5"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 24.0}},
         "original_max_position_embeddings is 24.0: expected a whole number"),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 2.0}},
         r"rope parameters \{'attention_factor': 2.0\} are not supported"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear"}},
         "rope type 'linear'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         r"rope parameters \{'partial_rotary_factor': 0.5\}"),
        ({"vocab_size": ..., "hidden_size": ...}, "lacks hidden_size, vocab_size"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_key_value_heads": 5}, "heads 5 does not divide num_attention_heads 32"),
        ({"num_attention_heads": 24}, "24 num_attention_heads do not divide hidden_size 2048"),
        ({"head_dim": 65}, "head_dim 65 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: expected a whole number .* least 1"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers is 1001: expected at most 1000"),
        ({"vocab_size": 48_828_126}, "vocab_size is 48828126 and hidden_size is 2048: expected a"),
        ({"vocab_size": 10**30}, rf"vocab_size is {10**30} and hidden_size is 2048"),
        ({"intermediate_size": 10**30}, rf"intermediate_size is {10**30} and hidden_size is 2048"),
        ({"head_dim": 10**30}, rf"num_attention_heads · head_dim is {32 * 10**30} and hidden_size"),
        ({"hidden_size": 10**11, "head_dim": 64}, rf"hidden_size is {10**11}: expected a product"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0: expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: expected a whole number"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1: expected a whole number"),
        ({"hidden_size": "2048"}, "hidden_size is '2048': expected a whole number"),
        ({"head_dim": 128.0}, "head_dim is 128.0: expected a whole number"),
        ({"vocab_size": True}, "vocab_size is True: expected a whole number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x': expected a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05: expected a positive number"),
        ({"initializer_range": math.nan}, "initializer_range is nan: expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 10+: expected a positive number"),
        ({"rope_theta": [1e4]}, r"rope_theta is \[10000.0\]: expected a positive number"),
        ({"rope_theta": "10000"}, "rope_theta is '10000': expected a positive number"),
        ({"rope_parameters": {"rope_theta": {}}}, "rope_theta is {}: expected a positive number"),
        ({"attention_bias": "false"}, "attention_bias is 'false': expected true or false"),
        ({"mlp_bias": 1}, "mlp_bias is 1: expected true or false"),
        ({"rope_parameters": "linear"}, "rope parameters 'linear' are not a JSON object"),
        ({"rope_scaling": ["linear", 2]}, r"rope parameters \['linear', 2\] are not a JSON object"),
    ],
)  # fmt: skip
def test_config_refuses_by_name_what_the_decoder_does_not_do(config_file, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json:? .*{message}"):
        LlamaConfig.from_json(config_file(**changes))


def test_config_takes_the_largest_sizes(config_file):
    """48,828,125 × 2,048 is 10^11."""
    config = LlamaConfig.from_json(config_file(num_hidden_layers=1000, vocab_size=48_828_125))
    assert (config.num_hidden_layers, config.vocab_size) == (1000, 48_828_125)


def test_config_takes_whole_numbers_for_real_ones(config_file):
    config = LlamaConfig.from_json(config_file(rope_theta=500_000, rms_norm_eps=1))
    assert (config.rope_theta, config.rms_norm_eps) == (500_000.0, 1.0)


@pytest.mark.parametrize(
    "text, message",
    [("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[1]", "holds a list")],
)
def test_config_refuses_what_is_no_config(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_json(path)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        LlamaConfig.from_json(tmp_path / "config.json")
