"""The queue before the model: nothing lost, nothing mixed up, never without bound."""

import threading
from concurrent.futures import CancelledError, Future, wait

import pytest

import clinora
from clinora.serving.batcher import MOST_TOGETHER, Batcher, BusyError

NOTES = [f"chest pain {i}, fracture of the knee {i * 7}" for i in range(40)]


@pytest.fixture(scope="module")
def classifier(small_run):
    return clinora.Classifier.load(small_run, device="cpu", precision="fp32")


@pytest.fixture
def batcher(classifier):
    batcher = Batcher(classifier)
    yield batcher
    batcher.close()


@pytest.fixture
def held(batcher):
    """The batcher's thread, busy until the event is set."""
    go_on, began = threading.Event(), threading.Event()
    batcher.run(lambda: began.set() or go_on.wait(30))
    began.wait(30)
    yield go_on
    go_on.set()


def test_every_caller_has_the_answer_to_its_own_note(batcher, classifier):
    expected = [classifier([note])[0] for note in NOTES]
    answers = {}

    def ask(i):
        answers[i] = batcher.submit([NOTES[i]])[0].result(30)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(NOTES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prediction in enumerate(expected):
        assert (answers[i].label, answers[i].tokens) == (prediction.label, prediction.tokens)
        assert answers[i].probabilities == pytest.approx(prediction.probabilities, abs=1e-5)


def test_notes_that_wait_go_through_the_model_together_in_order(batcher, held, monkeypatch):
    batches, probabilities = [], batcher.classifier.probabilities
    monkeypatch.setattr(
        batcher.classifier, "probabilities", lambda n: batches.append(list(n)) or probabilities(n)
    )
    futures = [*batcher.submit(NOTES[:30]), batcher.run(lambda: batches.append("job"))]
    futures += batcher.submit(NOTES[30:33])
    held.set()
    wait(futures, 30)
    # A job does not part them, and waits for those before it alone.
    first, second = NOTES[:MOST_TOGETHER], NOTES[MOST_TOGETHER : 2 * MOST_TOGETHER]
    assert batches == [first, second, "job", NOTES[2 * MOST_TOGETHER : 33]]


def test_what_finds_no_room_is_refused_whole_and_what_was_taken_is_answered(batcher, held):
    futures = batcher.submit(NOTES)  # 40 of 64
    with pytest.raises(BusyError):
        batcher.submit(NOTES[:25])
    assert batcher.ready
    futures += batcher.submit(NOTES[:24])
    assert not batcher.ready
    for job in (lambda: batcher.submit(NOTES[:1]), lambda: batcher.run(int)):
        with pytest.raises(BusyError):
            job()
    held.set()
    assert all(future.result(30).label for future in futures)
    assert batcher.submit(NOTES[:1])[0].result(30)


def test_who_waits_for_room_gets_it(batcher, held):
    batcher.submit([*NOTES, *NOTES[:24]])
    threading.Timer(0.1, held.set).start()
    (future,) = batcher.submit(NOTES[:1], wait=30)
    assert future.result(30)


def test_one_notes_fault_is_its_own(batcher, held):
    futures = batcher.submit(["fever", "", "cough"])
    held.set()
    with pytest.raises(ValueError, match="note 1 of 1 is empty"):
        futures[1].result(30)
    assert futures[0].result(30).label and futures[2].result(30).label


def test_a_job_gives_its_result_or_its_error_and_the_thread_goes_on(batcher):
    assert batcher.run(lambda: 7).result(30) == 7
    with pytest.raises(ZeroDivisionError):
        batcher.run(lambda: 1 / 0).result(30)
    assert batcher.submit(["fever"])[0].result(30)


def test_who_has_gone_away_costs_nothing(batcher, held, monkeypatch):
    seen, probabilities = [], batcher.classifier.probabilities
    monkeypatch.setattr(
        batcher.classifier, "probabilities", lambda n: seen.extend(n) or probabilities(n)
    )
    futures = batcher.submit(NOTES[:3])
    assert futures[1].cancel()
    (alone,) = batcher.submit(NOTES[3:4])
    held.set()
    assert futures[2].result(30) and alone.result(30)
    assert seen == [NOTES[0], NOTES[2], NOTES[3]]
    with pytest.raises(CancelledError):
        futures[1].result(0)


def test_closing_finishes_what_is_queued_and_takes_no_more(classifier):
    batcher = Batcher(classifier)
    futures: list[Future] = batcher.submit(NOTES)
    batcher.close()
    assert all(future.done() and future.result().label for future in futures)
    assert not batcher.ready
    with pytest.raises(BusyError):
        batcher.submit(["fever"])
    batcher.close()  # again: nothing
