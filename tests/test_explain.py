"""Why an answer, and what an adapter changed, against finite differences and dense algebra."""

from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import clinora
from clinora.checkpoint import BUNDLED
from clinora.explain import explain, layer_updates, split_sentences, token_contributions

NOTE = "No fever.  Dose 2.5 mg of chest pain, é 🙂!\nECG: normal\n\nThe knee, swollen. CT"


@pytest.fixture
def classifier(small_run):
    return clinora.Classifier.load(small_run, device="cpu", precision="fp32")


@hypothesis.given(st.text(alphabet=" .,!?\nab2é", max_size=60))
def test_sentences_rejoin_to_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text and all(sentences)


def test_a_sentence_ends_after_its_stop_or_line_and_not_inside_a_number():
    assert split_sentences(NOTE) == [
        "No fever.  ",
        "Dose 2.5 mg of chest pain, é 🙂!\n",
        "ECG: normal\n\n",
        "The knee, swollen. ",
        "CT",
    ]


def log_odds(classifier, ids, scale, index):
    """Give the log-odds of a class with each token's embedding multiplied by a factor."""
    model = classifier.model.eval()
    hook = model.model.embed_tokens.register_forward_hook(lambda *x: x[-1] * scale[:, None])
    with torch.no_grad():
        p = model(torch.tensor([ids]), torch.tensor([len(ids)]))[0].double().softmax(0)
    hook.remove()
    return (p[index].log() - (-p[index]).log1p()).item()


def test_contributions_are_the_derivative_of_the_log_odds_by_the_embeddings_size(classifier):
    ids = classifier.tokenizer.encode(NOTE)
    found = token_contributions(classifier, ids)
    named = classifier([NOTE])[0].index
    for i in range(0, len(ids), 5):
        up, down = torch.ones(2, len(ids))
        up[i], down[i] = 1.02, 0.98
        z = [log_odds(classifier, ids, scale, named) for scale in (up, down)]
        assert found[i] == pytest.approx((z[0] - z[1]) / 0.04, rel=0.02, abs=1e-3)


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


def test_a_sentence_has_the_sum_of_its_tokens(classifier):
    note = "No fever. Dose 2.5 mg for chest pain. ECG normal! CT"
    ids = classifier.tokenizer.encode(note)
    tokens = token_contributions(classifier, ids)
    sentences = explain(classifier, f"  {note}\n")
    assert "".join(sentence.text for sentence in sentences) == note
    expected, starts = [0.0] * len(sentences), [0]
    for sentence in sentences:
        starts.append(starts[-1] + len(sentence.text))
    for i in range(1, len(ids)):  # a token stands where its last character does
        last = max(0, len(classifier.tokenizer.decode(ids[: i + 1])) - 1)
        expected[max(k for k in range(len(sentences)) if starts[k] <= last)] += tokens[i]
    assert [s.contribution for s in sentences] == pytest.approx(expected, abs=1e-5)


def test_what_was_not_read_has_no_contribution(classifier):
    note = "Chest pain. " * 60
    sentences = explain(classifier, note)
    ids = classifier.tokenizer.encode(note)
    assert len(ids) > classifier.token_limit == 128
    read = classifier.tokenizer.decode(ids[:128])
    assert "".join(s.text for s in sentences if s.contribution is not None) == read
    assert sentences[-1].contribution is None  # the rest, as one
    assert all(s.contribution is not None for s in sentences[:-1])
    assert "".join(s.text for s in sentences) == note.strip()


def test_explaining_changes_nothing(classifier):
    model = classifier.model.eval()
    before = classifier([NOTE])[0]
    first = explain(classifier, NOTE)
    assert classifier([NOTE])[0] == before
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    embedded = model.model.embed_tokens(torch.tensor([[1, 2]]))
    assert not embedded.requires_grad  # the hook that makes it a leaf is gone
    assert explain(classifier, NOTE) == first


def test_a_note_classified_meanwhile_in_another_thread_is_its_own(classifier):
    """Explaining hooks into the embedding, which all threads share."""
    alone = classifier(["knee pain"])[0].probabilities
    expected = token_contributions(classifier, [5, 6, 7])
    model = classifier.model
    meanwhile = []

    def classify_another(*_):
        hook.remove()
        with ThreadPoolExecutor(1) as pool:
            meanwhile.append(pool.submit(classifier, ["knee pain"]).result()[0].probabilities)

    hook = model.model.layers[0].register_forward_hook(classify_another)
    assert token_contributions(classifier, [5, 6, 7]) == expected
    assert meanwhile == [alone]


def test_an_empty_note_is_refused(classifier):
    with pytest.raises(ValueError, match="the note is empty"):
        explain(classifier, " \n")


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


def test_the_effective_rank_of_equal_directions_is_their_number_and_of_none_0(classifier):
    layer = next(m for m in classifier.model.modules() if isinstance(m, clinora.LoRALinear))
    with torch.no_grad():
        torch.nn.init.orthogonal_(layer.lora_A)
        layer.lora_B.zero_()
        assert layer_updates(classifier.model)[0].effective_rank == 0
        layer.lora_B[:3, :3] = torch.eye(3)
    update = layer_updates(classifier.model)[0]
    assert update.effective_rank == pytest.approx(3)
    assert update.singular_values == pytest.approx((2, 2, 2, 0), abs=1e-6)
