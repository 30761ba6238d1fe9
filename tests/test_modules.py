"""Models under wrappers, with hooks, and in other dtypes: LoRA loses nothing of them."""

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import clinora
from clinora import LoRAConfig
from clinora.llama import (
    DecoderLayer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from clinora.modules import named_modules

ROOT = Path(__file__).parents[1]
CONFIG = LoRAConfig(rank=2, targets=("0",), also_train=("2",), dropout=0.0)
NOTE = torch.tensor([[1, 5, 9]]), torch.tensor([3])


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)


def llama():
    shape = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(shape, 3)
    clinora.apply_lora(model, LoRAConfig(rank=2, dropout=0.0))
    model.head_trained = True
    return model


# --- Wrappers ---


def part_parallel(model):
    model.model = nn.DataParallel(model.model)
    return model


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, DecoderLayer))
    return model


def layers_compiled(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


WRAPPERS = {
    "activation checkpointing": checkpointed,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "torch.compile of layers": layers_compiled,
    "both": lambda model: torch.compile(checkpointed(model), backend="eager"),
    "DataParallel": nn.DataParallel,
    "DataParallel of a part": part_parallel,
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return WRAPPERS[request.param]


def test_a_wrapped_model_saves_the_files_of_the_bare_one(tmp_path, wrap):
    clinora.save_adapter(llama(), tmp_path / "bare")
    clinora.save_adapter(wrap(llama()), tmp_path / "wrapped")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        bare = (tmp_path / "bare" / name).read_bytes()
        assert (tmp_path / "wrapped" / name).read_bytes() == bare


def test_a_wrapped_model_has_the_names_of_the_bare_one(wrap):
    expected = [name for name, _ in llama().named_modules()]
    assert [name for name, _ in named_modules(wrap(llama()))] == expected


def test_a_wrapped_model_trains_as_the_bare_one(wrap):
    gradients = []
    for model in (llama(), wrap(llama())):
        model(*NOTE).square().sum().backward()
        adapter = clinora.lora_state_dict(model).keys()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(trained) == len(adapter)
        gradients.append(trained)
    for bare, wrapped in zip(*gradients, strict=True):
        torch.testing.assert_close(wrapped, bare, rtol=0, atol=1e-6)


def test_a_wrapped_model_is_adapted_loaded_and_merged_as_the_bare_one(tmp_path, wrap):
    expected = llama()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    clinora.save_adapter(expected, tmp_path)
    model = clinora.merge_lora(llama())  # B is zero
    model.head_trained = False
    model = wrap(model)
    clinora.load_adapter(model, tmp_path)
    clinora.save_adapter(model, tmp_path / "again")  # the head was trained
    clinora.merge_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(model(*NOTE), expected(*NOTE))


def test_checkpointed_layers_with_lora_compile_as_one_graph():
    model = checkpointed(llama())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*NOTE), model(*NOTE), rtol=0, atol=1e-6)


class Engine(nn.Module):
    """Passes on the attributes of the model inside, as the wrappers of some libraries do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        if name == "module":
            return super().__getattr__(name)
        return getattr(self.module, name)


def test_a_wrapper_of_another_library_is_refused(tmp_path):
    with pytest.raises(ValueError, match="wrapper"):
        clinora.save_adapter(Engine(llama()), tmp_path / "adapter")


def test_a_head_that_was_never_trained_is_refused_under_wrappers_too(tmp_path, wrap):
    model = llama()
    model.head_trained = False
    wrapped = wrap(model)
    with pytest.raises(ValueError, match="head_trained"):
        clinora.save_adapter(wrapped, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


SHARDED = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
import clinora
from clinora.llama import DecoderLayer
from tests.test_modules import NOTE, llama

dist.init_process_group("gloo")

def wrap(model, kind):
    if kind == "FSDP1":
        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({DecoderLayer}), use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    if kind == "FSDP2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model) if kind == "DDP" else model

def refused(call, *arguments):
    try:
        call(*arguments)
    except ValueError:
        return True
    return False

for kind in ("DDP", "FSDP1", "FSDP2"):
    base = wrap(clinora.merge_lora(llama()), kind) if kind != "DDP" else None
    if kind == "DDP":
        base = DistributedDataParallel(clinora.merge_lora(llama()).requires_grad_(True))
    assert refused(clinora.apply_lora, base, clinora.LoRAConfig(rank=2)), kind
for kind in ("FSDP1", "FSDP2"):
    assert refused(clinora.merge_lora, wrap(llama(), kind)), kind
inner = wrap(llama(), "FSDP1").module
assert refused(clinora.save_adapter, inner, f"{sys.argv[1]}/inner-{dist.get_rank()}")

for kind in ("bare", "DDP", "FSDP1", "FSDP2"):
    model = wrap(llama(), kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(*NOTE).square().sum().backward()
    optimizer.step()
    clinora.save_adapter(model, f"{sys.argv[1]}/{kind}-{dist.get_rank()}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_that_share_or_shard_a_model_save_what_one_would(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*torchrun, tmp_path / "sharded.py", tmp_path], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = load_file(tmp_path / "bare-0" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in expected.items() if "lora_B" in name)
    for kind in ("DDP", "FSDP1", "FSDP2"):
        for rank in (0, 1):
            saved = load_file(tmp_path / f"{kind}-{rank}" / "adapter_model.safetensors")
            assert saved.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_of_transformers_changes_no_gradient(adapted_twins, notes):
    _, model, _ = adapted_twins(LoRAConfig(rank=2, dropout=0.0))
    theirs = model.merge_and_unload().train()
    clinora.apply_lora(theirs, LoRAConfig(rank=2, dropout=0.0))
    ids, _ = notes((7, 7))
    gradients = []
    for _ in range(2):
        theirs.zero_grad()
        theirs(ids).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in theirs.named_parameters() if p.requires_grad})
        theirs.gradient_checkpointing_enable()
    plain, checkpointed = gradients
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())
    assert all(gradient.any() for name, gradient in plain.items() if "lora_B" in name)


# --- What would be lost ---


def test_a_trained_parameter_outside_the_adapter_is_named_at_saving(tmp_path):
    model = llama()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        clinora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_outside_the_adapter_are_named_at_saving(tmp_path, recwarn, norm):
    model = nn.Sequential(
        nn.Linear(4, 4), norm(8, track_running_stats=True), nn.Linear(4, 4), nn.BatchNorm1d(8)
    )
    clinora.apply_lora(model, LoRAConfig(rank=2, targets=("0",), also_train=("2", "3")))
    model.eval()(torch.randn(8, 8, 4))
    clinora.save_adapter(model.half(), tmp_path)
    assert len(recwarn) == 0  # nothing but the dtype has changed
    model.float().train()(torch.randn(8, 8, 4))
    with pytest.warns(UserWarning) as caught:
        clinora.save_adapter(model, tmp_path)
    (warning,) = caught
    assert " 1," in str(warning.message)  # not 3, which the adapter holds


def test_a_model_of_which_a_part_was_merged_is_not_saved(tmp_path):
    model = llama()
    clinora.merge_lora(model.model.layers[0])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj"):
        clinora.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_the_head_too_is_not_trained_whole(tmp_path, tied):
    """PEFT trains a copy of the embedding, and the head keeps the old one."""
    shape = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    clinora.apply_lora(model, LoRAConfig(rank=2, also_train=("embed_tokens",)))
    with pytest.raises(ValueError, match="embed_tokens") if tied else nullcontext():
        clinora.save_adapter(model, tmp_path)


# --- Layers that are not plain ---

UNPLAIN = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "bias pruned": lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized": parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("way", UNPLAIN)
def test_a_layer_whose_weights_are_computed_is_refused_by_name(way):
    model = mlp()
    UNPLAIN[way](model[0])
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^0 "):
        clinora.apply_lora(model, CONFIG)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    now = model.state_dict()
    assert now.keys() == expected.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in expected.items())


def test_a_layer_whose_weight_is_a_plain_tensor_is_refused_by_name():
    model = mlp()
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].weight = weight
    with pytest.raises(ValueError, match="weight of 0 "):
        clinora.apply_lora(model, CONFIG)


def test_a_layer_that_accelerate_offloads_is_refused_by_name():
    shape = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(shape).eval()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj"):
        clinora.apply_lora(model, LoRAConfig(rank=2))


# --- Hooks ---


def watch(layer, seen):
    """Register a hook of each kind that a forward or backward pass calls."""
    return [
        layer.register_forward_pre_hook(lambda *_: seen.append("before")),
        layer.register_forward_hook(lambda *_: seen.append("after")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]


def run(model):
    model(torch.ones(1, 12, requires_grad=True)).sum().backward()


def test_hooks_of_a_layer_are_called_when_it_is_adapted_and_when_it_is_merged():
    model = mlp()
    seen = []
    watch(model[0], seen)
    clinora.apply_lora(model, CONFIG)
    run(model)
    assert seen == ["before", "after", "backward"]
    clinora.merge_lora(model)
    run(model)
    assert seen == ["before", "after", "backward"] * 2


def test_a_hook_from_before_can_be_removed_after():
    model = mlp()
    seen = []
    handles = watch(model[0], seen)
    clinora.apply_lora(model, CONFIG)
    for handle in handles:
        handle.remove()
    run(model)
    assert seen == []


# --- Dtypes ---


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("merged", [False, True])
def test_a_model_can_be_cast_after_it_was_adapted_or_merged(before, after, merged):
    model = mlp(before)
    clinora.apply_lora(model, CONFIG)
    if merged:
        clinora.merge_lora(model)
    model.to(after)
    x = torch.ones(1, 12, dtype=after)
    assert model(x).dtype == after
    assert {p.dtype for p in model.parameters()} == {after}


def test_a_model_made_float32_computes_in_float32():
    """Its logits were once rounded to the bfloat16 that it had when it was adapted."""
    model = mlp(torch.bfloat16)
    expected = copy.deepcopy(model).float()
    clinora.apply_lora(model, CONFIG)
    x = torch.randn(4, 12)
    torch.testing.assert_close(model.float()(x), expected(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_a_plain_model(dtype):
    model = mlp(dtype)
    plain = [vars(module).copy() for module in model.modules()]
    for _ in range(2):  # what one round leaves may break the next
        clinora.apply_lora(model, CONFIG)
        model(torch.ones(1, 12, dtype=dtype))
        clinora.merge_lora(model)
    assert [type(module) for module in model.modules()] == [type(m) for m in mlp().modules()]
    for module, before in zip(model.modules(), plain, strict=True):
        assert vars(module).keys() == before.keys()
        hooks = {name: value for name, value in vars(module).items() if name.endswith("_hooks")}
        assert not any(hooks.values())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert list(model.buffers()) == []


def test_an_adapted_model_can_be_copied_and_merged_apart():
    model = mlp()
    clinora.apply_lora(model, CONFIG)
    copied = copy.deepcopy(model)
    clinora.merge_lora(copied)
    assert not any(vars(module).get("_forward_hooks") for module in copied.modules())
    assert clinora.count_parameters(model).lora == 2 * (12 + 16)
    assert model.double()(torch.ones(1, 12).double()).dtype == torch.float64


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.layer = nn.Linear(12, 12)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.classifier = nn.ModuleDict({"dense": nn.Linear(12, 12), "out": nn.Linear(12, 3)})

    def forward(self, x):
        return self.classifier["out"](self.classifier["dense"](self.layer(x)))


@pytest.mark.parametrize(
    ("kind", "also_train"),
    [
        (Tied, ("embed", "head")),
        (Nested, ("classifier",)),  # a container, which nobody calls
        (Nested, ("classifier", "out")),  # one in the other
        (Nested, ("out", "classifier")),
    ],
)
def test_modules_that_share_or_hold_each_other_keep_the_models_dtype(kind, also_train):
    torch.manual_seed(0)
    model = kind().bfloat16()
    x = torch.arange(4) if kind is Tied else torch.randn(4, 12).bfloat16()
    expected = model(x)
    for _ in range(2):
        clinora.apply_lora(model, LoRAConfig(rank=2, targets=("layer",), also_train=also_train))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        torch.testing.assert_close(model(x), expected)
        clinora.merge_lora(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(model(x), expected)


def test_a_module_with_another_kind_of_input_can_be_trained_whole():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.rnn = nn.LSTM(4, 4)

        def forward(self, x):
            packed = nn.utils.rnn.pack_sequence([self.layer(x), self.layer(x[:2])])
            return self.rnn(packed)[0].data

    model = Model()
    clinora.apply_lora(model, LoRAConfig(rank=2, targets=("layer",), also_train=("rnn",)))
    assert model(torch.randn(3, 4)).shape == (5, 4)


def test_a_model_on_the_meta_device_is_merged():
    with torch.device("meta"):
        model = mlp()
    clinora.apply_lora(model, CONFIG)
    assert clinora.merge_lora(model)(torch.ones(1, 12, device="meta")).shape == (1, 3)


def test_one_layer_alone_is_not_merged():
    model = mlp()
    clinora.apply_lora(model, CONFIG)
    with pytest.raises(ValueError, match="one LoRA layer"):
        clinora.merge_lora(model[0])


# --- LoRA that does nothing ---


def mamba():
    shape = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    model = transformers.MambaForCausalLM(shape).eval()
    targets = ("dt_proj", "x_proj")
    clinora.apply_lora(model, LoRAConfig(rank=1, targets=targets, also_train=()))
    return model


def test_a_layer_that_the_model_never_calls_is_named_at_the_first_run(recwarn):
    model = mamba()
    ids = torch.randint(3, 50, (1, 9))
    with pytest.warns(UserWarning, match="dt_proj") as caught:
        model(ids)
    assert not any("x_proj" in str(warning.message) for warning in caught)
    recwarn.clear()
    model(ids)
    assert not [w for w in recwarn if "dt_proj" in str(w.message)]  # warned only once


@pytest.mark.filterwarnings("ignore:.*did not call")
def test_merging_refuses_a_layer_that_had_no_effect(fill_b):
    model = fill_b(mamba())
    model(torch.randint(3, 50, (1, 9)))
    with pytest.raises(ValueError, match=r"mixer\.dt_proj"):
        clinora.merge_lora(model)


def test_layers_in_a_part_that_did_not_run_are_merged(fill_b, recwarn):
    """As the vision layers of a model that got a text."""
    model = nn.ModuleDict({"seen": mlp(), "unseen": mlp()})
    model.forward = lambda x: model["seen"](x)
    clinora.apply_lora(model, CONFIG)
    fill_b(model)
    model(torch.ones(1, 12))
    clinora.merge_lora(model)
    assert len(recwarn) == 0


def test_a_layer_that_is_called_later_is_merged(fill_b):
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)

        def forward(self, x, second):
            return self.second(x) if second else self.first(x)

    model = Switch()
    clinora.apply_lora(model, LoRAConfig(rank=2, targets=("first", "second"), also_train=()))
    fill_b(model)
    with pytest.warns(UserWarning, match="second"):
        model(torch.ones(1, 4), second=False)
    model(torch.ones(1, 4), second=True)
    clinora.merge_lora(model)
    assert type(model.first) is type(model.second) is nn.Linear


def test_an_adapter_is_merged_without_a_run(fill_b):
    model = fill_b(llama())
    clinora.merge_lora(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
