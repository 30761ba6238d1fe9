"""The sweep of variants and learning rates: its results, and that none is measured twice."""

import functools
import json
import signal

import numpy as np
import pytest

import clinora
from clinora.notes import side_of
from clinora.training import Learner
from tools import sweep


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """Write notes of which each class has words of its own."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("sweep") / "notes.csv"
    lines = ["transcription,medical_specialty"]
    for number in range(80):
        words = ["heart murmur chest", "knee fracture bone"][number % 2].split()
        lines.append(f"{' '.join(draw.choice(words, 6))} visit {number},{'AB'[number % 2]}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run(notes, small_run):
    """Run the sweep on a small base and give its results."""
    return functools.partial(run_sweep, notes, small_run.parent / "base")


def run_sweep(notes, base, folder, *options):
    fixed = ["--notes", notes, "--base", base, "--out", folder, "--steps", 2, "--token-limit", 16]
    assert sweep.main([str(word) for word in (*fixed, *options)]) == 0
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_each_method_is_measured_at_each_rate_once(run, notes, tmp_path, capsys):
    methods = ["--methods", "LoRA, r = 1", "PiSSA, r = 8", "full"]
    results = run(tmp_path, *methods, "--learning-rates", 1e-3, 1e-2)
    found = [(result["method"], result["learning_rate"]) for result in results]
    assert found == [(method, rate) for method in methods[1:] for rate in (1e-3, 1e-2)]
    test = clinora.read_notes(notes).on("test")
    assert {len(result["correct"]) for result in results} == {len(test)}
    assert len({result["validation_loss"] for result in results}) == 6
    assert len({result["trainable"] for result in results}) == 3
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []

    capsys.readouterr()
    again = run(tmp_path, *methods, "--learning-rates", 1e-2, 1e-1)
    assert again[:6] == results and len(again) == 9
    assert capsys.readouterr().out.count("learning rate 0.1:") == 3


def test_a_stopped_sweep_resumes_with_the_same_result(run, tmp_path, monkeypatch, capsys):
    options = ["--methods", "LoRA, r = 1", "--learning-rates", 1e-2, 1e-3, "--steps", 4]
    expected = run(tmp_path / "whole", *options)
    steps = []

    def stop_in_the_second_training(self, *arguments):
        steps.append(self)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments)

    step = Learner.forward_and_backward
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Learner, "forward_and_backward", stop_in_the_second_training)
        run(tmp_path / "stopped", *options)
    assert "run the same command to resume" in capsys.readouterr().err
    resumed = run(tmp_path / "stopped", *options)
    for one, other in zip(resumed, expected, strict=True):
        assert one | {"seconds": None} == other | {"seconds": None}


def test_a_training_whose_loss_is_not_finite_has_no_result(run, tmp_path, monkeypatch):
    def diverge(*_args, **_kwargs):
        raise FloatingPointError

    monkeypatch.setattr(sweep, "train", diverge)
    (result,) = run(tmp_path, "--methods", "full", "--learning-rates", 1e-3)
    assert result["validation_loss"] is None and result["correct"] is None


def test_results_of_other_options_are_refused(run, tmp_path, capsys):
    run(tmp_path, "--methods", "full", "--learning-rates", 1e-3)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--methods", "full", "--token-limit", 8)
    assert "holds other results: token_limit" in capsys.readouterr().err


def test_results_of_a_file_in_another_order_are_refused(notes, small_run, tmp_path, capsys):
    """A result is a list in the order of the test notes."""
    base = small_run.parent / "base"
    options = ["--methods", "full", "--learning-rates", 1e-3]
    run_sweep(notes, base, tmp_path / "out", *options)
    header, *rows = notes.read_text().splitlines()
    other = tmp_path / "other.csv"
    other.write_text("\n".join([header, *reversed(rows)]) + "\n")
    with pytest.raises(SystemExit, match="2"):
        run_sweep(other, base, tmp_path / "out", *options)
    assert "order of the test notes: " in capsys.readouterr().err


def test_notes_without_validation_notes_are_refused_before_training(small_run, tmp_path, capsys):
    texts = [text for text in map("visit {}".format, range(40)) if side_of(text) != "validation"]
    rows = [f"{text},{'AB'[number % 2]}" for number, text in enumerate(texts)]
    file = tmp_path / "notes.csv"
    file.write_text("transcription,medical_specialty\n" + "\n".join(rows) + "\n")
    with pytest.raises(SystemExit, match="2"):
        run_sweep(file, small_run.parent / "base", tmp_path / "out")
    assert "has no validation notes" in capsys.readouterr().err
