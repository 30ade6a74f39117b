"""Opening a GGUF file for conversion.

Its tensors become NumPy arrays, its metadata a Hugging Face configuration and tokenizer.
"""

import re
from collections.abc import Mapping, Sequence
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor

from convert.gguf_fields import (
    BIASES,
    LONGROPE_FACTORS,
    OPTIONAL_FIELDS,
    REQUIRED_FIELDS,
    ROPE_FACTORS,
    SCALING_FIELDS,
    STOP_IDS,
    TOKEN_IDS,
)
from convert.gguf_tensors import GGUFSource, KeptBlocks, shape_of
from convert.gguf_tokenizer import build_tokenizer, check_saved, further_ends
from convert.models import Model
from convert.stores import write_json
from easyspec_jax.checkpoint.canonical import canonical
from easyspec_jax.checkpoint.config import VARIATIONS, ModelConfig, model_config
from easyspec_jax.checkpoint.families import FAMILIES, Family
from easyspec_jax.checkpoint.rope import plain_frequencies
from easyspec_jax.errors import EasySpecError

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# The dtype to write by default for a stored type. For all others it is bfloat16: they are BF16
# already, or quantized, which has lost more than bfloat16 does.
_DTYPES = {"F32": "float32", "F16": "float16"}


def open_gguf(path: Path, *, keep_blocks: bool = False) -> Model:
    """Open a model in a GGUF file, or in several that are parts of one.

    Args:
        path: The file, or any part of a split one (`NAME-00001-of-00003.gguf`).
        keep_blocks: Keep quantized matrices as integers with scales, see `gguf_tensors`.
            Otherwise they become floats.

    Returns:
        The model, with its tokenizer if the file has one. Weights are read later, piece by piece.

    Raises:
        EasySpecError: A file is missing or damaged, or the model is not supported.
    """
    origin = str(path)
    paths, metadata, stored = _read_parts(path)
    model_type, family = _family(metadata, origin)
    tensors = {name: tensor for name, (_, tensor) in stored.items()}
    if _EMBEDDING not in tensors:
        raise EasySpecError(f"{origin}: {_EMBEDDING} is missing; is this a whole model?")
    # The factors belong to the configuration; the remaining tensors must all be weights.
    factors = {}
    for name in (ROPE_FACTORS, *LONGROPE_FACTORS.values()):
        if name in stored:
            factors[name] = _factors(stored.pop(name)[1], origin)
    config = _config(metadata, tensors, family, origin)
    config |= {"architectures": [family.class_name], "model_type": model_type}
    config |= _partial_rope(metadata, config, family, origin)
    config |= _rope_scaling(metadata, factors, origin)
    model = model_config(config, origin=origin)
    if ROPE_FACTORS in factors:
        config["rope_scaling"] = _llama3_scaling(factors[ROPE_FACTORS], model, origin)
    has_tokenizer = "tokenizer.ggml.model" in metadata
    tokenizer = build_tokenizer(metadata, origin) if has_tokenizer else None

    def write_companions(directory: Path) -> None:
        further = () if tokenizer is None else further_ends(tokenizer)
        write_json(directory / "generation_config.json", _generation(metadata, further))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
            check_saved(tokenizer, directory)

    dtype = _DTYPES.get(tensors[_EMBEDDING].tensor_type.name, "bfloat16")
    blocks = GGUFSource(stored)
    _, exact = canonical(model, blocks, "gguf", origin)
    _, source = canonical(model, KeptBlocks(blocks), "gguf", origin) if keep_blocks else (0, exact)
    return Model(origin, config, source, dtype, paths, has_tokenizer, write_companions, exact)


_MOST_ENTRIES = 1 << 22  # fields, elements of arrays and tensors; each becomes a few objects
_LONGEST_TEXT = 64 << 20  # bytes


class _Reader(GGUFReader):
    """The library's reader, with limits for damaged and hostile files."""

    # Reading past the end of the file gives the library empty arrays, on which it goes on for ever
    # if a length is damaged. It makes several objects of every entry, however many a file claims
    # to have, and recurses into arrays of arrays, however deep.
    _entries = 0

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> np.ndarray:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < count:
            raise ValueError("it ends too early")
        return values

    def _get_str(self, offset: int) -> Any:
        if int(self._get(offset, np.uint64)[0]) > _LONGEST_TEXT:
            raise ValueError("a text in its metadata is too long")
        return super()._get_str(offset)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            if self._get(orig_offs, np.uint32)[0] == GGUFValueType.ARRAY:
                raise ValueError("its metadata has an array of arrays")
            self._count(self._get(orig_offs + 4, np.uint64)[0])
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_fields(self, offs: int, count: int) -> int:
        self._count(count)
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> Any:
        self._count(count)
        return super()._build_tensor_info(offs, count)

    def _count(self, entries: Any) -> None:
        self._entries += int(entries)
        if self._entries > _MOST_ENTRIES:
            raise ValueError(f"it claims more than {_MOST_ENTRIES} entries")


_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def _read_parts(
    path: Path,
) -> tuple[tuple[Path, ...], dict[str, Any], dict[str, tuple[Path, ReaderTensor]]]:
    """Read the headers of a file, or of all parts of a split one.

    Returns:
        The files, the metadata of the first one, and every tensor with the file that holds it.
    """
    reader, metadata = _read(path)
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count < 100_000:
        raise EasySpecError(
            f"{path} is truncated or damaged (split.count={str(count)[:40]}); fetch it again"
        )
    if count <= 1:
        return (path,), metadata, {tensor.name: (path, tensor) for tensor in reader.tensors}
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise EasySpecError(
            f"{path} is one of {count} parts; name them like model-00001-of-{count:05}.gguf"
        )
    names = (f"{named[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))
    paths = tuple(map(path.with_name, names))
    tensors: dict[str, tuple[Path, ReaderTensor]] = {}
    first: dict[str, Any] = {}
    for number, part in enumerate(paths):
        reader, metadata = _read(part)
        if (metadata.get("split.no"), metadata.get("split.count")) != (number, count):
            raise EasySpecError(
                f"{part} is not part {number + 1} of {count} as its name says; fetch it again"
            )
        first = first or metadata
        # The library itself refuses a name that appears twice in one file.
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise EasySpecError(
                    f"{part} holds {tensor.name}, which an earlier part holds too; "
                    "fetch all parts again"
                )
            tensors[tensor.name] = part, tensor
    if first.get("split.tensors.count", len(tensors)) != len(tensors):
        raise EasySpecError(
            f"{path}: its parts hold {len(tensors)} of {first['split.tensors.count']} tensors; "
            "fetch all parts again"
        )
    return paths, first, tensors


def _read(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except FileNotFoundError:
        raise EasySpecError(f"{path} is missing; expected a GGUF file") from None
    except OSError as error:
        raise EasySpecError(f"{path} cannot be read: {error.strerror}") from None
    # The library indexes and decodes without checking first.
    except (ValueError, IndexError, KeyError) as error:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise EasySpecError(f"{path} is not a GGUF file") from None
        raise EasySpecError(f"{path} is truncated or damaged ({error}); fetch it again") from None
    if reader.byte_order != "I":
        raise EasySpecError(
            f"{path} has the wrong byte order for this machine; fetch the other variant"
        )
    return reader, metadata


def _family(metadata: Mapping[str, Any], origin: str) -> tuple[str, Family]:
    name = str(metadata.get("general.architecture", "(none)"))
    supported = {family.gguf: (kind, family) for kind, family in FAMILIES.items() if family.gguf}
    if name not in supported:
        names = ", ".join(sorted(supported))
        raise EasySpecError(
            f"{origin}: GGUF architecture {name!r} is not supported; supported: {names}"
        )
    if name == "llama" and f"llama.{OPTIONAL_FIELDS['sliding_window']}" in metadata:
        return "mistral", FAMILIES["mistral"]  # a Llama that may have windows
    return supported[name]


def _config(
    metadata: Mapping[str, Any], tensors: Mapping[str, ReaderTensor], family: Family, origin: str
) -> dict[str, Any]:
    """Return the contents of `config.json`, without the family and a dtype."""
    prefix = metadata["general.architecture"]
    config: dict[str, Any] = {}
    for field, key in (REQUIRED_FIELDS | OPTIONAL_FIELDS).items():
        value = metadata.get(f"{prefix}.{key}")
        if value is not None:
            config[field] = _shortest(value)
        elif field in REQUIRED_FIELDS:
            raise EasySpecError(
                f"{origin}: the metadata field {prefix}.{key} is missing; fetch the file again"
            )
    config |= {field: tensor in tensors for field, tensor in BIASES.items()}
    for field in VARIATIONS.keys() - family.fields:
        config.pop(field, None)
    config["vocab_size"], *_ = shape_of(tensors[_EMBEDDING]) or (0,)
    _check_ids(metadata, config["vocab_size"], origin)
    config["tie_word_embeddings"] = _HEAD not in tensors
    if prefix in _LAYERS_OF_27B:
        config["query_pre_attn_scalar"] = _attention_scalar(config, _LAYERS_OF_27B[prefix])
    # Tell Qwen's readers, which ignore the window by default, that every layer has it.
    if "sliding_window" in config:
        config |= {"use_sliding_window": True, "max_window_layers": 0}
    return config | _token_ids(metadata)


_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def _attention_scalar(config: Mapping[str, Any], layers: int) -> Any:
    """Return Gemma's `query_pre_attn_scalar`, which its files do not say."""
    # As in llama.cpp: a head's channels, but in models of 27 billion its share of the width.
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config["num_hidden_layers"] == layers and type(heads) is type(hidden) is int and heads > 0:
        return hidden // heads
    return config.get("head_dim", 256)


def _rope_scaling(
    metadata: Mapping[str, Any], factors: Mapping[str, np.ndarray], origin: str
) -> dict[str, Any]:
    """Return `rope_scaling` as `config.json` has it; {} if the frequencies are not scaled."""
    prefix = metadata["general.architecture"]
    start = f"{prefix}.rope.scaling."
    fields = {k.removeprefix(start): v for k, v in metadata.items() if k.startswith(start)}
    scaling: dict[str, Any] = {}
    for name, value in fields.items():
        if name in SCALING_FIELDS:
            scaling[SCALING_FIELDS[name]] = _shortest(value)
        elif name not in ("type", "finetuned"):  # the latter says only how the model was made
            raise EasySpecError(f"{origin}: the metadata field {start}{name} is not supported")
    # Without a kind it is linear scaling; a factor of 1, the default, scales nothing.
    kind = fields.get("type", "linear")
    if all(name in factors for name in LONGROPE_FACTORS.values()):
        kind = "longrope"
        for field, name in LONGROPE_FACTORS.items():
            scaling[field] = [_shortest(float(value)) for value in factors[name]]
    elif scaling.get("attention_factor", 1.0) != 1.0:
        # llama.cpp multiplies YaRN's own amplitude by it; transformers would replace that.
        raise EasySpecError(f"{origin}: the metadata field {start}attn_factor is not supported")
    else:
        scaling.pop("attention_factor", None)
    scaling.setdefault("factor", _shortest(metadata.get(f"{prefix}.rope.scale_linear") or 1.0))
    if kind == "none" or (kind != "longrope" and scaling["factor"] == 1.0):
        return {}
    return {"rope_scaling": {"rope_type": kind, **scaling}}


def _partial_rope(
    metadata: Mapping[str, Any], config: Mapping[str, Any], family: Family, origin: str
) -> dict[str, Any]:
    """Return the field that says which part of a head is rotated; {} if all of it is."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        return {}  # the configuration is refused anyway
    whole = config.get("head_dim") or hidden // heads
    key = f"{metadata['general.architecture']}.rope.dimension_count"
    rotated = metadata.get(key) or whole
    if rotated == whole or type(whole) is not int:
        return {}
    if type(rotated) is not int:
        raise _wrong_field(origin, key, rotated)
    if any(tensor.pairs for tensor in family.tensors):
        # The order of a head's rows would depend on the part, see `canonical.unpermute`.
        raise EasySpecError(f"{origin}: RoPE over {rotated} of {whole} dimensions is not supported")
    return {"partial_rotary_factor": rotated / whole}


def _factors(tensor: ReaderTensor, origin: str) -> np.ndarray:
    """Return what RoPE frequencies are divided by."""
    factors = np.array(tensor.data)
    if factors.ndim != 1 or not factors.size or not (np.isfinite(factors) & (factors > 0)).all():
        raise EasySpecError(
            f"{origin}: {tensor.name} must be a vector of positive numbers; fetch the file again"
        )
    return factors


def _check_ids(metadata: Mapping[str, Any], vocab_size: int, origin: str) -> None:
    """Check that the tokens with a role are tokens of the file, or else of the model."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    known = len(tokens) if isinstance(tokens, list) else vocab_size
    for key in (*TOKEN_IDS.values(), *STOP_IDS):
        value = metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < known):
            raise _wrong_field(origin, key, value)


def _wrong_field(origin: str, key: str, value: Any) -> EasySpecError:
    return EasySpecError(
        f"{origin}: the metadata field {key} is damaged ({str(value)[:40]!r}); fetch the file again"
    )


def _shortest(value: Any) -> Any:
    """Round a float to its shortest decimal: GGUF keeps 1e-5 as 9.999999747e-06 (float32)."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{token}_id": metadata[key] for token, key in TOKEN_IDS.items() if key in metadata}


def _generation(metadata: Mapping[str, Any], further: Sequence[int]) -> dict[str, Any]:
    """Return the contents of `generation_config.json`, with every id that ends a text."""
    known = [metadata[key] for key in STOP_IDS if key in metadata]
    stop_ids = list(dict.fromkeys([*known, *further]))
    if not stop_ids:
        return _token_ids(metadata)
    return _token_ids(metadata) | {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}


def _llama3_scaling(factors: np.ndarray, model: ModelConfig, origin: str) -> dict[str, Any]:
    """Recover Llama 3's RoPE scaling from the factors that GGUF stores instead.

    Args:
        factors: What each of the head_dim / 2 frequencies is divided by.
        model: The model without the scaling.
        origin: Names the file in error messages.

    Raises:
        EasySpecError: The constants that every Llama 3 uses do not give these factors.
    """
    # The lowest frequency is divided by the whole factor, which is therefore the largest one.
    factor, low, high, length = float(factors.max()), 1.0, 4.0, 8192
    rope = model.layers[0].rope
    wavelengths = 2 * pi / plain_frequencies(rope.theta, rope.dim)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise EasySpecError(
            f"{origin}: {ROPE_FACTORS} holds a RoPE scaling other than Llama 3's, "
            "which is not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
