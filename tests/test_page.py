"""The page's tabs "Classify" and "LoRA internals": their answers, through the page's own calls."""

import json
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient
from matplotlib.figure import Figure

import clinora
from clinora.attention import attention_weights
from clinora.budget import base_parameters
from clinora.checkpoint import BUNDLED
from clinora.explain import explain
from clinora.serving import internals_note, internals_tab
from clinora.serving.api import MOST_CHARACTERS
from clinora.serving.app import create_app
from clinora.serving.classify_tab import EXAMPLES
from clinora.serving.internals_tab import TINYLLAMA
from tests.served import calibration, call

PUBLISHED_NOTE = (
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction."
)
NOTE = "Severe chest pain. No fever!  ECG: normal.\nThe knee, swollen."


@pytest.fixture
def client(visitor):
    """Someone new to one app, which takes longer to make than most of these tests."""
    return visitor


def predict(client, note, session="one"):
    """Submit a note; give the outputs that the page shows, by name."""
    event, outputs = call(client, "predict", note, session=session)
    assert event == "complete"
    names = ("json", "text", "probabilities", "confidence", "referral", "tokens", "sentences")
    return SimpleNamespace(**dict(zip(names, outputs, strict=False)))  # the rest is not shown


def by_label(shown):
    """Give the shown probability of each class."""
    return {row["label"]: row["confidence"] for row in shown["confidences"]}


# --- Predictions ---


@pytest.mark.parametrize("note", EXAMPLES)
def test_both_outputs_have_the_published_form(client, classifier, note):
    expected = classifier([note])[0]
    shown = predict(client, note)
    assert shown.json == {"predicted_class": expected.index, "label": expected.label}
    assert shown.text == f"Predicted Label: {expected.label}"


def test_the_published_example_has_the_published_prediction(flags_folder):
    app = create_app(clinora.Classifier.load("bundled"), flags_folder)
    with TestClient(app, "http://127.0.0.1") as client:
        shown = predict(client, PUBLISHED_NOTE)
    assert shown.json == {"predicted_class": 0, "label": "Cardiovascular / Pulmonary"}
    assert shown.text == "Predicted Label: Cardiovascular / Pulmonary"


def test_the_published_note_is_the_first_example():
    assert EXAMPLES[0] == PUBLISHED_NOTE


@pytest.mark.parametrize("note", ["", " \n\t", None, "\u200b\ufeff\u3164", "\0\x1b"])
def test_an_empty_note_gives_a_message(client, note):
    event, answer = call(client, "predict", note)
    assert event == "error"
    assert answer["error"] == "Enter a clinical note first."


def test_a_note_of_the_most_characters_is_read_and_a_longer_one_refused(client):
    assert call(client, "predict", "x" * MOST_CHARACTERS)[0] == "complete"
    event, answer = call(client, "predict", "x" * (MOST_CHARACTERS + 1))
    assert event == "error"
    assert "100,001 characters" in answer["error"]


def test_the_page_shows_how_many_tokens_a_note_has_and_how_many_were_read(client, classifier):
    shown = predict(client, "fever " * 300)
    assert re.search(r"more than 128 tokens\b.*\bfirst 128\b", shown.tokens)
    tokens = len(classifier.tokenizer.encode("fever"))
    shown = predict(client, "fever")
    assert re.search(rf"\b{tokens} tokens\b.*\ball\b", shown.tokens)


def test_the_page_shows_all_probabilities_and_the_confidence(classifier, flags_folder, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.9999))
    with TestClient(create_app(classifier, flags_folder), "http://127.0.0.1") as client:
        shown = predict(client, "fever")
    expected = classifier(["fever"])[0]
    probabilities = dict(zip(classifier.labels, expected.probabilities, strict=True))
    assert by_label(shown.probabilities) == pytest.approx(probabilities, abs=1e-3)
    assert shown.confidence == f"{expected.confidence:.1%}"
    assert expected.refer
    assert shown.referral.startswith("Refer to a person")
    for percentage in (f"{expected.confidence:.1%}", "100.0%"):  # the confidence, the threshold
        assert percentage in shown.referral


def test_a_run_that_never_reached_the_promised_accuracy_refers_every_note(
    classifier, flags_folder, monkeypatch
):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=2.0))
    with TestClient(create_app(classifier, flags_folder), "http://127.0.0.1") as client:
        shown = predict(client, "fever")
    assert shown.referral.startswith("Refer to a person")
    assert "200" not in shown.referral  # a threshold above 100% means that none was found


def test_an_uncalibrated_run_shows_no_confidence_and_refers_no_note(client):
    shown = predict(client, "fever")
    assert shown.confidence == "not calibrated"
    assert shown.referral == ""


# --- Highlights ---


def test_the_highlights_are_the_whole_note_with_the_contributions_of_its_sentences(
    client, classifier
):
    spans = predict(client, f" {NOTE}\n").sentences
    assert "".join(span["token"] for span in spans) == NOTE
    expected = [sentence.contribution for sentence in explain(classifier, NOTE)]
    most = max(map(abs, expected))
    assert [s["class_or_confidence"] for s in spans] == pytest.approx(
        [contribution / most for contribution in expected], abs=1e-4
    )


def test_text_that_was_not_read_is_not_highlighted(client):
    spans = predict(client, "Chest pain. " * 60).sentences
    assert "".join(span["token"] for span in spans) == ("Chest pain. " * 60).strip()
    assert spans[0]["class_or_confidence"] is not None
    assert spans[-1]["class_or_confidence"] is None


# --- LoRA internals ---


@pytest.fixture(scope="module")
def base_probabilities(small_run, classifier):
    """The probabilities of the base without LoRA, under the trained head: those of strength 0."""
    model = clinora.load_model(small_run.parent / "base", num_labels=5, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(classifier.model.score.weight)
    model.head_trained = True
    base = clinora.Classifier(model, classifier.tokenizer, classifier.labels, token_limit=128)
    return base.probabilities([NOTE])[0][0].tolist()


@pytest.fixture
def drawn(monkeypatch):
    """The values of the bars that the page draws, in place of the pictures."""
    seen = []

    def note_and_draw(labels, columns):
        seen.append((list(labels), dict(columns)))
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(internals_note, "strengths_figure", note_and_draw)
    return seen


def test_strength_0_is_the_base_and_1_the_adapter(client, classifier, base_probabilities, drawn):
    adapted = classifier([NOTE])[0].probabilities
    for strength, expected in ((0, base_probabilities), (1, adapted)):
        assert call(client, "compare_strengths", NOTE, strength)[0] == "complete"
        labels, columns = drawn[-1]
        assert labels == list(classifier.labels)
        base, adapter, chosen = columns.values()
        assert base == pytest.approx(base_probabilities, abs=1e-5)
        assert adapter == pytest.approx(adapted, abs=1e-5)
        assert chosen == pytest.approx(expected, abs=1e-5)
    assert base_probabilities != pytest.approx(adapted, abs=0.01)


def test_visitors_with_different_strengths_do_not_affect_each_other(client, drawn):
    alone = {}
    for strength in (0.25, 1.75):
        call(client, "compare_strengths", NOTE, strength)
        alone[f"chosen ({strength:g})"] = drawn.pop()[1]
    predicted = by_label(predict(client, NOTE, "alone").probabilities)
    found = []

    def ask(strength, session):
        for _ in range(5):
            found.append(call(client, "compare_strengths", NOTE, strength, session=session)[0])
            # Notes that wait together run as one batch, which rounds differently.
            shown = by_label(predict(client, NOTE, session).probabilities)
            found.append(shown == pytest.approx(predicted, abs=1e-5))

    threads = [
        threading.Thread(target=ask, args=(strength, f"person{i}at{int(100 * strength)}"))
        for i in range(3)
        for strength in (0.25, 1.75)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == [True] * 30 + ["complete"] * 30
    assert len(drawn) == 30
    for _, columns in drawn:
        (name,) = columns.keys() & alone.keys()
        assert columns == alone[name]


def test_the_page_draws_the_attention_of_the_chosen_head(client, classifier, monkeypatch):
    seen = []

    def note_and_draw(weights, tokens, title):
        seen.append((weights, list(tokens)))
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(internals_note, "attention_figure", note_and_draw)
    for layer, head in ((0, 0), (1, 3)):
        assert call(client, "show_attention", NOTE, layer, head)[0] == "complete"
        ids = classifier.tokenizer.encode(NOTE)[:40]
        weights, tokens = seen.pop()
        expected = attention_weights(classifier, ids, layer)[head]
        assert weights == pytest.approx(expected.numpy(), abs=1e-6)
        assert len(tokens) == len(ids) == 40
        # A token of white space alone is shown as a dot.
        text = "".join(tokens[1:]).replace("·", "")
        assert "".join(NOTE.split()).startswith(text)


def test_a_layers_matrices_are_those_of_the_model(client, classifier, monkeypatch):
    seen = {}

    def note_and_draw(matrix, _limit, title):
        seen[title] = matrix
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(internals_tab, "matrix_figure", note_and_draw)
    name = "model.layers.1.self_attn.v_proj"
    assert call(client, "show_weights", name)[0] == "complete"
    state = {key: p.double().numpy() for key, p in classifier.model.state_dict().items()}
    update = 2.0 * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]  # α/r = 8/4
    weight = state[f"{name}.weight"]
    for title, expected in {"W": weight, "ΔW": update, "W + ΔW": weight + update}.items():
        assert seen[title] == pytest.approx(expected, abs=1e-5)


def test_the_pictures_are_there_when_the_tab_is_opened_and_stay_as_they_are(client):
    _, first = call(client, "open_internals", None)
    shown = [value for value in first if isinstance(value, dict) and "plot" in value]
    assert len(shown) == 9
    _, again = call(client, "open_internals", None)
    assert not any("data:image" in str(value) for value in again)
    _, of_another = call(client, "open_internals", None, session="another")
    assert of_another == first


def test_the_results_show_each_measured_rank(client):
    report = json.loads((BUNDLED / "ranks.json").read_text())
    ranks = [row["rank"] for row in report["ranks"]]
    assert ranks == [1, 2, 4, 8, 16, 32]
    for place, row in enumerate(report["ranks"]):
        _, (words, *_) = call(client, "choose_result", place)
        assert f"Rank {row['rank']}**" in words
        # Six layers of width 320, with a v_proj of 160 outputs.
        assert f"{6 * row['rank'] * (320 + 320 + 320 + 160):,} parameters" in words
        assert f"{row['accuracy']:.1%}" in words


def test_comparing_the_merged_weights_changes_nothing(client, classifier):
    state = {name: p.clone() for name, p in classifier.model.state_dict().items()}
    _event, (shown,) = call(client, "compare_merged", NOTE)
    assert float(re.search(r"([\d.e-]+) points", shown)[1]) < 0.001
    assert "float32" in shown
    merged_weight = clinora.merged_weight
    with pytest.MonkeyPatch.context() as patch:  # a wrong weight is noticed
        patch.setattr(clinora, "merged_weight", lambda layer: 2 * merged_weight(layer))
        _event, (shown,) = call(client, "compare_merged", NOTE)
    assert float(re.search(r"([\d.e-]+) points", shown)[1]) > 1
    assert all(torch.equal(p, state[name]) for name, p in classifier.model.state_dict().items())


def test_the_number_of_parameters_is_the_closed_form_for_both_models(client, classifier):
    _, (table,) = call(client, "count_for_rank", 4, ["q_proj", "up_proj"])
    # The small run: width 32, MLP 48, 2 layers. TinyLlama: 2,048, 5,632 and 22.
    small = 2 * 4 * (32 + 32 + 32 + 48)
    large = 22 * 4 * (2048 + 2048 + 2048 + 5632)
    rows = [[row[0], row[1], row[4]] for row in table["data"]]
    assert rows == [
        ["the loaded base", f"{small:,}", f"{2 * (32 * 32 + 32 * 48):,}"],
        ["TinyLlama", f"{large:,}", f"{22 * (2048 * 2048 + 2048 * 5632):,}"],
    ]
    assert table["data"][1][2] == f"{4 * large / 1e6:,.2f}"
    base = sum(p.numel() for p in clinora.load_model(classifier.model.source.folder).parameters())
    assert table["data"][0][3] == f"{small / base:.3%}"


def test_tinyllama_has_its_published_size():
    assert base_parameters(TINYLLAMA, None) == 1_100_048_384


def test_an_impossible_choice_gives_a_message(client):
    _, (table,) = call(client, "count_for_rank", 64, ["v_proj"])  # 16 × 32 in the small run
    assert "1 to 16" in table["data"][0][1]
    assert table["data"][1][1] == f"{22 * 64 * (2048 + 256):,}"
    _, (table,) = call(client, "count_for_rank", 8, [])
    assert "targets is empty" in table["data"][0][1]


def test_a_run_whose_targets_are_paths_of_layers_has_a_page(small_run, tmp_path):
    model = clinora.load_model(small_run.parent / "base", num_labels=5)
    targets = ("layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj")
    clinora.apply_lora(model, clinora.LoRAConfig(rank=16, targets=targets))
    model.head_trained = True
    tokenizer = clinora.Tokenizer(small_run.parent / "base" / "tokenizer.model")
    run = clinora.Classifier(model, tokenizer, clinora.PUBLISHED_CLASSES, token_limit=128)
    with TestClient(create_app(run, tmp_path), "http://127.0.0.1") as client:
        assert call(client, "predict", NOTE)[0] == "complete"
