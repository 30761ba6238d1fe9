"""The page's words about a run: the published ones, or those of a run with other classes."""

import json

import pytest
from fastapi.testclient import TestClient

import clinora
from clinora.run import DataRecord
from clinora.serving.api import MOST_CHARACTERS
from clinora.serving.app import create_app
from clinora.serving.words import (
    DESCRIPTION,
    EXAMPLES,
    PRIVACY,
    TITLE,
    read_examples,
    words_about,
)
from tests.served import call, join


@pytest.fixture(scope="module")
def other_run(classifier):
    """The same model with other names of its classes, trained on a file of notes."""
    labels = ["Billing & <b>", "Delivery", "Other", "Returns", "Repair"]
    other = clinora.Classifier(classifier.model, classifier.tokenizer, labels, token_limit=128)
    source = "/home/someone/letters.csv"
    other.data = DataRecord(source=source, split="texts", seen=frozenset())
    return other


def page_of(run, folder, **options):
    """Give the page's whole content as text."""
    with TestClient(create_app(run, folder, **options), "http://127.0.0.1") as client:
        return json.dumps(client.get("/config").json(), ensure_ascii=False)


def test_a_run_with_the_published_classes_has_the_published_words(classifier, tmp_path):
    page = page_of(classifier, tmp_path)
    purpose = (
        "It files an English note under one of five headings: <b>Cardiovascular / Pulmonary</b>, "
        "<b>Consult - History and Phy.</b>, <b>Orthopedic</b>, <b>Radiology</b> and "
        "<b>Surgery</b>. It makes no diagnosis."
    )
    for text in (TITLE, DESCRIPTION, purpose, PRIVACY, *EXAMPLES):
        assert text in page


def test_a_run_with_other_classes_shows_its_own_and_no_published_words(other_run, tmp_path):
    page = page_of(other_run, tmp_path)
    for text in (TITLE, DESCRIPTION, *EXAMPLES, "diagnosis", "linical", "/home/someone"):
        assert text not in page
    assert PRIVACY in page
    purpose = words_about(other_run).purpose
    assert purpose == (
        "It files a note under one of five headings: <b>Billing &amp; &lt;b&gt;</b>, "
        "<b>Delivery</b>, <b>Other</b>, <b>Returns</b> and <b>Repair</b>. It was trained on "
        "letters.csv."
    )
    assert purpose in page


def test_a_runs_own_examples_can_be_chosen(other_run, tmp_path):
    examples = ["The parcel is late.", "The lid is broken."]
    app = create_app(other_run, tmp_path, examples=examples)
    with TestClient(app, "http://127.0.0.1") as client:
        for number, example in enumerate(examples):
            assert call(client, "choose_example", number) == ("complete", [example])
        assert join(client, "choose_example", 2, session="one").status_code == 422


def test_a_runs_own_examples_take_the_place_of_the_published_ones(classifier):
    assert words_about(classifier, ["Mine."]).examples == ("Mine.",)
    assert words_about(classifier).examples == EXAMPLES


def test_a_run_has_examples_only_if_its_folder_has_their_file(tmp_path):
    assert read_examples(tmp_path) == []
    text = "\ufeffFirst line.\r\n\r\nSecond -- line.\r\n---\r\n -1 degree.\r\n-----  \r\nThird."
    (tmp_path / "examples.txt").write_text(text, newline="")
    expected = ["First line.\n\nSecond -- line.", "-1 degree.", "Third."]
    assert read_examples(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"One.\n---\n \n---\nThree.", "example 2 is empty"),
        (b"", "example 1 is empty"),
        (b"x" * (MOST_CHARACTERS + 1), "100,001 characters"),
        (b"x\n---\n" * 10 + b"x", "11 examples"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_of_examples_that_cannot_be_used_is_refused(tmp_path, content, message):
    (tmp_path / "examples.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path)


@pytest.mark.parametrize(("classes", "number"), [(2, "two"), (10, "ten"), (11, "11")])
def test_the_number_of_classes_is_a_word_up_to_ten(classifier, classes, number):
    labels = [f"C{i}" for i in range(classes)]
    run = type("Run", (), {"labels": tuple(labels), "data": None})
    purpose = words_about(run).purpose
    assert f"one of {number} headings: <b>C0</b>" in purpose
    assert purpose.endswith(f" and <b>{labels[-1]}</b>.")
