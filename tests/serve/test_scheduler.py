from __future__ import annotations

import queue

import numpy as np
import pytest

from mobillama.data.tokenizer import load_tokenizer
from mobillama.engine.load import load_batch_engine
from mobillama.engine.sampling import Sampling
from mobillama.serve import scheduler as scheduling
from mobillama.serve.metrics import Metrics
from mobillama.serve.scheduler import CANCELLED, CHUNK, FAILED, LENGTH, STOP, Busy, Finish, Request, Scheduler
from mobillama.serve.writer import Writer


@pytest.mark.parametrize(
    "stops, said, stopped",
    [
        ((), "a STOP b", False),
        (("STOP",), "a ", True),
        (("b", "STOP"), "a ", True),
        (("STOPX", "P b!"), "a STOP b", False),
        (("a STOP b and more",), "a STOP b", False),
        (("a",), "", True),
    ],
)
def test_text_is_held_back_only_while_it_may_begin_a_stop_text(stops, said, stopped):
    token_bytes = [bytes([byte]) for byte in range(256)]
    writer, pieces = Writer(token_bytes, stops), []
    for byte in b"a STOP b":
        pieces.append(writer.write(byte))
        if writer.stopped:
            break
    assert "".join(pieces) + writer.finish() == said and writer.stopped is stopped
    assert pieces[0] == ("" if any(stop.startswith("a") for stop in stops) else "a")  # as soon as it is certain


def test_a_stop_text_of_bytes_that_are_no_character_yet():
    writer = Writer([bytes([byte]) for byte in range(256)], ["é"])
    assert [writer.write(byte) for byte in "xé".encode()] == ["x", "", ""] and writer.stopped
    assert Writer([b"\xc3"], []).finish() == ""
    cut = Writer([b"\xc3"], [])
    assert cut.write(0) == "" and cut.finish() == "\ufffd"


class Watched:
    """An engine that notes what it is fed, and fails when it is told to."""

    def __init__(self, engine):
        self._engine, self.fed, self.fails, self.diverges = engine, [], False, False

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def feed(self, work):
        self.fed.append([len(ids) for _, ids in work])
        if self.fails:
            raise RuntimeError("out of memory")
        return self._engine.feed(work) * (np.nan if self.diverges else 1)


@pytest.fixture
def scheduler(chat_model):
    engine, tokenizer = load_batch_engine(chat_model, slots=2)
    made = Scheduler(Watched(engine), tokenizer, queue=3, metrics=Metrics())
    made.start()
    yield made
    made.close()


def request(ids, max_tokens=4, **options):
    return Request(ids, Sampling(0), max_tokens, frozenset(), **options)


def submit(scheduler, *requests):
    """Return where each request's events arrive, and the tickets."""
    boxes = [queue.Queue() for _ in requests]
    return boxes, scheduler.submit([(its, teller(box)) for its, box in zip(requests, boxes, strict=True)])


def teller(box):
    def tell(events):
        for event in events:
            box.put(event)

    return tell


def end_of(box):
    events = []
    while not (events and isinstance(events[-1], Finish)):
        events.append(box.get(timeout=30))
    return events[-1].reason, [event.token for event in events[:-1]]


def test_long_prompts_are_read_piece_by_piece_while_others_go_on(scheduler):
    engine = scheduler._engine
    (short,), _ = submit(scheduler, request([5, 6, 7], 400))
    short.get(timeout=30)
    ids = np.random.default_rng(0).integers(3, 500, 900).tolist()
    (long,), _ = submit(scheduler, request(ids))
    assert end_of(long)[0] == LENGTH
    mixed = [sizes for sizes in engine.fed if len(sizes) == 2]
    assert [sum(sizes) - 1 for sizes in mixed[:4]] == [CHUNK, CHUNK, CHUNK, 900 - 3 * CHUNK]
    assert all(1 in sizes for sizes in mixed)
    assert len(end_of(short)[1]) == 399


def test_answers_to_prompts_that_begin_alike_read_the_beginning_once(scheduler):
    engine, metrics = scheduler._engine, scheduler._metrics
    ids = np.random.default_rng(0).integers(3, 500, 600).tolist()
    prompts = [ids, ids, [*ids[:500], 7, 8, 9]]
    boxes, _ = submit(scheduler, *(request(its, 6) for its in prompts))
    together = [end_of(box) for box in boxes]
    assert metrics.prompt_tokens == 600 + 600 + 503 and metrics.reused_tokens == 599 + 500
    assert sum(size for sizes in engine.fed for size in sizes if size > 1) == 600 + 3
    for its, found in zip(prompts, together, strict=True):
        for slot in range(engine.slots):
            engine.truncate(slot, 0)
        scheduler._held = [[] for _ in range(engine.slots)]
        (box,), _ = submit(scheduler, request(its, 6))
        assert end_of(box) == found


def test_conversations_behind_one_system_message_keep_a_slot_each(scheduler):
    draw, metrics = np.random.default_rng(1), scheduler._metrics
    system = draw.integers(3, 500, 40).tolist()
    talks = [[*system, *draw.integers(3, 500, 100).tolist()] for _ in range(2)]
    for turn in range(3):
        for ids in talks:
            before = metrics.reused_tokens
            (box,), _ = submit(scheduler, request(ids))
            reason, said = end_of(box)
            assert reason == LENGTH and (turn == 0 or metrics.reused_tokens - before >= len(ids) - 6)
            ids += [*said, 9, 10]


def test_a_copy_that_fails_is_read_anew(scheduler, capfd):
    engine = scheduler._engine
    ids = np.random.default_rng(2).integers(3, 500, 200).tolist()
    (box,), _ = submit(scheduler, request(ids))
    answer = end_of(box)
    engine.copy = lambda *_: (_ for _ in ()).throw(RuntimeError("gone"))
    boxes, _ = submit(scheduler, request(ids), request(ids))
    assert [end_of(box) for box in boxes] == [answer, answer]
    assert scheduler._metrics.failures == 1 and "gone" in capfd.readouterr().err


def test_of_the_first_token_is_told_at_once_and_of_the_others_together(scheduler, monkeypatch):
    monkeypatch.setattr(scheduling, "TOGETHER", 1e9)
    told = queue.Queue()
    scheduler.submit([(request([5, 6, 7], 300), told.put)])
    assert [len(told.get(timeout=30)) for _ in range(2)] == [1, 300]
    monkeypatch.setattr(scheduling, "TOGETHER", 0)
    scheduler.submit([(request([5, 6, 7], 5), told.put)])
    assert [len(told.get(timeout=30)) for _ in range(5)] == [1, 1, 1, 1, 2]


def test_a_failing_engine_ends_what_ran_and_the_next_request_is_answered(scheduler, capfd):
    expected = end_of(submit(scheduler, request([5, 6, 7]))[0][0])
    scheduler._engine.fails = True
    boxes, _ = submit(scheduler, request([5, 6, 7]), request([8, 9]))
    assert [end_of(box) for box in boxes] == [(FAILED, [])] * 2
    scheduler._engine.fails = False
    assert end_of(submit(scheduler, request([5, 6, 7]))[0][0]) == expected == (LENGTH, expected[1])
    said = capfd.readouterr().err
    assert "RuntimeError: out of memory" in said and "5" not in said


def test_logits_that_are_not_finite_end_what_ran_and_the_next_request_is_answered(scheduler, capfd):
    expected = end_of(submit(scheduler, request([5, 6, 7]))[0][0])
    scheduler._engine.diverges = True
    assert end_of(submit(scheduler, request([5, 6, 7]))[0][0]) == (FAILED, [])
    scheduler._engine.diverges = False
    assert end_of(submit(scheduler, request([5, 6, 7]))[0][0]) == expected
    assert "take another checkpoint" in capfd.readouterr().err


def test_the_queue_is_bounded_and_what_waits_can_be_cancelled(scheduler):
    boxes, tickets = submit(scheduler, *[request([5 + n], 4000) for n in range(5)])
    with pytest.raises(Busy):
        submit(scheduler, request([9]))
    for ticket in tickets[1:]:
        scheduler.cancel(ticket)
    assert [end_of(box)[0] for box in boxes[1:]] == [CANCELLED] * 4
    assert scheduler.load == (1, 0)
    scheduler.close()
    assert end_of(boxes[0])[0] == CANCELLED
    with pytest.raises(Busy):
        submit(scheduler, request([9]))


def test_an_answer_ends_at_a_stop_id_which_is_no_part_of_it(scheduler, chat_model):
    _, tokens = end_of(submit(scheduler, request([5, 6, 7], 9))[0][0])
    stop = tokens[3]
    asked = Request([5, 6, 7], Sampling(0), 9, frozenset({stop}))
    assert end_of(submit(scheduler, asked)[0][0]) == (STOP, tokens[: tokens.index(stop)])
    assert load_tokenizer(chat_model).chat_template
