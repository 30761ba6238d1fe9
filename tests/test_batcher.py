"""The queue before the model: nothing lost, nothing mixed up, never without bound."""

import threading
import time
from concurrent.futures import CancelledError, Future, wait
from types import SimpleNamespace

import pytest

import clinora
from clinora.serving.batcher import (
    MOST_REQUESTS,
    MOST_TOGETHER,
    MOST_TOKENS,
    MOST_WAITING_NOTES,
    Batcher,
    BusyError,
)

NOTES = [f"chest pain {i}, fracture of the knee {i * 7}" for i in range(40)]
LONG = "chest pain and a fracture of the knee, " * 60  # beyond the token limit


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
    batcher.submit_job(lambda: began.set() or go_on.wait(30))
    began.wait(30)
    yield go_on
    go_on.set()


@pytest.fixture
def batches(batcher, monkeypatch):
    """The notes that went through the model, a list for each time."""
    seen = []
    run = type(batcher.classifier).__call__

    def note_and_run(classifier, notes):
        seen.append(list(notes))
        return run(classifier, notes)

    monkeypatch.setattr(type(batcher.classifier), "__call__", note_and_run)
    return seen


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


def test_notes_that_wait_go_through_the_model_together_in_order(batcher, held, batches):
    futures = batcher.submit(NOTES[:30])
    futures.append(batcher.submit_job(lambda: batches.append("job")))
    held.set()
    wait(futures, 30)
    # A job waits for its turn alone.
    assert batches == [NOTES[:MOST_TOGETHER], "job", NOTES[MOST_TOGETHER:30]]


def test_a_job_does_not_part_the_notes_around_it_and_is_next(batcher, held, batches):
    futures = [
        *batcher.submit(NOTES[:1]),
        batcher.submit_job(lambda: batches.append("first job")),
        *batcher.submit(NOTES[1:2]),
        batcher.submit_job(lambda: batches.append("second job")),
        *batcher.submit(NOTES[2:3]),
    ]
    held.set()
    wait(futures, 30)
    assert batches == [NOTES[:3], "first job", "second job"]


def test_notes_for_different_classifiers_do_not_share_a_batch(batcher, held, batches, small_run):
    other = clinora.Classifier.load(small_run, device="cpu", precision="fp32")
    other.labels = ("v", "w", "x", "y", "z")
    futures = [
        *batcher.submit(NOTES[:2]),
        *batcher.submit(NOTES[2:4], classifier=other),
        *batcher.submit(NOTES[4:6]),
    ]
    held.set()
    wait(futures, 30)
    # Requests take turns in a batch.
    assert batches == [[NOTES[0], NOTES[4], NOTES[1], NOTES[5]], NOTES[2:4]]
    by_other = [future.result().label in other.labels for future in futures]
    assert by_other == [False, False, True, True, False, False]


def test_a_note_waits_for_one_of_each_request_before_it(batcher, held, batches, monkeypatch):
    """Three requests of 32 long notes are there first; here the model takes one note at a time."""
    monkeypatch.setattr(batcher, "most_together", 1)
    greedy = [batcher.submit([f"{LONG} {name}"] * 32) for name in "abc"]
    (short,) = batcher.submit(["fever"])
    held.set()
    assert short.result(30)
    assert [note[-1] for (note,) in batches[:4]] == ["a", "b", "c", "r"]
    wait([future for futures in greedy for future in futures], 60)
    after = [note[-1] for (note,) in batches[4:]]
    assert after == ["a", "b", "c"] * 31


def test_of_requests_that_come_later_none_is_before_ones_second_note(batcher, held, batches):
    """However many notes a request has, each of the others has its turn between two of them."""
    futures = [*batcher.submit(NOTES[:20]), *batcher.submit(NOTES[20:22]), *batcher.submit(["x"])]
    held.set()
    wait(futures, 30)
    first = [NOTES[0], NOTES[20], "x", NOTES[1], NOTES[21], *NOTES[2:13]]
    assert batches == [first, NOTES[13:20]]


def test_a_job_has_its_turn_although_notes_never_end(batcher, held, batches):
    batcher.submit([LONG] * 100)
    job = batcher.submit_job(lambda: len(batches))
    held.set()
    assert job.result(30) == 1  # after a single batch


def test_what_goes_through_the_model_together_is_bounded_by_its_tokens(classifier, monkeypatch):
    batcher = Batcher(classifier)
    shapes, run = [], classifier.logits
    monkeypatch.setattr(
        classifier, "logits", lambda ids: shapes.append(list(map(len, ids))) or run(ids)
    )
    monkeypatch.setattr(batcher, "most_tokens", 400)
    go_on = threading.Event()
    batcher.submit_job(lambda: go_on.wait(30))
    notes = [LONG, *NOTES[:10], LONG, LONG, LONG, "fever", LONG, *["fever"] * 40]
    futures = batcher.submit(notes)
    go_on.set()
    for note, future in zip(notes, futures, strict=True):
        assert future.result(30).truncated == (note == LONG)
    batcher.close()
    assert max(max(lengths) * len(lengths) for lengths in shapes) <= 400
    assert sum(map(len, shapes)) == len(notes)
    assert max(map(len, shapes)) == MOST_TOGETHER  # short notes still go together
    assert [128] * 3 in shapes  # as many as may


def test_a_note_of_more_tokens_than_a_batch_may_have_goes_alone(batcher, batches, monkeypatch):
    monkeypatch.setattr(batcher, "most_tokens", 10)
    assert all(future.result(30) for future in batcher.submit([LONG, LONG]))
    assert batches == [[LONG], [LONG]]


def test_a_full_batch_of_short_notes_is_not_made_smaller():
    """As many notes of 128 tokens as go together, which is more than most single notes have."""
    assert MOST_TOGETHER * 128 <= MOST_TOKENS


def test_what_finds_no_room_is_refused_whole_and_what_was_taken_is_answered(batcher, held):
    futures = batcher.submit([*NOTES, *NOTES, *NOTES])  # 120 of 128
    assert MOST_WAITING_NOTES == 128
    with pytest.raises(BusyError):
        batcher.submit(NOTES[:9])
    futures += batcher.submit(NOTES[:8])
    # Many notes of others do not keep out a single one.
    assert batcher.ready()
    while len(futures) < MOST_WAITING_NOTES + MOST_REQUESTS - 2:
        futures += batcher.submit(NOTES[:1])
    assert not batcher.ready()
    for job in (lambda: batcher.submit(NOTES[:1]), lambda: batcher.submit_job(int)):
        with pytest.raises(BusyError):
            job()
    held.set()
    assert all(future.result(30).label for future in futures)
    assert batcher.submit(NOTES[:1])[0].result(30)


def test_one_client_leaves_room_for_another(batcher, held):
    with pytest.raises(BusyError):
        while True:
            batcher.submit(NOTES[:1], client="greedy")
    assert not batcher.ready("greedy")
    assert batcher.ready("quiet")
    future = batcher.submit_job(lambda: "done", client="quiet")
    held.set()
    assert future.result(30) == "done"


def test_a_client_is_in_the_next_batch_whatever_another_has_asked_before(batcher, held, batches):
    futures = [batcher.submit([f"greedy {i}"], client="greedy")[0] for i in range(60)]
    futures += batcher.submit(["quiet"], client="quiet")
    held.set()
    assert all(future.result(30) for future in futures)
    assert "quiet" in batches[0]


def test_a_client_waits_for_one_job_of_another_with_many(batcher, held):
    done = []
    futures = [batcher.submit_job(lambda: done.append("greedy"), client="g") for _ in range(30)]
    futures += [batcher.submit_job(lambda: done.append("quiet"), client="q") for _ in range(2)]
    held.set()
    for future in futures:
        future.result(30)
    assert [i for i, who in enumerate(done) if who == "quiet"] == [1, 3]


def test_who_waits_for_room_gets_it(batcher, held):
    batcher.submit(["fever"] * MOST_WAITING_NOTES)
    threading.Timer(0.1, held.set).start()
    futures = batcher.submit(NOTES[:2], wait=30)
    assert all(future.result(30) for future in futures)


def test_one_notes_fault_is_its_own(batcher, held):
    futures = batcher.submit(["fever", "", "cough"])
    held.set()
    with pytest.raises(ValueError, match="note 1 of 1 is empty"):
        futures[1].result(30)
    assert futures[0].result(30).label and futures[2].result(30).label


def test_a_job_gives_its_result_or_its_error_and_the_thread_goes_on(batcher):
    assert batcher.submit_job(lambda: 7).result(30) == 7
    with pytest.raises(ZeroDivisionError):
        batcher.submit_job(lambda: 1 / 0).result(30)
    assert batcher.submit(["fever"])[0].result(30)


def test_who_has_gone_away_costs_nothing(batcher, held, batches):
    futures = batcher.submit(NOTES[:3])
    assert futures[1].cancel()
    (alone,) = batcher.submit(NOTES[3:4])
    held.set()
    assert futures[2].result(30) and alone.result(30)
    assert batches == [[NOTES[0], NOTES[3], NOTES[2]]]
    with pytest.raises(CancelledError):
        futures[1].result(0)


def test_who_has_gone_away_leaves_room_and_is_not_even_tokenised(batcher, held, monkeypatch):
    tokenizer, read = batcher.classifier.tokenizer, []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, *a: read.append(text) or encode(text, *a))
    for _ in range(3 * MOST_REQUESTS):
        for future in batcher.submit(["gone", "gone"]):
            future.cancel()
    (future,) = batcher.submit(["fever"])
    held.set()
    assert future.result(30)
    assert set(read) == {"fever"}


def test_a_caller_has_its_futures_although_the_thread_takes_its_notes_at_once(
    classifier, monkeypatch
):
    class SlowToReturn(threading.Condition):
        def __exit__(self, *arguments):
            super().__exit__(*arguments)
            if threading.current_thread() is threading.main_thread():
                time.sleep(0.2)

    slow = SimpleNamespace(Condition=SlowToReturn, Thread=threading.Thread)
    monkeypatch.setattr("clinora.serving.batcher.threading", slow)  # in that module alone
    batcher = Batcher(classifier)
    assert len(batcher.submit(NOTES[:2])) == 2
    batcher.close()


def test_closing_finishes_what_is_queued_and_takes_no_more(classifier):
    batcher = Batcher(classifier)
    futures: list[Future] = batcher.submit(NOTES)
    batcher.close()
    assert all(future.done() and future.result().label for future in futures)
    assert not batcher.ready()
    with pytest.raises(BusyError):
        batcher.submit(["fever"])
    batcher.close()  # again: nothing
