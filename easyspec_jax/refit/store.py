"""Where a refit lies: beside the weights it was made from, and good for those alone."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from easyspec_jax.checkpoint import Checkpoint
from easyspec_jax.draft.grouping import Layout, format_groups
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.files import write_whole
from easyspec_jax.options import FLOAT_DTYPES, SpeculativeConfig
from easyspec_jax.sources import TensorSource, Window

DIRECTORY = "refit"
"""Inside a draft's directory, where refits are looked for."""


def path_of(directory: Path, layout: Layout) -> Path:
    """The file that holds a layout's refit."""
    name = format_groups(layout.groups)
    if len(name) > 100:  # file names end somewhere
        name = hashlib.sha256(name.encode()).hexdigest()[:16]
    return directory / f"{name}{f'_mlp{layout.mlp_lp_size}' if layout.mlp_lp_size > 1 else ''}.safetensors"


def save(path: Path, tensors: Mapping[str, np.ndarray], layout: Layout, draft: Checkpoint) -> None:
    """Writes a refit, whole or not at all, in the draft's own dtype. Raises EasySpecError if it cannot."""
    dtype = draft.config.dtype if draft.config.dtype in FLOAT_DTYPES else "float32"
    values = {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in tensors.items()}
    metadata = _described(layout) | {"draft": draft.fingerprint}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, serialise(values, metadata=metadata))
    except (OSError, SafetensorError) as error:
        raise EasySpecError(f"{path} cannot be written: {first_line(error)}") from None


def find(directory: Path, layout: Layout, draft: Checkpoint) -> TensorSource | None:
    """The refit of a layout, if the directory holds one.

    Raises EasySpecError if it is damaged, or was made from other weights than the draft's.
    """
    path = path_of(directory, layout)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise EasySpecError(f"{path} is damaged ({first_line(error)}); run easyspec_jax.refit again") from None
    if metadata.get("draft") != draft.fingerprint:
        raise EasySpecError(
            f"{path} was made from other weights than those of {draft.directory}; run easyspec_jax.refit again, "
            "or use --no-refit"
        )
    if {name: metadata.get(name) for name in _described(layout)} != _described(layout):
        raise EasySpecError(f"{path} is for other groups than its name says; run easyspec_jax.refit again")
    return Held(held)


def choose_refit(speculative: SpeculativeConfig, draft: Checkpoint, layout: Layout) -> TensorSource | None:
    """The refit to draft with, if any. Raises EasySpecError if the one that was asked for is missing or unfit."""
    if speculative.refit == "none" or layout.lp_size == 1:
        return None
    if speculative.refit == "auto":
        return find(draft.directory / DIRECTORY, layout, draft)
    refit = find(Path(speculative.refit), layout, draft)
    if refit is None:
        raise EasySpecError(
            f"--refit {speculative.refit} holds none for the groups {format_groups(layout.groups)} with "
            f"--mlp-lp-size {layout.mlp_lp_size}; run easyspec_jax.refit for them"
        )
    return refit


@dataclass(frozen=True)
class Held:
    """Tensors in host memory, as a TensorSource."""

    tensors: Mapping[str, np.ndarray]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str, window: Window = ()) -> np.ndarray:
        return self.tensors[name][window]


def _described(layout: Layout) -> dict[str, str]:
    return {"lp_strategy": format_groups(layout.groups), "mlp_lp_size": str(layout.mlp_lp_size)}
