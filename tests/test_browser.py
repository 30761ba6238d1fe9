"""What a person does on the page, in Chromium."""

import csv
import hashlib
import json
import re
import stat
from pathlib import Path

import pytest

import clinora
from clinora.serving.app import create_app
from clinora.serving.classify_tab import EXAMPLES, REASONS
from clinora.serving.server import MOST_BODY_BYTES
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
    expect(person.highlighted).to_be_visible()
    person.press("Clear")
    for box in (person.note, person.text, person.page.get_by_label("Confidence that")):
        expect(box).to_have_value("")
    for output in (person.json, person.highlighted, person.page.get_by_text("all were read")):
        expect(output).not_to_be_visible()


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

    person.submit("fever " * 300)
    cut = person.page.get_by_text("more than 128 tokens")
    expect(cut).to_be_visible()
    person.submit("fever")
    expect(cut).not_to_be_visible()
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
    expect(person.highlighted).to_contain_text("onerror")
    person.choose_reason(REASONS[0])
    person.press("Flag")
    expect(person.page.get_by_text("was flagged")).to_be_visible()
    assert person.page.evaluate("window.ran") is None
    assert person.page.locator(f"img[src*={CANARY}]").count() == 0


def test_on_a_phone_the_prediction_comes_into_view(person):
    from playwright.sync_api import expect

    person.page.set_viewport_size({"width": 390, "height": 700})
    person.submit("fever")
    expect(person.json).to_be_in_viewport()
    boxes = [box.bounding_box() for box in (person.note, person.json, person.highlighted)]
    assert all(box["width"] > 250 for box in boxes)
    assert boxes == sorted(boxes, key=lambda box: box["y"])  # one below the other
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
    for _ in range(2):  # past Clear
        keyboard.press("Tab")
    keyboard.press("Enter")
    expect(person.text).to_have_value(classifier(["chest pain"])[0].as_text())
    person.page.get_by_role("radio").first.focus()
    keyboard.press("Space")
    for _ in range(len(REASONS) + 1):  # past the other reasons and the consent
        keyboard.press("Tab")
    keyboard.press("Enter")
    expect(person.page.get_by_text("was flagged, without")).to_be_visible()


def test_sentences_are_highlighted_in_different_colours(person):
    from playwright.sync_api import expect

    note = "Severe chest pain. The knee, swollen."
    person.submit(note)
    expect(person.highlighted).to_contain_text("Severe chest pain.")
    text = person.highlighted.inner_text().replace("\n", "")
    assert text.split() == note.split()
    colours = person.highlighted.locator(".score-token").evaluate_all(
        "spans => spans.map(s => getComputedStyle(s).backgroundColor)"
    )
    assert len(set(colours)) == 2


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
        expect(page.get_by_label("Confidence that")).to_have_value(f"{confidence:.1%}")
        expect(page.get_by_text("Refer to a person")).to_be_visible()
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
