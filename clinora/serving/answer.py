"""The answer to a note, as HTML: the card with the verdict, and the explanation."""

import secrets
import zlib
from collections.abc import Sequence

from clinora.calibration import Calibration
from clinora.classifier import Classifier, Prediction
from clinora.explain import Part
from clinora.serving.words import Words, literal

CONFIDENT = "Confident enough to file automatically"
NEEDS_A_PERSON = "Needs a person"
WAITING = '<div class="answer-card"><p>The answer appears here.</p></div>'
STALE = "The note has changed. Press Submit."
# A class with at least this share of the first class's probability is likely too.
ALSO_LIKELY = 0.5
CAPITALS = (
    "The note is in capitals. It was read in lower case; in normal case the answer may be another."
)
FULL_COLOUR = 50  # points; a part with this effect, or a larger one, has the full colour


def needs_person(prediction: Prediction) -> bool:
    """Tell whether the page refers a note to a person.

    It does so as well if the run was not calibrated, since nothing is known about its confidence.
    """
    return prediction.refer is not False or bool(prediction.out_of_distribution)


def second_class(prediction: Prediction, labels: Sequence[str]) -> str | None:
    """Return the second most probable class if it alone is likely too."""
    first, *others_probable = sorted(prediction.probabilities, reverse=True)
    likely = [probability for probability in others_probable if probability >= ALSO_LIKELY * first]
    if len(likely) != 1:
        return None
    others = [i for i in range(len(labels)) if i != prediction.index]
    return labels[max(others, key=lambda i: prediction.probabilities[i])]


def how_often_right(confidence: float, calibration: Calibration) -> str:
    """Say how often predictions of this confidence are right, and how often they have to be.

    The numbers are out of 10. They are out of 100 or more where tenths would hide that the
    confidence is too low, or would say "0" or "10 times in 10".
    """
    threshold = calibration.threshold
    if threshold > 1:
        return (
            f"Right about {round(10 * confidence)} times in 10. On the validation notes no "
            "confidence was high enough, so a person has to read every note."
        )
    for out_of in (10, 100, 1_000, 10_000):
        right = round(confidence * out_of)
        needed = round(threshold * out_of)
        is_hidden = confidence < threshold and right >= needed
        if 0 < right < out_of and 0 < needed < out_of and not is_hidden:
            break
    return f"Right about {right:,} times in {out_of:,}; {needed:,} in {out_of:,} needed."


def fingerprint(note: str) -> str:
    """Return the digits by which the page's script finds out that a note has changed.

    It is the CRC-32 of the text in UTF-16, with the line ends that a browser gives.
    """
    text = note.replace("\r\n", "\n").replace("\r", "\n")
    return str(zlib.crc32(text.encode("utf-16-le", "surrogatepass")))


def answer_card(
    prediction: Prediction,
    classifier: Classifier,
    words: Words,
    key: str,
    *,
    in_capitals: bool = False,
    unread: str = "",
) -> str:
    """Return the card of a prediction: the class, the verdict, and what a reader has to know.

    Args:
        prediction: The prediction.
        classifier: The run's classifier.
        words: The page's words about the run.
        key: ``fingerprint`` of the note.
        in_capitals: Whether the note is in capitals, so that it was read in lower case.
        unread: ``unread_banner`` of the note.
    """
    if prediction.out_of_distribution:  # the calibration holds for notes like the run's alone
        sentences = [words.unusual, "How often the model is right about such a text is unknown."]
    else:
        sentences = _confidence_sentences(prediction, classifier)
    if in_capitals:
        sentences.append(CAPITALS)
    lines = "".join(f"<p>{literal(sentence)}</p>" for sentence in sentences)
    refer = needs_person(prediction)
    # The page's script reads the id: the second number tells one answer from the next.
    return (
        f'<div class="answer-card {"refer" if refer else "confident"}" '
        f'id="answer-{key}-{secrets.token_hex(4)}">'
        f'<p class="stale-words" role="status">{STALE}</p>'
        '<p class="answer-heading">Predicted class</p>'
        f'<p class="answer-class">{literal(prediction.label)}</p>'
        f"{verdict_badge(refer)}{lines}{unread}</div>"
    )


def _confidence_sentences(prediction: Prediction, classifier: Classifier) -> list[str]:
    """Say how often such a prediction is right, and which other class is likely."""
    if classifier.calibration is None:
        sentences = ["This run is not calibrated: how often it is right is unknown."]
    else:
        sentences = [how_often_right(prediction.confidence, classifier.calibration)]
    also = second_class(prediction, classifier.labels)
    if also is not None:
        sentences.append(f"{prediction.label} or {also}: both fit.")
    return sentences


def verdict_badge(refer: bool) -> str:
    """Return the verdict in words, with a sign and a colour."""
    if refer:
        return f'<p class="verdict refer">⚠ {NEEDS_A_PERSON}</p>'
    return f'<p class="verdict confident">✓ {CONFIDENT}</p>'


def unread_banner(note: str, read: str) -> str:
    """Say how much of a cut note was read, with the unread text folded; "" if all was read.

    Args:
        note: The note.
        read: The part of it that was read, from its beginning.
    """
    unread = note[len(read) :]
    if not unread:
        return ""
    words_read = len(read.split())
    return (
        f'<div class="unread"><p>Only about the first {words_read:,} of {len(note.split()):,} '
        "words were read.</p><details><summary>Show the unread text</summary>"
        f'<p class="note-text">{literal(unread)}</p></details></div>'
    )


def exact_numbers(prediction: Prediction, classifier: Classifier) -> str:
    """Return the numbers behind the card's words, for those who want them."""
    if classifier.calibration is None:
        confidence = "Calibrated confidence: not calibrated."
    else:
        confidence = f"Calibrated confidence: {prediction.confidence:.1%}"
        if classifier.calibration.threshold <= 1:
            confidence += f"; needed: {classifier.calibration.threshold:.1%}"
        confidence += "."
    limit = classifier.token_limit
    if prediction.truncated:
        return (
            f"{confidence} The note has more than {limit:,} tokens; the first {limit:,} were read."
        )
    return f"{confidence} The note has {prediction.tokens:,} tokens; all were read."


def explanation_html(parts: Sequence[Part], unread: str, label: str) -> str:
    """Return a note with its parts coloured by their effects.

    Args:
        parts: The parts of the text that was read.
        unread: The text that was not read.
        label: The predicted class.
    """
    if len(parts) == 1:
        return (
            '<div class="explanation"><p>There is no explanation: the note has one sentence, and '
            "an explanation leaves sentences out one by one.</p></div>"
        )
    spans = "".join(_coloured(part) for part in parts)
    if unread:
        spans += f'<span class="part unread-part">{literal(unread)}</span>'
    return (
        '<div class="explanation"><p>Each number says by how many percentage points the '
        f"probability of <b>{literal(label)}</b> falls when this part of the note is left out. "
        '<span class="part for">Blue, +</span>: the part supports the predicted class. '
        '<span class="part against">Orange, −</span>: it opposes the class. The colour is full at '
        f'{FULL_COLOUR} points.</p><p class="note-text">{spans}</p></div>'
    )


def _coloured(part: Part) -> str:
    if part.effect is None:
        return f'<span class="part">{literal(part.text)}</span>'
    share = min(1.0, abs(part.effect) / FULL_COLOUR)
    direction = {"+": "for", "−": "against"}.get(_points(part.effect)[0], "")
    text = part.text.rstrip()
    space = part.text[len(text) :]
    return (
        f'<span class="part {direction}" style="--share: {share:.0%}">{literal(text)} '
        f'<b class="points">{_points(part.effect)}</b></span>{literal(space)}'
    )


def _points(effect: float) -> str:
    """Write points with their sign: +12, −3, or 0 for less than half a point."""
    rounded = round(effect)
    if rounded == 0:
        return "0"
    return f"{rounded:+}".replace("-", "−")
