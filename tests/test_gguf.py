"""GGUF files become Hub folders: equal to Transformers' reading of the same file, or refused."""

import hashlib
import json
import math
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

import clinora
from clinora.checkpoint import BUNDLED
from tests.checkpoint_files import IDS
from tests.gguf_files import sentencepiece_tokens, small_tokens, write_gguf
from tools import gguf_to_hub
from tools.gguf_to_hub import halves_from_pairs, main, new_folder

TEXTS = [
    "The patient reports severe chest pain and shortness of breath.",
    "BP 120/80, HR 72, T 98.6, SpO2 97% on 2 L, 0.005 mg",
    "two  spaces, three   spaces, and    four",
    "line\nbreaks\n\nand\ttabs\r\n\r\n then",
    "naïve café Müller µg ≥ 5 °C 胸痛 боль 👨‍⚕️🫀",
    "It's the patient's, they'LL and I'd; don't",
    "1234567890 007 3.14159 1e-5",
    "a",
]


@pytest.fixture
def model(reference):
    """A tiny Transformers model with other numbers of query and key heads."""
    return reference(num_labels=None, hidden_size=64, intermediate_size=96)[0]


def converted(file: Path, *options: str) -> Path:
    folder = file.with_suffix("")
    assert main([str(file), str(folder), *options]) == 0
    return folder


def their_reading(file: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def assert_same_logits(file: Path) -> None:
    ours = clinora.load_model(converted(file), dtype=torch.float32).eval()
    theirs = their_reading(file)
    with torch.no_grad():
        expected = theirs(IDS[:1]).logits
        found = ours(IDS[:1])
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --- Weights ---


KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_reading_of_the_file(model, tmp_path, kind):
    assert_same_logits(write_gguf(tmp_path / "small.gguf", model, kind))


def test_logits_of_a_tied_model_equal_transformers_reading(reference, tmp_path):
    model, _ = reference(num_labels=None, intermediate_size=96, tie_word_embeddings=True)
    file = write_gguf(tmp_path / "small.gguf", model, "Q8_0")
    assert_same_logits(file)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["tie_word_embeddings"]


# Where a block of 256 weights has its float16 scales; everything else is drawn at random.
K_QUANTS = {
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}


def random_blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    size, scales = K_QUANTS[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (rows * columns // 256, size), np.uint8)
    for place in scales:
        scale = np.full(len(blocks), 1e-4, np.float16)
        blocks[:, place : place + 2] = scale[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_logits_with_k_quants_equal_transformers_reading(reference, tmp_path, kind):
    model, _ = reference(
        num_labels=None, hidden_size=256, intermediate_size=256, num_hidden_layers=2
    )
    rows = {"attn_q": 256, "attn_k": 64, "attn_v": 64, "ffn_gate": 256, "ffn_down": 256}
    tensors = {}
    for name, count in rows.items():
        tensors[f"blk.0.{name}.weight"] = random_blocks(kind, count, 256), kind
    assert_same_logits(write_gguf(tmp_path / "small.gguf", model, tensors=tensors))


def test_float32_weights_come_back_to_the_bit_under_the_hubs_names(model, tmp_path):
    folder = converted(write_gguf(tmp_path / "small.gguf", model))
    found = load_file(folder / "model.safetensors")
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_rows_go_from_pairs_to_halves_within_each_head():
    rows = np.arange(12)[:, None]
    assert halves_from_pairs(rows, 2).ravel().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize(
    ("kind", "norms", "dtype"),
    [
        ("BF16", torch.bfloat16, "bfloat16"),
        ("F16", torch.float16, "float16"),
        ("F16", torch.float32, "float32"),
        ("BF16", torch.float16, "float32"),
        ("Q4_1", torch.bfloat16, "float32"),
    ],
)
def test_the_dtype_is_the_narrowest_that_holds_every_weight(model, tmp_path, kind, norms, dtype):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(parameter.to(norms))
    folder = converted(write_gguf(tmp_path / "small.gguf", model, kind))
    dtypes = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert dtypes == {getattr(torch, dtype)}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype


def test_bfloat16_is_rounded_on_request(model, tmp_path):
    file = write_gguf(tmp_path / "small.gguf", model, "Q4_1")
    expected = load_file(converted(file) / "model.safetensors")
    assert main([str(file), str(tmp_path / "rounded"), "--bfloat16"]) == 0
    found = load_file(tmp_path / "rounded" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16())


def test_the_same_file_gives_these_bytes_on_every_machine(reference, tmp_path):
    model, _ = reference(num_labels=None, intermediate_size=96, num_hidden_layers=1)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel()) * 37 % 101 - 50
            parameter.copy_((values / 64 + number / 8).view(parameter.shape))
    folder = converted(write_gguf(tmp_path / "small.gguf", model, "Q4_1"))
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == (
        "623d711ce57aca570922509982ba8279e936b7faeede66db8865d0fae9904588"
    )


def test_everyone_may_read_the_files_that_the_umask_allows(model, tmp_path):
    folder = converted(write_gguf(tmp_path / "small.gguf", model))
    other = tmp_path / "other"
    other.write_text("")
    assert {path.stat().st_mode for path in folder.iterdir()} == {other.stat().st_mode}


# --- Configuration ---


def test_the_configuration_is_the_models(model, tmp_path):
    folder = converted(write_gguf(tmp_path / "small.gguf", model))
    found = transformers.AutoConfig.from_pretrained(folder)
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"]
    names += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    names += ["rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act"]
    for name in names:
        assert getattr(found, name) == getattr(model.config, name), name
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)


def llama_cpp_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """Compute rope_freqs as llama.cpp's converter does for Llama 3."""
    low_wavelength = 8192 / 1.0
    high_wavelength = 8192 / 4.0
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_rope_scaling_of_llama_3_is_recovered(reference, tmp_path):
    rope = {"rope_theta": 500_000.0} | LLAMA3
    original, _ = reference(
        num_labels=None, hidden_size=256, intermediate_size=96, rope_parameters=rope
    )
    factors = llama_cpp_factors(500_000.0, 32, 32.0)
    assert len({1.0, 32.0} & set(factors)) == 2 and len(set(factors)) > 2
    tensors = {"rope_freqs.weight": (factors, "F32")}
    folder = converted(write_gguf(tmp_path / "small.gguf", original, tensors=tensors))
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == LLAMA3
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(90)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, original(ids).logits)


def test_factors_that_are_all_one_scale_nothing(model, tmp_path):
    tensors = {"rope_freqs.weight": (np.ones(4, np.float32), "F32")}
    folder = converted(write_gguf(tmp_path / "small.gguf", model, tensors=tensors))
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] is None


# --- Tokenizers ---


def tiny(reference, vocab_size: int) -> torch.nn.Module:
    return reference(
        num_labels=None, vocab_size=vocab_size, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2,
    )[0]  # fmt: skip


def test_a_sentencepiece_model_encodes_as_the_original_and_as_transformers(reference, tmp_path):
    original = BUNDLED / "base" / "tokenizer.model"
    tokens = sentencepiece_tokens(original)
    model = tiny(reference, len(tokens["tokens"]))
    file = write_gguf(tmp_path / "small.gguf", model, tokenizer=tokens)
    path = converted(file) / "tokenizer.model"
    found = sentencepiece.SentencePieceProcessor(model_file=str(path))
    expected = sentencepiece.SentencePieceProcessor(model_file=str(original))
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(found, name)() == getattr(expected, name)()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in [*TEXTS, "<s> and </s> <unk> <0x0A>", "  around  "]:
        assert found.encode(text) == expected.encode(text)
        assert found.normalize(text) == expected.normalize(text)
    for text in TEXTS:
        assert clinora.Tokenizer(path).encode(text) == theirs(text.strip()).input_ids


CONTROLS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
# Written out again: this is the oracle.
LLAMA3_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def byte_level(
    pre_tokenizer, first: list[str], last: list[str]
) -> tuple[dict, tokenizers.Tokenizer]:
    """Train a byte-level BPE; gives its GGUF metadata, and the tokenizer as the oracle."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*model["vocab"], *last]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    oracle = tokenizers.Tokenizer(models.BPE(vocab, merges))
    oracle.pre_tokenizer = pre_tokenizer
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens([AddedToken(token, normalized=False) for token in first + last])
    metadata = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [3 if token in first + last else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": vocab[(first + last)[0]],
        "eos_token_id": vocab[(first + last)[1]],
    }
    return metadata, oracle


@pytest.fixture(scope="module")
def llama3():
    split = pre_tokenizers.Split(LLAMA3_SPLIT, "isolated")
    metadata, oracle = byte_level(pre_tokenizers.Sequence([split, BYTES]), [], CONTROLS)
    return metadata | {"pre": "llama-bpe"}, oracle


@pytest.fixture(scope="module")
def smollm():
    digits = pre_tokenizers.Digits(individual_digits=True)
    parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    metadata, oracle = byte_level(pre_tokenizers.Sequence([digits, parts]), special, [])
    chat = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    return metadata | chat | {"pre": "smollm"}, oracle


def read_tokenizer(reference, tmp_path, metadata) -> tokenizers.Tokenizer:
    model = tiny(reference, len(metadata["tokens"]))
    folder = converted(write_gguf(tmp_path / "small.gguf", model, tokenizer=metadata))
    assert not (folder / "tokenizer.model").exists()
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_llama_bpe_ids_are_those_of_transformers_reading(reference, tmp_path, llama3):
    metadata, oracle = llama3
    found = read_tokenizer(reference, tmp_path, metadata | {"add_bos_token": True})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    for text in TEXTS:
        ids = found.encode(text).ids
        assert ids == theirs(text).input_ids == again(text).input_ids
        assert ids == [metadata["bos_token_id"], *oracle.encode(text).ids]
        assert found.decode(ids) == text
    assert (again.bos_token, again.eos_token) == (CONTROLS[0], CONTROLS[1])


def test_smollm_ids_are_those_of_its_published_pre_tokenizer(reference, tmp_path, smollm):
    metadata, oracle = smollm
    found = read_tokenizer(reference, tmp_path, metadata)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    for text in TEXTS:
        ids = [0, *oracle.encode(text).ids]
        assert found.encode(text).ids == again(text).input_ids == ids


def test_smollm_never_joins_digits(reference, tmp_path, smollm):
    metadata, _ = smollm
    changes = {
        "tokens": [*metadata["tokens"], "20"],
        "token_type": [*metadata["token_type"], 1],
        "merges": ["2 0", *metadata["merges"]],
    }
    found = read_tokenizer(reference, tmp_path, metadata | changes)
    assert found.encode("2024").tokens[1:] == ["2", "0", "2", "4"]


def test_bos_comes_first_with_llama_bpe_unless_the_file_says_no(reference, tmp_path, llama3):
    metadata, _ = llama3
    for add, first in ((None, [metadata["bos_token_id"]]), (False, [])):
        rule = {} if add is None else {"add_bos_token": add}
        (tmp_path / str(add)).mkdir()
        found = read_tokenizer(reference, tmp_path / str(add), metadata | rule)
        assert found.encode("a").ids == [*first, metadata["tokens"].index("a")]


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", ["Ġqzx"]), ("smollm", ["Ġ", *"qzx"])])
def test_a_word_of_the_vocabulary_needs_no_merges_with_llama_bpe(
    reference, tmp_path, llama3, smollm, pre, expected
):
    metadata = (llama3 if pre == "llama-bpe" else smollm)[0]
    tokens = [*metadata["tokens"], "Ġqzx"]
    types = [*metadata["token_type"], 1]
    found = read_tokenizer(reference, tmp_path, metadata | {"tokens": tokens, "token_type": types})
    pieces = found.encode(" qzx", add_special_tokens=False).tokens
    assert pieces == expected


def test_control_strings_can_stay_text_and_user_defined_tokens_are_tokens(
    reference, tmp_path, smollm
):
    metadata, _ = smollm
    tokens = [*metadata["tokens"], "<think>"]
    types = [*metadata["token_type"], 4]
    found = read_tokenizer(reference, tmp_path, metadata | {"tokens": tokens, "token_type": types})
    assert found.encode("<|im_end|>", add_special_tokens=False).ids == [2]
    found.encode_special_tokens = True
    assert 2 not in found.encode("<|im_end|>").ids
    assert found.encode("<think>").ids == [0, len(tokens) - 1]


# --- What is refused ---


def refusal(capsys, file: Path, folder: Path) -> str:
    """Give the one line with which the tool ends with status 2, having written nothing."""
    before = sorted(os.listdir(folder.parent))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(file), str(folder)])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("gguf_to_hub.py: ")
    assert sorted(os.listdir(folder.parent)) == before
    return message


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(model, tmp_path, capsys, share):
    whole = write_gguf(tmp_path / "whole.gguf", model).read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(share * len(whole))])
    assert "is truncated or damaged" in refusal(capsys, cut, tmp_path / "folder")


ONES = np.ones((4, 64), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "has the architecture 'qwen2': expected 'llama'"),
        ({"general__type": "adapter"}, "is not a model"),
        ({"split__count": 2}, "is one part of several"),
        ({"llama__expert_count": 8}, "is a mixture of experts"),
        ({"llama__rope__scaling__type": "linear"}, "scales RoPE"),
        ({"llama__rope__scaling__factor": 4.0}, "scales RoPE"),
        ({"llama__attention__key_length": 16}, "rotates 8 of 16 entries of a head"),
        ({"tensors": {"token_embd.weight": None}}, "has no tensor token_embd.weight"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "missing: model.layers.1.mlp.up_proj.weight"),
        ({"tensors": {"blk.1.ffn_up.weight": (ONES, "F32")}}, "(4 × 64, expected 112 × 64)"),
        ({"tensors": {"blk.0.attn_q.bias": (ONES[0], "F32")}}, "unexpected: blk.0.attn_q.bias"),
        (
            {"tensors": {"rope_freqs.weight": (np.full(4, 8, np.float32), "F32")}},
            "do not follow from the RoPE scaling of Llama 3",
        ),
        (
            {"tensors": {"output.weight": (np.ones((97, 64), np.int8), "I8")}},
            "output.weight has the quantisation I8, which cannot be dequantised",
        ),
        ({"tokenizer": {"model": "t5"}}, "has a tokenizer 't5': expected 'gpt2' or 'llama'"),
        ({"tokenizer": {"model": "gpt2", "pre": "qwen2"}}, "has the pre-tokenizer 'qwen2'"),
        (
            {"tokenizer": {"model": "gpt2", "pre": "smollm"}},
            "has no token <|endoftext|>",
        ),
        (
            {"tokenizer": {"model": "gpt2", "pre": "llama-bpe", "merges": ["no merge"]}},
            "has a damaged tokenizer",
        ),
        ({"tokenizer": {"add_bos_token": False}}, "puts no bos token first"),
        ({"tokenizer": {"bos_token_id": 97}}, "bos_token_id is 97, and there are 97 tokens"),
        ({"tokenizer": {"token_type": [1] * 97}}, "has a damaged tokenizer"),
        ({"tokenizer": {"token_type": [1] * 96}}, "expected different tokens, each with a type"),
        (
            {"tokenizer": {"scores": "none"}},
            "tokenizer.ggml.scores is missing or has the wrong type",
        ),
        (
            {"tokenizer": {"tokens": list(range(97))}},
            "tokenizer.ggml.tokens has elements that are not of type str",
        ),
        (
            {"tokenizer": {"scores": ["0"] * 97}},
            "tokenizer.ggml.scores has elements that are not of type float",
        ),
        ({"tokenizer": {"scores": np.full(97, 1e300)}}, "scores has 1e+300 for the token '<unk>'"),
        ({"tokenizer": {"scores": [0.0] * 96 + [math.inf]}}, "scores has inf for the token '93'"),
        ({"tokenizer": {"scores": [0.0] * 96 + [math.nan]}}, "scores has nan for the token '93'"),
        ({"llama__block_count": 10**9}, "num_hidden_layers is 1000000000: expected at most 1000"),
        (
            {"tokenizer": {"token_type": ["1"] * 97}},
            "tokenizer.ggml.token_type has elements that are not of type int",
        ),
        ({"tokenizer": {"token_type": [-1] * 97}}, "has a token of type -1: expected 0 or more"),
        (
            {"tokenizer": {"add_bos_token": "false"}},
            "tokenizer.ggml.add_bos_token is missing or has the wrong type",
        ),
        (
            {"tokenizer": {"add_space_prefix": [1]}},
            "tokenizer.ggml.add_space_prefix is missing or has the wrong type",
        ),
        (
            {"tokenizer": {"model": "gpt2", "pre": ["smollm"]}},
            "tokenizer.ggml.pre is missing or has the wrong type",
        ),
        ({"tokenizer": small_tokens(98)}, "has 98 tokens and 97 embeddings"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(reference, tmp_path, capsys, changes, message):
    model, _ = reference(num_labels=None)
    if "tokenizer" in changes:
        changes = changes | {"tokenizer": small_tokens(97) | changes["tokenizer"]}
    file = write_gguf(tmp_path / "small.gguf", model, **changes)
    assert message in refusal(capsys, file, tmp_path / "folder")


def test_an_unknown_quantisation_is_refused_by_its_number(model, tmp_path, capsys):
    file = write_gguf(tmp_path / "small.gguf", model)
    reader = gguf.GGUFReader(file, "r+")
    reader.tensors[3].field.parts[4][0] = 999
    reader.data.flush()
    assert "has a tensor of quantisation type 999, which is unknown" in refusal(
        capsys, file, tmp_path / "folder"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\3\4", "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_another_file_is_refused(tmp_path, capsys, content, message):
    file = tmp_path / "small.gguf"
    file.write_bytes(content)
    assert message in refusal(capsys, file, tmp_path / "folder")


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert "small.gguf" in refusal(capsys, tmp_path / "small.gguf", tmp_path / "folder")


def test_a_folder_with_files_is_refused_and_stays(model, tmp_path, capsys):
    file = write_gguf(tmp_path / "small.gguf", model)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    assert "folder exists already" in refusal(capsys, file, folder)
    assert (folder / "mine").read_text() == "mine"


def test_without_the_package_gguf_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = refusal(capsys, tmp_path / "small.gguf", tmp_path / "folder")
    assert "the package gguf is not installed" in message and "-e '.[gguf]'" in message


def test_an_interrupted_conversion_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "small.gguf", model)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_to_hub, "save_file", interrupt)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main([str(file), str(tmp_path / "folder")])
    assert ended.value.code == 130
    assert sorted(os.listdir(tmp_path)) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("text")
        assert os.listdir(tmp_path / "empty") == []
    assert (tmp_path / "empty" / "file").read_text() == "text"
