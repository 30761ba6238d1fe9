"""The tool that trains at several ranks: what its file says, and that it goes on where it ended."""

import json

import pytest

from tools import ranks


@pytest.mark.slow
def test_the_file_has_parameters_accuracy_and_spectrum_of_each_rank(tmp_path):
    options = ["--out", str(tmp_path), "--seeds", "0", "--steps", "1", "--token-limit", "16"]
    assert ranks.main([*options, "--ranks", "1", "3"]) == 0
    report = json.loads((tmp_path / "ranks.json").read_text())
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


def test_a_file_that_does_not_exist_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        ranks.main(["--out", str(tmp_path), "--notes", str(tmp_path / "no.csv")])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
