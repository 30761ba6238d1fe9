"""The HTTP interface: the published answer, refusals in words, and who may come in."""

import base64
import getpass
import hashlib
import threading
import time

import pytest
from fastapi.testclient import TestClient

import clinora
from clinora.serving import api, passwords
from clinora.serving.app import create_app
from clinora.serving.batcher import MOST_REQUESTS

CANARY = "canary-7f3a"
NOTES = ["Severe chest pain.", "The knee is swollen after a fall."]


@pytest.fixture(scope="module")
def classifier(small_run):
    return clinora.Classifier.load(small_run, device="cpu", precision="fp32")


@pytest.fixture
def client(classifier, tmp_path):
    with TestClient(create_app(classifier, tmp_path / "flagged"), "http://127.0.0.1") as client:
        yield client


def expected(classifier, note):
    prediction = classifier([note])[0]
    return {
        "predicted_class": prediction.index,
        "label": prediction.label,
        "confidence": prediction.confidence,
        "refer": prediction.refer,
        "probabilities": pytest.approx(
            dict(zip(classifier.labels, prediction.probabilities, strict=True)), abs=1e-5
        ),
        "tokens": prediction.tokens,
        "tokens_exact": prediction.tokens <= 128,
        "tokens_read": min(prediction.tokens, 128),
    }


def test_a_note_has_its_class_and_all_that_is_known_of_it(client, classifier):
    for note in (*NOTES, "fever " * 200):
        answer = client.post("/v1/classify", json={"note": note})
        assert answer.status_code == 200
        assert answer.json() == expected(classifier, note.strip())


def test_tokens_are_exact_or_at_least_so_many(client, classifier):
    for times in (1, 200):
        note = "fever " * times
        tokens = len(classifier.tokenizer.encode(note))
        told = client.post("/v1/classify", json={"note": note}).json()
        assert told["tokens_exact"] == (told["tokens"] == tokens) == (times == 1)
        assert told["tokens_read"] <= told["tokens"] <= tokens


def test_many_notes_are_answered_in_order_and_a_bad_one_by_its_error(client, classifier):
    long = "x" * (api.MOST_CHARACTERS + 1)
    answer = client.post("/v1/classify", json={"notes": [NOTES[0], " \n", NOTES[1], long]})
    assert answer.status_code == 200
    first, empty, second, too_long = answer.json()["results"]
    assert first == expected(classifier, NOTES[0])
    assert second == expected(classifier, NOTES[1])
    assert empty == {"error": "The note is empty."}
    assert too_long == {"error": "The note has 100,001 characters, more than 100,000."}


def test_notes_that_are_all_bad_are_an_answer_too(client):
    answer = client.post("/v1/classify", json={"notes": ["", " "]})
    assert answer.json() == {"results": [{"error": "The note is empty."}] * 2}


@pytest.mark.parametrize("note", ["", " \t\n"])
def test_an_empty_note_is_refused(client, note):
    answer = client.post("/v1/classify", json={"note": note})
    assert (answer.status_code, answer.json()) == (422, {"detail": "The note is empty."})


@pytest.mark.parametrize(
    "question",
    [
        {},
        {"note": CANARY, "notes": [CANARY]},
        {"note": [CANARY]},
        {"notes": CANARY},
        {"notes": []},
        {"notes": [CANARY] * (api.MOST_NOTES + 1)},
        {"notes": [CANARY, 7]},
        {"note": CANARY, "more": CANARY},
        [CANARY],
        CANARY,
    ],
)
def test_a_wrong_question_is_told_what_was_expected_and_not_repeated(
    client, question, caplog, capfd
):
    answer = client.post("/v1/classify", json=question)
    assert (answer.status_code, answer.json()) == (422, {"detail": api.EXPECTED})
    assert CANARY not in caplog.text + "".join(capfd.readouterr())


def test_what_is_no_json_is_told_so(client):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/classify", content=CANARY, headers=headers)
    assert (answer.status_code, answer.json()) == (422, {"detail": api.EXPECTED})


def test_it_tells_that_it_is_well(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_a_busy_service_says_when_to_come_back_and_recovers(client, classifier, monkeypatch):
    may_go_on, began, run = threading.Event(), threading.Event(), classifier.run

    def wait_and_run(*arguments):
        began.set()
        may_go_on.wait(30)
        return run(*arguments)

    monkeypatch.setattr(classifier, "run", wait_and_run)
    batcher, answers = client.app.state.batcher, []

    def ask():
        answers.append(client.post("/v1/classify", json={"note": NOTES[0]}))

    threads = [threading.Thread(target=ask)]
    threads[0].start()
    began.wait(30)  # it holds the model
    waiting = [batcher.submit(NOTES[:1]) for _ in range(MOST_REQUESTS - 1)]
    threads.append(threading.Thread(target=ask))
    threads[1].start()
    end = time.monotonic() + 30
    while client.get("/ready").status_code == 200 and time.monotonic() < end:
        pass
    for answer in (client.post("/v1/classify", json={"note": NOTES[0]}), client.get("/ready")):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert client.get("/health").status_code == 200
    may_go_on.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 2  # nothing taken was lost
    assert all(future.result(30).label for (future,) in waiting)
    assert client.post("/v1/classify", json={"note": NOTES[0]}).status_code == 200
    assert client.get("/ready").status_code == 200


def test_who_waits_too_long_is_told_so(client, classifier, monkeypatch):
    may_go_on, run = threading.Event(), classifier.run
    monkeypatch.setattr(classifier, "run", lambda *a: may_go_on.wait(30) and run(*a))
    monkeypatch.setattr(api, "REQUEST_SECONDS", 0.1)
    answer = client.post("/v1/classify", json={"note": NOTES[0]})
    may_go_on.set()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_an_error_is_told_by_reference(classifier, tmp_path, monkeypatch, caplog):
    def run(*_):
        raise RuntimeError(f"could not do {CANARY}")

    monkeypatch.setattr(classifier, "run", run)
    app = create_app(classifier, tmp_path)
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.post("/v1/classify", json={"note": CANARY})
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("This did not work; reference ")
    assert "RuntimeError at tests/test_api.py" in caplog.text
    assert CANARY not in caplog.text


def test_one_notes_failure_is_its_own(client, classifier, monkeypatch, caplog):
    call = clinora.Classifier.__call__

    def fail_at_times(self, notes):
        if any(CANARY in note for note in notes):
            raise RuntimeError(CANARY)
        return call(self, notes)

    monkeypatch.setattr(clinora.Classifier, "__call__", fail_at_times)
    results = client.post("/v1/classify", json={"notes": [NOTES[0], CANARY]}).json()["results"]
    monkeypatch.undo()
    assert results[0] == expected(classifier, NOTES[0])
    assert results[1]["error"].startswith("This did not work; reference ")
    assert CANARY not in caplog.text


# --- Who may come in ---


@pytest.mark.parametrize("path", ["/", "/health", "/config"])
def test_another_sites_page_is_refused(client, path):
    for origin, status in (
        ("https://evil.example", 403), ("http://127.0.0.1:9", 403), ("null", 403),
        ("http://127.0.0.1", 200),
    ):  # fmt: skip
        assert client.get(path, headers={"Origin": origin}).status_code == status


def line(name, password):
    """Make a line of the file of passwords, with scrypt's parameters of the documentation."""
    salt = b"0123456789abcdef"
    found = hashlib.scrypt(password.encode(), salt=salt, n=16384, r=8, p=1)
    return f"{name}:{salt.hex()}:{found.hex()}\n"


@pytest.fixture
def guarded(classifier, tmp_path):
    file = tmp_path / "passwords.txt"
    file.write_text(line("alice", "correct horse") + "\n" + line("bob", "pässword: 9"))
    users = passwords.read_passwords(file)
    app = create_app(classifier, tmp_path / "flagged", hosts=["notes.example"], users=users)
    with TestClient(app, "http://notes.example") as client:
        yield client


def basic(name, password):
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


@pytest.mark.parametrize("path", ["/", "/gradio_api/info"])
def test_page_and_api_ask_for_name_and_password(guarded, path):
    right = basic("alice", "correct horse")
    users = [
        ("alice", "wrong"),
        ("alice", ""),
        ("bob", "correct horse"),
        ("carol", "correct horse"),
    ]
    wrong = [
        *(basic(*user) for user in users),
        "Basic ###",
        "Basic",
        right.replace("Basic", "Digest"),
    ]
    for headers in ({}, *({"Authorization": header} for header in wrong)):
        for answer in (
            guarded.get(path, headers=headers),
            guarded.post("/v1/classify", json={"note": CANARY}, headers=headers),
        ):
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("user", [("alice", "correct horse"), ("bob", "pässword: 9")])
def test_a_name_with_its_password_comes_in_each_time(guarded, user):
    headers = {"Authorization": basic(*user)}
    for _ in range(2):
        assert guarded.get("/", headers=headers).status_code == 200
        answer = guarded.post("/v1/classify", json={"note": NOTES[0]}, headers=headers)
        assert answer.status_code == 200


def test_guesses_of_strangers_do_not_hold_up_who_is_known(guarded, monkeypatch):
    known = {"Authorization": basic("alice", "correct horse")}
    assert guarded.get("/config", headers=known).status_code == 200
    may_go_on, began, scrypt = threading.Event(), threading.Event(), passwords.scrypt

    def slow(password, salt):
        began.set()
        may_go_on.wait(30)
        return scrypt(password, salt)

    monkeypatch.setattr(passwords, "scrypt", slow)
    statuses = []

    def guess(i):
        headers = {"Authorization": basic("alice", f"guess {i}")}
        statuses.append(guarded.get("/config", headers=headers).status_code)

    threads = [threading.Thread(target=guess, args=(i,)) for i in range(30)]
    for thread in threads:
        thread.start()
    began.wait(30)
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/config", headers=known).status_code == 200
    end = time.monotonic() + 30
    while len(statuses) < 30 - 1 - passwords.MOST_GUESSES and time.monotonic() < end:
        time.sleep(0.01)
    assert statuses == [429] * (30 - 1 - passwords.MOST_GUESSES)
    may_go_on.set()
    for thread in threads:
        thread.join()
    assert statuses.count(401) == 1 + passwords.MOST_GUESSES


def test_a_strangers_body_is_not_read(guarded):
    answer = guarded.post("/v1/classify", content=b"x" * 6_000_000)
    assert answer.status_code == 401


def test_health_tells_itself_to_all_and_unknown_hosts_are_refused(guarded):
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/ready").status_code == 200
    headers = {"Host": "evil.example", "Authorization": basic("alice", "correct horse")}
    assert guarded.get("/", headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names nobody"),
        ("alice:correct horse\n", "line 1 of"),
        ("alice:00:zz\n", "line 1 of"),
        (line("alice", "a") + "bob:00:11\n", "line 2 of"),
        (line("alice", "a") + line("alice", "b"), "line 2 of"),
        (line("", "a"), "line 1 of"),
    ],
)
def test_a_file_of_passwords_that_is_none_is_refused_without_quoting_it(tmp_path, text, told):
    file = tmp_path / "passwords.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        passwords.read_passwords(file)
    assert "horse" not in str(caught.value)


def test_the_tools_line_admits_the_password_that_was_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(getpass, "getpass", lambda _: "correct horse")
    assert passwords.main(["alice"]) == 0
    printed = capsys.readouterr().out
    assert "correct horse" not in printed
    file = tmp_path / "passwords.txt"
    file.write_text(printed)
    door = passwords.Door(None, passwords.read_passwords(file))
    assert door.admits(basic("alice", "correct horse"))
    assert not door.admits(basic("alice", "correct horsf"))


@pytest.mark.parametrize(
    ("name", "typed", "told"),
    [
        ("alice", ["short", "short"], "12 characters"),
        ("alice", ["correct horse", "correct hors"], "not the same"),
        ("al:ice", [], "without a colon"),
        (" alice", [], "or outer spaces"),
    ],
)
def test_what_makes_no_line_is_told(monkeypatch, capsys, name, typed, told):
    answers = iter(typed)
    monkeypatch.setattr(getpass, "getpass", lambda _: next(answers))
    with pytest.raises(SystemExit, match="2"):
        passwords.main([name])
    out, err = capsys.readouterr()
    assert out == "" and told in err
