"""int4 matrices are packed into half their bytes and read back, window by window."""

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convert.orbax import OrbaxStore
from easyspec_jax.checkpoint.int4 import PACKED, pack, unpack
from easyspec_jax.checkpoint.orbax import OrbaxSource
from easyspec_jax.errors import EasySpecError

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda half: 2 * half))


@given(SHAPES.flatmap(lambda shape: arrays(np.int8, shape, elements=st.integers(-8, 7))))
def test_unpacking_undoes_packing(values):
    packed = pack(values.astype(ml_dtypes.int4))
    assert packed.nbytes * 2 == values.size
    np.testing.assert_array_equal(unpack(packed).astype(np.int8), values)


def saved(directory: Path, values: np.ndarray) -> OrbaxSource:
    store = OrbaxStore(directory, {"w": values.shape}, "int4")
    store.write("w", 0, values)
    store.finish()
    return OrbaxSource(directory / "weights")


def test_every_window_is_that_part_of_the_whole(tmp_path):
    values = np.random.default_rng(0).integers(-8, 8, (5, 6)).astype(ml_dtypes.int4)
    source = saved(tmp_path, values)
    assert source.shapes() == {"w": (5, 6)}
    assert source.dtypes() == {"w": "int4"}
    rows = [slice(*each) for each in itertools.combinations_with_replacement(range(6), 2)]
    columns = [slice(*each) for each in itertools.combinations_with_replacement(range(7), 2)]
    for window in [(), *((each,) for each in rows), *itertools.product(rows, columns)]:
        read = source.read("w", window)
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read, values[window], err_msg=str(window))


def test_an_odd_number_of_columns_is_refused(tmp_path):
    with pytest.raises(EasySpecError, match="w has 5 columns, and int4 needs an even number"):
        OrbaxStore(tmp_path, {"w": (4, 5)}, "int4")


def test_a_matrix_that_is_stored_twice_is_refused(tmp_path):
    shapes = {"w": (4, 2), "w" + PACKED: (4, 1)}
    store = OrbaxStore(tmp_path, shapes, {"w": "int8", "w" + PACKED: "uint8"})
    store.write("w", 0, np.zeros((4, 2), np.int8))
    store.write("w" + PACKED, 0, np.zeros((4, 1), np.uint8))
    store.finish()
    with pytest.raises(EasySpecError, match="w is stored twice"):
        OrbaxSource(tmp_path / "weights")
