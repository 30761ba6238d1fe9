"""The commands as a user calls them: whole jobs, help, Ctrl-C and bad input."""

import csv
import dataclasses
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import peft
import pytest
import torch
import transformers

import clinora
from clinora.__main__ import COMMANDS
from clinora.__main__ import main as clinora_command
from clinora.checkpoint import BUNDLED
from clinora.commands import budget as budget_command
from clinora.commands import eval as eval_command
from clinora.commands import serve as serve_command
from clinora.commands import train as train_command
from clinora.commands.train import training_errors
from clinora.training import METRICS

ROOT = Path(__file__).parents[1]
# Class is told by one word; the hash puts about a fifth of them on the test side.
WORDS = {"Heart": "cardiac", "Bone": "fracture"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.csv"
    rows = [f"visit {i}: {word},{label}" for i in range(30) for label, word in WORDS.items()]
    path.write_text("transcription,medical_specialty\n" + "\n".join(rows) + "\n")
    return path


def train(*options):
    return train_command.main(["--steps", "60", "--notes-per-step", "12", *map(str, options)])


@pytest.mark.slow
def test_train_then_eval_on_a_file_of_ones_own(notes, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--notes", notes, "--run", run, "--learning-rate", "5e-3") == 0
    printed = capsys.readouterr()
    assert "before training (20 random heads)" in printed.out
    shape = json.loads((BUNDLED / "base" / "config.json").read_text())
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    heads, keys = shape["num_attention_heads"], shape["num_key_value_heads"]
    q_and_v = 2 * width + (heads + keys) * shape["head_dim"]  # r times as many, at r = 8
    for words in (
        "Llama decoder with a sequence classification head",
        f"{layers} decoder layers, {heads} heads, {keys} for keys and values",
        f"{width} (MLP {shape['intermediate_size']})",
        f"{shape['vocab_size']:,} tokens",
        f"rotary, up to {shape['max_position_embeddings']:,}",
        "SiLU, gated",
        f"RMSNorm, eps {shape['rms_norm_eps']}",
        "q_proj, v_proj; rank 8, alpha 16",
        f"Linear({width} → 2)",
        f"{layers * 8 * q_and_v + 2 * width:,} parameters, ",
        f"{layers * 8 * q_and_v:,} LoRA, {2 * width} head",
    ):
        assert words in printed.out
    assert "60/60" in printed.err  # the progress bar
    assert "visit" not in printed.out + printed.err + (run / "metrics.jsonl").read_text()
    trained = json.loads((run / "report" / "metrics.json").read_text())
    assert trained["after"]["by_note"]["accuracy"]["value"] == 1.0
    assert trained["before"]["any_label_accuracy"][0] < 0.9
    assert {f.name for f in run.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "checkpoint", "clinora.json",
        "metrics.jsonl", "report",
    }  # fmt: skip

    (run / "report" / "metrics.json").unlink()
    assert eval_command.main(["--run", str(run)]) == 0
    measured = json.loads((run / "report" / "metrics.json").read_text())
    assert measured["after"] == trained["after"]
    picture = matplotlib.image.imread(run / "report" / "confusion.png")
    assert picture.std() > 0.05  # something is drawn


def test_the_order_of_a_runs_labels_does_not_change_its_accuracy(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accuracy = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        classifier = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
        classifier.labels = tuple(clinora.PUBLISHED_CLASSES[index] for index in order)
        head = classifier.model.score.weight
        head.data = head.data[order]
        classifier.record_training([], {})
        classifier.save(tmp_path / "run")
        options = ["--run", "run", "--notes", "bundled", "--device", "cpu", "--precision", "fp32"]
        assert eval_command.main(options) == 0
        metrics = json.loads(Path("run", "report-bundled", "metrics.json").read_text())
        accuracy.append(metrics["after"]["by_note"]["accuracy"]["value"])
        shutil.rmtree("run")
    assert 0 < accuracy[0] == accuracy[1] < 1


def test_a_run_of_a_file_with_other_columns_is_measured_on_the_bundled_notes(
    small_run, tmp_path, capsys
):
    classifier = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
    classifier.record_training([], {})
    classifier.data = dataclasses.replace(
        classifier.data, source="mine.csv", text_column="report", label_column="kind"
    )
    classifier.save(tmp_path / "run")
    options = ["--run", str(tmp_path / "run"), "--notes", "bundled", "--device", "cpu"]
    assert eval_command.main(options) == 0
    assert "\n157 notes in 188 rows\n" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 7])
def test_eval_draws_the_random_heads_that_train_drew(notes, tmp_path, seed):
    run = tmp_path / "run"
    assert train("--notes", notes, "--run", run, "--steps", 1, "--seed", seed) == 0
    report = run / "report" / "metrics.json"
    before = json.loads(report.read_text())["before"]
    report.unlink()
    assert eval_command.main(["--run", str(run)]) == 0
    assert json.loads(report.read_text())["before"] == before


def test_the_name_of_the_bundled_run_is_not_a_folder(notes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--notes", notes, "--run", "bundled"]
    assert_refused(train_command, options, capsys, "--run bundled .* choose another")
    assert not Path("bundled").exists()


def test_the_report_of_the_bundled_run_replaces_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Path("runs", "bundled")
    run.mkdir(parents=True)
    (run / "clinora.json").write_text("{}")
    assert_refused(eval_command, [], capsys, "runs.bundled holds another run.*--report")
    assert [path.name for path in run.iterdir()] == ["clinora.json"]


def test_a_second_file_may_have_its_own_splits_whatever_the_runs_were(notes, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--notes", notes, "--run", run, "--steps", 1, "--split", "rows") == 0
    second = tmp_path / "second.csv"
    rows = [f"call {i}: {word},{label},test" for i in range(3) for label, word in WORDS.items()]
    second.write_text("transcription,medical_specialty,part\n" + "\n".join(rows) + "\n")
    options = ["--run", str(run), "--notes", str(second), "--split-column", "part"]
    assert eval_command.main(options) == 0
    assert "\n6 notes in 6 rows\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"]], ids=" ".join)
def test_peft_reads_what_train_wrote(notes, tmp_path, targets):
    run = tmp_path / "run"
    options = ["--notes", notes, "--run", run, "--precision", "fp32", "--steps", "5"]
    assert train(*options, "--targets", *targets) == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        BUNDLED / "base", num_labels=2, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, run).eval()
    classifier = clinora.Classifier.load(run, device="cpu", precision="fp32")
    text = "visit 7: fracture"
    with torch.no_grad():
        logits = theirs(torch.tensor([classifier.tokenizer.encode(text)])).logits[0]
    ours = torch.tensor(classifier([text])[0].probabilities)
    torch.testing.assert_close(ours, logits.softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_own_splits_are_trained_on_and_a_second_file_is_measured(tmp_path, capsys):
    sides = ["train"] * 8 + ["dev"] * 3 + ["test"] * 4
    rows = [
        f"visit {i}: {word},{label},{side}"
        for i, side in enumerate(sides)
        for label, word in WORDS.items()
    ]
    own = tmp_path / "own.csv"
    own.write_text("transcription,medical_specialty,part\n" + "\n".join(rows) + "\n")
    run = tmp_path / "run"
    assert train("--notes", own, "--split-column", "part", "--run", run, "--steps", "1") == 0
    assert "16 training, 6 validation, 8 test" in capsys.readouterr().out
    assert eval_command.main(["--run", str(run)]) == 0
    assert "\n8 notes in 8 rows\n" in capsys.readouterr().out

    second = tmp_path / "second.csv"  # it lacks a class, and the column of the splits
    second.write_text(f"transcription,medical_specialty\n{WORDS['Heart']} again,Heart\n")
    assert eval_command.main(["--run", str(run), "--notes", str(second)]) == 0
    printed = capsys.readouterr().out
    assert "\n1 notes in 1 rows\n" in printed
    # The simpler classifiers have learned from the run's training notes, as the run has.
    assert re.search(r"\nTF-IDF \+ linear model +100", printed)
    own.write_text(own.read_text() + "one more,Heart,train\n")
    assert eval_command.main(["--run", str(run), "--notes", str(second)]) == 0
    assert "TF-IDF" not in capsys.readouterr().out


@pytest.mark.slow
def test_notes_that_the_run_has_seen_are_not_measured(notes, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--notes", notes, "--run", run, "--steps", "1") == 0
    more = tmp_path / "more.csv"
    more.write_text(notes.read_text() + "a new note,Heart\n")
    capsys.readouterr()
    assert eval_command.main(["--run", str(run), "--notes", str(more)]) == 0
    test = len(clinora.read_notes(notes).on("test"))
    assert f"\n{test + 1} notes in {test + 1} rows\n" in capsys.readouterr().out
    assert json.loads((run / "report-more" / "metrics.json").read_text())["trained_on"] == 0


@pytest.mark.slow
def test_measuring_on_seen_notes_must_be_asked_for_and_is_said_everywhere(notes, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--notes", notes, "--run", run, "--steps", "1") == 0
    read = clinora.read_notes(notes)
    seen = len(read.on("training")) + len(read.on("validation"))
    only_training = tmp_path / "training.csv"
    rows = [f"{note.text},{read.classes[note.labels[0]]}" for note in read.on("training")]
    only_training.write_text("\n".join(["transcription,medical_specialty", *rows]) + "\n")
    capsys.readouterr()
    assert_refused(
        eval_command, ["--run", run, "--notes", only_training], capsys, "trained on all .* notes"
    )
    assert eval_command.main(["--run", str(run), "--include-seen"]) == 0
    said = f"NOT A TEST: the run was trained or calibrated on {seen} of these"
    assert said in capsys.readouterr().out
    report = run / "report-seen"
    assert said in (report / "report.md").read_text()
    assert json.loads((report / "metrics.json").read_text())["trained_on"] == seen


@pytest.mark.slow
def test_eval_with_no_option_measures_the_bundled_adapter(capsys):
    assert eval_command.main([]) == 0
    with open(BUNDLED / "notes.csv", encoding="utf-8", newline="") as file:
        texts = [row["transcription"] for row in csv.DictReader(file)]
    expected = f"\n{len(set(texts))} notes in {len(texts)} rows"
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_training_on_the_bundled_base_and_notes_beats_the_base(tmp_path, monkeypatch):
    """The job that train.py does without options, but shorter."""
    monkeypatch.chdir(tmp_path)
    shorter = ["--steps", "60", "--notes-per-step", "8", "--token-limit", "128"]
    assert train_command.main(shorter) == 0
    (run,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    before, spread = metrics["before"]["any_label_accuracy"]
    assert metrics["after"]["by_note"]["accuracy"]["value"] > before + spread


def test_what_the_scripts_write_beside_them_is_not_committed():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"runs/", f"{serve_command.FLAGS}/"} <= set(ignored)


def test_a_run_is_never_written_over(notes, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("data")
    assert_refused(
        train_command, ["--notes", notes, "--run", tmp_path / "run"], capsys, "not empty"
    )
    assert (tmp_path / "run" / "precious").read_text() == "data"


def test_a_run_killed_at_its_very_beginning_can_begin_again(tmp_path):
    (tmp_path / f".{METRICS}.abc").touch()
    train_command.check_run_folder(tmp_path, resume=False)


BAD_FILES = {
    "missing column": (b"note,medical_specialty\na,A\n", "no column 'transcription'"),
    "empty": (b"", "is empty"),
    "one class": (b"transcription,medical_specialty\na,A\nb,A\n", "leaves 1 class"),
    "not UTF-8": (b"transcription,medical_specialty\n\xe9,A\nb,B\n", "not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("command", [train_command, eval_command], ids=["train", "eval"])
def test_a_bad_file_is_one_clear_line(tmp_path, capsys, command, kind):
    content, message = BAD_FILES[kind]
    (tmp_path / "bad.csv").write_bytes(content)
    if command is eval_command and kind == "one class":
        message = "has no notes of class"
    assert_refused(command, ["--notes", tmp_path / "bad.csv"], capsys, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_read_enough_is_no_error(options):
    """As in ``clinora budget bundled | head -n 0``."""
    command = [sys.executable, *options, "-m", "clinora", "budget", "bundled"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--notes", "."], "is an empty folder"),
        (["--notes", "nowhere.csv"], "nowhere.csv"),
        (["--base", "a/b/c"], "there is no folder a/b/c"),
        (["--revision", "v2"], "revision v2 of bundled, which is here"),
        (["--base", ".", "--revision", "v2"], r"revision v2 of \., which is here"),
        (["--targets", "q_prj"], "no layer is named 'q_prj'.*q_proj"),
        (["--rank", "161"], "rank 161 is too large"),
        (["--rank", "0"], "at least 1"),
        (["--token-limit", "1025"], "token limit 1025"),
        (["--device", "tpu"], "'tpu' is not available"),
        (["--precision", "int4"], "expected auto, bf16"),
        (["--steps", "0"], "steps is 0"),
        (["--learning-rate", "1e39"], "learning_rate is 1e.39: expected at most 1"),
        (["--promise", "95"], "promised share is 95"),
        (["--device", "cpu:x"], "device 'cpu:x'"),
        (["--classes", "Dentistry", "Surgery"], "no notes of class 'Dentistry'"),
    ],
)
def test_a_bad_option_is_one_clear_line(capsys, tmp_path, options, message):
    assert_refused(train_command, options, capsys, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["--accumulate", "4"], ["--accumulate"]])
def test_the_option_that_older_versions_had_names_the_one_to_use(capsys, words):
    with pytest.raises(SystemExit) as caught:
        train_command.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--accumulate" in error and "--notes-per-step" in error


@pytest.mark.parametrize(
    ("error", "is_out_of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_only_a_lack_of_memory_is_told_as_one(tmp_path, capsys, error, is_out_of_memory):
    with (
        pytest.raises((SystemExit, RuntimeError)) as caught,
        training_errors("clinora train", tmp_path, "To resume: …"),
    ):
        raise error
    assert isinstance(caught.value, SystemExit) == is_out_of_memory
    assert ("--tokens-per-batch" in capsys.readouterr().err) == is_out_of_memory


def test_a_run_that_is_not_there_is_one_clear_line(capsys):
    assert_refused(eval_command, ["--run", "nowhere"], capsys, "there is no run nowhere")


def test_the_root_scripts_are_the_commands():
    for name in ("train", "eval", "serve"):
        script = importlib.import_module(name)
        assert script.main is importlib.import_module(f"clinora.commands.{name}").main


@pytest.mark.parametrize("folder", ["runs/deep", "file/run"])
def test_a_folder_that_cannot_be_made_is_one_clear_line(notes, tmp_path, capsys, folder):
    (tmp_path / "runs").write_text("a file stands where a folder should be made")
    (tmp_path / "file").write_text("")
    options = ["--notes", notes, "--steps", "1", "--run", folder]
    assert_refused(train_command, options, capsys, "give another with --run")
    assert_refused(eval_command, ["--report", folder], capsys, "give another with --report")


# --- the forms in which a command is typed --------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "train"),
    [
        ("eval.py", "python train.py"),
        ("clinora eval", "clinora train"),
        ("python -m clinora eval", "python -m clinora train"),
    ],
)
def test_a_message_has_the_form_of_the_command_in_use(capsys, typed, train):
    with pytest.raises(SystemExit):
        eval_command.main(["--run", "nowhere"], typed)
    error = capsys.readouterr().err
    assert error.startswith(f"{typed}: ")
    assert f" {train} --run nowhere" in error


@pytest.mark.parametrize("program", ["clinora", "python -m clinora"])
def test_clinora_runs_the_command_that_it_is_given(capsys, program):
    with pytest.raises(SystemExit) as caught:
        clinora_command(["eval", "--run", "nowhere"], program)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"{program} eval: there is no run nowhere")


def test_clinora_budget_is_the_budget_command(capsys):
    words = [str(BUNDLED / "base" / "config.json"), "--rank", "3"]
    assert clinora_command(["budget", *words]) == 0
    printed = capsys.readouterr().out
    assert budget_command.main(words) == 0
    assert capsys.readouterr().out == printed
    assert "LoRA r=3" in printed


@pytest.mark.parametrize("words", [[], ["trian"], ["--steps", "3"]])
def test_clinora_without_a_known_command_names_those_there_are(capsys, words):
    with pytest.raises(SystemExit) as caught:
        clinora_command(words)
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_gives_the_default_of_every_option(capsys, name):
    with pytest.raises(SystemExit) as caught:
        clinora_command([name, "--help"])
    assert caught.value.code == 0
    *_, options = re.split(r"^options:\n", capsys.readouterr().out, flags=re.MULTILINE)
    entries = re.split(r"^  (?=-)", options, flags=re.MULTILINE)[1:]
    assert len(entries) > 5
    in_one_line = [" ".join(entry.split()) for entry in entries]
    without = [line for line in in_one_line if not re.search(r"\((default: |required\))", line)]
    assert [entry.split()[0] for entry in without] == ["-h,"]


@pytest.mark.parametrize(("option", "default"), [("rank", "8"), ("steps", "200"), ("alpha", "16")])
def test_the_defaults_of_help_are_those_of_the_configurations(capsys, option, default):
    args = train_command.build_parser().parse_args([])
    config = clinora.LoRAConfig() if option in ("rank", "alpha") else clinora.TrainingConfig()
    assert getattr(args, option) == getattr(config, option) == float(default)


@pytest.mark.slow
def test_help_of_what_needs_no_model_brings_no_pytorch():
    """As PyTorch takes seconds to import."""
    code = (
        "import sys, clinora.__main__, clinora.commands.train, clinora.commands.budget\n"
        "from clinora.commands import eval, serve\n"
        "eval.build_parser().format_help(), serve.build_parser().format_help()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slow_part"),
    [
        ("train", "clinora.notes.find_notes"),
        ("eval", "clinora.classifier.find_base"),
        ("serve", "clinora.classifier.find_base"),
        ("budget", "clinora.checkpoint.find_config"),
    ],
)
def test_ctrl_c_ends_with_status_130_and_one_line(monkeypatch, capsys, name, slow_part):
    def press_ctrl_c(*_, **__):
        signal.raise_signal(signal.SIGINT)

    words = {"serve": ["--port", "0"], "budget": ["bundled"]}.get(name, [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(slow_part, press_ctrl_c)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
            clinora_command([name, *words])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert caught.type is SystemExit
    assert caught.value.code == 130
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.slow
def test_ctrl_c_after_training_says_how_to_go_on(notes, tmp_path, monkeypatch, capsys):
    def press_ctrl_c(*_, **__):
        signal.raise_signal(signal.SIGINT)

    options = ["--notes", str(notes), "--run", str(tmp_path / "run"), "--steps", "1"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr("clinora.evaluation.assess", press_ctrl_c)
        clinora_command(["train", *options])
    assert caught.value.code == 130
    errors = capsys.readouterr().err
    found = re.search("^To resume: clinora (train .*)$", errors, re.MULTILINE)
    assert found, errors
    assert clinora_command(found[1].split()) == 0
    assert (tmp_path / "run" / "report" / "report.md").is_file()


def assert_refused(command, options, capsys, message):
    """Expect exit status 2 and one line on standard error."""
    with pytest.raises(SystemExit) as caught:
        command.main([str(option) for option in options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
