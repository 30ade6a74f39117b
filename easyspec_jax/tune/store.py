"""Choices are kept beside the draft, or in the user's cache: one file for several targets and machines."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easyspec_jax import demo
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.checkpoint.directory import Checkpoint
from easyspec_jax.checkpoint.families import FINAL_NORM
from easyspec_jax.draft.refit_file import refit_digest
from easyspec_jax.engine.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import cache_directory, write_whole
from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.parallel.mesh import parse_mesh

FILE = "tuned.json"


@dataclass(frozen=True)
class Key:
    """Key of a stored choice. mesh: as for --mesh; target, draft: see identity(); refits: of the draft."""

    target: str
    draft: str
    platform: str
    device_kind: str
    mesh: str
    dtype: str
    refits: str = ""


@dataclass(frozen=True)
class Choice:
    """The fastest way found. mesh: "layer=…,tensor=…"; speeds in tokens a second, as confirmed."""

    mesh: str
    speculative: SpeculativeConfig
    tokens_per_second: float
    plain_tokens_per_second: float


def label(speculative: SpeculativeConfig) -> str:
    """A draft of a Space in a few words."""
    if speculative.method == "vanilla":
        return "plain decoding"
    name = "ordinary"
    if speculative.method == "easyspec":
        mlps = f", M = {speculative.mlp_lp_size}" if speculative.mlp_lp_size > 1 else ""
        name = f"N = {speculative.lp_size}{mlps}{'' if speculative.refit == 'none' else ' refit'}"
    tree = "chain" if speculative.width == 1 else f"width {speculative.width}"
    return f"{name}, TP {speculative.draft_tensor_parallel_size}, {tree}"


def describe(choice: Choice) -> str:
    """A choice in one line."""
    if choice.speculative.method == "vanilla":
        return "plain decoding, than which no draft was faster"
    gain = choice.tokens_per_second / choice.plain_tokens_per_second
    levels = choice.speculative.num_speculative_tokens
    return f"{label(choice.speculative)}, {levels} levels on {choice.mesh}, {gain:.2f} × plain decoding as measured"


def key_of(engine: Engine, mesh: str) -> Key:
    """The key of a pair on an engine's devices."""
    assert engine.draft is not None
    device = engine.mesh.devices.flat[0]
    pair = identity(engine.target), identity(engine.draft)
    refits = refit_digest(engine.draft.directory)
    return Key(*pair, device.platform, device.device_kind, mesh, engine.dtype, refits)


def identity(checkpoint: Checkpoint) -> str:
    """Tells models apart by configuration and a few small tensors: to read all of a large one would take minutes."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    last = f"model.layers.{checkpoint.config.num_hidden_layers - 1}"
    for name in (FINAL_NORM, f"{last}.input_layernorm.weight", f"{last}.self_attn.k_proj.weight"):
        digest.update(np.ascontiguousarray(checkpoint.source.read(name)).tobytes())
    return digest.hexdigest()[:16]


def places(key: Key, draft: Path) -> list[Path]:
    """Files that may hold the choice, the preferred one first; nothing is kept inside the package."""
    cache = cache_directory()
    elsewhere = [] if cache is None else [cache / "tuned" / f"{key.draft}.json"]
    return elsewhere if draft.resolve() == demo.DRAFT.resolve() else [draft / FILE, *elsewhere]


def find(key: Key, draft: Path) -> Choice | None:
    """The stored choice that was measured for exactly this; None if there is none that can be read."""
    for path in places(key, draft):
        for entry in _entries(path):
            if entry.get("key") == asdict(key) and (choice := _choice(entry)) is not None:
                return choice
    return None


def keep(key: Key, choice: Choice, draft: Path) -> Path:
    """Stores a choice in the place of an older one for the same; returns the file.

    Raises EasySpecError if no place can be written.
    """
    reason = "there is no cache directory"
    for path in places(key, draft):
        others = [entry for entry in _entries(path) if entry.get("key") != asdict(key)]
        text = (
            json.dumps({"choices": [*others, {"key": asdict(key), **asdict(choice)}]}, indent=1)
            + "\n"
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())
        except OSError as error:
            reason = str(error)
        else:
            return path
    raise EasySpecError(f"the choice cannot be stored: {reason}")


def _entries(path: Path) -> list[dict[str, Any]]:
    """None from a file that is absent or damaged: what it held can be measured again."""
    try:
        held = read_json(path).get("choices")
    except EasySpecError:
        return []
    return [entry for entry in held if isinstance(entry, dict)] if isinstance(held, list) else []


def _choice(entry: dict[str, Any]) -> Choice | None:
    """None for a choice that this version cannot follow."""
    try:
        parse_mesh(entry["mesh"])
        speculative = SpeculativeConfig(**entry["speculative"])
        return Choice(
            entry["mesh"], speculative, entry["tokens_per_second"], entry["plain_tokens_per_second"]
        )
    except (EasySpecError, KeyError, TypeError):
        return None
