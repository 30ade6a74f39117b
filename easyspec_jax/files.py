"""Atomic writes, input from a file or stdin, and the directory for caches."""

import errno
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_directory() -> Path | None:
    """Return the directory for regenerable caches, or None without a home directory."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "easyspec_jax"
    return None


def read_input(path: str | Path) -> bytes:
    """Read a file, or standard input for "-".

    Raises:
        OSError: The file cannot be read, or standard input is closed.
    """
    if str(path) != "-":
        return Path(path).read_bytes()
    # Python sets sys.stdin to None when descriptor 0 was closed before it started (`command <&-`).
    if sys.stdin is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return sys.stdin.buffer.read()


def flush(directory: Path) -> None:
    """Force all files to the disk: after a power failure, a name must not lead to empty files."""
    for parent, _, files in os.walk(directory):
        # Directories have contents too, the names of their files.
        for name in (*files, "."):
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new one, never a mixture.

    Concurrent writers do not disturb each other; the last one to finish wins.

    Args:
        path: The file to create or replace.
        content: All of it.

    Raises:
        OSError: The write fails; the old file, if any, is untouched.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     path = Path(directory, "note.txt")
        ...     write_whole(path, b"hello")
        ...     path.read_bytes()
        b'hello'
    """
    # A temporary name of its own for each writer, in the same directory: a rename is atomic only
    # within one file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes the file private (0600); give it the mode that open() would have given.
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Check, before any long work starts, that write_whole could write this file.

    Raises:
        OSError: It could not: the path is a directory, or its parent is missing or read-only.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        # Name the user's file, not our temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    Path(name).unlink()


def _umask() -> int:
    # POSIX offers no way to read the mask without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
