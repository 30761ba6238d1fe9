"""Token ids against the independent ``tokenizers`` library's (tools/make_token_ids.py)."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

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


SENTENCES = ["chest pain and shortness of breath", "knee pain after a fall", "haha hahaha ha"] * 20


def trained(folder: Path, sentences: list[str] = SENTENCES, **options) -> Path:
    """Train a small tokenizer of Llama's kind but for the options."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=2,
        hard_vocab_limit=False, **{"model_type": "bpe", "vocab_size": 330} | options,
    )  # fmt: skip
    (folder / "trained.model").write_bytes(model.getvalue())
    return folder / "trained.model"


def texts_to_cut(tokenizer: Tokenizer) -> list[str]:
    """Give texts with many, few and no places where a beginning can be cut off."""
    draw = random.Random(0)
    pieces = [tokenizer.decode([i]) for i in range(3, tokenizer.vocab_size)]
    letters, mixed = "abcdefghijklmnopqrstuvwxyz", "ab  \n\t19.-\u2014\U0001f600\u6f22\u00e9\u2581"
    texts = [
        *("".join(draw.choices(letters, k=3000)) for _ in range(20)),
        *("".join(draw.choices(mixed, k=3000)) for _ in range(20)),
        *("".join(draw.choices(pieces, k=1500)) for _ in range(20)),
        *("".join(chr(draw.randrange(32, 0xD800)) for _ in range(2000)) for _ in range(20)),
        *(letter * 2999 + "end" for letter in "abhx-=\u6f22\U0001f600\u0301\ufb01"),
        *("x" * i + " " * 3000 + "end" for i in range(1, 17)),
        "".join(draw.choices(letters, k=100_000)),
        "ha" * 50_000,
        "\n" * 2000 + "x" + "\t \n" * 2000 + "end",
        "0123456789" * 1000,
        "<0x0A><s></s><unk>" * 1000,
        "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 1000,
        "",
        "x",
    ]
    return texts


def assert_limits_cut(tokenizer: Tokenizer, texts: list[str], limits: tuple[int, ...]) -> None:
    """The first ids, read of a beginning, are those of the whole text; so are their places."""
    for text in texts:
        ids, places = tokenizer.encode(text), tokenizer.places(text)
        for limit in limits:
            assert tokenizer.encode(text, limit) == ids[:limit], (limit, text[:40])
            assert tokenizer.places(text, limit) == places[:limit], (limit, text[:40])


LIMITS = (1, 2, 7, 33, 130, 513)


def test_the_limit_cuts_the_end_and_changes_no_id_before_it():
    tokenizer = Tokenizer(BUNDLED_MODEL)
    assert_limits_cut(tokenizer, texts_to_cut(tokenizer), LIMITS)


def test_the_limit_changes_no_id_of_llama2s(llama2):
    tokenizer = Tokenizer(llama2)
    assert_limits_cut(tokenizer, texts_to_cut(tokenizer), LIMITS)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "byte_fallback": True},
        {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
        {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True},
        {"normalization_rule_name": "identity", "byte_fallback": False, "vocab_size": 60},
        {
            "normalization_rule_name": "identity", "byte_fallback": True,
            "remove_extra_whitespaces": False, "split_by_whitespace": False,
            "user_defined_symbols": ["xx", "1 9", "==="],
        },
        {
            "normalization_rule_name": "identity", "byte_fallback": True,
            "remove_extra_whitespaces": False, "treat_whitespace_as_suffix": True,
        },
        {
            "normalization_rule_name": "identity", "byte_fallback": True,
            "remove_extra_whitespaces": False, "add_dummy_prefix": False,
        },
        {
            "normalization_rule_name": "identity", "byte_fallback": True,
            "remove_extra_whitespaces": False, "model_type": "unigram",
        },
    ],
    ids=["spaces", "nfkc", "folded", "unknown", "across", "suffix", "no prefix", "unigram"],
)  # fmt: skip
def test_the_limit_changes_no_id_of_other_kinds_of_tokenizers(tmp_path, options):
    tokenizer = Tokenizer(trained(tmp_path, **options))
    texts = [text[:4000] for text in texts_to_cut(tokenizer)]
    assert_limits_cut(tokenizer, texts, LIMITS)


def test_a_last_letter_that_decides_the_first_tokens_is_read(tmp_path):
    """Here each two letters that follow each other are a piece, and later ones are joined first.

    So a run of letters is in pairs from its end: with a letter more all its tokens are others.
    """
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pairs = [a + b for a, b in itertools.pairwise(letters)]
    sentences = [pair for i, pair in enumerate(pairs) for _ in range(i + 5)]
    tokenizer = Tokenizer(
        trained(
            tmp_path, sentences, normalization_rule_name="identity", byte_fallback=True,
            remove_extra_whitespaces=False, add_dummy_prefix=False, vocab_size=400,
        )
    )  # fmt: skip
    whole, shorter = tokenizer.encode(letters), tokenizer.encode(letters[:-1])
    assert [len(tokenizer.decode([i])) for i in whole[1:]] == [2] * 26
    assert not set(whole[1:]) & set(shorter[1:])
    texts = [letters, letters[:-1], f"{letters} {letters}", f"{letters[:-1]}-{letters}"]
    assert_limits_cut(tokenizer, texts, tuple(range(1, 60)))


@pytest.mark.parametrize("model", ["bundled", "llama2"])
def test_the_limit_changes_no_id_of_a_real_note(data, llama2, model):
    tokenizer = Tokenizer(BUNDLED_MODEL if model == "bundled" else llama2)
    csv.field_size_limit(2**31 - 1)
    with (data / "mtsamples.csv").open(encoding="utf-8", newline="") as file:
        notes = sorted({row["transcription"] for row in csv.DictReader(file)})
    for note in notes:
        ids = tokenizer.encode(note)
        for limit in (129, 513):
            assert tokenizer.encode(note, limit) == ids[:limit]


@pytest.fixture
def read(monkeypatch):
    """The lengths of the texts that reach SentencePiece."""
    lengths, encode = [], SentencePieceProcessor.encode

    def note_and_encode(self, text, *arguments, **options):
        lengths.append(len(text))
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(SentencePieceProcessor, "encode", note_and_encode)
    return lengths


@pytest.mark.parametrize(
    "text",
    [
        "chest pain and fever " * 5000,
        "x" * 100_000,
        "0123456789" * 10_000,
        "\U0001f600" * 100_000,
        "one\n" * 25_000,
        "x" + " " * 100_000 + "x",
        "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000)),
    ],
    ids=["words", "x", "digits", "emoji", "lines", "spaces", "letters"],
)
def test_of_a_long_text_no_more_is_read_than_its_first_tokens_need(read, text):
    tokenizer = Tokenizer(BUNDLED_MODEL)
    read.clear()
    tokenizer.encode(text, 513)
    tokenizer.places(text, 513)
    longest = 16  # characters of a piece
    assert len(read) == 2 and max(read) <= 513 * longest + 100


def test_a_run_that_cannot_be_cut_is_read_once(read):
    tokenizer = Tokenizer(BUNDLED_MODEL)
    read.clear()
    tokenizer.encode("th" * 50_000, 513)
    assert sum(read) <= 100_000


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
    with pytest.raises(ValueError, match=rf"SentencePiece model .*\({why}"):
        Tokenizer(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:9e\nsize 499723\n", "Git LFS"),
        (b"\n<html><body>Sign in</body></html>", "web page"),
        (gzip.compress(b"pieces"), "compressed"),
        (b'{"version": "1.0", "model": {}}', r"tokenizer\.json"),
    ],
    ids=["Git LFS", "web page", "gzip", "json"],
)
def test_another_file_in_its_place_is_recognised(tmp_path, content, kind):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model .*{kind}"):
        Tokenizer(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        Tokenizer(tmp_path)


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
