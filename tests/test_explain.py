"""Which sentences support a prediction, and what an adapter changed."""

from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import clinora
from clinora.checkpoint import BUNDLED
from clinora.classifier import Prediction
from clinora.explain import (
    MOST_PARTS,
    Part,
    effects,
    layer_updates,
    leave_one_out,
    parts_of,
    split_sentences,
    variants,
)

SENTENCES = [
    "No fever.  ",
    "Dose 2.5 mg of chest pain, é 🙂!\n",
    "ECG: normal\n\n",
    "The knee, swollen. ",
    "CT",
]
NOTE = "".join(SENTENCES)


@hypothesis.given(st.text(alphabet=" .,!?\nab2é", max_size=60))
def test_sentences_rejoin_to_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text and all(sentences)


def test_a_sentence_ends_after_its_stop_or_line_and_not_inside_a_number():
    assert split_sentences(NOTE) == SENTENCES


@pytest.fixture
def changeable(small_run):
    """A classifier of one test, which may change it."""
    return clinora.Classifier.load(small_run, device="cpu", precision="fp32")


# --- The parts of a note ---


@hypothesis.given(st.text(alphabet=" .,!?\nab2é漢🙂\u200b\u0301", max_size=500))
def test_parts_are_the_beginning_of_the_note_and_each_is_visible(classifier, text):
    visible = set(".,!?ab2é漢🙂")
    hypothesis.assume(visible & set(text))
    parts = parts_of(classifier, text)
    assert text.strip().startswith("".join(parts))
    assert len(parts) <= MOST_PARTS
    assert all(visible & set(part) for part in parts)
    if len(classifier.tokenizer.encode(text)) <= classifier.token_limit:
        assert "".join(parts) == text.strip()


def test_parts_are_sentences_and_blank_lines_belong_to_a_neighbour(classifier):
    note = "\u200b\nNo fever. \n\u200b\nECG: normal\n\ufeff\n\u0301\nThe knee."
    expected = ["\u200b\nNo fever. \n\u200b\n", "ECG: normal\n\ufeff\n\u0301\n", "The knee."]
    assert parts_of(classifier, note) == expected
    assert parts_of(classifier, f" {NOTE}\n") == SENTENCES


def test_the_shortest_neighbours_of_too_many_sentences_become_one_part(changeable):
    changeable.token_limit = 256
    longer = ["The chest pain. "] * 5
    note = [*longer, "No. ", "CT! ", "It? ", *longer, "ECG: normal. ", "No fever. ", *longer[:4]]
    expected = [*longer, "No. CT! It? ", *longer, "ECG: normal. No fever. ", *longer[:3]]
    note.append("A.")
    expected.append("The chest pain. A.")
    assert len(expected) == MOST_PARTS
    assert parts_of(changeable, "".join(note)) == expected


def test_the_parts_of_a_long_note_end_where_its_last_read_token_ends(changeable):
    note = f"Chest pain. {'漢🙂 The knee, swollen. ' * 4}"
    ids = changeable.tokenizer.encode(note)
    for limit in range(2, 60):
        changeable.token_limit = limit
        read = changeable.tokenizer.decode(ids[:limit])
        assert "".join(parts_of(changeable, note)) == read.rstrip("\ufffd")  # bytes of a character


def test_the_text_beyond_the_limit_has_no_effect_and_changes_none(classifier):
    begin = "Chest pain. The knee, swollen. No fever. ECG: normal. " * 6
    ids = classifier.tokenizer.encode(begin)
    assert len(ids) > classifier.token_limit + 10
    explained = leave_one_out(classifier, begin + "CT of the abdomen. " * 50)
    assert explained[:-1] == leave_one_out(classifier, begin)[:-1]
    assert explained[-1].effect is None
    read = classifier.tokenizer.decode(ids[: classifier.token_limit])
    assert "".join(part.text for part in explained[:-1]) == read


# --- Their effects ---


def probabilities(classifier, text):
    """Run the model over one text, without padding, in float32; softmax in float64."""
    ids = classifier.tokenizer.encode(text)
    with torch.no_grad():
        logits = classifier.model.eval()(torch.tensor([ids]), torch.tensor([len(ids)]))
    return logits[0].double().softmax(0)


def test_an_effect_is_the_fall_of_the_probability_when_the_sentence_is_left_out(classifier):
    whole = probabilities(classifier, NOTE)
    predicted = int(whole.argmax())
    without = [
        "Dose 2.5 mg of chest pain, é 🙂!\nECG: normal\n\nThe knee, swollen. CT",
        "No fever.  ECG: normal\n\nThe knee, swollen. CT",
        "No fever.  Dose 2.5 mg of chest pain, é 🙂!\nThe knee, swollen. CT",
        "No fever.  Dose 2.5 mg of chest pain, é 🙂!\nECG: normal\n\nCT",
        "No fever.  Dose 2.5 mg of chest pain, é 🙂!\nECG: normal\n\nThe knee, swollen. ",
    ]
    expected = [
        100 * (whole - probabilities(classifier, text))[predicted].item() for text in without
    ]
    assert max(map(abs, expected)) > 1  # points: the rounding of float32 is far smaller
    explained = leave_one_out(classifier, f"  {NOTE}\r\n")
    assert [part.text for part in explained] == SENTENCES
    assert [part.effect for part in explained] == pytest.approx(expected, abs=1e-3)


def prediction(*probabilities):
    """A prediction of which nothing else matters."""
    index = probabilities.index(max(probabilities))
    return Prediction("", index, None, probabilities, None, 9, False)


def test_effects_are_of_the_class_that_is_predicted_for_the_whole_note():
    whole = prediction(0.25, 0.625, 0.125)
    without = [prediction(0.5, 0.375, 0.125), prediction(0.125, 0.75, 0.125)]
    expected = [Part("A. ", 25.0), Part("B.", -12.5)]
    assert effects(["A. ", "B."], [whole, *without]) == expected
    of_third = [Part("A. ", 0.0), Part("B.", 0.0)]
    assert effects(["A. ", "B."], [whole, *without], index=2) == of_third


def test_variants_leave_out_each_part_once():
    assert variants(["A. ", "B. ", "C."]) == ["A. B. C.", "B. C.", "A. C.", "A. B. "]


@pytest.mark.parametrize("predictions", [0, 2, 4])
def test_predictions_of_other_texts_are_refused(predictions):
    with pytest.raises(ValueError, match=f"{predictions} predictions for 2 parts: expected 3"):
        effects(["A. ", "B."], [prediction(0.5, 0.25, 0.25)] * predictions)


def test_a_note_of_one_sentence_has_nothing_to_be_compared_with(classifier):
    assert leave_one_out(classifier, " Chest pain, no fever. ") == [
        Part("Chest pain, no fever.", None)
    ]


def test_a_note_of_which_no_visible_text_is_read_has_no_effect(changeable):
    note = f"\u0301\u0301\u0301{NOTE}"
    for limit in (1, 4):  # the token in front of every note; that and a first accent
        changeable.token_limit = limit
        assert leave_one_out(changeable, note) == [Part(note, None)]


@pytest.mark.parametrize("note", ["", " \n", "\u200b\ufeff"])
def test_an_empty_note_is_refused(classifier, note):
    with pytest.raises(ValueError, match="the note is empty"):
        leave_one_out(classifier, note)


def test_two_threads_explain_their_own_notes(classifier):
    classifier.model.eval()
    notes = [NOTE, "The knee is swollen. No chest pain! CT of the abdomen.\nECG: normal"]
    alone = [leave_one_out(classifier, note) for note in notes]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda i: leave_one_out(classifier, notes[i % 2]), range(40)))
    assert together == alone * 20


# --- The tokens' places, where the unread text begins ---


def test_places_are_where_the_pieces_stand_and_bytes_of_a_character_stand_at_its_end():
    tokenizer = clinora.Tokenizer(BUNDLED / "base" / "tokenizer.model")
    ids, places = tokenizer.encode(NOTE), tokenizer.places(f" {NOTE}\n")
    assert len(places) == len(ids) and places[0] == (0, 0)
    assert "".join(NOTE[begin:end] for begin, end in places) == NOTE
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if "\ufffd" not in text:  # no character in parts
            assert text == NOTE[: places[end - 1][1]]
    assert tokenizer.places(NOTE, 5) == places[:5]


# --- What an adapter changed ---


def test_updates_are_those_of_the_dense_product(classifier):
    updates = {update.name: update for update in layer_updates(classifier.model)}
    layers = dict(classifier.model.named_modules())
    assert len(updates) == 4  # q and v of two layers
    for name, update in updates.items():
        layer = layers[name]
        dense = 2 * layer.lora_B.double() @ layer.lora_A.double()  # alpha 8 / r 4
        sigma = torch.linalg.svdvals(dense)[:4]
        assert update.singular_values == pytest.approx(sigma.tolist(), rel=1e-9)
        share = torch.linalg.norm(dense) / torch.linalg.norm(layer.weight.double())
        assert update.share == pytest.approx(share.item(), rel=1e-9)
        p = sigma / sigma.sum()
        assert update.effective_rank == pytest.approx(
            torch.distributions.Categorical(p).perplexity().item()
        )


def test_the_effective_rank_of_equal_directions_is_their_number_and_of_none_0(changeable):
    layer = next(m for m in changeable.model.modules() if isinstance(m, clinora.LoRALinear))
    with torch.no_grad():
        torch.nn.init.orthogonal_(layer.lora_A)
        layer.lora_B.zero_()
        assert layer_updates(changeable.model)[0].effective_rank == 0
        layer.lora_B[:3, :3] = torch.eye(3)
    update = layer_updates(changeable.model)[0]
    assert update.effective_rank == pytest.approx(3)
    assert update.singular_values == pytest.approx((2, 2, 2, 0), abs=1e-6)
