"""Token ids against the independent ``tokenizers`` library's (tools/make_token_ids.py)."""

import hashlib
import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from clinora.checkpoint import BUNDLED
from clinora.tokenizer import Tokenizer

HERE = Path(__file__).parent
BUNDLED_MODEL = BUNDLED / "base" / "tokenizer.model"


@pytest.fixture
def llama2(data):
    return data / "llama2-tokenizer.model"


def assert_ids_match(model: Path, expected: Path) -> None:
    expected = json.loads(expected.read_text())
    assert hashlib.sha256(model.read_bytes()).hexdigest() == expected["model_sha256"]
    tokenizer = Tokenizer(model)
    assert len(expected["texts"]) >= 20
    for case in expected["texts"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"][:40]


def test_llama2_ids_are_those_of_the_tokenizers_library(llama2):
    assert_ids_match(llama2, HERE / "token_ids_llama2.json")


def test_bundled_ids_are_those_of_the_tokenizers_library():
    assert_ids_match(BUNDLED_MODEL, HERE / "token_ids_bundled.json")


def test_control_strings_are_spelled_out():
    tokenizer = Tokenizer(BUNDLED_MODEL)
    assert not {0, 1, 2} & set(tokenizer.encode("ends </s> here <s> and <unk> there")[1:])


def test_the_limit_cuts_the_end():
    tokenizer = Tokenizer(BUNDLED_MODEL)
    text = "The patient has chest pain. " * 20
    assert tokenizer.encode(text, 7) == tokenizer.encode(text)[:7]


def test_decode_gives_the_text_back():
    tokenizer = Tokenizer(BUNDLED_MODEL)
    text = "BP 120/80,  two  spaces, naïve — ≥ 5 µg"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    "content, why",
    [(b"", "the file is empty"), (b'{"version": "1.0", "model": {}}', ""), (b"\0\1\2" * 100, "")],
    ids=["empty", "json", "noise"],
)
def test_foreign_file_is_refused(tmp_path, content, why):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"no SentencePiece model .*\({why}"):
        Tokenizer(path)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    whole = BUNDLED_MODEL.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer(path)


def test_model_without_bos_is_refused(tmp_path):
    sentences = iter(["chest pain and shortness of breath", "knee pain after a fall"])
    SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(tmp_path / "nobos"), vocab_size=40,
        model_type="bpe", bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no bos"):
        Tokenizer(tmp_path / "nobos.model")
