"""Why an answer, and how far: the sentences that spoke for it, and what an adapter changed.

Shapes: T tokens, D width, r rank.
"""

import bisect
import itertools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clinora.classifier import Classifier
from clinora.lora import LoRALinear
from clinora.notes import clean_text, has_visible

# After a full stop and what follows it, or after a line; a full stop inside a number ends nothing.
_SENTENCE_END = re.compile(r"[.!?](?=[\s,])[\s,]*|\n\s*")


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences and lines; joined, they are the text again.

    >>> split_sentences("No fever.  Dose 2.5 mg. ECG: normal")
    ['No fever.  ', 'Dose 2.5 mg. ', 'ECG: normal']
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    cuts = sorted({0, *ends, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a note and what it contributed to the answer.

    Attributes:
        text: With the white space after it.
        contribution: Nats of log-odds, to first order: above 0 it spoke for the answer; None if
            it was not read.
    """

    text: str
    contribution: float | None


def explain(classifier: Classifier, text: str) -> list[Sentence]:
    """Tell which sentences of a note spoke for the answer, and which against it.

    The contribution of a token is e · ∂z/∂e: e its embedding, z = ln(p / (1 − p)) the log-odds of
    the class named; a sentence's is the sum over its tokens (gradient × input, Shrikumar et al.
    2016).

    Raises:
        ValueError: The note is empty.
    """
    text = clean_text(text)
    if not has_visible(text):
        raise ValueError("the note is empty: it has nothing visible")
    tokenizer, limit = classifier.tokenizer, classifier.token_limit
    scores = token_contributions(classifier, tokenizer.encode(text, limit))
    sentences, sums = split_sentences(text), {}
    ends = list(itertools.accumulate(map(len, sentences)))
    # A token may begin with the space before its word: its last character tells where it stands.
    for score, (begin, end) in list(zip(scores, tokenizer.places(text, limit), strict=True))[1:]:
        at = bisect.bisect(ends, max(begin, end - 1))
        sums[at] = sums.get(at, 0.0) + score
    read = max(sums, default=-1) + 1
    unread = "".join(sentences[read:])
    explained = [Sentence(sentence, sums.get(i)) for i, sentence in enumerate(sentences[:read])]
    return [*explained, Sentence(unread, None)] if unread else explained


def token_contributions(classifier: Classifier, ids: list[int]) -> list[float]:
    """Give e · ∂z/∂e of each token, z the log-odds of the class named: T floats."""
    model, kept = classifier.model, []

    def cut_graph(_module: nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
        kept.append(embedded.detach().requires_grad_())  # (1, T, D)
        return kept[0]

    training = model.training
    model.eval()
    hook = model.model.embed_tokens.register_forward_hook(cut_graph)
    try:
        device = model.score.weight.device
        with torch.enable_grad(), classifier.autocast():
            lengths = torch.tensor([len(ids)], device=device)
            logits = model(torch.tensor([ids], device=device), lengths)[0].float()  # (C,)
        named = logits.argmax()
        others = torch.cat((logits[:named], logits[named + 1 :]))
        (gradient,) = torch.autograd.grad(logits[named] - others.logsumexp(0), kept)
    finally:
        hook.remove()
        model.train(training)
    return (gradient.float() * kept[0].detach().float()).sum(-1)[0].tolist()


@dataclass(frozen=True, slots=True)
class LayerUpdate:
    """What an adapter changed in one layer, ΔW = s·B·A beside W.

    Attributes:
        name: The layer's full name.
        share: ‖ΔW‖ / ‖W‖, Frobenius norms.
        singular_values: Of ΔW, the largest first; r of them.
        effective_rank: exp(−Σ p·ln p) with p = σ / Σσ (Roy & Vetterli 2007, section 2); 0 if
            nothing changed.
    """

    name: str
    share: float
    singular_values: tuple[float, ...]
    effective_rank: float


@torch.no_grad()
def layer_updates(model: nn.Module) -> list[LayerUpdate]:
    """Measure what LoRA changed in each layer, in float64, never forming the out × in matrix BA.

    With B = Q₁·R₁ and Aᵀ = Q₂·R₂ the singular values of BA are those of the r × r core R₁·R₂ᵀ.
    """
    updates = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        # On the CPU: not every device has float64.
        cores = [torch.linalg.qr(m.cpu().double()).R for m in (layer.lora_B, layer.lora_A.T)]
        sigma = torch.linalg.svdvals(cores[0] @ cores[1].T) * abs(layer.config.scaling)
        p = sigma[sigma > 0] / sigma.sum()
        updates.append(
            LayerUpdate(
                name=name,
                share=(sigma.norm() / layer.weight.cpu().double().norm()).item(),
                singular_values=tuple(sigma.tolist()),
                effective_rank=math.exp(-(p * p.log()).sum().item()) if len(p) else 0.0,
            )
        )
    return updates
