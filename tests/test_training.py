"""The loop, against PEFT + Transformers in a loop of its own, and its schedule and order."""

import json
import math
import os
import re
import struct
import sys
from unittest import mock

import hypothesis
import peft
import pytest
import torch
import transformers
from hypothesis import strategies

import clinora
from clinora import training
from clinora.checkpoint import BUNDLED
from clinora.notes import Note, soft_targets
from clinora.training import (
    METRICS,
    Examples,
    Learner,
    Progress,
    TrainingConfig,
    divide,
    draw_notes,
    encode,
    learning_rate_factor,
    train,
)

NOTES = [
    Note("chest pain and shortness of breath, ST elevation", (0,)),
    Note("knee replacement, the joint was exposed and cemented", (2, 4)),
    Note("CT of the chest shows no embolism", (3,)),
    Note("the patient is seen in consultation for weakness and fatigue", (1,)),
    Note("laparoscopic appendectomy under general anesthesia", (4,)),
]


VALIDATION = [
    Note(f"{text}, visit {i}", filed)
    for i in range(18)
    for text, filed in [("chest pain", (0, 2)), ("fracture of the hip", (2,)), ("CT scan", (3,))]
]


def points(run):
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def fresh(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(11)
    model = clinora.load_model("bundled", num_labels=5, dtype=dtype)
    clinora.apply_lora(model, clinora.LoRAConfig(dropout=dropout))
    tokenizer = clinora.Tokenizer(BUNDLED / "base" / "tokenizer.model")
    return clinora.Classifier(model, tokenizer, clinora.PUBLISHED_CLASSES, 512)


def test_training_reads_a_note_as_prediction_does():
    """A note made in Python may have Windows line ends and white space around it."""
    classifier = fresh()
    examples = encode(classifier, [Note(" No fever.\r\nChest pain.\n", (0,))])
    assert examples.ids[0].tolist() == classifier.tokenizer.encode("No fever.\nChest pain.")


def test_layers_that_get_no_gradient_are_named_once(tmp_path, capsys):
    classifier = fresh()
    layer = classifier.model.model.layers[0].self_attn
    layer.q_proj.forward = lambda x: torch.nn.functional.linear(x, layer.q_proj.weight)
    notes = [Note("No fever.", (0,)), Note("Chest pain.", (1,))]
    train(classifier, notes, [], TrainingConfig(steps=3), tmp_path)
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "no gradient" in line]
    assert len(lines) == 1
    assert "layers.0.self_attn.q_proj" in lines[0]
    assert "v_proj" not in lines[0]


@pytest.mark.parametrize("tokens_per_batch", [10, 60, 8192])
def test_training_follows_peft_and_transformers(tmp_path, tokens_per_batch):
    """A step is the mean over its notes, in one batch of theirs and in several of ours.

    AdamW divides by the gradient's size: where that is near zero, rounding becomes steps.
    """
    classifier = fresh()
    start = {n: t.clone() for n, t in clinora.lora_state_dict(classifier.model).items()}
    config = TrainingConfig(
        steps=10, notes_per_step=4, tokens_per_batch=tokens_per_batch, learning_rate=2e-4,
        weight_decay=0.1,
    )  # fmt: skip
    train(classifier, NOTES, [], config, tmp_path)

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        BUNDLED / "base", num_labels=5, pad_token_id=0, dtype=torch.float32
    )
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
    )
    theirs = peft.get_peft_model(base, lora).train()
    names = {f"base_model.model.{n}": n for n in start}
    wanted = {}
    for name, parameter in theirs.named_parameters():
        ours = names.get(
            name.replace(".modules_to_save.default", "").replace(".default.weight", "")
        )
        if ours is not None:
            parameter.data = start[ours].clone()
            wanted[ours] = parameter
    assert wanted.keys() == start.keys()
    ids = [classifier.tokenizer.encode(note.text) for note in NOTES]
    optimizer = torch.optim.AdamW(wanted.values(), lr=1.0, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    order = []
    for _ in range(8):  # epochs of 5 notes, for 10 steps of 4
        order += torch.randperm(len(ids), generator=draw).tolist()
    history = []
    for step in range(1, 11):
        rate = 2e-4 * (step if step == 1 else (1 + math.cos(math.pi * (step - 2) / 9)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        batch = order[4 * (step - 1) : 4 * step]
        width = max(len(ids[i]) for i in batch)
        padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in batch])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch])
        log_p = theirs(padded, attention_mask=mask).logits.log_softmax(-1)
        losses = [-log_p[row, list(NOTES[i].labels)].mean() for row, i in enumerate(batch)]
        loss = torch.stack(losses).mean()
        history.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert [point["loss"] for point in points(tmp_path)] == pytest.approx(history, abs=1e-4)
    for name, tensor in clinora.lora_state_dict(classifier.model).items():
        torch.testing.assert_close(tensor, wanted[name].detach(), rtol=0, atol=1e-5)
        assert not torch.equal(tensor, start[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_seed_gives_one_result_to_the_bit(tmp_path, dtype):
    results = []
    for run in ("a", "b"):
        classifier = fresh(dropout=0.1, dtype=dtype)
        train(classifier, NOTES, [], TrainingConfig(steps=3), tmp_path / run)
        results.append(clinora.lora_state_dict(classifier.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_only_the_adapter_and_the_head_move(tmp_path):
    classifier = fresh()
    before = {n: p.clone() for n, p in classifier.model.named_parameters()}
    train(classifier, NOTES, [], TrainingConfig(steps=3), tmp_path)
    moved = {n for n, p in classifier.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == clinora.lora_state_dict(classifier.model).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(tmp_path, dtype):
    results = []
    for recompute in (False, True):
        classifier = fresh(dropout=0.1, dtype=dtype)
        config = TrainingConfig(steps=3, activation_checkpointing=recompute)
        train(classifier, NOTES, [], config, tmp_path / str(recompute))
        results.append(clinora.lora_state_dict(classifier.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_float16_is_scaled_and_trains(tmp_path):
    """A small head makes the gradients of the first steps so small that float16 loses them."""

    def shrunk(dtype):
        classifier = fresh(dtype=dtype)
        with torch.no_grad():
            classifier.model.score.weight.mul_(1e-3)
        return classifier

    results = {}
    for dtype in (torch.float32, torch.float16):
        classifier = shrunk(dtype)
        train(
            classifier,
            NOTES,
            [],
            TrainingConfig(steps=5, learning_rate=5e-4),
            tmp_path / str(dtype),
        )
        results[dtype] = clinora.lora_state_dict(classifier.model)
    start = clinora.lora_state_dict(shrunk(torch.float32).model)
    for name, exact in results[torch.float32].items():
        moved = (exact - start[name]).norm()
        assert (results[torch.float16][name] - exact).norm() < 0.1 * moved, name


# Validation


def test_the_parameters_that_validated_best_are_kept(tmp_path):
    """The learning rate rises to the end, so the last parameters are far from the best."""
    classifier = fresh()
    config = TrainingConfig(steps=8, learning_rate=0.1, warmup=0.95, validate_every=1, patience=99)
    train(classifier, NOTES[:3], VALIDATION, config, tmp_path)
    losses = [p["validation_loss"] for p in points(tmp_path)]
    assert len(losses) == 8
    assert min(losses) < losses[-1] - 0.1  # else any way of choosing would pass
    probabilities, _ = classifier.probabilities([note.text for note in VALIDATION])
    log_p = torch.tensor(probabilities).double().log()
    loss = -torch.stack([log_p[i, list(n.labels)].mean() for i, n in enumerate(VALIDATION)]).mean()
    assert loss.item() == pytest.approx(min(losses), rel=1e-4)


def test_validation_accuracy_counts_any_label(tmp_path):
    classifier = fresh()
    train(classifier, NOTES, VALIDATION, TrainingConfig(steps=1), tmp_path)
    named = [p.index for p in classifier([note.text for note in VALIDATION])]
    right = [name in note.filed for name, note in zip(named, VALIDATION, strict=True)]
    assert points(tmp_path)[0]["validation_accuracy"] == pytest.approx(sum(right) / len(right))


def test_training_stops_early_when_validation_gets_no_better(tmp_path):
    config = TrainingConfig(steps=60, learning_rate=0.05, validate_every=2, patience=3)
    train(fresh(), NOTES[:3], VALIDATION, config, tmp_path)
    losses = [p["validation_loss"] for p in points(tmp_path) if "validation_loss" in p]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 30


def test_few_validation_notes_choose_nothing(tmp_path):
    """Validating draws no random number, and 49 notes change no bit of the result."""
    results = []
    for validation in ([], VALIDATION[:49]):
        classifier = fresh(dropout=0.1)
        config = TrainingConfig(steps=4, learning_rate=0.05, validate_every=1, patience=1)
        train(classifier, NOTES[:3], validation, config, tmp_path / f"{len(validation)}")
        results.append(clinora.lora_state_dict(classifier.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# The rest


def test_the_head_is_trained_afterwards(tmp_path):
    classifier = fresh()
    assert not classifier.model.head_trained
    train(classifier, NOTES, [], TrainingConfig(steps=1), tmp_path)
    assert classifier.model.head_trained


def test_metrics_hold_a_line_a_step_and_no_text(tmp_path):
    train(fresh(), NOTES, [], TrainingConfig(steps=3), tmp_path)
    lines = points(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert "chest" not in (tmp_path / METRICS).read_text()


def test_metrics_tell_tokens_and_padding(tmp_path):
    """Each note is padded to the longest of its batch, here all five."""
    classifier = fresh()
    train(classifier, NOTES, [], TrainingConfig(steps=1, notes_per_step=5), tmp_path)
    lengths = [len(classifier.tokenizer.encode(note.text)) for note in NOTES]
    (point,) = points(tmp_path)
    assert (point["notes"], point["tokens"]) == (5, sum(lengths))
    assert point["padding"] == pytest.approx(1 - sum(lengths) / (5 * max(lengths)), abs=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    classifier = fresh()
    with torch.no_grad():
        classifier.model.score.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"at step 1.*no checkpoint yet"):
        train(classifier, NOTES, [], TrainingConfig(steps=2), tmp_path)


def test_training_without_notes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="training notes"):
        train(fresh(), [], VALIDATION, TrainingConfig(), tmp_path)


@pytest.mark.parametrize("labels", [(), (5,), (-1, 2)])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_label_that_the_classifier_lacks_is_refused_with_its_place(tmp_path, split, labels):
    """The message names the note by its position; the text is private."""
    notes = {"training": list(NOTES), "validation": list(VALIDATION)}
    notes[split][2] = Note("secret complaint", labels)
    with pytest.raises(ValueError, match=f"{split} note 2") as caught:
        train(fresh(), notes["training"], notes["validation"], TrainingConfig(), tmp_path)
    assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", [METRICS, "clinora.json"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path, file):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=tmp_path.name):
        train(fresh(), NOTES, [], TrainingConfig(steps=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "{}"


# Progress


METRICS_OF_A_STEP = {"loss": 0.6934, "tokens": 900, "padding": 0.03, "validation_loss": 0.512}


def test_without_a_terminal_progress_is_a_line_every_ten_steps(capsys):
    progress = Progress(done=5, steps=40, seconds=10.0)
    for step in range(6, 36):
        progress.show(METRICS_OF_A_STEP | {"step": step, "seconds": 10.0 + step})
    progress.bar.close()
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""  # the last line has an end
    assert [re.search(r"\d+/40", line).group() for line in lines] == ["10/40", "20/40", "30/40"]
    assert all("loss 0.693" in line and "tokens/s=900" in line for line in lines)
    assert all("left" in line and "step/s" in line for line in lines)
    assert all(line.isprintable() for line in lines)  # no carriage return, no control sequence


def read_to_the_end(descriptor):
    """Read what was written to a terminal whose other side is closed; it may come in parts."""
    parts = []
    with open(descriptor, "rb", buffering=0) as terminal:
        try:
            while part := terminal.read(4096):
                parts.append(part)
        except OSError:  # how Linux tells the end of a terminal
            pass
    return b"".join(parts)


@pytest.mark.skipif(sys.platform == "win32", reason="opens a terminal as POSIX does")
@pytest.mark.parametrize("columns", [24, 40, 120])
def test_a_narrow_terminal_shows_loss_and_time_left_first(monkeypatch, columns):
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress(done=0, steps=40, seconds=0.0)
        progress.show(METRICS_OF_A_STEP | {"step": 1, "seconds": 1.0})
        progress.bar.refresh()
        progress.bar.close()
    shown = read_to_the_end(ours).decode()
    frames = [frame.strip() for frame in shown.split("\r") if "loss" in frame]
    assert frames
    for frame in frames:
        assert re.match(r"loss 0\.693, [\d:?]+ left", frame)
        assert len(frame) <= columns
        assert ("tokens/s=900" in frame) == (columns == 120)


# Order and schedule


def examples_of_length(lengths):
    """Notes of which only the number of tokens matters."""
    notes = [Note("", (0,)) for _ in lengths]
    return Examples(notes, [torch.zeros(n, dtype=torch.int32) for n in lengths], torch.empty(0))


@hypothesis.given(
    strategies.integers(1, 60), strategies.integers(1, 40), strategies.integers(0, 99)
)
def test_no_note_is_drawn_again_before_all_others(notes, notes_per_step, seed):
    steps = draw_notes(notes, TrainingConfig(notes_per_step=notes_per_step, seed=seed))
    drawn = []
    while len(drawn) < 3 * notes:
        step = next(steps)
        assert len(step) == notes_per_step
        drawn += step
    for epoch in range(3):
        assert sorted(drawn[epoch * notes : (epoch + 1) * notes]) == list(range(notes))


def test_the_notes_of_a_step_follow_the_seed():
    def first(seed):
        return next(draw_notes(50, TrainingConfig(seed=seed)))

    assert first(0) == first(0) != first(1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("processes", [1, 2, 3])
@hypothesis.given(
    lengths=strategies.lists(strategies.integers(1, 600), min_size=3, max_size=40),
    tokens=strategies.integers(1, 3000),
)
def test_a_step_has_the_same_notes_however_they_are_divided(device, processes, lengths, tokens):
    notes = list(range(len(lengths)))[::-1]
    config = TrainingConfig(notes_per_step=len(notes), tokens_per_batch=tokens)
    with mock.patch.object(training, "world", return_value=(0, processes)):
        batches = divide(examples_of_length(lengths), notes, config, torch.device(device))
    assert len(batches) == processes
    assert sorted(i for share in batches for batch in share for i in batch) == notes[::-1]
    sizes = [sum(len(batch) for batch in share) for share in batches]
    assert max(sizes) - min(sizes) <= 1
    for share in batches:
        for batch in share:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens


def test_each_process_gets_notes_of_all_lengths():
    """With three processes and one note of each length, they differ by one token a row."""
    lengths = range(1, 13)
    with mock.patch.object(training, "world", return_value=(0, 3)):
        batches = divide(
            examples_of_length(lengths), range(12), TrainingConfig(), torch.device("cpu")
        )
    tokens = [sum(lengths[i] for batch in share for i in batch) for share in batches]
    assert max(tokens) - min(tokens) <= 2 * 4


def test_a_step_with_fewer_notes_than_processes_is_refused(tmp_path):
    config = TrainingConfig(steps=1, notes_per_step=1)
    with (
        mock.patch.object(training, "world", return_value=(0, 2)),
        pytest.raises(ValueError, match="notes_per_step is 1, but there are 2 processes"),
    ):
        train(fresh(), NOTES, [], config, tmp_path)


@pytest.mark.parametrize("tokens_per_batch", [1, 1000, 8192])
def test_every_note_has_the_same_share_of_a_steps_gradient(tokens_per_batch):
    """It is the mean of the gradients of 16 notes, computed one by one."""
    notes = [Note("pain " * (n * n // 2 + 1), (n % 5,)) for n in range(1, 17)]
    classifier = fresh()
    examples = encode(classifier, notes)
    lengths = [len(ids) for ids in examples.ids]
    assert max(lengths) > 30 * min(lengths)
    trained = [p for p in classifier.model.parameters() if p.requires_grad]
    expected = [torch.zeros_like(p) for p in trained]
    for ids, note in zip(examples.ids, notes, strict=True):
        log_p = classifier.model(ids[None].long(), torch.tensor([len(ids)])).log_softmax(-1)
        gradients = torch.autograd.grad(-log_p[0, note.labels[0]], trained)
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient / 16

    config = TrainingConfig(tokens_per_batch=tokens_per_batch)
    learner = Learner(classifier, config)
    batches = divide(examples, range(16), config, learner.device)
    learner.forward_and_backward(examples, batches)
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_loraplus_moves_b_further_and_nothing_else():
    """AdamW's first step is the learning rate times a function of the gradient alone."""
    moved = {}
    for ratio in (1.0, 4.0):
        classifier = fresh()
        config = TrainingConfig(lora_plus_ratio=ratio, weight_decay=0.0, learning_rate=1e-3)
        learner = Learner(classifier, config)
        before = {name: p.detach().clone() for name, p in learner.trained.items()}
        examples = encode(classifier, [Note(f"visit {i} fever", (i % 2,)) for i in range(16)])
        loss = learner.forward_and_backward(examples, [[list(range(16))]])
        learner.step(10, loss)
        moved[ratio] = {name: p.detach() - before[name] for name, p in learner.trained.items()}
    for name, change in moved[1.0].items():
        factor = 4 if name.endswith("lora_B") else 1
        torch.testing.assert_close(moved[4.0][name], factor * change, rtol=1e-3, atol=1e-8)
        assert change.any() or name.endswith("lora_A")  # A has no gradient while B is zero


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    config = TrainingConfig(steps=110, warmup=10 / 110)
    factors = [learning_rate_factor(step, config) for step in range(1, 111)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10:] == pytest.approx([math.cos(math.pi * i / 200) ** 2 for i in range(100)])


def test_several_labels_share_the_target():
    assert soft_targets([Note("a", (2, 2, 0)), Note("b", (1,))], 4).tolist() == [
        [0.5, 0, 0.5, 0],
        [0, 1, 0, 0],
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"learning_rate": -1.0}, {"warmup": 1.0}, {"weight_decay": -0.1}, {"clip": 0}],
)
def test_a_number_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingConfig(**wrong)
