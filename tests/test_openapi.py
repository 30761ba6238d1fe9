"""The OpenAPI document describes the API as it is, and the page made from it needs no script."""

import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import jsonschema
import pytest
from fastapi.testclient import TestClient

import clinora
from clinora.serving import api
from clinora.serving.app import create_app
from clinora.serving.rate_limit import RateLimit
from tests.served import calibration

OURS = {"/health", "/ready", "/v1/classify", "/v1/model", "/metrics"}


@pytest.fixture(scope="module")
def document(lasting_client):
    return lasting_client.get("/openapi.json").json()


def check(document, path, method, answer):
    """Check that an answer is one that the document describes."""
    response = document["paths"][path][method]["responses"][str(answer.status_code)]
    (media_type,) = response["content"]
    assert answer.headers["Content-Type"] == media_type
    for name in response.get("headers", {}):
        assert name in answer.headers
    if media_type == "application/json":
        schema = response["content"][media_type]["schema"] | {"components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json())


def test_it_describes_our_routes_and_no_other(document, lasting_client):
    assert set(document["paths"]) == OURS
    for route in lasting_client.app.routes:
        if route.path in OURS:
            described = {method.upper() for method in document["paths"][route.path]}
            assert described == route.methods - {"HEAD"}


def test_all_its_references_lead_somewhere(document):
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert names == set(document["components"]["schemas"])


def test_answers_are_as_described(lasting_client, document):
    def post(**options):
        return lasting_client.post("/v1/classify", **options)

    answers = [
        (200, post(json={"note": "fever"})),
        (200, post(json={"notes": ["fever", " ", "cough"]})),
        (415, post(content=b"{}")),
        (422, post(json={"note": " "})),
        (422, post(json={})),
        (400, post(json={"note": "fever"}, headers={"Host": "evil.example"})),
        (403, post(json={"note": "fever"}, headers={"Origin": "http://evil.example"})),
        (413, post(content=b" " * 1_000_001, headers={"Content-Type": "application/json"})),
    ]
    for status, answer in answers:
        assert answer.status_code == status
        check(document, "/v1/classify", "post", answer)
    for path in OURS - {"/v1/classify"}:
        for headers, status in (({}, 200), ({"Host": "evil"}, 400), ({"Origin": "null"}, 403)):
            answer = lasting_client.get(path, headers=headers)
            assert answer.status_code == status
            check(document, path, "get", answer)


def test_answers_of_a_calibrated_run_behind_a_password_are_as_described(
    small_run, tmp_path, monkeypatch
):
    classifier = clinora.Classifier.load(small_run, device="cpu")
    classifier.calibration = calibration(0.5)
    users = {"alice": (b"salt", b"hash")}
    app = create_app(classifier, tmp_path, users=users, rate_limit=RateLimit(1))
    monkeypatch.setattr("clinora.serving.passwords.BasicAuth.admits", lambda *_: True)
    with TestClient(app, "http://127.0.0.1") as client:
        strange = {path: client.get(path) for path in OURS - {"/v1/classify"}}
        strange["/v1/classify"] = client.post("/v1/classify", json={"note": "fever"})
        client.auth = ("alice", "right")
        document = client.get("/openapi.json").json()
        for path, answer in strange.items():
            method = "post" if path == "/v1/classify" else "get"
            is_open = path in ("/health", "/ready")
            assert (answer.status_code, "security" in document["paths"][path][method]) == (
                (200, False) if is_open else (401, True)
            )
            check(document, path, method, answer)
        for status in (200, 429):
            answer = client.post("/v1/classify", json={"note": "fever"})
            assert answer.status_code == status
            check(document, "/v1/classify", "post", answer)


def test_a_busy_and_a_failing_service_answer_as_described(classifier, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError

    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        document = client.get("/openapi.json").json()
        monkeypatch.setattr(classifier, "logits", fail)
        failed = client.post("/v1/classify", json={"note": "fever"})
        monkeypatch.setattr("clinora.serving.batcher.MOST_REQUESTS", 0)
        busy = client.post("/v1/classify", json={"note": "fever"})
        ready = client.get("/ready")
    assert (failed.status_code, busy.status_code, ready.status_code) == (500, 503, 503)
    check(document, "/v1/classify", "post", failed)
    check(document, "/v1/classify", "post", busy)
    check(document, "/ready", "get", ready)


def test_adapters_with_classes_of_their_own_are_described_and_counted(classifier, tmp_path):
    other = copy.copy(classifier)
    other.labels = tuple("abcde")
    app = create_app(classifier, tmp_path, adapters={"letters": other})
    with TestClient(app, "http://127.0.0.1") as client:
        document = client.get("/openapi.json").json()
        model = client.get("/v1/model").json()
        check(document, "/v1/model", "get", client.get("/v1/model"))
        assert model["adapters"]["letters"]["labels"] == list("abcde")
        for body in ({"note": "fever"}, {"notes": ["fever", " "]}):
            answer = client.post("/v1/classify", json=body | {"adapter": "letters"})
            assert answer.status_code == 200
            check(document, "/v1/classify", "post", answer)
        label = answer.json()["results"][0]["label"]
        sample = f'clinora_predictions_total{{adapter="letters",label="{label}"}} 2.0'
        assert sample in client.get("/metrics").text
        assert "Prediction-letters" in client.get("/docs").text
        answer = client.post("/v1/classify", json={"note": "fever", "adapter": "numbers"})
        assert answer.status_code == 422
        check(document, "/v1/classify", "post", answer)


BODIES = [
    {"note": "fever"}, {"note": "fever", "notes": None}, {"notes": ["fever", ""]},
    {"notes": ["fever"] * api.MOST_NOTES, "note": None}, {}, {"note": None}, {"note": ""},
    {"note": 1}, {"note": "fever", "notes": ["fever"]}, {"notes": []}, {"notes": [1]},
    {"notes": ["fever"] * (api.MOST_NOTES + 1)}, {"note": "fever", "more": 1}, ["fever"], "fever",
    {"note": "x" * (api.MOST_CHARACTERS + 1)}, {"note": "fever", "adapter": None},
    {"note": "fever", "adapter": "missing"},
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: json.dumps(body)[:40])
def test_a_body_is_accepted_exactly_if_the_document_says_so(lasting_client, document, body):
    content = document["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"] | {"components": document["components"]}
    is_described = jsonschema.Draft202012Validator(schema).is_valid(body)
    answer = lasting_client.post("/v1/classify", json=body)
    assert (answer.status_code == 200) == is_described


def test_the_model_and_its_limits_are_those_that_hold(lasting_client, classifier):
    model = lasting_client.get("/v1/model").json()
    assert (model["labels"], model["token_limit"]) == (list(classifier.labels), 128)
    assert (model["calibrated"], model["version"]) == (False, clinora.__version__)
    assert model["base"] == "base"  # the folder's name; its path is nobody's business
    limits = model["limits"]
    most = ["fever"] * limits["notes_in_request"]
    assert lasting_client.post("/v1/classify", json={"notes": most}).status_code == 200
    assert lasting_client.post("/v1/classify", json={"notes": [*most, "x"]}).status_code == 422
    note = "x" * limits["characters_in_note"]
    assert lasting_client.post("/v1/classify", json={"note": note}).status_code == 200
    assert lasting_client.post("/v1/classify", json={"note": f"{note}x"}).status_code == 422
    body = json.dumps({"note": "fever"}).encode()
    headers = {"Content-Type": "application/json"}
    for size, status in ((limits["bytes_in_request"], 200), (limits["bytes_in_request"] + 1, 413)):
        answer = lasting_client.post("/v1/classify", content=body.ljust(size), headers=headers)
        assert answer.status_code == status


@pytest.mark.parametrize("root", ["", "/clinora", "https://notes.example/clinora"])
def test_below_a_sub_path_the_document_gives_it(classifier, tmp_path, monkeypatch, root):
    monkeypatch.setenv("GRADIO_ROOT_PATH", root)
    client = TestClient(create_app(classifier, tmp_path), "http://127.0.0.1")
    assert client.get("/openapi.json").json()["servers"] == [{"url": root or "/"}]


# --- the page ---


class Page(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_every_route_and_status_without_a_script(lasting_client, document):
    answer = lasting_client.get("/docs")
    page = Page(answer.text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "form"} == set()
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        target = attributes.get("href")
        if tag == "a":
            assert target == "openapi.json" or target.removeprefix("#") in ids
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in page.text
            for response in operation["responses"].values():
                assert response["description"] in page.text


def test_names_of_classes_are_shown_as_text(small_run, tmp_path):
    classifier = clinora.Classifier.load(small_run, device="cpu")
    classifier.labels = ("<script>alert(1)</script>", '"><b>', "a", "b", "c")
    client = TestClient(create_app(classifier, tmp_path), "http://127.0.0.1")
    page = Page(client.get("/docs").text)
    assert {tag for tag, _ in page.tags} & {"script", "b"} == set()
    assert "alert(1)" in page.text


@pytest.mark.slow
def test_the_page_works_in_a_browser_under_its_policy(chromium, served):
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    page, complaints, asked = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{served.url()}/docs")
    background = page.evaluate("getComputedStyle(document.querySelector('pre')).overflowX")
    assert background == "auto"  # its styles are in force
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("link", name="an OpenAPI document").click()
    page.wait_for_url(f"{served.url()}/openapi.json")
    context.close()
    assert complaints == []
    assert [url for url in asked if "favicon" not in url] == [
        f"{served.url()}/docs", f"{served.url()}/openapi.json"
    ]  # fmt: skip


# --- schemathesis ---


@pytest.mark.slow
def test_schemathesis_finds_nothing_that_the_document_does_not_say(served, tmp_path):
    """Its requests are right, wrong and random; a server error would be found, too."""
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    program = shutil.which("schemathesis", path=str(sys.prefix) + "/bin") or "schemathesis"
    command = [program, "run", f"{served.url()}/openapi.json", "--max-examples=20", "--seed=1"]
    # No schema says that a note needs a visible character, so a valid body can be refused.
    command.append("--exclude-checks=positive_data_acceptance")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
