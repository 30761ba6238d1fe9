"""The benchmarks: what they count is right, and each of them runs at a small size."""

import contextlib
import functools
import importlib
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clinora
from benchmarks import common
from clinora.llama import LlamaConfig, LlamaForSequenceClassification
from clinora.lora import apply_lora

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
SCRIPTS = (
    "explain", "gpu", "job", "lengths", "inference", "lesson", "start", "scaling", "shape", "step",
    "nf4", "observing",
)  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_printed(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert exit_.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.fixture
def adapted():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config, 3)
    apply_lora(model, common.LORA)
    return model


def test_products_of_a_step_are_those_of_the_shape(adapted):
    """First layer: no gradient enters q, k, v. Last layer: one row a note but for k and v."""
    batch = common.equal_batch(2, 8, 50)
    products = common.Products(adapted, lambda: common.our_step(adapted)(batch), backward=True)
    q, kv, mlp = 32 * 32, 2 * 16 * 32, 3 * 32 * 48
    first = 16 * (q + kv + q + mlp) + 16 * (q + mlp)
    last = 2 * (2 * (q + q + mlp) + 16 * kv)
    head = 2 * 2 * 3 * 32
    assert products.flops == 2 * (first + last + head)


def test_products_of_inference_have_no_backward(adapted):
    def run():
        with torch.inference_mode():
            adapted(*common.equal_batch(2, 8, 50))

    products = common.Products(adapted, run, backward=False)
    assert products.flops == 2 * (
        16 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
        + 2 * (2 * 32 * 32 + 3 * 32 * 48)
        + 16 * 2 * 16 * 32
        + 2 * 3 * 32
    )


def test_sides_alternate_after_a_warm_up():
    calls = []
    seconds = common.alternate({n: lambda n=n: calls.append(n) for n in ("a", "b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_ratios_say_how_many_times_faster():
    assert common.ratios({"ours": [1.0, 2.0], "theirs": [3.0, 2.0]}) == [3.0, 1.0]


def test_a_process_reports_what_it_held():
    """A new process: in this one an earlier test may have held more."""
    code = "import torch; from benchmarks.common import peak_bytes as peak\n"
    code += "before = peak(); torch.ones(50_000_000); print(peak() - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 190e6 < int(done.stdout) < 260e6


@pytest.mark.slow
def test_the_share_of_the_matmul_rate_is_of_our_products_alone(capsys):
    step = importlib.import_module("benchmarks.step")
    options = ["--batch", "2", "--tokens", "8", "--repetitions", "1", "--threads", "1"]
    assert step.main(["bundled", *options]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["ours"].endswith("%") and not rows["theirs"].endswith("%")


FIRST_MARK = """
import sys, time
from benchmarks import start
imported = []
time.perf_counter = lambda: imported.append(set(sys.modules)) or 0.0
start.main(["bundled", "--tokens", "8", "--side", "theirs"])
assert {"peft", "transformers.models.auto.modeling_auto"} <= imported[0]
"""


@pytest.mark.slow
def test_loading_does_not_time_what_the_import_has_timed():
    subprocess.run([sys.executable, "-c", FIRST_MARK], check=True, cwd=ROOT)


def in_this_process(module, *words):
    """Do what a benchmark does in a process of its own; imports alone take seconds there."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert importlib.import_module(module).main(list(words)) == 0
    return json.loads(printed.getvalue().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["job", "--sample", "4", "--token-limit", "16"],
        ["lengths", "bundled", "--sample", "4", "--token-limit", "16"],
        ["inference", "--sample", "3"],
        ["inference", "--one-note", "bundled", "--tokens", "16"],
        ["start", "bundled", "--tokens", "8"],
        ["scaling", "--width", "64", "--notes", "1", "--tokens", "8", "--layers", "1"],
        ["step", "bundled", "--batch", "2", "--tokens", "8"],
        ["step", "bundled", "--batch", "2", "--tokens", "8", "--memory"],
        ["nf4", "bundled", "--batch", "2", "--tokens", "8"],
        ["nf4", "bundled", "--batch", "2", "--tokens", "8", "--checkpointing", "--memory"],
    ],
    ids=" ".join,
)
def test_a_benchmark_runs_at_a_small_size(words, capsys, monkeypatch):
    if "--memory" not in words:  # one benchmark starts its processes
        monkeypatch.setattr(common, "in_own_process", in_this_process)
        # The peak of this process may be an earlier test's and not grow any more.
        monkeypatch.setattr(common, "peak_bytes", itertools.count(1).__next__)
        # One benchmark times the import of torch, in a new process, for each side.
        monkeypatch.setattr(common, "seconds_of", functools.cache(common.seconds_of))
    module = importlib.import_module(f"benchmarks.{words[0]}")
    assert module.main([*words[1:], "--repetitions", "1", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    if words[0] == "nf4":
        assert "nf4-double" in printed
    elif words[0] != "scaling":
        assert "theirs" in printed


@pytest.mark.slow
def test_the_benchmark_of_explanations_reads_as_many_tokens_as_the_limit(capsys):
    explain = importlib.import_module("benchmarks.explain")
    assert explain.main(["--repetitions", "1", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "512 tokens in 16 parts" in printed
    rows = re.findall(r"^(prediction|explanation) .*?  +([\d.]+) +([\d.]+)$", printed, re.M)
    assert len(rows) == 3 and all(0 < float(median) <= float(most) for _, median, most in rows)


@pytest.mark.slow
def test_the_gpu_benchmark_measures_each_side_plain_and_compiled(capsys, monkeypatch):
    """On the CPU, with the backend that runs the traced graph as it is: Inductor takes a minute."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(plain, backend="eager"))
    torch.compiler.reset()
    gpu = importlib.import_module("benchmarks.gpu")
    sizes = ["--batch", "2", "--tokens", "8", "--product", "64", "--repetitions", "1"]
    assert gpu.main(["--device", "cpu", "--bases", "bundled", *sizes, "--threads", "1"]) == 0
    names = [re.split(r" {2,}", line)[0] for line in capsys.readouterr().out.splitlines()]
    for side in ("ours", "theirs", "ours compiled", "theirs compiled"):
        assert names.count(side) == 2  # training and inference


@pytest.mark.slow
def test_the_benchmark_of_batching_runs_and_tells_a_ratio(capsys, monkeypatch):
    from benchmarks import serving

    together, run = [], clinora.Classifier.__call__
    monkeypatch.setattr(
        clinora.Classifier, "__call__", lambda self, n: together.append(len(n)) or run(self, n)
    )
    options = ["--tokens", "8", "--clients", "4", "--seconds", "0.3", "--repetitions", "1"]
    assert serving.main(options) == 0
    assert "8 tokens, batched to one at a time: " in capsys.readouterr().out
    assert max(together) > 1  # the one way batches,
    assert together[-1] == 1  # the other does not


@pytest.mark.slow
def test_the_benchmark_of_the_log_runs_and_tells_a_ratio(capsys):
    from benchmarks import observing

    options = ["--before", str(ROOT), "--tokens", "8", "--clients", "2", "--seconds", "0.3"]
    assert observing.main([*options, "--repetitions", "1"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"[1-9][\d,]* bytes of log\n", out)
    assert "with log and metrics, to before: " in out
