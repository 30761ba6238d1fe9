"""Several adapters on one base: chosen by a call, added with weights, beside each other."""

import threading

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import clinora
from clinora.lora import LoRAConfig, apply_lora, lora_layers
from clinora.variants import DoRAConfig, PiSSAConfig
from tests.checkpoint_files import edit_json, edit_tensors

LENGTHS = [5, 12, 9, 3]


@pytest.fixture
def adapters(reference, tmp_path):
    """Save adapters of one base; ``adapters({name: configuration})`` gives the base, folders."""

    def make(configs, classes=None):
        _, base = reference(num_labels=None)  # the head is new in each model
        folders = {}
        for seed, (name, config) in enumerate(configs.items()):
            torch.manual_seed(seed)
            model = clinora.load_model(base, num_labels=(classes or {}).get(name, 5))
            apply_lora(model, config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn(parameter.shape) * 0.1)
            model.head_trained = True
            folders[name] = tmp_path / name
            clinora.save_adapter(model, folders[name])
        return base, folders

    return make


def alone(base, folder, classes=5):
    model = clinora.load_model(base, num_labels=classes).eval()
    clinora.load_adapter(model, folder)
    return model


CONFIGS = {
    "a": LoRAConfig(rank=4, alpha=8),
    "b": LoRAConfig(rank=2, alpha=6, targets=("k_proj", "v_proj"), also_train=("score", "norm")),
    "c": DoRAConfig(rank=3),
}


def test_each_adapter_computes_what_it_does_alone(adapters, notes):
    base, folders = adapters(CONFIGS)
    model = clinora.load_model(base, num_labels=5).eval()
    models = clinora.load_adapters(model, folders)
    batch = notes(LENGTHS)
    outputs = {name: models[name](*batch) for name in models}
    for name, folder in folders.items():
        assert torch.equal(outputs[name], alone(base, folder)(*batch)), name
    assert not torch.allclose(outputs["a"], outputs["b"])


def test_the_base_is_in_memory_once_and_stays_as_it_was(adapters, notes):
    base, folders = adapters(CONFIGS)
    model = clinora.load_model(base, num_labels=5).eval()
    batch = notes(LENGTHS)
    before = model(*batch)
    models = clinora.load_adapters(model, folders)
    addresses = {p.data_ptr() for p in model.parameters()}
    for other in models.values():
        loss = other.train()(*batch).sum()
        loss.backward()
        torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1.0).step()
        own = [n for n, p in other.named_parameters() if p.data_ptr() not in addresses]
        assert all("lora_" in n or "norm" in n or n == "score.weight" for n in own)
        assert all(p.requires_grad for n, p in other.named_parameters() if n in own)
    assert torch.equal(model(*batch), before)
    assert not list(lora_layers(model))


def test_threads_may_use_different_adapters_at_once(adapters, notes):
    base, folders = adapters(CONFIGS)
    models = clinora.load_adapters(clinora.load_model(base, num_labels=5).eval(), folders)
    batch = notes(LENGTHS)
    expected = {name: models[name](*batch) for name in models}
    wrong = []

    def call(name):
        for _ in range(30):
            if not torch.equal(models[name](*batch), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=call, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_adapters_of_other_classes_bring_their_heads(adapters, notes):
    configs = {"five": LoRAConfig(rank=2), "three": LoRAConfig(rank=2)}
    base, folders = adapters(configs, classes={"three": 3})
    models = clinora.load_adapters(clinora.load_model(base, num_labels=5).eval(), folders)
    batch = notes(LENGTHS)
    assert models["five"](*batch).shape == (4, 5)
    assert torch.equal(models["three"](*batch), alone(base, folders["three"], 3)(*batch))


def test_a_weighted_sum_adds_the_updates(adapters, notes, difference):
    """The oracle adds ΔW = s·B·A to the base's weights, layer by layer, in float64."""
    configs = {
        "a": LoRAConfig(rank=4, alpha=8),
        "b": LoRAConfig(rank=2, alpha=6, targets=("k_proj", "v_proj"), rank_stabilized=True),
        "p": PiSSAConfig(rank=3),
    }
    weights = {"a": 0.5, "b": -0.25, "p": 0.75}
    base, folders = adapters(configs)
    model = clinora.load_model(base, num_labels=5).eval()
    models = clinora.load_adapters(model, folders)
    added = clinora.add_adapters(model, models, weights)

    oracle = clinora.load_model(base, num_labels=5, dtype=torch.float64).eval()
    head = 0
    for name, weight in weights.items():
        single = alone(base, folders[name])
        merged = clinora.merge_lora(single)
        for key, own in oracle.named_parameters():
            if key.endswith("_proj.weight"):
                change = merged.get_parameter(key).double() - model.get_parameter(key).double()
                own.data += weight * change
        head = head + weight * merged.score.weight.double()
    oracle.score.weight.data = head
    batch = notes(LENGTHS)
    assert difference(added(*batch), oracle(*batch)) <= 1e-5
    ranks = {name.split(".")[-1]: layer.config.rank for name, layer in lora_layers(added)}
    assert ranks == {"q_proj": 10, "k_proj": 2, "v_proj": 12}


def test_a_sum_can_be_saved_and_loaded(adapters, notes, tmp_path, difference):
    configs = {"a": LoRAConfig(rank=4), "b": LoRAConfig(rank=2, targets=("v_proj",))}
    base, folders = adapters(configs)
    model = clinora.load_model(base, num_labels=5).eval()
    models = clinora.load_adapters(model, folders)
    added = clinora.add_adapters(model, models, {"a": 0.5, "b": 0.5})
    clinora.save_adapter(added, tmp_path / "sum")
    batch = notes(LENGTHS)
    assert difference(alone(base, tmp_path / "sum")(*batch), added(*batch)) <= 1e-6


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"the adapters to add are \[\]: expected some of \['a', 'c', 'three', 'wide'\]"),
        ({"x": 1}, r"the adapters to add are \['x'\]"),
        ({"a": 1, "c": 1}, "c is a DoRA adapter"),
        ({"a": 1, "three": 1}, "heads of the same classes"),
        ({"a": float("nan")}, "expected finite numbers"),
        ({"a": 1, "wide": 1}, r"rank 18 is too large for .*v_proj: at most 16"),
    ],
)
def test_what_cannot_be_added_is_refused(adapters, weights, message):
    configs = {
        "a": LoRAConfig(rank=4),
        "c": DoRAConfig(rank=3),
        "three": LoRAConfig(rank=2),
        "wide": LoRAConfig(rank=14),
    }
    base, folders = adapters(configs, classes={"three": 3})
    model = clinora.load_model(base, num_labels=5).eval()
    models = clinora.load_adapters(model, folders)
    with pytest.raises(ValueError, match=message):
        clinora.add_adapters(model, models, weights)


def test_an_adapted_model_is_no_base(adapters):
    base, folders = adapters({"a": LoRAConfig(rank=2)})
    with pytest.raises(ValueError, match="already adapted"):
        clinora.load_adapters(alone(base, folders["a"]), folders)


def test_a_wrapped_base_stays_as_it_was(tmp_path):
    """Activation checkpointing wraps modules inside the model, which changes their names."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 6)
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(self.up(x))

    def build():
        torch.manual_seed(0)
        return nn.Sequential(Block(), Block())

    config = LoRAConfig(rank=2, targets=("up",), also_train=("norm",))
    single = build()
    apply_lora(single, config)
    with torch.no_grad():
        single[1].norm.weight.normal_()
    clinora.save_adapter(single, tmp_path)
    model = build()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    clinora.load_adapters(model, {"one": tmp_path})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_sum_without_heads_keeps_the_bases_head(adapters, reference, notes, tmp_path):
    _, base = reference()
    model = clinora.load_model(base, num_labels=5).eval()
    assert model.head_trained
    lora = clinora.load_model(base, num_labels=5).eval()
    apply_lora(lora, LoRAConfig(rank=2, also_train=()))
    with torch.no_grad():
        for _, layer in lora_layers(lora):
            layer.lora_B.normal_()
    clinora.save_adapter(lora, tmp_path)
    edit_tensors(tmp_path / "adapter_model.safetensors", remove_head)
    edit_json(tmp_path / "adapter_config.json", modules_to_save=None)
    models = clinora.load_adapters(model, {"one": tmp_path})
    added = clinora.add_adapters(model, models, {"one": 1.0})
    batch = notes(LENGTHS)
    torch.testing.assert_close(added(*batch), lora(*batch), rtol=1e-5, atol=1e-5)
    assert torch.equal(added.score.weight, model.score.weight)


def remove_head(tensors):
    for name in [name for name in tensors if "score" in name]:
        del tensors[name]


def test_models_of_other_libraries_share_their_weights(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    single = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    single.load_state_dict(model.state_dict())
    apply_lora(single, LoRAConfig(rank=2, targets=("0",), also_train=("2",)))
    with torch.no_grad():
        single[0].lora_B.normal_()
        single[2].weight.normal_()
    clinora.save_adapter(single, tmp_path)
    x = torch.randn(4, 6)
    before = model(x)
    models = clinora.load_adapters(model, {"one": tmp_path})
    assert torch.equal(models["one"].eval()(x), single.eval()(x))
    assert models["one"][0].weight.data_ptr() == model[0].weight.data_ptr()
    assert torch.equal(model(x), before)
