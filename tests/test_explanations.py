"""The comparison of two explanations: its scores and its measures, against closed forms."""

import itertools

import numpy as np
import pytest
import torch

import clinora
from clinora.classifier import Prediction
from tools import explanations as tool

NOTE = "No fever. Dose 2.5 mg for chest pain. ECG normal! CT"


def log_odds(classifier, ids, scale, index):
    """Give the log-odds of a class with each token's embedding multiplied by a factor."""
    model = classifier.model.eval()
    hook = model.model.embed_tokens.register_forward_hook(lambda *x: x[-1] * scale[:, None])
    with torch.no_grad():
        p = model(torch.tensor([ids]), torch.tensor([len(ids)]))[0].double().softmax(0)
    hook.remove()
    return (p[index].log() - (-p[index]).log1p()).item()


def test_a_tokens_score_is_the_derivative_of_the_log_odds_by_its_embeddings_size(classifier):
    ids = classifier.tokenizer.encode(NOTE)
    found = tool.score_tokens(classifier, ids)
    predicted = classifier([NOTE])[0].index
    for i in range(0, len(ids), 5):
        up, down = torch.ones(2, len(ids))
        up[i], down[i] = 1.02, 0.98
        z = [log_odds(classifier, ids, scale, predicted) for scale in (up, down)]
        assert found[i] == pytest.approx((z[0] - z[1]) / 0.04, rel=0.02, abs=1e-3)


def test_scoring_leaves_the_model_as_it_was(classifier):
    before = classifier([NOTE])[0]
    tool.score_tokens(classifier, [1, 2, 3])
    assert classifier([NOTE])[0] == before
    assert all(parameter.grad is None for parameter in classifier.model.parameters())


def test_a_part_has_the_sum_of_the_tokens_that_end_in_it(classifier):
    parts = ["No fever. ", "swollen knee. ", "patient with pain! ", "CT"]  # " s", " pa": tokens
    ids = classifier.tokenizer.encode("".join(parts))
    starts = list(itertools.accumulate([0, *map(len, parts[:-1])]))
    expected = [0.0] * len(parts)
    tokens = tool.score_tokens(classifier, ids)
    for i in range(1, len(ids)):
        last = max(0, len(classifier.tokenizer.decode(ids[: i + 1])) - 1)
        expected[max(k for k in range(len(parts)) if starts[k] <= last)] += tokens[i]
    assert tool.gradient_times_input(classifier, parts) == pytest.approx(expected, abs=1e-5)


def test_a_note_in_capitals_is_scored_as_the_classifier_reads_it(classifier):
    parts = [f"THE PATIENT HAS {words}. " for words in ("NO FEVER", "A SWOLLEN KNEE", "PAIN")]
    assert classifier([" ".join(parts)])[0] == classifier([" ".join(parts).lower()])[0]
    lower = [part.lower() for part in parts]
    scores = tool.gradient_times_input(classifier, parts)
    assert scores == pytest.approx(tool.gradient_times_input(classifier, lower), abs=1e-6)


WEIGHTS = {"a": 0.25, "b": 0.125, "c": 0.0625, "d": -0.0625}


def additive(texts):
    """Classify texts of letters: the first class has the probability 0.3125 plus their weights."""
    predictions = []
    for text in texts:
        p = 0.3125 + sum(WEIGHTS[letter] for letter in text.split())
        index = 0 if p >= 0.5 else 1
        predictions.append(Prediction("", index, None, (p, 1 - p), None, 9, False))
    return predictions


def test_the_measures_of_a_note_are_those_of_the_closed_form(monkeypatch):
    scores = np.array([-1.0, 2.0, 1.0, -3.0])  # their order: b, c, a, d
    monkeypatch.setattr(tool, "gradient_times_input", lambda *_: scores)
    draw = np.random.default_rng(0)
    found = tool.measure_note(additive, ["a ", "b ", "c ", "d"], draw)
    assert found[tool.LEAVE_ONE_OUT] == {
        "signs right": 1, "top part right": 1, "top part alone": 1,
        "top 1 left out": 25, "top 2 left out": 37.5, "top 3 left out": 43.75,
    }  # fmt: skip
    assert found[tool.GRADIENT] == {
        "signs right": 0.75, "top part right": 0, "top part alone": 0,
        "top 1 left out": 12.5, "top 2 left out": 18.75, "top 3 left out": 43.75,
    }  # fmt: skip


def test_the_table_has_the_means_over_the_notes(capsys):
    notes = [clinora.Note(f"note {i}", (0,)) for i in range(2)]
    columns = (*tool.SHARES, *tool.FALLS)
    found = [{m: dict.fromkeys(columns, value) for m in tool.METHODS} for value in (0.0, 1.0)]
    found[1][tool.GRADIENT]["top 2 left out"] = 0.0
    tool.print_table(notes, found)
    header, _, *rows = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")
    ]
    for row in rows:
        for name, cell in zip(header[1:], row[1:], strict=True):
            if name == "signs right" and "random" in row[0]:
                assert cell == ""
            elif name == "top 2 left out" and "gradient" in row[0]:
                assert cell == "0.0"
            else:
                assert cell.rstrip(" |") == ("0.5" if "left out" in name else "50.0%")


def test_a_run_that_does_not_say_what_it_has_seen_is_an_error(small_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--run", str(small_run), "--device", "cpu"])
    error = capsys.readouterr().err
    assert "does not record which notes it has seen" in error
    assert error.count("\n") == 1


def test_notes_that_the_run_has_seen_or_with_few_sentences_are_not_measured(
    small_run, tmp_path, monkeypatch, capsys
):
    run = clinora.Classifier.load(small_run, device="cpu")
    texts = [f"Note {i}. No fever. ECG: normal. CT. The knee." for i in range(8)]
    texts.append("Note 8. No fever.")
    rows = [f'"{text}",{run.labels[0]}' for text in texts]
    path = tmp_path / "notes.csv"
    path.write_text("\n".join(["transcription,medical_specialty", *rows, ""]))
    run.record_training([clinora.Note(text, (0,)) for text in texts[:3]], {})
    run.save(tmp_path / "run")
    measured = []
    monkeypatch.setattr(
        tool, "measure_note", lambda _, parts, draw: measured.append("".join(parts)) or {}
    )
    monkeypatch.setattr(tool, "print_table", lambda *_: None)
    assert tool.main(["--run", str(tmp_path / "run"), "--notes", str(path)]) == 0
    assert sorted(measured) == texts[3:8]
