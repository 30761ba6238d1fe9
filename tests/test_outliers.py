"""Text unlike an English clinical note is recognised and referred, whatever base a run has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import clinora
from clinora.checkpoint import BUNDLED
from clinora.classifier import Classifier, pad
from clinora.evaluation import outlier_limit
from clinora.notes import Note
from clinora.outliers import OutlierLimit, OutlierScorer, choose_limit
from clinora.serving.api import describe
from clinora.serving.words import EXAMPLES
from tests.kill_and_resume import write_notes

CLINICAL = [
    *EXAMPLES,
    "Left knee pain after skiing. Suspected ACL tear.",
    "pt c/o SOB x3d, no CP. lungs CTAB. hx CHF, on lasix 40 bid",
    "- aspirin 81 mg daily\n- metoprolol 25 mg bid\n- atorvastatin 40 mg qhs",
    "Na 138, K 4.1, Cl 101, CO2 24, BUN 18, Cr 1.0, glucose 112. WBC 8.2, Hgb 13.1, Plt 240.",
]
OTHER = [
    "La patiente se plaint de maux de tête depuis hier soir et demande un certificat.",
    "Nach dem Frühstück gehen wir in den Wald und sammeln Pilze für das Abendessen.",
    "2 l milk\n1 kg potatoes\nwashing powder\n6 lemons\nfresh bread",
    "for (int i = 0; i < n; ++i) { total += weights[i] * values[i]; }\nreturn total / n;",
    "4711 0815 1234 99.5 3.1415 2.718 1.414 1000 20000 42 17",
    "The band plays its last concert of the tour on Saturday, and all tickets are sold.",
]
LIMIT = OutlierLimit(limit=0.0, notes=50, false_alarms=0.0)


@pytest.fixture(scope="module")
def bundled():
    return Classifier.load("bundled", device="cpu", precision="fp32")


def test_a_score_is_the_probe_on_the_mean_state_as_transformers_computes_it():
    """In float64, for texts shorter and longer than what is read, alone and padded."""
    model = transformers.AutoModel.from_pretrained(BUNDLED / "base", dtype=torch.float64)
    probe = json.loads((BUNDLED / "outliers.json").read_text())
    texts = [*CLINICAL, OTHER[0], "chest pain " * 100]
    scorer = OutlierScorer(torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        scores = scorer(*pad(scorer.encode(texts), torch.device("cpu")))
        for text, score in zip(texts, scores.tolist(), strict=True):
            ids = scorer.tokenizer.encode(text)[:64]
            states = model(torch.tensor([ids])).last_hidden_state[0]  # (T, D)
            mean = states[1:].mean(0)
            expected = mean @ torch.tensor(probe["weight"], dtype=torch.float64) + probe["bias"]
            assert score == pytest.approx(expected.item(), abs=1e-3)


def test_clinical_text_is_not_taken_for_other_text_and_other_text_is_recognised(bundled):
    assert [p.out_of_distribution for p in bundled(CLINICAL)] == [False] * len(CLINICAL)
    assert [p.out_of_distribution for p in bundled(OTHER)] == [True] * len(OTHER)


def test_text_unlike_a_note_is_referred_however_confident_the_model_is(bundled):
    for prediction in bundled([*CLINICAL, *OTHER]):
        low = prediction.confidence < bundled.calibration.threshold
        assert prediction.refer == (low or prediction.out_of_distribution)
    sure = max(bundled(OTHER), key=lambda prediction: prediction.confidence)
    assert sure.confidence > bundled.calibration.threshold  # else this shows nothing
    assert sure.refer is True


def test_a_run_without_calibration_refers_only_what_is_unlike_a_note(small_run):
    classifier = Classifier.load(small_run, device="cpu", precision="fp32")
    assert classifier.calibration is None
    classifier.outliers = LIMIT
    note, other = classifier([EXAMPLES[0], OTHER[1]])
    assert (note.out_of_distribution, note.refer) == (False, None)
    assert (other.out_of_distribution, other.refer) == (True, True)


def test_a_run_without_a_limit_says_nothing_about_it(small_run):
    classifier = Classifier.load(small_run, device="cpu", precision="fp32")
    for prediction in classifier([EXAMPLES[0], OTHER[1]]):
        assert prediction.out_of_distribution is None
        assert describe(prediction, classifier)["out_of_distribution"] is None


def test_the_score_depends_on_the_text_alone_not_on_the_runs_base_or_adapter(bundled, small_run):
    """small_run has random weights, and another tokenizer, which makes a line end a space."""
    other = Classifier.load(small_run, device="cpu", precision="fp32")
    short = [text for text in (*CLINICAL, *OTHER) if len(other.encode(text)) <= other.token_limit]
    texts = [text for text in short if "\n" not in text]
    assert len(texts) >= 5
    scores = [
        classifier.outlier_scores([classifier.encode(text) for text in texts])
        for classifier in (bundled, other)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_the_answer_is_the_same_in_any_company(bundled):
    together = bundled([*CLINICAL, *OTHER])
    alone = [bundled([text])[0] for text in (*CLINICAL, *OTHER)]
    for first, second in zip(together, alone, strict=True):
        assert first.out_of_distribution == second.out_of_distribution
        assert first.probabilities == pytest.approx(second.probabilities, abs=2e-6)


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_a_limit_is_the_lower_of_0_and_the_score_that_one_in_a_hundred_notes_has(shift):
    scores = np.random.default_rng(0).normal(size=1000) + shift
    chosen = choose_limit(scores)
    assert chosen.limit == min(0.0, np.sort(scores)[9])  # 9 of 1,000 are below the tenth
    assert chosen.false_alarms == (9 / 1000 if shift < 0 else 0)
    assert chosen.notes == 1000


def test_fifty_notes_are_needed_to_choose_a_limit(bundled):
    notes = [Note(text, (0,)) for text in CLINICAL * 7]
    assert outlier_limit(bundled, notes[:49]) is None
    assert outlier_limit(bundled, notes[:50]).notes == 50
    assert outlier_limit(bundled, []) is None


def test_notes_in_another_language_lower_the_limit_until_they_are_not_outliers(bundled):
    """A run of French notes must not refer every French note."""
    notes = [Note(f"{OTHER[0]} Patient {number}.", (0,)) for number in range(100)]
    bundled.outliers, kept = outlier_limit(bundled, notes), bundled.outliers
    try:
        outliers = [p.out_of_distribution for p in bundled([note.text for note in notes])]
    finally:
        bundled.outliers = kept
    assert sum(outliers) <= 1


def test_a_limit_is_saved_and_comes_back(small_run, tmp_path):
    classifier = Classifier.load(small_run, device="cpu", precision="fp32")
    classifier.outliers = OutlierLimit(limit=-1.25, notes=70, false_alarms=0.01)
    classifier.save(tmp_path / "run")
    assert Classifier.load(tmp_path / "run", device="cpu").outliers == classifier.outliers


def test_what_a_run_records_of_it_are_three_numbers():
    about = json.loads((BUNDLED / "adapter" / "clinora.json").read_text())["outliers"]
    assert set(about) == {"limit", "notes", "false_alarms"}
    assert all(isinstance(value, int | float) for value in about.values())


def test_train_chooses_the_limit_from_the_training_and_validation_notes(tmp_path, monkeypatch):
    import train as train_script

    monkeypatch.chdir(tmp_path)
    notes = clinora.read_notes(write_notes(tmp_path / "notes.csv", texts=90))
    words = "--notes notes.csv --run run --steps 1 --notes-per-step 2 --device cpu --token-limit 32"
    assert train_script.main(words.split()) == 0
    outliers = Classifier.load(tmp_path / "run", device="cpu").outliers
    assert outliers.notes == len(notes.on("training")) + len(notes.on("validation"))


def test_the_tool_reads_the_notes_as_the_run_read_them(tmp_path, monkeypatch):
    import train as train_script
    from tools import add_outliers

    monkeypatch.chdir(tmp_path)
    write_notes(tmp_path / "notes.csv", texts=90)
    rows = Path("notes.csv").read_text().replace("transcription,medical_specialty", "body,kind")
    Path("notes.csv").write_text(rows)
    words = "--notes notes.csv --run run --steps 1 --notes-per-step 2 --device cpu --token-limit 32"
    columns = ["--text-column", "body", "--label-column", "kind", "--split", "rows"]
    assert train_script.main([*words.split(), *columns]) == 0
    record = json.loads(Path("run", "clinora.json").read_text())
    chosen = record.pop("outliers")
    Path("run", "clinora.json").write_text(json.dumps(record))
    assert add_outliers.main(["--run", "run", "--notes", "notes.csv"]) == 0
    assert json.loads(Path("run", "clinora.json").read_text())["outliers"] == chosen
