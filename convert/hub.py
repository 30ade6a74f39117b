"""Fetches a model from the Hugging Face hub, safetensors and JSON only."""

import re
import sys
from pathlib import Path

from convert.huggingface import COMPANIONS
from easyspec_jax.checkpoint.safetensors import INDEX
from easyspec_jax.errors import EasySpecError, first_line

FILES = ("config.json", *COMPANIONS, "model*.safetensors", INDEX)
"""Patterns of what is fetched: nothing that is unpickled or run."""


def directory_of(source: str, revision: str | None = None) -> Path:
    """A directory as it is, or the local copy of a model on the hub at a revision (a branch, a tag or a commit).

    Raises EasySpecError if there is neither.
    """
    directory = Path(source)
    if directory.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        if revision is not None:
            raise EasySpecError(f"--revision is for models on the hub; {source} is none")
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the library's own, those of its HTTP client, and the system's
        raise EasySpecError(
            f"{source} is no directory here and cannot be fetched from the hub ({first_line(error)})"
        ) from None
