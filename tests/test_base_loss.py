"""The loss of a base on notes, against Transformers."""

import re

import pytest
import torch
import transformers

import clinora
from clinora.checkpoint import BUNDLED
from tools import base_loss, capitals, explanations


def test_the_loss_is_that_of_transformers():
    ids = clinora.Tokenizer(BUNDLED / "base" / "tokenizer.model").encode("Severe chest pain.")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        BUNDLED / "base", dtype=torch.float32
    )
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, labels=tokens).loss.item()
    ours = clinora.load_model("bundled", dtype=torch.float32).eval()
    assert base_loss.loss_of(ours, ids) == pytest.approx(expected, rel=1e-5)


def test_each_split_is_measured_on_its_notes(capsys):
    options = ["--sample", "3", "--device", "cpu", "--precision", "fp32"]
    assert base_loss.main(options) == 0
    printed = capsys.readouterr().out
    model = clinora.load_model("bundled", dtype=torch.float32).eval()
    tokenizer = clinora.Tokenizer(BUNDLED / "base" / "tokenizer.model")
    for side in ("training", "validation", "test"):
        notes = sorted(clinora.read_notes("bundled").on(side), key=lambda note: note.sha256)[:3]
        losses = []
        for note in notes:
            ids = torch.tensor(tokenizer.encode(note.text, 512))
            with torch.no_grad():
                chosen = model(ids[None])[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])
            losses.append(-chosen.mean().item())
        (shown,) = re.findall(rf"\| {side} \| 3 \| [\d,]+ \| ([\d.]+) \|", printed)
        assert float(shown) == pytest.approx(sum(losses) / 3, abs=6e-4)


@pytest.mark.parametrize(
    ("tool", "options", "message"),
    [
        (base_loss, ["--token-limit", "1025"], "--token-limit is 1025: expected 2 to 1024"),
        (base_loss, ["--token-limit", "1"], "--token-limit is 1: expected 2"),
        (base_loss, ["--sample", "-1"], "--sample is -1: expected 1 or more"),
        (capitals, ["--sample", "0"], "--sample is 0: expected 1 or more"),
        (explanations, ["--sample", "0"], "--sample is 0: expected 1 or more"),
    ],
)
def test_a_number_out_of_range_is_one_line(tool, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(options)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
