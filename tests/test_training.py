"""The loop, against PEFT + Transformers in a loop of its own, and its schedule and order."""

import json
import math

import hypothesis
import peft
import pytest
import torch
import transformers
from hypothesis import strategies

import clinora
from clinora.checkpoint import BUNDLED
from clinora.notes import Note
from clinora.training import TrainingConfig, batches, learning_rate_factor, soft_targets, train

NOTES = [
    Note("chest pain and shortness of breath, ST elevation", (0,)),
    Note("knee replacement, the joint was exposed and cemented", (2, 4)),
    Note("CT of the chest shows no embolism", (3,)),
    Note("the patient is seen in consultation for weakness and fatigue", (1,)),
    Note("laparoscopic appendectomy under general anesthesia", (4,)),
]


def fresh(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(11)
    model = clinora.load_model("bundled", num_labels=5, dtype=dtype)
    clinora.apply_lora(model, clinora.LoRAConfig(dropout=dropout))
    tokenizer = clinora.Tokenizer(BUNDLED / "base" / "tokenizer.model")
    return clinora.Classifier(model, tokenizer, clinora.PUBLISHED_CLASSES, 512)


def test_training_follows_peft_and_transformers(tmp_path):
    """AdamW divides by the gradient's size: where that is near zero, rounding becomes steps."""
    classifier = fresh()
    start = {n: t.clone() for n, t in clinora.lora_state_dict(classifier.model).items()}
    config = TrainingConfig(steps=10, tokens_per_step=60, learning_rate=5e-4, weight_decay=0.1)
    train(classifier, NOTES, config, tmp_path / "metrics.jsonl")

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
    order = batches([len(note) for note in ids], 60, seed=0)
    for step in range(1, 11):
        rate = 5e-4 * (step if step == 1 else (1 + math.cos(math.pi * (step - 2) / 9)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        batch = next(order)
        width = max(len(ids[i]) for i in batch)
        padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in batch])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch])
        log_p = theirs(padded, attention_mask=mask).logits.log_softmax(-1)
        losses = [-log_p[row, list(NOTES[i].labels)].mean() for row, i in enumerate(batch)]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(wanted.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in clinora.lora_state_dict(classifier.model).items():
        torch.testing.assert_close(tensor, wanted[name].detach(), rtol=0, atol=1e-5)
        assert not torch.equal(tensor, start[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_seed_gives_one_result_to_the_bit(tmp_path, dtype):
    results = []
    for _ in range(2):
        classifier = fresh(dropout=0.1, dtype=dtype)
        train(classifier, NOTES, TrainingConfig(steps=4), tmp_path / "metrics.jsonl")
        results.append(clinora.lora_state_dict(classifier.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_only_the_adapter_and_the_head_move(tmp_path):
    classifier = fresh()
    before = {n: p.clone() for n, p in classifier.model.named_parameters()}
    train(classifier, NOTES, TrainingConfig(steps=3), tmp_path / "metrics.jsonl")
    moved = {n for n, p in classifier.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == clinora.lora_state_dict(classifier.model).keys()


def test_the_head_is_trained_afterwards(tmp_path):
    classifier = fresh()
    assert not classifier.model.head_trained
    train(classifier, NOTES, TrainingConfig(steps=1), tmp_path / "metrics.jsonl")
    assert classifier.model.head_trained


def test_metrics_hold_a_line_a_step_and_no_text(tmp_path):
    train(fresh(), NOTES, TrainingConfig(steps=3), tmp_path / "metrics.jsonl")
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert "chest" not in text


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    classifier = fresh()
    with torch.no_grad():
        classifier.model.score.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="at step 1"):
        train(classifier, NOTES, TrainingConfig(steps=2), tmp_path / "metrics.jsonl")


def test_no_notes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no notes"):
        train(fresh(), [], TrainingConfig(), tmp_path / "metrics.jsonl")


@hypothesis.given(
    strategies.lists(strategies.integers(1, 600), min_size=1, max_size=60),
    strategies.integers(1, 3000),
    strategies.integers(0, 2**32),
)
def test_an_epoch_deals_every_note_once_within_the_budget(lengths, tokens, seed):
    dealt, order = [], batches(lengths, tokens, seed)
    while len(dealt) < len(lengths):
        batch = next(order)
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
        dealt += batch
    assert sorted(dealt) == list(range(len(lengths)))


def test_the_order_follows_the_seed():
    lengths = list(range(1, 50))

    def first(seed):
        order = batches(lengths, 200, seed)
        return [next(order) for _ in range(5)]

    assert first(0) == first(0) != first(1)


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
