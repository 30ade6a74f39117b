"""Requests of several threads: texts as if alone, bounds, cancellation, and the end."""

import threading
from dataclasses import dataclass
from typing import Any

import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode.loop import Batch
from easyspec_jax.engine.completion import Completion
from easyspec_jax.engine.serving import (
    KINDS,
    Ended,
    Failed,
    NotServing,
    Progress,
    QueueFull,
    Request,
    Scheduler,
)
from tests.support.serving import DEPTH, ROWS, wait_until

pytestmark = pytest.mark.slow

PROMPT = "def read_config(filename):\n"
LONG = SamplingParams(max_new_tokens=200)


@dataclass
class Heard:
    """A request and its events."""

    request: Request
    events: list[Any]
    ended: threading.Event

    @property
    def completion(self) -> Completion:
        assert self.ended.wait(60), "the request never ended"
        assert isinstance(self.events[-1], Ended), self.events[-1]
        return self.events[-1].completion


def asked(
    scheduler: Scheduler, sampling: SamplingParams, prompt: str = PROMPT, plain: bool = False
) -> Heard:
    """Make a request that notes its events."""
    engine = scheduler.plain if plain else scheduler.engine
    assert engine is not None
    events: list[Any] = []
    ended = threading.Event()

    def listen(event: Any) -> None:
        events.append(event)
        if not isinstance(event, Progress):
            ended.set()

    return Heard(Request(engine, engine.row(prompt, sampling), listen), events, ended)


def submit(scheduler: Scheduler, *requests: Heard) -> None:
    scheduler.submit([heard.request for heard in requests])


def test_every_kind_of_sampling_gets_the_text_that_it_has_alone(scheduler):
    """More requests than rows, of all kinds and out of order, from two threads."""
    wanted = []
    for number, (kind, size) in enumerate([(0, 9), (1, 20), (2, 5), (0, 30), (1, 12)]):
        example = KINDS[kind]
        wanted.append(
            SamplingParams(example.temperature, 0, example.top_p, seed=number, max_new_tokens=size)
        )
    requests = [asked(scheduler, sampling) for sampling in wanted]
    others = threading.Thread(target=submit, args=(scheduler, *requests[:2]))
    others.start()
    submit(scheduler, *requests[2:])
    others.join()
    found = [heard.completion for heard in requests]
    # The scheduler's own programs compute these too, so it has to be at rest.
    for completion, sampling in zip(found, wanted, strict=True):
        (alone,) = scheduler.engine.generate([PROMPT], sampling)
        assert completion.token_ids == alone.token_ids
        assert completion.finish_reason == alone.finish_reason


def test_progress_adds_up_to_the_text_and_to_the_statistics(scheduler):
    heard = asked(scheduler, SamplingParams(max_new_tokens=40, stop=("return",)))
    submit(scheduler, heard)
    completion = heard.completion
    *reports, end = heard.events
    pieces = ["".join(report.gain.pieces) for report in reports]
    assert "".join(pieces) + end.rest == completion.text
    rounds = [report.gain for report in reports[1:]]
    assert [len(gain.pieces) for gain in rounds] == completion.tokens_per_round
    assert sum(gain.drafted for gain in rounds) == completion.stats.drafted
    assert sum(gain.accepted for gain in rounds) == completion.stats.accepted
    assert all(gain.accepted <= len(gain.pieces) for gain in rounds)
    assert not end.timed_out


def test_plain_decoding_gives_the_same_text(scheduler):
    sampling = SamplingParams(temperature=0.8, seed=3, max_new_tokens=24)
    drafted, plain = asked(scheduler, sampling), asked(scheduler, sampling, plain=True)
    submit(scheduler, drafted, plain)
    assert drafted.completion.token_ids == plain.completion.token_ids
    assert plain.completion.stats.drafted == 0


def test_a_cancelled_request_frees_its_row_within_a_round(scheduler):
    heard = asked(scheduler, LONG)
    submit(scheduler, heard)
    wait_until(lambda: bool(heard.events))
    scheduler.cancel(heard.request)
    seen = len(heard.events)
    wait_until(lambda: scheduler.running == 0)
    # One round may have been under way.
    assert len(heard.events) <= seen + 2
    assert not heard.ended.is_set()
    again = asked(scheduler, SamplingParams(max_new_tokens=3))
    submit(scheduler, again)
    assert len(again.completion.token_ids) == 3


def test_a_request_that_waits_can_be_cancelled_too(scheduler):
    first = [asked(scheduler, LONG) for _ in range(ROWS)]
    waits = asked(scheduler, LONG)
    submit(scheduler, *first, waits)
    scheduler.cancel(waits.request)
    for heard in first:
        scheduler.cancel(heard.request)
    wait_until(lambda: scheduler.running == scheduler.waiting == 0)
    assert not waits.events


def test_the_queue_is_bounded_and_takes_all_or_nothing(scheduler):
    running = [asked(scheduler, LONG) for _ in range(ROWS + DEPTH - 1)]
    submit(scheduler, *running)
    with pytest.raises(QueueFull, match="all rows and the 3 places of the queue are taken"):
        submit(scheduler, asked(scheduler, LONG), asked(scheduler, LONG))
    last = asked(scheduler, LONG)
    submit(scheduler, last)
    for heard in [*running, last]:
        scheduler.cancel(heard.request)
    wait_until(lambda: scheduler.running == scheduler.waiting == 0)


def test_a_text_ends_when_its_time_is_over(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler, "_seconds", 0.0)
    heard = asked(scheduler, LONG)
    submit(scheduler, heard)
    completion = heard.completion
    assert completion.finish_reason == "length"
    assert 1 <= len(completion.token_ids) < 200
    assert heard.events[-1].timed_out
    wait_until(lambda: scheduler.running == 0)


@pytest.fixture
def another():
    """A scheduler of its own that can be ended; its one kind compiles from the cache on disk."""
    engine = open_model(platform="cpu", max_length=60)
    yield Scheduler(engine, rows=1, depth=2, seconds=60)


def test_every_tier_is_compiled_before_the_first_request(monkeypatch):
    monkeypatch.setattr("easyspec_jax.engine.serving.KINDS", KINDS[:1])
    engine = open_model(platform="cpu", max_length=60, speculative=SpeculativeConfig(adapt=True))
    scheduler = Scheduler(engine, rows=1, depth=2, seconds=60)
    scheduler.start()
    wait_until(lambda: scheduler.state != "loading", 300)
    programs: Any = engine.programs(KINDS[0])
    drafted = [step for levels, step in programs.compiled.tiers.items() if levels]
    assert scheduler.state == "ready" and drafted
    for step in (*drafted, programs.compiled.catch_up, programs._undrafted.compiled.round):
        assert step._cache_size() == 1
    # Nothing that was compiled meanwhile counts as the time in which the draft reads a prompt.
    assert programs.tier_choice(1).times.reading_cost() is None
    scheduler.close(0)


def test_before_it_is_ready_and_after_its_end_nothing_is_accepted(another, monkeypatch):
    monkeypatch.setattr("easyspec_jax.engine.serving.KINDS", KINDS[:1])
    states = []
    with pytest.raises(NotServing, match="the engine is loading"):
        another.submit([])
    another.start(on_state=lambda: states.append(another.state))
    wait_until(lambda: another.state != "loading", 120)
    running, waiting = asked(another, LONG), asked(another, LONG)
    submit(another, running, waiting)
    another.close(60)
    with pytest.raises(NotServing, match="the engine is stopping"):
        submit(another, asked(another, LONG))
    # Both were accepted, so both are finished.
    assert another.join(60)
    assert len(running.completion.token_ids) == len(waiting.completion.token_ids) > 10
    assert states == ["ready", "stopping"]


def test_at_the_end_of_the_grace_texts_end_where_they_are(another, monkeypatch):
    monkeypatch.setattr("easyspec_jax.engine.serving.KINDS", KINDS[:1])
    another.start()
    wait_until(lambda: another.state != "loading", 120)
    running, waiting = asked(another, LONG), asked(another, LONG)
    submit(another, running, waiting)
    another.close(0)
    assert another.join(60)
    ends = {type(heard.events[-1]) for heard in (running, waiting)}
    assert ends <= {Ended, Failed}
    assert waiting.events == [Failed("the engine is stopping", again=True)]


def test_a_failure_reaches_everyone_who_waits(another, monkeypatch):
    monkeypatch.setattr("easyspec_jax.engine.serving.KINDS", KINDS[:1])
    another.start()
    wait_until(lambda: another.state != "loading", 120)

    def fail(self):
        raise RuntimeError("the device is on fire\nand a long trace")

    monkeypatch.setattr(Batch, "step", fail)
    heard = [asked(another, LONG) for _ in range(2)]
    submit(another, *heard)
    assert another.join(60)
    assert another.state == "failed"
    assert str(another.failure).startswith("the device is on fire")
    for one in heard:
        assert one.events == [Failed("the engine failed: the device is on fire")]
    with pytest.raises(NotServing, match="failed"):
        another.submit([])
