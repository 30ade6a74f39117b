"""Batch jobs: a file of prompts becomes a file of completions, whatever kills the process on the way."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import write_whole
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar, no_bar

if TYPE_CHECKING:
    from easyspec_jax.completion import Row
    from easyspec_jax.engine import Engine

SAMPLING = {
    "temperature": (int, float), "top_k": (int,), "top_p": (int, float), "seed": (int,), "max_new_tokens": (int,),
    "stop": (str, list),
}  # fmt: skip
"""What a line may say about its own sampling, and of which types."""

SYNC_SECONDS = 1.0
"""How much a machine that loses power may cost: what it loses is made again."""


@dataclass(frozen=True)
class Item:
    """A line of the input: the prompt it asks for, or what is wrong with it."""

    line: int
    id: str | int | None = None
    prompt: Any = None
    sampling: SamplingParams | None = None
    error: str | None = None


def read_items(content: bytes, default: SamplingParams) -> list[Item]:
    """Every line that is not blank, numbered from 1; line n draws its noise from the default seed + n - 1."""
    items: list[Item] = []
    seen: dict[Any, int] = {}
    for line, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            item = _item(line, text, replace(default, seed=(default.seed + line - 1) % 2**32))
            if item.id in seen:
                raise EasySpecError(f"id {item.id!r} is that of line {seen[item.id]} too")
            seen[item.id] = line
        except EasySpecError as error:
            item = Item(line, error=" ".join(str(error).split()))
        items.append(item)
    return items


def _item(line: int, text: bytes, default: SamplingParams) -> Item:
    try:
        fields = json.loads(text.decode("utf-8-sig" if line == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise EasySpecError(f"no JSON: {str(error)[:80]}") from None
    if not isinstance(fields, dict):
        raise EasySpecError("no JSON object")
    unknown = fields.keys() - {"id", "prompt", "messages", *SAMPLING}
    if unknown:
        raise EasySpecError(f"field {min(unknown)!r} is unknown")
    if not isinstance(fields.get("id"), (str, int)) or isinstance(fields["id"], bool):
        raise EasySpecError("id must be a string or a whole number")
    if ("prompt" in fields) == ("messages" in fields):
        raise EasySpecError("give either prompt or messages")
    prompt = fields.get("prompt", fields.get("messages"))
    if not _is_prompt(prompt, "prompt" in fields):
        raise EasySpecError("prompt must be a string, messages a list of objects with role and content, both strings")
    return Item(line, fields["id"], prompt, _sampling(fields, default))


def _is_prompt(prompt: Any, is_text: bool) -> bool:
    if is_text:
        return isinstance(prompt, str)
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("role", "content"))
            for turn in prompt
        )
    )


def _sampling(fields: Mapping[str, Any], default: SamplingParams) -> SamplingParams:
    own = {name: fields[name] for name in SAMPLING if name in fields}
    for name, value in own.items():
        if isinstance(value, bool) or not isinstance(value, SAMPLING[name]):
            raise EasySpecError(f"{name} {str(value)[:40]!r} is of the wrong type")
    if "stop" in own:
        stop = [own["stop"]] if isinstance(own["stop"], str) else own["stop"]
        if not all(isinstance(text, str) for text in stop):
            raise EasySpecError("stop must be a string or a list of strings")
        own["stop"] = tuple(stop)
    try:
        for name in own.keys() & {"temperature", "top_p"}:
            own[name] = float(own[name])
    except OverflowError:
        raise EasySpecError("temperature and top_p must be numbers of ordinary size") from None
    return replace(default, **own)


class Results:
    """The output: a record a line, appended whole."""

    def __init__(self, handle: int, done: set[int], errors: int) -> None:
        self._handle, self.done, self.errors, self._synced = handle, done, errors, time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record, which survives the process; once a second also the machine."""
        line = memoryview(json.dumps(record).encode() + b"\n")
        while line:
            line = line[os.write(self._handle, line) :]
        self.done.add(record["line"])
        self.errors += "error" in record
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._handle)
            self._synced = time.monotonic()


@contextmanager
def open_results(out: Path, job: Mapping[str, Any]) -> Iterator[Results]:
    """The output of a job, locked, without a torn end. job: what its texts depend on; kept beside it as `OUT.job`.

    Raises EasySpecError if another process is at it, or if it is the output of anything else.
    """
    described = out.with_name(out.name + ".job")
    handle = os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EasySpecError(f"another run is writing {out}; wait for it or choose another --out") from None
        text = json.dumps(job, sort_keys=True, indent=1).encode() + b"\n"
        content = out.read_bytes()
        if (described.exists() and described.read_bytes() != text) or (content and not described.exists()):
            raise EasySpecError(f"{out} belongs to other prompts or settings (see {described}); choose another --out")
        write_whole(described, text)
        done, errors, end = _whole_records(content)
        os.ftruncate(handle, end)
        yield Results(handle, done, errors)
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole_records(content: bytes) -> tuple[set[int], int, int]:
    """The input lines that have a record, how many of those are errors, and where the last whole record ends."""
    done: set[int] = set()
    errors = end = 0
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n") or record["line"] in done:
                break
        except (ValueError, TypeError, KeyError):
            break
        done.add(record["line"])
        errors, end = errors + ("error" in record), end + len(line)
    return done, errors, end


def run_job(
    engine: "Engine",
    prompts: Path,
    out: Path,
    sampling: SamplingParams,
    *,
    chat: bool = False,
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    bar: Bar = no_bar,
    note: Callable[[str], None] = lambda message: None,
) -> tuple[int, int]:
    """Completes every line of a file that `out` lacks; returns how many records it then has, and how many are errors.

    settings: what else the texts depend on. note is told of every line that is none. Raises EasySpecError for files
    that cannot be used.
    """
    try:
        content = prompts.read_bytes()
    except OSError as error:
        raise EasySpecError(f"--prompts {prompts} cannot be read: {error.strerror}") from None
    items = read_items(content, sampling)
    if not items:
        raise EasySpecError(f"--prompts {prompts} holds no prompt")
    for item in items:
        if item.error is not None:
            note(f"line {item.line}: {item.error}")
    job = {"prompts": hashlib.sha256(content).hexdigest(), "settings": dict(settings or {}), "chat": chat}
    try:
        with open_results(out, job) as results, bar("Generating", len(items)) as advance:
            advance(len(results.done))
            left = [item for item in items if item.line not in results.done]
            # Stable, so that all that are decoded by the same programs follow one another.
            left.sort(key=lambda item: repr(item.sampling and engine.config(item.sampling)))
            taken: list[Item] = []

            def rows() -> Iterator["Row"]:
                for item in left:
                    try:
                        if item.sampling is None:
                            raise EasySpecError(item.error)
                        row = engine.row(item.prompt, item.sampling, chat=chat)
                    except EasySpecError as error:
                        message = " ".join(str(error).split())
                        results.append({"id": item.id, "line": item.line, "error": f"line {item.line}: {message}"})
                        advance(1)
                        continue
                    taken.append(item)
                    yield row

            for number, completion in engine.complete_each(rows(), batch_size):
                record = {"id": taken[number].id, "line": taken[number].line} | completion.as_dict()
                del record["prompt"], record["prompt_ids"]
                results.append(record)
                advance(1)
            return len(results.done), results.errors
    except OSError as error:
        raise EasySpecError(f"--out {out} cannot be written: {error.strerror}") from None
