"""Where an output grows until it is whole: a locked directory beside it, with a journal of what is done."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec_jax.errors import EasySpecError

_JOURNAL = "journal"


@dataclass(frozen=True)
class Workplace:
    """A directory that is this process's own, and the checksums of what earlier runs finished in it.

    done: of each piece, by the tensor's name and its first row. A piece counts once its record is in the journal.
    """

    directory: Path
    done: dict[tuple[str, int], int]

    def record(self, name: str, start: int, checksum: int) -> None:
        """Notes that a piece is written; one appended line, so that several threads may."""
        with (self.directory / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, start, checksum]) + "\n")


@contextmanager
def workplace(out: Path, task: str) -> Iterator[Workplace]:
    """A directory that takes the name `out` when the block ends without an error, all of it on the disk.

    Interrupted, even by SIGKILL, it stays: the next run with the same task, a description of what is written from
    what, goes on with it. After an error nothing stays. Raises EasySpecError if the path exists, its parent cannot be
    written, or another process is at it.
    """
    _refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial")
    lock = _locked(partial, out)
    try:
        _refuse_existing(out)  # whoever held the lock may have finished
        yield Workplace(partial, _resumed(partial, task))
        (partial / _JOURNAL).unlink()
        _flush(partial)
        partial.rename(out)
    except KeyboardInterrupt:
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise EasySpecError(f"{out} exists already; choose another --out or remove it")


def _locked(partial: Path, out: Path) -> int:
    """The locked directory, open; the lock ends with the process, however it ends."""
    try:
        while True:
            partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), partial.stat()):
                        return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # it was renamed or removed before it was locked
    except BlockingIOError:
        raise EasySpecError(
            f"another conversion is writing {out}; wait for it or choose another --out"
        ) from None
    except OSError as error:
        raise EasySpecError(f"{out.parent} cannot be written: {error.strerror}") from None


def _resumed(partial: Path, task: str) -> dict[tuple[str, int], int]:
    """What the journal says is done, if it is of this task; otherwise the directory is emptied for it."""
    journal = partial / _JOURNAL
    with suppress(OSError, UnicodeDecodeError):
        head, *lines = journal.read_text(encoding="utf-8").split("\n")
        if head == task:
            return {
                (name, start): checksum
                for name, start, checksum in filter(None, map(_parsed, lines))
            }
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    journal.write_text(task + "\n", encoding="utf-8")
    return {}


def _parsed(line: str) -> Any:
    with suppress(ValueError):
        return json.loads(line)
    return None  # the last line of a run that was killed


def _flush(directory: Path) -> None:
    """Everything in a directory goes to the disk, so that no power failure leaves a name without its data."""
    for parent, _, files in os.walk(directory):
        for name in (*files, "."):
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
