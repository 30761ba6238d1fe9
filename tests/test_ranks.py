"""The tool that trains at several ranks: what its file says, and that it goes on where it ended."""

import dataclasses
import json
from pathlib import Path

import pytest

from clinora.checkpoint import BUNDLED
from tools import ranks


@pytest.fixture
def without_training(monkeypatch):
    def measure(rank, notes, _token_limit, config):
        right = [1] * len(notes.on("test"))
        return {"rank": rank, "seed": config.seed, "parameters": 1, "right": right, "updates": []}

    monkeypatch.setattr(ranks, "measure", measure)


@pytest.mark.slow
def test_the_file_has_parameters_accuracy_and_spectrum_of_each_rank(tmp_path, monkeypatch):
    options = ["--out", str(tmp_path), "--seeds", "0", "--steps", "1", "--token-limit", "16"]
    used = []
    train = ranks.train

    def record_and_train(*args):
        used.append(args[3])
        train(*args)

    monkeypatch.setattr(ranks, "train", record_and_train)
    assert ranks.main([*options, "--ranks", "1", "3"]) == 0
    report = json.loads((tmp_path / "ranks.json").read_text())
    assert [report["training"]] * 2 == [dataclasses.asdict(config) for config in used]
    assert (report["training_notes"], report["test_notes"]) == (107, 35)
    assert [row["rank"] for row in report["ranks"]] == [1, 3]
    for row in report["ranks"]:
        # Six layers of width 320, with a v_proj of 160 outputs.
        assert row["parameters"] == 6 * row["rank"] * (320 + 320 + 320 + 160)
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert [len(update["singular_values"]) for update in row["updates"]] == [row["rank"]] * 12
    kept = (tmp_path / "r=3-seed0.json").stat().st_mtime_ns
    assert ranks.main([*options, "--ranks", "1", "3"]) == 0
    assert (tmp_path / "r=3-seed0.json").stat().st_mtime_ns == kept


def test_seeds_are_pooled_and_the_updates_are_those_of_the_first():
    def result(seed, right):
        return {"rank": 2, "seed": seed, "parameters": 10, "right": right, "updates": [seed]}

    results = [result(1, [1, 1, 1, 0]), result(0, [1, 0, 0, 0])]
    notes = [ranks.clinora.Note(f"note {i}", (0,)) for i in range(4)]
    (row,) = ranks.summarise(results, notes)
    assert row["accuracy"] == 0.5
    assert (row["seeds"], row["updates"]) == (2, [0])


@pytest.mark.parametrize(
    "other", [["--steps", "2"], ["--token-limit", "16"], ["--notes", "notes.csv"]]
)
def test_a_folder_with_results_of_other_options_is_refused(
    tmp_path, monkeypatch, capsys, without_training, other
):
    monkeypatch.chdir(tmp_path)
    bundled = (BUNDLED / "notes.csv").read_text(encoding="utf-8")
    Path("notes.csv").write_text(bundled.replace("patient", "person"), encoding="utf-8")
    options = ["--out", "results", "--ranks", "1", "--seeds", "0", "--steps", "1"]
    assert ranks.main(options) == 0
    files = {path: path.read_bytes() for path in Path("results").iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        ranks.main([*options, *other])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in Path("results").iterdir()} == files
    assert ranks.main([*options, "--ranks", "1", "2", "--seeds", "0", "1"]) == 0  # the same options


def test_a_file_that_does_not_exist_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        ranks.main(["--out", str(tmp_path), "--notes", str(tmp_path / "no.csv")])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
