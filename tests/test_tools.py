"""The tools: which columns of a file they read, and what they say when a file is not usable."""

import dataclasses

import pytest

import clinora
from clinora.notes import LABEL_COLUMN, TEXT_COLUMN
from clinora.run import DataRecord
from tools import (
    capitals,
    cross_validate,
    explanations,
    fit_outliers,
    make_token_ids,
    pictures,
    ranks,
    sweep,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write the same notes into two files, with the usual columns and with others."""
    labels = clinora.PUBLISHED_CLASSES
    texts = [f"Visit {i}. No fever. ECG: normal. The knee hurts. Return soon." for i in range(30)]
    rows = [f"{text},{labels[i % len(labels)]}\n" for i, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("columns")
    paths = []
    for text_column, label_column in ((TEXT_COLUMN, LABEL_COLUMN), ("report", "kind")):
        path = folder / text_column / "notes.csv"
        path.parent.mkdir()
        path.write_text(f"{text_column},{label_column}\n" + "".join(rows))
        paths.append(path)
    return paths


@pytest.fixture
def run(files, small_run, tmp_path):
    """Save a run that records the other columns, and has seen one of the notes."""
    classifier = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
    seen = clinora.read_notes(files[0]).notes[:1]
    classifier.record_training(seen, {})
    assert isinstance(classifier.data, DataRecord)
    classifier.data = dataclasses.replace(
        classifier.data, source=str(files[1]), text_column="report", label_column="kind"
    )
    classifier.save(tmp_path / "run")
    return tmp_path / "run"


def printed_by(tool, capsys, *options):
    assert tool.main([str(option) for option in options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        (cross_validate, ["--folds", 3, "--steps", 1, "--token-limit", 16, "--device", "cpu"]),
        (
            sweep,
            ["--methods", "LoRA, r = 1", "--learning-rates", 1e-3, "--steps", 1, "--token-limit",
             16, "--device", "cpu"],
        ),
        (ranks, ["--ranks", 1, "--seeds", 0, "--steps", 1, "--token-limit", 16]),
    ],
    ids=["cross_validate", "sweep", "ranks"],
)  # fmt: skip
def test_the_named_columns_are_read(files, tmp_path, capsys, tool, options):
    usual, other = files
    expected = printed_by(tool, capsys, "--notes", usual, *options, "--out", tmp_path / "usual")
    names = ["--text-column", "report", "--label-column", "kind"]
    found = printed_by(tool, capsys, "--notes", other, *names, *options, "--out", tmp_path / "oth")
    assert found.replace(str(other), str(usual)) == expected


@pytest.mark.parametrize("tool", [capitals, explanations], ids=["capitals", "explanations"])
def test_the_columns_are_the_runs_unless_others_are_named(files, run, capsys, tool):
    usual, other = files
    options = ["--run", run, "--sample", 4, "--device", "cpu", "--precision", "fp32"]
    names = ["--text-column", TEXT_COLUMN, "--label-column", LABEL_COLUMN]
    expected = printed_by(tool, capsys, "--notes", usual, *names, *options)
    assert printed_by(tool, capsys, "--notes", other, *options) == expected


def write_dialogues_without_splits(folder):
    """Write files for ``tools.fit_outliers`` of which one lacks a column."""
    (folder / "mtsdialog").mkdir()
    labels = clinora.PUBLISHED_CLASSES
    rows = "".join(f"visit {i},{label}\n" for i, label in enumerate(labels))
    (folder / "mtsamples.csv").write_text(f"{TEXT_COLUMN},{LABEL_COLUMN}\n{rows}")
    (folder / "mtsdialog" / "mtsdialog.csv").write_text("dialogue,section_text\nA,B\n")


@pytest.mark.parametrize(
    ("tool", "words", "expected"),
    [
        (make_token_ids, ["{}/missing.model", "{}/ids.json"], "missing.model"),
        (fit_outliers, ["--data", "{}/missing"], "missing"),
        (fit_outliers, ["--data", "{}"], "split"),
        (pictures, ["--out", "{}/mtsamples.csv"], "mtsamples.csv"),
    ],
    ids=["no-model", "no-data", "no-column", "no-folder"],
)
def test_a_file_that_is_not_usable_is_one_line(
    tmp_path, monkeypatch, capsys, tool, words, expected
):
    write_dialogues_without_splits(tmp_path)
    if tool is pictures:
        monkeypatch.setattr(pictures.shutil, "which", lambda _: "chromium")
    with pytest.raises(SystemExit, match="2"):
        tool.main([word.format(tmp_path) for word in words])
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
