"""Checkpoints: killed, interrupted, damaged or refused, training loses nothing that it had."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import clinora
from clinora import training
from clinora.checkpoint import BUNDLED, CheckpointError
from clinora.commands import train as train_command
from clinora.commands.train import process_group
from clinora.device import world
from clinora.notes import Note
from clinora.resume import hash_state, read_checkpoint
from clinora.training import METRICS, InterruptedTraining, TrainingConfig, train
from tests import kill_and_resume

ROOT = Path(__file__).parents[1]
NOTES = [Note(f"visit {i}: {word}", (i % 2,)) for i in range(8) for word in ("heart", "bone")]
VALIDATION = [Note(f"case {i}", (i % 2,)) for i in range(50)]
CONFIG = {
    "steps": 9, "notes_per_step": 6, "tokens_per_batch": 40, "checkpoint_every": 2,
    "validate_every": 3,
}  # fmt: skip


def fresh(dtype=torch.float32, seed=3, dropout=0.2):
    torch.manual_seed(seed)
    model = clinora.load_model("bundled", num_labels=2, dtype=dtype)
    clinora.apply_lora(model, clinora.LoRAConfig(dropout=dropout))
    tokenizer = clinora.Tokenizer(BUNDLED / "base" / "tokenizer.model")
    return clinora.Classifier(model, tokenizer, ("A", "B"), 64)


def begin(run, classifier=None, **changes):
    """Train from the beginning, or go on if changes say ``resume=True``; gives what it trained."""
    run.mkdir(exist_ok=True)
    options = {name: changes.pop(name) for name in ("identity", "resume") if name in changes}
    classifier = classifier or fresh()
    train(classifier, NOTES, VALIDATION, TrainingConfig(**CONFIG | changes), run, **options)
    return clinora.lora_state_dict(classifier.model)


def stop_at(step, monkeypatch, number=signal.SIGTERM):
    """Send this process a signal in the middle of a step."""
    real = training.learning_rate_factor

    def factor(at, config):
        if at == step:
            signal.raise_signal(number)
        return real(at, config)

    monkeypatch.setattr(training, "learning_rate_factor", factor)


def steps(run):
    return sorted(int(path.stem.split("-")[1]) for path in (run / "checkpoint").glob("step-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted training gives."""
    return begin(tmp_path_factory.mktemp("whole"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, monkeypatch, dtype):
    expected = begin(tmp_path / "a", fresh(dtype))
    with monkeypatch.context() as patch, pytest.raises(InterruptedTraining, match="after step 5"):
        stop_at(5, patch)
        begin(tmp_path / "b", fresh(dtype))
    # Another seed: all that was random must come from the checkpoint.
    went_on = begin(tmp_path / "b", fresh(dtype, seed=99), resume=True)
    assert same(went_on, expected)
    # So must what has not told yet, such as the steps since the scaler's factor changed.
    a = read_checkpoint(tmp_path / "a" / "checkpoint" / "step-000009.safetensors")
    b = read_checkpoint(tmp_path / "b" / "checkpoint" / "step-000009.safetensors")
    assert same(a.tensors, b.tensors)
    assert a.numbers | {"seconds": 0} == b.numbers | {"seconds": 0}


def test_the_best_so_far_and_the_patience_outlast_an_interruption(tmp_path, monkeypatch):
    """Best is step 3; the third worse validation, step 12, is the last step."""

    def validate(*_):
        return {"validation_loss": next(losses), "validation_accuracy": 0.5}

    monkeypatch.setattr(training, "validate", validate)
    losses, options = iter([0.5, 0.7, 0.6, 0.5]), {"steps": 30, "patience": 3}
    expected = begin(tmp_path / "a", **options)
    assert steps(tmp_path / "a") == [10, 12]
    losses = iter([0.5, 0.7, 0.6, 0.5])
    with monkeypatch.context() as patch, pytest.raises(InterruptedTraining, match="after step 7"):
        stop_at(7, patch)
        begin(tmp_path / "b", **options)
    assert same(begin(tmp_path / "b", resume=True, **options), expected)
    assert steps(tmp_path / "b") == [10, 12]


def test_the_history_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch, pytest.raises(InterruptedTraining):
        stop_at(4, patch, signal.SIGINT)
        begin(tmp_path)
    # A kill may leave lines beyond the checkpoint, the last of them cut.
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5}\n{"st')
    begin(tmp_path, resume=True)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_a_second_ctrl_c_ends_at_once_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with (
        pytest.raises(KeyboardInterrupt),
        training.Interruption(torch.device("cpu")) as interruption,
    ):
        assert not interruption.requested()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested()
        assert interruption.number == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_after_the_last_step_is_not_lost(tmp_path, monkeypatch, whole):
    """What follows training may take long."""
    real = training.validate

    def validate(*args):
        if (tmp_path / "checkpoint" / "step-000008.safetensors").exists():
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(InterruptedTraining, match="after step 9"):
        patch.setattr(training, "validate", validate)
        begin(tmp_path)
    assert same(begin(tmp_path, resume=True), whole)


def test_a_signal_before_the_first_step_loses_nothing(tmp_path, monkeypatch, whole):
    real = training.finished

    def finished(*args):
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(InterruptedTraining, match="after step 0"):
        patch.setattr(training, "finished", finished)
        begin(tmp_path)
    assert same(begin(tmp_path, resume=True), whole)


def test_a_signal_in_a_step_with_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InterruptedTraining, match="after step 4"):
        stop_at(4, patch)
        begin(tmp_path)
    assert steps(tmp_path) == [2, 4]


def test_a_validation_that_is_not_a_number_is_not_the_best(tmp_path, monkeypatch):
    losses, seen = iter([math.nan, 0.7, math.nan]), []

    def validate(classifier, *_):
        trained = clinora.lora_state_dict(classifier.model)
        seen.append({name: tensor.clone() for name, tensor in trained.items()})
        return {"validation_loss": next(losses), "validation_accuracy": 0.5}

    monkeypatch.setattr(training, "validate", validate)
    assert same(begin(tmp_path), seen[1])


def test_the_last_two_checkpoints_are_kept(tmp_path):
    begin(tmp_path)
    assert steps(tmp_path) == [8, 9]


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / ".step-000002.safetensors.abc").write_bytes(b"half")
    begin(tmp_path)
    assert steps(tmp_path) == [8, 9]


def test_killed_before_the_first_checkpoint_it_begins_again(tmp_path, whole, capsys):
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    assert same(begin(tmp_path, resume=True), whole)
    assert "no checkpoint" in capsys.readouterr().out
    assert len((tmp_path / METRICS).read_text().splitlines()) == 9


def test_checkpoints_of_an_earlier_training_are_removed(tmp_path):
    """By their numbers alone they would pass for the newest."""
    begin(tmp_path, steps=4)
    (tmp_path / METRICS).unlink()  # otherwise the folder is refused
    begin(tmp_path, steps=3)
    assert steps(tmp_path) == [2, 3]


def test_an_infinite_gradient_stops_before_it_spoils_a_checkpoint(tmp_path):
    classifier = fresh()
    parameter = classifier.model.model.layers[1].self_attn.q_proj.lora_B
    calls = iter(range(1, 10))
    parameter.register_hook(lambda grad: grad * (torch.inf if next(calls) == 4 else 1))
    with pytest.raises(FloatingPointError, match=r"at step 4.*step-000002"):
        begin(tmp_path, classifier)
    assert steps(tmp_path) == [2]
    assert parameter.isfinite().all()


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "number", "foreign"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, whole, capsys, damage):
    begin(tmp_path)
    newest = tmp_path / "checkpoint" / "step-000009.safetensors"
    data = newest.read_bytes()
    bit, foreign = bytearray(data), {"a": torch.zeros(1)}
    bit[-100] ^= 1
    number = data.replace(rb"\"step\": 9", rb"\"step\": 5")
    assert number != data
    changed = {
        "cut": data[:-1],
        "empty": b"",
        "bit": bit,
        "number": number,
        "foreign": save(foreign),
    }
    newest.write_bytes(changed[damage])
    assert same(begin(tmp_path, resume=True), whole)
    assert "step-000009.safetensors is damaged" in capsys.readouterr().out
    assert steps(tmp_path) == [8, 9]  # the whole one stays beside the new one


def test_without_a_whole_checkpoint_it_does_not_begin_again_in_silence(tmp_path):
    begin(tmp_path)
    for path in (tmp_path / "checkpoint").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        begin(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"learning_rate": 0.5}, r"training.learning_rate: 0.002 then, 0.5 now"),
        ({"seed": 1}, r"training.seed: 0 then, 1 now"),
        ({"identity": {"base": {"sha256": "b"}}}, r'base.sha256: "a" then, "b" now'),
        ({"identity": {}}, r'base: \{"sha256": "a"\} then, null now'),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_the_difference(
    tmp_path, changes, difference
):
    begin(tmp_path, identity={"base": {"sha256": "a"}})
    with pytest.raises(CheckpointError, match=difference):
        begin(tmp_path, resume=True, **{"identity": {"base": {"sha256": "a"}}} | changes)


def test_notes_in_another_order_are_other_data(tmp_path):
    """The order of training is one of positions."""
    begin(tmp_path)
    with pytest.raises(CheckpointError, match="order: "):
        train(fresh(), NOTES[::-1], VALIDATION, TrainingConfig(**CONFIG), tmp_path, resume=True)


def test_the_same_texts_with_other_labels_are_other_data(tmp_path):
    begin(tmp_path)
    notes = [dataclasses.replace(note, filed=(1 - note.filed[0],)) for note in NOTES]
    with pytest.raises(CheckpointError, match="order: "):
        train(fresh(), notes, VALIDATION, TrainingConfig(**CONFIG), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"labels": ("B", "A")}, r'labels: \["A", "B"\] then, \["B", "A"\] now'),
        ({"token_limit": 63}, "token_limit: 64 then, 63 now"),
        ({"dtype": torch.bfloat16}, 'precision: "float32" then, "bfloat16" now'),
    ],
    ids=["labels", "token limit", "precision"],
)
def test_a_checkpoint_of_another_classifier_is_refused(tmp_path, change, difference):
    begin(tmp_path, steps=1)
    classifier = fresh()
    for name, value in change.items():
        setattr(classifier, name, value)
    with pytest.raises(CheckpointError, match=difference):
        begin(tmp_path, classifier, resume=True, steps=1)


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        ({"rank": 4}, r"lora_A: \[8, 320\] then, \[4, 320\] now"),
        ({"targets": ("q_proj",)}, r"v_proj.lora_A: \[8, 320\] then, null now"),
        ({"targets": ("q_proj", "v_proj", "o_proj")}, r"o_proj.lora_A: null then, \[8, 320\] now"),
    ],
    ids=["other shapes", "fewer", "more"],
)
def test_a_checkpoint_of_other_parameters_is_refused(tmp_path, config, difference):
    begin(tmp_path, steps=1)
    model = clinora.load_model("bundled", num_labels=2, dtype=torch.float32)
    clinora.apply_lora(model, clinora.LoRAConfig(**config))
    classifier = clinora.Classifier(model, fresh().tokenizer, ("A", "B"), 64)
    before = clinora.lora_state_dict(model)
    with pytest.raises(CheckpointError, match=difference):
        begin(tmp_path, classifier, resume=True, steps=1)
    assert same(clinora.lora_state_dict(model), before)


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    """A step would have other notes."""
    begin(tmp_path, steps=1)
    (path,) = (tmp_path / "checkpoint").iterdir()
    saved = read_checkpoint(path)
    saved.numbers["identity"]["processes"] = 2
    text = json.dumps(saved.numbers)
    metadata = {"state": text, "sha256": hash_state(text, saved.tensors)}
    path.write_bytes(save(saved.tensors, metadata=metadata))
    with pytest.raises(CheckpointError, match="processes: 2 then, 1 now"):
        begin(tmp_path, resume=True, steps=1)


@pytest.mark.parametrize("version", [None, 1])
def test_a_checkpoint_of_a_version_with_other_steps_is_refused(tmp_path, version):
    """The first version wrote no version."""
    begin(tmp_path, steps=1)
    (path,) = (tmp_path / "checkpoint").iterdir()
    saved = read_checkpoint(path)
    if version is None:
        del saved.numbers["loop"]
    else:
        saved.numbers["loop"] = version
    text = json.dumps(saved.numbers)
    metadata = {"state": text, "sha256": hash_state(text, saved.tensors)}
    path.write_bytes(save(saved.tensors, metadata=metadata))
    with pytest.raises(CheckpointError, match=r"another version.*train again in another folder"):
        begin(tmp_path, resume=True, steps=1)


@pytest.fixture
def without_rights():
    """Give up root's right to write anywhere, if this is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("read_only", [".", "checkpoint"])
def test_a_folder_that_cannot_be_written_leaves_the_old_checkpoint_whole(
    tmp_path, request, read_only
):
    begin(tmp_path, steps=3)
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()}
    for folder in (tmp_path, tmp_path / "checkpoint"):
        folder.chmod(0o777)
    (tmp_path / METRICS).unlink()
    (tmp_path / read_only).chmod(0o555)
    for parent in (tmp_path.parent, tmp_path.parent.parent, tmp_path.parent.parent.parent):
        if os.geteuid() == 0:
            parent.chmod(0o755)
    classifier = fresh()
    request.getfixturevalue("without_rights")
    message = rf"{tmp_path / read_only}.* The last checkpoint is .*step-000003.safetensors\."
    with pytest.raises(PermissionError, match=message):
        begin(tmp_path, classifier)
    after = {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()}
    assert after == before


def test_an_error_does_not_stand_behind_a_progress_bar(tmp_path, capsys):
    (tmp_path / "run").write_text("a file where the folder would be")
    with pytest.raises(OSError, match=r"There is no checkpoint yet\."):
        train(fresh(), NOTES, [], TrainingConfig(**CONFIG), tmp_path / "run")
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_ends_with_one_line_and_the_old_checkpoint_whole(tmp_path, capsys):
    """No file may grow beyond what the second checkpoint, with the best parameters, needs."""
    import resource

    # As many texts as give enough validation notes to choose the best parameters by.
    notes = kill_and_resume.write_notes(tmp_path / "notes.csv", texts=500)
    options = ["--notes", notes, "--run", tmp_path / "run", *kill_and_resume.OPTIONS]
    options += ["--checkpoint-every", "2", "--validate-every", "3"]
    options = [str(option) for option in options]
    model = clinora.load_model("bundled", num_labels=2)
    rank = kill_and_resume.OPTIONS[kill_and_resume.OPTIONS.index("--rank") + 1]
    clinora.apply_lora(model, clinora.LoRAConfig(rank=int(rank)))
    # float32: parameters and AdamW's two moments, in the second checkpoint the best parameters too
    trained = clinora.count_parameters(model).trainable
    most = (3 * 4 + 2) * trained
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(SystemExit) as caught:
            train_command.main(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    error = errors.splitlines()[-1]
    assert error.startswith("clinora train: ") and "File too large" in error
    assert error.endswith("step-000002.safetensors.")
    assert "Traceback" not in errors
    assert steps(tmp_path / "run") == [2]
    assert train_command.main([*options, "--resume"]) == 0


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path):
    assert kill_and_resume.show(tmp_path, "auto", kills=2, seed=1)["identical"]


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    notes = kill_and_resume.write_notes(tmp_path / "notes.csv", texts=120)
    options = ["--notes", notes, "--run", tmp_path / "run", *kill_and_resume.OPTIONS]
    options = [str(option) for option in options]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        stop_at(3, patch, signal.SIGINT)
        train_command.main(options)
    assert caught.value.code == 130
    error = capsys.readouterr().err
    assert "stopped after step 3" in error
    go_on = error.splitlines()[-1].partition("clinora train ")[2].split()
    assert train_command.main(go_on) == 0
    assert len((tmp_path / "run" / METRICS).read_text().splitlines()) == kill_and_resume.STEPS


# Several processes


def torchrun(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, options)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_alone_it_is_the_first_of_one_process():
    assert world() == (0, 1)


def save_gradient(path):
    """Compute the gradient of 13 notes, as one of the processes; the first saves it."""
    classifier = fresh(dropout=0.0)
    config = TrainingConfig(notes_per_step=13, tokens_per_batch=24)
    learner = training.Learner(classifier, config)
    examples = training.encode(classifier, VALIDATION[:13])
    batches = training.divide(examples, range(13), config, learner.device)
    learner.forward_and_backward(examples, batches)
    if learner.rank == 0:
        save_file({name: p.grad for name, p in learner.trained.items()}, path)


def save_gradient_as_a_process_of(environment, path):
    os.environ.update(environment)
    with process_group():
        save_gradient(path)


@pytest.mark.slow
def test_the_gradient_of_two_processes_is_that_of_one(tmp_path):
    """AdamW would hide a gradient of another size."""
    save_gradient(tmp_path / "1.safetensors")
    jobs = []
    for environment in kill_and_resume.environments_of_two():
        # A daemon ends with this process, even if it waits for the other.
        job = kill_and_resume.PROCESSES.Process(
            target=save_gradient_as_a_process_of,
            args=(environment, tmp_path / "2.safetensors"),
            daemon=True,
        )
        job.start()
        jobs.append(job)
    for job in jobs:
        job.join(120)
        assert job.exitcode == 0
    one = load_file(tmp_path / "1.safetensors")
    two = load_file(tmp_path / "2.safetensors")
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_what_one_does_in_larger_batches(tmp_path):
    """They have 7 and 6 notes of each step, in 3 and 2 batches; the one has them in one batch.

    AdamW divides by the gradient's size: where that is near zero, rounding becomes steps.
    """
    notes = kill_and_resume.write_notes(tmp_path / "notes.csv", texts=120)
    options = ["--notes", notes, *kill_and_resume.OPTIONS, "--dropout", "0", "--precision", "fp32"]
    options += ["--notes-per-step", "13", "--learning-rate", "2e-4"]
    log = tmp_path / "log.txt"
    two = [*options, "--run", tmp_path / "two", "--tokens-per-batch", "24"]
    for job in kill_and_resume.start_two(log, *two):
        kill_and_resume.finish(job, log)
    one = [*options, "--run", tmp_path / "one"]
    assert train_command.main(list(map(str, one))) == 0

    adapters = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=0, atol=1e-5)
    histories = [
        [json.loads(line) for line in (tmp_path / run / METRICS).read_text().splitlines()]
        for run in ("one", "two")
    ]
    for a, b in zip(*histories, strict=True):
        assert (a["notes"], a["tokens"]) == (b["notes"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    # Every validation note counts once, whoever computed it.
    assert histories[0][-1]["validation_loss"] == pytest.approx(
        histories[1][-1]["validation_loss"], abs=1e-5
    )
    assert histories[0][-1]["validation_accuracy"] == histories[1][-1]["validation_accuracy"]
    assert log.read_text().count("Report: ") == 1  # the first process alone speaks and writes
    tensors = read_checkpoint(max((tmp_path / "two" / "checkpoint").iterdir())).tensors
    assert not torch.equal(tensors["random.0.cpu"], tensors["random.1.cpu"])  # of dropout


def test_nothing_of_training_outlives_the_process_group_after_an_error(monkeypatch):
    """Otherwise the process may wait for itself for ever when it ends (one time in forty)."""
    environment, _ = kill_and_resume.environments_of_two()
    for name, value in (environment | {"WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    alive = []

    def fail():
        parallel = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        alive.append(weakref.ref(parallel))
        try:
            raise InterruptedTraining
        except InterruptedTraining:
            sys.exit(143)

    with pytest.raises(SystemExit) as caught, process_group():
        fail()
    assert caught.value.code == 143
    assert alive[0]() is None


@pytest.mark.slow
def test_a_dead_worker_ends_all_and_training_can_go_on(tmp_path):
    notes = kill_and_resume.write_notes(tmp_path / "notes.csv", texts=120)
    options = ["--notes", notes, "--run", tmp_path / "run", *kill_and_resume.OPTIONS]
    options += ["--checkpoint-every", "2", "--steps", "4000"]
    job = torchrun(*options)
    while not list(tmp_path.glob("run/checkpoint/step-*")) and job.poll() is None:
        time.sleep(0.05)
    workers = [p for p in psutil.Process(job.pid).children() if "train.py" in p.cmdline()]
    workers[1].kill()
    _, error = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "train.py: another process" in error and "torchrun --nproc-per-node=2 --" in error
    last = max(steps(tmp_path / "run"))
    log = tmp_path / "log.txt"
    jobs = kill_and_resume.start_two(log, *options, "--resume")
    while max(steps(tmp_path / "run")) <= last and jobs[0].is_alive():
        time.sleep(0.05)
    jobs[1].terminate()  # the other process learns of it, and stops after the same step
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in jobs] == [128 + signal.SIGTERM] * 2
    error = log.read_text()
    assert "damaged" not in error
    assert error.count("train.py: stopped after step ") == 1
    assert error.count(": torchrun --nproc-per-node=2 -- train.py --notes") == 1
    assert max(steps(tmp_path / "run")) > last
