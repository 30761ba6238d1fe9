"""A run on disk and its predictions, against Transformers and PEFT reading the same files."""

import json
import random

import hypothesis
import peft
import pytest
import torch
import transformers
from hypothesis import strategies

import clinora
from clinora.checkpoint import BUNDLED, CheckpointError
from clinora.classifier import choose_device, choose_dtype, group_by_length, pad

NOTES = [
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction.",
    "MRI of the left knee without contrast.",
    "PROCEDURE: Laparoscopic appendectomy under general anesthesia. " * 60,
    "Right hip pain after a fall.",
]


@pytest.fixture(scope="module")
def classifier():
    return clinora.Classifier.load("bundled", device="cpu", precision="fp32")


@pytest.fixture
def run(tmp_path, classifier):
    classifier.save(tmp_path / "run")
    return tmp_path / "run"


def test_probabilities_are_those_of_transformers_and_peft(classifier):
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        BUNDLED / "base", num_labels=5, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, BUNDLED / "adapter").eval()
    for note, prediction in zip(NOTES, classifier(NOTES), strict=True):
        ids = torch.tensor([classifier.tokenizer.encode(note, classifier.token_limit)])
        with torch.no_grad():
            expected = model.base_model.model.score(model.base_model.model.model(ids)[0])[0, -1]
        came = torch.tensor(prediction.probabilities)
        torch.testing.assert_close(came, expected.softmax(-1), rtol=1e-4, atol=1e-5)
        assert prediction.index == expected.argmax().item()
        assert prediction.label == classifier.labels[prediction.index]


def test_a_note_gets_the_same_answer_in_any_company(classifier):
    shuffled = NOTES * 3
    random.Random(0).shuffle(shuffled)
    alone = {note: classifier([note])[0] for note in NOTES}
    for note, prediction in zip(shuffled, classifier(shuffled), strict=True):
        assert prediction.label == alone[note].label
        assert prediction.probabilities == pytest.approx(alone[note].probabilities, abs=2e-6)


def test_a_note_beyond_the_limit_is_said_to_be_truncated(classifier):
    short, long = classifier([NOTES[1], NOTES[2]])
    assert not short.truncated
    assert short.tokens == len(classifier.tokenizer.encode(NOTES[1]))
    assert long.truncated
    assert long.tokens == len(classifier.tokenizer.encode(NOTES[2])) > classifier.token_limit


def test_published_forms(classifier):
    prediction = classifier([NOTES[0]])[0]
    assert json.dumps(prediction.as_json()) == (
        '{"predicted_class": 0, "label": "Cardiovascular / Pulmonary"}'
    )
    assert prediction.as_text() == "Predicted Label: Cardiovascular / Pulmonary"


def test_a_run_without_calibration_claims_no_confidence(classifier):
    prediction = classifier([NOTES[0]])[0]
    assert prediction.confidence is None
    assert prediction.refer is None


@pytest.mark.parametrize("empty", ["", "  \n\t "])
def test_an_empty_note_is_refused_with_its_place(classifier, empty):
    with pytest.raises(ValueError, match="note 2 of 2 is empty"):
        classifier([NOTES[0], empty])


def test_one_string_is_not_taken_for_a_list_of_letters(classifier):
    with pytest.raises(ValueError, match="expected a list"):
        classifier(NOTES[0])


def test_no_notes_give_no_predictions(classifier):
    assert classifier([]) == []


def test_an_untrained_head_does_not_answer(classifier):
    model = clinora.load_model("bundled", num_labels=5)
    untrained = clinora.Classifier(model, classifier.tokenizer, classifier.labels, 512)
    with pytest.raises(ValueError, match="never trained"):
        untrained(NOTES)


def test_predicting_leaves_a_model_in_training_mode_there(classifier):
    classifier.model.train()
    try:
        first, second = classifier(NOTES[:1]), classifier(NOTES[:1])
        assert classifier.model.training
    finally:
        classifier.model.eval()
    assert first == second


def test_a_saved_run_comes_back_to_the_bit(classifier, run):
    assert clinora.Classifier.load(run, device="cpu", precision="fp32")(NOTES) == classifier(NOTES)


def test_another_base_is_refused(run, reference):
    _, other = reference(num_labels=None)
    with pytest.raises(CheckpointError, match=r"not those that .* was trained on"):
        clinora.Classifier.load(run, base=other)


def test_a_base_that_moved_is_found_with_its_new_place(classifier, run, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (BUNDLED / "base").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    again = clinora.Classifier.load(run, base=moved, device="cpu", precision="fp32")
    assert again(NOTES) == classifier(NOTES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"labels": ["A", "B"]}, r"score\.weight \(5 × 128, expected 2 × 128\)"),
        ({"base": {}}, "lacks 'source'"),
        ({"token_limit": 100_000}, "token limit 100000"),
    ],
)
def test_a_damaged_run_is_one_clear_line(run, change, message):
    path = run / "clinora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        clinora.Classifier.load(run)
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no run"):
        clinora.Classifier.load(tmp_path / "nowhere")


def test_a_tokenizer_larger_than_the_model_is_refused(classifier, reference):
    _, folder = reference()
    small = clinora.load_model(folder, num_labels=5)
    with pytest.raises(ValueError, match="4096 ids, the model 97"):
        clinora.Classifier(small, classifier.tokenizer, classifier.labels, 64)


@hypothesis.given(
    strategies.lists(strategies.integers(1, 600), max_size=80), strategies.integers(1, 2000)
)
def test_groups_hold_every_note_once_within_the_budget(lengths, tokens):
    groups = group_by_length(lengths, tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= tokens


def test_padding_stands_on_the_right():
    ids, lengths = pad([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert lengths.tolist() == [3, 1]


def test_a_device_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="choose auto or one of"):
        choose_device("abacus")


def test_precision_is_named_or_refused():
    cpu = torch.device("cpu")
    assert choose_dtype(cpu, "fp32") == torch.float32
    assert choose_dtype(cpu, "bf16") == torch.bfloat16
    assert choose_dtype(cpu, "fp16") == torch.float16
    with pytest.raises(ValueError, match="expected auto, bf16, fp16, fp32"):
        choose_dtype(cpu, "int4")
