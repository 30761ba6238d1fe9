"""The README: its code runs, its commands have the options they are given, its figures are true."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clinora
from clinora.checkpoint import BUNDLED
from clinora.commands import budget
from tools import compare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands():
    """Every ``python …`` or ``clinora …`` of a shell block or between backquotes.

    torchrun's are taken as Python's.
    """
    text = README + SERVING
    lines = "\n".join(blocks("sh", text)).splitlines() + re.findall(r"`([^`\n]+)`", text)
    lines = [re.sub(r"^torchrun .*-- ", "python ", line) for line in lines]
    command = re.compile(r"(?:python (?!-m venv)|clinora (?:train|eval|serve|budget))[^&#>]*")
    found = {command.search(line) for line in lines}
    return sorted({match[0].strip() for match in found if match})


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *steps, unit_test = blocks("python")
    for step in steps:
        exec(step, {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    names = {}
    exec(unit_test, names)
    (test,) = (value for name, value in names.items() if name.startswith("test_"))
    test()
    monkeypatch.setattr(clinora, "apply_lora", lambda model, config: None)  # all of it trains
    with pytest.raises(AssertionError):
        test()


@pytest.mark.slow
def test_the_commands_have_the_options_that_they_are_given():
    helps = {}
    assert len(commands()) > 10
    for command in commands():
        words = command.split()
        script = words[1:3] if words[1] == "-m" else words[1:2]
        if words[0] == "clinora" or script == ["-m", "clinora"]:
            name = words[words.index("clinora") + 1]
            script = ["-m", "clinora", name]
        if script[-1] == "pip":
            continue
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if tuple(script) not in helps:
            asked = [sys.executable, *script, "--help"]
            run = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
            helps[tuple(script)] = set(re.findall(r"--[a-z-]+", run.stdout))
        assert options <= helps[tuple(script)], command


def test_links_and_pictures_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert "docs/page.png" in links and "docs/lora.png" in links
    assert all((ROOT / link).exists() for link in links)


def test_the_tree_names_what_there_is():
    (tree,) = re.findall(r"^## The tree\n+```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?:clinora/)?\w+(?:\.py|/)(?=\s)", tree))
    assert not [name for name in named if not (ROOT / name).exists()]
    modules = {f"clinora/{path.name}" for path in (ROOT / "clinora").glob("[a-z]*.py")}
    folders = {"notebooks/", "benchmarks/", "tools/", "docs/", "tests/", "examples/"}
    assert modules | folders <= named


def test_the_counts_are_those_of_the_closed_form():
    full, low = 10_000 * 20_000, clinora.lora_parameter_count(10_000, 20_000, 8)
    for figure in (f"{full:,}", f"{low:,}", f"{full / low:.0f} times", "1,136,640", "55,360"):
        assert figure in README
    assert 22 * 8 * (2048 + 2048 + 256 + 2048) + 5 * 2048 == 1_136_640
    model = clinora.load_model("bundled", num_labels=5)
    clinora.apply_lora(model, clinora.LoRAConfig())
    assert clinora.count_parameters(model).trainable == 55_360


def test_the_results_are_those_of_the_bundled_report():
    report = json.loads((BUNDLED / "adapter" / "report" / "metrics.json").read_text())
    after, before = report["after"], report["before"]
    majority, tf_idf = report["baselines"][:2]

    def say(share):
        return f"{share['value']:.1%} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"

    measures = ("any_label_accuracy", "accuracy")
    rows = {
        "before, 20 random heads": [f"{before[m][0]:.1%} ± {before[m][1]:.1%}" for m in measures],
        "majority class": [say(majority[m]) for m in measures],
        "LoRA, r = 8 on q_proj and v_proj": [
            say(after[b]["accuracy"]) for b in ("by_note", "by_row")
        ],
        "TF-IDF + logistic regression": [say(tf_idf[m]) for m in measures],
        "possible at best on these texts": ["100%", f"{report['test_ceiling']:.1%}"],
    }
    assert tf_idf["name"] == "TF-IDF + logistic regression"
    for name, (notes, of_rows) in rows.items():
        assert f"| {name} | {notes} | {of_rows} |" in README
    text, gain, answered = README.replace("\n", " "), report["against"], after["answered"]
    for words in (
        f"passes {report['ceiling']:.1%} of the rows",
        f"still {-100 * gain['value']:.1f} points "
        f"[{-100 * gain['high']:.1f}, {-100 * gain['low']:.1f}] better",
        f"it answers {answered['coverage']['value']:.1%} of the test notes by itself, "
        f"{answered['accuracy']['value']:.1%} of them right",
        "1,204 training, 191 validation and 367 test texts",
    ):
        assert words in text
    assert "1,204 training, 191 validation, 367 test" in report["about"]


def test_what_the_rank_buys_is_the_table_of_the_committed_results():
    rows = json.loads((ROOT / "notebooks/results/mtsamples/results.json").read_text())
    for line in compare.table(rows).splitlines():
        assert line in README


def test_tinyllamas_memory_is_what_the_budget_prints(tmp_path, capsys):
    shape = {
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (line,) = [c for c in commands() if "clinora.budget" in c]
    words = line.split()[3:]
    budget.main([str(tmp_path), *words[1:]])
    out = capsys.readouterr().out
    (shown,) = re.findall(r"^```\n(4 × 512 tokens.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert shown in out


def test_all_linears_is_that_of_the_committed_results():
    path = ROOT / "notebooks/results/mtsamples-all-linears/results.json"
    (row,) = json.loads(path.read_text())
    low, high = 100 * row["low"], 100 * row["high"]
    assert f"{row['any_label_accuracy']:.1%} [{low:.1f}, {high:.1f}] with {row['trainable']:,}" in (
        README.replace("\n", " ")
    )
