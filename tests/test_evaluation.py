"""Measures on notes with several labels, worked out by hand."""

import numpy as np
import pytest
import torch
import transformers

import clinora
from clinora.checkpoint import BUNDLED
from clinora.evaluation import evaluate, evaluate_random_heads, score
from clinora.figures import confusion_figure
from clinora.notes import Note
from clinora.report import results_table

# Texts filed under: A · B · A and B · A twice and C. Named: A · A · B · C.
NOTES = [Note("a", (0,)), Note("b", (1,)), Note("ab", (0, 1)), Note("aac", (0, 0, 2))]
NAMED = np.array([0, 0, 1, 2])


def test_accuracy_counts_rows_and_any_label_accuracy_notes():
    result = score(NAMED, NOTES, 3)
    assert (result.notes, result.rows) == (4, 7)
    assert result.accuracy == 3 / 7  # a; b of ab; c of aac
    assert result.any_label_accuracy == 3 / 4  # all but b


def test_confusion_has_a_row_for_each_filed_class():
    assert score(NAMED, NOTES, 3).confusion == ((1, 1, 2), (1, 1, 0), (0, 0, 1))


def test_measures_of_each_class_follow_from_the_confusion():
    result = score(NAMED, NOTES, 3)
    assert result.precision == pytest.approx((1 / 2, 1 / 2, 1 / 3))
    assert result.recall == pytest.approx((1 / 4, 1 / 2, 1 / 1))
    assert result.f1 == pytest.approx((1 / 3, 1 / 2, 1 / 2))
    assert result.support == (4, 2, 1)


def test_a_class_that_never_occurs_scores_zero():
    result = score(np.array([0]), [Note("a", (0,))], 2)
    assert (result.precision[1], result.recall[1], result.support[1]) == (0.0, 0.0, 0)


def test_no_notes_are_refused():
    classifier = clinora.Classifier.load("bundled", device="cpu", precision="fp32")
    with pytest.raises(ValueError, match="no notes"):
        evaluate(classifier, [])


def test_before_training_is_the_base_under_random_heads():
    """The adapter is off: states come from Transformers' reading of the base alone."""
    classifier = clinora.Classifier.load("bundled", device="cpu", precision="fp32")
    notes = [Note(text, (i % 5,)) for i, text in enumerate(["chest pain", "knee", "CT", "H&P"])]
    result = evaluate_random_heads(classifier, notes, heads=7, seed=3)

    base = transformers.LlamaModel.from_pretrained(BUNDLED / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        states = torch.stack(
            [base(torch.tensor([classifier.tokenizer.encode(n.text)]))[0][0, -1] for n in notes]
        )
    draw = torch.Generator().manual_seed(3)
    shares = []
    for _ in range(7):
        head = torch.randn(5, states.size(1), generator=draw)
        named = [int((head @ state).argmax()) for state in states]
        shares.append(sum(n in note.filed for n, note in zip(named, notes, strict=True)) / 4)
    assert result.any_label_accuracy == pytest.approx(np.mean(shares))
    assert result.spread == pytest.approx(np.std(shares, ddof=1))


def test_the_figure_says_every_count_and_share():
    figure = confusion_figure([[3, 1], [0, 6]], ["A", "B"])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["3\n75%", "1\n25%", "0\n0%", "6\n100%"]


def test_the_table_names_each_class_with_its_measures():
    table = results_table(["A", "B", "C"], score(NAMED, NOTES, 3))
    assert "75.0% of the notes right (4 notes" in table
    assert table.splitlines()[-1].split() == ["C", "33.3%", "100.0%", "50.0%", "1"]
