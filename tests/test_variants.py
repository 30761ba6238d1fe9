"""DoRA, PiSSA, OLoRA and LoRA+ against PEFT: the same initial tensors, steps and files."""

import copy
import dataclasses

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn

import clinora
from clinora.lora import (
    LoRAConfig,
    apply_lora,
    lora_layers,
    lora_strength,
    merge_lora,
    merged_weight,
)
from clinora.training import TrainingConfig, new_optimizer
from clinora.variants import DoRAConfig, OLoRAConfig, PiSSAConfig

IN_PEFT = {
    LoRAConfig: {},
    DoRAConfig: {"use_dora": True},
    PiSSAConfig: {"init_lora_weights": "pissa"},
    OLoRAConfig: {"init_lora_weights": "olora"},
}
VARIANTS = list(IN_PEFT)
SHIFTED = [PiSSAConfig, OLoRAConfig]
LENGTHS = [5, 12, 9, 3]
RANK = 4


@pytest.fixture
def pair(reference):
    """Adapt a base and its copy with our variant and with PEFT's, from the same tensors."""

    def make(kind, *, stabilized=False, patterns=None, **options):
        theirs, folder = reference()
        patterns = patterns or {}
        torch.manual_seed(1)
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj"],
            use_rslora=stabilized, **IN_PEFT[kind], **patterns, **options,
        )  # fmt: skip
        theirs = peft.get_peft_model(theirs, config)
        ours = clinora.load_model(folder, num_labels=5)
        dropout = options.get("lora_dropout", 0)
        own = kind(rank=RANK, alpha=8, dropout=dropout, rank_stabilized=stabilized, **patterns)
        apply_lora(ours, own)
        for name, layer in lora_layers(ours):
            module = theirs.base_model.model.get_submodule(name)
            copy_from_peft(layer, module)
        ours.score.weight.data = theirs.base_model.model.score.weight.detach().clone()
        ours.head_trained = True
        return ours.eval(), theirs.eval(), folder

    return make


def copy_from_peft(layer, module):
    A = module.lora_A["default"].weight.detach()
    B = module.lora_B["default"].weight.detach()
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        if isinstance(layer.config, PiSSAConfig):
            layer.first_A.copy_(A)
            layer.first_B.copy_(B)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def follow(ours, theirs, optimizers, notes, difference, steps):
    """Compare the logits before each step and after the last one."""
    for step in range(steps + 1):
        ids, lengths = notes(LENGTHS, seed=step)
        outputs = ours(ids, lengths), theirs(ids, attention_mask=(ids != 0).long()).logits
        gap = difference(*outputs)
        assert gap <= 1e-5, (step, gap)
        for logits, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 4])).backward()
            optimizer.step()


@pytest.mark.parametrize("stabilized", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("optimizer, steps", [("SGD", 10), ("AdamW", 1)])
def test_steps_follow_peft(pair, notes, difference, kind, stabilized, optimizer, steps):
    ours, theirs, _ = pair(kind, stabilized=stabilized)
    before = ours(*notes(LENGTHS)).detach()
    rate = {"SGD": 0.005, "AdamW": 1e-3}[optimizer]
    kinds = getattr(torch.optim, optimizer)
    optimizers = [kinds(trained(model), lr=rate) for model in (ours, theirs)]
    follow(ours, theirs, optimizers, notes, difference, steps)
    assert difference(ours(*notes(LENGTHS)), before) > 1e-2  # the steps are not nothing


@pytest.mark.parametrize("kind", VARIANTS)
def test_patterns_of_ranks_and_alphas_follow_peft(pair, notes, difference, kind):
    patterns = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.[02]\..*v_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    }
    ours, theirs, _ = pair(kind, patterns=patterns)
    ranks = {name: layer.lora_A.shape[0] for name, layer in lora_layers(ours)}
    assert sorted(ranks.values()) == [2, 3, 3, 4, 4, 4]
    optimizers = [torch.optim.SGD(trained(model), lr=0.05) for model in (ours, theirs)]
    follow(ours, theirs, optimizers, notes, difference, 3)


def test_loraplus_follows_peft(pair, notes, difference):
    ours, theirs, _ = pair(DoRAConfig)
    config = TrainingConfig(learning_rate=1e-3, lora_plus_ratio=16, weight_decay=0.0)
    mine = new_optimizer({n: p for n, p in ours.named_parameters() if p.requires_grad}, config)
    for group in mine.param_groups:
        group["lr"] = config.learning_rate * group["ratio"]
    own = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    follow(ours, theirs, [mine, own], notes, difference, 1)


def test_doras_dropout_acts_on_what_differs_from_the_base(pair):
    """With all inputs dropped or doubled, the expected outputs follow from the equation."""
    torch.manual_seed(0)
    layer = DoRAConfig(rank=2, alpha=4, dropout=0.5).new_layer(nn.Linear(6, 5).double())
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.mul_(1.5)
    W, A, B = layer.weight, layer.lora_A, layer.lora_B
    V = W + 2 * B @ A
    adapted = layer.lora_magnitude_vector[:, None] * V / V.square().sum(1).sqrt()[:, None]
    x = torch.eye(6).double()  # one entry each: dropped, or doubled
    y = layer.train()(x) - layer.bias
    for i in range(6):
        dropped = W[:, i]
        kept = W[:, i] + 2 * (adapted - W)[:, i]
        assert torch.allclose(y[i], dropped) or torch.allclose(y[i], kept)


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_new_layer_computes_what_the_base_did(kind):
    torch.manual_seed(0)
    base = nn.Linear(12, 16)
    x = torch.randn(7, 12)
    expected = base(x)
    layer = kind(rank=3, dropout=0).new_layer(copy.deepcopy(base))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", VARIANTS)
def test_strength_0_is_the_base_to_the_bit(reference, notes, kind, dtype):
    _, folder = reference()
    base = clinora.load_model(folder, num_labels=5, dtype=dtype).eval()
    ours = clinora.load_model(folder, num_labels=5, dtype=dtype).eval()
    apply_lora(ours, kind(rank=RANK, targets="all-linear"))
    change(ours)
    base.score.load_state_dict(ours.score.state_dict())
    batch = notes(LENGTHS)
    assert not torch.allclose(ours(*batch).float(), base(*batch).float(), rtol=0.1)
    with lora_strength(ours, 0):
        assert torch.equal(ours(*batch), base(*batch))


def change(model, std=0.1):
    """Change everything that is trained, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


@pytest.mark.parametrize("kind", VARIANTS)
def test_merging_keeps_the_function(pair, notes, difference, kind):
    ours, _, _ = pair(kind)
    change(ours)
    before = ours(*notes(LENGTHS))
    merge_lora(ours)
    assert not list(lora_layers(ours))
    assert difference(ours(*notes(LENGTHS)), before) <= 1e-5


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("kind", VARIANTS)
def test_what_was_saved_is_the_same_model_for_us_and_for_peft(
    pair, reference, notes, difference, tmp_path, kind, stabilized
):
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    ours, _, folder = pair(kind, patterns=patterns, stabilized=stabilized)
    change(ours)
    ids, lengths = notes(LENGTHS)
    expected = ours(ids, lengths)
    clinora.save_adapter(ours, tmp_path / "adapter")

    again = clinora.load_model(folder, num_labels=5).eval()
    clinora.load_adapter(again, tmp_path / "adapter")
    assert difference(again(ids, lengths), expected) <= 1e-5

    base, _ = reference()
    read = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    names = peft.get_peft_model_state_dict(read).keys()
    assert names == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert difference(read(ids, attention_mask=(ids != 0).long()).logits, expected) <= 1e-5


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_peft_saved_is_the_same_model(pair, notes, difference, tmp_path, kind):
    _, theirs, folder = pair(kind, patterns={"rank_pattern": {"k_proj|v_proj": 3}})
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ids, lengths = notes(LENGTHS)
    expected = theirs(ids, attention_mask=(ids != 0).long()).logits
    ours = clinora.load_model(folder, num_labels=5).eval()
    config = clinora.load_adapter(ours, tmp_path / "adapter")
    assert type(config) is kind
    assert difference(ours(ids, lengths), expected) <= 1e-5


@pytest.mark.parametrize("kind", SHIFTED)
def test_in_bfloat16_small_changes_are_not_lost(kind):
    """The change of W is a thousandth of it, less than bfloat16 resolves; its share is kept."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).bfloat16()
    layer = kind(rank=8, dropout=0).new_layer(base)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.mul_(1 + 1e-3 * torch.randn(factor.shape))
    W = base.weight.double()
    x = torch.randn(500, 64).bfloat16()
    A, B, A0, B0 = (
        tensor.double() for tensor in (layer.lora_A, layer.lora_B, layer.first_A, layer.first_B)
    )
    change = x.double() @ (B @ A - B0 @ A0).T * layer.config.scaling
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update_A, update_B = layer.factors(layer.lora_A, layer.lora_B)
        update = nn.functional.linear(nn.functional.linear(x, update_A), update_B)
    error = (update.double() * layer.config.scaling - change).norm() / change.norm()
    assert change.norm() < 0.01 * (x.double() @ W.T).norm()
    assert error < 0.01


def test_pissa_starts_from_the_largest_singular_triples():
    """What is left of W after s·B₀·A₀ is its best approximation's error: the other values."""
    torch.manual_seed(0)
    base = nn.Linear(10, 14, bias=False).double()
    layer = PiSSAConfig(rank=3, alpha=5).new_layer(base)
    rest = base.weight - 5 / 3 * layer.lora_B @ layer.lora_A
    values = torch.linalg.svdvals(base.weight.detach())
    expected = torch.cat([values[3:], torch.zeros(3).double()])
    torch.testing.assert_close(torch.linalg.svdvals(rest.detach()), expected, rtol=0, atol=1e-12)
    balanced = layer.lora_A.square().sum(1), layer.lora_B.square().sum(0)
    torch.testing.assert_close(*balanced)


def test_olora_starts_from_orthonormal_columns():
    torch.manual_seed(0)
    base = nn.Linear(10, 14, bias=False).double()
    layer = OLoRAConfig(rank=3).new_layer(base)
    torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(3).double())
    # The first r rows of R are upper triangular.
    assert torch.equal(layer.lora_A, layer.lora_A.triu())
    torch.testing.assert_close(layer.lora_B.T @ base.weight, layer.lora_A)


@pytest.mark.parametrize("kind", SHIFTED)
def test_a_rank_that_could_not_be_saved_is_refused(kind):
    model = nn.Sequential(nn.Linear(10, 14))
    with pytest.raises(ValueError, match="rank 6 is too large for 0: at most 5, half of its"):
        apply_lora(model, kind(rank=6, targets=("0",), also_train=()))


@pytest.mark.parametrize("kind", SHIFTED)
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(kind):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    with torch.no_grad():
        model[1].weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="the weight of 1 has values that are not finite"):
        apply_lora(model, kind(rank=2, targets=("0", "1"), also_train=()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_row_of_zeros_stays_zero_under_dora():
    base = nn.Linear(6, 8, bias=False)
    with torch.no_grad():
        base.weight[3] = 0
    x = torch.randn(5, 6)
    expected = base(x)
    layer = DoRAConfig(rank=2, dropout=0).new_layer(base)
    torch.testing.assert_close(layer(x), expected)
    assert merged_weight(layer).isfinite().all()


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_compiled_layer_computes_the_same(kind):
    torch.manual_seed(0)
    layer = kind(rank=2, dropout=0).new_layer(nn.Linear(6, 8))
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(5, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_doras_magnitudes_are_counted_as_lora(pair):
    ours, theirs, _ = pair(DoRAConfig)
    count = clinora.count_parameters(ours)
    assert count.trainable == sum(p.numel() for p in trained(theirs))
    assert count.other == ours.score.weight.numel()


def test_doras_updates_are_measured(pair):
    from clinora.explain import layer_updates

    ours, _, _ = pair(DoRAConfig)
    change(ours)
    for update in layer_updates(ours):
        layer = ours.get_submodule(update.name)
        V = layer.weight + 2 * layer.lora_B @ layer.lora_A
        merged = layer.lora_magnitude_vector[:, None] * V / V.norm(dim=1, keepdim=True)
        share = (merged - layer.weight).norm() / layer.weight.norm()
        assert update.share == pytest.approx(share.item(), rel=1e-5)


def test_a_configuration_of_a_variant_keeps_its_kind():
    config = PiSSAConfig(rank=4)
    assert type(dataclasses.replace(config, rank=2)) is PiSSAConfig
    assert config != LoRAConfig(rank=4)


EQUATIONS = {
    LoRAConfig: ("LoRA", "W + (α/r)·B·A", "W + (α/√r)·B·A"),
    DoRAConfig: (
        "DoRA",
        "m ∘ V/‖V‖ with V = W + (α/r)·B·A",
        "m ∘ V/‖V‖ with V = W + (α/√r)·B·A",
    ),
    PiSSAConfig: ("PiSSA", "W + (α/r)·(B·A − B₀·A₀)", "W + (α/√r)·(B·A − B₀·A₀)"),
    OLoRAConfig: ("OLoRA", "W + (α/r)·(B·A − B₀·A₀)", "W + (α/√r)·(B·A − B₀·A₀)"),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_each_variant_has_its_name_and_equation(kind):
    stabilized = kind(rank_stabilized=True)
    assert (kind.variant, kind().equation, stabilized.equation) == EQUATIONS[kind]
