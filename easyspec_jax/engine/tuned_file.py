"""The way of decoding that `tune` found fastest, as it is kept on disk: `tuned.json`.

The file lies next to the draft, or in the user's cache if the draft's directory cannot be written.
It holds choices for several targets, meshes and machines.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easyspec_jax import demo
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.checkpoint.directory import Checkpoint
from easyspec_jax.checkpoint.families import FINAL_NORM
from easyspec_jax.draft.refit_file import refit_digest
from easyspec_jax.engine.models import Models
from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import cache_directory, write_whole
from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.parallel.mesh import parse_mesh

FILE = "tuned.json"


@dataclass(frozen=True)
class Key:
    """Everything that a choice was measured for; another key needs a choice of its own.

    Attributes:
        target: Digest of the target, see identity().
        draft: Digest of the draft.
        platform: JAX's name of the devices' platform.
        device_kind: JAX's name of the devices.
        mesh: The mesh as the user asked for it, such as "8".
        dtype: Type computed in.
        refits: Digest of the refits in the draft's directory.
        weights: Types of the target's and the draft's matrices where they differ from `dtype`.
        kv_dtype: Type of the caches; "auto" is `dtype`.
    """

    target: str
    draft: str
    platform: str
    device_kind: str
    mesh: str
    dtype: str
    refits: str = ""
    weights: str = ""
    kv_dtype: str = "auto"


@dataclass(frozen=True)
class Choice:
    """The fastest way of decoding that was measured.

    Attributes:
        mesh: How it splits the devices: "layer=…,tensor=…".
        speculative: How it drafts and verifies.
        tokens_per_second: Its speed when it ran.
        plain_tokens_per_second: The speed of plain decoding in the same run.
    """

    mesh: str
    speculative: SpeculativeConfig
    tokens_per_second: float
    plain_tokens_per_second: float


def label(speculative: SpeculativeConfig) -> str:
    """Describe a way of drafting in a few words.

    Examples:
        >>> label(SpeculativeConfig(lp_size=4, tree_width=8, refit="none"))
        'N = 4, TP all, width 8'
        >>> label(SpeculativeConfig(method="sd", confidence_threshold=0.1, adapt=True))
        'ordinary, TP all, chain, ends below 0.1, adapts'
    """
    if speculative.method == "vanilla":
        return "plain decoding"
    name = "ordinary"
    if speculative.method == "easyspec":
        mlps = f", M = {speculative.mlp_lp_size}" if speculative.mlp_lp_size > 1 else ""
        refit = "" if speculative.refit == "none" else " refit"
        name = f"N = {speculative.lp_size}{mlps}{refit}"
    tree = "chain" if speculative.width == 1 else f"width {speculative.width}"
    early = speculative.confidence_threshold
    ends = "ends where it is unsure" if isinstance(early, str) else f"ends below {early:g}"
    further = {ends: early, "adapts": speculative.adapt}
    further["looks up"] = speculative.prompt_lookup
    words = [name, f"TP {speculative.draft_tensor_parallel_size}", tree]
    return ", ".join(words + [word for word, holds in further.items() if holds])


def describe(choice: Choice) -> str:
    """Describe a choice, and what it gained, in one line."""
    if choice.speculative.method == "vanilla":
        return "plain decoding (no draft was faster)"
    gain = choice.tokens_per_second / choice.plain_tokens_per_second
    levels = choice.speculative.num_speculative_tokens
    way = f"{label(choice.speculative)}, {levels} levels on {choice.mesh}"
    return f"{way}, {gain:.2f} × plain decoding as measured"


def key_of(models: Models, mesh: str) -> Key:
    """Return the key of a pair on its devices. The mesh is as the user asked for it."""
    assert models.draft is not None
    device = models.mesh.devices.flat[0]
    return Key(
        target=identity(models.target),
        draft=identity(models.draft),
        platform=device.platform,
        device_kind=device.device_kind,
        mesh=mesh,
        dtype=models.dtype,
        refits=refit_digest(models.draft.directory),
        weights=models.kept_weights,
        kv_dtype=models.kv_dtype,
    )


def identity(checkpoint: Checkpoint) -> str:
    """Return a digest of a model's configuration and a few small tensors.

    Reading all of a large model would take minutes, and training changes these tensors too.
    """
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    # Norms and one projection of the last layer take a few MB, and every training step moves them.
    last = f"model.layers.{checkpoint.config.num_hidden_layers - 1}"
    for name in (FINAL_NORM, f"{last}.input_layernorm.weight", f"{last}.self_attn.k_proj.weight"):
        digest.update(np.ascontiguousarray(checkpoint.source.read(name)).tobytes())
    return digest.hexdigest()[:16]


def places(key: Key, draft: Path) -> list[Path]:
    """Return the files that may hold a choice, the preferred one first.

    The bundled draft's own directory is not among them: it belongs to the installed package.
    """
    cache = cache_directory()
    elsewhere = [] if cache is None else [cache / "tuned" / f"{key.draft}.json"]
    return elsewhere if draft.resolve() == demo.DRAFT.resolve() else [draft / FILE, *elsewhere]


def find(key: Key, draft: Path) -> Choice | None:
    """Return the choice stored under a key, or None if there is none that can be read."""
    for path in places(key, draft):
        for entry in _entries(path):
            # An entry of a newer version may have options that are unknown here; it is passed over.
            if _is_under(key, entry) and (choice := _choice(entry)) is not None:
                return choice
    return None


def keep(key: Key, choice: Choice, draft: Path) -> Path:
    """Store a choice in place of an older one under the same key, and return its file.

    Raises:
        EasySpecError: None of the places can be written.
    """
    reason = "no cache directory was found"
    for path in places(key, draft):
        # Choices under other keys stay.
        others = [entry for entry in _entries(path) if not _is_under(key, entry)]
        entries = [*others, {"key": asdict(key), **asdict(choice)}]
        text = json.dumps({"choices": entries}, indent=1) + "\n"
        try:
            # write_whole() replaces the file in one step, so that two processes cannot mix entries.
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())
        except OSError as error:
            reason = str(error)
        else:
            return path
    raise EasySpecError(f"the choice cannot be stored: {reason}")


def _entries(path: Path) -> list[dict[str, Any]]:
    """Return a file's entries; none if it is absent or damaged, as they can be measured again."""
    try:
        held = read_json(path).get("choices")
    except EasySpecError:
        return []
    return [entry for entry in held if isinstance(entry, dict)] if isinstance(held, list) else []


def _is_under(key: Key, entry: Mapping[str, Any]) -> bool:
    """Return whether an entry is stored under a key; older keys lack the types kept in memory."""
    stored = entry.get("key")
    before = {"kv_dtype": "auto", "weights": ""}
    return isinstance(stored, dict) and before | stored == asdict(key)


def _choice(entry: dict[str, Any]) -> Choice | None:
    """Return an entry's choice, or None if it has options that this version does not know."""
    try:
        parse_mesh(entry["mesh"])
        return Choice(
            mesh=entry["mesh"],
            speculative=SpeculativeConfig(**entry["speculative"]),
            tokens_per_second=entry["tokens_per_second"],
            plain_tokens_per_second=entry["plain_tokens_per_second"],
        )
    except (EasySpecError, KeyError, TypeError):
        return None
