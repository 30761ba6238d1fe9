"""docs/tripod.md answers every item, and its figures are the measured ones."""

import json
import re
from pathlib import Path

from clinora.checkpoint import BUNDLED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tripod.md").read_text(encoding="utf-8")
ADAPTER = BUNDLED / "adapter"
REPORTS = ("report/cross_validation.json", "report/metrics.json", "report-fictional/metrics.json")
# The parts of the items of TRIPOD+AI (Collins et al. 2024, table 2): the last letter of each item.
LAST = {3: "c", 5: "b", 6: "c", 8: "c", 9: "c", 12: "g", 18: "f", 20: "c", 23: "b", 27: "c"}


def answers():
    """The answer to each part of an item: what follows its bold line."""
    parts = re.split(r"^\*\*(\d+[a-z]?) ([^*]+)\*\*$", PAGE, flags=re.MULTILINE)[1:]
    return {
        number: text.partition("\n## ")[0]
        for number, text in zip(parts[::3], parts[2::3], strict=True)
    }


def estimates(value):
    """Find all estimates in what JSON holds."""
    if isinstance(value, dict):
        if value.keys() == {"value", "low", "high"}:
            yield value
        for item in value.values():
            yield from estimates(item)
    elif isinstance(value, list):
        for item in value:
            yield from estimates(item)


def measures():
    return [json.loads((ADAPTER / name).read_text(encoding="utf-8")) for name in REPORTS]


def test_every_part_of_every_item_is_answered_in_order():
    expected = []
    for item in range(1, 28):
        letters = [chr(code) for code in range(ord("a"), ord(LAST.get(item, "`")) + 1)]
        expected += [f"{item}{letter}" for letter in letters] or [str(item)]
    assert len(expected) == 52
    assert list(answers()) == expected
    assert all(answer.strip() for answer in answers().values())


def test_every_interval_is_one_of_the_committed_measures():
    known = set()
    for one in estimates(measures()):
        ends = sorted((abs(one["low"]), abs(one["high"])))
        known.add(tuple(f"{100 * abs(figure):.1f}" for figure in (one["value"], *ends)))
    shown = re.findall(r"([\d.]+)%?(?: points)?\s\[([\d.]+), ([\d.]+)\]", PAGE)
    assert len(shown) > 15
    assert set(shown) <= known


def test_the_table_has_the_accuracy_and_its_baseline_in_each_row():
    folds, test, fictional = measures()
    expected = [(folds["notes"], folds["accuracy"], folds["tf_idf"])]
    for report in (test, fictional):
        _majority, tf_idf = report["baselines"]
        accuracy = report["after"]["by_note"]["accuracy"]
        expected.append((report["notes"], accuracy, tf_idf["any_label_accuracy"]))
    rows = re.findall(r"^\| (?:all )?([\d,]+) .*\| ([\d.]+)% .*\| ([\d.]+)% ", PAGE, re.MULTILINE)
    assert rows == [
        (f"{notes:,}", f"{100 * ours['value']:.1f}", f"{100 * theirs['value']:.1f}")
        for notes, ours, theirs in expected
    ]
