"""The words and colours of the page's answer: verdict, frequencies, unread text, explanation."""

import html
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from clinora.classifier import Prediction
from clinora.explain import Part
from clinora.serving.answer import (
    CONFIDENT,
    NEEDS_A_PERSON,
    answer_card,
    explanation_html,
    how_often_right,
    needs_person,
    second_class,
    unread_banner,
)
from clinora.serving.words import EXAMPLES, Words
from tests.served import calibration

LABELS = ("Knee", "Hip", "Hand")
WORDS = Words("", "", "", "", "This does not look like a note.", EXAMPLES)


def predicted(probabilities=(0.7, 0.2, 0.1), confidence=0.9, refer=False, unusual=None):
    index = probabilities.index(max(probabilities))
    return Prediction(
        label=LABELS[index], index=index, confidence=confidence, probabilities=probabilities,
        refer=refer, tokens=5, truncated=False, out_of_distribution=unusual,
    )  # fmt: skip


def shown(fragment):
    """Give the text that a browser shows of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", fragment))


def card(prediction, threshold=0.8):
    of_run = None if threshold is None else calibration(threshold)
    run = SimpleNamespace(labels=LABELS, calibration=of_run)
    return shown(answer_card(prediction, run, WORDS, "0"))


# --- Natural frequencies ---


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.799, 0.8, 0.97, 0.994])
def test_the_frequencies_are_rounded_and_never_contradict_the_verdict(threshold):
    for thousandths in range(1, 1000):
        confidence = thousandths / 1000
        words = how_often_right(confidence, calibration(threshold))
        numbers = re.findall(r"[\d,]+", words)
        right, out_of, needed, again = (int(number.replace(",", "")) for number in numbers)
        assert out_of == again
        assert abs(right / out_of - confidence) <= 0.5 / out_of + 1e-9
        assert abs(needed / out_of - threshold) <= 0.5 / out_of + 1e-9
        assert (right < needed) if confidence < threshold else (right >= needed)
        assert 0 < right < out_of


def test_the_frequencies_are_out_of_ten_where_that_suffices():
    words = how_often_right(0.53, calibration(0.8))
    assert words == "Right about 5 times in 10; 8 in 10 needed."


def test_a_run_that_never_reached_the_promised_accuracy_shows_no_threshold():
    words = how_often_right(0.53, calibration(2.0))
    assert re.findall(r"\d+", words) == ["5", "10"]
    assert "person" in words


# --- The verdict ---


@pytest.mark.parametrize(
    ("refer", "unusual", "expected"),
    [
        (False, None, False),
        (False, False, False),
        (True, False, True),
        (False, True, True),
        (None, None, True),  # a run without calibration
        (None, False, True),
    ],
)
def test_a_note_needs_a_person_unless_nothing_speaks_against_filing_it(refer, unusual, expected):
    prediction = predicted(refer=refer, unusual=unusual)
    assert needs_person(prediction) is expected
    words = card(prediction)
    assert (NEEDS_A_PERSON in words, CONFIDENT in words) == (expected, not expected)


def test_the_card_says_that_a_text_is_unusual_and_claims_no_frequency_for_it():
    words = card(predicted((0.4, 0.4, 0.2), unusual=True))
    assert WORDS.unusual in words
    assert re.search(r"\d|both fit", words) is None
    for unusual in (False, None):
        assert WORDS.unusual not in card(predicted(unusual=unusual))


def test_the_card_of_an_uncalibrated_run_gives_no_frequency():
    words = card(predicted(confidence=None, refer=None), threshold=None)
    assert "not calibrated" in words
    assert re.search(r"\d", words) is None


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ((0.56, 0.28, 0.16), "Hip"),  # exactly half
        ((0.6, 0.29, 0.11), None),
        ((0.3, 0.3, 0.4), None),  # a third class is as likely
        ((0.45, 0.45, 0.1), "Hip"),  # as probable as the predicted class
        ((0.02, 0.49, 0.49), "Hand"),
    ],
)
def test_the_second_class_is_named_from_half_of_the_firsts_probability(probabilities, expected):
    prediction = predicted(probabilities)
    assert second_class(prediction, LABELS) == expected
    if expected is None:
        assert "both fit" not in card(prediction)
    else:
        assert f"{prediction.label} or {expected}: both fit." in card(prediction)


def test_the_card_of_a_note_in_capitals_says_how_it_was_read():
    prediction = predicted((0.6, 0.29, 0.11))
    run = SimpleNamespace(labels=LABELS, calibration=calibration(0.8))
    for in_capitals in (True, False):
        fragment = answer_card(prediction, run, WORDS, "0", in_capitals=in_capitals)
        assert ("lower case" in shown(fragment)) == in_capitals


def test_names_are_shown_literally():
    hostile = "<img src=x onerror=alert(1)> & \"b\" 'c' `d` *e*"
    prediction = replace(predicted(), label=hostile)
    run = SimpleNamespace(labels=(hostile, "Hip", "Hand"), calibration=None)
    fragment = answer_card(prediction, run, WORDS, "0")
    assert "<img" not in fragment
    assert hostile in shown(fragment)


# --- Text that was not read ---


def test_a_cut_note_shows_how_many_words_were_read_and_the_rest():
    note = "  one two\n\nthree <b>four</b> five."
    words = shown(unread_banner(note, note[: note.index(" five")]))
    assert "Only about the first 4 of 5 words were read." in words
    assert words.endswith(" five.")
    assert "\n" not in unread_banner(note, note[:6])  # an empty line would end the HTML


def test_a_note_that_was_read_completely_has_no_banner():
    assert unread_banner("one two", "one two") == ""


# --- The explanation ---


def spans(fragment):
    """Give the (class, style, text) of each coloured part."""
    return re.findall(r'<span class="part ?([a-z-]*)"(?: style="([^"]*)")?>(.*?)</span>', fragment)


@pytest.mark.parametrize(
    ("effect", "direction", "share", "points"),
    [
        (25.0, "for", "50%", "+25"),
        (-10.0, "against", "20%", "−10"),
        (50.0, "for", "100%", "+50"),
        (-99.6, "against", "100%", "−100"),
        (0.6, "for", "1%", "+1"),
        (0.4, "", "1%", "0"),
        (-0.4, "", "1%", "0"),
    ],
)
def test_a_parts_colour_has_an_absolute_scale_and_its_points_a_sign(
    effect, direction, share, points
):
    parts = [Part("Knee pain. ", effect), Part("No fever.", 90.0)]
    found = spans(explanation_html(parts, "", "Knee"))[-2]
    assert found[:2] == (direction, f"--share: {share}")
    assert shown(found[2]) == f"Knee pain. {points}"


def test_the_explanation_is_the_whole_note_with_the_unread_text_uncoloured():
    parts = [Part("Knee <pain>.\n\n", 10.0), Part("No fever. ", -20.0)]
    fragment = explanation_html(parts, "Not read.", "Knee")
    text = fragment[fragment.index('class="note-text">') :].removeprefix('class="note-text">')
    without_points = re.sub(r' <b class="points">.*?</b>', "", text)
    assert shown(without_points) == "Knee <pain>.\n\nNo fever. Not read."
    kind, style, text = spans(fragment)[-1]
    assert (style, text) == ("", "Not read.")
    assert kind not in ("for", "against")


def test_a_single_sentence_has_no_explanation():
    fragment = explanation_html([Part("Knee pain.", None)], "", "Knee")
    assert "no explanation" in fragment
    assert spans(fragment) == []
