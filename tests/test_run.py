"""What clinora.json records: its format, old runs, and what evaluation needs of it."""

import json
import re

import pytest

import clinora
import eval as eval_script
from clinora import Classifier, LoRAConfig
from clinora.checkpoint import BUNDLED, CheckpointError, find_base
from clinora.notes import LABEL_COLUMN, TEXT_COLUMN, Note
from clinora.run import BaseRecord, DataRecord, RunRecord
from clinora.training import TrainingConfig, train
from tests.kill_and_resume import write_notes

BASE = {
    "source": "bundled", "revision": None, "sha256": "1a", "tokenizer_sha256": "2b",
    "config_sha256": "3c",
}  # fmt: skip
# As a run that was trained by a loop of one's own has it: no notes, options or versions.
SMALLEST = {
    "schema": 1, "labels": ["A", "B"], "base": BASE, "token_limit": 64, "calibration": None,
}  # fmt: skip
OUTLIERS = {"limit": 0.0, "notes": 60, "false_alarms": 0.0}


def write(folder, values):
    (folder / "clinora.json").write_text(json.dumps(values, indent=2) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train from Python as the README says; gives the run's folder and the notes."""
    folder = tmp_path_factory.mktemp("trained")
    notes = clinora.read_notes(write_notes(folder / "notes.csv", texts=60))
    classifier = Classifier.new(
        "bundled", notes.classes, LoRAConfig(rank=2), token_limit=64, device="cpu"
    )
    config = TrainingConfig(steps=1, notes_per_step=4)
    train(classifier, notes.on("training"), notes.on("validation"), config, folder / "run")
    classifier.save(folder / "run")
    return folder, notes


def test_a_record_that_is_read_and_written_is_the_same_file(tmp_path):
    before = (BUNDLED / "adapter" / "clinora.json").read_bytes()
    RunRecord.read(BUNDLED / "adapter").write(tmp_path)
    assert (tmp_path / "clinora.json").read_bytes() == before


def test_a_record_of_a_run_whose_training_is_not_known_is_the_same_too(tmp_path):
    write(tmp_path, SMALLEST)
    record = RunRecord.read(tmp_path)
    assert record.data is None
    record.write(tmp_path)
    assert json.loads((tmp_path / "clinora.json").read_text()) == SMALLEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, expected 1"),
        ({"token_limit": "64"}, "token_limit is missing"),
        ({"base": BASE | {"sha256": None}}, "sha256 is missing"),
        ({"notes": []}, "notes is missing"),
        ({"notes": {}}, "seen is missing"),
        ({"notes": {"seen": [{}]}}, "seen holds"),
        ({"notes": {"seen": [], "fingerprints": 1}}, "fingerprints is missing"),
        ({"training": 7}, "training is missing"),
        ({"outliers": 0.5}, "outliers is missing"),
        ({"outliers": {"limit": 0.5}}, "outliers: .*missing"),
        ({"outliers": OUTLIERS | {"words": []}}, "outliers: .*words"),
        ({"outliers": OUTLIERS | {"limit": "0"}}, "outliers: .*expected a finite number"),
        ({"outliers": OUTLIERS | {"limit": float("nan")}}, "outliers: .*expected a finite number"),
    ],
)
def test_a_damaged_record_is_an_error_that_names_the_file_and_the_key(tmp_path, change, message):
    write(tmp_path, SMALLEST | change)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        RunRecord.read(tmp_path)


def test_a_base_is_recorded_with_what_tells_it_from_others(tmp_path):
    record = BaseRecord.of(find_base("bundled"))
    assert record == RunRecord.read(BUNDLED / "adapter").base


def test_a_run_is_of_a_files_split_if_it_has_seen_its_training_and_validation_notes(tmp_path):
    notes = clinora.read_notes("bundled")
    sides = [notes.on(side) for side in ("training", "validation", "test")]
    seen, validated, test = ({note.sha256[:16] for note in side} for side in sides)
    assert DataRecord(seen=frozenset(seen | validated)).is_split_of(notes)
    assert not DataRecord(seen=frozenset(seen)).is_split_of(notes)
    assert not DataRecord(seen=frozenset(seen | validated | test)).is_split_of(notes)


@pytest.mark.parametrize(
    ("trained_on", "source", "expected"),
    [
        ("mine.csv", "other.csv", ("report", "kind")),
        ("mine.csv", "bundled", (TEXT_COLUMN, LABEL_COLUMN)),
        ("mtsamples", "bundled", (TEXT_COLUMN, LABEL_COLUMN)),
        ("mtsamples", "mtsamples", ("report", "kind")),  # another column of that file
    ],
)
def test_columns_are_the_runs_but_other_named_notes_have_their_own(trained_on, source, expected):
    data = DataRecord(
        seen=frozenset(), source=trained_on, text_column="report", label_column="kind"
    )
    assert data.columns_in(source) == expected


def test_a_fingerprint_decides_where_it_was_recorded(tmp_path):
    notes = clinora.read_notes("bundled")
    known = {"fingerprint": notes.fingerprint, "split_fingerprint": notes.split_fingerprint}
    assert DataRecord(seen=frozenset(), **known).is_split_of(notes)
    assert not DataRecord(seen=frozenset(), **known | {"fingerprint": "0"}).is_split_of(notes)
    assert not DataRecord(seen=frozenset(), **known | {"split_fingerprint": "0"}).is_split_of(notes)


def test_training_from_python_records_its_notes_options_and_versions(trained):
    folder, notes = trained
    record = RunRecord.read(folder / "run")
    for side, seen in (("training", True), ("validation", True), ("test", False)):
        assert {record.data.has_seen(note) for note in notes.on(side)} == {seen}
    assert record.training_options["steps"] == 1
    assert record.versions["clinora"] == clinora.__version__


def test_a_run_trained_from_python_is_evaluated_on_its_test_notes(
    trained, tmp_path, monkeypatch, capsys
):
    """The script once asked for keys that only train.py wrote."""
    monkeypatch.chdir(tmp_path)
    folder, notes = trained
    options = ["--run", folder / "run", "--notes", folder / "notes.csv", "--report", tmp_path / "r"]
    assert eval_script.main([str(option) for option in options]) == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["notes"] == len(notes.on("test"))
    assert metrics["trained_on"] == metrics["in_training"] == 0
    # With the training notes at hand there are baselines.
    assert metrics["baselines"]


def test_eval_asks_for_the_notes_of_a_run_that_does_not_name_its_file(trained, capsys):
    folder, _ = trained
    with pytest.raises(SystemExit, match="2"):
        eval_script.main(["--run", str(folder / "run")])
    assert "--notes" in capsys.readouterr().err


def test_notes_of_an_earlier_training_stay_seen_and_its_file_is_forgotten(small_run):
    classifier = Classifier.load(small_run, device="cpu", precision="fp32")
    first, second = Note("chest pain", (0,)), Note("knee pain", (1,))
    classifier.data = DataRecord(seen=frozenset([first.sha256[:16]]), source="a.csv")
    classifier.record_training([second], {})
    assert classifier.data.has_seen(first) and classifier.data.has_seen(second)
    assert classifier.data.source is None
