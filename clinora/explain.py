"""Explanations: which sentences support a prediction, and what an adapter changed.

Shapes: T tokens, D width, C classes, r rank.
"""

import bisect
import itertools
import math
import re
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clinora.classifier import Classifier
from clinora.lora import LoRALinear
from clinora.notes import clean_text, has_visible
from clinora.variants import DoRALinear

# A sentence ends with a mark and the white space and commas after it, or with the line. A full stop
# inside a number does not match, because neither follows it.
_SENTENCE_END = re.compile(r"[.!?](?=[\s,])[\s,]*|\n\s*")


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences and lines; joined, they give the text again.

    >>> split_sentences("No fever.  Dose 2.5 mg. ECG: normal")
    ['No fever.  ', 'Dose 2.5 mg. ', 'ECG: normal']
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    cuts = sorted({0, *ends, len(text)})
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)]


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a note and its contribution to the prediction.

    Attributes:
        text: The sentence with the white space after it.
        contribution: To the log-odds of the predicted class, in nats, to first order. Above 0 the
            sentence supports the prediction, below 0 it opposes it; None if it was not read.
    """

    text: str
    contribution: float | None


def explain(classifier: Classifier, text: str) -> list[Sentence]:
    """Compute how much each sentence of a note supports or opposes the predicted class.

    The contribution of a token is e · ∂z/∂e, with its embedding e and the log-odds
    z = ln(p / (1 − p)) of the predicted class. A sentence's contribution is the sum over its tokens
    (gradient × input, Shrikumar et al. 2016).

    Returns:
        The sentences of the cleaned note, in their order. The text beyond the token limit is one
        last sentence without a contribution; it begins exactly where the last token ends, which may
        be inside a sentence.

    Raises:
        ValueError: The note is empty.
    """
    text = clean_text(text)
    if not has_visible(text):
        raise ValueError("the note is empty: it has no visible text")
    limit = classifier.token_limit
    one_more = classifier.tokenizer.encode(text, limit + 1)
    ids = one_more[:limit]
    places = classifier.tokenizer.places(text, limit)
    scores = token_contributions(classifier, ids)
    read = len(text)  # characters
    if len(one_more) > limit:
        _, read = places[-1]
    sentences = split_sentences(text[:read])
    ends = list(itertools.accumulate(len(sentence) for sentence in sentences))
    sums = [0.0] * len(sentences)
    in_front = len(classifier.tokenizer.first)  # tokens that are no part of the note
    for score, (begin, end) in zip(scores[in_front:], places[in_front:], strict=True):
        # A token may begin with the space after the sentence before: its last character decides.
        last_character = max(begin, end - 1)
        if last_character < read:  # else it is of a character whose other tokens were not read
            sums[bisect.bisect(ends, last_character)] += score
    pairs = zip(sentences, sums, strict=True)
    explained = [Sentence(sentence, contribution) for sentence, contribution in pairs]
    if read < len(text):
        explained.append(Sentence(text[read:], None))
    return explained


def token_contributions(classifier: Classifier, ids: list[int]) -> list[float]:
    """Give e · ∂z/∂e for each token, with z the log-odds of the predicted class: T floats."""
    model = classifier.model
    device = model.score.weight.device
    this_thread = threading.get_ident()
    kept = []  # the embeddings, which the gradient is taken of

    def cut_graph(_module: nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
        if threading.get_ident() != this_thread:  # another note, classified at the same time
            return embedded
        kept.append(embedded.detach().requires_grad_())  # (1, T, D)
        return kept[0]

    training = model.training
    model.eval()
    hook = model.model.embed_tokens.register_forward_hook(cut_graph)
    try:
        with torch.enable_grad(), classifier.autocast():
            lengths = torch.tensor([len(ids)], device=device)
            logits = model(torch.tensor([ids], device=device), lengths)[0].float()  # (C,)
        predicted = logits.argmax()
        # ln(p / (1 − p)) = logit of the predicted class − logsumexp of the other logits.
        others = torch.cat((logits[:predicted], logits[predicted + 1 :]))
        log_odds = logits[predicted] - others.logsumexp(0)
        (gradient,) = torch.autograd.grad(log_odds, kept)
    finally:
        hook.remove()
        model.train(training)
    embedded = kept[0].detach()
    return (gradient.float() * embedded.float()).sum(-1)[0].tolist()


@dataclass(frozen=True, slots=True)
class LayerUpdate:
    """What an adapter changed in one layer: ΔW, which is s·B·A for LoRA, compared with W.

    Attributes:
        name: The layer's full name.
        share: ‖ΔW‖ / ‖W‖, Frobenius norms.
        singular_values: The singular values of ΔW, the largest first: as many as the factors' rank;
            all for DoRA, which has no such factors.
        effective_rank: exp(−Σ p·ln p) with p = σ / Σσ (Roy & Vetterli 2007, section 2); 0 if
            nothing changed.
    """

    name: str
    share: float
    singular_values: tuple[float, ...]
    effective_rank: float


@torch.no_grad()
def layer_updates(model: nn.Module) -> list[LayerUpdate]:
    """Measure what LoRA changed in each layer, with singular values in float64.

    With B = Q₁·R₁ and Aᵀ = Q₂·R₂, the singular values of BA are those of the r × r core R₁·R₂ᵀ, so
    the out × in matrix BA is not formed. DoRA's ΔW has no such factors and is formed.
    """
    updates = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        weight = layer.weight.cpu().double()  # on the CPU: not every device has float64
        if isinstance(layer, DoRALinear):
            change = layer.adapted(layer.weight.to(layer.lora_A.dtype)).cpu().double() - weight
            sigma = torch.linalg.svdvals(change)
        else:
            A, B = layer.factors(layer.lora_A, layer.lora_B)
            core_b = torch.linalg.qr(B.cpu().double()).R
            core_a = torch.linalg.qr(A.T.cpu().double()).R
            sigma = torch.linalg.svdvals(core_b @ core_a.T) * abs(layer.config.scaling)  # (r,)
        updates.append(
            LayerUpdate(
                name=name,
                share=(sigma.norm() / weight.norm()).item(),
                singular_values=tuple(sigma.tolist()),
                effective_rank=_effective_rank(sigma),
            )
        )
    return updates


def _effective_rank(sigma: Tensor) -> float:
    if sigma.sum() == 0:
        return 0.0
    shares = sigma[sigma > 0] / sigma.sum()
    entropy = -(shares * shares.log()).sum()
    return math.exp(entropy.item())
