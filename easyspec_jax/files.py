"""Files that are written whole or not at all, and where those that can be regenerated are kept."""

import errno
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_directory() -> Path | None:
    """Directory for regenerable caches, or None without a home directory."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "easyspec_jax"
    return None


def read_input(path: str | Path) -> bytes:
    """Read a file, or standard input for "-". Raises OSError, also if standard input is closed."""
    if str(path) != "-":
        return Path(path).read_bytes()
    if sys.stdin is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return sys.stdin.buffer.read()


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file, if there is one, once all of the content is on disk, whoever else writes it too."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        partial.chmod(0o666 & ~_umask())  # a temporary file is its owner's only
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Raises OSError, before anything is measured, where write_whole could not write."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    Path(name).unlink()


def _umask() -> int:
    """The only way to read it is to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
