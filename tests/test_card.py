"""The model card: data, figures, calibration and limits of a run."""

import html
import re

import clinora
from clinora.run import DataRecord
from clinora.serving.card import model_card
from tests.served import calibration


def test_the_card_has_data_figures_confidence_and_limits(classifier, small_run, tmp_path):
    card = model_card(classifier, small_run)
    for words in ("not a medical device", "This run has no report", "Not calibrated", "128 tokens"):
        assert words in card
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.md").write_text(
        "# Report\n\nNotes.\n\n```\nthis run 91%\n```\n\n![x](x.png)\n"
    )
    card = model_card(classifier, tmp_path)
    assert "```\nthis run 91%\n```" in card and "x.png" not in card


def test_names_in_the_card_are_escaped_from_markdown_and_html(classifier, small_run, monkeypatch):
    name = "a`b`_c_<form>[x](y)\u202e.csv"
    data = DataRecord(source=f"/data/{name}", split="**texts**", seen=frozenset())
    monkeypatch.setattr(classifier, "data", data)
    card = model_card(classifier, small_run)
    (line,) = [line for line in card.splitlines() if line.startswith("Notes: ")]
    assert not set("`_<[*\u202e") & set(line)
    shown = html.unescape(line).replace("U+202E", "\u202e")
    assert shown.startswith(f"Notes: {name}, split by **texts**; ")


def test_the_bundled_card_has_intervals_and_the_best_possible_accuracy():
    card = model_card(clinora.Classifier.load("bundled"), "bundled")
    assert re.search(r"this run +[\d.]+% \[[\d.]+, [\d.]+\]", card)
    assert re.search(r"possible at best +100% +[\d.]+%", card)
    assert re.search(r"Under [\d.]+% a note is referred to a person", card)


def test_the_card_says_how_the_promised_accuracy_was_met(classifier, small_run, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.8))
    card = model_card(classifier, small_run)
    for words in ("fitted on 61 validation", "Under 80.0%", "50.0% of these notes 97.0%", "95%"):
        assert words in card
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=1.1))
    card = model_card(classifier, small_run)
    assert "110" not in card and "every note is referred to a person" in card
