"""The model card: intended use, accuracy, calibration, limits and data of a run."""

import html
import json
import re
import shutil

import pytest

import clinora
from clinora.checkpoint import BUNDLED
from clinora.evaluation import Estimate
from clinora.report import CrossValidation, write_cross_validation
from clinora.run import DataRecord
from clinora.serving.card import model_card
from tests.served import calibration, estimate, metrics

ADAPTER = BUNDLED / "adapter"
HOSTILE = [
    "<form action=//e.example><input name=p></form>",
    "![x](//e.example/x.png) | [link](//e.example)",
    "``` **b** ~~~ | a\u202eb",
    "# $x$ &amp; &#124;",
    "|---|---|",
]


def tables(card):
    """The Markdown tables of a card: their rows, header first, of cells as a reader sees them.

    A row is split at its vertical bars before entities become characters, as GFM says.
    """
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", card + "\n", re.MULTILINE):
        header, _line, *rows = block.splitlines()
        found.append(
            [
                [html.unescape(cell.strip()) for cell in row[1:-1].split("|")]
                for row in [header, *rows]
            ]
        )
    return found


def rows(card):
    """All rows of all tables by their first cell; a name that occurs twice has two rows."""
    by_name = {}
    for table in tables(card):
        for name, *cells in table:
            by_name.setdefault(name, []).append(cells)
    return by_name


def shown(estimate):
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{100 * estimate['value']:.1f}% [{low:.1f}, {high:.1f}]"


@pytest.fixture
def run(tmp_path):
    """Write reports into a run's folder: ``run(report=metrics, **{"report-x": metrics})``."""

    def write(**reports):
        for name, values in reports.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "metrics.json").write_text(json.dumps(values))
        return tmp_path

    return write


# --- the measures ---------------------------------------------------------------------------------


def test_accuracy_on_test_notes_and_other_notes_stands_beside_tf_idf(classifier, run):
    own = metrics(classifier.labels)
    other = metrics(
        classifier.labels,
        notes=31,
        after=own["after"] | {"by_note": {"accuracy": estimate(0.5), "classes": []}},
        baselines=[],
        against=None,
    )
    folder = run(report=own, **{"report-other_ward": other})
    header, *lines = tables(model_card(classifier, folder))[0]
    assert len(header) == 3
    assert lines == [
        ["50 test notes", "80.0% [77.5, 81.2]", "84.0% [81.5, 85.2]"],
        ["31 other notes (other_ward)", "50.0% [47.5, 51.2]", "–"],
    ]


def test_a_report_on_notes_that_the_run_has_seen_is_no_row(classifier, run):
    seen = metrics(classifier.labels, trained_on=7, notes=33)
    card = model_card(classifier, run(report=metrics(classifier.labels), **{"report-seen": seen}))
    assert "50 test notes" in rows(card)
    assert not [name for name in rows(card) if name.startswith("33 ")]


def test_the_test_notes_that_are_no_test_are_said_to_be_none(classifier, run):
    own = metrics(classifier.labels, trained_on=17)
    assert re.search(r"NOT A TEST: .* 17 of these notes", model_card(classifier, run(report=own)))


@pytest.mark.parametrize(("notes", "said"), [(29, True), (30, False)])
def test_few_other_notes_allow_no_conclusion(classifier, run, notes, said):
    few = metrics(classifier.labels, notes=notes)
    card = model_card(classifier, run(**{"report-few": few}))
    assert ("no conclusion is possible" in card) == said


def test_all_notes_in_folds_come_first(classifier, run):
    folder = run(report=metrics(classifier.labels))
    folds = CrossValidation(
        about="Notes.", notes=1234, folds=3, before=0.2, accuracy=Estimate(0.75, 0.7, 0.8),
        of_folds=(0.7, 0.75, 0.8), tf_idf=Estimate(0.875, 0.85, 0.9),
        tf_idf_of_folds=(0.85, 0.875, 0.9), against=Estimate(-0.125, -0.15, -0.1),
    )  # fmt: skip
    write_cross_validation(folder / "report", folds)
    card = model_card(classifier, folder)
    (name, *cells), (second, *_) = tables(card)[0][1:]
    assert cells == ["75.0% [70.0, 80.0]", "87.5% [85.0, 90.0]"]
    assert "1,234" in name and "3" in name
    assert second == "50 test notes"
    assert f"{name}: -12.5 [-15.0, -10.0]" in card


def test_each_class_has_its_precision_and_recall(classifier, run):
    card = model_card(classifier, run(report=metrics(classifier.labels)))
    for i, label in enumerate(classifier.labels):
        precision, recall = shown(estimate(0.7 + i / 100)), shown(estimate(0.6 + i / 100))
        assert rows(card)[label] == [[precision, recall]]


def test_a_ceiling_below_1_is_said_with_the_accuracy_over_rows(classifier, run):
    several = model_card(classifier, run(report=metrics(classifier.labels)))
    assert re.search(r"62\.5% of these rows.* 55\.0% \[52\.5, 56\.2\]", several, re.DOTALL)


def test_without_several_labels_nothing_is_said_of_rows(classifier, run):
    one = model_card(classifier, run(report=metrics(classifier.labels, test_ceiling=1.0)))
    assert "55.0%" not in one


def test_answers_and_target_of_other_notes_stand_beside_those_of_validation(
    classifier, run, monkeypatch
):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.8))
    card = model_card(
        classifier,
        run(report=metrics(classifier.labels), **{"report-other": metrics(classifier.labels)}),
    )
    assert "80.0%" in card and "95%" in card
    assert rows(card)["61 validation notes"] == [["50.0%", "97.0%"]]
    for name in ("50 test notes", "50 other notes (other)"):
        _accuracy, answered = rows(card)[name]
        assert answered == ["85.0% [82.5, 86.2]", "90.0% [87.5, 91.2]"]
        # The whole interval, up to 91.2%, is below the target.
        assert f"The target is not reached on {name}" in html.unescape(card)
        assert f"{name}: +3.1 [+1.1, +5.2]" in html.unescape(card)


def test_a_target_inside_the_interval_is_not_called_missed(classifier, run, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.8))
    own = metrics(classifier.labels)
    own["after"]["answered"]["accuracy"] = {"value": 0.94, "low": 0.92, "high": 0.96}
    assert "not reached" not in model_card(classifier, run(report=own))


def test_a_threshold_that_no_note_reaches_is_no_percentage(classifier, small_run, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=1.1))
    card = model_card(classifier, small_run)
    assert "110" not in card and "Every note is referred to a person" in card


def test_without_calibration_and_report_the_card_says_so(classifier, small_run):
    card = model_card(classifier, small_run)
    for words in ("not a medical device", "has no report", "not calibrated", "128 tokens"):
        assert words in card


# --- older and damaged reports --------------------------------------------------------------------


def test_a_report_of_an_older_version_gives_its_better_baseline(classifier, run):
    """It had two linear models, without settings; ``against`` is the difference to the better."""
    old = metrics(classifier.labels)
    old["baselines"] = [
        {"name": "majority class", "any_label_accuracy": estimate(0.9)},
        {"name": "TF-IDF + logistic regression", "any_label_accuracy": estimate(0.71)},
        {"name": "TF-IDF + linear SVM", "any_label_accuracy": estimate(0.73)},
    ]
    card = model_card(classifier, run(report=old))
    assert rows(card)["50 test notes"][0] == [shown(estimate(0.8)), shown(estimate(0.73))]


def test_a_report_without_calibration_has_no_row_of_answers(classifier, run, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.8))
    own = metrics(classifier.labels)
    own["after"] |= {"answered": None, "overconfidence": None}
    assert len(rows(model_card(classifier, run(report=own)))["50 test notes"]) == 1


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "after": []}', "\xff"],
)
def test_a_damaged_report_leaves_the_rest_of_the_card(classifier, run, text):
    folder = run(report={}, **{"report-other": metrics(classifier.labels)})
    (folder / "report" / "metrics.json").write_bytes(text.encode("latin-1"))
    card = model_card(classifier, folder)
    assert "cannot be read" in card
    assert "50 other notes (other)" in rows(card)


def test_a_report_of_another_schema_is_not_read(classifier, run):
    card = model_card(classifier, run(report=metrics(classifier.labels, schema=2)))
    assert "cannot be read" in card and not rows(card).get("50 test notes")


# --- names that others gave -----------------------------------------------------------------------


def test_names_in_the_card_are_escaped_from_markdown_and_html(classifier, small_run, monkeypatch):
    name = "a`b`_c_<form>[x](y)\u202e.csv"
    data = DataRecord(source=f"/data/{name}", split="**texts**", seen=frozenset())
    monkeypatch.setattr(classifier, "data", data)
    card = model_card(classifier, small_run)
    (line,) = [line for line in card.splitlines() if line.startswith("Source: ")]
    assert not set("`_<[*\u202e") & set(line)
    seen = html.unescape(line).replace("U+202E", "\u202e")
    assert seen.startswith(f"Source: {name}, split by **texts**")


def test_names_of_classes_baselines_and_reports_stay_in_their_cells(classifier, run, monkeypatch):
    monkeypatch.setattr(classifier, "labels", tuple(HOSTILE))
    own = metrics(HOSTILE, about=HOSTILE[0])
    own["baselines"].append({"name": HOSTILE[1], "any_label_accuracy": estimate(0.5)})
    file = "a|b`_[x](y)<form>\u202e"
    card = model_card(classifier, run(report=own, **{f"report-{file}": own}))
    for label in HOSTILE:
        assert len(rows(card)[label.replace("\u202e", "U+202E")]) == 1
    assert f"50 other notes ({file})".replace("\u202e", "U+202E") in rows(card)
    assert not set("<`\u202e") & set(card.replace("`clinora eval`", ""))
    widths = [{len(row) for row in table} for table in tables(card)]
    assert widths == [{3}, {3}, {2}]


def test_no_table_has_more_than_three_columns(classifier, run, monkeypatch):
    """A phone is 390 pixels wide."""
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.8))
    card = model_card(classifier, run(report=metrics(classifier.labels)))
    assert len(tables(card)) == 4
    assert max(len(row) for table in tables(card) for row in table) == 3
    assert "```" not in card


# --- the bundled run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled_card():
    return model_card(clinora.Classifier.load("bundled"), "bundled")


def test_the_bundled_card_has_the_measured_figures(bundled_card):
    """The files are read here without the code that writes the card."""
    folds = json.loads((ADAPTER / "report" / "cross_validation.json").read_text())
    own = json.loads((ADAPTER / "report" / "metrics.json").read_text())
    fictional = json.loads((ADAPTER / "report-fictional" / "metrics.json").read_text())
    _header, *lines = tables(bundled_card)[0]
    expected = [[shown(folds["accuracy"]), shown(folds["tf_idf"])]]
    for report in (own, fictional):
        accuracy = report["after"]["by_note"]["accuracy"]
        _majority, tf_idf = report["baselines"]
        expected.append([shown(accuracy), shown(tf_idf["any_label_accuracy"])])
    assert [cells for _name, *cells in lines] == expected
    for report, (name, *_) in zip((folds, own, fictional), lines, strict=True):
        assert f"{report['notes']:,} " in name


def test_the_bundled_card_says_that_the_target_is_missed_on_the_fictional_notes(bundled_card):
    (line,) = [line for line in bundled_card.splitlines() if "not reached" in line]
    assert "157 other notes (fictional)" in html.unescape(line)


def test_a_copy_of_the_bundled_run_has_the_same_card(bundled_card, tmp_path):
    """Nothing is known of the bundled run that its folder does not hold."""
    shutil.copytree(ADAPTER, tmp_path / "run")
    classifier = clinora.Classifier.load(tmp_path / "run")
    assert model_card(classifier, tmp_path / "run") == bundled_card
