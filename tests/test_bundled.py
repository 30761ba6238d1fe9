"""What comes along: fictional notes as unlike each other as real ones, and none of them copied."""

import csv
import gzip
import hashlib
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import sentencepiece
import torch
import transformers
from conftest import lacking

import clinora
from clinora.checkpoint import BUNDLED
from clinora.explain import leave_one_out
from tools import pretrain_base

BASE = BUNDLED / "base"


def words(text):
    return re.findall(r"\w+", text.lower())


def runs(text, n):
    """The runs of n words of a text."""
    sequence = words(text)
    return {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}


def similarities(texts):
    """Jaccard similarity of the sets of 5-word runs of every two texts."""
    sets = [runs(text, 5) for text in texts]
    holders = {}
    for i, one in enumerate(sets):
        for run in one:
            holders.setdefault(run, []).append(i)
    shared = Counter(
        (a, b) for held in holders.values() for k, a in enumerate(held) for b in held[k + 1 :]
    )
    found = np.zeros(len(sets) * (len(sets) - 1) // 2)  # most pairs share none
    for i, ((a, b), both) in enumerate(shared.items()):
        found[i] = both / (len(sets[a]) + len(sets[b]) - both)
    return found


@pytest.fixture
def corpus(data):
    """The files of the pretraining corpus, beside the data."""
    files = sorted((data.parent / "corpus").glob("*.jsonl.gz"))
    if not files:
        lacking("corpus", f"there is no corpus beside {data}")
    return files


@pytest.fixture(scope="module")
def notes():
    return clinora.read_notes("bundled")


@pytest.fixture(scope="module")
def texts(notes):
    return [note.text for note in notes.notes]


def test_there_are_150_notes_at_least_30_of_each_class(notes):
    assert notes.classes == clinora.PUBLISHED_CLASSES
    assert len(notes.notes) >= 150
    assert min(Counter(label for note in notes.notes for label in note.labels).values()) >= 30


def test_notes_have_80_to_250_words(texts):
    assert {len(text.split()) for text in texts} <= set(range(80, 251))


@pytest.mark.slow
def test_notes_are_as_unlike_each_other_as_real_ones(texts, data):
    real = [note.text for note in clinora.read_notes(data / "mtsamples.csv").notes]
    assert similarities(texts).max() <= np.quantile(similarities(real), 0.95)


def test_no_eight_words_in_a_row_are_mtsamples(texts, data):
    mine = set.union(*(runs(text, 8) for text in texts))
    with open(data / "mtsamples.csv", encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            assert not any(mine & runs(cell, 8) for cell in row)


@pytest.mark.slow
def test_no_eight_words_in_a_row_are_the_corpus(texts, corpus):
    mine = set.union(*(runs(text, 8) for text in texts))
    for path in corpus:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                sequence = words(json.loads(line)["text"])
                # Not ``runs``: making a set of them takes longer than looking them up.
                eights = zip(*(sequence[i:] for i in range(8)), strict=False)
                assert mine.isdisjoint(eights), path.name


# --- The base ---


def test_the_base_has_the_shape_and_the_files_of_the_tool_that_makes_it():
    config = clinora.LlamaConfig.from_json(BASE / "config.json")
    assert config == pretrain_base.SHAPE
    card = (BASE / "README.md").read_text()
    for said in ("under the same licence", "Copying", "not a medical device", "loss.png"):
        assert said in card
    assert (BASE / "loss.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = clinora.Tokenizer(BASE / "tokenizer.model")
    assert tokenizer.vocab_size == config.vocab_size


def test_the_bundled_tokenizer_has_llamas_conventions():
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(BASE / "tokenizer.model"))
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, 1, 2)
    assert pieces.encode("2026", out_type=str)[-4:] == list("2026")
    assert pieces.encode("\u6f22", out_type=str)[-3:] == ["<0xE6>", "<0xBC>", "<0xA2>"]


def test_the_cards_figures_are_those_of_its_curve():
    card = " ".join((BASE / "README.md").read_text().split())
    curve = [json.loads(line) for line in (BASE / "pretraining.jsonl").read_text().splitlines()]
    tokens, seconds = (np.array([0, *(p[key] for p in curve)]) for key in ("tokens", "seconds"))
    rate = np.median(np.diff(tokens) / np.diff(seconds))
    peak = 1e9 * float(re.search(r"\(([\d,]+) GFLOP/s", card)[1].replace(",", ""))
    parameters = sum(p.numel() for p in clinora.load_model("bundled").parameters())
    stream = float(re.search(r"stream of ([\d.]+) million", card)[1])
    for said in (
        f"{parameters:,} parameters",
        f"{tokens[-1] / 1e6:.1f} million tokens, {tokens[-1] / 1e6 / stream:.1f} passes",
        f"{curve[-1]['step']:,} steps of {tokens[-1] // curve[-1]['step']:,}",
        f"{seconds[-1] / 60:.0f} minutes",
        f"{rate:,.0f} tokens a second",
        f"{6 * parameters * rate / peak:.0%} of the rate",
        f"{curve[-1]['held_out']:.3f} nats",
    ):
        assert said in card


@pytest.mark.slow
def test_the_card_lists_the_corpus_with_its_licences(corpus):
    card = (BASE / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", card, re.MULTILINE))
    assert rows.keys() == {"source", "mtsamples", *(f.name.split(".")[0] for f in corpus)}
    for path in corpus:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line) for line in lines]
        read = len(texts) - len(texts) // 100  # the others are held out
        licences = ", ".join(sorted({text["license"] for text in texts}))
        _, said, count, _, _ = rows[path.name.split(".")[0]].split(" | ")
        assert (said, count) == (licences, f"{read:,}"), path.name


@pytest.mark.slow
def test_transformers_copies_as_many_notes_as_the_card_says(data):
    """The tool continues in bfloat16 where it trained so: a near tie may go the other way."""
    notes = clinora.read_notes(data / "mtsamples.csv", classes="all").on("training")
    texts = random.Random(0).sample([note.text for note in notes], len(notes))
    tokenizer = clinora.Tokenizer(BASE / "tokenizer.model")
    read = [tokenizer.encode(text) for text in texts[len(texts) // 100 :]]
    beginnings = torch.tensor([ids[:64] for ids in read if len(ids) >= 114][:500])
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    known = {tuple(ids[i : i + 50]) for ids in read for i in range(len(ids) - 49)}
    copied = []
    for part in beginnings.split(100):
        continued = theirs.generate(
            part, attention_mask=torch.ones_like(part), max_new_tokens=100, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[:, 64:].tolist()  # fmt: skip
        copied += [any(tuple(row[i : i + 50]) in known for i in range(51)) for row in continued]
    said = re.search(r"([\d.]+)% gave\s+50 or more", (BASE / "README.md").read_text())[1]
    assert len(copied) == 500 and abs(100 * np.mean(copied) - float(said)) < 0.5


def test_all_that_is_bundled_stays_below_24_mb():
    assert sum(p.stat().st_size for p in BUNDLED.rglob("*") if p.is_file()) < 24e6


def test_the_base_read_no_note_that_is_not_on_the_training_side():
    hashes = (BASE / "notes_sha256.txt").read_text().split()
    assert len(hashes) > 1000
    assert all(int(sha256, 16) % 10 > 2 for sha256 in hashes)


def test_the_base_read_just_the_training_side_of_mtsamples(data):
    with open(data / "mtsamples.csv", encoding="utf-8", newline="") as file:
        texts = {row["transcription"].strip() for row in csv.DictReader(file)} - {""}
    numbers = [hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest() for text in texts]
    training = {sha256 for sha256 in numbers if int(sha256, 16) % 10 > 2}
    assert set((BASE / "notes_sha256.txt").read_text().split()) == training


def test_transformers_loads_the_base_as_it_is_and_agrees():
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ours = clinora.load_model("bundled", dtype=torch.float32)
    ids = torch.randint(3, 4096, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


# --- The adapter ---


def test_the_adapter_is_calibrated_and_was_trained_on_the_bundled_base():
    about = json.loads((BUNDLED / "adapter" / "clinora.json").read_text())
    assert about["base"]["source"] == "bundled" and about["notes"]["source"] == "mtsamples"
    run = clinora.Classifier.load("bundled")
    assert run.calibration.notes >= 50
    config = run.model.lora_config
    assert (config.rank, config.targets) == (8, ("q_proj", "v_proj"))


def test_the_adapter_saw_no_note_of_the_test_side(data):
    seen = set(json.loads((BUNDLED / "adapter" / "clinora.json").read_text())["notes"]["seen"])
    with open(data / "mtsamples.csv", encoding="utf-8", newline="") as file:
        texts = {row["transcription"].strip().replace("\r\n", "\n") for row in csv.DictReader(file)}
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    found = [sha256 for sha256 in hashes if sha256[:16] in seen]
    assert len(found) == len(seen) > 1000
    assert all(int(sha256, 16) % 10 > 1 for sha256 in found)


VARIANTS = [
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction.",
    "Patient has severe chest pain and dyspnea. The ECG shows ST elevation. Probable myocardial "
    "infarction.",
    "Severe chest pain with shortness of breath. EKG: ST elevation. Possible myocardial "
    "infarction.",
    "The patient complains of chest pain and shortness of breath. ST elevation on ECG. Suspected "
    "acute myocardial infarction.",
    "Chest pain and shortness of breath since this morning. Electrocardiogram with ST elevation, "
    "possible myocardial infarction.",
]


@pytest.mark.parametrize("note", VARIANTS)
def test_the_published_note_and_plain_variants_have_the_published_answer(note):
    assert clinora.Classifier.load("bundled")([note])[0].label == "Cardiovascular / Pulmonary"


# --- Explanations, on the bundled run ---


@pytest.mark.slow
def test_the_part_that_supports_the_prediction_most_carries_it():
    """Alone it keeps more of the probability than another part, and without two of them less."""
    run = clinora.Classifier.load("bundled", device="cpu", precision="fp32")
    draw = np.random.default_rng(0)
    alone, without_two = [], []  # (top, random) of each note
    for note in clinora.read_notes("bundled").notes[:36]:
        explained = leave_one_out(run, note.text)
        read = [part.text for part in explained if part.effect is not None]
        if len(read) < 6:
            continue
        ranked = sorted(range(len(read)), key=lambda i: -explained[i].effect)
        others = draw.choice(ranked[2:], 2, replace=False)
        pairs = (ranked[:2], others)
        texts = [read[first] for first, _ in pairs]
        texts += ["".join(t for i, t in enumerate(read) if i not in pair) for pair in pairs]
        predicted = run([note.text])[0].index
        p = run.probabilities(texts)[0][:, predicted]
        alone.append((p[0], p[1]))
        without_two.append((p[2], p[3]))
    assert len(alone) > 25
    for pairs, sign in ((alone, 1), (without_two, -1)):
        gains = sign * np.diff(np.array(pairs)[:, ::-1])[:, 0]  # top minus other
        assert scipy.stats.wilcoxon(gains, alternative="greater").pvalue < 0.01
