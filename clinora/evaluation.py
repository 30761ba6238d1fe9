"""Measures of a classifier on notes that may have several labels, with their uncertainty.

Accuracy is measured in two ways. Over the *rows* of the file, each with one label: any prediction
for a text with two labels is incorrect in one of its rows, so there is a ceiling that no classifier
exceeds. Over the *notes*, the different texts: a prediction is correct if it is one of the labels.

Intervals are 95% percentile bootstrap intervals over notes (Efron & Tibshirani 1993, section 13.3).
They say how far a measure would vary with other texts, not with another training. Equal texts are
drawn together. If a share is 0 or 1, all draws agree, and the interval is Wilson's (1927).

Shapes: N notes, C classes, M measures, K entries of a confusion matrix.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from clinora.baselines import TF_IDF, Predictions, train_baselines
from clinora.calibration import (
    FEWEST_VALIDATION,
    PROMISE,
    Calibration,
    check_promise,
    fit_calibration,
)
from clinora.classifier import Classifier
from clinora.lora import lora_disabled
from clinora.notes import Note, Notes, are_correct, soft_targets
from clinora.outliers import OutlierLimit, choose_limit

REPLICATES = 1000  # draws of the bootstrap
BINS = 10  # bins of the calibration error
Z = 1.96  # standard errors from the middle of a 95% interval to either end


class Estimate(NamedTuple):
    """A measured value with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMeasures:
    """Measures of one class.

    Attributes:
        label: Name of the class.
        precision: The share of the predictions of this class that are correct.
        recall: The share of the notes or rows of this class that are predicted as it.
        f1: Harmonic mean of precision and recall.
        support: Number of notes (shares of notes add up) or rows of this class.
    """

    label: str
    precision: Estimate
    recall: Estimate
    f1: Estimate
    support: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Measures from a confusion matrix.

    Attributes:
        accuracy: The share on the diagonal.
        macro_f1: Mean F1 of the classes that occur.
        classes: Measures of each class.
        confusion: (C, C) counts, rows: true class, columns: predicted class.
    """

    accuracy: Estimate
    macro_f1: Estimate
    classes: tuple[ClassMeasures, ...]
    confusion: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """A classifier's predictions for notes whose labels are known; arrays of N.

    Attributes:
        predicted: Index of the predicted class.
        correct: Whether the predicted class is one of the note's labels.
        top: The largest probability.
        loss: Cross-entropy with the target 1/k for each of the note's k labels, nats.
        confidence: Calibrated confidence; None if the classifier is not calibrated.
        tokens: Tokens of the whole note.
    """

    predicted: np.ndarray
    correct: np.ndarray
    top: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray | None
    tokens: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What a run's threshold does on notes that were not used to choose it.

    Attributes:
        promise: The share of the answered notes that should be correct.
        threshold: The confidence below which a note is referred to a person.
        coverage: The share of the notes that are answered, not referred.
        accuracy: The share of the answered notes that is correct; None if none is answered.
    """

    promise: float
    threshold: float
    coverage: Estimate
    accuracy: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """All measures of a classifier.

    Attributes:
        by_note: Each note counts once. For a correct note, the true class is the predicted class;
            an incorrect note with k labels counts as 1/k in each of them. The accuracy is the
            any-label accuracy.
        by_row: Each row of the file counts once, with its own label.
        log_loss: Mean cross-entropy, nats.
        overconfidence: Mean confidence minus the share correct; None without calibration.
        calibration_error: Expected calibration error of the confidence; None without calibration.
        top_calibration_error: The same error with the largest probability as the confidence.
        answered: What the threshold does; None without calibration.
    """

    by_note: Measures
    by_row: Measures
    log_loss: Estimate
    overconfidence: Estimate | None
    calibration_error: Estimate | None
    top_calibration_error: Estimate
    answered: Answered | None


@dataclass(frozen=True, slots=True)
class RandomHeads:
    """Measures of the base before training, under several random heads.

    Each measure is the mean over the heads and the standard deviation between them.

    Attributes:
        heads: Number of random heads.
        any_label_accuracy: Accuracy over notes.
        accuracy: Accuracy over rows.
        macro_f1: Over notes.
        log_loss: Nats.
    """

    heads: int
    any_label_accuracy: tuple[float, float]
    accuracy: tuple[float, float]
    macro_f1: tuple[float, float]
    log_loss: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """A simpler classifier on the same split.

    Attributes:
        name: Such as "majority class".
        settings: Its settings and how they were chosen, in words; empty if it has none.
        any_label_accuracy: Accuracy over notes.
        accuracy: Accuracy over rows.
    """

    name: str
    settings: str
    any_label_accuracy: Estimate
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All measures of a run on some notes.

    Attributes:
        labels: Names of the classes.
        split: "texts"; or "rows", if each row is a separate note.
        notes: Number of notes measured.
        rows: Number of rows of the file that hold them.
        trained_on: Number of these notes that the run was trained or calibrated on.
        in_training: Number of these notes whose text is also in the training split.
        ceiling: The largest accuracy over rows that any function of the text can have on all
            notes of these classes in the file; 1 if no text has several labels.
        test_ceiling: The same on the measured rows alone. It is higher if other rows of the same
            texts are not measured.
        before: The base under random heads.
        after: The trained run.
        baselines: Simpler classifiers; empty if the training split is not available.
        against: Any-label accuracy of the run minus that of the TF-IDF baseline, paired.
    """

    labels: tuple[str, ...]
    split: str
    notes: int
    rows: int
    trained_on: int
    in_training: int
    ceiling: float
    test_ceiling: float
    before: RandomHeads
    after: Evaluation
    baselines: tuple[Baseline, ...]
    against: Estimate | None


# --- confusion matrices ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entries:
    """The entries of a confusion matrix, kept so that the bootstrap can count them again.

    Attributes:
        classes: C.
        note: (K,) position of each entry's note.
        true: (K,) true class.
        predicted: (K,) predicted class.
        share: (K,) share of the note that the entry counts for.
    """

    classes: int
    note: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    share: np.ndarray

    def confusion(self, weights: np.ndarray) -> np.ndarray:
        """Count the entries with a weight for each note: (N,) → (C, C), rows: true class."""
        cell = self.true * self.classes + self.predicted
        counts = np.bincount(cell, self.share * weights[self.note], self.classes**2)
        return counts.reshape(self.classes, self.classes)

    def notes_true(self) -> np.ndarray:
        """Count the notes of each true class: (C,)."""
        return self._count_notes(self.note, self.true)

    def notes_predicted(self) -> np.ndarray:
        """Count the notes of each predicted class: (C,)."""
        return self._count_notes(self.note, self.predicted)

    def notes_either(self) -> np.ndarray:
        """Count, for each class, the notes that have it as true or predicted class: (C,)."""
        note = np.concatenate((self.note, self.note))
        label = np.concatenate((self.true, self.predicted))
        return self._count_notes(note, label)

    def _count_notes(self, note: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Count the notes of each class, each once: its rows are correct or incorrect together."""
        # One number for each pair of note and class, so that np.unique finds the distinct pairs.
        pairs = np.unique(note * self.classes + label)
        labels = pairs % self.classes
        return np.bincount(labels, minlength=self.classes)


def _by_row(predicted: np.ndarray, notes: Sequence[Note], classes: int) -> _Entries:
    """Make one entry for each row."""
    place = []
    true = []
    for i, note in enumerate(notes):
        for label in note.filed:
            place.append(i)
            true.append(label)
    positions = np.array(place)
    shares = np.ones(len(place))
    return _Entries(classes, positions, np.array(true), predicted[positions], shares)


def _by_note(predicted: np.ndarray, notes: Sequence[Note], classes: int) -> _Entries:
    """Make one entry for a correct note, and k entries for an incorrect note with k labels."""
    place = []
    true = []
    share = []
    correct = are_correct(notes, predicted)
    for i, note in enumerate(notes):
        labels = [predicted[i]] if correct[i] else note.labels
        for label in labels:
            place.append(i)
            true.append(label)
            share.append(1 / len(labels))
    positions = np.array(place)
    return _Entries(classes, positions, np.array(true), predicted[positions], np.array(share))


def _accuracy(confusion: np.ndarray) -> float:
    return confusion.trace() / confusion.sum()


def _precision(confusion: np.ndarray) -> np.ndarray:
    return _divide(confusion.diagonal(), confusion.sum(0))


def _recall(confusion: np.ndarray) -> np.ndarray:
    return _divide(confusion.diagonal(), confusion.sum(1))


def _f1(confusion: np.ndarray) -> np.ndarray:
    return _divide(2 * confusion.diagonal(), confusion.sum(0) + confusion.sum(1))


def _macro_f1(confusion: np.ndarray) -> float:
    occurs = confusion.sum(1) > 0
    return _f1(confusion)[occurs].mean()


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide elementwise; the result is 0 where the denominator is 0."""
    zeros = np.zeros(len(denominator))
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


# --- uncertainty ----------------------------------------------------------------------------------


def bootstrap(
    measure: Callable[[np.ndarray], np.ndarray],
    notes: Sequence[Note],
    replicates: int = REPLICATES,
) -> list[Estimate]:
    """Estimate M measures and their 95% intervals by drawing the texts with replacement.

    Every call draws the same texts.

    Args:
        measure: Maps how often each note counts, (N,) floats, to M measures; nan if a draw does
            not define a measure.
        notes: N notes; in a split by rows, some have equal texts.
        replicates: Number of draws.
    """
    draw = np.random.default_rng(0)
    # (N,) the number of each note's text; equal texts have the same number.
    texts, text_of_note = np.unique([note.sha256 for note in notes], return_inverse=True)
    n = len(texts)
    drawn = []
    for _ in range(replicates):
        times_drawn = np.bincount(draw.integers(n, size=n), minlength=n)  # (n,)
        drawn.append(measure(times_drawn[text_of_note].astype(float)))
    lows, highs = np.nanquantile(np.stack(drawn), (0.025, 0.975), axis=0)  # (M,) each
    values = measure(np.ones(len(notes)))
    return [
        Estimate(float(value), float(low), float(high))
        for value, low, high in zip(values, lows, highs, strict=True)
    ]


def bootstrap_mean(values: np.ndarray, notes: Sequence[Note]) -> Estimate:
    """Estimate the mean of N values, one for each note, and its 95% interval."""

    def weighted_mean(weights: np.ndarray) -> np.ndarray:
        return np.array([weights @ values / weights.sum()])

    (mean,) = bootstrap(weighted_mean, notes)
    return mean


def paired_gain(gain: np.ndarray, notes: Sequence[Note]) -> Estimate:
    """Estimate the any-label accuracy of one classifier minus that of another, paired by note.

    Args:
        gain: (N,) 1 where only the first is correct, −1 where only the second is, else 0; or means
            of these over several trainings.
        notes: The N notes.
    """
    if gain.any():
        return bootstrap_mean(gain, notes)
    # Both are correct on the same notes, so all draws agree. Wilson's interval of a share of 0
    # bounds the notes on which they may still differ.
    _, differing = wilson(0, len(notes))
    return Estimate(0.0, -differing, differing)


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Give the 95% interval of the share hits / n (Wilson 1927); it is also valid near 0 and 1."""
    middle = (hits + Z * Z / 2) / (n + Z * Z)
    half = Z / (n + Z * Z) * np.sqrt(hits * (n - hits) / n + Z * Z / 4)
    share = hits / n
    low = max(0, min(middle - half, share))  # rounding may put the share just outside
    high = min(1, max(middle + half, share))
    return float(low), float(high)


def share_of(share: Estimate, n: float) -> Estimate:
    """Replace the interval of a share of n that is 0 or 1, where all draws agree, by Wilson's."""
    if share.value not in (0, 1):
        return share
    if n == 0:
        return Estimate(share.value, 0.0, 1.0)
    low, high = wilson(share.value * n, n)
    return Estimate(share.value, low, high)


def _f1_of(f1: Estimate, n: float) -> Estimate:
    """Replace the interval of an F1 that is 0 or 1.

    Let n notes have the class as true or predicted class, and a share j of them as both. Then
    F1 = 2·j / (1 + j), which is 0 if j is 0 and 1 if j is 1.
    """
    if f1.value not in (0, 1):
        return f1
    both = share_of(f1, n)
    return Estimate(f1.value, 2 * both.low / (1 + both.low), 2 * both.high / (1 + both.high))


def expected_calibration_error(
    claimed: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Σ over bins of (share of the notes in the bin) · |mean claim − share correct|.

    There are ten bins of equally many notes (Naeini et al. 2015, with the adaptive bins of Nixon et
    al. 2019, section 3.3).

    Args:
        claimed: (N,) probability that the prediction is correct.
        correct: (N,) whether the prediction is correct.
        weights: (N,) how often each note counts; None: once.
    """
    n = len(claimed)
    if weights is None:
        weights = np.ones(n)
    order = np.argsort(claimed, kind="stable")
    bins = np.empty(n, int)  # of each note, the number of its bin
    bins[order] = np.arange(n) * BINS // n
    gaps = np.bincount(bins, weights * (claimed - correct), BINS)
    return float(np.abs(gaps).sum() / weights.sum())


# --- measures -------------------------------------------------------------------------------------


def measure(
    answers: Answers, notes: Sequence[Note], labels: Sequence[str], calibration: Calibration | None
) -> Evaluation:
    """Compare predictions with the notes' labels."""
    overconfidence = None
    calibration_error = None
    answered = None
    if calibration is not None:
        overconfidence = bootstrap_mean(answers.confidence - answers.correct, notes)
        calibration_error = _calibration_error(answers.confidence, answers.correct, notes)
        answered = _measure_answered(answers, notes, calibration)
    return Evaluation(
        by_note=_measure_classes(_by_note(answers.predicted, notes, len(labels)), notes, labels),
        by_row=_measure_classes(_by_row(answers.predicted, notes, len(labels)), notes, labels),
        log_loss=bootstrap_mean(answers.loss, notes),
        overconfidence=overconfidence,
        calibration_error=calibration_error,
        top_calibration_error=_calibration_error(answers.top, answers.correct, notes),
        answered=answered,
    )


def _measure_classes(entries: _Entries, notes: Sequence[Note], labels: Sequence[str]) -> Measures:
    """Compute the measures of a confusion matrix and their intervals."""

    def estimate(measure: Callable[[np.ndarray], np.ndarray | float]) -> list[Estimate]:
        def of_draw(weights: np.ndarray) -> np.ndarray:
            return np.atleast_1d(measure(entries.confusion(weights)))

        return bootstrap(of_draw, notes)

    confusion = entries.confusion(np.ones(len(notes)))
    precisions = estimate(_precision)
    recalls = estimate(_recall)
    f1s = estimate(_f1)
    predicted = entries.notes_predicted()
    true = entries.notes_true()
    either = entries.notes_either()
    classes = []
    for i, label in enumerate(labels):
        classes.append(
            ClassMeasures(
                label=label,
                precision=share_of(precisions[i], predicted[i]),
                recall=share_of(recalls[i], true[i]),
                f1=_f1_of(f1s[i], either[i]),
                support=float(confusion[i].sum()),
            )
        )
    (macro_f1,) = estimate(_macro_f1)
    if macro_f1.value in (0, 1):  # all draws agree: take the mean of the classes' intervals
        f1_of_classes = [one_class.f1 for one_class in classes if one_class.support > 0]
        value, low, high = np.mean(f1_of_classes, axis=0).tolist()
        macro_f1 = Estimate(value, low, high)
    (accuracy,) = estimate(_accuracy)
    return Measures(
        accuracy=share_of(accuracy, len(notes)),
        macro_f1=macro_f1,
        classes=tuple(classes),
        confusion=confusion,
    )


def _calibration_error(claimed: np.ndarray, correct: np.ndarray, notes: Sequence[Note]) -> Estimate:
    def of_draw(weights: np.ndarray) -> np.ndarray:
        return np.array([expected_calibration_error(claimed, correct, weights)])

    (error,) = bootstrap(of_draw, notes)
    return error


def _measure_answered(
    answers: Answers, notes: Sequence[Note], calibration: Calibration
) -> Answered:
    """Measure coverage, and accuracy over the answered notes."""
    kept = answers.confidence >= calibration.threshold
    accuracy = None
    if kept.any():

        def share_correct(weights: np.ndarray) -> np.ndarray:
            answered = weights @ kept
            if answered == 0:
                return np.array([np.nan])
            return np.array([weights @ (kept & answers.correct) / answered])

        (estimate,) = bootstrap(share_correct, notes)
        accuracy = share_of(estimate, int(kept.sum()))
    return Answered(
        promise=calibration.promise,
        threshold=calibration.threshold,
        coverage=share_of(bootstrap_mean(kept, notes), len(notes)),
        accuracy=accuracy,
    )


# --- the run and what it is compared with ---------------------------------------------------------


def classify(classifier: Classifier, notes: Sequence[Note]) -> Answers:
    """Classify notes whose labels are known.

    Raises:
        ValueError: There are no notes, or the head was never trained.
    """
    _require_notes(notes)
    probabilities, tokens = classifier.probabilities([note.text for note in notes])
    predicted = probabilities.argmax(-1)
    confidence = None
    if classifier.calibration is not None:
        confidence = classifier.calibration.confidence(probabilities)
    log_p = np.log(probabilities.clip(np.finfo(np.float32).tiny))
    targets = soft_targets(notes, len(classifier.labels))
    return Answers(
        predicted=predicted,
        correct=are_correct(notes, predicted),
        top=probabilities.max(-1).astype(float),
        loss=-(targets * log_p).sum(-1).astype(float),
        confidence=confidence,
        tokens=np.array(tokens),
    )


def evaluate_random_heads(
    classifier: Classifier, notes: Sequence[Note], heads: int = 20, seed: int = 0
) -> RandomHeads:
    """Measure the base before training: the adapter is off, and the heads are random.

    With few classes the accuracy of a single random head is largely chance, so this averages many.

    Raises:
        ValueError: There are no notes, or the model has no LoRA layer.
    """
    _require_notes(notes)
    model = classifier.model
    config = model.model.config
    classes = len(classifier.labels)
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(heads, classes, config.hidden_size, generator=draw)
    weights *= config.initializer_range
    predictions = []
    losses = []
    done = 0
    with lora_disabled(model):
        for states in classifier.states([note.text for note in notes]):  # (n, D)
            logits = torch.einsum("hcd,nd->hnc", weights, states)
            part = notes[done : done + len(states)]
            targets = torch.from_numpy(soft_targets(part, classes))
            losses.append(-(logits.log_softmax(-1) * targets).sum(-1))  # (heads, n)
            predictions.append(logits.argmax(-1))
            done += len(states)
    loss_of_head = torch.cat(losses, 1).mean(1).tolist()
    once = np.ones(len(notes))  # each note counts once
    results = []
    for predicted, loss in zip(torch.cat(predictions, 1).numpy(), loss_of_head, strict=True):
        by_note = _by_note(predicted, notes, classes).confusion(once)
        by_row = _by_row(predicted, notes, classes).confusion(once)
        results.append((_accuracy(by_note), _accuracy(by_row), _macro_f1(by_note), loss))
    any_label, accuracy, macro_f1, log_loss = np.transpose(results)  # (heads,) each
    return RandomHeads(
        heads=heads,
        any_label_accuracy=_mean_and_spread(any_label),
        accuracy=_mean_and_spread(accuracy),
        macro_f1=_mean_and_spread(macro_f1),
        log_loss=_mean_and_spread(log_loss),
    )


def _mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1))


def calibrate(
    classifier: Classifier, notes: Sequence[Note], promise: float = PROMISE
) -> Calibration | None:
    """Fit the confidence and its threshold on notes that the classifier was not trained on.

    Args:
        classifier: A trained classifier.
        notes: Validation notes.
        promise: The share of the answered notes that should be correct.

    Returns:
        The calibration; None if there are fewer than 50 notes.

    Raises:
        ValueError: ``promise`` is not a share between 0 and 1.
    """
    check_promise(promise)
    if len(notes) < FEWEST_VALIDATION:
        return None
    probabilities, _ = classifier.probabilities([note.text for note in notes])
    correct = are_correct(notes, probabilities.argmax(-1))
    return fit_calibration(probabilities, correct, promise)


def outlier_limit(classifier: Classifier, notes: Sequence[Note]) -> OutlierLimit | None:
    """Choose the score below which a text is unlike these notes.

    Nothing is fitted to the notes but the limit, so training notes serve as well as others.

    Args:
        classifier: A classifier, trained or not.
        notes: Notes of the run.

    Returns:
        The limit; None if there are fewer than 50 notes.
    """
    ids = [classifier.encode(note.text) for note in notes]
    scores = classifier.outlier_scores(ids) if ids else np.empty(0)
    return choose_limit(scores)


def ceiling(notes: Sequence[Note]) -> float:
    """Give the largest accuracy over rows that a function of the text can have on these notes.

    A function predicts one label for a text; best is the most frequent label of the text's rows.
    """
    label_counts = {}  # by text: in a split by rows, several notes have the same text
    for note in notes:
        label_counts.setdefault(note.text, Counter()).update(note.filed)
    correct = 0
    rows = 0
    for counts in label_counts.values():
        correct += max(counts.values())
        rows += counts.total()
    return correct / rows


def assess(
    classifier: Classifier,
    notes: Notes,
    measured: Sequence[Note],
    *,
    trained_on: int = 0,
    learned_from: Notes | None = None,
    seed: int = 0,
) -> tuple[Results, Answers]:
    """Measure a run, its base and simpler classifiers on some notes of a file.

    Args:
        classifier: A trained run.
        notes: All notes of the file.
        measured: The notes to measure on.
        trained_on: Number of the measured notes that the run was trained or calibrated on.
        learned_from: The notes that the run was trained on; the simpler classifiers learn from
            their training notes. None leaves these classifiers out.
        seed: Seed of the random heads.

    Raises:
        ValueError: There are no notes to measure on, or the file was read with other classes than
            the run's labels, or in another order.
    """
    if notes.classes != classifier.labels:
        raise ValueError(
            f"the notes have the classes {', '.join(notes.classes)}, the run has "
            f"{', '.join(classifier.labels)}: read the notes with classes=classifier.labels"
        )
    answers = classify(classifier, measured)
    training = learned_from.on("training") if learned_from else []
    texts = {note.text for note in training}
    simpler = []
    against = None
    if training:
        for baseline in train_baselines(training, learned_from.on("validation"), measured):
            simpler.append(_measure_baseline(baseline, measured, len(notes.classes)))
            if baseline.name == TF_IDF:
                gain = answers.correct.astype(float) - are_correct(measured, baseline.predicted)
                against = paired_gain(gain, measured)
    results = Results(
        labels=notes.classes,
        split=notes.split,
        notes=len(measured),
        rows=sum(len(note.filed) for note in measured),
        trained_on=trained_on,
        in_training=sum(note.text in texts for note in measured),
        ceiling=ceiling(notes.notes),
        test_ceiling=ceiling(measured),
        before=evaluate_random_heads(classifier, measured, seed=seed),
        after=measure(answers, measured, classifier.labels, classifier.calibration),
        baselines=tuple(simpler),
        against=against,
    )
    return results, answers


def _measure_baseline(baseline: Predictions, notes: Sequence[Note], classes: int) -> Baseline:
    rows = _by_row(baseline.predicted, notes, classes)

    def accuracy_over_rows(weights: np.ndarray) -> np.ndarray:
        return np.array([_accuracy(rows.confusion(weights))])

    (accuracy,) = bootstrap(accuracy_over_rows, notes)
    any_label_accuracy = bootstrap_mean(are_correct(notes, baseline.predicted), notes)
    return Baseline(
        name=baseline.name,
        settings=baseline.settings,
        any_label_accuracy=share_of(any_label_accuracy, len(notes)),
        accuracy=share_of(accuracy, len(notes)),
    )


def _require_notes(notes: Sequence[Note]) -> None:
    if not notes:
        raise ValueError("there are no notes to evaluate on")
