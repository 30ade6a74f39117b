"""Any slice of a tensor equals that part of the whole, and reads only the bytes of that part."""

import itertools
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.orbax import OrbaxStore
from easyspec_jax.checkpoint.orbax import OrbaxSource
from easyspec_jax.checkpoint.safetensors import SAFETENSORS, SafetensorsSource
from easyspec_jax.checkpoint.tensors import TensorSource
from easyspec_jax.errors import EasySpecError

SHAPE = (6, 5)
RANGES = [slice(*bounds) for bounds in itertools.combinations_with_replacement(range(6), 2)]


@pytest.fixture(params=["safetensors", "orbax"])
def opened(request, tmp_path) -> tuple[TensorSource, np.ndarray]:
    values = np.random.default_rng(0).normal(size=SHAPE).astype(ml_dtypes.bfloat16)
    if request.param == "safetensors":
        save_file({"pad": np.zeros(3, np.int8), "w": values}, tmp_path / SAFETENSORS)
        return SafetensorsSource(tmp_path), values
    store = OrbaxStore(tmp_path, {"w": SHAPE}, "bfloat16")
    store.write("w", 0, values)
    store.finish()
    return OrbaxSource(tmp_path / "weights"), values


def test_every_window_is_that_part_of_the_whole(opened):
    source, values = opened
    windows = [(), *((rows,) for rows in RANGES), *itertools.product(RANGES, RANGES)]
    for window in windows:
        read = source.read("w", window)
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read, values[window], err_msg=str(window))


def test_a_window_costs_its_own_bytes(tmp_path, monkeypatch):
    save_file({"w": np.zeros((64, 64), np.float32)}, tmp_path / SAFETENSORS)
    source, counted, preadv = SafetensorsSource(tmp_path), [], os.preadv

    def count(file, buffers, offset):
        counted.append(preadv(file, buffers, offset))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", count)
    source.read("w", (slice(8, 16), slice(16, 24)))
    assert (sum(counted), len(counted)) == (8 * 8 * 4, 8)
    counted.clear()
    source.read("w", (slice(8, 16),))
    assert counted == [8 * 64 * 4]


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    save_file({"w": np.zeros(64, np.float32)}, tmp_path / SAFETENSORS)
    source = SafetensorsSource(tmp_path)
    os.truncate(tmp_path / SAFETENSORS, 100)
    with pytest.raises(EasySpecError, match="ends too early"):
        source.read("w")


def write_header(directory: Path, header: object, data: int = 0) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / SAFETENSORS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 8),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            4,
        ),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, 4),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4),
        ({"a": {"dtype": "F32", "shape": [1e0], "data_offsets": [0, 4]}}, 4),
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, 4),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4, 5]}}, 4),
        ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
        ({"a": 3}, 0),
        ([], 0),
        (
            b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, '
            b'"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
            0,
        ),
        (b"[" * 200_000, 0),
        (b"\xff\xfe", 0),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, data):
    write_header(tmp_path, header, data)
    with pytest.raises(EasySpecError, match=r"model\.safetensors is truncated or damaged") as error:
        SafetensorsSource(tmp_path)
    assert "\n" not in str(error.value)
