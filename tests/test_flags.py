"""Flags: what a flagged prediction stores, when it is refused, and who can read the file."""

import json
import os
import re
import stat

import pytest
from fastapi.testclient import TestClient

import clinora
from clinora.serving.app import create_app
from clinora.serving.classify_tab import REASONS
from clinora.serving.flags import Flags, FlagsFullError
from tests.served import CANARY, call, join

# --- What is stored ---


def test_a_flag_stores_prediction_reason_and_hash_and_the_text_only_with_consent(
    client, classifier, flags_folder
):
    note = f"{CANARY} chest pain"
    expected = classifier([note])[0]
    record = {
        "predicted_class": expected.index,
        "label": expected.label,
        "confidence": None,
        "sha256": clinora.Note(note, ()).sha256,
        "tokens": expected.tokens,
        "tokens_exact": True,
        "reason": REASONS[1],
    }
    call(client, "predict", f"  {note}\n", None)
    assert not flags_folder.exists()  # the first flag creates it
    file = flags_folder / "flags.jsonl"
    for consent, text in ((False, {}), (True, {"note": note})):
        assert call(client, "flag", f"{note} ", None, consent, REASONS[1])[0] == "complete"
        flagged = json.loads(file.read_text().splitlines()[-1])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", flagged.pop("time"))
        assert flagged == record | text


# --- What is refused ---


def test_a_flag_needs_one_of_the_reasons(client, flags_folder):
    call(client, "predict", "fever", None)
    assert call(client, "flag", "fever", None, False, None)[0] == "error"
    for reason in ("", CANARY, [REASONS[0]]):
        answer = join(client, "flag", "fever", None, False, reason, session="one")
        assert answer.status_code == 422
    assert not flags_folder.exists()


def test_a_note_that_was_changed_after_its_prediction_is_not_flagged(client, flags_folder):
    call(client, "predict", "fever", None)
    event, answer = call(client, "flag", f"fever {CANARY}", None, True, REASONS[0])
    assert event == "error"
    assert "note has changed" in answer["error"]
    assert not flags_folder.exists()


def test_without_a_prediction_there_is_nothing_to_flag(client, flags_folder):
    call(client, "predict", "fever", None, session="another")
    event, answer = call(client, "flag", "fever", None, True, REASONS[0])
    assert event == "error"
    assert "no prediction" in answer["error"]
    made_up = {"label": CANARY}
    event, _ = call(client, "flag", "fever", made_up, True, REASONS[0])
    assert event == "error"
    assert not flags_folder.exists()


def test_only_the_predictions_of_the_most_recent_sessions_are_kept(
    classifier, flags_folder, monkeypatch
):
    monkeypatch.setattr("clinora.serving.app.MOST_SESSIONS_WITH_STATE", 3)
    with TestClient(create_app(classifier, flags_folder), "http://127.0.0.1") as client:
        for session in ("first", "second", "third", "fourth", "fifth"):
            assert call(client, "predict", "fever", None, session=session)[0] == "complete"
        flags = {
            session: call(client, "flag", "fever", None, False, REASONS[0], session=session)[0]
            for session in ("fifth", "first")
        }
    assert flags == {"fifth": "complete", "first": "error"}


# --- The file ---


def test_flags_are_appended_to_a_file_that_only_its_owner_can_read(flags_folder):
    old = os.umask(0)
    try:
        for i in range(2):
            Flags(flags_folder).add({"i": i})
    finally:
        os.umask(old)
    file = flags_folder / "flags.jsonl"
    assert stat.S_IMODE(flags_folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [json.loads(line)["i"] for line in file.read_text().splitlines()] == [0, 1]


def test_a_link_in_place_of_the_file_is_not_followed(flags_folder, tmp_path):
    flags_folder.mkdir()
    (tmp_path / "other").write_text("as it was")
    (flags_folder / "flags.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(OSError):
        Flags(flags_folder).add({})
    assert (tmp_path / "other").read_text() == "as it was"


def test_an_older_folder_and_file_become_private(flags_folder):
    flags_folder.mkdir(mode=0o755)
    file = flags_folder / "flags.jsonl"
    file.touch(mode=0o644)
    Flags(flags_folder).add({})
    assert stat.S_IMODE(flags_folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_pipe_in_place_of_the_file_is_refused(flags_folder):
    flags_folder.mkdir()
    os.mkfifo(flags_folder / "flags.jsonl")
    with pytest.raises(OSError):
        Flags(flags_folder).add({})


def test_a_full_file_takes_no_more_flags(client, flags_folder):
    flags = Flags(flags_folder, most_bytes=100)
    flags.add({"i": 0})
    with pytest.raises(FlagsFullError, match="100 bytes"):
        flags.add({"i": "x" * 60})
    assert len(flags.path.read_text().splitlines()) == 1
    with flags.path.open("ab") as file:
        file.truncate(10_000_000)  # the page's own limit
    call(client, "predict", "fever", None)
    event, answer = call(client, "flag", "fever", None, False, REASONS[0])
    assert event == "error"
    assert "full" in answer["error"]
