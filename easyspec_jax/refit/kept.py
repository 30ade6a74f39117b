"""Intermediate results of a refit, kept next to it for the next one.

A file holds one value and a key: a hash of whatever that value depends on. A file that is damaged,
or has another key, is treated as missing.
"""

import json
from pathlib import Path
from typing import Any

from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import write_whole


def read_kept(path: Path, key: str, name: str) -> Any:
    """Read the value kept under a key.

    Args:
        path: The file.
        key: The key it must have been written with.
        name: What the value is called in the file.

    Returns:
        The value, made of what JSON has; None without such a file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record[name] if record["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_kept(path: Path, key: str, name: str, value: object) -> None:
    """Write a value and its key, whole or not at all. See `read_kept`.

    Raises:
        EasySpecError: The file cannot be written.
    """
    try:
        write_whole(path, (json.dumps({"key": key, name: value}) + "\n").encode())
    except OSError as error:
        raise EasySpecError(f"{path} cannot be written: {error.strerror}") from None
