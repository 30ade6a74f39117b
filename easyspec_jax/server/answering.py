"""From a request that was read to the events of its answers, on the event loop."""

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from easyspec_jax.engine.completion import Completion, EncodedPrompt
from easyspec_jax.engine.serving import (
    Ended,
    Event,
    Failed,
    NotServing,
    QueueFull,
    Request,
    Scheduler,
    kinds_for,
)
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.options import SamplingParams
from easyspec_jax.server.logprobs import Contents
from easyspec_jax.server.metrics import Metrics
from easyspec_jax.server.protocol import (
    Asked,
    PromptOrIds,
    RequestError,
    bad_request,
    seeded,
)
from easyspec_jax.tokenizer import bad_words_ids, encode
from easyspec_jax.tokenizer.contents import token_contents
from easyspec_jax.tokenizer.conversation import Conversation
from easyspec_jax.tokenizer.tool_calls import takes_tools, writes_tool_calls

RETRY_SECONDS = 1
"""Seconds after which a client may try again if the queue was full."""

Receive = Callable[[], Awaitable[Any]]


class Gone(Exception):
    """The client has closed its connection."""


@dataclass
class Running:
    """A request whose answers are being generated.

    Attributes:
        requests: What was submitted, one for each answer.
        begun: When the HTTP request came, by time.perf_counter().
        completions: Answers that are complete.
        first_token: Seconds to the first token of any answer; 0 before.
        timed_out: Answers that had to end because their time was over.
    """

    requests: list[Request]
    begun: float
    inbox: asyncio.Queue[tuple[int, Event] | None]
    metrics: Metrics
    completions: list[Completion | None] = field(init=False)
    first_token: float = field(default=0.0, init=False)
    timed_out: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.completions = [None] * len(self.requests)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the number of an answer and what happened to it, until all have ended.

        Raises:
            Gone: The client has left.
            RequestError: An answer will have no text.
        """
        latest: dict[int, float] = {}
        left = len(self.requests)
        while left:
            item = await self.inbox.get()
            if item is None:
                raise Gone
            index, event = item
            if isinstance(event, Failed):
                raise _failed(event)
            if isinstance(event, Ended):
                left -= 1
                self._end(index, event)
            elif index in latest:
                self.metrics.round(event, event.seconds - latest[index])
                latest[index] = event.seconds
            else:
                latest[index] = event.seconds
                self.metrics.first(event.seconds - self.begun)
                self.first_token = self.first_token or event.seconds - self.begun
            yield index, event

    def _end(self, index: int, event: Ended) -> None:
        completion = event.completion
        if completion.error is not None:
            raise _faulty(self.requests[index].text.sampling)
        self.completions[index] = completion
        self.timed_out += event.timed_out
        self.metrics.ended(completion, time.perf_counter() - self.begun)

    @property
    def finished(self) -> list[Completion]:
        """The answers that are complete."""
        return [one for one in self.completions if one is not None]

    async def watch(self, receive: Receive) -> None:
        """Wait until the client leaves, and let events() know."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.inbox.put_nowait(None)


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        body: Bytes of a request's body.
        tokens: Tokens of an answer.
        seconds: Seconds to wait for a request's body.
    """

    body: int
    tokens: int
    seconds: float = 30.0


class Answering:
    """Turns requests into texts of the scheduler.

    Attributes:
        finds_calls: Whether the model writes calls of tools in a form that can be found.
        contents: What each of the tokenizer's ids stands for, once a request has asked for
            log-probabilities; empty before.
    """

    def __init__(self, scheduler: Scheduler, limits: Limits, metrics: Metrics) -> None:
        """Take over a scheduler.

        Args:
            scheduler: Decodes texts.
            limits: Limits of one request.
            metrics: Count what happens.
        """
        self._scheduler, self._limits, self._metrics = scheduler, limits, metrics
        self._engine = scheduler.engine
        # A tokenizer must not encode in two threads at once, or while it decodes in another: so
        # there is a copy for encoding, and one thread that uses it. Templates may take seconds.
        self._tokenizer = copy.deepcopy(scheduler.engine.tokenizer)
        self.finds_calls = writes_tool_calls(self._tokenizer)
        self.contents: Contents = {}
        self._takes_tools = takes_tools(self._tokenizer)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._encoded_now = 0  # answers whose prompts are being encoded, or wait for that

    async def submit(self, asked: Asked, begun: float) -> Running:
        """Encode a request's prompts and put its answers into the queue.

        Args:
            asked: The request.
            begun: When it came, by time.perf_counter().

        Raises:
            RequestError: A prompt is bad or too long, the queue is full, or the engine is not
                ready.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        if asked.plain and not self._scheduler.compare:
            raise RequestError(
                400, "plain decoding is not served; start with --compare", param="easyspec"
            )
        if asked.tools and not self._takes_tools:
            raise RequestError(
                400,
                "tools are not supported: the model's chat template does not show them to it",
                param="tools",
            )
        if asked.sampling.tool_calls is not None and not self.finds_calls:
            raise RequestError(
                400,
                "tool_choice and strict functions are not supported: the model's chat template "
                "writes calls in a form that is not known here",
                param="tool_choice",
            )
        count, places = asked.n * len(asked.prompts), self._scheduler.rows + self._scheduler.depth
        if count > places:
            raise RequestError(400, f"{count} answers are more than the {places} places", param="n")
        self._check_ready()
        taken = self._scheduler.running + self._scheduler.waiting + self._encoded_now
        if taken + count > places:
            raise _later(429, "all places are taken", "rate_limit_exceeded")
        self._encoded_now += count
        try:
            make = loop.run_in_executor(self._encoding, self._requests, asked, loop, inbox)
            running = Running(await make, begun, inbox, self._metrics)
        finally:
            self._encoded_now -= count
        try:
            self._scheduler.submit(running.requests)
        except QueueFull as error:
            raise _later(429, str(error), "rate_limit_exceeded") from None
        except NotServing as error:
            raise _later(503, str(error), "unavailable") from None
        return running

    def cancel(self, running: Running) -> None:
        """Free the rows of a request whose client has left."""
        for request in running.requests:
            self._scheduler.cancel(request)

    def close(self) -> None:
        """End the thread that encodes."""
        self._encoding.shutdown(wait=False, cancel_futures=True)

    def _check_ready(self) -> None:
        if self._scheduler.state != "ready":
            raise _later(503, f"the engine is {self._scheduler.state}", "unavailable")

    def _requests(
        self,
        asked: Asked,
        loop: asyncio.AbstractEventLoop,
        inbox: asyncio.Queue[tuple[int, Event] | None],
    ) -> list[Request]:
        """Encode the prompts, on the thread for it."""
        if asked.sampling.logprobs is not None and not self.contents:
            self.contents = token_contents(self._tokenizer)
        engine = (self._scheduler.plain if asked.plain else None) or self._engine
        try:
            asked = replace(asked, sampling=self._with_ids(asked.sampling))
            kinds = kinds_for(asked.sampling, self._limits.tokens)
        except EasySpecError as error:
            raise bad_request(error, asked.names) from None
        requests = []
        for prompt in asked.prompts:
            encoded = self._encoded(prompt, asked)
            for _ in range(asked.n):
                number = len(requests)
                sampling = seeded(asked, number)
                limited = sampling.limited(self._limits.tokens)
                row = engine.row(encoded, limited, kinds=kinds)
                requests.append(Request(engine, row, _poster(loop, inbox, number)))
        return requests

    def _with_ids(self, sampling: SamplingParams) -> SamplingParams:
        """Return a way of sampling with its bad words as ids of the encoding thread's tokenizer.

        Raises:
            EasySpecError: A word has no tokens, an id is none of the target's, or a grammar cannot
                be used.
        """
        ids = (*sampling.bad_words_ids, *bad_words_ids(self._tokenizer, sampling.bad_words))
        sampling = replace(sampling, bad_words=(), bad_words_ids=ids)
        sampling.check_ids(self._engine.target.config.vocab_size)
        self._engine.grammars.check(sampling)
        return sampling

    def _encoded(self, prompt: PromptOrIds, asked: Asked) -> EncodedPrompt:
        """Return a prompt's ids.

        Raises:
            RequestError: They are not the target's, or leave no room for the answer.
        """
        given = asked.sampling.max_new_tokens if asked.limited else 1
        if asked.limited and given > self._limits.tokens:
            raise RequestError(
                400,
                f"an answer may have {self._limits.tokens} tokens at most",
                param="max_tokens",
            )
        encoded = (
            EncodedPrompt("", prompt) if isinstance(prompt, list) else self._encode(prompt, asked)
        )
        ids, room = encoded.ids, self._engine.max_length
        if max(ids) >= self._engine.target.config.vocab_size:
            raise RequestError(400, "prompt has an id that the model does not know", param="prompt")
        if len(ids) + given > room:
            raise RequestError(
                400,
                f"the prompt has {len(ids)} tokens and the answer may have {str(given)[:20]}: "
                f"together more than the model's {room}",
                param=_prompt_field(asked),
                code="context_length_exceeded",
            )
        return encoded

    def _encode(self, prompt: str | Conversation, asked: Asked) -> EncodedPrompt:
        try:
            return EncodedPrompt(prompt, encode(self._tokenizer, prompt))
        except EasySpecError as error:
            reason = str(error)
        except Exception as error:  # a hostile message can make a template raise anything
            reason = f"the prompt cannot be used ({type(error).__name__}: {first_line(error)[:80]})"
        raise RequestError(400, reason, param=_prompt_field(asked))


def _prompt_field(asked: Asked) -> str:
    return "messages" if asked.chat else "prompt"


def _failed(event: Failed) -> RequestError:
    if event.again:
        return _later(503, event.reason, "unavailable")
    return RequestError(500, event.reason, "server_error")


def _faulty(sampling: SamplingParams) -> RequestError:
    """Say why an answer has failed, without the paths that the command's messages name."""
    if (grammar := sampling.grammar) is None:
        return RequestError(500, "the model's logits are not finite", "server_error")
    return RequestError(
        400,
        f"no token may follow here by {grammar.kind} and the other options, or the model's logits "
        "are not finite",
    )


def _later(status: int, message: str, code: str) -> RequestError:
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return RequestError(status, message, "server_error", code=code, headers=headers)


def _poster(
    loop: asyncio.AbstractEventLoop,
    inbox: asyncio.Queue[tuple[int, Event] | None],
    index: int,
) -> Callable[[Event], None]:
    """Return what puts an answer's events into an inbox, from any thread."""

    def post(event: Event) -> None:
        # A closed event loop runs no callbacks, so the answer would reach no one.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(inbox.put_nowait, (index, event))

    return post
