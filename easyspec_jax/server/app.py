"""The routes: what each address answers, and what is checked before.

An answer of the model is either whole, or a stream of server-sent events. In both cases the
connection is watched: when the client leaves, its rows are free before the next round.
"""

import asyncio
import hmac
import ipaddress
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from easyspec_jax import demo
from easyspec_jax.engine.serving import Ended, Progress, Scheduler
from easyspec_jax.server.answer import Answer, Streamed
from easyspec_jax.server.answering import Answering, Gone, Limits, Running
from easyspec_jax.server.metrics import Metrics
from easyspec_jax.server.protocol import RequestError, read_request

PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
    "/speculation.js": ("speculation.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
"""Files of the page by address, and their types."""

PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    # Scripts and styles are the page's own files, so text of a model can never become either.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Log = Callable[[Mapping[str, Any]], None]


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which no other machine can reach.

    Examples:
        >>> [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "example.com")]
        [True, True, True, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def log_line(record: Mapping[str, Any]) -> None:
    """Print a record as one line of JSON on stderr."""
    stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    # A log that cannot be written, on a full disk or into a closed pipe, must cost no answer.
    with suppress(OSError, ValueError):
        print(json.dumps({"time": stamp} | dict(record)), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        model: The model's name.
        limits: Limits of one request.
        api_key: Key that requests to /v1 must carry, or None.
        local: Whether only names of this machine are accepted in a request's Host header. It keeps
            pages of other sites, whose name can be made to point here, from talking to the server.
    """

    model: str
    limits: Limits
    api_key: str | None = None
    local: bool = True


def build(scheduler: Scheduler, settings: Settings, log: Log = log_line) -> ASGIApp:
    """Return the application.

    Args:
        scheduler: Decodes texts; it may still be loading.
        settings: How the server behaves.
        log: Takes a record of each request to the model.
    """
    return _Server(scheduler, settings, log).application()


class _Server:
    """The routes' functions and what they share."""

    def __init__(self, scheduler: Scheduler, settings: Settings, log: Log) -> None:
        self._scheduler, self._engine = scheduler, scheduler.engine
        self._settings, self._log = settings, log
        speculative = scheduler.engine.speculative
        drafts = speculative.method != "vanilla"
        levels = speculative.num_speculative_tokens if drafts else 0
        self._metrics = Metrics(settings.model, levels, scheduler)
        self._answering = Answering(scheduler, settings.limits, self._metrics)
        self._begun = int(time.time())

    def application(self) -> ASGIApp:
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._exposition),
            *(Route(address, _page(*file)) for address, file in PAGE.items()),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _fault}
        return self._guarded(Starlette(routes=routes, exception_handlers=handlers))

    def _guarded(self, application: ASGIApp) -> ASGIApp:
        """Refuse names of other machines and requests without the key, before anything else."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                error = self._objection(scope)
                if error is not None:
                    await _refusal(error)(scope, receive, send)
                    return
            await application(scope, receive, send)

        return guarded

    def _objection(self, scope: Scope) -> RequestError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._settings.local and not is_loopback(name.strip("[]")):
            return RequestError(403, "this server answers to localhost only; see --host")
        key = self._settings.api_key
        if key is None or not scope["path"].startswith("/v1"):
            return None
        given = headers.get(b"authorization", b"")
        # In constant time, so that how long it takes says nothing about the key.
        if hmac.compare_digest(given, f"Bearer {key}".encode()):
            return None
        return RequestError(
            401, "the API key is missing or wrong", code="invalid_api_key", headers=_ASK_FOR_KEY
        )

    async def _models(self, request: HTTPRequest) -> Response:
        name = request.path_params.get("name")
        speculative = self._engine.speculative
        model = {
            "id": self._settings.model,
            "object": "model",
            "created": self._begun,
            "owned_by": "easyspec_jax",
            "max_model_len": self._engine.max_length,
            "easyspec": {
                "method": speculative.method,
                "num_speculative_tokens": speculative.num_speculative_tokens,
                "tree_width": speculative.width,
                "chat": bool(self._engine.tokenizer.chat_template),
                "plain": self._scheduler.compare,
                "bundled": self._engine.target.directory == demo.TARGET,
            },
        }
        if name is None:
            return _json({"object": "list", "data": [model]})
        return _json(model) if name == self._settings.model else _refusal(_no_model(name))

    async def _health(self, request: HTTPRequest) -> Response:
        state = self._scheduler.state
        return _json({"status": state}, 200 if state == "ready" else 503)

    async def _exposition(self, request: HTTPRequest) -> Response:
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def _completions(self, request: HTTPRequest) -> "Response | _EventStream":
        return await self._answer(request, chat=False)

    async def _chat(self, request: HTTPRequest) -> "Response | _EventStream":
        return await self._answer(request, chat=True)

    async def _answer(self, request: HTTPRequest, chat: bool) -> "Response | _EventStream":
        record = _Record(self._log, request.url.path)
        try:
            asked = read_request(await self._body(request), chat)
            record.fields["stream"] = asked.stream
            if asked.model not in (None, self._settings.model):
                raise _no_model(asked.model)
            running = await self._answering.submit(asked, record.begun)
        except RequestError as error:
            record.refused(error)
            return _refusal(error)
        except ClientDisconnect:
            record.end(499, "the client left")
            return Response(status_code=499)
        answering = self._answering
        answer = Answer.to(asked, self._settings.model, answering.finds_calls, answering.contents)
        record.fields["id"] = answer.id
        if asked.stream:
            return _EventStream(answer, running, self._answering, record)
        return await self._whole(request, answer, running, record)

    async def _whole(
        self, request: HTTPRequest, answer: Answer, running: Running, record: "_Record"
    ) -> Response:
        watcher = asyncio.create_task(running.watch(request.receive))
        try:
            async for _ in running.events():
                pass
        except RequestError as error:
            record.refused(error)
            return _refusal(error)
        except Gone:
            record.left(running)
            return Response(status_code=499)
        finally:
            watcher.cancel()
            self._answering.cancel(running)
        record.answered(running)
        return _json(answer.whole(running.finished))

    async def _body(self, request: HTTPRequest) -> bytes:
        """Read a request's body.

        Raises:
            RequestError: It is not JSON, too large or too slow.
        """
        # A page of another site may send other types without asking this server first.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "send JSON, with the header Content-Type: application/json")
        limits, body = self._settings.limits, bytearray()
        try:
            async with asyncio.timeout(limits.seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.body:
                        raise RequestError(413, f"a body may have {limits.body} bytes at most")
        except TimeoutError:
            raise RequestError(408, "the body did not come in time") from None
        return bytes(body)


class _Record:
    """The log's record of one request."""

    def __init__(self, log: Log, path: str) -> None:
        self._log = log
        self.begun = time.perf_counter()
        self.fields: dict[str, Any] = {"event": "request", "path": path}

    def end(self, status: int, error: str | None = None) -> None:
        self.fields |= {"status": status, "seconds": _rounded(time.perf_counter() - self.begun)}
        self._log(self.fields if error is None else self.fields | {"error": error})

    def refused(self, error: RequestError) -> None:
        self.end(error.status, error.message)

    def answered(self, running: Running) -> None:
        self._describe(running)
        self.end(200)

    def left(self, running: Running) -> None:
        self._describe(running)
        self.end(499, "the client left")

    def _describe(self, running: Running) -> None:
        texts = [request.text for request in running.requests]
        stats = [text.stats for text in texts]
        drafted = sum(one.drafted for one in stats)
        accepted = sum(one.accepted for one in stats)
        entered = [request.entered for request in running.requests if request.entered]
        self.fields |= {
            "choices": len(texts),
            "prompt_tokens": sum(len(text.prompt_ids) for text in texts),
            "cached_tokens": sum(one.cached_tokens for one in stats),
            "completion_tokens": sum(len(text.text.ids) for text in texts),
            "finish": [completion.finish_reason for completion in running.finished],
            "timed_out": running.timed_out,
            "queue_seconds": _rounded(min(entered) - self.begun) if entered else None,
            "first_token_seconds": _rounded(running.first_token),
            "acceptance_rate": round(accepted / drafted, 3) if drafted else None,
        }


class _EventStream:
    """An answer in server-sent events, as it grows."""

    def __init__(
        self, answer: Answer, running: Running, answering: Answering, record: _Record
    ) -> None:
        self._answer, self._running = answer, running
        self._answering, self._record = answering, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._running.watch(receive))
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # keeps nginx from collecting events
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for data in self._events():
                body = f"data: {data}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (Gone, OSError):
            self._record.left(self._running)
        finally:
            watcher.cancel()
            self._answering.cancel(self._running)

    async def _events(self) -> AsyncIterator[str]:
        """Yield the data of each event."""
        answer, running = self._answer, self._running
        streams = [Streamed(answer, index) for index in range(len(running.requests))]
        try:
            for stream in streams:
                for chunk in stream.first():
                    yield json.dumps(chunk)
            async for index, event in running.events():
                chunks = []
                if isinstance(event, Progress):
                    chunks = streams[index].grown(event)
                elif isinstance(event, Ended):
                    chunks = streams[index].last(event.completion, event.rest)
                for chunk in chunks:
                    yield json.dumps(chunk)
            if answer.asked.include_usage:
                yield json.dumps(answer.counted(running.finished))
            yield "[DONE]"
            self._record.answered(running)
        except RequestError as error:
            # The status has been sent: an error can only be an event.
            self._record.refused(error)
            yield json.dumps(error.as_dict())


def _page(name: str, kind: str) -> Callable[[HTTPRequest], Any]:
    content = (files("easyspec_jax.server") / "page" / name).read_bytes()

    async def page(request: HTTPRequest) -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return page


_ASK_FOR_KEY = {"WWW-Authenticate": "Bearer"}


def _no_model(name: str | None) -> RequestError:
    return RequestError(
        404,
        f"the model {str(name)[:80]!r} does not exist; see /v1/models",
        param="model",
        code="model_not_found",
    )


def _json(body: Mapping[str, Any], status: int = 200) -> Response:
    # In ASCII: a request may hold surrogates, which UTF-8 cannot spell, and errors quote requests.
    return Response(json.dumps(body).encode("ascii"), status, media_type="application/json")


def _refusal(error: RequestError) -> Response:
    response = _json(error.as_dict(), error.status)
    response.headers.update(error.headers)
    return response


async def _http_error(request: HTTPRequest, error: HTTPException) -> Response:
    """Answer an unknown address or method in OpenAI's form."""
    refusal = RequestError(
        error.status_code, f"{request.method} {request.url.path}: {error.detail}"
    )
    return _refusal(refusal)


async def _fault(request: HTTPRequest, error: Exception) -> Response:
    """Answer after a bug; what was raised goes to the log only."""
    return _refusal(RequestError(500, "the server has a fault; see its log", "server_error"))


def _rounded(seconds: float) -> float:
    return round(seconds, 4)
