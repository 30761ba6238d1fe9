"""Cross-validation: every note once, by a run that has not seen it."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import clinora
from tests.kill_and_resume import write_notes
from tools import cross_validate as tool


def test_every_note_is_measured_once_by_a_run_that_was_not_trained_on_it(
    tmp_path, monkeypatch, capsys
):
    path = write_notes(tmp_path / "notes.csv", texts=22)
    texts = {note.text for note in clinora.read_notes(path).notes}
    trained, measured = [], []
    train, classify = tool.train, tool.classify

    def remember_training(classifier, notes, *rest, **options):
        trained.append({note.text for note in notes})
        train(classifier, notes, *rest, **options)

    def remember_measured(classifier, notes):
        measured.append([note.text for note in notes])
        return classify(classifier, notes)

    monkeypatch.setattr(tool, "train", remember_training)
    monkeypatch.setattr(tool, "classify", remember_measured)
    options = ["--notes", path, "--folds", 4, "--steps", 1, "--device", "cpu"]
    assert tool.main([str(option) for option in options]) == 0
    assert sorted(text for fold in measured for text in fold) == sorted(texts)
    assert sorted(map(len, measured)) == [5, 5, 6, 6]
    for fold, others in zip(measured, trained, strict=True):
        assert others == texts - set(fold)
    # The pooled share is the folds' shares, weighed by their notes.
    printed = capsys.readouterr().out
    folds = re.findall(r"fold \d, (\d) notes: LoRA ([\d.]+)%, (.*) ([\d.]+)%", printed)
    assert len(folds) == 4
    correct = sum(round(float(share) * int(n) / 100) for n, share, _, _ in folds)
    assert f"| LoRA | {correct / 22:.1%} |" in printed
    by_linear = sum(round(float(share) * int(n) / 100) for n, _, _, share in folds)
    (_, _, name, _), *_ = folds
    assert f"| {name} | {by_linear / 22:.1%} |" in printed
    assert f"paired: {100 * (correct - by_linear) / 22:+.1f} points" in printed


def test_the_measures_in_the_folder_are_those_of_the_folds(tmp_path, capsys):
    path = write_notes(tmp_path / "notes.csv", texts=22)
    out = tmp_path / "runs"
    options = ["--notes", path, "--folds", 3, "--steps", 1, "--device", "cpu", "--out", out]
    assert tool.main([str(option) for option in options]) == 0
    folds = re.findall(
        r"fold \d, (\d) notes: LoRA ([\d.]+)%, .* ([\d.]+)%", capsys.readouterr().out
    )
    written = json.loads((out / "cross_validation.json").read_text())
    assert (written["notes"], written["folds"]) == (22, 3)
    shares = {}
    for name, column in (("accuracy", 1), ("tf_idf", 2)):
        # A share is printed with three digits, and it is a whole number of the fold's notes.
        correct = [round(int(fold[0]) * float(fold[column]) / 100) for fold in folds]
        shares[name] = sum(correct) / 22
        each = [hits / int(fold[0]) for hits, fold in zip(correct, folds, strict=True)]
        assert written[f"{'' if column == 1 else 'tf_idf_'}of_folds"] == pytest.approx(each)
        assert written[name]["value"] == pytest.approx(shares[name])
        assert written[name]["low"] <= written[name]["value"] <= written[name]["high"]
    assert written["against"]["value"] == pytest.approx(shares["accuracy"] - shares["tf_idf"])


def test_what_is_trained_in_a_folder_is_not_trained_again(tmp_path, capsys):
    path = write_notes(tmp_path / "notes.csv", texts=22)
    options = ["--notes", path, "--folds", 3, "--steps", 2, "--device", "cpu"]
    options = [str(option) for option in [*options, "--out", tmp_path / "runs"]]
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        assert tool.main(options) == 0
        assert len(steps) == 3 * 2
        printed = capsys.readouterr().out
        metrics = {file: file.read_bytes() for file in tmp_path.glob("runs/*/metrics.jsonl")}
        assert len(metrics) == 3
        steps.clear()
        shutil.rmtree(tmp_path / "runs" / "fold-2")
        assert tool.main(options) == 0
    finally:
        hook.remove()
    assert len(steps) == 2  # those of the second fold
    assert capsys.readouterr().out == printed
    for file, before in metrics.items():
        if file.parent.name != "fold-2":
            assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                          "down_proj"}),
        (["o_proj", "up_proj"], {"o_proj", "up_proj"}),
    ],
    ids=["all-linear", "names"],
)  # fmt: skip
def test_the_layers_that_are_named_are_adapted(tmp_path, capsys, words, expected):
    path = write_notes(tmp_path / "notes.csv", texts=22)
    options = ["--notes", path, "--folds", 3, "--steps", 2, "--device", "cpu"]
    options = [str(option) for option in [*options, "--out", tmp_path / "runs"]]
    assert tool.main([*options, "--targets", *words]) == 0
    (checkpoint, *_) = sorted(tmp_path.glob("runs/fold-1/checkpoint/*.safetensors"))
    trained = {name.split(".")[-2] for name in load_file(checkpoint) if name.endswith("lora_B")}
    assert trained == expected
    with pytest.raises(SystemExit, match="2"):  # a fold that was trained with other layers
        tool.main(options)
    assert "q_proj" in capsys.readouterr().err


@pytest.mark.parametrize("folds", [2, 23])
def test_folds_that_cannot_be_are_an_error(tmp_path, capsys, folds):
    path = write_notes(tmp_path / "notes.csv", texts=22)
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--notes", str(path), "--folds", str(folds)])
    assert f"{folds} folds of 22 notes: expected 3 to 22" in capsys.readouterr().err
