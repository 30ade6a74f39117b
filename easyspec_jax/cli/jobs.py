"""Batch jobs: a file of prompts becomes a file of completions, even if the process is killed.

Every record is one line, appended whole. A record that is written more than a second after the
last fsync is followed by one, and so is the end. On the next run the lines that have a record are
left out, and a half-written last line is cut off.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.cli.job_lines import Item, read_items
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.files import read_input, write_whole
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar, no_bar

if TYPE_CHECKING:
    from easyspec_jax.decode.state import RoundConfig
    from easyspec_jax.engine.completion import Completion, Generation
    from easyspec_jax.engine.engine import Engine

SEED_STEP = 0x9E3779B1
"""Difference of the seeds of a line's texts: 2**32 over the golden ratio, so that no multiple of it
is near another."""

SYNC_SECONDS = 1.0
"""Seconds after which the next record is followed by fsync."""


@dataclass(frozen=True)
class Job:
    """Input of a job.

    Attributes:
        name: The file's name.
        content: Its bytes.
        items: Its lines.
    """

    name: str
    content: bytes
    items: list[Item]


def read_job(prompts: str | Path, sampling: SamplingParams, system: str | None = None) -> Job:
    """Read the input of a job.

    Args:
        prompts: Path of a file of JSON lines, or "-" for standard input.
        sampling: Used by lines that do not give their own.
        system: A system message for every line without one.

    Raises:
        EasySpecError: The input cannot be read or has no lines.
    """
    try:
        content = read_input(prompts)
    except OSError as error:
        raise EasySpecError(f"--prompts {prompts} cannot be read: {error.strerror}") from None
    items = read_items(content, sampling, system)
    if not items:
        raise EasySpecError(f"--prompts {prompts} holds no prompt")
    return Job(str(prompts), content, items)


class Results:
    """The output of a job, one record per line.

    Attributes:
        done: Numbers of the input lines that have a record.
        errors: How many of those are errors.
    """

    def __init__(self, handle: int, done: set[int], errors: int) -> None:
        self.done = done
        self.errors = errors
        self._handle = handle
        self._synced = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record. It survives the process at once, and power failures after an fsync."""
        line = memoryview(json.dumps(record).encode() + b"\n")
        # The system may write part of a line only, for example on a disk that is almost full.
        while line:
            line = line[os.write(self._handle, line) :]
        self.done.add(record["line"])
        self.errors += "error" in record
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._handle)
            self._synced = time.monotonic()


@contextmanager
def open_results(out: Path, described: Mapping[str, Any]) -> Iterator[Results]:
    """Open the output of a job, lock it and cut off a torn end.

    Args:
        out: The file of records.
        described: What its texts depend on; kept next to it as `OUT.job`.

    Raises:
        EasySpecError: Another process is writing it, or it is not the output of this job.
    """
    # O_APPEND: records never overwrite each other, even if another process writes.
    handle = os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        _lock(handle, out)
        _check_same_job(out, described)
        # Before any record, so that an output never lacks its description.
        write_whole(_description(out), _serialised(described))
        content = out.read_bytes()
        done, errors, end = _whole_records(content)
        if not end and b"\n" in content:
            raise EasySpecError(f"{out} does not begin with a job's record; choose another --out")
        os.ftruncate(handle, end)
        yield Results(handle, done, errors)
        os.fsync(handle)
    finally:
        os.close(handle)


def check_results(out: Path, described: Mapping[str, Any]) -> None:
    """Check that open_results() will be able to open an output, without writing anything.

    Raises:
        EasySpecError: It is not the output of this job, or cannot be written.
    """
    if out.is_dir():
        raise EasySpecError(f"--out {out} is a directory; name a file")
    place = out if out.exists() else out.parent
    if not os.access(place, os.W_OK):
        reason = os.strerror(errno.EACCES if place.exists() else errno.ENOENT)
        raise EasySpecError(f"--out {out} cannot be written: {reason}")
    if out.exists():
        with out.open("rb") as file:
            _lock(file.fileno(), out)
            _check_same_job(out, described)


def _lock(handle: int, out: Path) -> None:
    """Lock an open output until it is closed. Raises EasySpecError if it is locked already."""
    try:
        # The system drops this lock when the process ends, even if it is killed.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EasySpecError(
            f"another run is writing {out}; wait for it or choose another --out"
        ) from None


def _check_same_job(out: Path, described: Mapping[str, Any]) -> None:
    path = _description(out)
    if not path.exists():
        if out.stat().st_size:
            raise EasySpecError(
                f"{out} is not empty and has no {path.name} that describes a job; choose another "
                "--out"
            )
    elif path.read_bytes() != _serialised(described):
        raise EasySpecError(
            f"{out} belongs to other prompts or settings (see {path}); choose another --out"
        )


def _description(out: Path) -> Path:
    return out.with_name(out.name + ".job")


def _serialised(described: Mapping[str, Any]) -> bytes:
    return json.dumps(described, sort_keys=True, indent=1).encode() + b"\n"


def describe_job(job: Job, settings: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Describe everything that the texts of a job depend on."""
    return {
        "prompts": hashlib.sha256(job.content).hexdigest(),
        "settings": dict(settings),
        "chat": chat,
    }


def _whole_records(content: bytes) -> tuple[set[int], int, int]:
    """Return the lines that have a record, how many are errors, and the end of the last record.

    Reading stops at the first line that is not a whole record: what follows was torn off when the
    process was killed.
    """
    done: set[int] = set()
    errors = end = 0
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n") or record["line"] in done:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        done.add(record["line"])
        errors, end = errors + ("error" in record), end + len(line)
    return done, errors, end


def run_job(
    engine: "Engine",
    job: Job,
    out: Path,
    *,
    chat: bool = False,
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    bar: Bar = no_bar,
    note: Callable[[str], None] = lambda message: None,
) -> tuple[int, int]:
    """Complete every line of a job that has no record yet.

    A line that cannot be completed gets an error record.

    Args:
        engine: The model.
        job: The lines, see read_job().
        out: The file of records.
        chat: Put prompts that are text as a user's message.
        batch_size: Lines decoded together.
        settings: What else changes the texts, such as the models' names and the defaults of
            sampling, as JSON. A job goes on only with the same.
        bar: Shows the progress.
        note: Called with each line's error, and with the names of fields that are not used.

    Returns:
        The number of records that the output has at the end, and how many are errors.

    Raises:
        EasySpecError: The output cannot be used.
    """
    _note_lines(job.items, note)
    described = describe_job(job, settings or {}, chat)
    free = engine.free_memory()
    try:
        with open_results(out, described) as results, bar("Generating", len(job.items)) as advance:
            advance(len(results.done))
            left = [item for item in job.items if item.line not in results.done]
            # Lines that the same programs decode follow one another, so that a batch is rarely
            # drained to change programs. RoundConfig has no order, but equal ones have equal
            # reprs, and a stable sort keeps the order of lines that are alike.
            configs = _configs(engine, left)
            left.sort(key=lambda item: repr(configs.get(item.line)))
            # complete_each() counts rows as it takes them; taken[n] is the line of row n. A line's
            # record is written once all its texts are there.
            taken: list[Item] = []
            texts: dict[int, dict[int, Completion]] = defaultdict(dict)

            def rows() -> Iterator["Generation"]:
                for item in left:
                    try:
                        config = configs.get(item.line)
                        own = _rows(engine, item, config, chat, batch_size, free)
                    except EasySpecError as error:
                        results.append(_error_record(item, str(error)))
                        advance(1)
                        continue
                    taken.extend([item] * len(own))
                    yield from own

            made = engine.complete_each(
                rows(), batch_size, checked=True, repeats=any(item.texts > 1 for item in left)
            )
            for number, completion in made:
                item = taken[number]
                texts[item.line][number] = completion
                if len(texts[item.line]) == item.texts:
                    # In the order of their seeds, whichever finished first.
                    own = [text for _, text in sorted(texts.pop(item.line).items())]
                    results.append(_record(item, own))
                    advance(1)
            return len(results.done), results.errors
    except OSError as error:
        raise EasySpecError(f"--out {out} cannot be written: {error.strerror}") from None


def _configs(engine: "Engine", items: list[Item]) -> "dict[int, RoundConfig]":
    """Return what each line's programs are specialised to, without lines that have errors.

    Compiling takes longer than what options cost, so lines share programs that know the options of
    all. Truncation, log-probabilities and grammars cost more, and are left to those that ask for
    them.
    """
    configs: dict[int, RoundConfig] = {}
    for item in items:
        if item.sampling is not None:
            # Whatever is wrong, such as an id that the target lacks, is reported by _rows().
            with suppress(Exception):
                configs[item.line] = engine.config(item.sampling)

    def alike(config: "RoundConfig") -> Hashable:
        kinds = config.kinds
        has_grammar = kinds.grammar > 0
        return config.verifier, kinds.logprobs, kinds.prompt_logprobs, has_grammar

    shared: dict[Hashable, Any] = {}
    for config in configs.values():
        shared[alike(config)] = shared.get(alike(config), config.kinds) | config.kinds
    return {line: replace(config, kinds=shared[alike(config)]) for line, config in configs.items()}


def _record(item: Item, texts: "list[Completion]") -> dict[str, Any]:
    """Return the record of a line: its text, or `samples`, a list of several."""
    made = []
    for text in texts:
        fields = text.as_dict()
        del fields["prompt"], fields["prompt_ids"]
        made.append(fields)
    record = {"id": item.id, "line": item.line}
    if len(made) == 1:
        return record | made[0]
    failed = [text.error for text in texts if text.error is not None]
    return record | {"samples": made} | ({"error": failed[0]} if failed else {})


def _rows(
    engine: "Engine",
    item: Item,
    config: "RoundConfig | None",
    chat: bool,
    batch_size: int,
    free: int | None,
) -> "list[Generation]":
    """Return the rows of a line, one for each of its texts, for programs of a config.

    Raises:
        EasySpecError: Anything is wrong with the line. Other exceptions would end the job.
    """
    from easyspec_jax.engine.completion import EncodedPrompt

    if item.sampling is None:
        raise EasySpecError(item.error)
    try:
        config = config or engine.config(item.sampling)  # raises what is wrong with the line
        kinds = config.kinds
        row = engine.row(item.prompt, item.sampling, chat=chat, kinds=kinds)
        rows, encoded = [row], EncodedPrompt(row.prompt, row.prompt_ids)
        for number in range(1, item.texts):
            # Far from the seeds of the next lines, which may hold the same prompt.
            seed = wrap_seed(item.sampling.seed + number * SEED_STEP)
            rows.append(engine.row(encoded, replace(item.sampling, seed=seed), kinds=kinds))
        engine.check_memory(
            len(row.prompt_ids) + row.limit,
            len(row.prompt_ids),
            batch_size,
            item.sampling,
            free,
            kinds,
        )
    except EasySpecError:
        raise
    except Exception as error:  # a hostile line can make a template raise anything
        raise EasySpecError(
            f"cannot be used ({type(error).__name__}: {first_line(error)[:80]})"
        ) from None
    return rows


def _error_record(item: Item, message: str) -> dict[str, Any]:
    return {
        "id": item.id,
        "line": item.line,
        "error": f"line {item.line}: {' '.join(message.split())}",
    }


def _note_lines(items: list[Item], note: Callable[[str], None]) -> None:
    for item in items:
        if item.error is not None:
            note(f"line {item.line}: {item.error}")
    unused = Counter(name for item in items for name in item.unused)
    if unused:
        named = ", ".join(f"{name[:40]!r}" for name, _ in unused.most_common(5))
        note(f"fields that are not used: {named}{', …' if len(unused) > 5 else ''}")
