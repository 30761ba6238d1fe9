"""The tools: which columns of a file they read, and what they say when a file is not usable."""

import dataclasses

import pytest

import clinora
from clinora.notes import LABEL_COLUMN, TEXT_COLUMN
from tools import (
    add_outliers,
    capitals,
    cross_validate,
    explanations,
    fit_outliers,
    make_token_ids,
    outlier_table,
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
    classifier.data = dataclasses.replace(
        classifier.data, source=str(files[1]), text_column="report", label_column="kind"
    )
    classifier.save(tmp_path / "run")
    return tmp_path / "run"


def printed_by(tool, capsys, *options):
    assert tool.main([str(option) for option in options]) == 0
    return capsys.readouterr().out


def assert_one_line(tool, options, capsys, expected):
    """Check that a tool ends with status 2 and one line that has the expected words."""
    with pytest.raises(SystemExit) as stop:
        tool.main([str(option) for option in options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


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
    options = [*options, "--out", tmp_path / "other"]
    assert printed_by(tool, capsys, "--notes", other, *names, *options) == expected


@pytest.mark.parametrize("tool", [capitals, explanations], ids=["capitals", "explanations"])
def test_the_columns_are_the_runs_unless_others_are_named(files, run, capsys, tool):
    usual, other = files
    options = ["--run", run, "--sample", 4, "--device", "cpu", "--precision", "fp32"]
    names = ["--text-column", TEXT_COLUMN, "--label-column", LABEL_COLUMN]
    expected = printed_by(tool, capsys, "--notes", usual, *names, *options)
    assert printed_by(tool, capsys, "--notes", other, *options) == expected


@pytest.mark.parametrize("tool", [capitals, explanations], ids=["capitals", "explanations"])
def test_the_bundled_notes_have_their_own_columns(run, capsys, tool):
    options = ["--run", run, "--sample", 2, "--device", "cpu"]
    names = ["--text-column", TEXT_COLUMN, "--label-column", LABEL_COLUMN]
    expected = printed_by(tool, capsys, *names, *options)
    assert printed_by(tool, capsys, *options) == expected


@pytest.fixture
def data(tmp_path):
    """Write the files that ``tools.fit_outliers`` reads, with few texts."""
    folder = tmp_path / "data"
    (folder / "mtsdialog").mkdir(parents=True)
    labels = clinora.PUBLISHED_CLASSES
    rows = [f"visit number {i}: the knee hurts,{labels[i % 2]}\n" for i in range(40)]
    (folder / "mtsamples.csv").write_text(f"{TEXT_COLUMN},{LABEL_COLUMN}\n{''.join(rows)}")
    return folder


@pytest.mark.parametrize(
    ("dialogues", "expected"),
    [
        (None, "mtsdialog.csv"),
        ("dialogue,section_text\nA,B\n", "mtsdialog.csv has no column 'split'"),
        ("split,dialogue,section_text\ntraining,A\n", "mtsdialog.csv is damaged: row 1"),
        ("split,dialogue,section_text\ntrain,A,B\n", "'Dialogues' in the split 'training'"),
    ],
    ids=["no-file", "no-column", "short-row", "no-texts"],
)
def test_dialogues_that_the_detector_cannot_be_fitted_with_are_one_line(
    data, monkeypatch, capsys, dialogues, expected
):
    written = data / "outliers.json"  # never the package's own
    monkeypatch.setattr(fit_outliers, "PROBE", written)
    if dialogues is not None:
        (data / "mtsdialog" / "mtsdialog.csv").write_text(dialogues)
    assert_one_line(fit_outliers, ["--data", data], capsys, expected)
    assert not written.exists()


@pytest.mark.parametrize("content", [None, b"", b"no model"], ids=["missing", "empty", "other"])
def test_a_file_that_is_no_sentencepiece_model_is_one_line(tmp_path, capsys, content):
    model = tmp_path / "ids.model"
    if content is not None:
        model.write_bytes(content)
    assert_one_line(make_token_ids, [model, tmp_path / "ids.json"], capsys, str(model))


def test_a_folder_for_pictures_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures.shutil, "which", lambda _: "chromium")
    out = tmp_path / "out"
    out.write_text("a file")
    assert_one_line(pictures, ["--out", out], capsys, str(out))


def test_a_damaged_report_has_no_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures.shutil, "which", lambda _: "chromium")
    monkeypatch.setattr(pictures, "SMOLLM2_RUN", tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text("{")
    options = ["--out", tmp_path / "out"]
    assert_one_line(pictures, options, capsys, str(tmp_path / "report" / "metrics.json"))


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        (add_outliers, ["--notes", "bundled"]),
        (capitals, []),
        (explanations, []),
        (outlier_table, ["--data", "data"]),
    ],
    ids=["add_outliers", "capitals", "explanations", "outlier_table"],
)
def test_the_named_base_is_used(tmp_path, capsys, tool, options):
    # The bundled run does not need it, so an error that names it shows that it is used.
    missing = tmp_path / "missing-base"
    assert_one_line(tool, [*options, "--base", missing], capsys, str(missing))
