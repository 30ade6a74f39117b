"""Results are files of JSON, written whole or not at all."""

from pathlib import Path

from easyspec_jax import EasySpecError
from easyspec_jax.files import check_writable, write_whole


def check_destination(path: Path) -> None:
    """Raises EasySpecError, before anything is measured, where save() could not write."""
    if not path.parent.is_dir() or path.suffix != ".json" or path.is_dir():
        raise EasySpecError(f"--out {path} is no .json file in a directory that exists")
    check_writable(path)  # an OSError says what is wrong


def save(path: Path, text: str) -> None:
    """Replaces the file, if there is one, once all of the text is on disk."""
    write_whole(path, text.encode())
