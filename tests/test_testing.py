"""Each assertion passes on a good model, and says why it fails on one made wrong on purpose."""

import copy
import time

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from clinora.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from clinora.lora import LoRAConfig, LoRALinear, apply_lora
from clinora.testing import (
    assert_adapter_takes_part,
    assert_adapters_equal,
    assert_merge_moves_at_most,
    assert_saves_at_least,
    assert_trains_at_most,
    assert_trains_exactly,
    base_unchanged,
    every_layer_learns,
    output_unchanged,
)

TRAINED = ["lora_A", "lora_B", "score"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.down = nn.Linear(8, 6)
        self.score = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.down(self.norm(self.up(x)).relu()))


def with_ours(model: nn.Module) -> nn.Module:
    apply_lora(model, LoRAConfig(rank=2, alpha=4, targets=("up", "down"), dropout=0.5))
    return model


def with_peft(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft_config())


def with_injected_peft(model: nn.Module) -> nn.Module:
    return peft.inject_adapter_in_model(peft_config(), model)


def peft_config(**changes) -> peft.LoraConfig:
    kept = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": ["up", "down"]}
    return peft.LoraConfig(**kept | {"modules_to_save": ["score"]} | changes)


@pytest.fixture(params=[with_ours, with_peft, with_injected_peft])
def adapt(request):
    """Put an adapter and a trained head on a Net, by each library."""
    return request.param


@pytest.fixture
def net(adapt):
    return adapt(Net().eval()).eval()


def fails(message: str):
    return pytest.raises(AssertionError, match=message)


def named(model: nn.Module, ending: str) -> nn.Parameter:
    """Find the first parameter with a segment in its name, whatever library named it."""
    found = [p for n, p in model.named_parameters() if f".{ending}." in f".{n}."]
    return found[0]


def step(model: nn.Module, lr: float = 0.1, optimizer=None) -> None:
    optimizer = optimizer or torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=lr
    )
    optimizer.zero_grad()
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()


# assert_trains_exactly


def test_exactly_the_named_parameters_train(net):
    assert_trains_exactly(net, TRAINED)
    assert_trains_exactly(net, (name for name in TRAINED))


def test_full_names_and_longer_endings_name_parameters_too():
    model = with_ours(Net())
    names = ["up.lora_A", "down.lora_A", "up.lora_B", "down.lora_B", "score.weight", "score.bias"]
    assert_trains_exactly(model, names)


def test_a_parameter_that_should_not_train_is_named(net):
    named(net, "norm").requires_grad_(True)
    with fails(r"trained, but not expected to \(1\): .*norm.weight"):
        assert_trains_exactly(net, TRAINED)


def test_a_frozen_parameter_that_should_train_is_named(net):
    named(net, "down.lora_B").requires_grad_(False)
    with fails(r"to train, but frozen \(1\): .*down.lora_B"):
        assert_trains_exactly(net, TRAINED)


def test_a_name_that_fits_nothing_is_named(net):
    message = r"no parameter has this name \(2\): classifier, lora"  # lora is part of a segment
    with fails(message):
        assert_trains_exactly(net, [*TRAINED, "lora", "classifier"])


def test_a_frozen_head_is_noticed():
    for model in (with_ours(Net()), with_peft(Net())):
        for name, parameter in model.named_parameters():
            if "score" in name:
                parameter.requires_grad_(False)
        with fails(r"but frozen \(2\): .*score.*weight, .*score"):
            assert_trains_exactly(model, TRAINED)


def test_pefts_copy_of_the_head_must_stay_frozen():
    model = with_peft(Net())
    named(model, "original_module").requires_grad_(True)
    with fails(r"not expected to \(1\): .*score.original_module.weight$"):
        assert_trains_exactly(model, TRAINED)


def test_many_names_are_counted_not_listed():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    with fails(r"\(20\): 0.weight, .*, 3.bias and 12 more"):
        assert_trains_exactly(model, [])


def test_no_names_means_that_all_is_frozen():
    assert_trains_exactly(Net().requires_grad_(False), [])


def test_a_tied_parameter_goes_by_either_name():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    assert_trains_exactly(model, ["lm_head"])
    assert_trains_exactly(model, ["embed"])


def test_a_string_for_names_is_refused():
    with pytest.raises(ValueError, match="'lora_A'"):
        assert_trains_exactly(Net(), "lora_A")


# assert_trains_at_most

ADAPTER, HEAD = 2 * (6 + 8) + 2 * (8 + 6), 6 * 3 + 3
FROZEN = 6 * 8 + 8 + 2 * 8 + 8 * 6 + 6


def test_limits_hold_up_to_equality(adapt):
    model = adapt(Net())
    kept = sum("original_module" in name for name, _ in model.named_parameters())
    total = ADAPTER + HEAD + FROZEN + (HEAD if kept else 0)  # PEFT keeps the old head as well
    trained = ADAPTER + HEAD
    assert_trains_at_most(
        model, parameters=trained, percent=100 * trained / total, megabytes=4 * trained / 1e6
    )


@pytest.mark.parametrize(
    "limit, message",
    [
        ({"parameters": 76}, r"^77 parameters train, expected at most 76\n"),
        ({"megabytes": 0.0003}, r"^0.000308 megabytes train, expected at most 0.0003\n"),
        ({"percent": 20, "parameters": 77}, r"^\d\d\.\d+ percent train, expected at most 20\n"),
        (
            {"parameters": 1, "percent": 1},
            r"^77 parameters .*\n.* percent train, .*\ntrained, largest",
        ),
    ],
)
def test_limits_exceeded_are_named(net, limit, message):
    with fails(message):
        assert_trains_at_most(net, **limit)


def test_the_largest_culprit_comes_first(net):
    named(net, "up.base_layer" if "base_layer" in str(net) else "up").requires_grad_(True)
    with fails(r"largest first \(\d+\): \S*up\S*weight, "):
        assert_trains_at_most(net, parameters=77)


def test_megabytes_are_those_of_the_dtype():
    model = nn.Linear(1000, 1000, bias=False).bfloat16()
    assert_trains_at_most(model, megabytes=2)
    with fails("4 megabytes train"):
        assert_trains_at_most(model.float(), megabytes=2)


def test_tied_weights_are_limited_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    assert_trains_at_most(model, parameters=20)


def test_a_model_that_trains_nothing_is_no_success():
    with fails("none of 147 parameters trains"):
        assert_trains_at_most(Net().requires_grad_(False), parameters=1000)


def test_a_limit_must_be_given():
    with pytest.raises(ValueError, match="no limit is given"):
        assert_trains_at_most(Net())


# The meta device


def test_a_70b_shape_is_checked_in_seconds():
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    start = time.perf_counter()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    apply_lora(model, LoRAConfig(rank=16, also_train=()))
    assert_trains_exactly(
        model, ["q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B"]
    )
    lora = 80 * 16 * ((8192 + 8192) + (8192 + 1024))
    assert sum(p.numel() for p in model.parameters()) - lora == 68_976_648_192  # Llama 2 70B's
    assert_trains_at_most(model, parameters=lora, percent=0.048, megabytes=lora * 4 / 1e6)
    with fails(r"^32,768,000 parameters train"):
        assert_trains_at_most(model, parameters=lora - 1)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("library", [with_ours, with_peft])
def test_what_needs_weights_refuses_the_meta_device(library):
    with torch.device("meta"):
        model, x = library(Net()).eval(), torch.empty(2, 6)
    assert_trains_exactly(model, TRAINED)
    with pytest.raises(ValueError, match="meta device"), base_unchanged(model):
        pass
    with pytest.raises(ValueError, match="meta device"), output_unchanged(model, x):
        pass
    with pytest.raises(ValueError, match="meta device"):
        assert_merge_moves_at_most(model, 1.0, x)


# base_unchanged


def test_a_right_step_leaves_the_base(net):
    with base_unchanged(net):
        step(net)


def test_a_step_of_the_base_is_noticed(net):
    weight = named(net, "norm")
    with (
        fails(r"the base's \d+ tensors, these changed \(1\): \S*norm.weight\n"),
        base_unchanged(net),
    ):
        step(net)
        weight.data[3] += 1e-6


def test_unfreezing_inside_the_step_is_noticed(net):
    weight = named(net, "norm")

    def wrong_step() -> None:
        weight.requires_grad_(True)
        step(net)

    with fails(r"norm\.weight"), base_unchanged(net):
        wrong_step()


def test_running_statistics_are_the_bases(net):
    net.train()
    with fails(r"norm.running_mean, .*norm.running_var, .*batches"), base_unchanged(net):
        step(net)


def test_running_statistics_of_a_trained_module_are_its_own():
    model = Net()
    apply_lora(model, LoRAConfig(rank=2, targets=("up", "down"), also_train=("score", "norm")))
    with base_unchanged(model):
        step(model.train())


@pytest.mark.parametrize("before, after", [(0.0, -0.0), (1.0, float("nan")), (1.0, 1.0 + 2**-23)])
def test_every_bit_counts(before, after):
    model = with_ours(Net().eval())
    model.norm.bias.data.fill_(before)

    def wrong_step() -> None:
        step(model)
        model.norm.bias.data[0] = after

    with fails(r"norm\.bias"), base_unchanged(model):
        wrong_step()


def test_a_nan_that_stays_is_no_change():
    model = with_ours(Net().eval())
    model.norm.bias.data[0] = float("nan")
    with base_unchanged(model):
        model.score.bias.data += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bits_of_other_dtypes_and_shapes_compare(dtype):
    model = with_ours(Net().eval().to(dtype))
    model.register_buffer("strided", torch.arange(12).reshape(3, 4).T)
    model.register_buffer("every_other", torch.arange(12)[::2])
    model.register_buffer("scalar", torch.tensor(True))
    with base_unchanged(model):
        model.score.bias.data += 1
    for buffer in (model.strided[1], model.scalar, model.down.weight.data):
        with (
            fails(r"the base's 12 tensors, these changed \(1\): "),
            base_unchanged(model),
        ):
            buffer.copy_(buffer == 0)


def test_tied_tensors_of_the_base_are_found_under_each_name():
    model = with_ours(Net().eval())
    model.register_buffer("twin", model.norm.running_mean)
    model.extra = nn.Linear(8, 6, bias=False)
    model.extra.weight = model.down.weight
    with base_unchanged(model):
        model.score.bias.data += 1
    with fails(r"\(2\): twin, norm.running_mean"), base_unchanged(model):
        model.twin += 1


def test_another_shape_of_the_output_is_noticed():
    model = Net().eval()
    message = r"was torch.float32 of shape \(4, 3\), is torch.float32 of shape \(4, 2\) .* to inf"
    with fails(message), output_unchanged(model, torch.randn(4, 6)):
        model.score = nn.Linear(6, 2)


def test_a_base_cast_to_another_dtype_is_noticed(net):
    with fails("of the base's .* changed"), base_unchanged(net):
        net.double()


def test_a_base_that_is_gone_is_noticed(net):
    parent = net.base_model.model if hasattr(net, "base_model") else net
    with fails(r"changed \(5\): .*norm\.weight"), base_unchanged(net):
        parent.norm = nn.Identity()


def test_a_step_that_moves_nothing_is_no_success(net):
    with fails(r"none of the 6 trained parameters changed"), base_unchanged(net):
        step(net, lr=0.0)


def test_an_optimizer_of_another_model_is_noticed(net):
    other = torch.optim.SGD(copy.deepcopy(net).parameters(), lr=0.1)
    with fails("the optimiser have this model's"), base_unchanged(net):
        step(net, optimizer=other)


def test_a_frozen_model_trains_nothing():
    model = Net().eval().requires_grad_(False)
    with fails("none of the 0 trained"), base_unchanged(model):
        model(torch.randn(4, 6))


def test_an_exception_of_the_step_comes_through(net):
    with pytest.raises(KeyError), base_unchanged(net):
        raise KeyError


# output_unchanged


def test_a_new_adapter_changes_no_output(adapt):
    model = Net().eval()
    with output_unchanged(model, torch.randn(4, 6)):
        adapt(model)


def test_modes_are_put_back(adapt):
    model = Net().train()
    model.norm.eval()
    with output_unchanged(model, torch.randn(4, 6)):
        assert model.training and not model.norm.training
        adapt(model)
    assert model.training and not model.norm.training
    modes = [m.training for n, m in model.named_modules() if n.endswith(("up", "down"))]
    assert modes == [True, True]


def test_dropout_of_the_model_is_off_meanwhile(adapt):
    model = Net().train()
    model.norm = nn.Dropout(0.5)
    with output_unchanged(model, x=torch.randn(4, 6)):
        adapt(model)


def test_an_adapter_that_starts_off_zero_is_noticed(adapt, fill_b):
    model = Net().eval()
    with (
        fails(r"and moved by up to 0\.\d+: a new adapter must add exactly zero"),
        output_unchanged(model, torch.randn(4, 6)),
    ):
        adapt(model)
        fill_b(model)


def test_pefts_other_initialisation_is_noticed():
    model = Net().eval()
    with fails("must add exactly zero"), output_unchanged(model, torch.randn(4, 6)):
        peft.get_peft_model(model, peft_config(init_lora_weights=False))


def test_a_new_dtype_of_the_output_is_noticed():
    """torch.equal would take float32 zeros for bfloat16 zeros."""
    model = Net().eval().bfloat16()
    model.score.requires_grad_(False).weight.zero_(), model.score.bias.zero_()
    message = r"the output was torch.bfloat16 of shape \(4, 3\), is torch.float32 of shape"
    with fails(message), output_unchanged(model, torch.randn(4, 6).bfloat16()):
        with_ours(model)
        model.score.register_forward_hook(lambda head, inputs, output: output.float())


def test_adapting_a_copy_is_noticed(adapt):
    model = Net().eval()
    with fails("adapt a copy"), output_unchanged(model, torch.randn(4, 6)):
        adapt(copy.deepcopy(model))


class Wrapped(nn.Module):
    """A model that returns its logits among other things."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.net, self.wrap = Net().eval(), wrap

    def forward(self, x: torch.Tensor) -> object:
        return self.wrap(self.net(x))


class Record:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"loss": torch.zeros(()), "logits": y},
        lambda y: (None, [y, torch.zeros(())]),
        lambda y: {"hidden": y},
        Record,
    ],
    ids=["logits", "first", "mapping", "attribute"],
)
def test_outputs_of_several_parts_are_compared(wrap, fill_b):
    model, x = Wrapped(wrap), torch.randn(4, 6)
    with output_unchanged(model, x):
        with_ours(model)
    model = Wrapped(wrap)
    with fails("and moved by up to 0"), output_unchanged(model, x):
        fill_b(with_ours(model))


def test_an_output_that_the_model_owns_is_kept():
    """A model may return a buffer of its own, which the block then writes to."""
    model = Wrapped(lambda y: model.state)
    model.register_buffer("state", torch.zeros(3))
    with fails("moved by up to 1: "), output_unchanged(model, torch.randn(4, 6)):
        with_ours(model).state.add_(1)


def test_an_output_without_a_tensor_is_refused():
    with (
        pytest.raises(ValueError, match="the model gave no tensor"),
        output_unchanged(Wrapped(lambda y: {"n": len(y)}), torch.randn(4, 6)),
    ):
        pass


def test_an_output_of_transformers(reference, notes, fill_b):
    model, _ = reference()
    ids, _ = notes((9, 4))
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    with output_unchanged(model, input_ids=ids, labels=torch.tensor([0, 1])):
        adapted = peft.get_peft_model(model, config)
    fill_b(adapted)
    assert_merge_moves_at_most(adapted, 1e-5, input_ids=ids)


# assert_merge_moves_at_most


def test_merging_moves_rounding_alone(net, fill_b):
    x, before = torch.randn(4, 6), copy.deepcopy(fill_b(net).state_dict())
    assert_merge_moves_at_most(net, 1e-5, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_merging_leaves_modes_and_layers(net, fill_b):
    text, modes = str(fill_b(net).train()), [m.training for m in net.modules()]
    assert_merge_moves_at_most(net, 1e-5, torch.randn(4, 6))
    assert str(net) == text and [m.training for m in net.modules()] == modes


def test_merging_into_bfloat16_moves_more_than_float32_allows(adapt, fill_b):
    model = fill_b(adapt(Net().eval().bfloat16()), std=0.5)
    x = torch.randn(4, 6).bfloat16()
    assert_merge_moves_at_most(model, 0.5, x)
    message = (
        r"merging moved the output by up to \d.*, expected at most 1e-06 \(torch\.\w+ of shape"
    )
    with fails(message):
        assert_merge_moves_at_most(model, 1e-6, x)


def test_a_wrong_merge_is_noticed(net, fill_b):
    """What the layers compute and what merging reads differ by half of the update."""
    fill_b(net, std=0.5)
    for module in net.modules():
        if isinstance(module, LoRALinear):
            module.strength = 1.5
        elif hasattr(module, "lora_B"):
            module.lora_B["default"].register_forward_hook(lambda _, x, y: 1.5 * y)
    with fails("expected at most 1e-05"):
        assert_merge_moves_at_most(net, 1e-5, torch.randn(4, 6))


def test_a_nan_is_not_within_any_limit(net, fill_b):
    fill_b(net)
    named(net, "norm").data[0] = float("nan")
    with fails("up to nan"):
        assert_merge_moves_at_most(net, 1e9, torch.randn(4, 6))


def test_merging_an_adapter_of_zeros_is_no_success(net):
    with fails("no lora_B differs from zero"):
        assert_merge_moves_at_most(net, 1.0, torch.randn(4, 6))


def test_merging_a_model_without_an_adapter_is_no_success():
    with fails("no lora_B"):
        assert_merge_moves_at_most(Net(), 1.0, torch.randn(4, 6))


# The example of the module's documentation, on a Llama


# --- assert_adapter_takes_part ---


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_that_takes_part_passes_and_the_model_stays_as_it_is(adapt, training):
    model = adapt(Net()).train(training)
    model(torch.randn(4, 6)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad for p in model.parameters()]
    assert_adapter_takes_part(model, torch.randn(4, 6))
    assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert model.training == training


class ReadsAWeight(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu()
        return self.score(nn.functional.linear(hidden, self.down.weight, self.down.bias))


class CutsTheGradientOff(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.down(self.up(x).relu().detach()))


class CheckpointsWithoutAGradientAtItsInput(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(checkpoint(lambda x: self.down(self.up(x)), x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(
    ("kind", "without_gradient", "without_effect"),
    [
        (ReadsAWeight, {"down"}, {"down"}),
        (CutsTheGradientOff, {"up"}, set()),
        (CheckpointsWithoutAGradientAtItsInput, {"up", "down"}, set()),
    ],
)
def test_a_b_that_takes_no_part_is_named(kind, without_gradient, without_effect):
    model = with_ours(kind())
    with pytest.raises(AssertionError) as caught:
        assert_adapter_takes_part(model, torch.randn(4, 6))
    lines = str(caught.value).splitlines()
    named = [{name for name in ("up", "down") if f"{name}.lora_B" in line} for line in lines]
    assert named == [names for names in (without_gradient, without_effect) if names]


def test_mambas_time_step_takes_no_part():
    """Transformers reads dt_proj's weight, so that PEFT's LoRA does nothing there either."""
    shape = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    model = transformers.MambaForCausalLM(shape)
    apply_lora(model, LoRAConfig(rank=1, targets=("dt_proj", "x_proj"), also_train=()))
    with pytest.raises(AssertionError, match=r"\(1\): .*dt_proj"):
        assert_adapter_takes_part(model, torch.randint(3, 50, (1, 9)))


def test_a_model_without_an_adapter_has_no_part_to_take():
    with pytest.raises(AssertionError, match="lora_B"):
        assert_adapter_takes_part(Net(), torch.randn(4, 6))


def test_the_documented_example(twins, notes, fill_b):
    model, _ = twins()
    assert isinstance(model, LlamaForSequenceClassification)
    ids, lengths = notes((9, 4, 1))
    with output_unchanged(model, ids, lengths):
        apply_lora(model, LoRAConfig(rank=8))
    assert_trains_exactly(model, TRAINED)
    assert_trains_at_most(model, percent=10, megabytes=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with base_unchanged(model):
        model(ids, lengths).square().sum().backward()
        optimizer.step()
    assert_merge_moves_at_most(model, 1e-5, ids, lengths)


# --- savings ---


def test_savings_are_the_parameters_of_full_fine_tuning_over_those_trained(adapt):
    """Up 6·8 + 8, norm 16, down 8·6 + 6, score 6·3 + 3; A and B of rank 2: 2·(6 + 8) twice."""
    model = adapt(Net())
    full = 56 + 16 + 54 + 21
    trained = 2 * 2 * (6 + 8) + 21
    assert_saves_at_least(model, times=full / trained)
    with pytest.raises(AssertionError, match=rf"trains {full} parameters, this model {trained}: "):
        assert_saves_at_least(model, times=full / trained + 1e-6)


def test_the_savings_of_a_model_of_70_billion_are_counted_without_weights():
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    apply_lora(model, LoRAConfig(rank=8))
    # r·(in + out) of q (8192 → 8192) and v (8192 → 1024) in 80 layers.
    trained = 80 * 8 * (8192 + 8192 + 8192 + 1024)
    assert_saves_at_least(model, times=70_553_706_496 // trained)


@pytest.mark.parametrize("times", [float("nan"), 1e9])
def test_savings_that_are_not_reached_fail(times):
    with pytest.raises(AssertionError, match="times fewer, expected at least"):
        assert_saves_at_least(with_ours(Net()), times=times)


def test_savings_of_what_does_not_train_are_none():
    with pytest.raises(AssertionError, match="none of 147 parameters trains"):
        assert_saves_at_least(Net().requires_grad_(False), times=1)


# --- learning ---


def train_step(model, x):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()


def test_a_step_teaches_every_layer(adapt):
    model = adapt(Net())
    with every_layer_learns(model):
        train_step(model, torch.randn(5, 6))


def test_a_layer_that_the_optimiser_does_not_have_learns_nothing(adapt):
    model = adapt(Net())
    for name, parameter in model.named_parameters():
        if "up" in name and "lora_B" in name:
            parameter.requires_grad_(False)
    with (
        pytest.raises(AssertionError, match=r"of 2 adapted layers, these did not learn .*up"),
        every_layer_learns(model),
    ):
        train_step(model, torch.randn(5, 6))


def test_without_an_adapter_nothing_learns():
    with pytest.raises(AssertionError, match="apply the adapter first"), every_layer_learns(Net()):
        pass


# --- equal adapters ---


def test_ours_and_pefts_adapter_are_equal_by_name_and_value():
    torch.manual_seed(0)
    ours = with_ours(Net())
    theirs = with_peft(Net())
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                short = name.removeprefix("base_model.model.").replace(".modules_to_save", "")
                parts = short.replace(".default", "")
                own[parts.replace("A.weight", "A").replace("B.weight", "B")].copy_(parameter)
    assert_adapters_equal(ours, theirs)
    theirs.requires_grad_(False)  # as PEFT loads an adapter for inference
    assert_adapters_equal(theirs, ours)


def test_adapters_that_differ_are_told_apart(adapt):
    torch.manual_seed(0)
    model = adapt(Net())
    other = copy.deepcopy(model)
    assert_adapters_equal(model, other)
    (name,) = [n for n, _ in other.named_parameters() if "down" in n and "lora_B" in n]
    with torch.no_grad():
        other.get_parameter(name)[1, 1] += 0.25
    with pytest.raises(AssertionError, match=r"these differ \(1\): down\.lora_B \(by up to 0.25\)"):
        assert_adapters_equal(model, other)
    assert_adapters_equal(model, other, limit=0.25)
    with torch.no_grad():
        other.get_parameter(name)[1, 1] = float("nan")
    with pytest.raises(AssertionError, match="these differ"):
        assert_adapters_equal(model, other, limit=1e9)


def test_equal_tensors_with_another_scaling_are_no_equal_adapters():
    model = Net()
    apply_lora(model, LoRAConfig(rank=2, alpha=4, targets=("up",)))
    torch.manual_seed(0)
    other = Net()
    apply_lora(other, LoRAConfig(rank=2, alpha=400, targets=("up",)))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(model.get_parameter(name))
    with pytest.raises(AssertionError, match=r"these differ \(1\): up \(scaling 2 and 200\)"):
        assert_adapters_equal(model, other)


def test_a_layer_of_one_model_alone_is_named():
    model = with_ours(Net())
    other = Net()
    apply_lora(other, LoRAConfig(rank=2, targets=("up",)))
    with pytest.raises(AssertionError, match=r"first model alone \(2\): down.lora_A, down.lora_B"):
        assert_adapters_equal(model, other)
    with pytest.raises(AssertionError, match=r"second model alone \(2\): down.lora_A"):
        assert_adapters_equal(other, model)
    with pytest.raises(AssertionError, match="apply the adapter first"):
        assert_adapters_equal(Net(), Net())
