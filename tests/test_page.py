"""The page's tabs "Classify" and "LoRA internals": their answers, through the page's own calls."""

import csv
import html
import io
import json
import re
import threading
import time
from types import SimpleNamespace

import gradio
import pytest
import torch
from fastapi.testclient import TestClient
from matplotlib.figure import Figure

import clinora
from clinora.attention import attention_weights
from clinora.budget import base_parameters
from clinora.checkpoint import BUNDLED
from clinora.serving import answering, events, internals_note, internals_tab
from clinora.serving import batcher as batcher_module
from clinora.serving.answer import CONFIDENT, NEEDS_A_PERSON, STALE
from clinora.serving.answering import Answers
from clinora.serving.api import MOST_CHARACTERS
from clinora.serving.app import create_app
from clinora.serving.batcher import Batcher
from clinora.serving.history import History
from clinora.serving.internals_tab import TINYLLAMA
from clinora.serving.words import EXAMPLES, words_about
from tests.served import UNCHANGED, calibration, call, join, messages

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
    """Submit a note; give the outputs that the page shows at the end, by name."""
    event, outputs = call(client, "predict", note, None, session=session)
    assert event == "complete"
    return by_name(outputs)


def by_name(outputs):
    names = (
        "card", "json", "text", "probabilities", "numbers", "history", "explanation", "explain",
    )  # fmt: skip
    return SimpleNamespace(**dict(zip(names, outputs, strict=True)))


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
    event, answer = call(client, "predict", note, None)
    assert event == "error"
    assert answer["error"] == "Enter a clinical note first."


def test_a_note_of_the_most_characters_is_read_and_a_longer_one_refused(client):
    assert call(client, "predict", "x" * MOST_CHARACTERS, None)[0] == "complete"
    event, answer = call(client, "predict", "x" * (MOST_CHARACTERS + 1), None)
    assert event == "error"
    assert "100,001 characters" in answer["error"]


def test_the_page_shows_how_many_tokens_a_note_has_and_how_many_were_read(client, classifier):
    shown = predict(client, "fever " * 300)
    assert re.search(r"more than 128 tokens\b.*\bfirst 128\b", shown.numbers)
    tokens = len(classifier.tokenizer.encode("fever"))
    shown = predict(client, "fever")
    assert re.search(rf"\b{tokens} tokens\b.*\ball\b", shown.numbers)


def test_the_page_shows_all_probabilities_and_the_confidence(classifier, flags_folder, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.9999))
    with TestClient(create_app(classifier, flags_folder), "http://127.0.0.1") as client:
        shown = predict(client, "fever")
    expected = classifier(["fever"])[0]
    probabilities = dict(zip(classifier.labels, expected.probabilities, strict=True))
    assert by_label(shown.probabilities) == pytest.approx(probabilities, abs=1e-3)
    assert expected.refer
    assert NEEDS_A_PERSON in shown.card
    for percentage in (f"{expected.confidence:.1%}", "100.0%"):  # the confidence, the threshold
        assert percentage in shown.numbers


def test_a_confident_answer_may_be_filed_automatically(classifier, flags_folder, monkeypatch):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.01))
    with TestClient(create_app(classifier, flags_folder), "http://127.0.0.1") as client:
        card = predict(client, "fever").card
    assert CONFIDENT in card
    assert NEEDS_A_PERSON not in card


def test_a_run_that_never_reached_the_promised_accuracy_refers_every_note(
    classifier, flags_folder, monkeypatch
):
    monkeypatch.setattr(classifier, "calibration", calibration(threshold=2.0))
    with TestClient(create_app(classifier, flags_folder), "http://127.0.0.1") as client:
        shown = predict(client, "fever")
    assert NEEDS_A_PERSON in shown.card
    for text in (shown.card, shown.numbers):
        assert "200" not in text  # a threshold above 100% means that none was found


def test_the_page_refers_every_note_of_an_uncalibrated_run_but_the_api_does_not_say(client):
    shown = predict(client, "fever")
    assert NEEDS_A_PERSON in shown.card
    assert "not calibrated" in shown.numbers
    answer = client.post("/v1/classify", json={"note": "fever"}).json()
    assert answer["refer"] is None


def test_the_card_of_a_cut_note_says_how_much_was_read(client, classifier):
    note = "Chest pain " * 300
    words_read = None
    for words in range(1, 300):  # the most words whose tokens are all read
        if len(classifier.tokenizer.encode(note[: 11 * words].strip())) <= classifier.token_limit:
            words_read = 2 * words
    shown = predict(client, note)
    found = re.search(r"about the first ([\d,]+) of 600 words", shown.card)
    assert abs(int(found[1]) - words_read) <= 2
    assert "details" in shown.card
    assert "of 2 words" not in predict(client, "Chest pain").card


# --- The explanation ---


def visible(fragment):
    return html.unescape(re.sub(r"<[^>]*>", "", fragment))


def test_the_explanation_says_how_far_the_probability_falls_without_each_sentence(
    client, classifier
):
    sentences = ["Severe chest pain. ", "No fever!  ", "ECG: normal.\n", "The knee, swollen."]
    assert "".join(sentences) == NOTE
    shown = predict(client, f" {NOTE}\n")
    whole = classifier([NOTE])[0]
    for sentence in sentences:
        without = classifier([NOTE.replace(sentence, "")])[0].probabilities[whole.index]
        points = round(100 * (whole.probabilities[whole.index] - without))
        expected = f"{points:+}".replace("-", "−") if points else "0"
        assert f"{sentence.strip()} {expected}" in visible(shown.explanation)
    assert shown.explain["visible"] is False


def test_the_answer_comes_before_its_explanation(client, classifier):
    join(client, "predict", NOTE, None, session="one")
    told = [m["output"]["data"] for m in messages(client, "one") if "output" in m]
    first = by_name(told[0])
    assert first.text == classifier([NOTE])[0].as_text()
    assert "percentage points" not in first.explanation
    *answer, explanation, _button = told[-1]
    assert "percentage points" in explanation
    assert answer[0] == UNCHANGED  # what the reader has opened in the card stays open


def test_text_that_was_not_read_has_no_points(client):
    explanation = predict(client, "Chest pain. " * 60).explanation
    text = visible(explanation[explanation.index("note-text") :])
    assert text.count("Chest pain.") == 60
    assert not re.search(r"\d$", text)


def test_an_answer_that_is_no_longer_shown_is_not_explained(classifier, monkeypatch):
    monkeypatch.setattr(events, "visitor_is_gone", lambda: False)
    batcher = Batcher(classifier)
    history = History()
    steps = Answers(batcher, words_about(classifier)).predict(NOTE, history)
    assert next(steps)[2] == classifier([NOTE])[0].as_text()
    history.shown = None
    assert list(steps) == [(gradio.skip(),) * 8]
    batcher.close()


@pytest.fixture
def waiting(classifier, monkeypatch):
    """Submit a note, and do something on the page while its answer is awaited.

    Gives a function: what is done with the page's answers and history → what the page shows then.
    """
    batcher = Batcher(classifier)
    answers = Answers(batcher, words_about(classifier))
    history = History()

    def submit(meanwhile):
        done = []

        def visitor_is_gone():
            monkeypatch.setattr(events, "visitor_is_gone", lambda: False)
            done.append(meanwhile(answers, history))
            return False

        monkeypatch.setattr(events, "visitor_is_gone", visitor_is_gone)
        batcher.submit_job(lambda: time.sleep(0.3))
        steps = list(answers.predict(NOTE, history))
        return steps, done[0], history

    yield submit
    batcher.close()


NOTHING = [tuple(gradio.skip() for _ in range(8))]


def test_the_answer_to_a_note_is_not_shown_when_another_was_submitted_meanwhile(
    waiting, classifier
):
    steps, other, history = waiting(lambda answers, h: next(answers.predict("Knee pain.", h)))
    assert steps == NOTHING
    assert other[2] == classifier(["Knee pain."])[0].as_text()
    assert history.shown.is_of("Knee pain.")


def test_the_answer_to_a_note_is_not_shown_when_the_page_was_cleared_meanwhile(waiting):
    steps, _, history = waiting(lambda answers, h: answers.clear(NOTE, h))
    assert steps == NOTHING
    assert history.shown is None


def test_an_older_notes_failure_does_not_remove_a_newer_notes_answer(waiting, monkeypatch):
    monkeypatch.setattr(answering, "wait_for", fail_later(events.wait_for))
    steps, _, history = waiting(lambda answers, h: next(answers.predict("Knee pain.", h)))
    assert steps == NOTHING
    assert history.shown.is_of("Knee pain.")


def fail_later(wait_for):
    """Wait for a result, but fail if another was awaited meanwhile."""
    calls = []

    def wait_and_fail(future):
        calls.append(future)
        result = wait_for(future)
        if calls[-1] is not future:
            raise TimeoutError
        return result

    return wait_and_fail


def test_a_busy_service_gives_the_answer_without_an_explanation(client, classifier, monkeypatch):
    monkeypatch.setattr(batcher_module, "MOST_WAITING_NOTES", 3)
    shown = predict(client, NOTE)
    assert shown.text == classifier([NOTE])[0].as_text()
    assert "busy" in shown.explanation
    assert shown.explain["visible"] is True
    monkeypatch.undo()
    event, (explanation,) = call(client, "explain", NOTE, None)
    assert event == "complete"
    assert "percentage points" in explanation


def test_one_client_does_not_take_all_explanations(client, monkeypatch):
    monkeypatch.setattr(answering, "MOST_OF_A_CLIENT", 0)
    assert "busy" in predict(client, NOTE).explanation


def test_on_a_large_base_an_answer_is_explained_on_request(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "MOST_PARAMETERS", 100)
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        event, answer = call(client, "explain", NOTE, None)
        assert (event, "no answer" in answer["error"]) == ("error", True)
        shown = predict(client, NOTE)
        assert (shown.explanation, shown.explain["visible"]) == ("", True)
        event, answer = call(client, "explain", f"{NOTE} Changed.", None)
        assert (event, answer["error"]) == ("error", STALE)
        _, (explanation,) = call(client, "explain", NOTE, None)
        assert "percentage points" in explanation


# --- Clear, Undo and the last notes ---


def clear(client, note, session="one"):
    """Press Clear; give the text that the page keeps for Undo."""
    event, (shown, cleared, undo, _reason, consent, *outputs) = call(
        client, "clear", note, None, session=session
    )
    assert event == "complete"
    assert undo["visible"] is True
    assert consent is False
    assert not shown and not by_name(outputs).text
    return cleared


def undo(client, cleared):
    """Press Undo; give the note and the outputs."""
    event, (note, _cleared, button, *outputs) = call(client, "undo_clear", cleared, None)
    assert event == "complete"
    return note, button, by_name(outputs)


def test_undo_brings_back_the_cleared_note_and_its_answer(client, classifier):
    answer = predict(client, NOTE)
    cleared = clear(client, NOTE)
    assert call(client, "flag", NOTE, None, False, "Other")[0] == "error"  # no answer is shown
    note, button, shown = undo(client, cleared)
    assert (note, button["visible"]) == (NOTE, False)
    assert (shown.text, shown.explanation) == (answer.text, answer.explanation)
    assert call(client, "flag", NOTE, None, False, "Other")[0] == "complete"


def test_clearing_an_empty_note_keeps_the_note_that_was_cleared_before(client):
    answer = predict(client, NOTE)
    cleared = clear(client, NOTE)
    _, outputs = call(client, "clear", "", None)
    assert outputs[1:3] == [UNCHANGED, UNCHANGED]  # the cleared note, and the Undo button
    assert undo(client, cleared)[2].text == answer.text


def test_undo_needs_no_new_prediction(client, classifier, monkeypatch):
    answer = predict(client, NOTE)
    cleared = clear(client, NOTE)

    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(classifier, "logits", fail)
    note, _, shown = undo(client, cleared)
    assert (note, shown.text, shown.card.split("answer-class")[1]) == (
        NOTE, answer.text, answer.card.split("answer-class")[1],
    )  # fmt: skip


@pytest.mark.parametrize("submitted", [None, "Another note."])
def test_undo_brings_back_no_answer_of_another_note(client, submitted):
    if submitted is not None:
        predict(client, submitted)
    note, button, shown = undo(client, clear(client, NOTE))
    assert (note, button["visible"]) == (NOTE, False)
    assert not shown.text


def test_the_last_notes_can_be_downloaded_by_their_visit_alone(client, classifier):
    event, answer = call(client, "download_last_notes", None)
    assert (event, "no note" in answer["error"]) == ("error", True)
    notes = ["Chest pain.", "Knee pain.", "=1+1 fever"]
    for note in notes:
        history = predict(client, note).history
    assert all(html.escape(note) in history for note in notes)
    _, (file,) = call(client, "download_last_notes", None)
    answer = client.get(f"/gradio_api/file={file['path']}")
    rows = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig"))))
    assert [row["label"] for row in rows] == [p.label for p in classifier(notes[::-1])]
    assert [row["note"] for row in rows] == ["'=1+1 fever", "Knee pain.", "Chest pain."]
    client.cookies.clear()
    client.get("/config")
    assert client.get(f"/gradio_api/file={file['path']}").status_code == 404
    event, answer = call(client, "download_last_notes", None)
    assert (event, "no note" in answer["error"]) == ("error", True)


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
        assert call(client, "compare_strengths", NOTE, strength, None)[0] == "complete"
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
        call(client, "compare_strengths", NOTE, strength, None)
        alone[f"chosen ({strength:g})"] = drawn.pop()[1]
    predicted = by_label(predict(client, NOTE, "alone").probabilities)
    found = []

    def ask(strength, session):
        for _ in range(5):
            found.append(
                call(client, "compare_strengths", NOTE, strength, None, session=session)[0]
            )
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
        assert call(client, "show_attention", NOTE, layer, head, None)[0] == "complete"
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
    assert call(client, "show_weights", name, None)[0] == "complete"
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


def test_what_a_visitor_asks_for_stays_when_the_filling_ends_later(
    classifier, flags_folder, drawn, monkeypatch
):
    may_go_on = threading.Event()
    layer_updates = internals_tab.layer_updates
    monkeypatch.setattr(
        internals_tab, "layer_updates", lambda model: may_go_on.wait(30) and layer_updates(model)
    )
    with TestClient(create_app(classifier, flags_folder), "http://127.0.0.1") as client:
        filling = join(client, "open_internals", None, session="one").json()
        asking = join(client, "compare_strengths", NOTE, 0.5, None, session="one").json()
        end = time.monotonic() + 30
        while not drawn and time.monotonic() < end:
            time.sleep(0.05)
        may_go_on.set()
        shown = {
            message["event_id"]: message["output"]["data"]
            for message in messages(client, "one")
            if message["msg"] == "process_completed"
        }
    *_, bars, attention = shown[filling["event_id"]]
    assert bars == UNCHANGED
    assert "plot" in attention
    assert "plot" in shown[asking["event_id"]][0]


def test_what_a_visitor_asks_for_in_vain_is_filled(client):
    assert call(client, "compare_strengths", "", 0.5, None)[0] == "error"
    *_, bars, _attention = call(client, "open_internals", None)[1]
    assert "plot" in bars


def test_the_results_show_each_measured_rank(client):
    report = json.loads((BUNDLED / "ranks.json").read_text())
    ranks = [row["rank"] for row in report["ranks"]]
    assert ranks == [1, 2, 4, 8, 16, 32]
    for row in report["ranks"]:
        _, (words, *_) = call(client, "choose_result", str(row["rank"]), None)
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


def test_the_merged_weights_read_a_note_in_capitals_as_the_classifier_does(client):
    _event, (shown,) = call(client, "compare_merged", NOTE.upper())
    assert float(re.search(r"([\d.e-]+) points", shown)[1]) < 0.01


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
        assert call(client, "predict", NOTE, None)[0] == "complete"
