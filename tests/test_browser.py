"""What a person does on the page, in Chromium."""

import csv
import hashlib
import io
import json
import re
import stat
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import clinora
from clinora.serving.app import create_app
from clinora.serving.classify_tab import REASONS
from clinora.serving.server import MOST_BODY_BYTES
from clinora.serving.words import EXAMPLES
from tests.served import CANARY, Person, calibration, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def classifier(small_run):
    """The run, loaded with the same defaults as in the process that serves it."""
    return clinora.Classifier.load(small_run)


TABS = ("LoRA internals", "Many notes", "API", "Model card")


LABELS = ("Enter Clinical Note", "Predicted Classification in JSON Format", "Prediction in text")


def test_the_page_has_the_published_texts(person):
    from playwright.sync_api import expect

    expect(person.page).to_have_title("Clinical Note Classifier")
    heading = person.page.get_by_role("heading", level=1)
    expect(heading).to_have_text("Clinical Note Classifier")
    for text in (
        "This model classifies clinical notes into diagnosis categories. "
        "Choose your output format.",
        "Demonstration only, not a medical device.",
        "Examples",
        *LABELS,
    ):
        expect(person.page.get_by_text(text, exact=True)).to_be_visible()
    for name in ("Clear", "Submit", "Flag"):
        expect(person.page.get_by_role("button", name=name, exact=True)).to_be_visible()


def test_a_person_submits_an_example_and_clears_it(person, classifier):
    from playwright.sync_api import expect

    for example in EXAMPLES:
        prediction = classifier([example])[0]
        person.page.get_by_role("button", name=example[:40]).click()
        expect(person.note).to_have_value(example)
        person.press("Submit")
        expect(person.text).to_have_value(prediction.as_text())
        expect(person.json).to_contain_text(f'"label": "{prediction.label}"')
        expect(person.json).to_contain_text(f'"predicted_class": {prediction.index}')
        expect(person.card).to_contain_text(prediction.label)
        expect(person.card).to_contain_text("Needs a person")  # the run is not calibrated
    expect(person.explanation).to_contain_text("percentage points")
    person.press("Clear")
    for box in (person.note, person.text):
        expect(box).to_have_value("")
    for output in (person.json, person.explanation.get_by_text("percentage points")):
        expect(output).not_to_be_visible()
    expect(person.card).not_to_contain_text("Needs a person")


def test_the_probabilities_can_be_opened_before_or_after_the_answer(person, classifier):
    from playwright.sync_api import expect

    note = "Severe chest pain. The knee, swollen."
    label = classifier([note])[0].label
    for opened_first in (False, True):
        person.page.reload()
        person.page.wait_for_timeout(1000)
        probabilities = person.page.get_by_role("button", name="Probabilities")
        if opened_first:
            probabilities.click()
        person.submit(note)
        expect(person.explanation).to_contain_text("percentage points")
        if not opened_first:
            probabilities.click()
        expect(person.page.get_by_test_id("label-output-value")).to_have_text(label)


# --- The answer is never stale ---

STALE = "The note has changed. Press Submit."


def is_grey(person):
    """Tell whether the answer has lost its colours."""
    verdict = person.card.locator(".verdict")
    return verdict.evaluate("e => getComputedStyle(e).filter") == "grayscale(1)"


def test_each_change_of_the_note_greys_the_answer(person):
    from playwright.sync_api import expect

    stale = person.page.get_by_text(STALE)
    person.submit("Knee pain.")
    expect(person.text).not_to_have_value("")
    expect(stale).not_to_be_visible()
    assert not is_grey(person)
    person.note.press_sequentially("x")
    expect(stale).to_be_visible()
    assert is_grey(person)
    person.note.press("Backspace")  # the note of the answer again
    expect(stale).not_to_be_visible()
    person.page.locator("#examples").get_by_role("button").first.click()
    expect(stale).to_be_visible()
    person.press("Submit")
    expect(stale).not_to_be_visible()
    assert not is_grey(person)


def test_an_answer_that_comes_after_a_change_is_stale(person):
    from playwright.sync_api import expect

    person.note.fill("Knee pain.")
    person.press("Submit")
    person.note.press_sequentially("x")  # before the answer
    expect(person.text).not_to_have_value("")
    expect(person.page.get_by_text(STALE)).to_be_visible()


def test_clear_can_be_undone(person, classifier):
    from playwright.sync_api import expect

    undo = person.page.get_by_role("button", name="Undo", exact=True)
    expect(undo).not_to_be_visible()
    person.submit("Knee pain.")
    expected = classifier(["Knee pain."])[0].as_text()
    expect(person.text).to_have_value(expected)
    person.press("Clear")
    expect(person.note).to_have_value("")
    person.note.fill("new")  # Undo does not replace a new note
    expect(undo).not_to_be_visible()
    person.note.fill("")
    undo.click()
    expect(person.note).to_have_value("Knee pain.")
    expect(person.text).to_have_value(expected)
    expect(person.page.get_by_text(STALE)).not_to_be_visible()
    expect(undo).not_to_be_visible()
    expect(person.note).to_be_focused()


def test_tab_leads_from_the_note_to_submit_then_clear(person):
    from playwright.sync_api import expect

    person.note.focus()
    for name in ("Submit", "Clear"):
        person.page.keyboard.press("Tab")
        expect(person.page.get_by_role("button", name=name, exact=True)).to_be_focused()


def test_ctrl_enter_submits_and_enter_alone_does_not(person, classifier):
    from playwright.sync_api import expect

    person.note.press_sequentially("Knee")
    person.note.press("Enter")
    person.note.press_sequentially("pain.")
    expect(person.note).to_have_value("Knee\npain.")
    expect(person.text).to_have_value("")
    person.note.press("Control+Enter")
    expect(person.text).to_have_value(classifier(["Knee\npain."])[0].as_text())
    expect(person.note).to_have_value("Knee\npain.")
    expect(person.page.get_by_text(STALE)).not_to_be_visible()


def test_a_person_flags_a_prediction_without_and_with_its_text(person, served, classifier):
    from playwright.sync_api import expect

    person.press("Flag")
    expect(person.page.get_by_text("There is no prediction to flag")).to_be_visible()
    person.submit(f"{CANARY} knee pain")
    expect(person.text).not_to_have_value("")
    person.press("Flag")
    expect(person.page.get_by_text("Choose a reason first.")).to_be_visible()
    person.choose_reason(REASONS[0])
    person.press("Flag")
    expect(person.page.get_by_text("was flagged, without")).to_be_visible()
    file = served.folder / "flagged" / "flags.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    label = classifier([f"{CANARY} knee pain"])[0].label
    assert json.loads(file.read_text().splitlines()[-1])["label"] == label
    assert CANARY not in file.read_text()
    person.page.get_by_role("checkbox", name="I may store this note's text").check()
    person.press("Flag")
    expect(person.page.get_by_text("was flagged, with the")).to_be_visible()
    assert json.loads(file.read_text().splitlines()[-1])["note"] == f"{CANARY} knee pain"
    person.press("Clear")
    expect(person.page.get_by_role("checkbox", name="I may store")).not_to_be_checked()
    file.unlink()  # the other tests of this module look for notes in the server's files


def test_an_empty_note_gives_a_message_and_leaves_no_stale_prediction(person):
    from playwright.sync_api import expect

    person.submit("fever")
    expect(person.text).not_to_have_value("")
    person.submit("   ")
    expect(person.page.get_by_text("Enter a clinical note first.")).to_be_visible()
    expect(person.text).to_have_value("")
    expect(person.json).not_to_be_visible()
    person.press("Flag")
    expect(person.page.get_by_text("There is no prediction to flag")).to_be_visible()


def test_the_page_says_that_a_long_note_was_cut(person):
    from playwright.sync_api import expect

    person.submit("fever " * 300 + "the end.")
    cut = person.card.get_by_text("of 302 words were read")
    expect(cut).to_be_visible()
    unread = person.card.get_by_text("the end.")
    expect(unread).not_to_be_visible()
    person.card.get_by_text("Show the unread text").focus()
    person.page.keyboard.press("Enter")
    expect(unread).to_be_visible()
    person.submit("fever")
    expect(cut).not_to_be_visible()
    person.page.get_by_role("button", name="Probabilities").click()
    expect(person.page.get_by_text("all were read")).to_be_visible()


def test_a_note_that_is_too_long_gives_a_message(person):
    from playwright.sync_api import expect

    person.submit("fever")
    expect(person.text).not_to_have_value("")
    person.submit("x" * (MOST_BODY_BYTES + 1))
    expect(person.page.get_by_text("1,000,000 bytes")).to_be_visible()
    expect(person.text).to_have_value("")
    assert "413" in person.complaints.pop()


def test_a_script_in_a_note_is_not_run(person):
    from playwright.sync_api import expect

    person.submit(f"<img src=/{CANARY} onerror='window.ran=1'><script>window.ran=1</script>")
    expect(person.text).not_to_have_value("")
    expect(person.explanation).to_contain_text("no explanation")
    person.submit(f"Fever. <img src=/{CANARY} onerror='window.ran=1'> Cough.")
    expect(person.explanation).to_contain_text("onerror")
    person.page.get_by_role("button", name="The last ten notes").click()
    expect(person.page.locator(".history-card")).to_have_count(2)
    person.choose_reason(REASONS[0])
    person.press("Flag")
    expect(person.page.get_by_text("was flagged")).to_be_visible()
    assert person.page.evaluate("window.ran") is None
    assert person.page.locator(f"img[src*={CANARY}]").count() == 0


def test_on_a_phone_the_verdict_is_on_the_screen_after_submit(person):
    from playwright.sync_api import expect

    person.page.set_viewport_size({"width": 390, "height": 844})
    person.submit("Fever. Cough.")
    for text in ("Needs a person", "Predicted class"):
        expect(person.card.get_by_text(text)).to_be_in_viewport(ratio=1)
    expect(person.explanation).to_contain_text("percentage points")
    expect(person.card.get_by_text("Needs a person")).to_be_in_viewport(ratio=1)
    order = (person.note, person.card, person.json, person.explanation)
    assert all(box.bounding_box()["width"] > 250 for box in order)
    # Places on the page, not on the screen: the page may be scrolling.
    tops = [box.evaluate("e => e.getBoundingClientRect().y + scrollY") for box in order]
    assert tops == sorted(tops)  # one below the other
    page_width = "document.documentElement.scrollWidth"
    assert person.page.evaluate(page_width) <= 390
    for tab in TABS:
        person.open(tab)
        assert person.page.evaluate(page_width) <= 390, tab
        if tab == "LoRA internals":
            pictures = person.page.locator("img")
            expect(pictures).to_have_count(9)
            assert all(picture.bounding_box()["width"] > 250 for picture in pictures.all())


def test_the_service_connects_to_no_other_machine(served, person):
    person.submit("fever")
    calls = served.read("calls").splitlines()
    outside = [line for line in calls if not re.search(r"127\.0\.0\.1|localhost", line)]
    assert outside == []


def test_a_note_is_classified_and_flagged_by_keyboard_alone(person, classifier):
    from playwright.sync_api import expect

    keyboard = person.page.keyboard
    person.note.focus()
    keyboard.type("chest pain")
    keyboard.press("Tab")
    keyboard.press("Enter")
    expect(person.text).to_have_value(classifier(["chest pain"])[0].as_text())
    person.page.get_by_role("radio").first.focus()
    keyboard.press("Space")
    for _ in range(len(REASONS) + 1):  # past the other reasons and the consent
        keyboard.press("Tab")
    keyboard.press("Enter")
    expect(person.page.get_by_text("was flagged, without")).to_be_visible()


# The lowest contrast of an element's text with its background (WCAG 2.1, success criterion 1.4.3).
# A colour that a browser gives as color(srgb …) has channels from 0 to 1, others from 0 to 255.
LEAST_CONTRAST = """elements => {
  const channels = text => {
    const numbers = text.match(/[\\d.e-]+/g).map(Number);
    const [r, g, b] = numbers.slice(0, 3).map(x => text.startsWith("color") ? 255 * x : x);
    return [r, g, b, numbers[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
  const backgroundOf = element => {
    if (element === null) return [255, 255, 255];
    return over(channels(getComputedStyle(element).backgroundColor),
                backgroundOf(element.parentElement));
  };
  const opacityOf = element => element === null ? 1
    : Number(getComputedStyle(element).opacity) * opacityOf(element.parentElement);
  const luminance = colour => {
    const [r, g, b] = colour.map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Math.min(...elements.map(element => {
    const background = backgroundOf(element);
    const colour = channels(getComputedStyle(element).color);
    colour[3] *= opacityOf(element);
    const [low, high] = [luminance(over(colour, background)), luminance(background)].sort();
    return (high + 0.05) / (low + 0.05);
  }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_answer_has_enough_contrast_and_not_by_colour_alone(chromium, served, scheme):
    from playwright.sync_api import expect

    page = chromium.new_page(color_scheme=scheme)
    person = Person(page, served.url())
    person.submit("Severe chest pain. The knee, swollen.")
    expect(person.explanation).to_contain_text("percentage points")
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    # All colours that a part can have: full, in both directions.
    page.evaluate(
        """() => document.querySelectorAll(".part").forEach((part, i) => {
          part.className = i % 2 ? "part for" : "part against";
          part.style.setProperty("--share", "100%");
        })"""
    )
    texts = page.locator(".answer-card p:visible, #explanation .part, #explanation p")
    assert texts.count() >= 8
    assert texts.evaluate_all(LEAST_CONTRAST) >= 4.5
    verdict = person.card.locator(".verdict")
    verdict.evaluate("e => { e.className = 'verdict confident' }")
    assert verdict.evaluate_all(LEAST_CONTRAST) >= 4.5
    person.note.press_sequentially("x")
    expect(page.get_by_text(STALE)).to_be_visible()
    assert texts.evaluate_all(LEAST_CONTRAST) >= 4.5
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_have_the_ground_of_the_theme(chromium, served, scheme):
    from playwright.sync_api import expect

    page = chromium.new_page(color_scheme=scheme)
    person = Person(page, served.url())
    person.open("LoRA internals")
    pictures = page.locator("img")
    expect(pictures).to_have_count(9)
    for picture in pictures.all():
        pixels = plt.imread(io.BytesIO(picture.screenshot()))
        corner = pixels[2, 2, :3]
        assert (corner > 0.9).all() if scheme == "light" else (corner < 0.2).all()
    page.close()


def test_the_last_notes_are_compared_and_downloaded(person, classifier):
    from playwright.sync_api import expect

    notes = ["Knee pain.", "Chest pain."]
    for note in notes:
        person.submit(note)
        expect(person.text).to_have_value(classifier([note])[0].as_text())
        expect(person.page.locator(".history-card")).to_have_count(0)  # it is closed
    person.page.get_by_role("button", name="The last ten notes").click()
    cards = person.page.locator(".history-card")
    expect(cards).to_have_count(2)
    for card, note in zip(cards.all(), notes[::-1], strict=True):
        expect(card).to_contain_text(note)
        expect(card).to_contain_text(classifier([note])[0].label)
    # Both in one call: the page may be scrolling.
    left, right = cards.evaluate_all("cards => cards.map(card => card.getBoundingClientRect())")
    assert left["y"] == right["y"] and left["x"] < right["x"]
    person.press("Make a CSV file")
    expect(person.page.get_by_role("cell", name="last-notes.csv")).to_be_visible()
    with person.page.expect_download() as download:
        person.page.locator("a[download]").first.click()
    text = Path(download.value.path()).read_text(encoding="utf-8-sig")
    assert [row["note"] for row in csv.DictReader(text.splitlines())] == notes[::-1]


def test_a_person_chooses_rank_and_strength_by_keyboard(person):
    from playwright.sync_api import expect

    person.open("LoRA internals")
    table = person.page.get_by_role("grid", name="What LoRA would train")
    expect(table).to_contain_text(f"{22 * 4 * (2048 + 2048 + 2048 + 256):,}")  # r = 4
    person.page.get_by_role("slider", name="Rank r").focus()
    person.page.keyboard.press("ArrowRight")
    expect(table).to_contain_text(f"{22 * 5 * (2048 + 2048 + 2048 + 256):,}")

    pictures = person.page.locator("img")
    expect(pictures).to_have_count(9)
    bars = pictures.nth(7)  # after two of the results and five of the loaded adapter
    before = bars.get_attribute("src")
    person.page.get_by_role("slider", name="Strength").focus()
    person.page.keyboard.press("Home")
    expect(bars).not_to_have_attribute("src", before)
    person.press("Merge and compare")
    expect(person.page.get_by_text("Largest difference of a probability")).to_be_visible()


def test_a_person_classifies_a_file_of_160_notes_and_downloads_the_result(
    person, classifier, tmp_path
):
    from playwright.sync_api import expect

    notes = [f"{EXAMPLES[i % 4]} Visit {i}." for i in range(160)]
    file = tmp_path / "notes.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["transcription"], *([note] for note in notes)])
    person.open("Many notes")
    person.choose_file(file)
    person.press("Classify all")
    link = person.page.locator("a[download]").last
    expect(person.page.get_by_role("cell", name="notes-classes.csv")).to_be_visible()
    with person.page.expect_download() as download:
        link.click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    assert [row["label"] for row in rows] == [p.label for p in classifier(notes)]


def test_a_note_of_low_confidence_is_referred_to_a_person(
    chromium, classifier, flags_folder, monkeypatch
):
    from playwright.sync_api import expect

    monkeypatch.setattr(classifier, "calibration", calibration(threshold=0.9999))
    confidence = classifier(["fever"])[0].confidence
    with running(create_app(classifier, flags_folder)) as port:
        page = chromium.new_page()
        Person(page, f"http://127.0.0.1:{port}").submit("fever")
        expect(page.get_by_text("Needs a person")).to_be_visible()
        page.get_by_role("button", name="Probabilities").click()
        expect(page.get_by_text(f"{confidence:.1%}; needed: 100.0%")).to_be_visible()
        page.close()


def test_a_page_open_to_other_machines_asks_for_a_password(chromium, small_run, start, tmp_path):
    from playwright.sync_api import expect

    salt = b"0123456789abcdef"
    found = hashlib.scrypt(b"correct horse", salt=salt, n=2**14, r=8, p=1)
    passwords = tmp_path / "passwords.txt"
    passwords.write_text(f"alice:{salt.hex()}:{found.hex()}\n")
    options = ["--host", "0.0.0.0", "--allow-host", "notes.example", "--port", "0"]
    options += ["--auth-file", passwords, "--run", small_run]
    served = start(*options)
    url = served.url().replace("notes.example", "127.0.0.1")
    known = {"username": "alice", "password": "correct horse"}
    for credentials, status in ((None, 401), (known, 200)):
        context = chromium.new_context(http_credentials=credentials)
        assert context.request.get(url).status == status
        context.close()
    context = chromium.new_context(http_credentials=known)
    person = Person(context.new_page(), url)
    person.submit("fever")
    expected = clinora.Classifier.load(small_run)(["fever"])[0].as_text()
    expect(person.text).to_have_value(expected)
    context.close()


def test_the_last_notes_are_forgotten_after_the_page_is_closed(
    chromium, classifier, flags_folder, monkeypatch
):
    from playwright.sync_api import expect

    monkeypatch.setattr("clinora.serving.sessions.SECONDS_AFTER_CLOSING", 0.1)
    app = create_app(classifier, flags_folder)
    states = app.state.gradio.get_blocks().state_holder.session_data
    with running(app) as port:
        page = chromium.new_page()
        person = Person(page, f"http://127.0.0.1:{port}")
        person.submit("fever")
        expect(person.text).not_to_have_value("")
        assert len(states) == 1
        page.close()
        end = time.monotonic() + 30
        while states and time.monotonic() < end:
            time.sleep(0.1)
    assert len(states) == 0
