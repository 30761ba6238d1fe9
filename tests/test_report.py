"""What a report says, and what it must not say."""

import dataclasses
import functools
import io
import json
import math
import re
import sys

import numpy as np
import pytest

import clinora
from clinora.calibration import Calibration
from clinora.classifier import Classifier
from clinora.commands import eval as eval_command
from clinora.evaluation import (
    Answers,
    Baseline,
    Estimate,
    RandomHeads,
    Results,
    bootstrap,
    measure,
)
from clinora.notes import Note, read_notes
from clinora.report import find_mistakes, model_table, read_steps, results_table, write_report
from clinora.run import DataRecord

FEW_DRAWS = functools.partial(bootstrap, replicates=20)  # the intervals do not matter here
LABELS = ("A", "B", "C")
CALIBRATION = Calibration(
    weights=(1.0, 1.0), bias=0.0, promise=0.95, threshold=0.6, notes=50, coverage=1.0, accuracy=1.0
)


def make(n=60, calibrated=True, confidence=None, labels=LABELS, **changes):
    """Results, answers and notes of which every third is wrong."""
    draw = np.random.default_rng(0)
    notes = [Note(f"SECRET PATIENT {i} " + "x" * 400, (i % 3, (i + 1) % 3)) for i in range(n)]
    named = np.array([(i % 3 if i % 3 else 2) for i in range(n)])
    if confidence is None:
        confidence = draw.uniform(0.3, 1, n)
    answers = Answers(
        predicted=named,
        correct=np.array([a in note.labels for a, note in zip(named, notes, strict=True)]),
        top=draw.uniform(0.3, 1, n),
        loss=draw.exponential(size=n),
        confidence=confidence if calibrated else None,
        tokens=draw.integers(5, 900, n),
    )
    some = Estimate(0.5, 0.4, 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clinora.evaluation.bootstrap", FEW_DRAWS)
        after = measure(answers, notes, labels, CALIBRATION if calibrated else None)
    results = Results(
        **{
            "labels": labels, "split": "texts", "notes": n, "rows": 2 * n, "trained_on": 0,
            "in_training": 0, "ceiling": 0.5, "test_ceiling": 0.625, "after": after,
            "before": RandomHeads(heads=20, any_label_accuracy=(0.3, 0.1), accuracy=(0.2, 0.05),
                                  macro_f1=(0.2, 0.1), log_loss=(1.7, 0.1)),
            "baselines": (Baseline(name="TF-IDF + linear model", settings="linear SVM, C = 1",
                                   any_label_accuracy=some, accuracy=some),),
            "against": Estimate(-0.049, -0.076, -0.022),
        } | changes
    )  # fmt: skip
    return results, answers, notes


@pytest.fixture
def report(tmp_path):
    """Write a report; gives its metrics, its Markdown and the table of the terminal."""

    def write(made, **options):
        results, answers, notes = made
        options = {"token_limit": 512, "about": "Notes."} | options
        write_report(tmp_path / "report", results, answers, notes, **options)
        metrics = json.loads(
            (tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"),
            parse_constant=lambda word: pytest.fail(f"{word} is no JSON"),
        )
        markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
        return metrics, markdown, results_table(results)

    return write


# --- metrics.json ---------------------------------------------------------------------------------


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


def test_metrics_have_the_keys_that_readers_rely_on(report):
    metrics, _, _ = report(make())
    assert metrics["schema"] == 1
    assert metrics.keys() == {
        "schema", "about", "labels", "split", "notes", "rows", "trained_on", "in_training",
        "ceiling", "test_ceiling", "before", "after", "baselines", "against", "mistakes",
    }  # fmt: skip
    assert metrics["after"].keys() == {
        "by_note", "by_row", "log_loss", "overconfidence", "calibration_error",
        "top_calibration_error", "answered",
    }  # fmt: skip
    for way in ("by_note", "by_row"):
        measures = metrics["after"][way]
        assert measures.keys() == {"accuracy", "macro_f1", "classes", "confusion"}
        assert measures["classes"][0].keys() == {"label", "precision", "recall", "f1", "support"}
        assert np.shape(measures["confusion"]) == (3, 3)
    assert metrics["after"]["answered"].keys() == {"promise", "threshold", "coverage", "accuracy"}
    assert metrics["before"].keys() == {
        "heads", "any_label_accuracy", "accuracy", "macro_f1", "log_loss",
    }  # fmt: skip
    assert metrics["baselines"][0].keys() == {"name", "settings", "any_label_accuracy", "accuracy"}
    assert metrics["mistakes"][0].keys() == {
        "sha256", "named", "filed", "confidence", "probability", "tokens",
    }  # fmt: skip


def test_every_estimate_is_finite_and_lies_in_order(report):
    metrics, _, _ = report(make())
    found = list(estimates(metrics["after"]["by_row"]))
    assert len(found) == 2 + 3 * 3
    for e in found:
        assert all(map(math.isfinite, e.values()))
        assert e["low"] <= e["high"]


@pytest.mark.parametrize(
    "made",
    [
        {"n": 1},
        {"n": 2, "calibrated": False},
        {"confidence": np.full(60, 0.2)},  # the threshold is never reached
        {"against": None, "baselines": ()},
    ],
    ids=["one note", "not calibrated", "none answered", "no training side"],
)
def test_metrics_of_odd_results_are_strict_json(report, made):
    metrics, markdown, table = report(make(**made))
    assert metrics["notes"] == made.get("n", 60)
    assert "nan" not in (markdown + table).lower()


# --- the words ------------------------------------------------------------------------------------


def test_notes_that_the_run_has_seen_are_said_in_every_output(report):
    metrics, markdown, table = report(make(trained_on=17))
    assert metrics["trained_on"] == 17
    for text in (markdown, table):
        assert re.search(r"NOT A TEST: .* on 17 of these\s+notes", text)


def test_a_test_is_not_called_none(report):
    _, markdown, table = report(make())
    assert "NOT A TEST" not in markdown + table
    assert "training notes" not in markdown + table


def test_texts_that_also_stand_in_training_are_said_in_every_output(report):
    metrics, markdown, table = report(make(in_training=12, split="rows"))
    assert (metrics["in_training"], metrics["split"]) == (12, "rows")
    for text in (markdown, table):
        assert "12 of these notes' texts are also among the training notes" in text


def accuracies(results):
    """Find the shares in the line of each classifier."""
    lines = [line for line in results_table(results).splitlines() if line.startswith("this run ")]
    return [re.findall(r"([\d.]+)% \[", line) for line in lines]


def test_where_no_text_has_several_labels_rows_and_ceiling_are_left_out():
    """A prediction is correct for the note exactly if it is correct for its rows."""
    several, _, _ = make()
    one = dataclasses.replace(several, ceiling=1.0, test_ceiling=1.0)
    by_note = f"{100 * several.after.by_note.accuracy.value:.1f}"
    by_row = f"{100 * several.after.by_row.accuracy.value:.1f}"
    assert accuracies(several) == [[by_note, by_row]]
    assert accuracies(one) == [[by_note]]
    assert "at best" in results_table(several) and "at best" not in results_table(one)


@pytest.mark.parametrize(("n", "said"), [(29, True), (30, False)])
def test_fewer_than_thirty_notes_allow_no_conclusion(report, n, said):
    _, markdown, table = report(make(n=n))
    assert ("no conclusion" in markdown) == ("no conclusion" in table) == said


@pytest.mark.parametrize(("split", "best"), [("texts", "100%"), ("rows", "62.5%")])
def test_what_is_possible_at_best_depends_on_the_split(split, best):
    """Split by rows a note has one label, and a text of two is wrong once."""
    line = next(x for x in results_table(make(split=split)[0]).splitlines() if "at best" in x)
    assert line.split()[-2:] == [best, "50.0%"]


def test_the_table_names_each_class_with_its_measures():
    results, _, _ = make()
    lines = results_table(results).splitlines()[-4:]
    for c in results.after.by_note.classes:
        line = next(x for x in lines if x.startswith(f"{c.label} "))
        figures = [f"{e.value:.1%}" for e in (c.precision, c.recall, c.f1)]
        assert re.findall(r"[\d.]+%", line) == figures
        assert float(line.split()[-1]) == pytest.approx(c.support, abs=0.05)


def test_the_table_says_how_a_note_of_several_classes_counts_and_what_the_signs_mean():
    table = " ".join(results_table(make()[0]).split())
    assert "In brackets: 95% intervals. After ±: the standard deviation between" in table
    assert "an incorrect note with k labels counts as 1/k in each" in table


def test_the_table_says_the_comparison_with_the_better_baseline():
    assert "-4.9 points of the notes correct [-7.6, -2.2]" in results_table(make()[0])


def test_the_table_puts_what_was_achieved_beside_what_was_promised():
    results, answers, _ = make()
    kept = answers.confidence >= 0.6
    line = next(x for x in results_table(results).splitlines() if "target: 95%" in x)
    assert f"{kept.mean():.1%} of the notes, {answers.correct[kept].mean():.1%}" in line


def test_a_run_without_calibration_is_said_to_claim_nothing():
    assert "no confidence is claimed" in results_table(make(calibrated=False)[0])


def test_a_threshold_that_none_reaches_is_said():
    table = results_table(make(confidence=np.full(60, 0.2))[0])
    assert "every note is referred" in table


def test_large_counts_are_written_out():
    results, answers, notes = make()
    many = measure(answers, notes, LABELS, None).by_note
    classes = tuple(dataclasses.replace(c, support=123456.5) for c in many.classes)
    after = dataclasses.replace(results.after, by_note=dataclasses.replace(many, classes=classes))
    assert "123,456.5" in results_table(dataclasses.replace(results, after=after))


def test_the_model_is_described(small_run):
    table = model_table(Classifier.load(small_run, device="cpu", precision="fp32"))
    assert "Linear(32 → 5)" in table
    assert "rank 4, alpha 8" in table


# --- mistakes -------------------------------------------------------------------------------------


def test_at_most_twenty_mistakes_the_most_confident_first():
    results, answers, notes = make(n=120)
    found = find_mistakes(answers, notes, LABELS)
    wrong = sorted(answers.confidence[~answers.correct])[::-1]
    assert len(wrong) > 20
    assert [m["confidence"] for m in found] == wrong[:20]
    by_hash = {note.sha256: note for note in notes}
    for mistake in found:
        filed = [LABELS[i] for i in by_hash[mistake["sha256"]].labels]
        assert mistake["filed"] == filed
        assert mistake["named"] not in filed
    assert results.notes == 120


def test_without_calibration_mistakes_are_sorted_by_probability():
    _, answers, notes = make(calibrated=False)
    found = find_mistakes(answers, notes, LABELS)
    assert [m["probability"] for m in found] == sorted(answers.top[~answers.correct])[::-1][:20]
    assert {m["confidence"] for m in found} == {None}


def test_no_mistake_is_no_error(report):
    results, answers, notes = make(n=2)
    named = np.array([0, 1])
    right = Answers(
        predicted=named, correct=np.ones(2, bool), top=answers.top, loss=answers.loss,
        confidence=answers.confidence, tokens=answers.tokens,
    )  # fmt: skip
    metrics, markdown, _ = report((results, right, notes))
    assert metrics["mistakes"] == []
    assert "most confident mistakes (0)" in markdown


def test_no_text_stands_in_a_report_unless_asked_for(report, tmp_path):
    report(make())
    for file in (tmp_path / "report").iterdir():
        assert b"SECRET" not in file.read_bytes(), file.name


def test_text_that_is_asked_for_is_an_excerpt_in_the_markdown_alone(report, tmp_path):
    report(make(), show_text=True)
    for file in (tmp_path / "report").iterdir():
        assert (b"SECRET PATIENT" in file.read_bytes()) == (file.name == "report.md"), file.name
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    quoted = [line.strip() for line in lines if "SECRET" in line]
    assert 0 < len(quoted) <= 20
    assert all(len(line) <= 300 for line in quoted)


@pytest.mark.parametrize("show_text", [False, True])
def test_a_class_name_or_note_is_not_read_as_markdown(report, show_text):
    """Nothing of it stands outside a block of code."""
    bad = ("![x](http://a.example/x.png)", "<script>", "```")
    results, answers, notes = make(labels=bad)
    notes = [Note("```\n<script>" + n.text, n.filed) for n in notes]
    _, markdown, _ = report((results, answers, notes), show_text=show_text)
    inside, outside = False, []
    for line in markdown.splitlines():
        if re.fullmatch(r" {0,3}```\s*", line):  # what CommonMark takes for a fence
            inside = not inside
        elif not inside:
            outside.append(line)
    assert not inside
    assert not [line for line in outside if "<script>" in line or "http" in line]


def test_files_that_the_markdown_shows_are_there(report, tmp_path):
    steps = [{"step": i, "loss": 1.0, "learning_rate": 1e-3} for i in (1, 2)]
    _, markdown, _ = report(make(), steps=steps)
    shown = re.findall(r"\]\((\w+\.png)\)", markdown)
    assert shown == [
        "confusion.png",
        "reliability.png",
        "coverage.png",
        "length.png",
        "training.png",
    ]
    for name in shown:
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_steps_are_read_and_may_be_absent(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert read_steps(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_steps(tmp_path / "nothing") == []


# --- clinora eval ---------------------------------------------------------------------------------


@pytest.fixture
def evaluated(small_run, tmp_path, monkeypatch, capsys):
    """Evaluate a run that has seen every note not on the test side; gives what is written, said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clinora.evaluation.bootstrap", FEW_DRAWS)

    def run(*options, split="texts", lines=()):
        names = clinora.PUBLISHED_CLASSES
        rows = [f"SECRET PATIENT {i % 45} with pain,{names[i % 5]}" for i in range(90)]
        (tmp_path / "notes.csv").write_text(
            "\n".join(["transcription,medical_specialty", *rows, *lines]) + "\n", encoding="utf-8"
        )
        notes = read_notes(tmp_path / "notes.csv", classes=names, split=split)
        seen = notes.on("training") + notes.on("validation")
        classifier = Classifier.load(small_run, device="cpu", precision="fp32")
        classifier.data = DataRecord(
            source=str(tmp_path / "notes.csv"),
            split=split,
            fingerprint=notes.fingerprint,
            split_fingerprint=notes.split_fingerprint,
            seen=frozenset(note.sha256[:16] for note in seen),
        )
        classifier.save(tmp_path / "run")
        capsys.readouterr()
        assert eval_command.main(["--run", "run", "--device", "cpu", *options]) == 0
        said = capsys.readouterr()
        folder = tmp_path / "run" / ("report-seen" if "--include-seen" in options else "report")
        return notes, json.loads((folder / "metrics.json").read_text()), said, folder

    return run


def test_eval_measures_the_test_side_alone_and_says_no_text(evaluated):
    notes, metrics, said, folder = evaluated()
    assert metrics["notes"] == len(notes.on("test"))
    assert metrics["trained_on"] == 0
    assert "SECRET" not in said.out + said.err
    assert all(b"SECRET" not in file.read_bytes() for file in folder.iterdir())


def test_eval_of_seen_notes_says_so_in_terminal_metrics_and_report(evaluated):
    notes, metrics, said, folder = evaluated("--include-seen")
    seen = len(notes.notes) - len(notes.on("test"))
    assert (metrics["notes"], metrics["trained_on"]) == (len(notes.notes), seen)
    for text in (said.out, (folder / "report.md").read_text()):
        assert f"NOT A TEST: the run was trained or calibrated on {seen} of these" in text


def test_eval_split_by_rows_says_how_many_texts_stand_in_training(evaluated):
    notes, metrics, said, folder = evaluated(split="rows")
    training = {n.text for n in notes.on("training")}
    twins = sum(n.text in training for n in notes.on("test"))
    assert metrics["in_training"] == twins > 0
    for text in (said.out, (folder / "report.md").read_text()):
        assert f"{twins} of these notes' texts are also among the training notes" in text


def test_eval_refuses_a_run_that_does_not_say_what_it_has_seen(small_run, tmp_path, capsys):
    (tmp_path / "notes.csv").write_text(
        "transcription,medical_specialty\n"
        + "".join(f"{name},{name}\n" for name in clinora.PUBLISHED_CLASSES)
    )
    with pytest.raises(SystemExit) as caught:
        eval_command.main(["--run", str(small_run), "--notes", str(tmp_path / "notes.csv")])
    assert caught.value.code == 2
    assert "does not record which notes it has seen" in capsys.readouterr().err


def test_a_console_that_lacks_letters_does_not_stop_eval(evaluated, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    evaluated()
    console.flush()
    assert re.search(rb"random heads\) +\d+\.\d% \? \d", console.buffer.getvalue())  # for ±
