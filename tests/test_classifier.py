"""A run on disk and its predictions, against Transformers and PEFT reading the same files."""

import ctypes
import dataclasses
import json
import platform
import random
import re
import shutil
import subprocess
import sys

import hypothesis
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import strategies

import clinora
from clinora.calibration import Calibration
from clinora.checkpoint import BUNDLED, CheckpointError
from clinora.classifier import group_by_length, pad
from clinora.device import choose_device, choose_dtype
from clinora.lora import LoRAConfig
from clinora.notes import Note
from clinora.training import encode as training_ids
from tests.checkpoint_files import edit_json

NOTES = [
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction.",
    "MRI of the left knee without contrast.",
    "PROCEDURE: Laparoscopic appendectomy under general anesthesia. " * 60,
    "Right hip pain after a fall.",
]
CALIBRATION = {
    "weights": [1.0, 0.5], "bias": 0.0, "promise": 0.9, "threshold": 0.5, "notes": 50,
    "coverage": 1.0, "accuracy": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip


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
    assert long.tokens == classifier.token_limit + 1 < len(classifier.tokenizer.encode(NOTES[2]))


def test_a_note_that_just_fits_is_not_truncated_and_is_counted_exactly(small_run):
    classifier = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
    ids = classifier.tokenizer.encode("chest pain " * 50)
    note = classifier.tokenizer.decode(ids[:128])
    assert len(classifier.tokenizer.encode(note)) == 128
    (fits,) = classifier([note])
    assert (fits.tokens, fits.truncated) == (128, False)
    (longer,) = classifier([f"{note}s and more"])
    assert (longer.tokens, longer.truncated) == (129, True)


def test_evaluation_counts_all_tokens_and_predicts_the_same(classifier):
    probabilities, tokens = classifier.probabilities(NOTES)
    assert tokens == [len(classifier.tokenizer.encode(note)) for note in NOTES]
    assert max(tokens) > classifier.token_limit + 1
    for row, prediction in zip(probabilities, classifier(NOTES), strict=True):
        assert prediction.probabilities == tuple(row.tolist())


def test_a_note_in_capitals_gets_the_answer_of_its_lower_case(classifier):
    """In capitals, this text was once another class with another confidence."""
    capitals, lower = NOTES[0].upper(), NOTES[0].lower()
    (expected,) = classifier([lower])
    assert classifier([capitals]) == [expected]
    assert classifier.predict([classifier.encode(capitals)]) == [expected]
    probabilities, _ = classifier.probabilities([capitals, lower])
    assert (probabilities[0] == probabilities[1]).all()
    assert torch.equal(*torch.cat(list(classifier.states([capitals, lower]))))
    trained_on = training_ids(classifier, [Note(capitals, (0,)), Note(lower, (0,))]).ids
    assert torch.equal(*trained_on)


def test_a_note_in_ordinary_case_is_tokenised_as_it_is_written(classifier):
    for note in NOTES:
        assert classifier.encode(note) == classifier.tokenizer.encode(note, 513)


def test_published_forms(classifier):
    prediction = classifier([NOTES[0]])[0]
    assert json.dumps(prediction.as_json()) == (
        '{"predicted_class": 0, "label": "Cardiovascular / Pulmonary"}'
    )
    assert prediction.as_text() == "Predicted Label: Cardiovascular / Pulmonary"


def uncalibrated(classifier, calibration=None):
    return clinora.Classifier(
        classifier.model, classifier.tokenizer, classifier.labels, classifier.token_limit,
        calibration,
    )  # fmt: skip


def test_a_run_without_calibration_claims_no_confidence(classifier):
    for prediction in uncalibrated(classifier)(NOTES):
        assert prediction.confidence is None
        assert prediction.refer is None


def test_confidence_is_the_calibrations_and_refer_follows_the_threshold(classifier):
    p = np.array([prediction.probabilities for prediction in classifier(NOTES)])
    second, first = np.sort(p)[:, -2:].T
    both = np.minimum(first + second, 1 - 1e-6)
    expected = 1 / (1 + np.exp(-(0.5 * np.log(both / (1 - both)) + 0.1 * np.log(first / second))))
    assert len(set(expected)) == len(NOTES)
    for threshold in (*expected * (1 - 1e-4), *expected * (1 + 1e-4)):
        calibration = Calibration(
            weights=(0.5, 0.1), bias=0.0, promise=0.9, threshold=threshold, notes=50, coverage=1.0,
            accuracy=1.0,
        )  # fmt: skip
        predictions = uncalibrated(classifier, calibration)(NOTES)
        assert [p.confidence for p in predictions] == pytest.approx(expected, rel=1e-5)
        assert [p.refer for p in predictions] == (expected < threshold).tolist()


def test_a_threshold_that_is_just_reached_is_answered(classifier):
    (sure,) = classifier(NOTES[:1])
    calibration = dataclasses.replace(classifier.calibration, threshold=sure.confidence)
    assert uncalibrated(classifier, calibration)(NOTES[:1])[0].refer is False


def test_a_calibration_is_saved_and_comes_back(classifier, run):
    came = clinora.Classifier.load(run, device="cpu").calibration
    assert came == classifier.calibration
    assert came.notes >= 50


def test_answers_that_are_not_finite_are_refused(small_run):
    """Not a number is below no threshold: such a note would not have been referred."""
    broken = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
    with torch.no_grad():
        broken.model.score.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite.*--precision fp32"):
        broken(NOTES)


def test_a_note_of_ten_megabytes_is_cut_and_its_tokens_can_be_counted(small_run):
    classifier = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
    (one,) = classifier(["chest pain " * 50])
    (huge,) = classifier(["chest pain " * 900_000])
    assert huge.truncated
    each = len(classifier.tokenizer.encode("chest pain " * 50)) - 1  # less the first token
    _, (tokens,) = classifier.probabilities(["chest pain " * 900_000])
    assert tokens == 1 + 900_000 // 50 * each
    assert huge.probabilities == pytest.approx(one.probabilities, abs=1e-6)  # the same first 128


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


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="glibc 2.33 or newer gives the account",
)
def test_memory_of_freed_tensors_is_kept():
    """By glibc's own account: a tensor of 24 MB is not mapped, and its memory stays when freed."""
    code = """
import ctypes, sys, torch
from clinora.device import keep_freed_memory

class Account(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

ask = ctypes.CDLL("libc.so.6").mallinfo2
ask.restype = Account
if sys.argv[1] == "keep":
    keep_freed_memory()
before = ask()
tensor = torch.ones(6_000_000)
mapped = ask().hblkhd - before.hblkhd
del tensor
print(mapped, ask().arena - before.arena)
"""
    grown = {}
    for way in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", code, way], capture_output=True, check=True)
        grown[way] = [int(number) > 20e6 for number in done.stdout.split()]
    assert grown == {"keep": [False, True], "default": [True, False]}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it sets options of glibc")
def test_memory_of_freed_tensors_is_kept_in_a_thread_too():
    """The page's model runs in one: what was used before is used again, without a page fault."""
    code = """
import resource, threading, torch
from clinora.device import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

def job():
    sizes = (7_500_000, 7_500_000, 7_500_000, 4_000_000)  # more than a thread's own heap
    for round in range(12):
        if round == 6:  # by then all have their place
            before = faults()
        tensors = [torch.zeros(n).add_(1) for n in sizes]
        del tensors
    print(faults() - before)

keep_freed_memory()
torch.set_num_threads(1)  # all faults are the thread's own
threading.Thread(target=job).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    # The six rounds use 156,000 pages. A tensor may get a new place, of at most 7,325 pages.
    assert int(done.stdout) < 20_000


def test_a_run_records_no_text(run):
    known = {"adapter_config.json", "adapter_model.safetensors", "clinora.json"}
    assert {file.name for file in run.iterdir()} == known
    about = json.loads((run / "clinora.json").read_text())
    assert all(re.fullmatch("[0-9a-f]{16}", seen) for seen in about["notes"]["seen"])


def test_another_base_is_refused(run, reference):
    _, other = reference(num_labels=None)
    shutil.copy(BUNDLED / "base" / "tokenizer.model", other)
    with pytest.raises(CheckpointError, match=r"weights in .* trained"):
        clinora.Classifier.load(run, base=other)


def test_another_tokenizer_is_refused(run, small_run, tmp_path):
    shutil.copytree(BUNDLED / "base", tmp_path / "base")
    shutil.copy(small_run.parent / "base" / "tokenizer.model", tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model in .* trained"):
        clinora.Classifier.load(run, base=tmp_path / "base")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"rope_theta": 500.0, "rope_parameters": None}, False),
        ({"rope_scaling": LLAMA3}, False),
        ({"dtype": "float32"}, True),
    ],
)
def test_another_configuration_is_refused_but_not_another_spelling(run, tmp_path, change, same):
    shutil.copytree(BUNDLED / "base", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if same:
        clinora.Classifier.load(run, base=tmp_path / "base")
    else:
        with pytest.raises(CheckpointError, match=r"config\.json in .* trained"):
            clinora.Classifier.load(run, base=tmp_path / "base")


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
        ({"labels": ["A", "B"]}, "head of 5 classes, .* 2 labels"),
        ({"labels": ["A"] * 5}, "labels are not different names"),
        ({"labels": [1, 2, 3, 4, 5]}, "labels are not strings"),
        ({"labels": ["A", "B", "C", "D", "E" * 101]}, "label 4 .*101 characters"),
        ({"labels": ["A", "B\x1b[2J", "C", "D", "E"]}, r"label 1 .*U\+001B"),
        ({"labels": ["A", "B", "\u202eC", "D", "E"]}, r"label 2 .*U\+202E"),
        ({"labels": ["A", "B", "C", "\u3164", "E"]}, "label 3 .*nothing visible"),
        ({"base": {}}, "revision is missing"),
        (
            {
                "base": {
                    "source": "bundled",
                    "revision": None,
                    "sha256": "5a",
                    "tokenizer_sha256": "6b",
                    "config_sha256": "7c",
                }
            },
            r"the weights in .* is not what .* was trained on \(bundled, sha256 5a…\)",
        ),
        ({"calibration": 7}, "calibration is missing"),
        ({"calibration": {"bias": 0}}, "calibration: .*missing"),
        ({"calibration": CALIBRATION | {"weights": [1]}}, "two weights"),
        ({"calibration": CALIBRATION | {"weights": "ab"}}, "clinora.json: calibration: "),
        ({"calibration": CALIBRATION | {"threshold": float("nan")}}, "finite numbers"),
        ({"calibration": CALIBRATION | {"bias": float("inf")}}, "finite numbers"),
        ({"token_limit": 100_000}, "token limit 100000"),
        ({"training": {"seed": "a"}}, "seed is missing or has the wrong type"),
        ({"notes": {"seen": [], "source": 5}}, "source is missing or has the wrong type"),
        ({"notes": {"seen": [], "split_column": ["a"]}}, "split_column is missing or has"),
        ({"notes": {"seen": [], "fingerprints": {"notes": 1}}}, "notes is missing or has"),
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


@pytest.fixture
def second_run(tmp_path):
    """Save a run of the bundled base with three classes, another rank and another limit."""
    labels = ["Dental", "Eye", "Skin"]
    other = clinora.Classifier.new(
        "bundled", labels, LoRAConfig(rank=2), seed=5, token_limit=64, precision="fp32",
        device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in other.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    other.model.head_trained = True
    other.save(tmp_path / "second")
    return tmp_path / "second"


def test_several_runs_of_one_base_share_its_memory_and_predict_as_alone(run, second_run):
    both = clinora.Classifier.load_several([run, second_run], device="cpu", precision="fp32")
    embeddings = {one.model.model.embed_tokens.weight.data_ptr() for one in both}
    assert len(embeddings) == 1
    for folder, one in zip([run, second_run], both, strict=True):
        alone = clinora.load_model(
            "bundled", num_labels=len(one.labels), dtype=torch.float32, device="cpu"
        ).eval()
        clinora.load_adapter(alone, folder)
        for note, prediction in zip(NOTES, one(NOTES), strict=True):
            ids = one.encode(note)[: one.token_limit]
            logits = alone(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
            assert prediction.label == one.labels[logits.argmax()]
            expected = logits.softmax(-1).tolist()
            assert prediction.probabilities == pytest.approx(expected, abs=1e-5)


def test_runs_of_different_bases_are_not_loaded_together(run, small_run):
    with pytest.raises(CheckpointError, match="trained"):
        clinora.Classifier.load_several([run, small_run])


def test_runs_whose_base_was_quantised_differently_need_a_choice(run, second_run):
    edit_json(second_run / "clinora.json", quantization="nf4")
    with pytest.raises(ValueError, match="nf4"):
        clinora.Classifier.load_several([run, second_run])
    both = clinora.Classifier.load_several([run, second_run], quantize="none")
    assert [one.quantization for one in both] == ["none", "nf4"]


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        clinora.Classifier.load_several([])


def test_a_tokenizer_larger_than_the_model_is_refused(classifier, reference):
    _, folder = reference()
    small = clinora.load_model(folder, num_labels=5)
    with pytest.raises(ValueError, match="4096 ids, the model 97"):
        clinora.Classifier(small, classifier.tokenizer, classifier.labels, 64)


@pytest.mark.parametrize("labels", [("a", "b", "c", "d"), tuple("abcdef")])
def test_as_many_labels_as_classes(classifier, labels):
    with pytest.raises(ValueError, match=rf"{len(labels)} labels.*5 classes"):
        clinora.Classifier(classifier.model, classifier.tokenizer, labels, 64)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@hypothesis.given(
    lengths=strategies.lists(strategies.integers(1, 600), max_size=80),
    tokens=strategies.integers(1, 2000),
)
def test_groups_hold_every_note_once_within_the_budget(device, lengths, tokens):
    groups = group_by_length(lengths, tokens, torch.device(device))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= tokens


def test_on_the_cpu_a_group_is_not_padded_much_for_one_note():
    """Three notes would be padded by 3 · 100 tokens for the fourth; on a GPU they are."""
    lengths = [100, 100, 101, 201]
    assert group_by_length(lengths, 8192, torch.device("cpu")) == [[0, 1, 2], [3]]
    assert group_by_length(lengths, 8192, torch.device("cuda")) == [[0, 1, 2, 3]]
    assert group_by_length([10, 10, 200, 201], 8192, torch.device("cpu")) == [[0, 1], [2, 3]]


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
    with pytest.raises(ValueError, match="auto, bf16, fp16, fp32"):
        choose_dtype(cpu, "int4")


def test_a_new_classifier_has_the_base_lora_and_a_head_for_its_labels():
    lora = clinora.LoRAConfig(rank=2, alpha=4)
    classifier = clinora.Classifier.new("bundled", ("A", "B"), lora, token_limit=64, device="cpu")
    assert classifier.model.lora_config == lora
    assert classifier.model.score.weight.shape == (2, 320)
    assert classifier.token_limit == 64
    base = clinora.load_model("bundled", dtype=classifier.dtype)
    expected = base.model.layers[3].self_attn.q_proj.weight
    assert torch.equal(classifier.model.model.layers[3].self_attn.q_proj.weight, expected)
    with pytest.raises(ValueError, match="never trained"):
        classifier(["fever"])


def test_a_seed_draws_the_same_head_and_adapter_again():
    def drawn(seed):
        classifier = clinora.Classifier.new("bundled", ("A", "B"), seed=seed, device="cpu")
        return clinora.lora_state_dict(classifier.model) | {"score": classifier.model.score.weight}

    one, again, other = drawn(3), drawn(3), drawn(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    assert changed == [name for name in one if not name.endswith("lora_B")]  # B begins at 0


def test_without_lora_the_whole_model_trains():
    classifier = clinora.Classifier.new("bundled", ("A", "B"), None, device="cpu")
    assert all(parameter.requires_grad for parameter in classifier.model.parameters())


def test_a_classifier_shows_what_it_is(classifier):
    shown = repr(classifier)
    for part in ("bundled", "Orthopedic", "512", "float32"):
        assert part in shown


def test_a_text_is_cleaned_before_it_is_read(classifier):
    unix, windows = classifier(["Fever.\nCough \ufffd", " Fever.\r\nCough \ud83d\r\n"])
    assert unix == windows


def test_logits_are_those_of_the_probabilities_and_of_another_model_if_one_is_given(classifier):
    ids = [classifier.tokenizer.encode(note, 20) for note in NOTES]
    logits = classifier.logits(ids)
    classifier.model.eval()  # without dropout
    expected = classifier.model(*pad(ids, torch.device("cpu"))).detach()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    doubled = classifier.logits(ids, lambda *batch: 2 * classifier.model(*batch))
    torch.testing.assert_close(doubled, 2 * logits, rtol=1e-6, atol=1e-6)
