"""The comparison of heads, ranks and full fine-tuning."""

import argparse
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import clinora
from clinora.checkpoint import BUNDLED
from clinora.evaluation import classify
from clinora.notes import Note
from clinora.training import TrainingConfig, train
from tests.kill_and_resume import write_notes
from tools import compare


@pytest.fixture
def base(small_run):
    """A small random base: 2 layers, width 32, 4 heads of which keys and values share 2."""
    return small_run.parent / "base"


@pytest.fixture
def options(base, tmp_path):
    notes = write_notes(tmp_path / "notes.csv", texts=60)
    return [
        "--base", base, "--notes", notes, "--out", tmp_path / "out", "--steps", "3",
        "--notes-per-step", "6", "--token-limit", "128", "--device", "cpu",
        "--precision", "fp32",
    ]  # fmt: skip


def run(options, *more):
    return compare.main([str(option) for option in (*options, *more)])


@pytest.mark.slow
def test_a_point_is_what_training_alone_gives(options, base, tmp_path):
    assert run(options, "--tune", "lora", "--ranks", "2", "--seeds", "5") == 0
    notes = clinora.read_notes(tmp_path / "notes.csv")
    torch.manual_seed(5)
    model = clinora.load_model(base, num_labels=2, dtype=torch.float32)
    clinora.apply_lora(model, clinora.LoRAConfig(rank=2, alpha=4))
    tokenizer = clinora.Tokenizer(base / "tokenizer.model")
    classifier = clinora.Classifier(model, tokenizer, notes.classes, 128)
    config = TrainingConfig(steps=3, notes_per_step=6, seed=5)
    train(classifier, notes.on("training"), notes.on("validation"), config, tmp_path)
    test = notes.on("test")
    named = [p.index for p in classifier([note.text for note in test])]
    result = json.loads((tmp_path / "out" / "r=2-seed5.json").read_text())
    assert result["right"] == [n in note.labels for n, note in zip(named, test, strict=True)]
    # 2 layers; q 32 × 32 and v 16 × 32 at r = 2, and the head's 2 × 32.
    assert result["trainable"] == 2 * 2 * (32 + 32 + 16 + 32) + 2 * 32


@pytest.mark.slow
def test_what_is_done_is_not_repeated_and_seeds_are_added(options, base, tmp_path, capsys):
    assert run(options, "--tune", "head", "full", "--seeds", "0") == 0
    out = tmp_path / "out"
    kept = (out / "head-seed0.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(options, "--tune", "head", "--seeds", "0", "1") == 0
    printed = capsys.readouterr().out
    assert "head, seed 1: " in printed and "head, seed 0: " not in printed
    assert (out / "head-seed0.json").stat().st_mtime_ns == kept
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())}
    parameters = clinora.load_model(base, num_labels=2).parameters()
    assert rows["head"]["trainable"] == 2 * 32
    assert rows["full"]["trainable"] == sum(p.numel() for p in parameters)
    assert (rows["head"]["seeds"], rows["full"]["seeds"]) == (2, 1)
    right = [json.loads(path.read_text())["right"] for path in out.glob("head-seed*.json")]
    assert rows["head"]["any_label_accuracy"] == pytest.approx(np.mean(right))
    with pytest.raises(SystemExit) as caught:
        run(options, "--steps", "4")
    assert caught.value.code == 2
    assert "steps: 3 then, 4 now" in capsys.readouterr().err


@pytest.mark.slow
def test_results_of_a_file_in_another_order_are_refused(options, base, tmp_path, capsys):
    """A result is a list in the order of the test notes."""
    assert run(options, "--tune", "head", "--seeds", "0") == 0
    file = Path(options[options.index("--notes") + 1])
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *reversed(rows)]) + "\n")
    with pytest.raises(SystemExit, match="2"):
        run(options, "--tune", "head", "--seeds", "1")
    assert "order of the test notes: " in capsys.readouterr().err


def test_an_error_is_said_in_words(tmp_path, monkeypatch):
    def measure(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "measure", measure)
    point = compare.Point(tune="lora", rank=2, seed=5)
    with pytest.raises(SystemExit, match=r"r=2-seed5: .*No space left"):
        compare.train_point(point, argparse.Namespace(out=tmp_path))


def test_seeds_are_pooled():
    results = [
        {"tune": "lora", "rank": 8, "right": right, "trainable": 7, "seconds": s, "peak_bytes": b}
        for right, s, b in [([1, 1, 0, 0], 2.0, 5), ([1, 0, 0, 0], 4.0, 9)]
    ]
    notes = [Note(str(i), (0,)) for i in range(4)]
    (row,) = compare.summarise(results, notes, None)
    assert (row["any_label_accuracy"], row["seconds"], row["peak_bytes"]) == (3 / 8, 3.0, 9)
    assert row["between_seeds"] == pytest.approx(np.std([0.5, 0.25], ddof=1))
    assert row["low"] < 3 / 8 < row["high"]


def test_all_right_with_every_seed_does_not_claim_certainty():
    result = {"tune": "head", "rank": 0, "right": [1] * 9, "trainable": 7, "seconds": 1.0}
    notes = [Note(str(i), (0,)) for i in range(9)]
    (row,) = compare.summarise([result | {"peak_bytes": None}] * 2, notes, None)
    low = scipy.stats.binomtest(9, 9).proportion_ci(method="wilson").low
    assert (row["low"], row["high"]) == pytest.approx((low, 1), abs=1e-4)


def test_equal_answers_do_not_claim_that_the_gain_is_certain():
    right = [1, 0, 1, 1, 0, 1, 1, 1, 1]
    result = {"tune": "head", "rank": 0, "right": right, "trainable": 7, "seconds": 1.0}
    notes = [Note(str(i), (0,)) for i in range(9)]
    (row,) = compare.summarise([result | {"peak_bytes": None}], notes, np.array(right, float))
    high = scipy.stats.binomtest(0, 9).proportion_ci(method="wilson").high
    assert row["against_baseline"] == pytest.approx((0, -high, high), abs=1e-4)


def test_the_gain_over_the_baseline_is_paired_and_has_the_normal_interval():
    draw = np.random.default_rng(0)
    right, baseline = draw.random((3, 400)) < 0.9, (draw.random(400) < 0.8).astype(float)
    result = {"tune": "lora", "rank": 8, "trainable": 7, "seconds": 1.0, "peak_bytes": None}
    results = [result | {"right": row.astype(int).tolist()} for row in right]
    notes = [Note(str(i), (0,)) for i in range(400)]
    (row,) = compare.summarise(results, notes, baseline)
    gain = right.mean(0) - baseline
    half = 1.96 * gain.std(ddof=1) / 400**0.5
    expected = gain.mean(), gain.mean() - half, gain.mean() + half
    assert row["against_baseline"] == pytest.approx(expected, abs=0.1 * half)
    assert f"{100 * gain.mean():+.1f} [" in compare.table([row])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_peak_on_the_cpu_is_not_that_of_a_gpu_that_is_there_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert compare.peak_bytes(torch.device("cpu")) == pytest.approx(held, rel=0.05)


@pytest.mark.slow
def test_what_full_fine_tuning_changed_is_kept_rank_by_rank(options, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "KEPT_RANKS", (0, 1))
    notes = clinora.read_notes(tmp_path / "notes.csv")
    model = clinora.load_model("bundled", num_labels=2, dtype=torch.float32)
    base = clinora.load_model("bundled", num_labels=2, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(320, generator=draw), torch.randn(160, generator=draw)
    name = "layers.2.self_attn.v_proj"
    with torch.no_grad():
        model.model.get_submodule(name).weight += torch.outer(b, a)
        base.score.weight.copy_(model.score.weight)
    model.head_trained = True
    tokenizer = clinora.Tokenizer(BUNDLED / "base" / "tokenizer.model")
    classifier = clinora.Classifier(model, tokenizer, notes.classes, 512)
    whole = classify(classifier, notes.notes).correct.tolist()
    base.head_trained = True
    without = clinora.Classifier(base, tokenizer, notes.classes, 512)
    without = classify(without, notes.notes).correct.tolist()
    assert whole != without
    found = compare.study_updates(classifier, base, notes.notes)
    first, *rest = found["singular_values"][name]
    assert first == pytest.approx((a.norm() * b.norm()).item(), rel=1e-3)  # of rank one
    assert max(rest) < 1e-4 * first
    assert found["right_at_rank"] == {0: without, 1: whole}
