"""The hidden directory in which an output grows until it is complete.

It is locked, so that only one process writes it, and holds a journal of what is done, so that an
interrupted run can be resumed.
"""

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
from easyspec_jax.files import flush

_JOURNAL = "journal"


@dataclass(frozen=True)
class Workplace:
    """A directory that only this process writes, and what earlier runs finished in it.

    Attributes:
        directory: Where the output grows.
        done: Checksums of finished pieces, by the tensor's name and the piece's first row. A piece
            counts as finished once its record is in the journal.
    """

    directory: Path
    done: dict[tuple[str, int], int]

    def record(self, name: str, start: int, checksum: int) -> None:
        """Record in the journal that a piece is written. Threads may call this concurrently."""
        # One short write in append mode is atomic, so lines of different threads do not mix.
        with (self.directory / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, start, checksum]) + "\n")


@contextmanager
def workplace(out: Path, task: str) -> Iterator[Workplace]:
    """Provide a directory that is renamed to `out` if the block ends without an error.

    An interruption, even by SIGKILL, leaves the directory for the next run with the same task to
    resume. An error removes it. The content is on the disk before the name appears.

    Args:
        out: The path to create. Its parent is created too.
        task: Identifies what is written from what; another task starts over.

    Raises:
        EasySpecError: The path exists, its parent cannot be written, or another process is writing
            it.
    """
    _refuse_existing(out)
    # In the same parent, so that the rename stays within one file system.
    partial = out.with_name(f".{out.name}.partial")
    lock = _locked(partial, out)
    try:
        # Another process may have finished between the first check and the lock.
        _refuse_existing(out)
        yield Workplace(partial, _resumed(partial, task))
        # Flushing may take minutes. If it is interrupted, the journal says that all is written.
        flush(partial)
        (partial / _JOURNAL).unlink()
        partial.rename(out)
    except KeyboardInterrupt:
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):  # which a dangling link does
        raise EasySpecError(f"{out} already exists; remove it or choose another directory")


def _locked(partial: Path, out: Path) -> int:
    """Create and lock the directory, and return its descriptor."""
    # flock() locks the directory itself, not its name, and the kernel drops the lock when the
    # process ends, however it ends: no stale lock files. But between open() and flock() the
    # process that held the lock may have renamed the directory to `out` (or removed it after an
    # error). Then this lock is on the wrong directory, and a third process could create and lock a
    # new one under the old name. So once the lock is held, check that the name still leads to the
    # directory that was locked, and otherwise start over.
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
            os.close(handle)
    except BlockingIOError:
        raise EasySpecError(
            f"another conversion is writing {out}; wait for it or choose another directory"
        ) from None
    except OSError as error:
        raise EasySpecError(f"{out.parent} cannot be written: {error.strerror}") from None


def _resumed(partial: Path, task: str) -> dict[tuple[str, int], int]:
    """Return what the journal records for this task, or empty the directory for a new start."""
    journal = partial / _JOURNAL
    with suppress(OSError, UnicodeDecodeError):
        head, *lines = journal.read_text(encoding="utf-8").split("\n")
        if head == task:
            records = filter(None, map(_parsed, lines))
            return {(name, start): checksum for name, start, checksum in records}
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    journal.write_text(task + "\n", encoding="utf-8")
    return {}


def _parsed(line: str) -> Any:
    # The last line is cut short if the run was killed while writing it.
    with suppress(ValueError):
        return json.loads(line)
    return None
