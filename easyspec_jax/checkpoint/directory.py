"""Opening checkpoints: an Orbax directory of our own, or a Hugging Face directory as it is."""

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from easyspec_jax.checkpoint.canonical import canonical, expected_shapes, stored_shapes
from easyspec_jax.checkpoint.config import ModelConfig, read_model_config
from easyspec_jax.checkpoint.orbax import WEIGHTS, OrbaxSource
from easyspec_jax.checkpoint.safetensors import SafetensorsSource
from easyspec_jax.checkpoint.tensors import StoredSource
from easyspec_jax.errors import EasySpecError


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory, its tensors checked against its configuration but not yet read."""

    directory: Path
    config: ModelConfig
    source: StoredSource

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every tensor as it is stored; the same for a converted copy in the same dtype."""

        def digest(name: str) -> bytes:
            tensor = np.ascontiguousarray(self.source.read(name))
            described = f"{name} {tensor.dtype} {tensor.shape} ".encode()
            return hashlib.sha256(described + tensor.reshape(-1).view(np.uint8).data).digest()

        with ThreadPoolExecutor() as pool:
            digests = pool.map(digest, sorted(expected_shapes(self.config)))
            return hashlib.sha256(b"".join(digests)).hexdigest()


def open_checkpoint(directory: Path | str, *, allow_links: bool = False) -> Checkpoint:
    """Open a converted (Orbax) or a Hugging Face (safetensors) directory.

    Where files compete, the directory means what it means to transformers: `model.safetensors` comes before an index,
    and a stored head that differs from the embedding is used even if the configuration says that the two are tied.

    Args:
        directory: The checkpoint.
        allow_links: Follow links that lead out of the directory, such as weights on another disk.

    Raises:
        EasySpecError: The directory is neither kind, is damaged, leads out of itself, or holds other tensors than its
            configuration asks for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise EasySpecError(
            f"{directory} is no directory; expected a converted or a Hugging Face checkpoint"
        )
    check_files(directory, allow_links)
    if (directory / "adapter_config.json").exists():
        raise EasySpecError(
            f"{directory} holds an adapter (adapter_config.json); merge it into the model first"
        )
    config = read_model_config(directory)
    if (directory / WEIGHTS).is_dir():
        config, source = canonical(
            config, OrbaxSource(directory / WEIGHTS), "canonical", origin=str(directory)
        )
    else:
        stored = SafetensorsSource(directory, frozenset(stored_shapes(config, "hf")))
        config, source = canonical(config, stored, "hf", origin=str(directory))
    return Checkpoint(directory, config, source)


def check_files(directory: Path, allow_links: bool = False) -> None:
    """Check that a checkpoint's files are files and stay inside its directory.

    `convert` copies what is read here, so a link could leak a file of the host; a pipe would never end. The hub's cache
    keeps a snapshot's files next to it, in `blobs`, which may be linked to.

    Raises:
        EasySpecError: A file is a link that leads out of the directory (unless allow_links), or not an ordinary file.
    """
    root = directory.resolve()
    homes = [root] + ([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])
    deeper = (
        (directory / WEIGHTS).rglob("*"),
        directory.glob("refit/*"),
        directory.glob("additional_chat_templates/*"),
    )
    for path in itertools.chain(directory.iterdir(), *deeper):
        leads_out = path.is_symlink() and not any(
            _resolved(path).is_relative_to(home) for home in homes
        )
        if leads_out and not allow_links:
            raise EasySpecError(
                f"{path} is a link that leads out of the checkpoint directory; put the file there or give --allow-links"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise EasySpecError(
                f"{path} is no ordinary file; remove it from the checkpoint directory"
            )


def _resolved(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        raise EasySpecError(f"{link} is a link that leads nowhere; remove it") from None
