"""Bases and adapters on disk, against Transformers and PEFT."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import types
import warnings

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import clinora
from clinora.checkpoint import CheckpointError, find_config, weights_sha256, write_atomically

IDS = torch.tensor([[1, 5, 9, 30, 42, 7], [1, 8, 3, 0, 0, 0]])
LENGTHS = torch.tensor([6, 3])
CONFIG = clinora.LoRAConfig(rank=4, alpha=8, dropout=0.0)


def edit_json(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def adapted(folder, **config):
    """Load a base and put a random adapter on it, B included."""
    torch.manual_seed(3)
    model = clinora.load_model(folder, num_labels=5).eval()
    clinora.apply_lora(model, clinora.LoRAConfig(**{"rank": 4, "alpha": 8, "dropout": 0} | config))
    with torch.no_grad():
        for parameter in clinora.lora_state_dict(model).values():
            parameter.normal_(std=0.2)
    model.head_trained = True  # as a training loop says when it has done its work
    return model


def reference_logits(model):
    """Let Transformers pool by its own rule: pad is 0, and no real token is."""
    with torch.no_grad():
        return model(IDS, attention_mask=(IDS != 0).long()).logits


def our_logits(model):
    with torch.no_grad():
        return model(IDS, LENGTHS)


def peft_adapter(reference, folder, **config):
    """Let PEFT save an adapter with random A, B and head; returns its model and the base."""
    base, base_folder = reference()
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]} | config
    torch.manual_seed(5)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model, base_folder


# ------------------------------------------------------------------------------------ bases


def test_loaded_classifier_equals_transformers(reference):
    theirs, folder = reference()
    model = clinora.load_model(folder, num_labels=5).eval()
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-6)
    assert model.head_trained


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_causal_lm_equals_transformers(reference, tied):
    theirs, folder = reference(num_labels=None, tie_word_embeddings=tied)
    model = clinora.load_model(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS[:1]), theirs(IDS[:1]).logits)


def test_sharded_weights_give_the_same_model(reference, tmp_path):
    theirs, folder = reference()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    whole = clinora.load_model(folder, num_labels=5).state_dict()
    shards = clinora.load_model(tmp_path / "shards", num_labels=5).state_dict()
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_base_without_a_head_gets_a_new_untrained_one(reference):
    _, folder = reference(num_labels=None)
    model = clinora.load_model(folder, num_labels=3)
    assert model.score.weight.shape == (3, 64)
    assert not model.head_trained


def test_base_is_held_in_the_asked_dtype_and_the_head_in_float32(reference):
    _, folder = reference()
    model = clinora.load_model(folder, num_labels=5, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("score.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_old_rotary_buffers_are_accepted(reference):
    _, folder = reference()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(extra))
    clinora.load_model(folder, num_labels=5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update(surplus=torch.ones(1)), "unexpected: surplus"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"another shape: model\.norm\.weight \(3, expected 64\)",
        ),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_wrong_tensors_are_named(reference, edit, message):
    _, folder = reference()
    edit_tensors(folder / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        clinora.load_model(folder, num_labels=5)


def test_head_of_another_number_of_classes_is_refused(reference):
    _, folder = reference()
    with pytest.raises(CheckpointError, match=r"score\.weight \(5 × 64, expected 7 × 64\)"):
        clinora.load_model(folder, num_labels=7)


@pytest.mark.parametrize("keep", [0, 5, 1000, -7])
def test_truncated_weights_are_refused(reference, keep):
    _, folder = reference()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        clinora.load_model(folder, num_labels=5)


def test_folder_without_weights_is_refused(reference):
    _, folder = reference()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        clinora.load_model(folder, num_labels=5)


def test_index_that_points_outside_the_folder_is_refused(reference):
    _, folder = reference()
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        clinora.load_model(folder, num_labels=5)


@pytest.fixture
def shards(reference, tmp_path):
    """A base in several files, as Transformers writes it, and their index."""
    theirs, _ = reference()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards", tmp_path / "shards" / "model.safetensors.index.json"


def test_a_tensor_in_two_shards_is_refused(shards):
    """The second copy would silently take the place of the first."""
    folder, index = shards
    files = json.loads(index.read_text())["weight_map"]
    name = "model.norm.weight"
    other = next(folder / file for file in files.values() if file != files[name])
    edit_tensors(other, lambda tensors: tensors.update({name: torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=rf"{other.name} .*model\.norm\.weight"):
        clinora.load_model(folder, num_labels=5)


def test_a_tensor_that_the_index_places_elsewhere_is_refused(shards):
    folder, index = shards
    files = json.loads(index.read_text())["weight_map"]
    other = next(file for file in files.values() if file != files["score.weight"])
    edit_json(index, weight_map=files | {"score.weight": other})
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        clinora.load_model(folder, num_labels=5)


@pytest.mark.parametrize("weight_map", [None, [], ["a"], {}, {"a": 1}, {"a": None}, "a", ...])
def test_an_unusable_index_is_refused(shards, weight_map):
    folder, index = shards
    edit_json(index, weight_map=weight_map)
    with pytest.raises(CheckpointError, match="has no usable weight_map"):
        clinora.load_model(folder, num_labels=5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("which", ["model.norm.weight", "model.embed_tokens.weight", ""])
def test_quantised_weights_are_refused_by_name(reference, which, dtype):
    """Without a quantization_config, their scales are nowhere: cast, they are other weights."""
    _, folder = reference()
    edit_tensors(
        folder / "model.safetensors",
        lambda ts: ts.update({n: t.to(dtype) for n, t in ts.items() if n.endswith(which)}),
    )
    kind = str(dtype).removeprefix("torch.")
    named = which or "model.embed_tokens.weight"
    with pytest.raises(CheckpointError, match=rf"another dtype: {named} \({kind}, expected"):
        clinora.load_model(folder, num_labels=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_base_is_held_in_the_files_dtype(reference, dtype):
    _, folder = reference()
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}),
    )
    assert clinora.load_model(folder, num_labels=5).model.norm.weight.dtype == dtype


@pytest.mark.parametrize("num_labels", [0, -1, 2.0, "5", True])
def test_a_head_needs_at_least_one_class(reference, num_labels):
    _, folder = reference(num_labels=None)
    with pytest.raises(ValueError, match=f"num_labels is {num_labels!r}: expected .* at least 1"):
        clinora.load_model(folder, num_labels=num_labels)


def test_missing_folder_that_is_no_hub_id_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        clinora.load_model(tmp_path / "a" / "b" / "c", num_labels=5)


def test_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the Hub did not give it") as caught:
        clinora.load_model("nobody/no-such-model", num_labels=5)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(reference, tmp_path, monkeypatch):
    """Stand in for the Hub: its client's one call gives the wanted files out of real folders.

    ``hub.asked`` lists the revisions asked for; ``hub.publish(folder, revision)`` fills it.
    """
    commits, published, asked = {"main": "c0ffee", "v2": "beef00"}, {}, []

    def snapshot_download(name, *, revision=None, allow_patterns=None):
        assert name == "someone/a-base"
        asked.append(revision)
        commit = commits.get(revision or "main", revision)
        target = tmp_path / "cache" / "snapshots" / commit
        target.mkdir(parents=True, exist_ok=True)
        for file in published[commit].iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def publish(folder, revision="main"):
        published[commits[revision]] = folder

    return types.SimpleNamespace(publish=publish, asked=asked)


def test_base_from_the_hub_knows_its_commit(reference, hub):
    theirs, folder = reference()
    hub.publish(folder)
    model = clinora.load_model("someone/a-base", num_labels=5).eval()
    assert (model.source.name, model.source.revision) == ("someone/a-base", "c0ffee")
    assert hub.asked == [None]
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-6)


def test_revision_of_the_hub_is_the_one_asked_for(reference, hub):
    (_, first), (theirs, second) = reference(), reference(seed=1)
    hub.publish(first)
    hub.publish(second, "v2")
    model = clinora.load_model("someone/a-base", num_labels=5, revision="v2").eval()
    assert model.source.revision == "beef00"
    assert hub.asked == ["v2"]
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-6)


def test_adapter_remembers_the_commit_of_its_base(reference, hub, tmp_path):
    _, folder = reference()
    hub.publish(folder)
    clinora.save_adapter(adapted("someone/a-base"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/a-base"
    assert config["revision"] == "c0ffee"


def test_shards_come_from_the_hub_and_pickles_do_not(shards, hub):
    folder, index = shards
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    hub.publish(folder)
    model = clinora.load_model("someone/a-base", num_labels=5)
    wanted = {"config.json", "tokenizer.model", index.name, *folder.glob("model-*")}
    came = {file.name for file in model.source.folder.iterdir()}
    assert came == {getattr(file, "name", file) for file in wanted}


def test_config_of_a_hub_id_comes_alone(reference, hub):
    _, folder = reference()
    hub.publish(folder)
    path = find_config("someone/a-base", "main")
    assert path.read_text() == (folder / "config.json").read_text()
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]
    assert hub.asked == ["main"]


def test_hub_id_without_a_config_is_refused(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    hub.publish(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"there is no .*config\.json"):
        find_config("someone/a-base")


def test_hash_tells_bases_apart(reference):
    (_, one), (_, same), (_, other) = reference(), reference(), reference(seed=1)
    assert weights_sha256(one) == weights_sha256(same) != weights_sha256(other)


# --------------------------------------------------------------------------------- adapters


def test_peft_reads_ours_without_a_missing_or_unexpected_key(reference, tmp_path):
    theirs, folder = reference()
    model = adapted(folder)
    clinora.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of a missing adapter key
        read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        names = peft.get_peft_model_state_dict(read).keys()
    assert names == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    torch.testing.assert_close(our_logits(model), reference_logits(read), rtol=1e-5, atol=1e-5)


def test_auto_peft_reads_ours(reference, tmp_path):
    _, folder = reference()
    model = adapted(folder)
    clinora.save_adapter(model, tmp_path / "adapter")
    read = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=5, pad_token_id=0
    ).eval()
    torch.testing.assert_close(our_logits(model), reference_logits(read), rtol=1e-5, atol=1e-5)


def test_peft_reads_our_rank_stabilised_scaling(reference, tmp_path):
    theirs, folder = reference()
    model = adapted(folder, rank_stabilized=True)
    clinora.save_adapter(model, tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(our_logits(model), reference_logits(read), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"target_modules": r".*\.layers\.[02]\.self_attn\.(q|o)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.k_proj", "model.layers.1.mlp.up_proj"]},
    ],
    ids=["plain", "rslora", "regex", "all-linear", "paths"],
)
def test_we_read_what_peft_saves(reference, tmp_path, config):
    theirs, folder = peft_adapter(reference, tmp_path / "adapter", **config)
    model = clinora.load_model(folder, num_labels=5).eval()
    clinora.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-5)
    assert model.head_trained


def test_we_read_names_with_default_and_bfloat16(reference, tmp_path):
    theirs, folder = peft_adapter(reference, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {n.replace(".weight", ".default.weight") if "lora_" in n else n: t.bfloat16()
               for n, t in load_file(path).items()}  # fmt: skip
    save_file(tensors, path, metadata={"format": "pt"})
    with torch.no_grad():  # what the file holds now
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    model = clinora.load_model(folder, num_labels=5).eval()
    clinora.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-5)
    assert {t.dtype for t in clinora.lora_state_dict(model).values()} == {torch.float32}


def test_our_adapter_comes_back_to_the_bit(reference, tmp_path):
    _, folder = reference()
    model = adapted(folder, also_train=())
    clinora.save_adapter(model, tmp_path / "adapter")
    again = clinora.load_model(folder, num_labels=5).eval()
    clinora.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(our_logits(model), our_logits(again))


def test_an_untrained_head_is_not_saved(reference, tmp_path):
    """Loading marks a head as trained: a random one would have become a trained one on its way."""
    _, folder = reference(num_labels=None)
    model = clinora.load_model(folder, num_labels=5)
    clinora.apply_lora(model, CONFIG)
    with pytest.raises(ValueError, match=r"never trained: .* set model\.head_trained = True"):
        clinora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_head_that_is_adapted_is_not_saved(reference, tmp_path):
    """An adapter that has it as a target and whole was written, and could not be read."""
    _, folder = reference()
    model = adapted(folder, targets=("q_proj", "score"), also_train=())
    with pytest.raises(ValueError, match=r"score is in targets, .* put it into also_train"):
        clinora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_untrained_head_becomes_a_trained_one_with_the_adapter(reference, tmp_path):
    _, folder = reference(num_labels=None)
    clinora.save_adapter(adapted(folder), tmp_path / "adapter")
    model = clinora.load_model(folder, num_labels=5)
    assert not model.head_trained
    clinora.load_adapter(model, tmp_path / "adapter")
    assert model.head_trained


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("trainable_token_indices", [1]),
        ("a_key_of_next_year", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", 1),
    ],
)
def test_what_is_not_done_is_refused_by_name(reference, tmp_path, key, value):
    _, folder = reference()
    clinora.save_adapter(adapted(folder), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **{key: value})
    model = clinora.load_model(folder, num_labels=5)
    with pytest.raises(CheckpointError, match=key):
        clinora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_key_on_whose_default_the_result_hangs_must_be_there(reference, tmp_path, key):
    """PEFT falls back to lora_alpha 8 and would halve the update of an adapter made with 16."""
    _, folder = reference()
    clinora.save_adapter(adapted(folder), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **{key: ...})
    with pytest.raises(CheckpointError, match=key):
        clinora.load_adapter(clinora.load_model(folder, num_labels=5), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("r", True),
        ("r", "4"),
        ("r", 4.0),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_dropout", "0.1"),
        ("target_modules", 5),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]),
        ("modules_to_save", "score"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(reference, tmp_path, key, value):
    """A string "false" would switch rank-stabilised scaling on."""
    _, folder = reference()
    clinora.save_adapter(adapted(folder), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {key} is .*, expected"):
        clinora.load_adapter(clinora.load_model(folder, num_labels=5), tmp_path)


def break_rank(folder):
    edit_json(folder / "adapter_config.json", r=2)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def drop_tensor(folder):
    edit_tensors(folder / "adapter_model.safetensors", lambda t: t.pop(next(iter(t))))


def add_tensor(folder):
    edit_tensors(
        folder / "adapter_model.safetensors",
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}),
    )


def add_copy(suffix, copy):
    """Give a tensor a second name that stands for the same one."""

    def add(folder):
        edit_tensors(
            folder / "adapter_model.safetensors",
            lambda ts: ts.update(
                {n.replace(suffix, copy): t + 1 for n, t in ts.items() if n.endswith(suffix)}
            ),
        )

    return add


def change_tensors(change):
    return lambda folder: edit_tensors(
        folder / "adapter_model.safetensors",
        lambda ts: ts.update({name: change(tensor) for name, tensor in ts.items()}),
    )


def one_infinity(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = torch.inf
    return tensor


def target_gpt2(folder):
    edit_json(folder / "adapter_config.json", target_modules=["c_attn"])


def unjson(folder):
    (folder / "adapter_config.json").write_text("{")


def nest(folder):
    (folder / "adapter_config.json").write_text("[" * 100_000)


def make_folder(folder):
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()


def remove(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_rank, "another shape"),
        (truncate, "damaged"),
        (drop_tensor, "missing"),
        (add_tensor, "unexpected"),
        (unjson, "not JSON"),
        (nest, "not JSON"),
        (make_folder, r"adapter_config\.json"),
        (remove, "there is no"),
        (add_copy(".lora_A.weight", ".lora_A.default.weight"), r"lora_A under two names"),
        (add_copy("base_model.model.score.weight", "score.weight"), "score.weight under two names"),
        (change_tensors(lambda t: t.to(torch.int8)), r"another dtype: .*lora_A \(int8, expected"),
        (change_tensors(lambda t: t * torch.nan), "not finite: "),
        (change_tensors(one_infinity), "not finite: "),
        (target_gpt2, r"adapter_config\.json: no layer is named 'c_attn'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_adapter_is_one_clear_error_and_leaves_the_model(
    reference, tmp_path, damage, message
):
    _, folder = reference()
    clinora.save_adapter(adapted(folder), tmp_path)
    damage(tmp_path)
    model = clinora.load_model(folder, num_labels=5)
    before = str(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        clinora.load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_that_peft_allows_and_lora_refuses_names_the_file(reference, tmp_path):
    _, folder = peft_adapter(reference, tmp_path, r=70)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: rank 70 is too large"):
        clinora.load_adapter(clinora.load_model(folder, num_labels=5), tmp_path)


def test_loading_a_second_adapter_is_refused(reference, tmp_path):
    _, folder = reference()
    model = adapted(folder)
    clinora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="adapted already"):
        clinora.load_adapter(model, tmp_path)


def test_adapter_of_another_base_is_refused_with_both_names(reference, tmp_path):
    _, folder = reference()
    _, wider = reference(hidden_size=96, head_dim=8)
    clinora.save_adapter(adapted(folder), tmp_path)
    with pytest.raises(CheckpointError, match=rf"made for the base .*{folder.name}.*{wider.name}"):
        clinora.load_adapter(clinora.load_model(wider, num_labels=5), tmp_path)


def test_adapter_of_other_classes_is_refused(reference, tmp_path):
    _, folder = reference(num_labels=None)
    clinora.save_adapter(adapted(folder), tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight \(5 × 64, expected 3 × 64\)"):
        clinora.load_adapter(clinora.load_model(folder, num_labels=3), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_our_causal_lm(reference, tmp_path, tied):
    theirs, folder = reference(num_labels=None, tie_word_embeddings=tied)
    model = clinora.load_model(folder).eval()
    clinora.apply_lora(model, CONFIG)
    with torch.no_grad():
        for tensor in clinora.lora_state_dict(model).values():
            tensor.normal_(std=0.2)
        base = theirs(IDS[:1]).logits
    clinora.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert type(read) is peft.PeftModelForCausalLM
    with torch.no_grad():
        ours, logits = model(IDS[:1]), read(IDS[:1]).logits
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, base, atol=0.01)


@pytest.fixture
def bert():
    """A small random BERT, the same at every call."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip

    def make():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()

    return make


@pytest.fixture
def adapted_bert(bert):
    model = bert()
    lora = clinora.LoRAConfig(rank=4, targets=("query", "value"), also_train=("classifier",))
    clinora.apply_lora(model, lora)
    with torch.no_grad():
        for tensor in clinora.lora_state_dict(model).values():
            tensor.normal_(std=0.2)
    return model


def test_adapter_of_a_bert_comes_back(bert, adapted_bert, tmp_path):
    clinora.save_adapter(adapted_bert, tmp_path)
    again = bert()
    clinora.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(adapted_bert(IDS).logits, again(IDS).logits)


def test_peft_reads_our_bert(bert, adapted_bert, tmp_path):
    clinora.save_adapter(adapted_bert, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    with torch.no_grad():
        ours, theirs, base = adapted_bert(IDS).logits, read(IDS).logits, bert()(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs, base, atol=0.01)


class Twice(torch.nn.Module):
    """One linear layer at two places."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_adapter_of_a_layer_used_twice_comes_back(tmp_path, fill_b):
    """Its A and B have two names for one memory, which safetensors refuses to write."""
    model, x = Twice(), torch.randn(3, 6)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = clinora.LoRAConfig(rank=2, targets=("first", "second"), also_train=(), dropout=0)
    clinora.apply_lora(model, config)
    clinora.save_adapter(fill_b(model), tmp_path)
    again = Twice()
    again.load_state_dict(base)
    clinora.load_adapter(again, tmp_path)
    assert again.first is again.second
    assert torch.equal(again(x), model(x)) and not torch.equal(
        again.first(x), x @ base["first.weight"].T
    )


def test_a_part_of_a_model_is_not_saved(reference, tmp_path):
    _, folder = reference()
    with pytest.raises(ValueError, match="only a whole model"):
        clinora.save_adapter(adapted(folder).model, tmp_path / "adapter")


# ----------------------------------------------------------------------------------- writing


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_bytes(b"old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_and_never_fills_it(tmp_path):
    """Who reads the old file meanwhile has it whole: it is another file until the rename."""
    path = tmp_path / "file.json"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new and longer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new and longer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_written_file_has_the_mode_of_any_new_file(tmp_path, umask):
    """Those of mkstemp are their owner's alone."""
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file.json", b"")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_loading_imports_nothing_that_it_does_not_need():
    """Drawing numbers on the meta device imported PyTorch's compiler, the longest part of it."""
    code = "import sys, clinora; clinora.load_model('bundled', num_labels=5); "
    code += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
