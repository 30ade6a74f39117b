"""Download of a model from the Hugging Face hub: safetensors and JSON files only."""

import re
import sys
from pathlib import Path

from convert.huggingface import COMPANIONS
from easyspec_jax.checkpoint.safetensors import INDEX
from easyspec_jax.errors import EasySpecError, first_line

FILES = ("config.json", *COMPANIONS, "model*.safetensors", INDEX)
"""Patterns of the files to download. None of them is unpickled or run."""


def directory_of(source: str, revision: str | None = None) -> Path:
    """Return a local directory, downloading a model from the hub if necessary.

    Args:
        source: A directory, or a model's id on the hub ("OWNER/NAME"). A directory wins.
        revision: The branch, tag or commit of a model on the hub; by default its main branch.

    Returns:
        The directory, which may not exist if the source does not look like an id.

    Raises:
        EasySpecError: The model cannot be downloaded, or a revision is given for a directory.
    """
    directory = Path(source)
    if directory.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        if revision is not None:
            raise EasySpecError(f"`revision` needs a model on the hub; {source} is a local path")
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    # The library would draw its bars into a log file, too.
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # raised by the library, its HTTP client or the system
        raise EasySpecError(
            f"{source} is not a local directory and cannot be fetched from the hub "
            f"({first_line(error)})"
        ) from None
