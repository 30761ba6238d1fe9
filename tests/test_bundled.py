"""What comes along: fictional notes as unlike each other as real ones, and none of them copied."""

import csv
import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest
from conftest import lacking

import clinora


def words(text):
    return re.findall(r"\w+", text.lower())


def runs(text, n):
    """The runs of n words of a text."""
    sequence = words(text)
    return {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}


def similarities(texts):
    """Jaccard similarity of the sets of 5-word runs of every two texts."""
    sets = [runs(text, 5) for text in texts]
    holders = {}
    for i, one in enumerate(sets):
        for run in one:
            holders.setdefault(run, []).append(i)
    shared = Counter(
        (a, b) for held in holders.values() for k, a in enumerate(held) for b in held[k + 1 :]
    )
    found = np.zeros(len(sets) * (len(sets) - 1) // 2)  # most pairs share none
    for i, ((a, b), both) in enumerate(shared.items()):
        found[i] = both / (len(sets[a]) + len(sets[b]) - both)
    return found


@pytest.fixture(scope="module")
def notes():
    return clinora.read_notes("bundled")


@pytest.fixture(scope="module")
def texts(notes):
    return [note.text for note in notes.notes]


def test_there_are_150_notes_at_least_30_of_each_class(notes):
    assert notes.classes == clinora.PUBLISHED_CLASSES
    assert len(notes.notes) >= 150
    assert min(Counter(label for note in notes.notes for label in note.labels).values()) >= 30


def test_notes_have_80_to_250_words(texts):
    assert {len(text.split()) for text in texts} <= set(range(80, 251))


@pytest.mark.slow
def test_notes_are_as_unlike_each_other_as_real_ones(texts, data):
    real = [note.text for note in clinora.read_notes(data / "mtsamples.csv").notes]
    assert similarities(texts).max() <= np.quantile(similarities(real), 0.95)


def test_no_eight_words_in_a_row_are_mtsamples(texts, data):
    mine = set.union(*(runs(text, 8) for text in texts))
    with open(data / "mtsamples.csv", encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            assert not any(mine & runs(cell, 8) for cell in row)


@pytest.mark.slow
def test_no_eight_words_in_a_row_are_the_corpus(texts, data):
    files = sorted((data.parent / "corpus").glob("*.jsonl.gz"))
    if not files:
        lacking("corpus", f"there is no corpus beside {data}")
    mine = set.union(*(runs(text, 8) for text in texts))
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                assert not mine & runs(json.loads(line)["text"], 8), path.name
