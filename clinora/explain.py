"""Explanations: which sentences support a prediction, and what an adapter changed.

Shapes: r rank.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clinora.classifier import Classifier, Prediction
from clinora.lora import LoRALinear
from clinora.notes import clean_text, has_visible, ordinary_case
from clinora.variants import DoRALinear

# An explanation classifies a note once more for each part. With this many, explaining 512 tokens
# takes less than 1 s with the bundled base on two cores (python -m benchmarks.explain).
MOST_PARTS = 16

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
class Part:
    """A part of a note, and how much it supports the prediction.

    Attributes:
        text: One sentence, or several neighbouring sentences, with the white space after them.
        effect: By how many percentage points the probability of the predicted class falls when this
            part is left out. Above 0 the part supports the prediction, below 0 it opposes it. None
            if the part was not read, or if it is the only part that was read: without it there is
            no text to compare with.
    """

    text: str
    effect: float | None


def leave_one_out(classifier: Classifier, text: str) -> list[Part]:
    """Compute how much each part of a note supports the predicted class.

    effect of part k = 100 · (p(note) − p(note without part k)), in percentage points, with p the
    probability of the class that is predicted for the note. p is the softmax probability in
    ``Prediction.probabilities``, not the calibrated confidence. This is occlusion (Zeiler & Fergus
    2014, section 4.2), applied to sentences.

    The effects do not add up to p: two sentences that say the same have no effect one by one.

    Returns:
        The parts of the cleaned note, as ``parts_of`` gives them. The text beyond the token limit
        is one more part, without an effect. Joined, the parts are the cleaned note.

    Raises:
        ValueError: The note is empty, or the head was never trained.
    """
    text = clean_text(text)
    parts = parts_of(classifier, text)
    explained = effects(parts, classifier(variants(parts)))
    unread = text[len("".join(parts)) :]
    if unread:
        explained.append(Part(unread, None))
    return explained


def parts_of(classifier: Classifier, text: str) -> list[str]:
    """Divide the text that the classifier reads of a note into at most ``MOST_PARTS`` parts.

    A part is a sentence. A sentence without visible text belongs to its neighbour. If there are too
    many, the two neighbours that are shortest together become one part, until there are
    ``MOST_PARTS``. The text beyond the token limit is cut off first. Therefore, when a part is left
    out, the classifier does not read text that it had not read before.

    Returns:
        The parts, each with visible text. Joined, they are the beginning of the cleaned note, up to
        where the last token that is read ends, which may be inside a sentence. Empty if the text
        before the token limit is not visible.

    Raises:
        ValueError: The note is empty.
    """
    text = clean_text(text)
    if not has_visible(text):
        raise ValueError("the note is empty: it has no visible text")
    read = _cut_unread(classifier, text)
    parts: list[str] = []
    if not has_visible(read):
        return parts
    for sentence in split_sentences(read):
        if parts and not (has_visible(parts[-1]) and has_visible(sentence)):
            parts[-1] += sentence
        else:
            parts.append(sentence)
    while len(parts) > MOST_PARTS:
        lengths = [len(first) + len(second) for first, second in itertools.pairwise(parts)]
        i = lengths.index(min(lengths))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _cut_unread(classifier: Classifier, text: str) -> str:
    """Give the beginning of a cleaned note, up to the end of the last token that is read."""
    limit = classifier.token_limit
    read = ordinary_case(text)  # as the classifier reads it, with as many characters
    if len(classifier.tokenizer.encode(read, limit + 1)) <= limit:
        return text
    _, end = classifier.tokenizer.places(read, limit)[-1]
    return text[:end]


def variants(parts: Sequence[str]) -> list[str]:
    """Give the texts to classify: all parts together, then all parts but one, for each part.

    Returns:
        1 + n texts for n parts. If there is one part, that part alone, since nothing is left
        without it; for no part, no text.
    """
    if not parts:
        return []
    texts = ["".join(parts)]
    if len(parts) > 1:
        texts += ["".join([*parts[:i], *parts[i + 1 :]]) for i in range(len(parts))]
    return texts


def effects(
    parts: Sequence[str], predictions: Sequence[Prediction], index: int | None = None
) -> list[Part]:
    """Compute the effect of each part, with the equation of ``leave_one_out``.

    Args:
        parts: The parts that were read.
        predictions: The predictions for ``variants(parts)``, in order.
        index: The class to explain; by default the one predicted for all parts together.

    Raises:
        ValueError: The number of predictions is not that of ``variants(parts)``.
    """
    expected = len(variants(parts))
    if len(predictions) != expected:
        raise ValueError(
            f"{len(predictions)} predictions for {len(parts)} parts: expected {expected}, one for "
            "each text of variants(parts)"
        )
    if len(parts) < 2:
        return [Part(text, None) for text in parts]
    whole, *without = predictions
    if index is None:
        index = whole.index
    explained = []
    for text, prediction in zip(parts, without, strict=True):
        fall = whole.probabilities[index] - prediction.probabilities[index]
        explained.append(Part(text, 100 * fall))
    return explained


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
