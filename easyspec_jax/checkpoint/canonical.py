"""Canonical tensors: Llama's names and layouts in Hugging Face, however they are stored (linear weights are [out, in]).

What a configuration asks for, how others name, join and permute it, and whether that is what they have stored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.families import EMBEDDING, FAMILIES, HEAD, Tensor
from easyspec_jax.checkpoint.rope import rope_frequencies
from easyspec_jax.checkpoint.tensors import Slices, StoredSource, TensorSource, row_blocks
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import FLOAT_DTYPES

_INV_FREQ = "rotary_emb.inv_freq"
"""Suffix of the buffers in which old exports keep the RoPE frequencies. They follow from the configuration."""

_STORED_DTYPES = (*FLOAT_DTYPES, "float64")

Scheme = Literal["canonical", "hf", "gguf"]
"""Who named the stored tensors, see `families.Tensor`."""


def sizes(config: ModelConfig) -> dict[str, int]:
    """Map the size names of a family's table to numbers."""
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "vocab": config.vocab_size,
        "head_dim": config.head_dim,
    }


def tensors(config: ModelConfig) -> Iterator[tuple[str, int, Tensor]]:
    """Name, layer and row of the family's table of every canonical tensor of a model, layer by layer."""
    table = [tensor for tensor in FAMILIES[config.model_type].tensors
             if tensor.name != HEAD or not config.tie_word_embeddings]  # fmt: skip
    yield from ((tensor.name, 0, tensor) for tensor in table if "{}" not in tensor.name)
    for layer in range(config.num_hidden_layers):
        yield from (
            (tensor.name.format(layer), layer, tensor) for tensor in table if "{}" in tensor.name
        )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every canonical tensor of a model, an untied head included."""
    size = sizes(config)
    return {name: tuple(size[dim] for dim in tensor.shape) for name, _, tensor in tensors(config)}


@dataclass(frozen=True)
class StoredAs:
    """Location of a canonical tensor in someone else's naming: rows of one of their tensors.

    unit: rows of a head, where they are stored as pairs of channels; otherwise 1.
    """

    name: str
    start: int
    unit: int = 1


def places(config: ModelConfig, scheme: Scheme) -> dict[str, StoredAs]:
    """The StoredAs of every canonical tensor."""
    size, found = sizes(config), {}
    for name, layer, tensor in tensors(config):
        if scheme == "canonical":
            found[name] = StoredAs(name, 0)
            continue
        stored = tensor.gguf if scheme == "gguf" else tensor.hf or tensor.name
        unit = config.head_dim if scheme == "gguf" and tensor.pairs else 1
        found[name] = StoredAs(stored.format(layer), sum(size[dim] for dim in tensor.after), unit)
    return found


def stored_shapes(config: ModelConfig, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model as others keep them."""
    expected, shapes = expected_shapes(config), dict[str, tuple[int, ...]]()
    for name, place in places(config, scheme).items():
        rows, *rest = expected[name]
        before = shapes.get(place.name, (0,))[0]
        shapes[place.name] = (max(before, place.start + rows), *rest)
    return shapes


def canonical(
    config: ModelConfig, source: StoredSource, scheme: Scheme, origin: str
) -> tuple[ModelConfig, StoredSource]:
    """Present the tensors of a source under their canonical names.

    No stored tensor is dropped unseen. A head beside a tied embedding is compared with it: if they are equal, it is a
    copy; otherwise it is a head of its own, as fine-tunes leave it, and the configuration returned is untied. Stored
    RoPE frequencies are compared with those of the configuration.

    Args:
        config: What the configuration file says.
        source: The tensors as they are stored.
        scheme: How the source names them.
        origin: Names the source in error messages.

    Returns:
        The configuration, untied if the head is stored, and its canonical tensors.

    Raises:
        EasySpecError: The tensors are not the ones that the configuration asks for.
    """
    untied = replace(config, tie_word_embeddings=False)
    head = places(untied, scheme)[HEAD].name
    if config.tie_word_embeddings and head in source.shapes():
        check_tensors(untied, source, origin, scheme)
        tensors = CanonicalSource(source, places(untied, scheme), expected_shapes(untied))
        config = config if _same_values(tensors, EMBEDDING, HEAD) else untied
        copies = frozenset({head}) if config.tie_word_embeddings else frozenset[str]()
    else:
        copies = frozenset[str]()
    check_tensors(config, source, origin, scheme, copies)
    _check_frequencies(config, source, origin)
    return config, CanonicalSource(source, places(config, scheme), expected_shapes(config))


def _same_values(source: TensorSource, first: str, second: str) -> bool:
    """Whether two matrices of one shape hold equal numbers, in whatever types; stops at the first difference."""
    return all(
        np.array_equal(
            source.read(first, (rows,)).astype(np.float64),
            source.read(second, (rows,)).astype(np.float64),
        )
        for rows in row_blocks(source.shapes()[first])
    )


def _check_frequencies(config: ModelConfig, source: StoredSource, origin: str) -> None:
    """Raise EasySpecError if stored RoPE frequencies are others than the configuration's, beyond their own rounding."""
    expected = rope_frequencies(config)
    for name in filter(_is_frequencies, source.shapes()):
        stored = source.read(name).astype(np.float32)
        # Half precision keeps 8 to 11 bits, and of the slowest frequencies almost none.
        rtol, atol = (
            (1e-2, 1e-7) if source.dtypes()[name] in ("bfloat16", "float16") else (1e-4, 0.0)
        )
        if stored.shape != expected.shape or not np.allclose(
            stored, expected, rtol=rtol, atol=atol
        ):
            raise EasySpecError(
                f"{origin}: {name} holds other RoPE frequencies than the configuration gives; "
                "correct rope_theta or rope_scaling in config.json, or remove the tensor"
            )


def _is_frequencies(name: str) -> bool:
    return name.endswith(_INV_FREQ)


@dataclass(frozen=True)
class CanonicalSource:
    """Canonical tensors out of a source that names, joins and permutes them as a family's table says."""

    stored: StoredSource
    places: Mapping[str, StoredAs]
    expected: Mapping[str, tuple[int, ...]]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.expected

    def dtypes(self) -> Mapping[str, str]:
        dtypes = self.stored.dtypes()
        return {name: dtypes[place.name] for name, place in self.places.items()}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        place = self.places[name]
        rows = window[0] if window else slice(0, self.expected[name][0])
        # Whole heads, where a row's place depends on the head's others.
        first, last = (
            rows.start // place.unit * place.unit,
            -(-rows.stop // place.unit) * place.unit,
        )
        values = self.stored.read(
            place.name, (slice(place.start + first, place.start + last), *window[1:])
        )
        if place.unit > 1:
            values = unpermute(values, place.unit)
        return values[rows.start - first : rows.stop - first]


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Puts [heads * head_dim, ...] rows from llama.cpp's order (pairs side by side) into Hugging Face's (by halves)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def check_tensors(
    config: ModelConfig,
    source: StoredSource,
    origin: str,
    scheme: Scheme = "canonical",
    copies: frozenset[str] = frozenset(),
) -> None:
    """Check that a source stores exactly the tensors of a configuration.

    Args:
        config: The configuration.
        source: The stored tensors.
        origin: Names the source in error messages.
        scheme: How the source names its tensors.
        copies: Stored tensors that are known to equal one of the expected ones.

    Raises:
        EasySpecError: Counts every missing, unknown, misshapen and mistyped tensor, and names a few.
    """
    expected, dtypes = stored_shapes(config, scheme), source.dtypes()
    present = {
        name: shape
        for name, shape in source.shapes().items()
        if name not in copies and not _is_frequencies(name)
    }
    both = [name for name in expected if name in present]
    kinds = (
        [f"{name} is missing" for name in expected if name not in present],
        [f"{name} is unknown" for name in present if name not in expected],
        [f"{name} has shape {present[name]} instead of {expected[name]}" for name in both
         if present[name] != expected[name]],
        [f"{name} is stored as {dtypes[name]}, which is not supported" for name in both
         if dtypes[name] not in _STORED_DTYPES],
    )  # fmt: skip
    if any(kinds):
        listed = [fault for faults in kinds for fault in (*faults[:3], *_more(len(faults) - 3))]
        raise EasySpecError(
            f"{origin}: tensors do not match the configuration: {'; '.join(listed)}"
        )


def _more(count: int) -> tuple[str, ...]:
    return (f"and {count} more",) if count > 0 else ()
