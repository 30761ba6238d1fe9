"""Measures against scikit-learn, SciPy, closed forms, brute force and simulations."""

import functools
import itertools
import os
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import transformers
from hypothesis import strategies
from sklearn import metrics
from sklearn.calibration import calibration_curve

import clinora
from clinora.baselines import TF_IDF, Predictions
from clinora.calibration import Calibration, fit_calibration
from clinora.checkpoint import BUNDLED
from clinora.evaluation import (
    Answers,
    assess,
    bootstrap,
    calibrate,
    ceiling,
    classify,
    evaluate_random_heads,
    expected_calibration_error,
    measure,
    wilson,
)
from clinora.notes import Note, read_notes, soft_targets

# Texts filed under: A · B · A and B · A twice and C · B and C. Named: A · A · B · C · A.
NOTES = [
    Note("a", (0,)), Note("b", (1,)), Note("ab", (0, 1)), Note("aac", (0, 0, 2)),
    Note("bc", (1, 2)),
]  # fmt: skip
NAMED = np.array([0, 0, 1, 2, 0])
SPLIT_LABELS = ["A", "B", "C"]


def answer(named, notes, top=None, confidence=None, loss=None):
    named = np.asarray(named)
    n = len(notes)
    return Answers(
        predicted=named,
        correct=np.array([a in note.labels for a, note in zip(named, notes, strict=True)]),
        top=np.full(n, 0.5) if top is None else np.asarray(top),
        loss=np.zeros(n) if loss is None else np.asarray(loss),
        confidence=confidence,
        tokens=np.full(n, 10),
    )


def calibration_at(threshold):
    return Calibration(
        weights=(1.0, 1.0), bias=0.0, promise=0.9, threshold=threshold, notes=50, coverage=1.0,
        accuracy=1.0,
    )  # fmt: skip


def measured(named, notes, classes, draws=2, **more):
    """Measure without calibration; the bootstrap draws only twice unless its intervals matter."""
    with pytest.MonkeyPatch.context() as patch:
        fewer = functools.partial(bootstrap, replicates=draws)
        patch.setattr("clinora.evaluation.bootstrap", fewer)
        return measure(answer(named, notes, **more), notes, [f"{i}" for i in range(classes)], None)


def filed_notes(classes):
    """Strategy: notes filed under some of the classes, and what is named of each."""
    note = strategies.tuples(
        strategies.lists(strategies.integers(0, classes - 1), min_size=1, max_size=4),
        strategies.integers(0, classes - 1),
    )
    return strategies.lists(note, min_size=1, max_size=30)


@pytest.fixture(scope="module")
def classifier():
    return clinora.Classifier.load("bundled", device="cpu", precision="fp32")


# --- rows and notes -------------------------------------------------------------------------------


@hypothesis.given(filed_notes(4))
@hypothesis.settings(max_examples=25, deadline=None)
def test_by_row_is_scikit_learn_on_a_row_for_each_label(drawn):
    """One class may never be filed, or never be named."""
    notes = [Note(f"{i}", tuple(filed)) for i, (filed, _) in enumerate(drawn)]
    named = np.array([name for _, name in drawn])
    true = [label for note in notes for label in note.filed]
    said = [name for note, name in zip(notes, named, strict=True) for _ in note.filed]
    ours = measured(named, notes, 4).by_row
    assert ours.confusion.tolist() == metrics.confusion_matrix(true, said, labels=range(4)).tolist()
    assert ours.accuracy.value == pytest.approx(metrics.accuracy_score(true, said))
    theirs = metrics.precision_recall_fscore_support(true, said, labels=range(4), zero_division=0)
    for i, c in enumerate(ours.classes):
        values = c.precision.value, c.recall.value, c.f1.value, c.support
        assert values == pytest.approx([column[i] for column in theirs])
    f1 = metrics.f1_score(true, said, labels=sorted(set(true)), average="macro", zero_division=0)
    assert ours.macro_f1.value == pytest.approx(f1)


def test_by_note_by_hand():
    """Right: all to the class named. Wrong: a half to each of the two classes of "bc"."""
    result = measured(NAMED, NOTES, 3).by_note
    assert result.confusion.tolist() == [[1, 0, 0], [1.5, 1, 0], [0.5, 0, 1]]
    assert [c.precision.value for c in result.classes] == pytest.approx([1 / 3, 1, 1])
    assert [c.recall.value for c in result.classes] == pytest.approx([1, 1 / 2.5, 1 / 1.5])
    assert [c.support for c in result.classes] == [1, 2.5, 1.5]


@hypothesis.given(filed_notes(5))
@hypothesis.settings(max_examples=25, deadline=None)
def test_by_note_each_note_counts_once_and_accuracy_is_any_label_accuracy(drawn):
    notes = [Note(f"{i}", tuple(filed)) for i, (filed, _) in enumerate(drawn)]
    named = np.array([name for _, name in drawn])
    result = measured(named, notes, 5).by_note
    right = sum(name in filed for filed, name in drawn)
    assert result.confusion.sum() == pytest.approx(len(notes))
    assert result.confusion.trace() == pytest.approx(right)
    assert result.accuracy.value == pytest.approx(right / len(notes))


def test_a_class_that_never_occurs_scores_zero_and_is_left_out_of_the_mean():
    result = measured([0, 2], [Note("a", (0,)), Note("b", (0,))], 3).by_note
    assert result.classes[1].precision.value == result.classes[1].support == 0
    assert result.macro_f1.value == pytest.approx(2 / 3)  # of class 0 alone


def test_measures_of_one_note():
    result = measured([1], [Note("a", (0, 1))], 2)
    assert result.by_note.accuracy.value == 1
    assert result.by_row.accuracy.value == 1 / 2


def test_targets_share_among_the_labels():
    notes = [Note("a", (2, 2, 0)), Note("b", (1,))]
    assert soft_targets(notes, 4).tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]


def test_log_loss_is_torchs_cross_entropy(classifier):
    notes = [Note("chest pain " * 9, (0, 4)), Note("knee", (2,)), Note("CT scan", (3, 1, 0))]
    answers = classify(classifier, notes)
    ids = [classifier.tokenizer.encode(note.text) for note in notes]
    logits = torch.stack([classifier.logits([i])[0] for i in ids])
    wanted = torch.zeros(3, 5)
    wanted[0, [0, 4]], wanted[1, 2], wanted[2, [0, 1, 3]] = 1 / 2, 1, 1 / 3
    expected = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    assert answers.loss == pytest.approx(expected.numpy(), abs=1e-5)
    result = measure(answers, notes, classifier.labels, None)
    assert result.log_loss.value == pytest.approx(expected.mean().item(), abs=1e-5)


def test_no_notes_are_refused(classifier):
    with pytest.raises(ValueError, match="no notes"):
        classify(classifier, [])


# --- calibration error ----------------------------------------------------------------------------


def test_calibration_error_is_that_of_a_naive_loop():
    draw = np.random.default_rng(1)
    claimed, right = draw.random(97), draw.random(97) < 0.4
    order, expected = sorted(range(97), key=lambda i: claimed[i]), 0.0
    for b in range(10):
        part = [order[k] for k in range(97) if k * 10 // 97 == b]
        gap = sum(claimed[i] for i in part) / len(part) - sum(right[i] for i in part) / len(part)
        expected += len(part) / 97 * abs(gap)
    assert expected_calibration_error(claimed, right) == pytest.approx(expected)


def test_calibration_error_is_that_of_scikit_learns_curve():
    draw = np.random.default_rng(2)
    claimed, right = draw.random(500), draw.random(500) < 0.4
    share, mean = calibration_curve(right, claimed, n_bins=10, strategy="quantile")
    assert expected_calibration_error(claimed, right) == pytest.approx(np.abs(share - mean).mean())


@pytest.mark.parametrize("n", [1, 3, 10, 11])
def test_calibration_error_of_few_notes_that_are_all_right(n):
    assert expected_calibration_error(np.full(n, 0.75), np.ones(n, bool)) == pytest.approx(0.25)


def test_calibration_error_counts_a_note_as_often_as_it_was_drawn():
    claimed, right = np.array([0.2, 0.9]), np.array([True, True])
    error = expected_calibration_error(claimed, right, np.array([3.0, 1.0]))
    assert error == pytest.approx((3 * 0.8 + 0.1) / 4)


# --- intervals ------------------------------------------------------------------------------------


def texts(n):
    return [Note(f"{i}", (0,)) for i in range(n)]


def mean_of(values):
    return lambda weights: np.array([weights @ values / weights.sum()])


def test_bootstrap_interval_is_scipys():
    values = np.random.default_rng(3).exponential(size=80)
    (ours,) = bootstrap(mean_of(values), texts(80), replicates=4000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    # A quantile's error by chance is √(q·(1 − q) / replicates) / density: about 0.04 standard
    # errors here; four of each, ours and theirs.
    tolerance = 4 * 2**0.5 * 0.043 * values.std() / 80**0.5
    assert ours[1:] == pytest.approx(tuple(theirs), abs=tolerance)


def test_bootstrap_interval_of_a_share_is_the_binomials_quantiles():
    right = np.arange(200) < 150
    (share,) = bootstrap(mean_of(right), texts(200), replicates=4000)
    assert share.value == 3 / 4
    # One note either way: the quantiles of 4,000 draws are themselves uncertain by that.
    low, high = scipy.stats.binom.ppf((0.025, 0.975), 200, 0.75) / 200
    assert share[1:] == pytest.approx((low, high), abs=1 / 200 + 1e-9)


def test_equal_texts_are_drawn_together():
    """Split by rows: a hundred texts twice each have the interval of a hundred, not of 200."""
    right = np.random.default_rng(0).random(100) < 0.7
    (once,) = bootstrap(mean_of(right), texts(100))
    (twice,) = bootstrap(mean_of(np.tile(right, 2)), texts(100) * 2)
    assert twice == pytest.approx(once)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draw, covered, truth = np.random.default_rng(5), 0, 0.85
    for _ in range(200):
        (share,) = bootstrap(mean_of(draw.random(150) < truth), texts(150), replicates=200)
        covered += share.low <= truth <= share.high
    # 95% of 200, less four standard deviations of that count and less the percentile interval's
    # known shortfall at this size, below three points; all 200 would be too wide.
    assert 190 - 4 * (200 * 0.95 * 0.05) ** 0.5 - 6 <= covered < 200


def test_intervals_of_measures_are_those_of_counting_again():
    """The fast count by weights against scikit-learn on notes that are really drawn again."""
    draw = np.random.default_rng(6)
    notes = [Note(f"{i}", tuple(draw.integers(0, 3, draw.integers(1, 4)))) for i in range(60)]
    named = draw.integers(0, 3, 60)
    result = measured(named, notes, 3, draws=300).by_row
    draws = np.random.default_rng(0)
    _, place = np.unique([note.sha256 for note in notes], return_inverse=True)
    of_text = np.argsort(place)  # the i-th text in the order of hashes is note of_text[i]
    scores = []
    for _ in range(300):
        drawn = of_text[draws.integers(60, size=60)]
        true = [label for i in drawn for label in notes[i].filed]
        said = [named[i] for i in drawn for _ in notes[i].filed]
        scores.append((
            metrics.accuracy_score(true, said),
            metrics.f1_score(true, said, average="macro", labels=sorted(set(true))),
        ))  # fmt: skip
    for ours, theirs in zip((result.accuracy, result.macro_f1), np.transpose(scores), strict=True):
        assert ours[1:] == pytest.approx(np.quantile(theirs, (0.025, 0.975)))


@pytest.mark.parametrize(("hits", "n"), [(0, 48), (1, 3), (27, 40), (127, 127), (999, 1000)])
def test_wilson_is_scipys_and_holds_the_share(hits, n):
    low, high = wilson(hits, n)
    theirs = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-4)  # z is 1.96
    assert low <= hits / n <= high


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_does_not_claim_certainty(right):
    result = measured([0] * 50, [Note(f"{i}", (int(not right),)) for i in range(50)], 2)
    accuracy = result.by_note.accuracy
    assert accuracy.value == right
    assert accuracy[1:] == wilson(50 * right, 50)


def wilsons(hits, n):
    return tuple(scipy.stats.binomtest(hits, n).proportion_ci(method="wilson"))


def test_a_class_that_is_all_right_or_all_wrong_does_not_claim_certainty_either():
    """Named 0: 5, all right. 1: 6, all right. 2: none. 3: 5, all wrong, and none is filed so."""
    filed = [(0,)] * 5 + [(0,)] * 4 + [(1,)] * 6 + [(1, 2)]
    named = np.array([0] * 5 + [3] * 4 + [1] * 6 + [3])
    notes = [Note(f"{i}", labels) for i, labels in enumerate(filed)]
    zero, one, two, three = measured(named, notes, 4).by_note.classes
    assert zero.precision[1:] == pytest.approx(wilsons(5, 5), abs=1e-4)
    assert one.precision[1:] == pytest.approx(wilsons(6, 6), abs=1e-4)
    assert three.precision[1:] == pytest.approx(wilsons(0, 5), abs=1e-4)
    assert two.precision[1:] == (0, 1)  # never named
    assert three.recall[1:] == (0, 1)  # never filed
    # F1 is 2·j / (1 + j) of j, the share of the notes filed or named so that are both.
    low, high = wilsons(0, 5)
    assert three.f1[1:] == pytest.approx((low, 2 * high / (1 + high)), abs=1e-4)
    for c in (zero, one, two, three):
        for share in (c.precision, c.recall, c.f1):
            assert share.low < share.high


def test_rows_of_one_note_count_once_where_a_class_is_all_right_or_all_wrong():
    """Eight rows of two texts tell no more than two notes."""
    notes = [Note("a", (0,) * 4), Note("b", (0,) * 4), Note("c", (1,)), Note("d", (2, 2, 2))]
    zero, one, two = measured([0, 0, 1, 1], notes, 3).by_row.classes
    for share in (zero.precision, zero.recall):
        assert share[1:] == pytest.approx(wilsons(2, 2), abs=1e-4)
    low = wilsons(2, 2)[0]
    assert zero.f1[1:] == pytest.approx((2 * low / (1 + low), 1), abs=1e-4)
    assert one.recall[1:] == pytest.approx(wilsons(1, 1), abs=1e-4)
    assert two.recall[1:] == pytest.approx(wilsons(0, 1), abs=1e-4)


@pytest.mark.parametrize("right", [True, False])
def test_a_mean_f1_of_one_or_zero_is_no_surer_than_its_classes(right):
    named = [0, 1] * 10 if right else [1, 0] * 10
    result = measured(named, [Note(f"{i}", (i % 2,)) for i in range(20)], 2).by_note
    assert result.macro_f1.value == right
    assert result.macro_f1 == pytest.approx(result.classes[0].f1)
    assert result.macro_f1.low < result.macro_f1.high


# --- ceilings -------------------------------------------------------------------------------------


def test_ceiling_is_the_best_of_all_functions_of_the_text():
    rows = {"a": (0, 0, 1), "b": (2,), "c": (0, 1), "d": (2, 1, 2, 0)}
    best = max(
        sum(label == named for filed, named in zip(rows.values(), function, strict=True)
            for label in filed)
        for function in itertools.product(range(3), repeat=4)
    )  # fmt: skip
    assert ceiling([Note(text, filed) for text, filed in rows.items()]) == best / 10


def test_ceiling_is_the_same_for_rows_and_for_texts():
    rows = [("a", 0), ("b", 1), ("a", 1), ("a", 0)]
    by_row = [Note(text, (label,)) for text, label in rows]
    assert ceiling(by_row) == ceiling([Note("a", (0, 1, 0)), Note("b", (1,))]) == 3 / 4


def test_mtsamples_ceiling_is_that_of_a_table_of_its_rows(data):
    """The commonest label of each text, counted by pandas."""
    table = pd.read_csv(data / "mtsamples.csv", keep_default_na=False)
    table = table.apply(lambda column: column.str.strip() if column.dtype != int else column)
    table = table[
        table.transcription.ne("") & table.medical_specialty.isin(clinora.PUBLISHED_CLASSES)
    ]
    counts = table.groupby(["transcription", "medical_specialty"]).size()
    best = counts.groupby("transcription").max().sum() / len(table)
    notes = read_notes(data / "mtsamples.csv")
    assert ceiling(notes.notes) == best
    assert ceiling(read_notes(data / "mtsamples.csv", split="rows").notes) == best


# --- before, and simpler classifiers --------------------------------------------------------------


def test_before_training_is_the_base_under_random_heads(classifier):
    """The adapter is off: states come from Transformers' reading of the base alone."""
    words = ["chest pain", "knee", "CT", "H&P"]
    notes = [Note(text, (i, (i + 1) % 5)) for i, text in enumerate(words)]
    result = evaluate_random_heads(classifier, notes, heads=7, seed=3)

    base = transformers.LlamaModel.from_pretrained(BUNDLED / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        states = torch.stack(
            [base(torch.tensor([classifier.tokenizer.encode(n.text)]))[0][0, -1] for n in notes]
        )
    draw = torch.Generator().manual_seed(3)
    std = classifier.model.model.config.initializer_range
    any_label, accuracy, loss = [], [], []
    for _ in range(7):
        logits = states @ (torch.randn(5, states.size(1), generator=draw) * std).T
        named = logits.argmax(-1).tolist()
        any_label.append(sum(n in note.filed for n, note in zip(named, notes, strict=True)) / 4)
        accuracy.append(sum(note.filed.count(n) for n, note in zip(named, notes, strict=True)) / 8)
        log_p = logits.log_softmax(-1)
        loss.append(-np.mean([log_p[i, list(n.filed)].mean().item() for i, n in enumerate(notes)]))
    for ours, theirs in (
        (result.any_label_accuracy, any_label),
        (result.accuracy, accuracy),
        (result.log_loss, loss),
    ):
        assert ours == pytest.approx((np.mean(theirs), np.std(theirs, ddof=1)), rel=1e-4)


def test_random_heads_follow_their_seed(classifier):
    notes = [Note("chest pain", (0,)), Note("knee", (1,))]
    one, again, other = (evaluate_random_heads(classifier, notes, seed=s) for s in (0, 0, 1))
    assert one == again != other


def words_of(label, i):
    common = ["patient", "seen", "today", "left", "right", "pain", "exam", "normal"]
    own = [["heart", "valve"], ["bone", "joint"], ["scan", "contrast"]][label]
    return " ".join(
        [common[i % 8], own[i % 2], common[(i * 3) % 8], own[(i // 2) % 2], f"x{i % 5}"]
    )


def notes_file(folder, classes):
    rows = [f"visit {i}: {words_of(i % 3, i)},{classes[i % 3]}" for i in range(120)]
    path = folder / "notes.csv"
    path.write_text("transcription,medical_specialty\n" + "\n".join(rows) + "\n")
    return path


def test_lora_is_compared_pairwise_with_the_linear_model(tmp_path, classifier, monkeypatch):
    """The difference is drawn note by note: a second implementation, note by note."""
    path = notes_file(tmp_path, clinora.PUBLISHED_CLASSES)
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows, "spare a,Radiology", "spare b,Surgery"]) + "\n")
    notes = read_notes(path)
    test = notes.on("test")
    filed = np.array([note.filed[0] for note in test])
    predicted = filed.copy()
    predicted[::3] = (filed[::3] + 1) % 5
    made = [Predictions("majority class", "", filed), Predictions(TF_IDF, "words", predicted)]
    monkeypatch.setattr("clinora.evaluation.train_baselines", lambda *_: made)
    results, answers = assess(classifier, notes, test, learned_from=notes)
    gain = answers.correct.astype(int) - (np.arange(len(test)) % 3 > 0)
    assert results.against.value == pytest.approx(gain.mean())
    theirs = scipy.stats.bootstrap(
        (gain,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # A grid of 1/N: one note more or less by chance.
    assert results.against[1:] == pytest.approx(tuple(theirs), abs=1.5 / len(test))
    assert results.in_training == 0


def test_a_run_that_agrees_with_its_baseline_on_few_notes_may_yet_differ(
    tmp_path, classifier, monkeypatch
):
    path = notes_file(tmp_path, clinora.PUBLISHED_CLASSES)
    with path.open("a") as file:
        file.write("spare a,Radiology\nspare b,Surgery\n")
    notes = read_notes(path)
    test = notes.on("test")[:12]
    made = [Predictions(TF_IDF, "words", classify(classifier, test).predicted)]
    monkeypatch.setattr("clinora.evaluation.train_baselines", lambda *_: made)
    results, _ = assess(classifier, notes, test, learned_from=notes)
    none = scipy.stats.binomtest(0, 12).proportion_ci(method="wilson").high
    assert results.against == pytest.approx((0, -none, none), abs=1e-4)


def test_rows_split_says_how_many_texts_stand_in_training(tmp_path, classifier):
    path = notes_file(tmp_path, clinora.PUBLISHED_CLASSES)
    header, *rows = path.read_text().splitlines()
    spare = ["spare a,Radiology", "spare b,Surgery"]
    path.write_text("\n".join([header, *rows, *rows, *spare]) + "\n")
    notes = read_notes(path, split="rows")
    results, _ = assess(classifier, notes, notes.on("test"), learned_from=notes)
    training = {n.text for n in notes.on("training")}
    assert results.split == "rows"
    assert results.in_training == sum(n.text in training for n in notes.on("test")) > 0


# --- confidence -----------------------------------------------------------------------------------


def simulate(draw, n, classes=5):
    """What a model says of notes with one and with two labels; whether it is right; which have two.

    Two labels share the probability evenly. How likely each answer is right is known: it follows
    from the two largest probabilities, by weights that no test tells the fit.
    """
    two = draw.random(n) < 0.5
    strength = np.full((n, classes), 0.15)
    strength[:, 0] = np.where(two, 6, 4)
    strength[two, 1] = 6
    p = draw.gamma(strength)
    p = (p / p.sum(1, keepdims=True)).astype(np.float32)
    second, first = np.sort(p)[:, -2:].astype(float).clip(1e-6).T
    both = (first + second).clip(max=1 - 1e-6)
    truth = scipy.special.expit(0.6 * scipy.special.logit(both) + 0.3 * np.log(first / second) - 1)
    return p, draw.random(n) < truth, two


def test_confidence_is_calibrated_on_unseen_notes_also_of_two_labels():
    """The gap to the share right on unseen notes is 0 but for the chance of drawing both sides."""
    draw, gaps = np.random.default_rng(0), defaultdict(list)
    for _ in range(100):
        calibration = fit_calibration(*simulate(draw, 200)[:2], 0.95)
        p, right, two = simulate(draw, 200)
        gap = calibration.confidence(p) - right
        for name, part in {"all": right | True, "one": ~two, "two": two}.items():
            gaps[name].append(gap[part].mean())
    for name, gap in gaps.items():
        assert abs(np.mean(gap)) < 4 * np.std(gap) / 100**0.5, name
        assert np.std(gap) < 2 * (2 * 0.25 / 100) ** 0.5  # the other side is not missed by much


def test_the_largest_probability_alone_would_call_two_labels_unsure():
    p, right, two = simulate(np.random.default_rng(0), 4000)
    assert p[two].max(-1).mean() < right[two].mean() - 0.1
    gap = fit_calibration(p, right, 0.95).confidence(p)[two] - right[two]
    assert abs(gap.mean()) < 4 * gap.std() / two.sum() ** 0.5


def test_the_fit_finds_the_weights_that_made_the_notes():
    calibration = fit_calibration(*simulate(np.random.default_rng(0), 20_000)[:2], 0.95)
    assert [*calibration.weights, calibration.bias] == pytest.approx([0.6, 0.3, -1], abs=0.1)


def test_the_confidence_is_what_its_formula_says():
    calibration = Calibration(
        weights=(0.7, 0.3), bias=-0.2, promise=0.9, threshold=0.5, notes=50, coverage=1.0,
        accuracy=1.0,
    )  # fmt: skip
    p = np.array([[0.6, 0.3, 0.1], [0.05, 0.15, 0.8]])
    logit = 0.7 * scipy.special.logit([0.9, 0.95]) + 0.3 * np.log([2, 0.8 / 0.15]) - 0.2
    assert calibration.confidence(p) == pytest.approx(scipy.special.expit(logit))


def test_the_fit_is_platts_with_smoothed_targets():
    """Another optimiser on Platt's loss with scikit-learn's penalty |w|² / 2C."""
    p, right, _ = simulate(np.random.default_rng(1), 200)
    first, second = p.max(-1).astype(float), np.sort(p)[:, -2].astype(float)
    both = (first + second).clip(max=1 - 1e-6)
    x = np.stack((scipy.special.logit(both), np.log(first / second.clip(1e-6))), 1)
    hits, n = right.sum(), len(right)
    target = np.where(right, (hits + 1) / (hits + 2), 1 / (n - hits + 2))

    def loss(w):
        z = x @ w[:2] + w[2]
        return (np.logaddexp(0, z) - target * z).sum() + w[:2] @ w[:2] / 20

    best = scipy.optimize.minimize(loss, np.zeros(3), method="BFGS").x
    ours = fit_calibration(p, right, 0.95)
    assert [*ours.weights, ours.bias] == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize("classes", [2, 3, 40])
@pytest.mark.parametrize("right", [True, False], ids=["all right", "all wrong"])
def test_all_right_or_all_wrong_validation_notes_do_not_break_it(classes, right):
    p = np.random.default_rng(2).dirichlet(np.full(classes, 0.3), 60).astype(np.float32)
    calibration = fit_calibration(p, np.full(60, right), 0.95)
    confidence = calibration.confidence(p)
    assert np.isfinite(confidence).all()
    assert (confidence > 0.9).all() if right else (confidence < 0.1).all()
    assert calibration.coverage == right
    assert calibration.accuracy == (1.0 if right else None)
    assert (confidence >= calibration.threshold).all() == right


@pytest.mark.parametrize("promise", [0.55, 0.8, 0.95])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_the_lowest_that_keeps_the_promise(promise, ties):
    """By trying every confidence; equally confident notes are answered all or none."""
    for seed in range(8):
        p, right, _ = simulate(np.random.default_rng(seed), 120)
        if ties:
            p = np.round(p, 1) + np.float32(1e-3)
        calibration = fit_calibration(p, right, promise)
        confidence = calibration.confidence(p)
        kept = {t: confidence >= t for t in confidence}
        good = [
            t for t, k in kept.items()
            if Fraction(int(right[k].sum()), int(k.sum())) >= Fraction(str(promise))
        ]  # fmt: skip
        assert calibration.threshold == (min(good) if good else pytest.approx(1.1))
        if good:
            answered = confidence >= calibration.threshold
            assert calibration.coverage == answered.mean()
            assert calibration.accuracy == right[answered].mean()


def test_a_promise_that_is_kept_exactly_is_kept():
    """0.56 · 25 is a little more than 14 in floating point."""
    p, _, _ = simulate(np.random.default_rng(0), 25)
    assert fit_calibration(p, np.arange(25) < 14, 0.56).coverage == 1


def test_extreme_probabilities_have_a_finite_confidence():
    p = np.array([[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]], np.float32)
    assert np.isfinite(
        fit_calibration(p.repeat(20, 0), np.arange(60) < 50, 0.9).confidence(p)
    ).all()


def test_fewer_than_fifty_validation_notes_are_not_calibrated(classifier):
    notes = [Note(f"note {i}", (i % 5,)) for i in range(50)]
    assert calibrate(classifier, notes[:49]) is None
    assert calibrate(classifier, notes).notes == 50


@pytest.mark.parametrize("promise", [0, 1, -0.1, 95])
def test_a_promise_that_is_no_share_is_refused(classifier, promise):
    with pytest.raises(ValueError, match="promised share"):
        calibrate(classifier, [], promise)


def test_coverage_and_accuracy_at_the_threshold_are_counted():
    confidence = np.array([0.9, 0.5, 0.7, 0.95, 0.2])
    answers = answer(NAMED, NOTES, confidence=confidence)  # right: yes no yes yes no
    result = measure(answers, NOTES, SPLIT_LABELS, calibration_at(0.5)).answered
    assert result.coverage.value == 4 / 5
    assert result.accuracy.value == 3 / 4
    assert (result.promise, result.threshold) == (0.9, 0.5)


def test_no_note_above_the_threshold_has_no_accuracy(recwarn):
    answers = answer(NAMED, NOTES, confidence=np.full(5, 0.5))
    result = measure(answers, NOTES, SPLIT_LABELS, calibration_at(1.1)).answered
    assert result.coverage.value == 0
    assert result.accuracy is None
    assert not recwarn.list


def test_overconfidence_is_mean_confidence_minus_the_share_right():
    confidence = np.array([0.9, 0.5, 0.7, 0.95, 0.2])
    answers = answer(NAMED, NOTES, confidence=confidence)
    result = measure(answers, NOTES, SPLIT_LABELS, calibration_at(0.5))
    assert result.overconfidence.value == pytest.approx(confidence.mean() - 3 / 5)
    assert measured(NAMED, NOTES, 3).overconfidence is None


def test_random_halves_of_mtsamples_are_calibrated(data):
    """Fitted on one half of the validation and test notes, it holds on the other, on average.

    Not note by note of two labels: see the simulation; here how many labels a note has is no
    function of what the model can see.
    """
    classifier = clinora.Classifier.load("bundled", device="cpu")
    notes = read_notes(data / "mtsamples.csv")
    unseen = (notes.on("validation") + notes.on("test"))[::2]
    p, _ = classifier.probabilities([note.text[:1500] for note in unseen])
    named = p.argmax(-1)
    right = np.array([n in note.labels for n, note in zip(named, unseen, strict=True)])
    draw, gaps = np.random.default_rng(0), []
    for _ in range(40):
        a, b = np.array_split(draw.permutation(len(unseen)), 2)
        gaps.append(fit_calibration(p[a], right[a], 0.95).confidence(p[b]).mean() - right[b].mean())
    assert abs(np.mean(gaps)) < np.std(gaps)
    assert np.std(gaps) < 2 * (2 * right.mean() * (1 - right.mean()) / len(b)) ** 0.5


# --- memory ---------------------------------------------------------------------------------------

MEASURE_MEMORY = """
import ctypes
import gc
import sys
from pathlib import Path
import clinora
from clinora.evaluation import assess
from clinora.report import write_report

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def measure(file):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = peak()
    notes = clinora.read_notes(file, classes=classifier.labels)
    results, answers = assess(classifier, notes, notes.notes)
    assessed = peak() - start
    write_report(Path(file + "-report"), results, answers, notes.notes, token_limit=128, about="")
    return assessed, peak() - start

run, *files = sys.argv[1:]
classifier = clinora.Classifier.load(run, device="cpu", precision="fp32")
measure(files[0])  # imports what is needed and allocates what stays
for file in files:
    print(*measure(file))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_grows_by_less_than_2_kb_a_row_beyond_the_texts(small_run, tmp_path):
    """Of a file that the run was not trained on; TF-IDF needs more for the training side."""
    paths = []
    sizes = []
    for rows in (1_000, 10_000):
        texts = [f"Note {i}: the knee is swollen after a fall, seen {i % 97}." for i in range(rows)]
        lines = [f'"{t}",{clinora.PUBLISHED_CLASSES[i % 5]}' for i, t in enumerate(texts)]
        path = tmp_path / f"{rows}.csv"
        path.write_text("\n".join(["transcription,medical_specialty", *lines]) + "\n")
        paths.append(path)
        sizes.append(sum(map(sys.getsizeof, texts)))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, small_run, *paths],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peaks = np.array([line.split() for line in done.stdout.splitlines()], dtype=int)
    few, many = peaks - np.array(sizes)[:, None]  # each: after assess and after write_report
    assert ((many - few) / 9_000 < 2_000).all(), peaks
