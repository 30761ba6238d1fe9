"""What others named (classes, files, columns) is shown as text, in a real browser."""

import csv
import io
import json
from collections import Counter
from contextlib import contextmanager

import pytest

import clinora
from clinora.notes import LONGEST_CLASS_NAME
from clinora.run import DataRecord
from clinora.serving.app import create_app
from clinora.serving.card import model_card
from clinora.serving.server import MOST_FILE_BYTES
from tests.served import Person, metrics, running

pytestmark = pytest.mark.slow

NOTE = "Severe chest pain."
PLAIN_CLASSES = ["Surgery", "Radiology", "Orthopedic", "Cardiology", "Neurology"]
HOSTILE_CLASSES = [
    "<form action=//e.example><input name=p><button>Log in</button></form>",
    "<img src=x onerror=window.ran=1><script>window.ran=1</script>",
    "![x](//e.example/x.png) [link](//e.example) <//e.example> www.e.example",
    "``` <a href=//e.example>x</a> **b** ~~~",
    "<iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
]
# A file's name has no slash.
HOSTILE_FILE = "<form><input name=p><button>x<img src=x onerror=window.ran=1>[a](b) `c`"
HOSTILE_COLUMN = "<form action=//e.example><input name=p><img src=x onerror=window.ran=1></form>"
COUNTED = "form, input, textarea, button, img, a, iframe, script, style, strong, em, video"


@pytest.fixture(scope="module")
def trained(small_run):
    return clinora.Classifier.load(small_run, device="cpu", precision="fp32")


@contextmanager
def served(classifier, folder, card=""):
    """Serve a classifier's page from a thread; gives its address."""
    with running(create_app(classifier, folder / "flagged", card=card)) as port:
        yield f"http://127.0.0.1:{port}"


def named(trained, classes, data=None):
    """Give the trained run with other names of its classes."""
    classifier = clinora.Classifier(trained.model, trained.tokenizer, classes, 128)
    classifier.data = data
    return classifier


def card_of(classifier, folder):
    """Write a model card whose tables name the classes."""
    report = folder / "report"
    report.mkdir(parents=True)
    (report / "metrics.json").write_text(json.dumps(metrics(classifier.labels)))
    return model_card(classifier, folder)


def elements(page):
    """Count the elements of the page, once it has stopped changing."""
    before = None
    while True:
        tags = Counter(page.locator(COUNTED).evaluate_all("found => found.map(e => e.tagName)"))
        if tags == before:
            return tags
        before = tags
        page.wait_for_timeout(400)


def visit(chromium, trained, folder, classes, file_name, column):
    """Use every part of the page that shows a name: count the elements after each step."""
    from playwright.sync_api import expect

    data = DataRecord(source=f"/x/{file_name}", split="texts", seen=frozenset())
    classifier = named(trained, classes, data)
    file = folder / f"{file_name}.exe"
    text = io.StringIO()
    rows = [[f"{NOTE} {i}", f"{column} {i}"] for i in range(20)]
    csv.writer(text).writerows([["transcription", column], *rows])
    file.write_text(text.getvalue())
    steps = []
    with served(classifier, folder, card_of(classifier, folder)) as url:
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        person = Person(page, url)
        person.submit(NOTE)
        expect(person.text).to_have_value(classifier([NOTE])[0].as_text())
        expect(person.explanation).to_contain_text("no explanation")
        for name in ("Probabilities", "The last ten notes"):
            page.get_by_role("button", name=name).click()
        steps.append(elements(page))

        person.open("LoRA internals")
        expect(page.locator("img")).to_have_count(7)  # without an example there is none of a note
        page.get_by_label("A note to try the adapter on").fill(NOTE)
        person.press("Compare strengths")
        expect(page.locator("img")).to_have_count(8)
        steps.append(elements(page))

        person.open("Many notes")
        person.choose_file(file)
        person.choose_column("Columns to keep", column)
        steps.append(elements(page))
        person.press("Classify all")
        expect(page.get_by_role("cell", name="-classes.csv")).to_be_visible()
        preview = page.get_by_role("grid", name="The first rows")
        for name in (column, f"{column} 0"):
            expect(preview).to_contain_text(name)
        for name in classes:
            expect(page.get_by_role("grid", name="Notes of each class")).to_contain_text(name)
        steps.append(elements(page))

        person.open("Model card")
        for name in (file_name, *classes):
            expect(page.get_by_role("tabpanel").filter(visible=True)).to_contain_text(name)
        steps.append(elements(page))
        assert page.evaluate("window.ran") is None
        assert person.strangers == []
        assert person.complaints == []
        page.close()
    return steps


def test_names_add_no_element_to_the_page_and_run_nothing(chromium, trained, tmp_path):
    plain, hostile = tmp_path / "plain", tmp_path / "hostile"
    plain.mkdir()
    hostile.mkdir()
    expected = visit(chromium, trained, plain, PLAIN_CLASSES, "notes", "column")
    found = visit(chromium, trained, hostile, HOSTILE_CLASSES, HOSTILE_FILE, HOSTILE_COLUMN)
    assert found == expected


def test_the_name_of_a_file_that_is_too_large_adds_no_element(chromium, trained, tmp_path):
    from playwright.sync_api import expect

    file = tmp_path / f"{HOSTILE_FILE}.csv"
    file.write_bytes(b"x" * (MOST_FILE_BYTES + 1))
    with served(trained, tmp_path) as url:
        page = chromium.new_page()
        Person(page, url).open("Many notes")
        expect(page.get_by_role("button", name="Classify all")).to_be_visible()
        upload = page.get_by_role("button", name="Click to upload").get_by_test_id("file-upload")
        upload.set_input_files(file)
        message = page.get_by_test_id("toast-text")
        expect(message).to_be_visible()
        assert message.locator("*").count() == 0
        page.close()


# --- Long names ---


def long_names(trained):
    """Give five names of the most characters; the predicted class is one without any space."""
    words = "Cardiovascular and pulmonary medicine, with what belongs to it; " * 2
    names = [f"{i} {words}"[:LONGEST_CLASS_NAME].strip().ljust(100, ".") for i in range(4)]
    names.insert(trained([NOTE])[0].index, "W" * LONGEST_CLASS_NAME)
    assert {len(name) for name in names} == {LONGEST_CLASS_NAME}
    return names


# Of the elements inside a block, those that reach beyond its left or right edge.
BEYOND = """block => {
  const [left, right] = [block.getBoundingClientRect().left, block.getBoundingClientRect().right];
  return [...block.querySelectorAll('*')].filter(e => e.checkVisibility()).filter(e => {
    const box = e.getBoundingClientRect();
    return e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline'
      && e.clientWidth > 0 || box.left < left - 1 || box.right > right + 1;
  }).map(e => `${e.tagName}.${e.className}`);
}"""


@pytest.mark.parametrize("width", [390, 1280])
def test_long_class_names_wrap_and_leave_the_percentages_in_sight(
    chromium, trained, tmp_path, width
):
    from playwright.sync_api import expect

    names = long_names(trained)
    classifier = named(trained, names)
    prediction = classifier([NOTE])[0]
    with served(classifier, tmp_path, card_of(classifier, tmp_path)) as url:
        page = chromium.new_page(viewport={"width": width, "height": 900})
        person = Person(page, url)
        person.submit(NOTE)
        page.get_by_role("button", name="Probabilities").click()
        page.get_by_role("button", name="The last ten notes").click()
        label = page.get_by_test_id("label")
        expect(page.get_by_test_id("label-output-value")).to_have_text("W" * LONGEST_CLASS_NAME)
        expect(person.json).to_contain_text("W" * LONGEST_CLASS_NAME)
        expect(person.card).to_contain_text("W" * LONGEST_CLASS_NAME)
        for block in (label, person.json, person.card, page.locator(".history-card")):
            assert block.evaluate(BEYOND) == []
        shown = sorted(float(text.strip("%")) for text in label.locator("dd").all_inner_texts())
        assert shown == pytest.approx(sorted(100 * p for p in prediction.probabilities), abs=0.51)
        for percentage in label.locator("dd").all():
            percentage.scroll_into_view_if_needed()
            expect(percentage).to_be_in_viewport(ratio=1)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        for tab in ("LoRA internals", "Many notes", "Model card"):
            person.open(tab)
            if tab == "LoRA internals":
                page.get_by_label("A note to try the adapter on").fill(NOTE)
                person.press("Compare strengths")
                expect(page.locator("img")).to_have_count(8)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
            if tab == "Model card":
                for table in page.locator("table").filter(visible=True).all():
                    assert table.evaluate(BEYOND) == []
            page.screenshot(path=tmp_path / f"{tab}.png", full_page=True)
        page.close()
