"""Bases on disk, against Transformers, and how files are written."""

import fnmatch
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import clinora
from clinora import checkpoint
from clinora.checkpoint import (
    BUNDLED,
    CheckpointError,
    find_base,
    find_config,
    find_tokenizer,
    weights_sha256,
    write_atomically,
)
from tests.checkpoint_files import IDS, edit_json, edit_tensors, our_logits, reference_logits

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


def keep_lm_head_alone(tensors):
    """As Transformers 4 could save tied weights."""
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def add_lm_head(tensors):
    """As converters save tied weights that they do not recognise as one."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def drop_prefix(tensors):
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


LAYOUTS = {
    "embedding alone": [],
    "lm_head alone": [keep_lm_head_alone],
    "both": [add_lm_head],
    "no prefix": [drop_prefix],
    "no prefix, both": [add_lm_head, drop_prefix],
    "no prefix, lm_head alone": [keep_lm_head_alone, drop_prefix],
}


@pytest.fixture(params=["one file", "shards"])
def write_layout(request, reference):
    """Write a causal LM's weights after some edits, in one file or two; give it and its folder."""

    def write(edits, tied):
        theirs, folder = reference(num_labels=None, tie_word_embeddings=tied)
        path = folder / "model.safetensors"
        for edit in edits:
            edit_tensors(path, edit)
        if request.param == "shards":
            tensors = load_file(path)
            path.unlink()
            weight_map = {}
            for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
                file = f"model-0000{number}-of-00002.safetensors"
                save_file({n: tensors[n] for n in names}, folder / file, {"format": "pt"})
                weight_map |= dict.fromkeys(names, file)
            index = folder / "model.safetensors.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return theirs, folder

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_tied_weights_gives_the_same_model(write_layout, layout):
    theirs, folder = write_layout(LAYOUTS[layout], tied=True)
    model = clinora.load_model(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS), theirs(IDS).logits)
    classifier = clinora.load_model(folder, num_labels=5).state_dict()
    expected = theirs.model.state_dict()
    assert classifier.keys() == {f"model.{name}" for name in expected} | {"score.weight"}
    assert all(torch.equal(classifier[f"model.{name}"], expected[name]) for name in expected)


def test_untied_weights_without_the_prefix_give_the_same_model(write_layout):
    theirs, folder = write_layout([drop_prefix], tied=False)
    with torch.no_grad():
        assert torch.equal(clinora.load_model(folder).eval()(IDS), theirs(IDS).logits)


def test_a_decoder_that_transformers_saved_without_a_head_is_loaded(reference, tmp_path):
    theirs, _ = reference(num_labels=None)
    theirs.model.save_pretrained(tmp_path / "decoder")
    assert "norm.weight" in load_file(tmp_path / "decoder" / "model.safetensors")
    classifier = clinora.load_model(tmp_path / "decoder", num_labels=5)
    with torch.no_grad():
        assert torch.equal(classifier.model(IDS), theirs.model(IDS).last_hidden_state)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
        clinora.load_model(tmp_path / "decoder")


def test_a_tensor_with_and_without_the_prefix_is_refused(reference):
    _, folder = reference()
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"norm.weight": torch.zeros(64)}),
    )
    with pytest.raises(CheckpointError, match=r"unexpected: norm\.weight"):
        clinora.load_model(folder, num_labels=5)


def test_an_untied_lm_head_does_not_take_the_place_of_the_embedding(reference):
    _, folder = reference(num_labels=None)
    edit_tensors(
        folder / "model.safetensors", lambda tensors: tensors.pop("model.embed_tokens.weight")
    )
    for num_labels in (None, 5):
        with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
            clinora.load_model(folder, num_labels=num_labels)


@pytest.mark.parametrize(
    "other",
    [torch.zeros(97, 64), torch.zeros(97, 64).to(torch.float8_e4m3fn), torch.zeros(3)],
    ids=["values", "dtype", "shape"],
)
def test_weights_that_are_called_tied_but_differ_are_refused(reference, other):
    """Transformers 5 does not tie them; without the error we would give other logits."""
    _, folder = reference(num_labels=None, tie_word_embeddings=True)
    edit_tensors(
        folder / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": other})
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        clinora.load_model(folder)
    clinora.load_model(folder, num_labels=5)  # a classifier does not use it


class Unpickled:
    """Makes a pickle that creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_of_weights_is_refused_unread(reference, tmp_path, name):
    _, folder = reference()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Unpickled(tmp_path / "read")))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    for read in (
        lambda: clinora.load_model(folder, num_labels=5),
        lambda: clinora.Classifier.new(folder, ["A", "B"], device="cpu"),
        lambda: weights_sha256(folder),
    ):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickle.*save_pretrained"):
            read()
    assert not (tmp_path / "read").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_the_conversion_that_the_refusal_of_a_pickle_names_works(reference, tmp_path, tied):
    theirs, folder = reference(num_labels=None, tie_word_embeddings=tied)
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        clinora.load_model(folder)
    command = re.search(r"AutoModelForCausalLM\S+\)", str(caught.value))[0]
    names = {"AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    eval(command, names | {"BASE": folder, "FOLDER": tmp_path / "converted"})
    with torch.no_grad():
        model = clinora.load_model(tmp_path / "converted").eval()
        assert torch.equal(model(IDS), theirs(IDS).logits)


def test_base_without_a_head_gets_a_new_untrained_one(reference):
    _, folder = reference(num_labels=None)
    model = clinora.load_model(folder, num_labels=3)
    assert model.score.weight.shape == (3, 64)
    assert not model.head_trained


def test_base_has_the_requested_dtype_and_the_head_float32(reference):
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
    with pytest.raises(CheckpointError, match="weight_map"):
        clinora.load_model(folder, num_labels=5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("which", ["model.norm.weight", "model.embed_tokens.weight", ""])
def test_quantised_weights_are_refused_by_name(reference, which, dtype):
    """Without the scales of a quantization_config, a cast would give other weights."""
    _, folder = reference()
    edit_tensors(
        folder / "model.safetensors",
        lambda ts: ts.update({n: t.to(dtype) for n, t in ts.items() if n.endswith(which)}),
    )
    kind = str(dtype).removeprefix("torch.")
    named = which or "model.embed_tokens.weight"
    with pytest.raises(CheckpointError, match=rf"dtype.* {named} \({kind},"):
        clinora.load_model(folder, num_labels=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_base_keeps_the_dtype_of_its_file(reference, dtype):
    _, folder = reference()
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}),
    )
    assert clinora.load_model(folder, num_labels=5).model.norm.weight.dtype == dtype


@pytest.mark.parametrize("num_labels", [0, -1, 2.0, "5", True])
def test_a_head_needs_at_least_one_class(reference, num_labels):
    _, folder = reference(num_labels=None)
    with pytest.raises(ValueError, match=f"num_labels is {num_labels!r}"):
        clinora.load_model(folder, num_labels=num_labels)


def test_missing_folder_that_is_no_hub_id_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        clinora.load_model(tmp_path / "a" / "b" / "c", num_labels=5)


def test_an_unreachable_hub_gives_a_message_of_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no-such-model") as caught:
        clinora.load_model("nobody/no-such-model", num_labels=5)
    assert "\n" not in str(caught.value)


# What is found in the place of a file that was not downloaded as it should be.
IN_PLACE_OF_A_FILE = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 17\n",
    "web page": b"<!doctype html>\n<html><title>Log in</title></html>\n",
    "compressed": gzip.compress(b"weights"),
}


@pytest.mark.parametrize("kind", IN_PLACE_OF_A_FILE)
def test_another_file_in_the_place_of_weights_is_recognised(reference, shards, kind):
    _, folder = reference()
    (folder / "model.safetensors").write_bytes(IN_PLACE_OF_A_FILE[kind])
    sharded, index = shards
    shard = sorted(sharded.glob("model-*"))[-1]
    shard.write_bytes(IN_PLACE_OF_A_FILE[kind])
    for broken, file in ((folder, folder / "model.safetensors"), (sharded, shard)):
        for read in (lambda base: clinora.load_model(base, num_labels=5), weights_sha256):
            with pytest.raises(CheckpointError, match=rf"{file.name} .*{kind}"):
                read(broken)
    index.write_bytes(IN_PLACE_OF_A_FILE[kind])
    with pytest.raises(CheckpointError, match=rf"{index.name} .*{kind}"):
        clinora.load_model(sharded, num_labels=5)


@pytest.fixture
def no_weights_read(monkeypatch):
    """Fail where weights are loaded or hashed."""

    def fail(_path):
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint, "read_tensors", fail)
    monkeypatch.setattr("clinora.run.weights_sha256", fail)


def load_twice(base):
    """Yield the two ways to a classifier with this base: a new one, and a run with a moved base."""
    yield lambda: clinora.Classifier.new(base, ["A", "B"], device="cpu")
    yield lambda: clinora.Classifier.load("bundled", base=base, device="cpu")


def test_a_base_without_a_tokenizer_is_refused_before_its_weights_are_read(
    tmp_path, no_weights_read
):
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED / "base", folder)
    (folder / "tokenizer.model").rename(folder / "vocab.json")
    for load in load_twice(folder):
        with pytest.raises(CheckpointError, match=r"neither tokenizer\.model nor tokenizer\.json"):
            load()


def test_a_folder_has_its_tokenizer_model_read_and_without_it_its_tokenizer_json(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED / "base", folder)
    (folder / "tokenizer.json").write_text("{}")
    assert find_tokenizer(folder) == folder / "tokenizer.model"
    (folder / "tokenizer.model").unlink()
    assert find_tokenizer(folder) == folder / "tokenizer.json"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("kind", IN_PLACE_OF_A_FILE)
def test_another_file_in_the_place_of_the_tokenizer_is_recognised(
    tmp_path, kind, name, no_weights_read
):
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED / "base", folder)
    (folder / "tokenizer.model").unlink()
    (folder / name).write_bytes(IN_PLACE_OF_A_FILE[kind])
    for load in load_twice(folder):
        with pytest.raises(CheckpointError, match=rf"{name} .*{kind}"):
            load()


def test_a_damaged_tokenizer_json_is_refused_before_its_weights_are_loaded(tmp_path, monkeypatch):
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED / "base", folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"tokenizer\.json .*damaged"):
        clinora.Classifier.new(folder, ["A", "B"], device="cpu")


def test_a_folder_without_weights_is_refused_as_one_even_if_it_has_no_tokenizer(tmp_path):
    for load in load_twice(tmp_path):
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
            load()


@pytest.fixture
def hub(reference, tmp_path, monkeypatch):
    """A stand-in for the Hub: ``snapshot_download`` copies the wanted files from a local folder.

    ``hub.publish(folder, revision)`` puts a folder on it; ``hub.asked`` lists the revisions that
    were asked for.
    """
    commits = {"main": "c0ffee", "v2": "beef00"}
    published = {}
    asked = []

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


def test_a_base_from_the_hub_records_its_commit(reference, hub):
    theirs, folder = reference()
    hub.publish(folder)
    model = clinora.load_model("someone/a-base", num_labels=5).eval()
    assert (model.source.name, model.source.revision) == ("someone/a-base", "c0ffee")
    assert hub.asked == [None]
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-6)


def test_the_requested_revision_is_loaded_from_the_hub(reference, hub):
    _, first = reference()
    theirs, second = reference(seed=1)
    hub.publish(first)
    hub.publish(second, "v2")
    model = clinora.load_model("someone/a-base", num_labels=5, revision="v2").eval()
    assert model.source.revision == "beef00"
    assert hub.asked == ["v2"]
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-6)


def test_an_adapter_records_the_commit_of_its_base(reference, hub, tmp_path):
    _, folder = reference()
    hub.publish(folder)
    model = clinora.load_model("someone/a-base", num_labels=5)
    clinora.apply_lora(model, clinora.LoRAConfig())
    clinora.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/a-base"
    assert config["revision"] == "c0ffee"


def test_shards_are_downloaded_from_the_hub_and_pickles_are_not(shards, hub):
    folder, index = shards
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    hub.publish(folder)
    model = clinora.load_model("someone/a-base", num_labels=5)
    shard_names = {file.name for file in folder.glob("model-*")}
    downloaded = {file.name for file in model.source.folder.iterdir()}
    assert downloaded == {"config.json", "tokenizer.model", index.name} | shard_names


def test_find_config_downloads_no_other_file(reference, hub):
    _, folder = reference()
    hub.publish(folder)
    path = find_config("someone/a-base", "main")
    assert path.read_text() == (folder / "config.json").read_text()
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]
    assert hub.asked == ["main"]


def test_find_tokenizer_downloads_no_other_file(reference, hub):
    _, folder = reference()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    hub.publish(folder, "v2")
    path = find_tokenizer("someone/a-base", "v2")
    assert path.read_bytes() == b"pieces"
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.model"]
    assert hub.asked == ["v2"]


def test_a_base_is_downloaded_with_its_tokenizer_json(reference, hub):
    _, folder = reference()
    (folder / "tokenizer.json").write_text("{}")
    hub.publish(folder)
    assert find_tokenizer(find_base("someone/a-base").folder).read_text() == "{}"


def test_find_tokenizer_finds_tokenizer_json_on_the_hub(reference, hub):
    _, folder = reference()
    (folder / "tokenizer.json").write_text("{}")
    hub.publish(folder)
    path = find_tokenizer("someone/a-base")
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


def test_hub_id_without_a_tokenizer_is_refused_before_its_weights_are_downloaded(
    reference, hub, tmp_path
):
    _, folder = reference()
    hub.publish(folder)
    for load in load_twice("someone/a-base"):
        with pytest.raises(CheckpointError, match=r"a-base holds neither tokenizer\.model nor"):
            load()
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_pickles_on_the_hub_are_refused_with_the_way_to_convert_them(shards, hub):
    folder, _ = shards
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    hub.publish(folder)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickle.*save_pretrained"):
        clinora.load_model("someone/a-base", num_labels=5)


def test_hub_id_without_a_config_is_refused(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    hub.publish(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"there is no .*config\.json"):
        find_config("someone/a-base")


def test_equal_weights_have_equal_hashes_and_different_weights_do_not(reference):
    _, one = reference()
    _, same = reference()
    _, other = reference(seed=1)
    assert weights_sha256(one) == weights_sha256(same)
    assert weights_sha256(one) != weights_sha256(other)


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


def test_a_write_replaces_the_file_and_does_not_change_the_old_one(tmp_path):
    """Someone who has the old file open still reads all of it: the new one is another file."""
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
    """Files that mkstemp creates are readable by their owner only."""
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file.json", b"")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_loading_imports_nothing_that_it_does_not_need():
    """Random numbers on the meta device used to import PyTorch's compiler, which takes seconds."""
    code = "import sys, clinora; clinora.load_model('bundled', num_labels=5); "
    code += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
