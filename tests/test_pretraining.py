"""The pretraining tool on a corpus of a few texts."""

import dataclasses
import functools
import gzip
import hashlib
import json

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
import transformers

import clinora
from clinora.checkpoint import CheckpointError
from clinora.llama import LlamaConfig, LlamaForCausalLM, RopeScaling
from tools import pretrain_base as tool
from tools.pretraining import card, corpus, loop, tokenizer

SHAPE = LlamaConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    tie_word_embeddings=True,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 300, 4000).astype(np.uint16)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tool, "SHAPE", SHAPE)
    monkeypatch.setattr(loop, "STAGES", ((16, 0.5), (32, 1.0)))
    few = {"beginnings": 5, "prompt": 16, "continued": 20, "run": 8}
    monkeypatch.setattr(card, "COPYING", few)
    # Where the hardware has no bfloat16, the large product takes seconds.
    monkeypatch.setattr(loop, "matmul_rate", functools.partial(loop.matmul_rate, size=64))


@pytest.fixture
def folders(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = ["chest", "pain", "fever", "cough", "wound", "plate", "screw", "scan", "dose", "mg"]
    draw = np.random.default_rng(1)
    texts = [" ".join(draw.choice(words, 30)) + f" case {i}." for i in range(300)]
    with gzip.open(folder / "cases.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t, "license": "CC0"}) + "\n" for t in texts[:200])
    notes = tmp_path / "notes.csv"
    rows = "".join(f"{t},{'Heart' if i % 2 else 'Bone'}\n" for i, t in enumerate(texts[200:]))
    notes.write_text("transcription,medical_specialty\n" + rows)
    return folder, notes, texts[200:]


def pretrain(folder, steps=10, resume=False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE)
    options = {"steps": steps, "tokens": 64, "lr": 1e-2, "seed": 0}
    curve = loop.pretrain(model, IDS, IDS, folder=folder, resume=resume, **options)
    return model, curve


def bits(model):
    return {name: p.detach().view(torch.int16) for name, p in model.named_parameters()}


def test_a_resumed_pretraining_ends_with_the_bits_of_a_whole_one(small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 3)
    monkeypatch.setattr(loop, "LOSS_EVERY", 2)
    whole, curve = pretrain(tmp_path / "whole")
    learn, calls = loop.learn, []

    def stop(model, window, backward):
        calls.append(backward)
        if sum(calls) == 8:  # after the checkpoint of step 6, in the second stage
            raise KeyboardInterrupt
        return learn(model, window, backward)

    monkeypatch.setattr(loop, "learn", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "run")
    monkeypatch.setattr(loop, "learn", learn)
    resumed, again = pretrain(tmp_path / "run", resume=True)
    assert all(torch.equal(a, bits(resumed)[name]) for name, a in bits(whole).items())
    losses = [[(p["step"], p["loss"], p["held_out"]) for p in c] for c in (curve, again)]
    assert losses[0] == losses[1] and [step for step, *_ in losses[0]] == [2, 4, 6, 8, 10]


def test_another_training_is_not_resumed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 3)
    pretrain(tmp_path / "run", steps=4)
    with pytest.raises(CheckpointError, match=r"training\.steps.*4.*6"):
        pretrain(tmp_path / "run", steps=6, resume=True)


def test_a_loss_that_is_not_finite_ends_the_training_before_a_checkpoint(small, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE)
    with pytest.raises(FloatingPointError, match=r"nan at step [23]\b.*--lr"):
        loop.pretrain(
            model, IDS, IDS, steps=4, tokens=64, lr=1e30, seed=0, folder=tmp_path, resume=False
        )
    assert not list(tmp_path.iterdir())


def test_loss_and_gradients_are_those_of_cross_entropy_in_float64(small):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE).bfloat16()
    model.model.embed_tokens.float()
    model.model.embed_tokens.register_forward_hook(lambda *x: x[-1].bfloat16())
    window = torch.from_numpy(IDS[:2600].astype(np.int64)).view(40, 65)  # 2,560 targets: 3 parts
    loss = loop.learn(model, window, backward=True)
    exact = LlamaForCausalLM(SHAPE).double()
    exact.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    logits = exact(window[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-3)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (p.grad.double() - q.grad).norm() / q.grad.norm()
        assert error < 0.02, name  # bfloat16 keeps 8 bits


def test_every_window_is_dealt_once_an_epoch_and_targets_follow_inputs():
    ids = np.arange(1001, dtype=np.uint16)
    dealt = loop.windows(ids, 10, 20, seed=0)
    for _ in range(2):
        epoch = torch.cat([next(dealt) for _ in range(5)])  # (100, 11)
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 1000, 10))
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(11))


def command(folder, notes, out, *more):
    words = ["--corpus", folder, "--notes", notes, "--out", out, "--tokens", 640, "--batch", 64]
    words += ["--checkpoints", out.parent / "checkpoints", "--device", "cpu", "--lr", 1e-2, *more]
    return [str(word) for word in words]


def test_the_tool_writes_a_base_and_the_hashes_of_the_notes_that_it_read(small, folders, tmp_path):
    folder, notes, texts = folders
    out = tmp_path / "base"
    assert tool.main(command(folder, notes, out)) == 0

    numbers = {text: int(hashlib.sha256(text.encode()).hexdigest(), 16) for text in texts}
    training = {f"{n:064x}" for n in numbers.values() if n % 10 > 2}
    assert set((out / "notes_sha256.txt").read_text().split()) == training
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and "| cases |" in card

    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = clinora.load_model(out, dtype=torch.float32)
    ids = torch.randint(3, 300, (2, 20))
    with torch.no_grad():
        assert torch.equal(ours(ids), theirs(ids).logits)


def test_the_tokenizer_has_llamas_conventions_and_forgets_nothing():
    texts = ["The dose was 25 mg, then 250 mg."] * 20
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.train_tokenizer(texts, 290))
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert pieces.encode("250", out_type=str)[-3:] == ["2", "5", "0"]
    for text in ("dose 25 mg €", "  two  spaces\nand\ttabs "):  # not in the texts: as bytes
        assert pieces.decode(pieces.encode(text)) == text


def test_the_tokenizer_learns_from_long_lines_too():
    long = "zyxwv " * 2000  # 12,000 bytes; SentencePiece leaves out lines of more than 4,192
    model = tokenizer.train_tokenizer([long, "The dose was 25 mg."], 290)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(pieces.encode("zyxwv zyxwv")) == 2


def test_the_tokenizer_of_many_lines_is_the_same_every_time(monkeypatch):
    monkeypatch.setattr(tokenizer, "TOKENIZER_LINES", 50)
    draw = np.random.default_rng(2)
    letters = draw.choice(list("abcdefgh"), (500, 12))
    texts = ["\n".join("".join(word) for word in rows) for rows in letters.reshape(50, 10, 12)]
    assert tokenizer.train_tokenizer(texts, 290) == tokenizer.train_tokenizer(texts, 290)


def test_a_killed_tool_goes_on_to_the_same_files(small, folders, tmp_path, monkeypatch, capsys):
    folder, notes, _ = folders
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 4)
    whole, out = tmp_path / "whole" / "base", tmp_path / "stopped" / "base"
    assert tool.main(command(folder, notes, whole)) == 0
    learn, calls = loop.learn, []

    def stop(model, window, backward):
        calls.append(backward)
        if sum(calls) == 6:
            raise KeyboardInterrupt
        return learn(model, window, backward)

    monkeypatch.setattr(loop, "learn", stop)
    with pytest.raises(SystemExit, match="130"):
        tool.main(command(folder, notes, out))
    assert not out.exists() and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(loop, "learn", learn)
    checkpoints = out.parent / "checkpoints"
    kept = {path: path.read_bytes() for path in checkpoints.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        tool.main(command(folder, notes, out))
    assert "--resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in checkpoints.iterdir()} == kept
    assert tool.main(command(folder, notes, out, "--resume")) == 0
    for name in ("model.safetensors", "tokenizer.model", "config.json", "notes_sha256.txt"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_the_written_config_carries_a_scaling_of_rope(small, folders, tmp_path, monkeypatch):
    folder, notes, _ = folders
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )
    shape = dataclasses.replace(SHAPE, rope_theta=5e5, rope_scaling=scaling)
    monkeypatch.setattr(tool, "SHAPE", shape)
    assert tool.main(command(folder, notes, tmp_path / "base")) == 0
    assert LlamaConfig.from_json(tmp_path / "base" / "config.json") == shape
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path / "base").rope_parameters
    assert theirs == dataclasses.asdict(scaling) | {"rope_type": "llama3", "rope_theta": 5e5}


def test_a_note_is_followed_by_what_the_file_says_of_it_but_never_by_its_specialty(tmp_path):
    words = " ".join(f"word{i}" for i in range(400))
    texts = [f"{words} end{i}" for i in range(20)]
    file = tmp_path / "notes.csv"
    header = "description,medical_specialty,sample_name,transcription\n"
    rows = (f"About {i}., Specialty{i % 2},Name {i} - 3,{text}\n" for i, text in enumerate(texts))
    file.write_text(header + "".join(rows))
    folder = tmp_path / "corpus"
    folder.mkdir()
    with gzip.open(folder / "cases.jsonl.gz", "wt") as lines:
        lines.write(json.dumps({"text": "A case.", "license": "CC0"}))
    mixed = corpus.mix(corpus.read_sources(folder, str(file), seed=0), seed=0)
    training = [
        i for i, t in enumerate(texts) if int(hashlib.sha256(t.encode()).hexdigest(), 16) % 10 > 2
    ]
    for i in training:
        whole = f"{texts[i]}\nName {i}: About {i}."
        read = [text for text in mixed if text.endswith(f"\nName {i}: About {i}.")]
        assert len(read) == corpus.NOTES_REPEATS and read.count(whole) == corpus.NOTES_REPEATS / 2
        cut = [text.partition("\n")[0] for text in read if text != whole]
        assert all(texts[i].startswith(text) and 50 <= len(text.split()) <= 300 for text in cut)
    assert len(mixed) == corpus.NOTES_REPEATS * len(training) + 1
    assert "Specialty" not in "".join(mixed)


def test_titles_that_are_missing_or_numbers_are_texts(tmp_path):
    file = tmp_path / "notes.jsonl"
    row = {"transcription": "CT.", "medical_specialty": "A", "sample_name": 7, "description": None}
    file.write_text(json.dumps(row) + "\n")
    assert corpus.read_titles(str(file)) == {"CT.": "7: "}


def test_an_interval_of_no_measurable_time_has_no_rate():
    curve = [{"tokens": 10, "seconds": 2.0}, {"tokens": 12, "seconds": 2.0}]
    assert card.token_rate(curve) == 5


def test_titles_are_found_whatever_the_lines_of_the_file_end_with(tmp_path):
    file = tmp_path / "notes.csv"
    header = "description,medical_specialty,sample_name,transcription\r\n"
    rows = '"A\r\nscan.",Scan,CT - 1,"CT.\r\nNormal."\r\n'
    rows += 'A visit.,Visit,Knee - 2,"Knee.\r\nPain."\r\n'
    file.write_bytes(b"\xef\xbb\xbf" + (header + rows).encode())
    texts = [note.text for note in clinora.read_notes(file).notes]
    assert corpus.read_titles(str(file)) == dict(
        zip(texts, ["CT: A\nscan.", "Knee: A visit."], strict=True)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"text": "A case."}\n'), "KeyError"),
        (gzip.compress(b'["text", "license"]\n'), "TypeError"),
        (gzip.compress(b'{"text": null, "license": "CC0"}\n'), "TypeError"),
        (gzip.compress(b'{"text": "A case.", "license": ["CC0"]}\n'), "TypeError"),
        (gzip.compress(b"no JSON\n"), "JSONDecodeError"),
        (gzip.compress(b'{"text": "A case.", "license": "CC0"}\n')[:-9], "EOFError"),
        (b'{"text": "A case.", "license": "CC0"}\n', "BadGzipFile"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_corpus_is_named(small, folders, tmp_path, capsys, content, message):
    folder, notes, _ = folders
    (folder / "cases.jsonl.gz").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        tool.main(command(folder, notes, tmp_path / "base"))
    error = capsys.readouterr().err
    assert f"cases.jsonl.gz ({message})" in error and "text and license" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", 48], "--batch 48: expected a multiple of the windows of 32"),
        (["--batch", -64], "--batch -64: expected more than 0"),
        (["--tokens", "inf"], "--tokens inf: expected more than 0"),
        (["--lr", "nan"], "--lr nan: expected more than 0"),
        (["--lr", 1e30], "the loss is nan at step"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_clear_line(small, folders, tmp_path, capsys, options, message):
    folder, notes, _ = folders
    with pytest.raises(SystemExit, match="2"):
        tool.main(command(folder, notes, tmp_path / "base", *options))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_texts_that_are_too_few_are_an_error(small, folders, tmp_path, capsys, monkeypatch):
    folder, notes, _ = folders

    def refused():
        with pytest.raises(SystemExit, match="2"):
            tool.main(command(folder, notes, tmp_path / "base"))
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(card, "COPYING", card.COPYING | {"prompt": 1000})
        assert "no note has 1008 tokens" in refused()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "HELD_OUT", 1000)
        assert "held-out" in refused()
    monkeypatch.setattr(tool, "SHAPE", dataclasses.replace(SHAPE, vocab_size=4096))
    assert "4,096 pieces" in refused()


def test_a_greedy_continuation_that_repeats_a_text_is_counted(small):
    class Counting(torch.nn.Module):  # continues k with k + 1
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding.from_pretrained(torch.eye(300))

        def forward(self, ids, lengths):
            return F.one_hot((ids[:, -1] + 1) % 300, 300).float()

    model = torch.nn.Module()
    model.model = Counting()
    notes = [list(range(60)), list(range(299, 239, -1))]  # counts up, counts down
    beginnings = torch.tensor([note[:10] for note in notes])
    # After 299 … 290 come 291 … 299, 0 … 20: 21 tokens in a row of the note that counts up.
    for run, share in ((21, 1.0), (22, 0.5)):
        assert card.share_copied(model, beginnings, notes, 30, run) == share
