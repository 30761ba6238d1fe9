"""LoRA against its equations, PEFT and its own promises."""

import copy
import json
import math
import warnings
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from clinora.adapter import load_adapter, save_adapter
from clinora.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from clinora.lora import (
    LoRAConfig,
    LoRALinear,
    apply_lora,
    count_parameters,
    find_modules,
    find_targets,
    lora_disabled,
    lora_parameter_count,
    lora_state_dict,
    lora_strength,
    merge_lora,
    merged_weight,
)

LENGTHS = (13, 1, 29, 7)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = {
    "grouped": {},
    "ungrouped": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "head_dim": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("one_thread")


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers 0 and 2 to adapt, 4 as the head."""
    layers = nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10, bias=False), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(10, 3)).to(dtype)


def mlp_config(**changes) -> LoRAConfig:
    kept = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ("0", "2"), "also_train": ("4",)}
    return LoRAConfig(**kept | changes)


@pytest.fixture
def adapted_mlp(fill_b):
    def make(dtype: torch.dtype = torch.float32, **changes) -> nn.Sequential:
        model = mlp(dtype)
        apply_lora(model, mlp_config(**changes))
        return fill_b(model)

    return make


def by_hand() -> LoRALinear:
    """A layer of numbers typed in: W (2 × 3), r = 1, α = 2."""
    base = nn.Linear(3, 2)
    layer = LoRALinear(base, LoRAConfig(rank=1, alpha=2, dropout=0.0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [-1.0]]))
    return layer


# The equation


def test_forward_of_a_hand_computed_layer():
    x = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, -1.0]])
    # W·x + b = (3.5, 0.5) and (0.5, -0.5); A·x = 6 and -1; s·B·A·x = (12, -12) and (-2, 2)
    assert by_hand()(x).tolist() == [[15.5, -11.5], [-1.5, 1.5]]


def test_merged_weight_of_a_hand_computed_layer():
    layer = by_hand()
    assert merged_weight(layer).tolist() == [[3.0, 4.0, 8.0], [-2.0, -3.0, -6.0]]
    with lora_strength(layer, 0.5):
        assert merged_weight(layer).tolist() == [[3.0, 4.0, 8.0], [-2.0, -3.0, -6.0]]
    assert layer.weight.tolist() == [[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_is_the_equation_in_float64(adapted_mlp, difference, dtype):
    layer = adapted_mlp(dtype)[0]
    x = torch.randn(5, 7, 12, dtype=dtype)
    w, b, lora_a, lora_b = (
        p.double() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B)
    )
    exact = x.double() @ w.T + b + 2.0 * (x.double() @ lora_a.T) @ lora_b.T  # s = 8 / 4
    assert layer(x).dtype == dtype
    assert difference(layer(x), exact) <= (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(
    "rank, alpha, stabilized, scaling",
    [(8, 16, False, 2.0), (8, 16, True, 16 / math.sqrt(8)), (4, 1, False, 0.25), (1, 3, True, 3)],
)
def test_scaling_of_the_update(fill_b, difference, rank, alpha, stabilized, scaling):
    config = LoRAConfig(rank=rank, alpha=alpha, dropout=0.0, rank_stabilized=stabilized)
    assert config.scaling == pytest.approx(scaling, rel=1e-15)
    layer = fill_b(LoRALinear(nn.Linear(12, 10, bias=False), config))
    update = layer(torch.eye(12)).T - layer.weight
    assert difference(update, scaling * layer.lora_B @ layer.lora_A) <= 1e-6


@pytest.mark.parametrize("stabilized", [False, True])
def test_layer_is_as_exact_as_pefts_in_bfloat16(stabilized):
    shape = {"rank": 8, "alpha": 16, "dropout": 0.0, "rank_stabilized": stabilized}
    base = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], use_rslora=stabilized)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model[0]
    ours = LoRALinear(base[0], LoRAConfig(**shape))
    with torch.no_grad():
        ours.lora_A.copy_(theirs.lora_A["default"].weight)
        theirs.lora_B["default"].weight.copy_(ours.lora_B.normal_(std=0.1))
    x = torch.randn(200, 64, dtype=torch.bfloat16)
    scaling = 16 / (math.sqrt(8) if stabilized else 8)
    exact = base[0].weight.double() + scaling * ours.lora_B.double() @ ours.lora_A.double()
    exact = x.double() @ exact.T + base[0].bias.double()
    with torch.no_grad():
        errors = [(layer(x).double() - exact).square().mean().sqrt() for layer in (ours, theirs)]
    assert 0 < errors[0] <= 1.2 * errors[1] < 0.02 * exact.std()


# At initialisation


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_output_is_the_bases_to_the_bit(dtype, training):
    """In training too: dropout sits on LoRA's input, never on what the base layer reads."""
    model, x = mlp(dtype).train(training), torch.randn(6, 12, dtype=dtype)
    before = model(x)
    apply_lora(model, mlp_config(dropout=0.5, also_train=()))
    assert model.training is training and model[0].training is training
    assert torch.equal(model(x), before) and model(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_of_a_llama_are_the_bases_to_the_bit(twins, notes, dtype):
    ours, _ = twins(dtype=dtype)
    ids, lengths = notes(LENGTHS)
    with torch.no_grad():
        before = ours.model(ids), ours.model(ids, lengths)
        apply_lora(ours, LoRAConfig(rank=8))
        assert torch.equal(ours.model(ids), before[0])
        assert torch.equal(ours.model(ids, lengths), before[1])


def test_a_is_uniform_within_its_bound():
    """U(−1/√in, 1/√in): its standard deviation is the bound over √3."""
    layer = LoRALinear(nn.Linear(400, 300), LoRAConfig(rank=64))
    bound = 1 / math.sqrt(400)
    assert 0.999 * bound < layer.lora_A.abs().max().item() <= bound
    assert layer.lora_A.mean().abs().item() < 0.02 * bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.lora_B.any()


def test_a_is_what_peft_draws_after_its_two_linears():
    """PEFT makes A and B as nn.Linear, which draw numbers, and draws A again."""
    base = nn.Sequential(nn.Linear(32, 24))
    torch.manual_seed(5)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"]))
    torch.manual_seed(5)
    nn.Linear(32, 4, bias=False), nn.Linear(4, 24, bias=False)
    ours = LoRALinear(nn.Linear(32, 24, device="meta").to_empty(device="cpu"), LoRAConfig(rank=4))
    assert torch.equal(ours.lora_A, theirs.base_model.model[0].lora_A["default"].weight)


# Dropout


def test_dropout_sits_on_the_input_of_a():
    """With A the identity, whole entries of x are missing from the update, and none from W·x."""
    layer = LoRALinear(nn.Linear(8, 8), LoRAConfig(rank=8, alpha=8, dropout=0.5))
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(8)), layer.lora_B.copy_(torch.eye(8))
    x = torch.randn(100, 8)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    kept = (layer(x) - base) / (2 * x)  # 1 / (1 − 0.5)
    assert torch.allclose(kept, kept.round(), atol=1e-3)
    assert 0.4 < kept.mean().item() < 0.6
    assert torch.allclose(layer.eval()(x), base + x)


# What trains


def test_names_adapted_and_what_trains():
    model = mlp()
    assert apply_lora(model, mlp_config()) == ["0", "2"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B", "4.weight", "4.bias"}


def test_only_what_should_train_moves(twins, notes):
    ours, _ = twins(attention_bias=True)
    apply_lora(ours, LoRAConfig(rank=2, dropout=0.1))
    before = copy.deepcopy(dict(ours.named_parameters()))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.1)
    ids, lengths = notes(LENGTHS)
    for _ in range(2):
        optimizer.zero_grad()
        ours.train()(ids, lengths).logsumexp(-1).sum().backward()
        optimizer.step()
    moved = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
    wanted = {"score.weight"} | {
        f"model.layers.{i}.self_attn.{q}_proj.lora_{ab}"
        for i in range(3)
        for q in "qv"
        for ab in "AB"
    }
    assert moved == wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_follow_peft(adapted_twins, notes, difference, dtype, stabilized, seed):
    """In float32 the logits stay within 1e-5 (3e-6 was seen), in float64 the parameters too.

    AdamW divides a gradient by its own size, so where a float32 gradient cancels to nothing, its
    rounding alone decides the step's direction: such parameters differ between runs of the same
    code, by up to a step.
    """
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, rank_stabilized=stabilized)
    ours, theirs, pairs = adapted_twins(lora, random_b=False, seed=seed, dtype=dtype)
    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in mine.items()}
    optimizers = [torch.optim.AdamW(ps.values(), lr=1e-3) for ps in (mine, pairs)]
    ours.train(), theirs.train()
    for step in range(11):
        ids, lengths = notes(LENGTHS, seed=11 * seed + step)
        mask = (ids != 0).long()
        outputs = ours(ids, lengths), theirs(ids, attention_mask=mask).logits
        assert difference(*outputs) <= 1e-5, step
        for logits, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 4])).backward()
            if step < 10:
                optimizer.step()
    for name, parameter in mine.items():
        assert difference(parameter, start[name]) > 1e-3, name
        if dtype == torch.float64:
            assert difference(parameter, pairs[name]) <= 1e-10, name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_master_weights_are_float32_beside_any_base(twins, notes, dtype, autocast):
    ours, _ = twins(dtype=dtype)
    apply_lora(ours, LoRAConfig(rank=2))
    ids, lengths = notes(LENGTHS)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()
    with context:
        loss = nn.functional.cross_entropy(ours.train()(ids, lengths).float(), lengths % 5)
    loss.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
    assert ours.model.layers[0].self_attn.q_proj.lora_B.grad.any() and ours.score.weight.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_computes_close_to_float32(adapted_mlp, difference, dtype):
    model, x = adapted_mlp(dtype), torch.randn(40, 12, dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(x.float())
        assert difference(model(x), exact) <= {torch.float32: 1e-6}.get(dtype, 0.02)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
    assert y.dtype == torch.bfloat16
    assert 1e-5 < difference(y, exact) <= 0.03


WHOLE = [("embed_tokens",), ("input_layernorm", "norm"), ("layers.1",), ("o_proj", "score"), ()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:score stays frozen")
@pytest.mark.parametrize("whole", WHOLE, ids=" ".join)
def test_any_module_trains_whole_beside_any_base(twins, notes, whole, dtype, autocast):
    """Its float32 output met the frozen base's half precision in the next product."""
    ours, _ = twins(dtype=dtype)
    apply_lora(ours, LoRAConfig(rank=2, targets=("layers.0.self_attn.q_proj",), also_train=whole))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = ours.train()(*notes(LENGTHS)).float().square().sum()
    loss.backward()
    for name in find_modules(ours, whole):
        for parameter in ours.get_submodule(name).parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert parameter.grad.any() and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:score stays frozen")
@pytest.mark.parametrize("whole", WHOLE, ids=" ".join)
def test_training_modules_whole_keeps_the_outputs_dtype(twins, notes, difference, whole, dtype):
    ours, _ = twins(dtype=dtype)
    with torch.no_grad():
        before = ours(*notes(LENGTHS))
        lora = LoRAConfig(rank=2, targets=("layers.0.self_attn.q_proj",), also_train=whole)
        apply_lora(ours, lora)
        after = ours(*notes(LENGTHS))
    assert after.dtype == before.dtype
    assert difference(after, before) <= {torch.float32: 0, torch.float16: 0.01}.get(dtype, 0.05)


def test_a_module_trained_whole_can_be_trained_whole_again(twins, notes):
    """By then its weights are float32, which is not what the base around it expects."""
    ours, _ = twins(dtype=torch.bfloat16)
    for _ in range(2):
        apply_lora(ours, LoRAConfig(rank=2, also_train=("input_layernorm", "score")))
        assert ours(*notes(LENGTHS)).dtype == torch.bfloat16
        merge_lora(ours)


def test_a_head_held_in_float32_gives_float32_logits(twins, notes):
    ours, _ = twins(dtype=torch.bfloat16)
    ours.score.float()
    apply_lora(ours, LoRAConfig(rank=2))
    assert ours(*notes(LENGTHS)).dtype == torch.float32


class ByKeyword(nn.Module):
    """Calls its head as Transformers' layers call their attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(input=self.body(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_module_trained_whole_may_be_called_by_keyword(difference, dtype, autocast):
    model, x = ByKeyword().to(dtype), torch.randn(5, 8, dtype=dtype)
    before = model(x)
    apply_lora(model, LoRAConfig(rank=2, targets=("body",), also_train=("head",)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        after = model(x)
    after.float().square().sum().backward()
    assert after.dtype == (torch.bfloat16 if autocast else dtype)
    assert difference(after, before) <= 0.02
    assert model.head.weight.grad.dtype == torch.float32 and model.head.weight.grad.any()


def test_a_tied_embedding_trains_whole_beside_a_bfloat16_base(twins, notes):
    ours, _ = twins(num_labels=None, dtype=torch.bfloat16, tie_word_embeddings=True)
    apply_lora(ours, LoRAConfig(rank=2, also_train=("embed_tokens",)))
    ours(notes(LENGTHS)[0]).square().sum().backward()
    assert ours.model.embed_tokens.weight.grad.any()


# Strength


def test_strength_zero_is_the_base_under_the_trained_head(adapted_mlp, difference):
    model, x = adapted_mlp(dropout=0.5), torch.randn(6, 12)
    with torch.no_grad():
        model[4].weight += 1.0
        base = mlp()
        base.load_state_dict({n: p for n, p in model.state_dict().items() if "lora" not in n})
        for context in (lora_strength(model, 0), lora_disabled(model)):
            with context:
                assert torch.equal(model(x), base(x))
        assert difference(model.eval()(x), base(x)) > 0.01


def test_a_diverged_adapter_can_be_switched_off(adapted_mlp):
    """Zero times infinity is no number: a layer that is off must not compute its update."""
    model, x = adapted_mlp(also_train=()), torch.randn(6, 12)
    nn.init.constant_(model[0].lora_B, torch.inf)
    with lora_disabled(model):
        assert model(x).isfinite().all()
    assert not model(x).isfinite().all()


def test_strength_multiplies_the_update(adapted_mlp, difference):
    layer, x = adapted_mlp()[0], torch.randn(6, 12)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    update = layer(x) - base
    for strength in (0.5, 2.0, -1.0):
        with lora_strength(layer, strength):
            assert difference(layer(x), base + strength * update) <= 1e-6


def test_strength_nests_and_restores(adapted_mlp):
    model = adapted_mlp()
    seen = []
    with lora_strength(model, 0.5):
        with lora_disabled(model), lora_strength(model, 2.0):
            seen.append(model[2].strength)
        seen.append(model[2].strength)
    assert seen == [2.0, 0.5] and model[0].strength == model[2].strength == 1.0


def test_strength_restores_after_an_exception(adapted_mlp):
    model = adapted_mlp()
    with pytest.raises(KeyError), lora_strength(model, 0.5):
        raise KeyError
    assert model[0].strength == model[2].strength == 1.0


@pytest.mark.parametrize("strength", [0, 0.5])
def test_strength_holds_for_what_checkpointing_computes_again(adapted_twins, notes, strength):
    """Outside the block it would compute the layers at strength 1, and other gradients."""
    ours, _, _ = adapted_twins(LoRAConfig(rank=4, dropout=0.0))
    ids, lengths = notes(LENGTHS)
    ours.train()
    gradients = []
    for ours.model.activation_checkpointing in (False, True):
        ours.zero_grad()
        with lora_strength(ours, strength):
            ours(ids, lengths).square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert len(gradients[0]) == (13 if strength else 1)  # off, the head alone
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_strength_restores_layers_that_had_different_ones(adapted_mlp):
    model = adapted_mlp()
    model[2].strength = 0.25
    with lora_disabled(model):
        assert model[0].strength == model[2].strength == 0.0
    assert (model[0].strength, model[2].strength) == (1.0, 0.25)


# Merging


def test_merged_equals_adapted(adapted_mlp, difference):
    model, x = adapted_mlp().eval(), torch.randn(50, 12)
    with torch.no_grad():
        adapted, base = model(x), copy.deepcopy(model)
        assert difference(merge_lora(model)(x), adapted) <= 1e-6
        with lora_disabled(base):
            assert difference(base(x), adapted) > 0.01


def test_every_merged_layer_of_a_llama_equals_the_adapted_one(twins, fill_b, difference):
    ours, _ = twins(attention_bias=True)
    names = apply_lora(ours, LoRAConfig(rank=4, dropout=0.0, targets=LINEARS))
    fill_b(ours)
    for name in names:
        layer = ours.get_submodule(name)
        x = torch.randn(50, layer.weight.size(1))
        adapted = layer(x)
        assert (
            difference(nn.functional.linear(x, merged_weight(layer), layer.bias), adapted) <= 1e-6
        )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_merged_llama_equals_adapted(adapted_twins, notes, difference, shape):
    """Each layer is within 1e-6; three of them, one on the other, are within 4e-6."""
    ours, theirs, _ = adapted_twins(LoRAConfig(rank=4, dropout=0.0, targets=LINEARS), **shape)
    ids, lengths = notes(LENGTHS)
    with torch.no_grad():
        adapted, last = ours.model(ids), ours(ids, lengths)
        theirs = theirs.merge_and_unload()(ids).logits
        merge_lora(ours)
        assert difference(ours.model(ids), adapted) <= 4e-6
        assert difference(ours(ids, lengths), last) <= 4e-6
        assert difference(ours(ids, lengths), theirs) <= 2e-6


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merge_rounds_once(adapted_mlp, dtype, autocast):
    """PEFT's safe_merge rounds the update, then the sum."""
    layer = adapted_mlp(dtype)[0]
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    once = exact.float().to(dtype)
    twice = layer.weight + (2.0 * layer.lora_B @ layer.lora_A).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        merged = merged_weight(layer)
    assert merged.dtype == dtype and not merged.requires_grad
    assert torch.equal(merged, once) and not torch.equal(twice, once)


def test_merging_leaves_a_plain_model(adapted_mlp):
    model = adapted_mlp(rank_stabilized=True)
    weights = [merged_weight(model[i]) for i in (0, 2)]
    bias = model[0].bias
    assert merge_lora(model) is model
    assert not hasattr(model, "lora_config")
    assert [type(m) for m in model] == [type(m) for m in mlp()]
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert torch.equal(model[0].weight, weights[0]) and torch.equal(model[2].weight, weights[1])
    assert model[0].bias is bias and model[2].bias is None
    assert (model[0].in_features, model[0].out_features) == (12, 16)
    assert not model[0].weight.requires_grad and model[4].weight.requires_grad


def test_a_part_of_a_model_can_be_merged(adapted_twins, notes, difference):
    ours, _, _ = adapted_twins(LoRAConfig(rank=4, dropout=0.0))
    ids, lengths = notes(LENGTHS)
    with torch.no_grad():
        adapted = ours(ids, lengths)
        layer = ours.model.layers[1]
        assert merge_lora(layer) is layer
        assert difference(ours(ids, lengths), adapted) <= 2e-6
    kinds = [type(x.self_attn.q_proj) for x in ours.model.layers]
    assert kinds == [LoRALinear, nn.Linear, LoRALinear]


def test_layers_made_by_hand_can_be_merged(fill_b, difference):
    layer = fill_b(LoRALinear(nn.Linear(6, 5), LoRAConfig(rank=2, dropout=0.0)))
    model, x = nn.Sequential(layer, nn.ReLU()), torch.randn(3, 6)
    adapted = model(x)
    assert difference(merge_lora(model)(x), adapted) <= 1e-6
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("training", [False, True])
def test_merging_keeps_the_mode(adapted_mlp, training):
    model = merge_lora(adapted_mlp().train(training))
    assert {m.training for m in model.modules()} == {training}


def test_a_merged_model_can_be_adapted_again(adapted_mlp):
    model, x = merge_lora(adapted_mlp()), torch.randn(3, 12)
    before = model(x)
    assert apply_lora(model, mlp_config(rank=2)) == ["0", "2"]
    assert torch.equal(model(x), before)


# On any model


def test_names_and_storage_of_the_base_stay():
    model = mlp()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    apply_lora(model, mlp_config())
    after = dict(model.named_parameters())
    assert {n: p.data_ptr() for n, p in after.items() if "lora" not in n} == before
    assert all(after[name] is parameters[name] for name in before)


def test_a_base_checkpoint_loads_after_apply_lora():
    model, checkpoint = mlp(), mlp().state_dict()
    apply_lora(model, mlp_config())
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert not unexpected and {name.split(".")[1] for name in missing} == {"lora_A", "lora_B"}


@pytest.fixture
def bert():
    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, num_labels=3,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).to(dtype).eval()

    return make


def test_bert_follows_peft(bert, difference):
    base, ids = bert(), torch.randint(0, 50, (3, 9))
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"]),
    )
    names = apply_lora(
        base, LoRAConfig(rank=4, alpha=8, targets=("query", "value"), also_train=("classifier",))
    )
    with torch.no_grad():
        for name in names:
            ours, other = base.get_submodule(name), theirs.base_model.model.get_submodule(name)
            ours.lora_A.copy_(other.lora_A["default"].weight)
            other.lora_B["default"].weight.copy_(ours.lora_B.normal_())
    assert len(names) == 4
    for model in (base.eval(), theirs.eval()):
        nn.functional.cross_entropy(model(ids).logits, torch.tensor([0, 1, 2])).backward()
    for name in names:
        ours, other = base.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert difference(ours.lora_A.grad, other.lora_A["default"].weight.grad) <= 1e-5
        assert difference(ours.lora_B.grad, other.lora_B["default"].weight.grad) <= 1e-5
    head = theirs.base_model.model.classifier.modules_to_save["default"]
    assert difference(base.classifier.weight.grad, head.weight.grad) <= 1e-5
    assert difference(base(ids).logits, theirs(ids).logits) <= 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_bert_in_bfloat16_trains_without_autocast(bert, training):
    model = bert(torch.bfloat16).train(training)
    config = LoRAConfig(targets=("query", "value"), also_train=("classifier",), rank=4)
    apply_lora(model, config)
    logits = model(torch.randint(0, 50, (3, 9))).logits
    logits.square().sum().backward()
    assert (logits.dtype, model.classifier.weight.dtype) == (torch.bfloat16, torch.float32)
    assert model.classifier.weight.grad.any()
    assert model.bert.encoder.layer[0].attention.self.query.lora_B.grad.any()


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("stacked", [False, True])
def test_pytorchs_fused_encoder_does_not_pass_lora_by(fill_b, difference, stacked, context):
    """In evaluation it reads the weights of linear1 and linear2 and never calls them."""
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(model, 2) if stacked else model
    x = torch.randn(3, 5, 16)
    apply_lora(model.eval(), LoRAConfig(rank=4, targets=("linear1", "linear2")))
    fill_b(model, std=0.5)
    with context():
        adapted = model(x)
        with lora_disabled(model):
            base = model(x)
        assert difference(merge_lora(model)(x), adapted) <= 2e-6
    assert difference(base, adapted) > 0.1


class Shared(nn.Module):
    """One linear layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.between = nn.ReLU()
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def test_a_layer_used_twice_is_adapted_once(fill_b, difference):
    model, x = Shared(), torch.randn(4, 6)
    config = LoRAConfig(rank=2, targets=("first", "second"), also_train=(), dropout=0.0)
    assert apply_lora(model, config) == ["first", "second"]
    assert model.first is model.second and count_parameters(model).lora == 2 * (6 + 6)
    fill_b(model)
    with lora_strength(model, 0.5), lora_strength(model, 0.25):
        pass
    assert model.first.strength == 1.0
    adapted = model(x)
    assert difference(merge_lora(model)(x), adapted) <= 1e-6
    assert type(model.first) is nn.Linear and model.first is model.second


def test_the_meta_device_needs_no_weights():
    with torch.device("meta"):
        model = mlp(torch.bfloat16)
    apply_lora(model, mlp_config())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model[0].lora_A.dtype == model[4].weight.dtype == torch.float32
    assert model(torch.empty(2, 12, dtype=torch.bfloat16, device="meta")).shape == (2, 3)
    assert count_parameters(model).lora == 4 * (12 + 16) + 4 * (16 + 10)


def test_targets_are_told_apart_by_longer_names():
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    assert apply_lora(model, mlp_config(targets=("b.0", "a.2"), also_train=())) == ["a.2", "b.0"]


def test_a_name_in_also_train_may_be_absent():
    model = mlp()
    apply_lora(model, mlp_config(also_train=("score", "4")))
    assert model[4].weight.requires_grad


@pytest.mark.parametrize(
    "choice",
    [
        {"targets": ("q",), "layers": (0,)},
        {"targets": ("layers.0.q",)},
        {"targets": r"layers\.0\.q"},
    ],
)
def test_a_layer_that_is_used_twice_is_found_under_both_names(choice, tmp_path):
    def build():
        torch.manual_seed(0)
        shared = nn.Linear(6, 6)
        return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": shared}) for _ in "ab")})

    model = build()
    names = apply_lora(model, LoRAConfig(rank=2, dropout=0, also_train=(), **choice))
    assert names == ["layers.0.q", "layers.1.q"]
    with torch.no_grad():
        model["layers"][0]["q"].lora_B.normal_()
    save_adapter(model, tmp_path)
    again = build()
    load_adapter(again, tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(again["layers"][1]["q"](x), model["layers"][0]["q"].eval()(x))


def test_a_pattern_that_gives_one_layer_two_ranks_is_refused():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(
        ValueError, match="a and b are one layer, with two ranks or values of alpha"
    ):
        apply_lora(model, LoRAConfig(targets=("a",), also_train=(), rank=2, rank_pattern={"b": 1}))


def test_names_match_whole_segments():
    """With substrings, "proj" would adapt "q_proj", and "score" the new "score_norm"."""
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    assert list(find_modules(model, ("proj",))) == ["proj"]
    assert list(find_targets(model, ("proj",))) == ["proj"]
    assert apply_lora(model, LoRAConfig(targets=("proj",), rank=1)) == ["proj"]
    assert type(model["q_proj"]) is nn.Linear


LLAMAS_LINEARS = [
    f"model.layers.{i}.{part}_proj"
    for i in range(3)
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up",
                 "mlp.down")
]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"targets": "all-linear"}, LLAMAS_LINEARS),
        ({"targets": r".*self_attn\.[kv]_proj"}, [n for n in LLAMAS_LINEARS if n[-6] in "kv"]),
        ({"targets": ("up_proj",), "layers": (0, 2)}, [LLAMAS_LINEARS[5], LLAMAS_LINEARS[19]]),
        ({"targets": "all-linear", "layers": [1]}, LLAMAS_LINEARS[7:14]),
    ],
)
def test_other_ways_to_choose_layers(twins, choice, expected):
    ours, theirs = twins()
    assert apply_lora(ours, LoRAConfig(**choice)) == expected
    assert find_targets(theirs, ours.lora_config.targets).keys() == set(expected)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"targets": ".*x_proj"},
            r"no layer matches '\.\*x_proj'; this model's linear layers: .*up",
        ),
        (
            {"targets": "q_proj"},
            r"no layer matches 'q_proj' .*whole name.*the tuple \('q_proj',\)",
        ),
        ({"layers": (3, 4)}, r"no layer matches .* in the layers 3, 4"),
        ({"rank_pattern": {"k_proj": 2}}, "pattern 'k_proj' matches none of the layers"),
        ({"rank_pattern": {"v_proj": 17}}, "rank 17 is too large for .*v_proj: at most 16"),
    ],
)
def test_a_choice_without_layers_is_refused(twins, choice, message):
    ours, _ = twins()
    with pytest.raises(ValueError, match=message):
        apply_lora(ours, LoRAConfig(**choice))
    assert not any(isinstance(module, LoRALinear) for module in ours.modules())


def test_an_adapted_model_can_be_copied(adapted_mlp):
    model, x = adapted_mlp(torch.bfloat16), torch.randn(2, 12, dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and twin.lora_config == model.lora_config
    with lora_disabled(twin):
        assert model[0].strength == 1.0


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapted_layer_has_the_sizes_of_a_linear_layer(bias):
    layer = LoRALinear(nn.Linear(12, 16, bias=bias), LoRAConfig(rank=2))
    assert (layer.in_features, layer.out_features) == (12, 16)


def test_a_model_that_reads_its_layers_sizes_can_be_adapted():
    """Transformers' DPR reads encode_proj.out_features."""
    shape = transformers.DPRConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=40, projection_dim=8,
    )  # fmt: skip
    model = transformers.DPRQuestionEncoder(shape)
    apply_lora(model, LoRAConfig(rank=2, targets=("encode_proj",), also_train=()))
    assert model.question_encoder.embeddings_size == 8


# Heads that stay frozen


def heads(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(8, 8), **modules})


def caught(model: nn.Module, **changes) -> list[warnings.WarningMessage]:
    config = {"rank": 1, "targets": ("body",), "also_train": ()}
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        apply_lora(model, LoRAConfig(**config | changes))
    return records


@pytest.mark.parametrize(
    "name", ["classifier", "classification_head", "pre_classifier", "qa_outputs", "score"]
)
def test_a_head_that_stays_frozen_is_named_in_a_warning(name):
    (warning,) = caught(heads(**{name: nn.Linear(8, 3)}))
    assert warning.category is UserWarning and warning.filename == __file__
    assert str(warning.message).startswith(f"{name} ") and f"also_train=('{name}',)" in str(
        warning.message
    )


def test_what_the_warning_asks_for_ends_it(bert):
    message = str(caught(bert(), targets=("query",))[0].message)
    assert "also_train=('classifier',)" in message
    assert not caught(bert(), targets=("query",), also_train=("classifier",))


@pytest.mark.parametrize(
    "make, changes",
    [
        (lambda: heads(score=nn.Linear(8, 3)), {"also_train": ("score",)}),
        (lambda: heads(score=nn.Linear(8, 3)), {"targets": ("body", "score")}),
        (lambda: heads(classifier=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))),
         {"targets": ("classifier.1",)}),
        (lambda: heads(score=nn.Dropout()), {}),
        (lambda: heads(lm_head=nn.Linear(8, 3), scores=nn.Linear(8, 3)), {}),
    ],
    ids=["trained whole", "adapted", "adapted inside", "without weights", "another name"],
)  # fmt: skip
def test_a_model_without_a_frozen_head_gives_no_warning(make, changes):
    assert not caught(make(), **changes)


@pytest.mark.parametrize("head_trained, expected", [(True, 0), (False, 1)])
def test_a_head_known_to_be_trained_gives_no_warning(twins, head_trained, expected):
    ours, _ = twins()
    ours.head_trained = head_trained
    assert len(caught(ours, targets=("q_proj",))) == expected


def test_loading_an_adapter_gives_no_warning(bert, tmp_path):
    """Its file says what was trained; the head of its base may be trained."""
    config = peft.LoraConfig(r=2, target_modules=["query"])  # no task, hence no head
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(bert(), tmp_path)


# Errors


def tied() -> nn.Module:
    shape = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8}
    config = LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.lm_head = nn.Linear(8, 20, bias=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize(
    "make, changes, message",
    [
        (mlp, {"targets": ("0", "q_proj")},
         "no layer is named 'q_proj'; this model's linear layers: 0, 2, 4$"),
        (nn.ReLU, {}, r"no layer is named '0'; .* layers: \(none\)"),
        (mlp, {"rank": 11}, "rank 11 is too large for 2: at most 10"),
        (mlp, {"targets": ("0", "1")}, "1 is a ReLU: only nn.Linear can be adapted"),
        (mlp, {"targets": ("0", "4"), "rank": 1}, "4 is in targets and in also_train"),
        (lambda: nn.ModuleDict({"head": mlp()}), {"also_train": ("head",)},
         "head.0 is in targets and in also_train"),
        (tied, {"targets": ("q_proj",), "also_train": ("lm_head",)},
         "lm_head shares its weights with model.embed_tokens.weight"),
        (mlp, {"also_train": ("3",)}, "3 has no parameters to train: leave it out of also_train"),
        (lambda: nn.MultiheadAttention(8, 2), {"targets": ("out_proj",)},
         "out_proj is a NonDynamicallyQuantizableLinear: only nn.Linear"),
    ],
    ids=["no match", "no linear", "rank", "no nn.Linear", "head is target", "target in head",
         "tied head", "no parameters", "subclass"],
)  # fmt: skip
def test_an_error_says_what_there_is_and_leaves_the_model(make, changes, message):
    model = make()
    before = [(name, id(m)) for name, m in model.named_modules()]
    flags = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        apply_lora(model, mlp_config(**changes))
    assert [(name, id(m)) for name, m in model.named_modules()] == before
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == flags
    assert not hasattr(model, "lora_config")


def test_adapting_twice_is_refused(adapted_mlp):
    model = adapted_mlp()
    with pytest.raises(ValueError, match="already adapted"):
        apply_lora(model, mlp_config(rank=2, targets=("4",), also_train=()))
    assert model.lora_config == mlp_config() and type(model[4]) is nn.Linear


@pytest.mark.parametrize(
    "use", [merge_lora, lora_state_dict, lambda m: lora_disabled(m).__enter__()]
)
def test_a_model_without_lora_is_refused(use):
    with pytest.raises(ValueError, match="no LoRA layer"):
        use(mlp())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 0}, "rank is 0: expected a whole number of at least 1"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 8.0}, "rank is 8.0"),
        ({"rank": np.float64(8)}, "rank is .*8.0.*: expected a whole number"),
        ({"rank": np.True_}, "rank is .*True.*: expected a whole number"),
        ({"alpha": np.float32("nan")}, "alpha is .*nan"),
        ({"alpha": 0}, "alpha is 0: expected a positive number"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"dropout": 1.0}, "dropout is 1.0: expected 0 or more and less than 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ""}, "targets is empty"),
        ({"targets": "(q"}, r"targets holds '\(q', which is not a valid regular"),
        ({"targets": ("q_proj", "")}, r"targets is \('q_proj', ''\): expected a tuple of names"),
        ({"targets": (0, 2)}, r"targets is \(0, 2\): expected a tuple of names"),
        ({"targets": None}, "targets is None: expected a tuple of names"),
        ({"also_train": "score"}, "also_train is 'score'"),
        ({"also_train": None}, "also_train is None: expected a tuple of names"),
        ({"rank": True}, "rank is True: expected a whole number"),
        ({"alpha": None}, "alpha is None: expected a positive number"),
        ({"alpha": "16"}, "alpha is '16': expected a positive number"),
        ({"dropout": None}, "dropout is None: expected 0 or more and less than 1"),
        ({"layers": ()}, r"layers is \(\): expected a tuple of layer numbers"),
        ({"layers": (-1,)}, r"layers is \(-1,\): expected a tuple of layer numbers"),
        ({"layers": 3}, "layers is 3: expected a tuple of layer numbers"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0: expected a whole number"),
        ({"rank_pattern": [2]}, r"rank_pattern is \[2\]: expected a dictionary"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] is -1: expected a positive number"),
        ({"alpha_pattern": {"*": 1}}, r"alpha_pattern holds '\*', which is not a valid regular"),
    ],
)
def test_a_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**changes)


@pytest.mark.parametrize(
    "field, given, expected",
    [
        ("rank", np.int64(8), 8),
        ("rank", np.uint8(8), 8),
        ("alpha", np.int64(16), 16),
        ("alpha", np.float32(16), 16.0),
        ("alpha", Fraction(3, 2), 1.5),
        ("dropout", np.float64(0.1), 0.1),
        ("dropout", np.int32(0), 0),
    ],
)
def test_numbers_of_numpy_become_pythons(field, given, expected):
    """A grid of np.arange was refused, and JSON cannot hold NumPy's numbers."""
    kept = getattr(LoRAConfig(**{field: given}), field)
    assert kept == expected and type(kept) is type(expected)
    assert json.loads(json.dumps(kept)) == expected


def test_a_list_of_targets_becomes_a_tuple():
    config = LoRAConfig(targets=["a", "b"], also_train=[])
    assert (config.targets, config.also_train) == (("a", "b"), ())
    assert hash(config) == hash(LoRAConfig(targets=("a", "b"), also_train=()))


# Counting


def test_one_layer_trains_rank_times_the_sum_of_its_sides():
    assert lora_parameter_count(10_000, 20_000, 8) == 240_000
    layer = LoRALinear(nn.Linear(12, 10), LoRAConfig(rank=4))
    assert lora_parameter_count(10, 12, 4) == layer.lora_A.numel() + layer.lora_B.numel() == 88


def test_tinyllama_counts():
    """The figures of PEFT for five classes; its total counts the head twice."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4,
    )  # fmt: skip
    for rank, trainable in ((1, 151_040), (8, 1_136_640), (64, 9_021_440)):
        with torch.device("meta"):
            model = LlamaForSequenceClassification(config, 5)
        assert count_parameters(model).total == 1_034_522_624
        apply_lora(model, LoRAConfig(rank=rank))
        count = count_parameters(model)
        assert (count.trainable, count.other, count.lora) == (trainable, 10_240, 140_800 * rank)
        assert count.total == 1_034_522_624 + count.lora


def test_tied_weights_count_once():
    model = tied()
    norms, linears = 3 * 8, 4 * 8 * 8 + 3 * 8 * 8
    assert count_parameters(model).total == 20 * 8 + norms + linears


def test_pefts_adapters_count_too():
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"])
    model = peft.get_peft_model(mlp(), config)
    count = count_parameters(model)
    lora, head = 4 * (12 + 16) + 4 * (16 + 10), 10 * 3 + 3
    assert (count.lora, count.other, count.trainable) == (lora, head, lora + head)
    assert (count.trainable, count.total) == model.get_nb_trainable_parameters()


def test_counts_print_as_a_table(adapted_mlp):
    rows = str(count_parameters(adapted_mlp())).splitlines()
    assert [row.split()[-2:] for row in rows] == [
        ["617", "100.000%"],
        ["368", "59.643%"],
        ["249", "40.357%"],
        ["216", "35.008%"],
        ["33", "5.348%"],
    ]


def test_state_dict_holds_the_adapter_and_the_head(adapted_mlp):
    model = adapted_mlp()
    state = lora_state_dict(model)
    assert list(state) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B", "4.weight", "4.bias"]
    assert all(state[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters()
               if name in state)  # fmt: skip


def test_state_dict_of_a_part_holds_its_share(twins):
    ours, _ = twins()
    apply_lora(ours, LoRAConfig(rank=2, also_train=("norm", "score")))
    whole = lora_state_dict(ours)
    part = lora_state_dict(ours.model)
    assert {f"model.{name}" for name in part} == whole.keys() - {"score.weight"}
    assert all(torch.equal(tensor, whole[f"model.{name}"]) for name, tensor in part.items())


def test_state_dict_carries_a_heads_buffers():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.BatchNorm1d(4)})
    apply_lora(model, LoRAConfig(rank=1, targets=("body",), also_train=("head",)))
    inner = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert lora_state_dict(model).keys() == {"body.lora_A", "body.lora_B"} | {
        f"head.{name}" for name in inner
    }


def test_printing_a_layer_tells_what_it_trains():
    text = repr(LoRALinear(nn.Linear(12, 10), LoRAConfig(rank=4, alpha=8)))
    assert "in_features=12, out_features=10, bias=True, rank=4, alpha=8, scaling=2" in text
    assert "trains 88 beside 120" in text
