"""Conversion in one call: open a model of any kind, then write it or verify what was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from convert.calibration import LEAST_TOKENS, TOKENS, calibration_on
from convert.gguf import open_gguf
from convert.hub import directory_of
from convert.huggingface import open_huggingface
from convert.models import Model
from convert.orbax import ORBAX
from convert.pieces import DEFAULT_MEMORY
from convert.shards import HUGGING_FACE
from convert.stream import Result, verify
from convert.stream import convert as convert_model
from easyspec_jax.checkpoint.rounding import INT4_GROUPS
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Weights
from easyspec_jax.options.checks import check_choice, check_whole


@dataclass(frozen=True)
class ConvertConfig:
    """How to convert a model.

    Attributes:
        format: What to write: an Orbax checkpoint, or a Hugging Face directory.
        dtype: Type of all tensors that are not quantized; by default the model's.
        memory: Bytes that the process may take.
        verify: Read everything again and compare it with the source. If the output exists already
            and no dtype is given, do only that.
        revision: Commit, branch or tag of a model on the hub.
        allow_links: Follow links that lead out of a checkpoint's directory.
        weights: Type of the matrices, see `convert.stream.convert`; by default as they are.
        keep_blocks: Keep a GGUF file's quantized matrices as integers, see `convert.gguf`.
        group_size: The most columns that share a scale in int4; by default 128.
        calibration: A text file. The integers of int4 become those with which the model's outputs
            on this text change least, instead of the nearest ones; see `easyspec_jax.calibrate`.
        calibration_tokens: Tokens of it to use at most; by default TOKENS of `convert.calibration`.
    """

    format: Literal["orbax", "huggingface"] = "orbax"
    dtype: str | None = None
    memory: int = DEFAULT_MEMORY
    verify: bool = False
    revision: str | None = None
    allow_links: bool = False
    weights: Weights | None = None
    keep_blocks: bool = False
    group_size: int | None = None
    calibration: str | Path | None = None
    calibration_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.weights != "int4":
            for name in ("group_size", "calibration", "calibration_tokens"):
                if getattr(self, name) is not None:
                    raise EasySpecError(f"`{name}` is for `weights` int4; leave it out")
        if self.group_size is not None:
            check_choice("group_size", str(self.group_size), tuple(map(str, INT4_GROUPS)))
        if self.calibration_tokens is not None:
            if self.calibration is None:
                raise EasySpecError("`calibration_tokens` needs `calibration` FILE")
            check_whole("calibration_tokens", self.calibration_tokens, LEAST_TOKENS)


def convert(source: str | Path, out: str | Path, config: ConvertConfig | None = None) -> Result:
    """Convert a model into a new directory.

    An error leaves nothing behind. After an interruption, the same call resumes where it stopped.
    Orbax starts JAX to commit a checkpoint. To keep it off accelerators, set JAX_PLATFORMS=cpu
    before JAX is imported, as the command does.

    Args:
        source: A checkpoint directory, a GGUF file (or one part of it), or a model's id on the hub.
        out: The directory to create.
        config: How to convert; by default into an Orbax checkpoint.

    Raises:
        EasySpecError: The model is not supported, incomplete or not finite, a value does not fit
            the dtype, the memory is too small, the calibration's text is too short, or `out` exists
            or cannot be written.
    """
    config = config or ConvertConfig()
    if Path(source).suffix == ".gguf" and not Path(source).is_dir():
        model = open_gguf(Path(source), keep_blocks=config.keep_blocks)
    else:
        directory = directory_of(str(source), config.revision)
        model = open_huggingface(directory, config.allow_links)
    return convert_opened(model, Path(out), config)


def convert_opened(model: Model, out: Path, config: ConvertConfig) -> Result:
    """Convert a model that is open already; otherwise as convert()."""
    group = INT4_GROUPS[0] if config.group_size is None else config.group_size
    if config.verify and config.dtype is None and out.is_dir():
        if config.calibration is not None:
            raise EasySpecError(
                f"{out} exists, and `verify` does not repeat a `calibration`; "
                "choose another directory"
            )
        return verify(model, out, config.memory, config.weights, group)
    calibration = None
    if config.calibration is not None:
        text, tokens = Path(config.calibration), config.calibration_tokens or TOKENS
        calibration = calibration_on(text, tokens, model, group, config.memory)
    format = ORBAX if config.format == "orbax" else HUGGING_FACE
    return convert_model(
        model,
        out,
        config.dtype,
        format,
        memory=config.memory,
        verify=config.verify,
        weights=config.weights,
        group=group,
        calibration=calibration,
    )
