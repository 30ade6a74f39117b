from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.model.cache import KVCache, move, write

HEADS, CAPACITY, WIDTH = 2, 6, 3
STARTS = MappingProxyType({1: [3], 2: [0, 3]})
"""First entry of each row, by the number of rows; a single row is a code path of its own."""


def counted(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("rows", STARTS)
@pytest.mark.parametrize("slot", [None, 0, 2])
@pytest.mark.parametrize("mask", [None, True, False])
def test_each_row_is_written_at_its_own_place(rows, slot, mask):
    """Only the layer asked for changes, and nothing where the mask is false."""
    layers = () if slot is None else (3,)
    k, new = counted(*layers, rows, HEADS, CAPACITY, WIDTH), -1 - counted(rows, HEADS, 2, WIDTH)
    expected = k.copy()
    for row, start in enumerate(STARTS[rows]):
        if mask is not False:
            layer = expected if slot is None else expected[slot]
            layer[row, :, start : start + 2] = new[row]
    cache = KVCache(*(jnp.asarray(x.reshape(*layers, -1, CAPACITY, WIDTH)) for x in (k, 1 - k)))
    scalar = None if mask is None else jnp.asarray(mask)
    start = jnp.array(STARTS[rows], jnp.int32)
    written = write(cache, jnp.asarray(new), jnp.asarray(1 - new), start, slot, scalar)
    np.testing.assert_array_equal(written.k, expected.reshape(cache.k.shape))
    np.testing.assert_array_equal(written.v, 1 - expected.reshape(cache.k.shape))


@pytest.mark.parametrize("rows", STARTS)
@pytest.mark.parametrize("layers", [(), (3,), (2, 3)], ids=str)
def test_each_row_moves_entries_of_its_own(rows, layers):
    """All entries are read before any is written, in every layer of a stack."""
    k = counted(*layers, rows, HEADS, CAPACITY, WIDTH)
    source, start = (
        np.array([[4, 0, 5], [4, 4, 1]], np.int32)[:rows],
        np.array(STARTS[rows], np.int32),
    )
    expected = k.copy()
    for row, (entries, at) in enumerate(zip(source, start, strict=True)):
        expected[..., row, :, at : at + 3, :] = k[..., row, :, :, :][..., entries, :]
    cache = KVCache(*(jnp.asarray(x.reshape(*layers, -1, CAPACITY, WIDTH)) for x in (k, -k)))
    moved = move(cache, jnp.asarray(source), jnp.asarray(start))
    np.testing.assert_array_equal(moved.k, expected.reshape(cache.k.shape))
    np.testing.assert_array_equal(moved.v, -expected.reshape(cache.k.shape))
