"""Simpler classifiers, against scikit-learn's pipelines on the rows."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from clinora.baselines import (
    MAJORITY,
    TF_IDF,
    LinearModel,
    Settings,
    choose_settings,
    train_baselines,
)
from clinora.notes import Note, are_correct


def random_words(draw, label):
    """Thirty words, of which a class prefers some a little."""
    weights = np.ones(40)
    weights[label * 5 : label * 5 + 5] = 2.5
    return " ".join(f"w{w}" for w in draw.choice(40, 30, p=weights / weights.sum()))


@pytest.fixture(scope="module")
def notes():
    """Classes of unequal size that are hard to tell apart: every setting changes an answer."""
    draw = np.random.default_rng(0)
    training = []
    for label in [0] * 90 + [1] * 30 + [2] * 15:
        filed = (label, *((label + 1) % 3,) * int(draw.integers(0, 2)))
        training.append(Note(random_words(draw, label), filed))
    others = [Note(random_words(draw, i % 3), (i % 3,)) for i in range(300)]
    return training, others[:150], others[150:]


def pipeline(training, test, settings):
    """Predict with scikit-learn alone."""
    rows = [(note.text, label) for note in training for label in note.filed]
    x, y = zip(*rows, strict=True)
    # The vocabulary counts each text once, so it is fitted on the texts.
    ngrams = (1, 2) if settings.pairs else (1, 1)
    words = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True, min_df=2)
    words.fit([note.text for note in training])
    options = {"C": settings.C, "class_weight": "balanced" if settings.balanced else None}
    model = LogisticRegression(max_iter=1000, **options)
    if settings.svm:
        model = LinearSVC(dual=False, **options)
    model.fit(words.transform(x), y)
    return model.predict(words.transform([note.text for note in test])).tolist()


@pytest.mark.parametrize("pairs, balanced, svm", list(product([False, True], repeat=3)))
def test_the_linear_model_is_a_scikit_learn_pipeline_on_the_rows(notes, pairs, balanced, svm):
    training, _, test = notes
    settings = Settings(C=2.0, pairs=pairs, balanced=balanced, svm=svm)
    predicted = LinearModel(training, settings).predict(test).tolist()
    assert predicted == pipeline(training, test, settings)
    assert len(set(predicted)) > 1


def test_settings_are_chosen_one_after_the_other_on_the_validation_notes(notes):
    training, validation, test = notes

    def accuracy(C, balanced=False, pairs=False, svm=False):
        settings = Settings(C=C, balanced=balanced, pairs=pairs, svm=svm)
        return are_correct(validation, pipeline(training, validation, settings)).mean()

    C = max((100.0, 1.0, 10.0, 1000.0), key=accuracy)  # the first of several equal ones
    balanced = accuracy(C, True) > accuracy(C)
    pairs = accuracy(C, balanced, True) > accuracy(C, balanced)
    svm = accuracy(C, balanced, pairs, True) > accuracy(C, balanced, pairs)
    expected = Settings(C=C, balanced=balanced, pairs=pairs, svm=svm)
    assert expected != Settings()
    assert choose_settings(training, validation) == expected
    _, tf_idf = train_baselines(training, validation, test)
    assert tf_idf.name == TF_IDF
    assert str(expected) in tf_idf.settings
    assert tf_idf.predicted.tolist() == pipeline(training, test, expected)


def test_without_validation_notes_the_settings_are_the_defaults(notes):
    training, _, test = notes
    _, tf_idf = train_baselines(training, [], test)
    assert tf_idf.predicted.tolist() == pipeline(training, test, Settings())


def test_the_majority_class_has_the_most_rows(notes):
    training, validation, test = notes
    majority, _ = train_baselines(training, validation, test)
    labels = Counter(label for note in training for label in note.filed)
    assert majority.name == MAJORITY
    assert majority.predicted.tolist() == [labels.most_common(1)[0][0]] * len(test)


@pytest.mark.parametrize(
    "training",
    [[Note("one", (0,)), Note("two", (1,))], [Note("same words", (1,)), Note("same words", (1,))]],
    ids=["no word twice", "one class"],
)
def test_a_linear_model_that_cannot_be_trained_is_left_out(training):
    (only,) = train_baselines(training, [], [Note("one", (0,))])
    assert only.name == MAJORITY
