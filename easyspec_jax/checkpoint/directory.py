"""Opening a checkpoint directory: a converted one (Orbax) or a Hugging Face one (safetensors)."""

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from easyspec_jax.checkpoint.canonical import canonical, stored_shapes
from easyspec_jax.checkpoint.config import ModelConfig, read_json, read_model_config
from easyspec_jax.checkpoint.families import FAMILIES
from easyspec_jax.checkpoint.orbax import WEIGHTS, OrbaxSource
from easyspec_jax.checkpoint.quantized_files import assembled, quantization
from easyspec_jax.checkpoint.safetensors import SafetensorsSource
from easyspec_jax.checkpoint.stacked_experts import stacks_of, unstacked
from easyspec_jax.checkpoint.tensors import TensorSource, row_blocks
from easyspec_jax.errors import EasySpecError


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint directory. Its tensors match its configuration, and are not read yet.

    Attributes:
        directory: Where it is.
        config: Its configuration.
        source: Its canonical tensors.
        original: What is stored, where `source` has another vocabulary; else None.
    """

    directory: Path
    config: ModelConfig
    source: TensorSource
    original: TensorSource | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tensors (SHA-256, hexadecimal). Reads the whole checkpoint.

        A converted copy in the same dtype has the same fingerprint.
        """
        source = self.original or self.source
        dtypes, shapes = source.dtypes(), source.shapes()  # some sources make them anew each time

        def digest(name: str) -> bytes:
            found = hashlib.sha256(f"{name} {dtypes[name]} {tuple(shapes[name])} ".encode())
            # In blocks: whole tensors in every thread could be gigabytes.
            for rows in row_blocks(shapes[name]):
                block = np.ascontiguousarray(source.read(name, (rows,)))
                found.update(block.reshape(-1).view(np.uint8).data)
            return found.digest()

        # Reading and hashing release the GIL, so tensors are hashed by threads, and their digests
        # are hashed in the order of their names, which both kinds of directory have in common.
        with ThreadPoolExecutor() as pool:
            digests = pool.map(digest, sorted(shapes))
            return hashlib.sha256(b"".join(digests)).hexdigest()


def open_checkpoint(directory: Path | str, *, allow_links: bool = False) -> Checkpoint:
    """Open a converted (Orbax) or a Hugging Face (safetensors) directory.

    Conflicting files are resolved as transformers does: `model.safetensors` wins over an index,
    and a stored head that differs from the embedding wins over a configuration that ties the two.

    Args:
        directory: The checkpoint.
        allow_links: Follow links that point outside the directory, for weights on another disk.

    Returns:
        The checkpoint, with its tensors checked but not read.

    Raises:
        EasySpecError: The directory is of neither kind, is damaged, has links that point outside
            or lacks tensors that its configuration asks for (or has others).

    Examples:
        >>> from easyspec_jax import demo
        >>> checkpoint = open_checkpoint(demo.TARGET)
        >>> checkpoint.config.num_hidden_layers
        5
        >>> checkpoint.source.read("model.norm.weight").shape
        (384,)
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise EasySpecError(
            f"{directory} is not a directory; expected a converted or a Hugging Face checkpoint"
        )
    check_files(directory, allow_links)
    if (directory / "adapter_config.json").exists():
        raise EasySpecError(
            f"{directory} holds an adapter (adapter_config.json); merge it into the model first"
        )
    config = read_model_config(directory)
    if (directory / WEIGHTS).is_dir():
        stored, scheme = OrbaxSource(directory / WEIGHTS), "canonical"
    else:
        stored, scheme = _huggingface(directory, config), "hf"
    config, source = canonical(config, stored, scheme, origin=str(directory))
    return Checkpoint(directory, config, source)


def _huggingface(directory: Path, config: ModelConfig) -> TensorSource:
    """Open the weights of a Hugging Face directory, with one tensor for each matrix."""
    known = frozenset(stored_shapes(config, "hf"))
    stacks = FAMILIES[config.model_type].stacks_experts
    settings = quantization(read_json(directory / "config.json"), str(directory))
    if settings is None:
        wanted = known | stacks_of(known) if stacks else known
        stored = SafetensorsSource(directory, wanted)
    else:
        stored = assembled(SafetensorsSource(directory), settings, known, str(directory))
    return unstacked(stored, known) if stacks else stored


def check_files(directory: Path, allow_links: bool = False) -> None:
    """Check that a checkpoint holds only regular files and directories inside itself.

    A downloaded checkpoint is not to be trusted: `convert` copies files, so a link could leak a
    private file of this machine, and reading a pipe would never end.

    Args:
        directory: The checkpoint.
        allow_links: Allow links that point outside the directory.

    Raises:
        EasySpecError: A file is not a regular one, or is such a link.
    """
    root = directory.resolve()
    homes = [root]
    # The hub's cache keeps a snapshot's files next to it and links to them:
    # models--A--B/snapshots/COMMIT/model.safetensors -> models--A--B/blobs/HASH
    if root.parent.name == "snapshots":
        homes.append(root.parents[1] / "blobs")
    deeper = (
        (directory / WEIGHTS).rglob("*"),
        directory.glob("refit/*"),
        directory.glob("additional_chat_templates/*"),
    )
    for path in itertools.chain(directory.iterdir(), *deeper):
        leads_out = path.is_symlink() and not any(map(_resolved(path).is_relative_to, homes))
        if leads_out and not allow_links:
            raise EasySpecError(
                f"{path} is a link that points outside the checkpoint directory; "
                "put the file itself there, or give `allow_links`"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise EasySpecError(
                f"{path} is not a regular file; remove it from the checkpoint directory"
            )


def _resolved(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        raise EasySpecError(f"{link} is a link that leads nowhere; remove it") from None
