"""Refits on disk: kept next to the weights they were made from, and valid for those alone."""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from easyspec_jax.checkpoint.directory import Checkpoint
from easyspec_jax.checkpoint.tensors import Held, TensorSource
from easyspec_jax.draft.grouping import Layout, format_layout, layout_of, parse_layout
from easyspec_jax.draft.sites import stale_sites
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.files import write_whole
from easyspec_jax.options import FLOAT_DTYPES, SpeculativeConfig

DIRECTORY = "refit"
"""Inside a draft's directory, where refits are looked for."""


def path_of(directory: Path, speculative: SpeculativeConfig, layout: Layout) -> Path:
    """Path of a refit. With only a size given, the refit chooses the groups itself; layout: the groups given."""
    if speculative.lp_strategy is None:
        mlps = f"_mlp{speculative.mlp_lp_size}" if speculative.mlp_lp_size > 1 else ""
        return directory / f"lp{speculative.lp_size}{mlps}.safetensors"
    name = format_layout(layout)
    if len(name) > 100:  # file names end somewhere
        name = hashlib.sha256(name.encode()).hexdigest()[:16]
    return directory / f"{name}.safetensors"


def refit_sizes(draft: Path) -> frozenset[tuple[int, int]]:
    """lp_size and mlp_lp_size of the refits that a draft's directory holds."""
    names = (
        re.fullmatch(r"lp(\d+)(?:_mlp(\d+))?\.safetensors", path.name)
        for path in (draft / DIRECTORY).glob("*")
    )
    return frozenset((int(name[1]), int(name[2] or 1)) for name in names if name)


def refit_digest(draft: Path) -> str:
    """Tells apart what refits a draft's directory holds."""
    digest = hashlib.sha256()
    for path in sorted((draft / DIRECTORY).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def save(path: Path, tensors: Mapping[str, np.ndarray], layout: Layout, draft: Checkpoint) -> None:
    """Writes a refit, whole or not at all, in the draft's own dtype. Raises EasySpecError if it cannot."""
    dtype = draft.config.dtype if draft.config.dtype in FLOAT_DTYPES else "float32"
    values = {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in tensors.items()}
    metadata = {"groups": format_layout(layout)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, serialise(values, metadata=metadata | {"draft": draft.fingerprint}))
    except (OSError, SafetensorError) as error:
        raise EasySpecError(f"{path} cannot be written: {first_line(error)}") from None


def load(path: Path, draft: Checkpoint) -> tuple[Layout, Held]:
    """A refit and what it is for. Raises EasySpecError if it is damaged or was made from other weights."""
    again = "run easyspec_jax.refit again, or use --no-refit"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            held = Held({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        layout = parse_layout(metadata["groups"], draft.config.num_hidden_layers)
    except (
        SafetensorError,
        OSError,
        EasySpecError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise EasySpecError(
            f"{path} is no refit of this draft ({first_line(error)}); {again}"
        ) from None
    if metadata.get("draft") != draft.fingerprint:
        raise EasySpecError(
            f"{path} was made from other weights than those of {draft.directory}; {again}"
        )
    if held.shapes() != refit_shapes(layout, draft.source.shapes()):
        raise EasySpecError(f"{path} holds other tensors than its groups need; {again}")
    return layout, held


def refit_shapes(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a refit; shapes: of the draft's."""
    expected: dict[str, tuple[int, ...]] = {}
    for site in stale_sites(layout):
        expected[f"{site.norm}.weight"] = shapes[f"{site.norm}.weight"]
        for part in site.parts:
            expected[f"{part}.weight"] = shapes[f"{part}.weight"]
            expected[f"{part}.bias"] = shapes[f"{part}.weight"][:1]
    return expected


def find(directory: Path, speculative: SpeculativeConfig, layout: Layout) -> Path:
    """The file with a refit for these groups, which may not exist; layout: of the flags.

    Explicit groups are known by what the file says, not by its name.
    """
    path = path_of(directory, speculative, layout)
    if path.is_file() or speculative.lp_strategy is None:
        return path
    alike = (
        file
        for file in sorted(directory.glob("*.safetensors"))
        if _groups_in(file) == format_layout(layout)
    )
    return next(alike, path)


def _groups_in(path: Path) -> str | None:
    with suppress(SafetensorError, OSError), safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get("groups")
    return None


def choose_layout(
    speculative: SpeculativeConfig, draft: Checkpoint
) -> tuple[Layout, TensorSource | None]:
    """The groups to draft with, and their refit, if there is any.

    Raises EasySpecError for impossible groups, or if the refit that was asked for is missing or unfit.
    """
    layout = layout_of(speculative, draft.config.num_hidden_layers)
    if speculative.refit == "none" or layout.lp_size == 1:
        return layout, None
    beside = draft.directory / DIRECTORY
    path = find(
        beside if speculative.refit == "auto" else Path(speculative.refit), speculative, layout
    )
    if path.is_file():
        found, refit = load(path, draft)
        if speculative.lp_strategy is None or found == layout:
            return found, refit
        raise EasySpecError(
            f"{path} is for the groups {format_layout(found)}; run easyspec_jax.refit again"
        )
    if speculative.refit == "auto":
        return layout, None
    raise EasySpecError(
        f"--refit {speculative.refit} has no {path.name}; run easyspec_jax.refit for these groups"
    )
