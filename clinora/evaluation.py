"""How right a classifier is, and how sure it may be, on notes filed under several classes.

Two questions are kept apart. Over the file's *rows*, each with its own label: a text filed under
two classes is wrong in one of its rows whatever is answered, so no classifier passes a ceiling.
Over the *notes*, the different texts: an answer is right if the note is filed under it.

Intervals are 95% percentile bootstrap intervals over notes (Efron & Tibshirani 1993, section 13.3):
how far a figure would move had other texts been drawn, not had training been repeated. Equal texts
are drawn together. Where a share is 0 or 1 every draw agrees, and its interval is Wilson's (1927).

Shapes: N notes, C classes, M measures.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from clinora.calibration import (
    FEWEST_VALIDATION,
    PROMISE,
    Calibration,
    check_promise,
    fit_calibration,
)
from clinora.classifier import Classifier
from clinora.lora import lora_disabled
from clinora.notes import Note, Notes, soft_targets

REPLICATES = 1000  # of the bootstrap
BINS = 10  # of the calibration error


class Estimate(NamedTuple):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMeasures:
    """How right a classifier is about one class.

    Attributes:
        label: The class.
        precision: Of what was named so, the share filed so.
        recall: Of what is filed so, the share named so.
        f1: Harmonic mean of the two.
        support: How much is filed so.
    """

    label: str
    precision: Estimate
    recall: Estimate
    f1: Estimate
    support: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Figures from a confusion matrix.

    Attributes:
        accuracy: The share on the diagonal.
        macro_f1: Mean F1 of the classes that occur.
        classes: Figures of each class.
        confusion: (C, C) filed under the one class, named the other.
    """

    accuracy: Estimate
    macro_f1: Estimate
    classes: tuple[ClassMeasures, ...]
    confusion: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a classifier said of each note, and what it was worth; arrays of N.

    Attributes:
        named: Index of the class named.
        right: Whether the note is filed under it.
        top: The largest probability.
        loss: Cross-entropy with the target 1/k for each of the note's k labels, nats.
        confidence: Calibrated; None if the classifier is not.
        tokens: Tokens of the whole note.
    """

    named: np.ndarray
    right: np.ndarray
    top: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray | None
    tokens: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What a run's threshold does to notes that it was not set on.

    Attributes:
        promise: The share of the answered notes that should be right.
        threshold: The confidence under which a note is referred to a person.
        coverage: The share answered.
        accuracy: The share of those answered that is right; None if none was.
    """

    promise: float
    threshold: float
    coverage: Estimate
    accuracy: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How right a classifier is.

    Attributes:
        by_note: Each note counts once. Right, it is filed under the class named; wrong, 1/k of it
            is filed under each of its k labels. Its accuracy is the any-label accuracy.
        by_row: Each row of the file counts once, with its own label.
        log_loss: Mean cross-entropy, nats.
        overconfidence: Mean confidence minus the share right; None without calibration.
        calibration_error: Expected calibration error of the confidence; None if there is none.
        top_calibration_error: The same had the largest probability been taken for confidence.
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
    """How right the base is before training, its states under several random heads.

    Attributes:
        heads: How many were drawn.
        any_label_accuracy: Mean and standard deviation between heads, as all that follow.
        accuracy: Over rows.
        macro_f1: By note.
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
        name: What it is.
        any_label_accuracy: By note.
        accuracy: Over rows.
    """

    name: str
    any_label_accuracy: Estimate
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All that is measured of a run on some notes.

    Attributes:
        labels: Names of the classes.
        split: "texts"; or "rows", where each row is a note of its own.
        notes: How many notes were classified.
        rows: How many rows of the file hold them.
        trained_on: How many of them the run was trained or calibrated on.
        in_training: How many of their texts also stand on the training side.
        ceiling: The largest accuracy over rows that any function of the text can have on all
            notes of these classes in the file.
        test_ceiling: The same on the rows measured alone; higher where their twins are elsewhere.
        before: The base under random heads.
        after: The trained run.
        baselines: Simpler classifiers; empty if the training side is not at hand.
        against: Any-label accuracy of the run minus that of the better TF-IDF baseline, paired.
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


# --- measures -----------------------------------------------------------------------------------


class _Cells:
    """Where notes fall in a confusion matrix, so that reweighted notes are counted again fast."""

    def __init__(
        self,
        note: np.ndarray,
        filed: np.ndarray,
        share: np.ndarray | float,
        named: np.ndarray,
        classes: int,
    ) -> None:
        self.note, self.cell = note, filed * classes + named[note]
        self.share, self.classes = share, classes

    def confusion(self, weights: np.ndarray) -> np.ndarray:
        """Count, with a weight for each note: (N,) → (C, C)."""
        counts = np.bincount(self.cell, self.share * weights[self.note], self.classes**2)
        return counts.reshape(self.classes, self.classes)

    def behind(self) -> list[np.ndarray]:
        """Count the notes behind precision, recall and F1 of each class: (C,) each.

        A note counts once, however many of its rows there are: they are right or wrong together.
        """
        filed, named = self.note * self.classes + np.stack(np.divmod(self.cell, self.classes))
        sides = named, filed, np.concatenate((named, filed))
        return [np.bincount(np.unique(s) % self.classes, minlength=self.classes) for s in sides]


def _by_row(named: np.ndarray, notes: Sequence[Note], classes: int) -> _Cells:
    note = np.repeat(np.arange(len(notes)), [len(n.filed) for n in notes])
    filed = np.array([label for n in notes for label in n.filed])
    return _Cells(note, filed, 1.0, named, classes)


def _by_note(named: np.ndarray, notes: Sequence[Note], classes: int) -> _Cells:
    places = []
    for i, (note, name) in enumerate(zip(notes, named, strict=True)):
        filed = [name] if name in note.labels else note.labels
        places += [(i, label, 1 / len(filed)) for label in filed]
    note, filed, share = (np.array(column) for column in zip(*places, strict=True))
    return _Cells(note, filed, share, named, classes)


def _figures(confusion: np.ndarray) -> np.ndarray:
    """Give accuracy, macro-F1, then precision, recall and F1 of each class: (C, C) → (2 + 3·C,)."""
    hit, filed, named = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision = np.divide(hit, named, out=np.zeros_like(hit), where=named > 0)
    recall = np.divide(hit, filed, out=np.zeros_like(hit), where=filed > 0)
    f1 = np.divide(2 * hit, filed + named, out=np.zeros_like(hit), where=filed + named > 0)
    overall = hit.sum() / confusion.sum(), f1[filed > 0].mean()
    return np.concatenate((overall, precision, recall, f1))


def bootstrap(
    measure: Callable[[np.ndarray], np.ndarray],
    notes: Sequence[Note],
    replicates: int = REPLICATES,
) -> list[Estimate]:
    """Give each of M figures its 95% interval: drawing the texts again, with replacement.

    Args:
        measure: From how often each note counts, (N,) floats, to M figures.
        notes: N notes; split by rows, some have equal texts.
        replicates: How often to draw.
    """
    draw = np.random.default_rng(0)
    texts, text = np.unique([note.sha256 for note in notes], return_inverse=True)
    n = len(texts)
    drawn = np.stack(
        [
            measure(np.bincount(draw.integers(n, size=n), minlength=n)[text].astype(float))
            for _ in range(replicates)
        ]
    )  # (replicates, M)
    low, high = np.nanquantile(drawn, (0.025, 0.975), axis=0)
    values = measure(np.ones(len(notes)))
    return [Estimate(*map(float, e)) for e in zip(values, low, high, strict=True)]


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Give the 95% interval of a share (Wilson 1927), which also holds near 0 and 1."""
    z = 1.96
    middle = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(hits * (n - hits) / n + z * z / 4)
    share = hits / n  # rounding may put it a hair outside
    return float(max(0, min(middle - half, share))), float(min(1, max(middle + half, share)))


def share_of(share: Estimate, n: float) -> Estimate:
    """Give a share of n its interval: Wilson's at 0 and 1, where every draw of the n agrees."""
    bounds = wilson(share.value * n, n) if n else (0.0, 1.0)
    return Estimate(share.value, *bounds) if share.value in (0, 1) else share


def _f1_of(f1: Estimate, n: float) -> Estimate:
    """The same for F1, which is 2·j / (1 + j) of a share j: of those filed or named so, both."""
    return Estimate(*(2 * j / (1 + j) for j in share_of(f1, n))) if f1.value in (0, 1) else f1


def expected_calibration_error(
    claimed: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Σ over bins of (share of notes in it) · |mean claim − share right|.

    Ten bins of equally many notes (Naeini et al. 2015, with the adaptive bins of Nixon et al.
    2019, section 3.3).

    Args:
        claimed: (N,) probability that the note is right.
        right: (N,) whether it is.
        weights: (N,) how often each note counts; None: once.
    """
    weights = np.ones(len(claimed)) if weights is None else weights
    bins = np.empty(len(claimed), int)
    bins[np.argsort(claimed, kind="stable")] = np.arange(len(claimed)) * BINS // len(claimed)
    gaps = np.bincount(bins, weights * (claimed - right), BINS)
    return float(np.abs(gaps).sum() / weights.sum())


def measure(
    answers: Answers, notes: Sequence[Note], labels: Sequence[str], calibration: Calibration | None
) -> Evaluation:
    """Compare answers with the labels under which the notes are filed."""
    classes = len(labels)
    cells = [by(answers.named, notes, classes) for by in (_by_note, _by_row)]
    claims, kept = [answers.top], np.ones(len(notes), bool)
    if calibration is not None:
        claims, kept = [*claims, answers.confidence], answers.confidence >= calibration.threshold
    errors = [partial(expected_calibration_error, claim, answers.right) for claim in claims]
    over = claims[-1] - answers.right
    none = np.nan if kept.any() else 0.0  # a draw in which no note is answered tells nothing

    def all_figures(weights: np.ndarray) -> np.ndarray:
        total, answered = weights.sum(), weights @ kept
        right = weights @ (kept & answers.right)
        return np.concatenate(
            (
                [weights @ answers.loss / total, weights @ over / total],
                [answered / total, right / answered if answered else none],
                [error(weights) for error in errors],
                *(_figures(c.confusion(weights)) for c in cells),
            )
        )

    log_loss, over_mean, coverage, accuracy, top, *rest = bootstrap(all_figures, notes)
    error = None if calibration is None else rest.pop(0)
    tables = []
    for c, part in zip(cells, (rest[: 2 + 3 * classes], rest[2 + 3 * classes :]), strict=True):
        confusion = c.confusion(np.ones(len(notes)))
        shares = [part[i : i + classes] for i in range(2, len(part), classes)]
        kinds = zip((share_of, share_of, _f1_of), shares, c.behind(), strict=True)
        columns = (map(of, share, n) for of, share, n in kinds)
        each = tuple(
            ClassMeasures(label=label, precision=p, recall=r, f1=f, support=float(support))
            for label, p, r, f, support in zip(labels, *columns, confusion.sum(1), strict=True)
        )
        macro = part[1]
        if macro.value in (0, 1):  # no surer than the classes are
            macro = Estimate(*np.mean([m.f1 for m in each if m.support], axis=0).tolist())
        right = share_of(part[0], len(notes))
        tables.append(Measures(accuracy=right, macro_f1=macro, classes=each, confusion=confusion))
    answered = calibration and Answered(
        promise=calibration.promise,
        threshold=calibration.threshold,
        coverage=share_of(coverage, len(notes)),
        accuracy=share_of(accuracy, int(kept.sum())) if kept.any() else None,
    )
    return Evaluation(
        by_note=tables[0],
        by_row=tables[1],
        log_loss=log_loss,
        overconfidence=None if calibration is None else over_mean,
        calibration_error=error,
        top_calibration_error=top,
        answered=answered,
    )


# --- the run, before and after --------------------------------------------------------------------


def classify(classifier: Classifier, notes: Sequence[Note]) -> Answers:
    """Classify notes whose labels are known.

    Raises:
        ValueError: There are no notes, or the head was never trained.
    """
    _require_notes(notes)
    probabilities, tokens = classifier.probabilities([note.text for note in notes])
    named = probabilities.argmax(-1)
    calibration = classifier.calibration
    log_p = np.log(probabilities.clip(np.finfo(np.float32).tiny))
    return Answers(
        named=named,
        right=np.array([n in note.labels for n, note in zip(named, notes, strict=True)]),
        top=probabilities.max(-1).astype(float),
        loss=-(soft_targets(notes, probabilities.shape[1]) * log_p).sum(-1).astype(float),
        confidence=calibration and calibration.confidence(probabilities),
        tokens=np.array(tokens),
    )


def evaluate_random_heads(
    classifier: Classifier, notes: Sequence[Note], heads: int = 20, seed: int = 0
) -> RandomHeads:
    """Measure the base before training: its states under random heads, the adapter off.

    One random head says little: on few classes its accuracy is a matter of luck.

    Raises:
        ValueError: There are no notes, or the model has no LoRA layer.
    """
    _require_notes(notes)
    model, classes = classifier.model, len(classifier.labels)
    width, std = model.model.config.hidden_size, model.model.config.initializer_range
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(heads, classes, width, generator=draw) * std
    named, losses, start = [], [], 0
    with lora_disabled(model):
        for states in classifier.states([note.text for note in notes]):  # (n, D)
            logits = torch.einsum("hcd,nd->hnc", weights, states)
            wanted = torch.from_numpy(soft_targets(notes[start : start + len(states)], classes))
            losses.append(-(logits.log_softmax(-1) * wanted).sum(-1))  # (heads, n)
            named.append(logits.argmax(-1))
            start += len(states)
    named, losses = torch.cat(named, 1).numpy(), torch.cat(losses, 1)  # (heads, N) each
    once = np.ones(len(notes))
    results = []
    for head in range(heads):
        by_note = _figures(_by_note(named[head], notes, classes).confusion(once))
        by_row = _figures(_by_row(named[head], notes, classes).confusion(once))
        results.append((by_note[0], by_row[0], by_note[1], float(losses[head].mean())))
    means, spreads = np.mean(results, axis=0).tolist(), np.std(results, axis=0, ddof=1).tolist()
    return RandomHeads(heads, *zip(means, spreads, strict=True))


def calibrate(
    classifier: Classifier, notes: Sequence[Note], promise: float = PROMISE
) -> Calibration | None:
    """Fit the confidence and its threshold on notes that the classifier was not trained on.

    A logistic regression with smoothed targets (Platt 1999, section 2.2), which also holds where
    every answer was right. The threshold is the lowest confidence above which the promise held.

    Args:
        classifier: A trained classifier.
        notes: Validation notes.
        promise: The share of the answered notes that should be right.

    Returns:
        The calibration; None if there are fewer than 50 notes.

    Raises:
        ValueError: ``promise`` is no share.
    """
    check_promise(promise)
    if len(notes) < FEWEST_VALIDATION:
        return None
    probabilities, _ = classifier.probabilities([note.text for note in notes])
    named = probabilities.argmax(-1)
    right = np.array([n in note.labels for n, note in zip(named, notes, strict=True)])
    return fit_calibration(probabilities, right, promise)


def ceiling(notes: Sequence[Note]) -> float:
    """Give the largest accuracy over rows that a function of the text can have on these notes.

    A text can be given one label alone: the best is the one under which most of its rows are.
    """
    filed = {}  # split by rows, a text stands in several notes
    for note in notes:
        filed.setdefault(note.text, Counter()).update(note.filed)
    best = sum(max(counts.values()) for counts in filed.values())
    return best / sum(counts.total() for counts in filed.values())


def baselines(training: Sequence[Note], test: Sequence[Note]) -> dict[str, np.ndarray]:
    """Train simpler classifiers on the rows of one side; give what they name on another: (N,) each.

    The majority class, and two linear models on TF-IDF of words and pairs of words; the majority
    class alone where there is one class, or no word that stands in two notes.
    """
    row = [i for i, note in enumerate(training) for _ in note.filed]
    labels = [label for note in training for label in note.filed]
    majority, _ = Counter(labels).most_common(1)[0]
    named = {"majority class": np.full(len(test), majority)}
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    try:
        features = words.fit_transform(note.text for note in training)
    except ValueError:  # no such word
        return named
    if len(set(labels)) < 2:
        return named
    linear = {
        "TF-IDF + logistic regression": LogisticRegression(class_weight="balanced", max_iter=1000),
        "TF-IDF + linear SVM": LinearSVC(random_state=0),
    }
    test_features = words.transform(note.text for note in test)
    for name, model in linear.items():
        named[name] = model.fit(features[row], labels).predict(test_features)
    return named


def assess(
    classifier: Classifier,
    notes: Notes,
    measured: Sequence[Note],
    *,
    trained_on: int = 0,
    own_split: bool = True,
    seed: int = 0,
) -> tuple[Results, Answers]:
    """Measure a run, its base and simpler classifiers on some notes of a file.

    Args:
        classifier: A trained run.
        notes: The file.
        measured: The notes to measure on.
        trained_on: How many of these the run was trained or calibrated on.
        own_split: Whether the run was trained on this file's training side.
        seed: Of the random heads.

    Raises:
        ValueError: There are no notes to measure on.
    """
    answers = classify(classifier, measured)
    training = notes.on("training") if own_split else []
    texts = {note.text for note in training}
    simpler, against = [], None
    if training:
        better = -1.0
        for name, named in baselines(training, measured).items():
            cells = [by(named, measured, len(notes.classes)) for by in (_by_note, _by_row)]
            any_label, accuracy = bootstrap(partial(_accuracies, cells), measured)
            any_label, accuracy = (share_of(e, len(measured)) for e in (any_label, accuracy))
            simpler.append(Baseline(name=name, any_label_accuracy=any_label, accuracy=accuracy))
            if "TF-IDF" in name and any_label.value > better:
                better = any_label.value
                right = [n in note.labels for n, note in zip(named, measured, strict=True)]
                gain = answers.right.astype(float) - right
                (against,) = bootstrap(lambda w, g=gain: np.array([w @ g / w.sum()]), measured)
                if not gain.any():  # every draw agrees: as often as they may yet differ
                    differ = wilson(0, len(measured))[1]
                    against = Estimate(0.0, -differ, differ)
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


def _accuracies(cells: Sequence[_Cells], weights: np.ndarray) -> np.ndarray:
    return np.array([_figures(c.confusion(weights))[0] for c in cells])


def _require_notes(notes: Sequence[Note]) -> None:
    if not notes:
        raise ValueError("there are no notes to evaluate on")
