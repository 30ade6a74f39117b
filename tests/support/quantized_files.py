"""Tiny quantized checkpoints, packed here by the formulas that their formats publish."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.quantized import Dequantized, offset_name, scale_name
from easyspec_jax.checkpoint.safetensors import SAFETENSORS, write_safetensors
from easyspec_jax.checkpoint.tensors import TensorSource

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 32,
    "torch_dtype": "float16",
}
GROUP = 32
UP = "model.layers.0.mlp.up_proj."
"""A module of 96 rows and 64 columns."""

Tensors = dict[str, np.ndarray]


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes along the last axis into int32, the first code in the lowest bits."""
    count = 32 // bits
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)]
    padded = np.pad(codes.astype(np.uint64), padding)
    total = sum(padded[..., place::count] << np.uint64(bits * place) for place in range(count))
    return np.asarray(total).astype(np.uint32).view(np.int32)


def quantized_model(
    parts: Callable[[np.random.Generator, str, tuple[int, int]], tuple[Tensors, np.ndarray]],
) -> tuple[Tensors, Tensors]:
    """Make a model whose layers' matrices are stored in parts.

    parts: makes the parts of a module and the matrix that they stand for, in float32.

    Returns:
        The tensors to store, and those that they stand for.
    """
    random = np.random.default_rng(0)
    stored: Tensors = {}
    exact: Tensors = {}
    for name, shape in expected_shapes(model_config(CONFIG)).items():
        if name.endswith("_proj.weight"):
            made, exact[name] = parts(random, name.removesuffix("weight"), (shape[0], shape[1]))
            stored |= made
        else:
            stored[name] = exact[name] = random.normal(size=shape).astype(np.float16)
    return stored, exact


def write(directory: Path, tensors: Mapping[str, np.ndarray], settings: Any) -> TensorSource:
    """Write a checkpoint and open it."""
    directory.mkdir(exist_ok=True)
    config = CONFIG | {"quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / SAFETENSORS, tensors.items())
    return open_checkpoint(directory).source


def assert_stands_for(
    source: TensorSource, exact: Tensors, dtype: str, *, has_offsets: bool = False
) -> None:
    """Check the type of a source's matrices, and every number, whole and window by window."""
    floats = Dequantized(source)
    assert floats.shapes() == {name: values.shape for name, values in exact.items()}
    for name, values in exact.items():
        np.testing.assert_array_equal(floats.read(name), values, err_msg=name)
        if not name.endswith("_proj.weight"):
            continue
        assert source.dtypes()[name] == dtype
        assert source.read(name).dtype == dtype
        parts = {name, scale_name(name), offset_name(name)} & source.shapes().keys()
        assert (offset_name(name) in parts) == has_offsets
        for each in parts:
            assert_windows(source, each)


def assert_windows(source: TensorSource, name: str) -> None:
    """Check that windows, empty ones included, are parts of the whole."""
    whole = source.read(name)
    assert whole.shape == source.shapes()[name]
    columns = slice(whole.shape[1] // 3, whole.shape[1] // 3 + 1 + whole.shape[1] // 2)
    for rows in (slice(0, 1), slice(3, 21), slice(9, 9), slice(13, 32)):
        np.testing.assert_array_equal(source.read(name, (rows,)), whole[rows])
        for part in (columns, slice(0, 0)):
            np.testing.assert_array_equal(source.read(name, (rows, part)), whole[rows, part])
