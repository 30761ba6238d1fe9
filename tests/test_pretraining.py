"""The pretraining tool on a corpus of a few texts."""

import gzip
import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clinora
from clinora.checkpoint import CheckpointError
from clinora.llama import LlamaConfig, LlamaForCausalLM
from tools import pretrain_base as tool

SHAPE = LlamaConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    tie_word_embeddings=True,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 300, 4000).astype(np.uint16)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tool, "SHAPE", SHAPE)
    monkeypatch.setattr(tool, "STAGES", ((16, 0.5), (32, 1.0)))


@pytest.fixture
def folders(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = ["chest", "pain", "fever", "cough", "wound", "plate", "screw", "scan", "dose", "mg"]
    draw = np.random.default_rng(1)
    texts = [" ".join(draw.choice(words, 30)) + f" case {i}." for i in range(300)]
    with gzip.open(corpus / "cases.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t, "license": "CC0"}) + "\n" for t in texts[:200])
    notes = tmp_path / "notes.csv"
    rows = "".join(f"{t},{'Heart' if i % 2 else 'Bone'}\n" for i, t in enumerate(texts[200:]))
    notes.write_text("transcription,medical_specialty\n" + rows)
    return corpus, notes, texts[200:]


def pretrain(folder, steps=10, resume=False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE)
    options = {"steps": steps, "tokens": 64, "lr": 1e-2, "seed": 0}
    curve = tool.pretrain(model, IDS, IDS, folder=folder, resume=resume, **options)
    return model, curve


def bits(model):
    return {name: p.detach().view(torch.int16) for name, p in model.named_parameters()}


def test_a_resumed_pretraining_ends_with_the_bits_of_a_whole_one(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "CHECKPOINT_EVERY", 3)
    monkeypatch.setattr(tool, "LOSS_EVERY", 2)
    whole, curve = pretrain(tmp_path / "whole")
    learn, calls = tool.learn, []

    def stop(model, window, backward):
        calls.append(backward)
        if sum(calls) == 8:  # after the checkpoint of step 6, in the second stage
            raise KeyboardInterrupt
        return learn(model, window, backward)

    monkeypatch.setattr(tool, "learn", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "run")
    monkeypatch.setattr(tool, "learn", learn)
    resumed, again = pretrain(tmp_path / "run", resume=True)
    assert all(torch.equal(a, bits(resumed)[name]) for name, a in bits(whole).items())
    losses = [[(p["step"], p["loss"], p["held_out"]) for p in c] for c in (curve, again)]
    assert losses[0] == losses[1] and [step for step, *_ in losses[0]] == [2, 4, 6, 8, 10]


def test_another_training_is_not_resumed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "CHECKPOINT_EVERY", 3)
    pretrain(tmp_path / "run", steps=4)
    with pytest.raises(CheckpointError, match=r"training\.steps: 4 then, 6 now"):
        pretrain(tmp_path / "run", steps=6, resume=True)


def test_loss_and_gradients_are_those_of_cross_entropy_in_float64(small):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE).bfloat16()
    model.model.embed_tokens.float()
    model.model.embed_tokens.register_forward_hook(lambda *x: x[-1].bfloat16())
    window = torch.from_numpy(IDS[:2600].astype(np.int64)).view(40, 65)  # 2,560 targets: 3 parts
    loss = tool.learn(model, window, backward=True)
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
    dealt = tool.windows(ids, 10, 20, seed=0)
    for _ in range(2):
        epoch = torch.cat([next(dealt) for _ in range(5)])  # (100, 11)
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 1000, 10))
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(11))


def test_the_tool_writes_a_base_and_the_hashes_of_the_notes_that_it_read(small, folders, tmp_path):
    corpus, notes, texts = folders
    out = tmp_path / "base"
    command = ["--corpus", corpus, "--notes", notes, "--out", out, "--tokens", 640, "--batch", 64]
    command += ["--checkpoints", tmp_path / "checkpoints", "--device", "cpu", "--lr", 1e-2]
    assert tool.main([str(word) for word in command]) == 0

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
    tokenizer = tool.Tokenizer(out / "tokenizer.model")
    assert (
        tokenizer.bos == 1 and tokenizer.decode(tokenizer.encode("dose 25 mg €")) == "dose 25 mg €"
    )


def test_a_greedy_continuation_that_repeats_a_text_is_counted(small):
    class Alphabet:  # the model below continues k with k + 1
        def encode(self, text):
            return [int(word) for word in text.split()]

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding.from_pretrained(torch.eye(300))

        def forward(self, ids, lengths):
            return F.one_hot((ids[:, -1] + 1) % 300, 300).float()

    model = torch.nn.Module()
    model.model = Counting()
    copied = " ".join(map(str, range(0, 60)))
    other = " ".join(map(str, range(299, 239, -1)))
    options = {
        "beginnings": 2,
        "prompt": 10,
        "continued": 30,
        "run": 25,
    }  # 21 tokens from 0 on are too few
    assert tool.share_copied(model, Alphabet(), [copied, other], **options) == 0.5
