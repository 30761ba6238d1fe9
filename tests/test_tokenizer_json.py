"""tokenizer.json: against the tokenizers library, and a byte-level BPE written out beside it."""

import csv
import json
import random
import shutil

import pytest
import tokenizers
import torch
import transformers
from fastapi.testclient import TestClient
from tokenizers import models, pre_tokenizers, processors

import clinora
from clinora.checkpoint import BUNDLED, CheckpointError
from clinora.explain import Part, leave_one_out
from clinora.notes import Note
from clinora.serving.app import create_app
from clinora.tokenizer import Tokenizer
from tests import tokenizer_files
from tests.tokenizer_files import (
    CONTROL,
    NOT_SPECIAL,
    PLAIN,
    ByteLevelBPE,
    llama3_tokenizer,
    smollm_tokenizer,
    with_added_tokens,
)
from tools.make_token_ids import TEXTS, build

MAKERS = {"llama3": llama3_tokenizer, "smollm": smollm_tokenizer}
NO_PIECES = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u6c34\u0301\ufb01\u00a0\u3000\ufeff"


@pytest.fixture(scope="module", params=MAKERS)
def made(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def ours(made, tmp_path_factory):
    return opened(made, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def oracle(made):
    return ByteLevelBPE(made)


def opened(made: tokenizers.Tokenizer, folder, **changes) -> Tokenizer:
    """Write tokenizer.json, with other values for some of its keys, and open it."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(made.to_str()) | changes), encoding="utf-8")
    return Tokenizer(path)


def strings(count: int) -> list[str]:
    """Give texts of words, numbers, white space, rare characters and control strings."""
    draw = random.Random(0)
    words = " ".join(tokenizer_files.WORDS).split()
    words += [
        "embolism",
        "stroke",
        "don't",
        "I'LL",
        "we\u2019ve",
        "7",
        "12345",
        "\u00bd\u00b2\u0663",
    ]
    controls = [*CONTROL, *NOT_SPECIAL, "<|endoftext|>", "<|im_start|>", "<unk>", "<0x0A>"]
    marks = [*" \n\t.,;:-/()<>|'\"\r", "  ", "\n\n", " \n", "...", *NO_PIECES]

    def rare() -> str:
        point = draw.choice([draw.randrange(32, 0x3000), draw.randrange(0xE000, 0x110000)])
        return chr(point)

    kinds = [
        lambda: draw.choice(words),
        lambda: " " + draw.choice(words),
        lambda: draw.choice(marks),
        lambda: draw.choice(controls),
        rare,
    ]
    texts = [
        "".join(draw.choice(kinds)() for _ in range(draw.randrange(1, 60))) for _ in range(count)
    ]
    return [text.strip() or "x" for text in texts]


def assert_ids_and_places(tokenizer: Tokenizer, oracle: ByteLevelBPE, texts: list[str]) -> None:
    front = len(tokenizer.first)
    for text in texts:
        ids, places = oracle.encode(text)
        assert tokenizer.encode(text) == [*tokenizer.first, *ids], text[:80]
        assert tokenizer.places(text) == [(0, 0)] * front + places, text[:80]


def test_ids_and_places_are_those_of_byte_level_bpe(ours, oracle):
    assert_ids_and_places(ours, oracle, strings(1000))


@pytest.mark.slow
def test_ids_and_places_of_real_notes_are_those_of_byte_level_bpe(data, ours, oracle):
    csv.field_size_limit(2**31 - 1)
    with (data / "mtsamples.csv").open(encoding="utf-8", newline="") as file:
        notes = sorted({row["transcription"].strip() for row in csv.DictReader(file)} - {""})
    assert_ids_and_places(ours, oracle, random.Random(0).sample(notes, 1000))


def test_ids_and_places_are_those_of_the_tokenizers_library(made, ours):
    """The library gives each token of a divided character the whole character."""
    library = tokenizers.Tokenizer.from_str(made.to_str())
    library.encode_special_tokens = True
    without_template = tokenizers.Tokenizer.from_str(made.to_str())
    without_template.encode_special_tokens = True
    without_template.post_processor = None  # it would take spaces off the places
    for text in strings(1000):
        assert ours.encode(text) == library.encode(text).ids
        theirs = without_template.encode(text).offsets
        mine = ours.places(text)[len(ours.first) :]
        assert [begin for begin, _ in mine] == [begin for begin, _ in theirs]
        begins = [*(begin for begin, _ in theirs[1:]), len(text)]
        assert [end for _, end in mine] == [
            min(end, begin) for (_, end), begin in zip(theirs, begins, strict=True)
        ]


def test_the_oracle_sees_words_that_no_merges_lead_to():
    made = llama3_tokenizer()
    ids, places = ByteLevelBPE(made).encode("embolism of a stroke embolism")
    assert made.token_to_id("\u0120embolism") == ids[-1] and places[-1] == (20, 29)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
def test_a_limit_cuts_ids_and_places_and_changes_none(ours, oracle, limit):
    for text in [*strings(200), "\U0001f642" * 40, "\U0001f642 \u6f22"]:
        ids, places = ours.encode(text), ours.places(text)
        assert ours.encode(text, limit) == ids[:limit]
        assert ours.places(text, limit) == places[:limit]


def test_white_space_around_a_note_is_removed(ours):
    assert ours.encode(" \n chest pain\n") == ours.encode("chest pain")
    assert ours.places(" \n chest pain\n")[-1] == (ours.places("chest pain")[-1][0], 10)


def test_decode_gives_the_text_without_control_ids(tmp_path):
    tokenizer = opened(llama3_tokenizer(), tmp_path)
    text = "BP 120/80,  two  spaces, na\u00efve \u2014 \u2265 5 \u00b5g \U0001f642 </s>"
    assert len(tokenizer.first) == 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


# --- added tokens ---


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_no_added_token_is_in_a_note_special_or_not(tmp_path, maker):
    """The oracle knows no added tokens: it spells all of them out."""
    made = with_added_tokens(maker())
    described = json.loads(made.to_str())
    added = [token["content"] for token in described["added_tokens"]]
    controls = [content for content in added if content not in PLAIN]
    assert {*NOT_SPECIAL} < {*controls} and len(controls) >= 5
    tokenizer = opened(made, tmp_path)
    texts = [*controls, "".join(controls), *(f"Note {c} ends{c}here {c}\n{c}." for c in controls)]
    assert_ids_and_places(tokenizer, ByteLevelBPE(made), texts)
    for token in described["added_tokens"]:
        if token["content"] in controls:
            assert token["id"] not in tokenizer.encode(" ".join(texts))[len(tokenizer.first) :]


def test_white_space_and_single_characters_remain_tokens_as_the_base_was_trained(tmp_path):
    made = with_added_tokens(smollm_tokenizer())
    ids = [made.token_to_id(content) for content in PLAIN]
    text = "f\u00fcr   all"
    assert {*ids} < {*made.encode(text).ids}
    tokenizer = opened(made, tmp_path)
    assert tokenizer.encode(text) == made.encode(text).ids
    assert tokenizer.places(text) == [(0, 1), (1, 2), (2, 3), (3, 6), (6, 9)]


def test_a_tokenizer_that_joins_the_characters_of_a_control_string_is_refused(tmp_path):
    """Its training text had the string, and nothing divides it: the merges lead to its id."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.train_from_iterator(
        ["end</s>", "</s>begin", "x</s>"] * 9, tokenizer_files.trainer(["<s>"])
    )
    assert made.token_to_id("</s>") is not None
    made.add_special_tokens(["</s>"])
    with pytest.raises(ValueError, match=r"tokenizer\.json makes .*'</s>' .* control token"):
        opened(made, tmp_path)


# --- the first tokens ---


def template(made, single: str) -> processors.TemplateProcessing:
    names = [part for part in single.split() if part != "$A"]
    pairs = [(name, made.token_to_id(name)) for name in names]
    return processors.TemplateProcessing(single=single, special_tokens=pairs)


@pytest.mark.parametrize(
    ("single", "first"),
    [
        ("<|begin_of_text|> $A", ["<|begin_of_text|>"]),
        ("$A", []),
        ("<s> <|begin_of_text|> $A", ["<s>", "<|begin_of_text|>"]),
        ("<s> $A </s>", ["<s>"]),
        ("$A </s>", []),
    ],
)
def test_what_the_template_puts_in_front_is_in_front_and_its_end_is_left_out(
    tmp_path, single, first
):
    made = llama3_tokenizer()
    made.post_processor = template(made, single)
    tokenizer = opened(made, tmp_path)
    assert list(tokenizer.first) == [made.token_to_id(name) for name in first]
    made.post_processor = None
    assert tokenizer.encode("chest pain") == [*tokenizer.first, *made.encode("chest pain").ids]
    assert tokenizer.places("chest")[: len(first)] == [(0, 0)] * len(first)


def test_a_post_processor_without_a_template_puts_nothing_in_front(tmp_path):
    made = smollm_tokenizer()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = opened(made, tmp_path)
    text = "chest   pain "
    assert tokenizer.first == ()
    assert "".join(text[slice(*place)] for place in tokenizer.places(text)) == text.strip()


# --- the file ---


def test_truncation_padding_and_dropout_of_the_file_do_not_count(tmp_path):
    made = smollm_tokenizer()
    text = "The patient reports severe chest pain and shortness of breath."
    expected = made.encode(text).ids
    made.enable_truncation(4)
    made.enable_padding(length=64)
    described = json.loads(made.to_str())
    model = described["model"] | {"dropout": 0.5}
    tokenizer = opened(made, tmp_path, model=model)
    assert tokenizer.encode(text) == tokenizer.encode(text) == expected


def test_the_number_of_ids_counts_added_tokens(tmp_path):
    made = llama3_tokenizer()
    last = max(made.get_vocab(with_added_tokens=True).values())
    assert made.token_to_id("</s>") == last
    assert opened(made, tmp_path).vocab_size == last + 1


def test_both_files_of_one_tokenizer_give_the_same_ids_and_places(tmp_path):
    """The file is converted from SentencePiece, as Llama 2's was."""
    model = BUNDLED / "base" / "tokenizer.model"
    converted = build(model)
    converted.add_special_tokens(["<unk>", "<s>", "</s>"])
    converted.post_processor = template(converted, "<s> $A")
    ours, theirs = opened(converted, tmp_path), Tokenizer(model)
    assert (ours.first, ours.vocab_size) == (theirs.first, theirs.vocab_size)
    for text in [*TEXTS, *strings(300)]:
        if text.strip() and "\0" not in text:
            assert ours.encode(text) == theirs.encode(text), text[:80]
            assert ours.places(text) == theirs.places(text), text[:80]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "damaged"),
        (b"{}", "it has no model"),
        (b"[1, 2]", "it has no model"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "out of vocabulary"),
        (b'{"model": {"type": "Other"}}', "damaged"),
        (b'{"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "[UNK]"}}', "UNK"),
        (b"\0\1\2" * 100, "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:9e\nsize 4\n", "Git LFS"),
        (b"\n<html><body>Sign in</body></html>", "web page"),
    ],
    ids=["empty", "object", "list", "merges", "model", "unknown", "noise", "Git LFS", "web page"],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, why):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json .*{why}") as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path):
    whole = smollm_tokenizer().to_str()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_drops_characters_is_refused(tmp_path):
    """Without the bytes in its alphabet, it has tokens only for what its training text had."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(["chest pain"], tokenizers.trainers.BpeTrainer(show_progress=False))
    with pytest.raises(ValueError, match="has no token for"):
        opened(made, tmp_path)


def test_an_added_token_with_an_id_that_the_library_does_not_give_is_refused(tmp_path):
    made = llama3_tokenizer()
    added = json.loads(made.to_str())["added_tokens"]
    added[-1]["id"] += 5
    with pytest.raises(ValueError, match=rf"lists '</s>' with the id {added[-1]['id']}"):
        opened(made, tmp_path, added_tokens=added)


# --- a base with it ---

NOTES = [Note(f"{text} {i}", (i % 2,)) for i in range(6) for text in tokenizer_files.WORDS[:4]]
LABELS = ["A", "B"]


@pytest.fixture(scope="module", params=MAKERS)
def base(request, tmp_path_factory):
    """A small random base with tokenizer.json alone."""
    folder = tmp_path_factory.mktemp("base")
    made = MAKERS[request.param]()
    shape = transformers.LlamaConfig(
        vocab_size=made.get_vocab_size() + 8, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The folder of a run that was trained on the base."""
    folder = tmp_path_factory.mktemp("run")
    classifier = clinora.Classifier.new(
        base, LABELS, token_limit=24, device="cpu", precision="fp32"
    )
    clinora.train(classifier, NOTES, NOTES[:4], clinora.TrainingConfig(steps=4), folder)
    classifier.save(folder)
    expected = classifier([note.text for note in NOTES])
    return folder, expected


@pytest.fixture
def classifier(run):
    folder, _ = run
    return clinora.Classifier.load(folder, device="cpu", precision="fp32")


def test_a_run_is_trained_saved_and_loaded(base, run, classifier):
    _, expected = run
    assert classifier([note.text for note in NOTES]) == expected
    library = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    tokens = [len(library.encode(note.text).ids) for note in NOTES]
    assert [prediction.tokens for prediction in expected] == [min(n, 25) for n in tokens]
    assert [prediction.truncated for prediction in expected] == [n > 24 for n in tokens]


def test_the_service_predicts_what_the_run_predicts(run, classifier, tmp_path):
    _, expected = run
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        answer = client.post("/v1/classify", json={"note": NOTES[0].text}).json()
    assert answer["label"] == expected[0].label
    assert answer["tokens_read"] == min(24, expected[0].tokens)


def test_an_explanation_ends_exactly_where_the_last_token_ends(base, classifier):
    """Inside a sentence, and before a character of which not all bytes were read."""
    library = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    note = "Chest pain. " + "Knee \U0001f642\U0001f642 swollen \u6f22\u5b57 " * 4 + "No fever."
    oracle = ByteLevelBPE(library)
    _, places = oracle.encode(note)
    for limit in range(2, 40):
        classifier.token_limit = limit
        *read, unread = leave_one_out(classifier, note)
        end = places[limit - len(classifier.tokenizer.first) - 1][1]
        assert "".join(part.text for part in read) == note[:end]
        assert unread == Part(note[end:], None)


def test_a_run_is_bound_to_its_tokenizer_json(base, run, tmp_path):
    folder, _ = run
    other = tmp_path / "base"
    shutil.copytree(base, other)
    clinora.Classifier.load(folder, base=other, device="cpu")
    made = llama3_tokenizer()
    made.add_special_tokens(["<more>"])
    made.save(str(other / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json in .* trained"):
        clinora.Classifier.load(folder, base=other, device="cpu")
