"""Canonical tensors: every checkpoint as if it were Llama's in Hugging Face.

The rest of the package knows one set of names and layouts, with linear weights as [out, in]. This
module lists the tensors that a configuration asks for, where other formats keep them (other names,
several tensors joined, permuted rows), and checks that a checkpoint has exactly these.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from easyspec_jax.arithmetic import round_up
from easyspec_jax.checkpoint.config import MixtureConfig, ModelConfig
from easyspec_jax.checkpoint.families import EMBEDDING, FAMILIES, HEAD, Tensor
from easyspec_jax.checkpoint.quantized import Dequantized, is_matrix, offset_name, scale_name
from easyspec_jax.checkpoint.rounding import INTEGERS
from easyspec_jax.checkpoint.tensors import Slices, TensorSource, row_blocks
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import FLOAT_DTYPES

_INV_FREQ = "rotary_emb.inv_freq"
"""Suffix of buffers that hold RoPE frequencies in old exports; the configuration implies them."""

_STORED_DTYPES = (*FLOAT_DTYPES, "float64")

Scheme = Literal["canonical", "hf", "gguf"]
"""Whose names the stored tensors have, see `families.Tensor`."""


def sizes(config: ModelConfig) -> dict[str, int]:
    """Map the names of dimensions in a family's table to their sizes."""
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "vocab": config.vocab_size,
        "head_dim": config.head_dim,
        "heads": config.num_attention_heads,
        "experts": config.mixture.num_experts if config.mixture else 0,
        "expert_inner": config.mixture.moe_intermediate_size if config.mixture else 0,
    }


def tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yield the name, the numbers in it and the table's row of every canonical tensor.

    The numbers are a layer's, and an expert's in it. A head that is tied to the embedding is not
    among the tensors.
    """
    per_layer: list[Tensor] = []
    for tensor in FAMILIES[config.model_type].tensors:
        if tensor.when and not getattr(config, tensor.when):
            continue
        if "{}" in tensor.name:
            per_layer.append(tensor)
        elif tensor.name != HEAD or not config.tie_word_embeddings:
            yield tensor.name, (), tensor
    for layer in range(config.num_hidden_layers):
        for tensor in per_layer:
            for numbers in _numbers(tensor, layer, config.mixture):
                yield tensor.name.format(*numbers), numbers, tensor


def _numbers(tensor: Tensor, layer: int, mixture: MixtureConfig | None) -> list[tuple[int, ...]]:
    """Return the numbers of a layer's tensors of one row of the table, if it has any."""
    has_experts = mixture is not None and layer not in mixture.dense_layers
    if tensor.mixture not in (None, has_experts):
        return []
    if mixture is None or tensor.name.count("{}") == 1:
        return [(layer,)]
    return [(layer, expert) for expert in range(mixture.num_experts)]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every canonical tensor of a model.

    Examples:
        >>> from easyspec_jax import demo
        >>> from easyspec_jax.checkpoint.config import read_model_config
        >>> shapes = expected_shapes(read_model_config(demo.TARGET))
        >>> shapes["model.layers.0.self_attn.k_proj.weight"]
        (128, 384)
    """
    size, shapes = sizes(config), dict[str, tuple[int, ...]]()
    for name, _, tensor in tensors(config):
        shapes[name] = tuple(size[dimension] for dimension in tensor.shape)
    return shapes


@dataclass(frozen=True)
class StoredAs:
    """Rows of a stored tensor that hold one canonical tensor.

    Attributes:
        name: The stored tensor.
        start: Its first row that belongs to the canonical one.
        unit: Rows of a head, if the rows of each head are permuted as GGUF does; otherwise 1.
        offset: What has been added to it.
    """

    name: str
    start: int
    unit: int = 1
    offset: float = 0.0


def places(config: ModelConfig, scheme: Scheme) -> dict[str, StoredAs]:
    """Return where each canonical tensor is stored."""
    size, found = sizes(config), {}
    for name, numbers, tensor in tensors(config):
        if scheme == "canonical":
            found[name] = StoredAs(name, 0)
            continue
        stored = tensor.gguf if scheme == "gguf" else tensor.hf or tensor.name
        unit = config.head_dim if scheme == "gguf" and tensor.pairs else 1
        start = sum(size[dimension] for dimension in tensor.after)
        offset = tensor.gguf_offset if scheme == "gguf" else 0.0
        found[name] = StoredAs(stored.format(*numbers), start, unit, offset)
    return found


def stored_shapes(config: ModelConfig, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor as it is stored, several joined ones as one."""
    expected, shapes = expected_shapes(config), dict[str, tuple[int, ...]]()
    for name, place in places(config, scheme).items():
        rows, *rest = expected[name]
        # A joined tensor ends where its last part does.
        before = shapes.get(place.name, (0,))[0]
        shapes[place.name] = (max(before, place.start + rows), *rest)
    return shapes


def canonical(
    config: ModelConfig, source: TensorSource, scheme: Scheme, origin: str
) -> tuple[ModelConfig, TensorSource]:
    """Present the tensors of a source under their canonical names.

    No stored tensor is ignored silently. If the configuration ties the head to the embedding but a
    head is stored as well, the two are compared: equal, the head is a copy; different, it counts,
    and the configuration returned is untied. (Fine-tunes that train the head often forget to say
    so.) Stored RoPE frequencies must be the ones that the configuration implies.

    Args:
        config: The configuration as its file says.
        source: The stored tensors.
        scheme: Whose names they have.
        origin: Names the source in error messages.

    Returns:
        The configuration and its canonical tensors.

    Raises:
        EasySpecError: The tensors are not the ones that the configuration asks for.
    """
    untied = replace(config, tie_word_embeddings=False)
    has_head = places(untied, scheme)[HEAD].name in source.shapes()
    stored = untied if has_head else config
    check_tensors(stored, source, origin, scheme)
    tensors = _named(source, stored, scheme)
    if stored != config:
        if _same_values(Dequantized(tensors), EMBEDDING, HEAD):
            tensors = _named(source, config, scheme)
        else:
            config = untied
    _check_frequencies(config, source, origin)
    return config, tensors


def _named(source: TensorSource, config: ModelConfig, scheme: Scheme) -> "CanonicalSource":
    """Name the tensors of a model, and the scales and offsets of those that are quantized."""
    shapes, dtypes = source.shapes(), source.dtypes()
    found: dict[str, StoredAs] = {}
    expected: dict[str, tuple[int, ...]] = {}
    wanted = expected_shapes(config)
    for name, place in places(config, scheme).items():
        found[name], expected[name] = place, wanted[name]
        if dtypes[place.name] in INTEGERS:
            # A row's scales and offsets lie where the row does: in the same part of a joined
            # tensor, and permuted in the same way.
            for part in (scale_name, offset_name):
                if part(place.name) in shapes:
                    found[part(name)] = replace(place, name=part(place.name))
                    expected[part(name)] = (wanted[name][0], shapes[part(place.name)][1])
    return CanonicalSource(source, found, expected)


def _same_values(source: TensorSource, first: str, second: str) -> bool:
    """Whether two matrices of one shape hold equal numbers, even if in different dtypes."""
    # An embedding takes a gigabyte; both are read block by block, up to the first difference.
    for rows in row_blocks(source.shapes()[first]):
        one = source.read(first, (rows,)).astype(np.float64)
        if not np.array_equal(one, source.read(second, (rows,)).astype(np.float64)):
            return False
    return True


def _check_frequencies(config: ModelConfig, source: TensorSource, origin: str) -> None:
    """Raise EasySpecError if stored RoPE frequencies differ, by more than rounding, from ours."""
    expected = [kind.rope.frequencies() for kind in config.kinds]
    for name in filter(_is_frequencies, source.shapes()):
        stored = source.read(name).astype(np.float32)
        # Half precision keeps 8 to 11 bits, and almost none of the slowest frequencies, which
        # are subnormal in float16.
        is_half = source.dtypes()[name] in ("bfloat16", "float16")
        rtol, atol = (1e-2, 1e-7) if is_half else (1e-4, 0.0)
        if not any(
            stored.shape == own.shape and np.allclose(stored, own, rtol, atol) for own in expected
        ):
            raise EasySpecError(
                f"{origin}: {name} holds RoPE frequencies that do not match the configuration; "
                "correct rope_theta or rope_scaling in config.json, or remove the tensor"
            )


def _is_frequencies(name: str) -> bool:
    return name.endswith(_INV_FREQ)


@dataclass(frozen=True)
class CanonicalSource:
    """Canonical tensors, read from a source with other names, joined tensors or permuted rows.

    Attributes:
        stored: The source.
        places: Where it keeps each canonical tensor.
        expected: The shape of each canonical tensor.
    """

    stored: TensorSource
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
        # Undoing the permutation takes whole heads: with unit = 4, rows 5:7 are read as 4:8.
        first = rows.start // place.unit * place.unit
        last = round_up(rows.stop, place.unit)
        whole = slice(place.start + first, place.start + last)
        values = self.stored.read(place.name, (whole, *window[1:]))
        if place.unit > 1:
            values = unpermute(values, place.unit)
        values = values[rows.start - first : rows.stop - first]
        return values - values.dtype.type(place.offset) if place.offset else values


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of query or key weights from llama.cpp's order into Hugging Face's.

    RoPE rotates channels in pairs. llama.cpp stores the two channels of a pair as neighbours,
    Hugging Face half a head apart.

    Args:
        rows: [heads * head_dim, ...]
        head_dim: Channels of a head.

    Returns:
        The same shape.

    Examples:
        >>> unpermute(np.array(["a0", "b0", "a1", "b1", "a2", "b2"]), head_dim=6).tolist()
        ['a0', 'a1', 'a2', 'b0', 'b1', 'b2']
    """
    # [H * D, ...] -> [H, D / 2, 2, ...] -> [H, 2, D / 2, ...] -> [H * D, ...]
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def check_tensors(
    config: ModelConfig, source: TensorSource, origin: str, scheme: Scheme = "canonical"
) -> None:
    """Check that a source stores exactly the tensors of a configuration.

    Args:
        config: The configuration.
        source: The stored tensors.
        origin: Names the source in error messages.
        scheme: Whose names they have.

    Raises:
        EasySpecError: Tensors are missing, unknown, or of the wrong shape or dtype. The message
            counts them by kind and names up to three of each.
    """
    expected, stored, dtypes = stored_shapes(config, scheme), source.shapes(), source.dtypes()
    missing, unknown, misshapen, mistyped = [], [], [], []
    scales: set[str] = set()  # and offsets
    for name, shape in expected.items():
        if name not in stored:
            missing.append(f"{name} is missing")
            continue
        if stored[name] != shape:
            misshapen.append(f"{name} has shape {stored[name]} instead of {shape}")
        if dtypes[name] in INTEGERS and is_matrix(name, shape):
            scale = scale_name(name)
            scales.add(scale)
            if scale not in stored:
                missing.append(f"{scale} is missing")
            elif not _scales(stored[scale], shape):
                misshapen.append(f"{scale} has shape {stored[scale]} for a matrix of {shape}")
            elif dtypes[scale] != "float32":
                mistyped.append(f"{scale} is stored as {dtypes[scale]} instead of float32")
            if (offset := offset_name(name)) in stored:
                scales.add(offset)
                if stored[offset] != stored.get(scale):
                    misshapen.append(f"{offset} has shape {stored[offset]} unlike its scales")
                elif dtypes[offset] != "float32":
                    mistyped.append(f"{offset} is stored as {dtypes[offset]} instead of float32")
        elif dtypes[name] not in _STORED_DTYPES:
            mistyped.append(f"{name} is stored as {dtypes[name]}, which is not supported")
    for name in stored:
        if name not in expected and name not in scales and not _is_frequencies(name):
            unknown.append(f"{name} is unknown")
    faults = [*_some(missing), *_some(unknown), *_some(misshapen), *_some(mistyped)]
    if faults:
        raise EasySpecError(
            f"{origin}: tensors do not match the configuration: {'; '.join(faults)}"
        )


def _scales(scale: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
    """Whether scales of a shape are those of equal groups of a matrix's columns."""
    rows, inner = matrix
    return len(scale) == 2 and scale[0] == rows and scale[1] > 0 and inner % scale[1] == 0


def _some(faults: list[str]) -> list[str]:
    """The first three faults, and how many more there are."""
    further = len(faults) - 3
    return [*faults[:3], f"and {further} more"] if further > 0 else faults
