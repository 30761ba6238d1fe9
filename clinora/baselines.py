"""Simpler classifiers to compare a run with: the majority class, and a linear model on TF-IDF.

The linear model is tuned as a run is: its settings are chosen on the validation notes.

Shapes: N notes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from clinora.notes import Note, are_correct

MAJORITY = "majority class"
TF_IDF = "TF-IDF + linear model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the linear model on TF-IDF.

    Attributes:
        C: Inverse strength of the L2 penalty.
        balanced: Whether classes count the same, whatever their number of rows.
        pairs: Whether pairs of words are features, too.
        svm: Whether the model is a linear SVM instead of logistic regression.
    """

    C: float = 100.0
    balanced: bool = False
    pairs: bool = False
    svm: bool = False

    def __str__(self) -> str:
        model = "linear SVM" if self.svm else "logistic regression"
        features = "words and pairs of words" if self.pairs else "words"
        weights = ", balanced classes" if self.balanced else ""
        return f"{model} on {features}, C = {self.C:g}{weights}"


# What to try for each setting, one setting after the other. All combinations would take minutes.
ALTERNATIVES = (
    ("C", (1.0, 10.0, 1000.0)),
    ("balanced", (True,)),
    ("pairs", (True,)),
    ("svm", (True,)),
)


class NothingToLearnError(ValueError):
    """No two training notes share a word, or they have only one class."""


class LinearModel:
    """A linear model on TF-IDF, trained on the rows of some notes.

    Raises:
        NothingToLearnError: No two notes share a word, or the notes have only one class.
    """

    def __init__(self, training: Sequence[Note], settings: Settings) -> None:
        # Importing scikit-learn takes a second or two, and only this class uses it.
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC

        rows = []  # for each row, the position of its note
        labels = []
        for i, note in enumerate(training):
            for label in note.filed:
                rows.append(i)
                labels.append(label)
        if len(set(labels)) < 2:
            raise NothingToLearnError("the training notes have only one class")
        longest = 2 if settings.pairs else 1  # words of a feature
        self.words = TfidfVectorizer(ngram_range=(1, longest), sublinear_tf=True, min_df=2)
        try:
            features = self.words.fit_transform(note.text for note in training)
        except ValueError:
            raise NothingToLearnError("no two training notes share a word") from None
        weights = "balanced" if settings.balanced else None
        if settings.svm:
            # The primal problem: with a large C, the dual one does not converge.
            self.model = LinearSVC(C=settings.C, class_weight=weights, dual=False)
        else:
            self.model = LogisticRegression(C=settings.C, class_weight=weights, max_iter=1000)
        self.model.fit(features[rows], labels)

    def predict(self, notes: Sequence[Note]) -> np.ndarray:
        """Give the predicted class of each note: (N,)."""
        return self.model.predict(self.words.transform(note.text for note in notes))


def choose_settings(training: Sequence[Note], validation: Sequence[Note]) -> Settings:
    """Choose the settings with the highest any-label accuracy on the validation notes.

    One setting is changed after the other, and a change is kept if it is strictly better. Without
    validation notes, the settings are the defaults.
    """
    best = Settings()
    if not validation:
        return best

    def accuracy(settings: Settings) -> float:
        predicted = LinearModel(training, settings).predict(validation)
        return are_correct(validation, predicted).mean()

    highest = accuracy(best)
    for name, values in ALTERNATIVES:
        for value in values:
            candidate = replace(best, **{name: value})
            its_accuracy = accuracy(candidate)
            if its_accuracy > highest:
                highest = its_accuracy
                best = candidate
    return best


class Predictions(NamedTuple):
    """What a simpler classifier predicts.

    Attributes:
        name: The classifier.
        settings: Its settings and how they were chosen, in words; empty if it has none.
        predicted: (N,) the predicted class of each note.
    """

    name: str
    settings: str
    predicted: np.ndarray


def train_baselines(
    training: Sequence[Note], validation: Sequence[Note], test: Sequence[Note]
) -> list[Predictions]:
    """Train the simpler classifiers on the rows of the training notes and classify the test notes.

    If the notes have only one class, or no two notes share a word, there is only the majority
    class.
    """
    labels = Counter(label for note in training for label in note.filed)
    majority, _ = labels.most_common(1)[0]
    baselines = [Predictions(MAJORITY, "", np.full(len(test), majority))]
    try:
        settings = choose_settings(training, validation)
        model = LinearModel(training, settings)
    except NothingToLearnError:
        return baselines
    origin = "chosen on the validation notes"
    if not validation:
        origin = "the default, as there are no validation notes"
    return [*baselines, Predictions(TF_IDF, f"{settings} ({origin})", model.predict(test))]
