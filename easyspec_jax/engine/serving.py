"""Texts for requests that come while others are decoded.

Requests are submitted from any thread. One thread owns the devices: it fills free rows of a batch
in the order of submission, runs rounds, and hands every report on to the request that it is about.

    other threads   submit(a)   submit(b)            cancel(a)
    engine thread   | a enters | round | b enters | round | a leaves | round | ...
    listeners                  a: Progress        a, b: Progress    b: Progress, Ended

A compiled program decodes greedily, samples, or samples from the likeliest tokens only (see
RoundConfig). As in jobs, a request that needs another program waits until the rows are free, and
those behind it wait too. So none waits longer than the texts before it take.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Literal

import jax

from easyspec_jax.arithmetic import power_of_two
from easyspec_jax.decode.loop import Batch
from easyspec_jax.decode.prefixes import PrefixStore
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.decode.warming import run_rounds
from easyspec_jax.engine.completion import Completion, Gain, Generation, TokenLogprobs
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.running import RunningBatch
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.sampling.adjustments import PLAIN, Kinds

KINDS = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_p=0.5),
)
"""An example of each kind of sampling that has programs of its own."""

OPTIONS = Kinds(min_p=True, bias=True, stops=True, penalties=True, bad_words=64, bad_word_length=8)
"""All options: programs for requests with any of them know every one, so that they are shared.

They are compiled when the first such request comes. Others keep programs that know none.
"""


def kinds_for(sampling: SamplingParams, most: int) -> Kinds:
    """Return what the programs of a request know besides its own options.

    Args:
        sampling: How the request is sampled.
        most: Tokens that any answer may have.

    Raises:
        EasySpecError: It has more bad words, or longer ones, than they have room for.
    """
    own = replace(Kinds.of(sampling), grammar=0, logprobs=False)
    if own | OPTIONS != OPTIONS:
        raise EasySpecError(
            f"`bad_words` may be {OPTIONS.bad_words} sequences of up to "
            f"{OPTIONS.bad_word_length + 1} tokens"
        )
    logprobs = sampling.logprobs is not None
    # A grammar's masks are made on the host, so requests without one keep programs without them.
    grammar = power_of_two(most) if sampling.grammar is not None else 0
    if own == PLAIN and not logprobs and not grammar:
        return PLAIN
    return replace(OPTIONS, grammar=grammar, logprobs=logprobs)


@dataclass(frozen=True)
class Progress:
    """A report about a text.

    Attributes:
        gain: What it added.
        seconds: When it was read, by time.perf_counter().
        logprobs: Those of the new tokens, if the sampling asks for them.
    """

    gain: Gain
    seconds: float
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True)
class Ended:
    """The end of a text.

    Attributes:
        completion: The text.
        rest: The end of it that was in no Progress, as it could have become a stop string.
        timed_out: Whether it had to end because its time was over.
    """

    completion: Completion
    rest: str
    timed_out: bool = False


@dataclass(frozen=True)
class Failed:
    """The end of a request that becomes no text.

    Attributes:
        reason: One line.
        again: Whether it may be sent again, later or to another server.
    """

    reason: str
    again: bool = False


Event = Progress | Ended | Failed


class Refused(Exception):
    """A request that was not accepted; the message says why."""


class QueueFull(Refused):
    """A request that may be repeated once others are finished."""


class NotServing(Refused):
    """A request before compilation, or after the end has begun."""


@dataclass(eq=False)
class Request:
    """A text that is asked for.

    Attributes:
        engine: The models that decode it.
        text: What Engine.row() returned.
        listener: Called on the engine's thread with every Event, the last one Ended or Failed. A
            cancelled request has none after its cancellation was noticed.
        cancelled: Whether it was given up.
        entered: When it got a row, by time.perf_counter(); 0 before.
        config: The round that its programs are specialised to. It is made at once, because a
            grammar may take long, and the engine's thread must not wait for it.
    """

    engine: Engine
    text: Generation
    listener: Callable[[Event], None]
    cancelled: bool = field(default=False, init=False)
    entered: float = field(default=0.0, init=False)
    config: RoundConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.engine.config(self.text.sampling, self.text.kinds)


class Scheduler:
    """The engine's thread and the requests that it serves.

    Caches have the size that the longest text needs from the beginning: they never grow, and
    everything is compiled before the first request, except for OPTIONS.

    Attributes:
        state: "loading" until everything is compiled, then "ready"; "stopping" once close() was
            called; "failed" if the engine's thread raised an exception, which `failure` then is.
        engine: The pair.
        compare: Whether plain decoding of the target is served, too.
        plain: Its target without a draft, once it is loaded and if it is served.
        rows: Texts decoded together.
        depth: Requests that may wait for a row.
        loading_seconds: How long loading took; 0 before.
        compiling_seconds: How long compiling took; 0 before.
    """

    def __init__(
        self, engine: Engine, *, rows: int, depth: int, seconds: float, compare: bool = False
    ) -> None:
        """Prepare a thread; start() starts it.

        Args:
            engine: The pair.
            rows: Texts decoded together.
            depth: Requests that may wait for a row.
            seconds: The most time that a text may take from its prefill on.
            compare: Whether to serve plain decoding of the same target, too.
        """
        self.state: Literal["loading", "ready", "stopping", "failed"] = "loading"
        self.failure: Exception | None = None
        self.engine, self.compare = engine, compare
        self.plain: Engine | None = None
        self.rows, self.depth = rows, depth
        self.loading_seconds = self.compiling_seconds = 0.0
        self._seconds = seconds
        self._tiered: set[RoundConfig] = set()  # whose tiers are compiled
        self._changed = threading.Condition()  # guards everything below, and state
        self._waiting: deque[Request] = deque()
        self._running: set[Request] = set()
        self._end = float("inf")  # when texts that still run must end, by time.perf_counter()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    def start(self, bar: Bar = no_bar, on_state: Callable[[], None] = lambda: None) -> None:
        """Start the thread: it loads, compiles, and then serves.

        Args:
            bar: Shows the progress of loading and compiling.
            on_state: Called on the thread when it is ready, and when it has ended.
        """
        self._thread = threading.Thread(
            target=self._run, args=(bar, on_state), name="engine", daemon=True
        )
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept requests, all or none; from any thread.

        Raises:
            QueueFull: There are not as many places, free rows and the queue's.
            NotServing: The engine is not ready, or no longer.
        """
        with self._changed:
            if self.state != "ready":
                raise NotServing(f"the engine is {self.state}")
            taken = len(self._waiting) + len(self._running)
            if taken + len(requests) > self.rows + self.depth:
                raise QueueFull(f"all rows and the {self.depth} places of the queue are taken")
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Give up a request, from any thread. Its row is free before the next round."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)

    def close(self, grace: float) -> None:
        """Accept no more requests; from any thread.

        Args:
            grace: Seconds that accepted ones may take. Texts then end where they are.
        """
        with self._changed:
            if self.state in ("loading", "ready"):
                self.state = "stopping"
            self._end = min(self._end, time.perf_counter() + grace)
            self._changed.notify()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the thread to end, after close(). Return whether it has."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, bar: Bar, on_state: Callable[[], None]) -> None:
        try:
            self._prepare(bar)
            with self._changed:
                if self.state == "loading":
                    self.state = "ready"
            on_state()
            # A batch for each stretch of requests that the same programs decode.
            while (request := self._next()) is not None:
                engine, text = request.engine, request.text
                self._serve(engine.programs(text.sampling, text.kinds), engine.prefixes)
        except Exception as error:  # of any kind: requests must still be answered
            self.failure = error
        finally:
            self._fail_all()
            on_state()

    def _prepare(self, bar: Bar) -> None:
        """Load the weights, and compile every program by running it once."""
        begun = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(self.engine.load(bar)))
        self.plain = self.engine.baseline() if self.compare else None
        loaded = time.perf_counter()
        self.loading_seconds = loaded - begun
        engines = [self.engine] if self.plain is None else [self.engine, self.plain]
        kinds: dict[RoundConfig, tuple[Programs, PrefixStore | None]] = {}
        for engine in engines:
            for sampling in KINDS:
                kinds[engine.config(sampling)] = engine.programs(sampling), engine.prefixes
        with bar("Compiling", len(kinds)) as advance:
            for programs, prefixes in kinds.values():
                self._compile(programs)
                if prefixes is not None:
                    self._compile_restores(programs, prefixes.most)
                advance(1)
        self.compiling_seconds = time.perf_counter() - loaded

    def _compile(self, programs: Programs) -> None:
        with closing(Batch.empty(programs, self.rows, _capacity(programs))) as batch:
            for tokens in _prompts_of_every_chunk(programs):
                # A limit of 0: the row is finished from the start, and decodes nothing.
                batch.enter(0, [0] * tokens, 0, SamplingParams())
                batch.read_prompts()
                for _ in batch.step():
                    pass
                batch.leave(0)
        self._compile_tiers(programs)

    def _compile_tiers(self, programs: Programs) -> None:
        """Compile the rounds between which those that adapt choose, if that is not done yet."""
        config = programs.config
        if config.tiers and config not in self._tiered:
            state = programs.start(SamplingParams(), [0] * self.rows, _capacity(programs))
            jax.block_until_ready(run_rounds(programs, state).length)
            self._tiered.add(config)

    def _compile_restores(self, programs: Programs, most: int) -> None:
        """Compile what copies prefixes out of rows and into them, for prefixes of all sizes."""
        capacity = _capacity(programs)
        sizes = {
            min(programs.sizes.prefix_size(tokens, capacity), most) for tokens in range(1, capacity)
        }
        state = programs.start(SamplingParams(), [0] * self.rows, capacity)
        for size in sorted(sizes - {0}):
            kept = programs.copy_row(state, 0, size)
            state = programs.restore(state, 0, kept, 1)
        jax.block_until_ready(state.length)

    def _next(self) -> Request | None:
        """Wait for a request and return it, still in the queue; None at the end."""
        with self._changed:
            while not self._waiting and self.state == "ready":
                self._changed.wait()
            return self._waiting[0] if self._waiting else None

    def _serve(self, programs: Programs, prefixes: PrefixStore | None) -> None:
        """Decode requests until the next one needs other programs, or there will be none."""
        # Now rather than in the middle of an answer, if they are those of OPTIONS.
        self._compile_tiers(programs)
        free = Batch.empty(programs, self.rows, _capacity(programs), prefixes)
        with closing(free) as batch:
            running = RunningBatch[Request](batch, self.rows)
            while True:
                self._leave_cancelled(running)
                for request in self._take(programs.config, running.free):
                    running.enter(request, request.text)
                if running:
                    self._step(running)
                elif (request := self._next()) is None or request.config != programs.config:
                    return

    def _take(self, config: RoundConfig, most: int) -> Iterator[Request]:
        """Take requests off the queue, up to the first that needs other programs."""
        for _ in range(most):
            with self._changed:
                if not self._waiting or self._waiting[0].config != config:
                    return
                request = self._waiting.popleft()
                self._running.add(request)
            if time.perf_counter() > self._end:
                self._finish(request, Failed("the engine is stopping", again=True))
                continue
            request.entered = time.perf_counter()
            yield request

    def _leave_cancelled(self, running: RunningBatch[Request]) -> None:
        for request in [request for request in self._running if request.cancelled]:
            running.leave(request)
            with self._changed:
                self._running.discard(request)

    def _step(self, running: RunningBatch[Request]) -> None:
        """Run a round, and tell listeners what it and the prefills before it brought."""
        for request, text in running.step():
            now = time.perf_counter()
            request.listener(Progress(text.latest, now, text.latest_logprobs))
            overdue = now > min(request.entered + self._seconds, self._end)
            if overdue and not text.finished:
                running.leave(request)
            if overdue or text.finished:
                completion = request.engine.completion(text)
                self._finish(request, Ended(completion, text.text.rest(), not text.finished))

    def _finish(self, request: Request, event: Event) -> None:
        with self._changed:
            self._running.discard(request)
        request.listener(event)

    def _fail_all(self) -> None:
        """Tell every request that is left that it will have no text."""
        with self._changed:
            self.state = "failed" if self.failure else "stopping"
            left = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        event = Failed("the engine is stopping", again=True)
        if self.failure is not None:
            event = Failed(f"the engine failed: {first_line(self.failure)}")
        for request in left:
            request.listener(event)


def _capacity(programs: Programs) -> int:
    """Return the size of caches that the longest text needs."""
    assert programs.max_length is not None
    return programs.sizes.capacity(programs.max_length)


def _prompts_of_every_chunk(programs: Programs) -> list[int]:
    """Return lengths of prompts whose chunks together have all sizes that any prompt's have."""
    assert programs.max_length is not None
    capacity = _capacity(programs)
    lengths, seen = [], set[int]()
    for tokens in range(1, programs.max_length):
        sizes = programs.sizes.chunks(tokens, capacity)
        if not seen.issuperset(sizes):
            seen.update(sizes)
            lengths.append(tokens)
    return lengths
