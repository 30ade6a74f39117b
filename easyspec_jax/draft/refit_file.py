"""Refits on disk: kept with the weights they were made from, and valid for those alone.

A refit is a safetensors file. Its tensors replace projections of a draft in fuzzy passes; its
metadata has the groups they were fitted for and a fingerprint of the draft.
"""

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
"""Directory inside a draft's own where refits are kept."""


def path_of(directory: Path, speculative: SpeculativeConfig, layout: Layout) -> Path:
    """Return the path of a refit.

    A configuration with only an lp_size leaves the choice of groups to the refit, so the size names
    the file. With an explicit lp_strategy the groups do.

    Args:
        directory: Directory of refits.
        speculative: Configuration to draft with.
        layout: Its groups.

    Examples:
        >>> layout = parse_layout("0,1-3,4-7x2", num_layers=8)
        >>> path_of(Path("refit"), SpeculativeConfig(lp_size=4), layout).name
        'lp4.safetensors'
        >>> path_of(Path("refit"), SpeculativeConfig(lp_strategy="0,1-3,4-7x2"), layout).name
        '0,1-3,4-7x2.safetensors'
    """
    if speculative.lp_strategy is None:
        mlps = f"_mlp{speculative.mlp_lp_size}" if speculative.mlp_lp_size > 1 else ""
        return directory / f"lp{speculative.lp_size}{mlps}.safetensors"
    name = format_layout(layout)
    if len(name) > 100:  # most file systems allow 255 bytes
        name = hashlib.sha256(name.encode()).hexdigest()[:16]
    return directory / f"{name}.safetensors"


def refit_sizes(directory: Path) -> frozenset[tuple[int, int]]:
    """List (lp_size, mlp_lp_size) of the refits in a directory that are named by size."""
    sizes = set()
    for path in directory.glob("*"):
        name = re.fullmatch(r"lp(\d+)(?:_mlp(\d+))?\.safetensors", path.name)
        if name:
            sizes.add((int(name[1]), int(name[2] or 1)))
    return frozenset(sizes)


def refit_digest(draft: Path) -> str:
    """Hash the names and contents of all refits in a draft's directory: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted((draft / DIRECTORY).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def save(path: Path, tensors: Mapping[str, np.ndarray], layout: Layout, draft: Checkpoint) -> None:
    """Write a refit, whole or not at all, in the draft's dtype (float32 if that is not supported).

    Args:
        path: File to write; its directory is made if need be.
        tensors: The refit's tensors by canonical name.
        layout: Groups that they were fitted for.
        draft: Checkpoint that they were made from.

    Raises:
        EasySpecError: The file cannot be written.
    """
    dtype = draft.config.dtype if draft.config.dtype in FLOAT_DTYPES else "float32"
    values = {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in tensors.items()}
    metadata = {"groups": format_layout(layout)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, serialise(values, metadata=metadata | {"draft": draft.fingerprint}))
    except (OSError, SafetensorError) as error:
        raise EasySpecError(f"{path} cannot be written: {first_line(error)}") from None


def load(path: Path, draft: Checkpoint) -> tuple[Layout, Held]:
    """Read a refit.

    Args:
        path: The file.
        draft: Checkpoint that it should have been made from.

    Returns:
        The groups that it was fitted for, and its tensors.

    Raises:
        EasySpecError: The file is damaged, was made from other weights, or does not hold the
            tensors that its groups need.
    """
    again = "run easyspec_jax.refit again, or use `refit` none"
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
            f"{path} is not a refit of this draft ({first_line(error)}); {again}"
        ) from None
    # A refit belongs to the very weights it was fitted to. With others it would still run, and only
    # lower the acceptance rate, which is easy to miss.
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
    """List the tensors that a refit must hold.

    Args:
        layout: The refit's groups.
        shapes: Shape of each of the draft's tensors, by canonical name.

    Returns:
        Shape of each of the refit's tensors, by canonical name. Every part has a bias.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for site in stale_sites(layout):
        # Some families have no norm there.
        if (norm := f"{site.norm}.weight") in shapes:
            expected[norm] = shapes[norm]
        for part in site.parts:
            expected[f"{part}.weight"] = shapes[f"{part}.weight"]
            expected[f"{part}.bias"] = shapes[f"{part}.weight"][:1]
    return expected


def find(directory: Path, speculative: SpeculativeConfig, layout: Layout) -> Path:
    """Find the file with a refit for a configuration.

    Explicit groups are also found in files of any name, by the groups in their metadata.

    Args:
        directory: Directory of refits.
        speculative: Configuration to draft with.
        layout: Its groups.

    Returns:
        The file's path; path_of() if there is none.
    """
    path = path_of(directory, speculative, layout)
    if path.is_file() or speculative.lp_strategy is None:
        return path
    wanted = format_layout(layout)
    for file in sorted(directory.glob("*.safetensors")):
        if _groups_in(file) == wanted:
            return file
    return path


def _groups_in(path: Path) -> str | None:
    """Read the groups that a file is for; None if it does not say or cannot be read."""
    with suppress(SafetensorError, OSError), safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get("groups")
    return None


def choose_layout(
    speculative: SpeculativeConfig, draft: Checkpoint
) -> tuple[Layout, TensorSource | None]:
    """Choose the groups to draft with, and find their refit.

    Args:
        speculative: Configuration to draft with. Its refit is "none"; "auto", for one in the
            draft's directory if there is any; or a directory that must have one.
        draft: The draft's checkpoint.

    Returns:
        The layout, which is the refit's own if only an lp_size is given; and the refit's tensors,
        or None without a refit.

    Raises:
        EasySpecError: The draft cannot have these groups, or the refit is missing, damaged, or made
            for other weights or groups.
    """
    layout = layout_of(speculative, draft.config.num_hidden_layers)
    if speculative.refit == "none" or layout.lp_size == 1:
        return layout, None
    own = draft.directory / DIRECTORY
    directory = own if speculative.refit == "auto" else Path(speculative.refit)
    # With only an lp_size, the file decides the groups; explicit groups must be the file's.
    path = find(directory, speculative, layout)
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
        f"`refit` {speculative.refit} has no {path.name}; run easyspec_jax.refit for these groups"
    )
