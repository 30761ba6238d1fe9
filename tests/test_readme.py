"""README and docs/: code runs, commands and options exist, figures are the measured ones."""

import contextlib
import importlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import clinora
from clinora.baselines import train_baselines
from clinora.checkpoint import BUNDLED
from clinora.commands import budget
from clinora.evaluation import bootstrap_mean
from clinora.serving.api import describe
from tools import compare

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SMOLLM2_RUN = ROOT / "examples" / "smollm2-mtsamples"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TINYLLAMA = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def python_blocks():
    """Every Python block of every page."""
    return [block for page in PAGES for block in blocks("python", text_of(page))]


def commands():
    """Every ``python …`` and ``clinora …`` in a shell block or between backquotes.

    The script or module that torchrun starts counts as Python's.
    """
    started = re.compile(
        r"\b(?:python (?!-m venv)|clinora (?:train|eval|predict|serve|budget))[^&#>]*"
    )
    found = set()
    for page in PAGES:
        text = text_of(page)
        lines = "".join(blocks("sh", text)).splitlines()
        lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        for line in lines:
            line = re.sub(r"^torchrun .*-- ", "python ", line)
            found |= {command.strip() for command in started.findall(line)}
    return sorted(found)


def table_rows(text):
    """The rows of all Markdown tables, as lists of cells without white space around them."""
    lines = re.findall(r"^\|(.+)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def figures_of(text):
    """The figures in a text, without thousands separators: percentages, counts, decimals."""
    return re.findall(r"\d+(?:\.\d+)?%?", re.sub(r"(?<=\d),(?=\d{3})", "", text))


def shows(row, *figures):
    """Whether a table row or a text holds these figures next to each other and in this order."""
    shown = figures_of(row if isinstance(row, str) else " | ".join(row))
    wanted = [figure for cell in figures for figure in figures_of(cell)]
    return any(shown[i : i + len(wanted)] == wanted for i in range(len(shown)))


def percent(value):
    return f"{value:.1%}"


def with_interval(estimate):
    return f"{estimate['value']:.1%} {100 * estimate['low']:.1f} {100 * estimate['high']:.1f}"


def with_spread(mean_and_deviation):
    mean, deviation = mean_and_deviation
    return f"{mean:.1%} {deviation:.1%}"


@pytest.fixture(scope="module")
def report():
    """What was measured of the bundled adapter."""
    return json.loads((BUNDLED / "adapter" / "report" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def smollm2_report():
    """What was measured of the adapter for SmolLM2."""
    return json.loads((SMOLLM2_RUN / "report" / "metrics.json").read_text())


def test_the_first_code_prints_what_is_shown_below_it():
    code, shown = re.search(
        r"^```python\n(.*?)^```\n+```text\n(.*?)^```$", text_of(README), re.MULTILINE | re.DOTALL
    ).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == shown


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(python_blocks()) >= 3
    for block in python_blocks():
        exec(block, {})
    # The example saves an adapter, and load_adapter reads it.
    model = clinora.load_model("bundled", num_labels=5)
    clinora.load_adapter(model, tmp_path / "adapter")


def test_the_unit_test_passes_and_can_fail(monkeypatch):
    (block,) = [block for block in python_blocks() if "def test_" in block]
    names = {}
    exec(block, names)
    (test,) = [value for name, value in names.items() if name.startswith("test_")]
    test()
    monkeypatch.setattr(clinora, "apply_lora", lambda model, config: None)  # everything trains
    with pytest.raises(AssertionError):
        test()


def test_the_answer_of_the_service_is_the_bundled_adapters():
    page = text_of(ROOT / "docs" / "serving.md")
    request = re.findall(r"-d '(.+)'", page)[0]  # the answer is shown below the first request
    shown = json.loads(blocks("json", page)[0])
    classifier = clinora.Classifier.load("bundled")
    answer = describe(classifier([json.loads(request)["note"]])[0], classifier)
    assert list(shown) == list(answer)
    numbers = answer.pop("probabilities") | {"confidence": answer.pop("confidence")}
    shown_numbers = shown.pop("probabilities") | {"confidence": shown.pop("confidence")}
    assert shown == answer
    assert shown_numbers == pytest.approx(numbers, abs=0.02)  # the precision may be another


def options_of(command, capsys):
    """The options that the help of a command, such as ``python -m MODULE``, lists."""
    words = command.replace("python -m clinora ", "clinora ").split()
    if words[0] == "clinora":
        module, arguments = "clinora.__main__", [words[1], "--help"]
    elif words[1] == "-m":
        module, arguments = words[2], ["--help"]
    else:
        module, arguments = words[1].removesuffix(".py"), ["--help"]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(arguments)
    assert ended.value.code == 0, command
    return set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))


def test_commands_have_the_options_that_they_are_given(capsys):
    assert len(commands()) > 10
    for command in commands():
        options = {word.partition("=")[0] for word in command.split() if word.startswith("--")}
        assert options <= options_of(command, capsys), command


def test_options_between_backquotes_exist(capsys):
    known = {"--extra-index-url"}  # pip's
    known |= {"--disable-usage-stats", "--include-dashboard", "--temp-dir"}  # Ray's
    tools = ("python -m tools.compare", "python -m tools.gguf_to_hub")
    for command in ("clinora train", "clinora predict", "clinora serve", "clinora budget", *tools):
        known |= options_of(command, capsys)
    for page in PAGES:
        for words in re.findall(r"(?<!`)`(--[^`\n]+)`(?!`)", text_of(page)):
            assert set(re.findall(r"--[a-z0-9-]+", words)) <= known, (page.name, words)


@pytest.mark.parametrize("marker", ["main", "test"])
def test_marked_commands_are_where_scripts_look_for_them(marker):
    lines = text_of(README).splitlines()
    at = lines.index(f"<!-- the {marker} command -->")
    assert lines[at + 1] == "```sh"
    assert lines[at + 2].startswith("python3 -m venv ")
    assert lines[at + 3] == "```"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    text = text_of(page)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", text_of(target), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], link


def test_readme_leads_to_every_page_and_picture():
    linked = re.findall(r"\]\((docs/[^)#]+)\)", text_of(README))
    there = [p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").iterdir() if p.is_file()]
    assert sorted(set(linked)) == sorted(there)


def test_the_tree_names_what_there_is():
    (tree,) = blocks("", text_of(README).partition("## The tree")[2].partition("\n## ")[0])
    named = set(re.findall(r"(?:^|\s)((?:clinora/)?\w+(?:\.py|/))(?=\s)", tree, re.MULTILINE))
    there = {f"clinora/{path.name}" for path in (ROOT / "clinora").glob("*.py")}
    there.remove("clinora/__init__.py")
    for path in (ROOT / "clinora").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            there.add(f"clinora/{path.name}/")
    there |= {path.name for path in ROOT.glob("*.py")}
    there |= {"benchmarks/", "docs/", "examples/", "notebooks/", "tests/", "tools/"}
    assert named == there
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_counts_are_those_of_the_closed_form():
    full = 10_000 * 20_000
    low = clinora.lora_parameter_count(10_000, 20_000, 8)
    assert shows(text_of(README), f"{full:,}")
    assert shows(text_of(README), f"{low:,}", f"{full / low:.0f}")
    # TinyLlama's 22 layers: q_proj is 2048 × 2048 and v_proj 256 × 2048; its head 5 × 2048.
    trained = 22 * 8 * (2048 + 2048 + 256 + 2048) + 5 * 2048
    assert shows(text_of(README), f"{trained:,}", "1,035,649,024")


def test_the_bundled_adapters_count_is_that_of_the_model():
    model = clinora.load_model("bundled", num_labels=5)
    clinora.apply_lora(model, clinora.LoRAConfig())
    count = clinora.count_parameters(model)
    assert shows(text_of(ROOT / "docs" / "results.md"), f"{count.trainable:,}")
    assert shows(text_of(README), f"{(count.total - count.trainable) / 1e6:.1f}")


def test_the_results_are_those_of_the_bundled_report(report):
    after = report["after"]
    before = report["before"]
    majority, tf_idf = report["baselines"][:2]
    expected = {
        "before training, 20 random heads": (
            with_spread(before["any_label_accuracy"]),
            with_spread(before["accuracy"]),
        ),
        "majority class": (
            with_interval(majority["any_label_accuracy"]),
            with_interval(majority["accuracy"]),
        ),
        "LoRA, r = 8 on q_proj and v_proj": (
            with_interval(after["by_note"]["accuracy"]),
            with_interval(after["by_row"]["accuracy"]),
        ),
        tf_idf["name"]: (
            with_interval(tf_idf["any_label_accuracy"]),
            with_interval(tf_idf["accuracy"]),
        ),
        "best possible": ("100%", percent(report["test_ceiling"])),
        "answered": (with_interval(after["answered"]["coverage"]),),
        "of the answered, correct": (with_interval(after["answered"]["accuracy"]),),
    }
    assert before["heads"] == 20
    rows = table_rows(text_of(ROOT / "docs" / "results.md"))
    for name, cells in expected.items():
        (row,) = [row for row in rows if row[0] == name]
        assert [figures_of(cell) for cell in row[1:]] == [figures_of(cell) for cell in cells], name


def test_the_text_has_the_figures_of_the_bundled_report(report):
    results = text_of(ROOT / "docs" / "results.md")
    readme = text_of(README)
    after = report["after"]
    gain = report["against"]
    gap = f"{-100 * gain['value']:.1f} {-100 * gain['high']:.1f} {-100 * gain['low']:.1f}"
    answered = after["answered"]
    sides = re.search(r"([\d,]+) training, ([\d,]+) validation, ([\d,]+) test", report["about"])
    assert shows(results, percent(report["ceiling"]), percent(report["test_ceiling"]))
    assert shows(results, gap)
    assert shows(results, *sides.groups())
    assert shows(readme, gap)
    assert shows(readme, with_interval(after["by_note"]["accuracy"]))
    assert shows(readme, str(report["notes"]))
    shares = [percent(answered[measure]["value"]) for measure in ("coverage", "accuracy")]
    for share in shares:
        assert shows(results, share)


def test_the_table_of_training_can_be_one_of_the_bundled_notes():
    """Training differs between machines, but majority, TF-IDF and ceilings do not."""
    notes = clinora.read_notes("bundled")
    test = notes.on("test")
    (table,) = [block for block in blocks("text", text_of(README)) if "this run" in block]
    rows = dict(re.findall(r"^(\S.*?\S) {2,}(\S.*)$", table, re.MULTILINE))
    test_rows = [label for note in test for label in note.filed]
    simpler = train_baselines(notes.on("training"), notes.on("validation"), test)
    for name, _, predicted in simpler:
        hits = sum(label in note.labels for label, note in zip(predicted, test, strict=True))
        of_rows = sum(note.filed.count(c) for c, note in zip(predicted, test, strict=True))
        of_notes, _, _, share_of_rows, _, _ = figures_of(rows[name])
        assert of_notes == percent(hits / len(test)), name
        assert share_of_rows == percent(of_rows / len(test_rows)), name
    # A share of notes is a whole number of them.
    (correct, *_) = figures_of(rows["this run"])
    assert correct in [percent(hits / len(test)) for hits in range(len(test) + 1)]
    best = sum(max(Counter(note.filed).values()) for note in notes.notes)
    share = best / sum(len(note.filed) for note in notes.notes)
    assert figures_of(rows["possible at best"]) == ["100%", percent(share)]


def test_the_chart_is_described_with_the_figures_of_the_reports(report, smollm2_report):
    (described,) = re.findall(r"!\[([^\]]+)\]\(docs/results.png\)", text_of(README))
    runs = (smollm2_report, report)
    in_folds = [
        json.loads((folder / "report" / "cross_validation.json").read_text())
        for folder in (SMOLLM2_RUN, BUNDLED / "adapter")
    ]
    tf_idf = report["baselines"][1]
    folds = (
        percent(in_folds[0]["before"]),
        *[percent(measures["accuracy"]["value"]) for measures in in_folds],
        percent(in_folds[0]["tf_idf"]["value"]),
        "100%",
    )
    notes = (
        percent(smollm2_report["before"]["any_label_accuracy"][0]),
        *[percent(run["after"]["by_note"]["accuracy"]["value"]) for run in runs],
        percent(tf_idf["any_label_accuracy"]["value"]),
        "100%",
    )
    rows = (
        percent(smollm2_report["before"]["accuracy"][0]),
        *[percent(run["after"]["by_row"]["accuracy"]["value"]) for run in runs],
        percent(tf_idf["accuracy"]["value"]),
        percent(report["test_ceiling"]),
    )
    # Without the 2 in the name of the base.
    assert figures_of(described.replace("SmolLM2", "")) == [*folds, *notes, *rows]


@pytest.mark.parametrize(
    ("run", "pages"),
    [
        (BUNDLED / "adapter", ["README.md"]),
        (SMOLLM2_RUN, ["README.md", "examples/smollm2-mtsamples/README.md"]),
    ],
)
def test_the_figures_of_the_folds_are_those_of_the_tools_file(run, pages):
    folds = json.loads((run / "report" / "cross_validation.json").read_text())
    results = (ROOT / "docs" / "results.md").read_text()
    for one, each in (("accuracy", "of_folds"), ("tf_idf", "tf_idf_of_folds")):
        share = folds[one]
        interval = f"{share['value']:.1%} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
        shares = ", ".join(f"{100 * fold:.1f}" for fold in folds[each])
        assert f"| {interval} | {shares} |" in results
        for page in pages:
            assert interval in " ".join((ROOT / page).read_text().split())
    gain = folds["against"]
    ends = f"{-100 * gain['low']:.1f}, −{-100 * gain['high']:.1f}"
    assert f"−{-100 * gain['value']:.1f} points [−{ends}]" in results
    assert f"random heads | {folds['before']:.1%} |" in results


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_results_of_smollm2_are_those_of_its_report(smollm2_report, page):
    text = text_of(ROOT / page)
    gain = smollm2_report["against"]
    assert shows(text, with_interval(smollm2_report["after"]["by_note"]["accuracy"]))
    gap = f"{-100 * gain['value']:.1f} {-100 * gain['high']:.1f} {-100 * gain['low']:.1f}"
    assert shows(text, gap)


def test_figures_on_the_fictional_notes_are_those_of_their_report():
    report = BUNDLED / "adapter" / "report-fictional" / "metrics.json"
    after = json.loads(report.read_text())["after"]
    limits = text_of(README).partition("## Limits")[2]
    assert shows(limits, with_interval(after["by_note"]["accuracy"]))
    answered = after["answered"]
    share = f"{answered['coverage']['value']:.0%}"
    assert shows(limits, share, with_interval(answered["accuracy"]))


@pytest.mark.parametrize("series", ["mtsamples", "mtsamples-all-linears"])
def test_the_table_of_ranks_is_that_of_the_committed_results(series):
    results = json.loads((ROOT / "notebooks" / "results" / series / "results.json").read_text())
    rows = table_rows(text_of(ROOT / "docs" / "results.md"))
    if series == "mtsamples":
        measured = table_rows(compare.table(results))[2:]
        assert len(measured) == 7
        assert all(row in rows for row in measured)
    else:
        (result,) = results
        interval = f"{100 * result['low']:.1f} {100 * result['high']:.1f}"
        (row,) = [row for row in rows if row[0] == "r=8, all linear layers"]
        correct = f"{percent(result['any_label_accuracy'])} {interval}"
        assert [figures_of(cell) for cell in row[1:]] == [
            figures_of(f"{result['trainable']:,}"),
            figures_of(correct),
        ]


def test_the_table_of_variants_is_that_of_the_committed_results():
    results = ROOT / "notebooks" / "results" / "variants" / "results.jsonl"
    best = {}  # by method, the training with the lowest validation loss
    for result in map(json.loads, text_of(results).splitlines()):
        name = "full fine-tuning" if result["method"] == "full" else result["method"]
        if result["validation_loss"] is not None:
            trainings = (best.get(name, result), result)
            best[name] = min(trainings, key=lambda training: training["validation_loss"])
    rows = {row[0]: row[1:] for row in table_rows(text_of(ROOT / "docs" / "variants.md"))}
    assert len(best) == 9
    correct = {name: np.array(training["correct"]) for name, training in best.items()}
    # The draws follow the hashes of the texts, so the texts are those of chapter 7.
    notes = [clinora.Note(f"text {number}", (0,)) for number in range(367)]
    for name, training in best.items():
        share = bootstrap_mean(1.0 * correct[name], notes)
        gap = bootstrap_mean(100.0 * (correct[name] - correct["LoRA, r = 8"]), notes)
        trained, rate, loss, accuracy, difference = rows[name]
        assert trained == f"{training['trainable']:,}"
        assert float(rate) == training["learning_rate"]
        assert loss == f"{training['validation_loss']:.3f}"
        assert accuracy == f"{share.value:.1%} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
        shown = f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]".replace("-", "−")
        assert difference == ("" if name == "LoRA, r = 8" else shown)


def test_tinyllamas_memory_is_what_the_budget_prints(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINYLLAMA))
    (command,) = [command for command in commands() if command.startswith("clinora budget ")]
    words = command.split()
    assert words[:3] == ["clinora", "budget", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"]
    assert budget.main([str(tmp_path), *words[3:]]) == 0
    (shown,) = blocks("text", text_of(ROOT / "docs" / "gpu.md"))
    assert shown in capsys.readouterr().out
