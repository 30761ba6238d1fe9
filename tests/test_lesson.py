"""The live lesson: what it trains, and that one visitor at a time has it, for a limited time."""

import json
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from fastapi.testclient import TestClient

from clinora.serving.app import create_app
from clinora.serving.lesson import STEPS, Comparison, Moment, teach
from clinora.serving.lesson_process import (
    Lessons,
    LessonStoppedError,
    LessonTakenError,
    LessonTimeError,
)
from tests.served import (
    ENDLESS_LESSON,
    LESSON_STEP,
    PICTURE,
    ROOT,
    call,
    join,
    messages,
    read_until,
    running,
)
from tests.test_fairness import Visitor

END = {
    "notes": 35, "losses": [1.75, 1.5, 1.5], "accuracies": [0.25, 0.5, 0.5], "difference": 6e-7
}  # fmt: skip
# These take the place of the lesson's process, as ENDLESS_LESSON does.
SHORT = f"print({json.dumps(json.dumps(LESSON_STEP))}); print({json.dumps(json.dumps(END))})"
FAILING = (
    f'print({json.dumps(json.dumps(LESSON_STEP))}); print(\'{{"failure": "OSError at x.py:1"}}\')'
)
KILLED = "import os; os.abort()"


def lessons_of(program, seconds=60):
    lessons = Lessons()
    lessons.command = [sys.executable, "-c", program]
    lessons.seconds = seconds
    return lessons


def nobody_leaves():
    pass


def process_of(program):
    """Find the process that takes the place of the lesson's."""
    (process,) = [p for p in psutil.Process().children() if program in p.cmdline()]
    return process


# --- What is trained ---


@pytest.fixture(scope="module")
def taught():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = list(teach())
    torch.set_num_threads(threads)
    return parts


@pytest.mark.slow
def test_every_update_is_zero_at_first_and_grows(taught):
    *moments, _ = taught
    assert [moment.step for moment in moments] == list(range(STEPS + 1))
    for values in moments[-1].norms.values():
        assert values[0] == 0
        assert 0 < values[1] < values[5] < values[20]
    assert len(moments[-1].norms) == 12


@pytest.mark.slow
def test_the_shown_update_and_its_norm_are_those_of_the_shown_factors(taught):
    moment = taught[7]
    assert isinstance(moment, Moment)
    for name, (A, B, update) in moment.matrices.items():
        expected = 2.0 * B.double().numpy() @ A.double().numpy()  # α/r = 16/8
        np.testing.assert_allclose(update, expected, atol=1e-7)
        norm = np.sqrt((expected**2).sum())
        assert moment.norms[name][-1] == pytest.approx(norm, rel=1e-5)


@pytest.mark.slow
def test_a_moment_is_a_copy_that_later_steps_do_not_change(taught):
    first, second = (next(iter(taught[step].matrices.values())) for step in (0, 1))
    assert first[1].count_nonzero() == 0 < second[1].count_nonzero()
    assert len(taught[3].losses) == 3 and len(next(iter(taught[3].norms.values()))) == 4


@pytest.mark.slow
def test_the_loss_falls_and_the_merged_classifier_is_the_trained_one(taught):
    *moments, end = taught
    losses = moments[-1].losses
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert isinstance(end, Comparison)
    before, trained, merged = end.losses
    assert trained < before - 0.1
    assert merged == pytest.approx(trained, abs=1e-5)
    assert 0 < end.difference < 1e-5  # W + s·B·A is rounded, so it is not the same to the bit


# --- One visitor, for a limited time ---


def test_a_second_visitor_has_to_wait_until_the_first_has_ended():
    lessons = lessons_of(ENDLESS_LESSON)
    first = lessons.run("first", nobody_leaves)
    next(first)
    process = process_of(ENDLESS_LESSON)
    with pytest.raises(LessonTakenError):
        next(lessons.run("second", nobody_leaves))
    assert next(first)["step"] == 1  # it goes on
    first.close()
    assert not process.is_running()
    lessons.command = [sys.executable, "-c", SHORT]
    assert list(lessons.run("second", nobody_leaves)) == [LESSON_STEP, END]


def test_a_visitor_stops_the_own_lesson_and_no_others():
    lessons = lessons_of(ENDLESS_LESSON)
    run = lessons.run("first", nobody_leaves)
    next(run)
    process = process_of(ENDLESS_LESSON)
    lessons.stop("second")
    for _ in range(5):
        next(run)
    lessons.stop("first")
    with pytest.raises(LessonStoppedError):
        for _ in range(5):
            next(run)
    assert not process.is_running()


def test_a_stop_does_not_reach_the_next_lesson():
    lessons = lessons_of(ENDLESS_LESSON)
    with pytest.raises(LessonStoppedError):
        for _ in lessons.run("one", nobody_leaves):
            lessons.stop("one")
    lessons.command = [sys.executable, "-c", SHORT]
    assert list(lessons.run("one", nobody_leaves)) == [LESSON_STEP, END]


def test_a_late_stop_does_not_reach_the_next_visitors_lesson():
    """The first lesson ends and the second begins while the first visitor stops the lesson."""
    lessons = lessons_of(ENDLESS_LESSON)
    first = lessons.run("first", nobody_leaves)
    second = lessons.run("second", nobody_leaves)
    next(first)

    class SlowName(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            is_equal = str.__eq__(self, other)
            first.close()
            next(second)
            return is_equal

    lessons.stop(SlowName("first"))
    for _ in range(5):
        next(second)
    second.close()


@pytest.mark.parametrize("program", [ENDLESS_LESSON, "import time; time.sleep(600)"])
def test_a_lesson_ends_after_its_time(program):
    lessons = lessons_of(program, seconds=1)
    began = time.monotonic()
    with pytest.raises(LessonTimeError):
        for _ in lessons.run("one", nobody_leaves):
            pass
    assert 1 <= time.monotonic() - began < 10
    with pytest.raises(LessonTimeError):  # it is free again
        list(lessons.run("two", nobody_leaves))


def test_a_lesson_whose_visitor_leaves_ends():
    class GoneError(Exception):
        pass

    def leave():
        if seen:
            raise GoneError

    seen = []
    with pytest.raises(GoneError):
        for _ in lessons_of(ENDLESS_LESSON).run("one", leave):
            seen.append(process_of(ENDLESS_LESSON))
    assert len(seen) == 1
    assert not seen[0].is_running()


def test_a_lesson_that_cannot_be_imported_is_a_failure_with_its_reason():
    program = (
        "import sys; sys.modules['clinora.serving.lesson'] = None; "
        "from clinora.serving.lesson_process import _main; _main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    (line,) = process.stdout.read().splitlines()
    process.communicate()
    assert "ModuleNotFoundError" in json.loads(line)["failure"]


@pytest.mark.slow
def test_the_process_ends_with_the_server():
    """The server's end of the pipe is closed, whatever ended the server."""
    process = subprocess.Popen(
        Lessons().command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert json.loads(process.stdout.readline())["step"] == 0
    process.stdin.close()
    assert process.wait(30) == 0
    process.stdout.close()


# --- On the page ---


@pytest.fixture
def lessons(lasting_client, monkeypatch):
    lessons = lasting_client.app.state.lessons
    monkeypatch.setattr(lessons, "command", [sys.executable, "-c", SHORT])
    return lessons


def test_the_page_shows_the_comparison_at_the_end(visitor, lessons):
    event, (status, *_) = call(visitor, "train_lesson")
    assert event == "complete"
    for number in ("35", "1.750", "1.500", "25.0%", "50.0%", "0.00006"):
        assert number in status


def test_the_page_shows_each_step_as_it_comes(visitor, lessons):
    assert join(visitor, "train_lesson", session="steps").status_code == 200
    told = [m for m in messages(visitor, "steps") if m["msg"] == "process_generating"]
    assert any("1.50 nats" in json.dumps(m["output"]["data"]) for m in told)
    assert any(PICTURE in json.dumps(m["output"]["data"]) for m in told)


def test_another_visitor_is_told_that_the_lesson_is_taken(visitor, lessons):
    lessons.command = [sys.executable, "-c", ENDLESS_LESSON]
    run = lessons.run("somebody", nobody_leaves)
    next(run)
    event, told = call(visitor, "train_lesson")
    run.close()
    assert event == "error"
    assert "Another visitor" in told["error"]


def test_the_page_says_when_the_time_is_over(visitor, lessons, monkeypatch):
    lessons.command = [sys.executable, "-c", ENDLESS_LESSON]
    monkeypatch.setattr(lessons, "seconds", 0.8)
    event, (status, *_) = call(visitor, "train_lesson")
    assert event == "complete"
    assert status.startswith("Stopped after 0.8 s.")


@pytest.mark.parametrize("program", [FAILING, KILLED])
def test_a_lesson_that_fails_gives_a_reference(visitor, lessons, program):
    lessons.command = [sys.executable, "-c", program]
    event, told = call(visitor, "train_lesson")
    assert event == "error"
    assert "reference" in told["error"]
    lessons.command = [sys.executable, "-c", SHORT]
    assert call(visitor, "train_lesson")[0] == "complete"


def test_a_lesson_ends_when_its_visitor_leaves_the_page(classifier, tmp_path):
    app = create_app(classifier, tmp_path / "flagged")
    app.state.lessons.command = [sys.executable, "-c", ENDLESS_LESSON]
    with running(app) as port:
        visitor = Visitor(f"127.0.0.1:{port}")
        visitor.trigger("train_lesson")
        read_until(visitor.stream, b"largest")
        visitor.leave()
        end = time.monotonic() + 20
        taken = True
        while taken and time.monotonic() < end:
            run = app.state.lessons.run("next", nobody_leaves)
            try:
                next(run)
                taken = False
            except LessonTakenError:
                time.sleep(0.1)
            run.close()
    assert not taken


def test_a_visitor_stops_the_lesson_on_the_page(classifier, tmp_path):
    app = create_app(classifier, tmp_path / "flagged")
    app.state.lessons.command = [sys.executable, "-c", ENDLESS_LESSON]
    with running(app) as port:
        visitor = Visitor(f"127.0.0.1:{port}")
        visitor.trigger("train_lesson")
        other = Visitor(f"127.0.0.1:{port}")
        assert other.join("stop_lesson") == 200  # another browser: it stops nothing
        for _ in range(3):  # it goes on
            read_until(visitor.stream, b"process_generating")
        stopping = Visitor(f"127.0.0.1:{port}")
        stopping.cookie = visitor.cookie
        assert stopping.join("stop_lesson") == 200
        told = visitor.stream.read().decode()
    assert "Stopped. " in told


def test_the_lesson_is_off_where_passwords_are_required(classifier, tmp_path):
    users = {"alice": (b"salt", b"hash")}
    for asked, offered in ((False, False), (True, True)):
        app = create_app(classifier, tmp_path, users=users, live_lesson=asked)
        blocks = app.state.gradio.get_blocks()
        names = {event.api_name for event in blocks.fns.values()}
        assert ("train_lesson" in names) == offered
        words = [str(getattr(block, "value", "")) for block in blocks.blocks.values()]
        assert any("lesson is off" in text for text in words) == (not offered)
        app.state.batcher.close()


@pytest.mark.slow
def test_the_served_model_is_the_same_to_the_bit_after_a_lesson(classifier, tmp_path):
    before = {name: p.clone() for name, p in classifier.model.state_dict().items()}
    app = create_app(classifier, tmp_path)
    app.state.lessons.seconds = 500  # tests share the machine
    with TestClient(app, "http://127.0.0.1") as client:
        event, (status, *_) = call(client, "train_lesson")
    assert event == "complete" and "test notes" in status
    after = classifier.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in after.items())
