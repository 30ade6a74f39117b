from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.model.cache import (
    KVCache,
    empty,
    extend,
    move,
    put_row,
    quantize,
    take_row,
    write,
)

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


def quantized(layers: tuple[int, ...], rows: int) -> KVCache:
    """Return a quantized cache full of different numbers, as a stack of layers if there are any."""
    entries = np.random.default_rng(0).normal(size=(2, *layers, rows * HEADS, CAPACITY, WIDTH))
    (k, k_scale), (v, v_scale) = map(quantize, jnp.asarray(entries, jnp.float32))
    return KVCache(k, v, k_scale, v_scale)


def dequantized(cache: KVCache) -> KVCache:
    """Return the floats that a quantized cache stands for."""
    assert cache.k_scale is not None and cache.v_scale is not None
    k, v = (x.astype(jnp.float32) for x in (cache.k, cache.v))
    return KVCache(k * cache.k_scale, v * cache.v_scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_entries_are_rounded_to_half_a_step_of_their_own(dtype):
    """Entries of very different sizes, among them one of zeros, do not disturb each other."""
    sizes = np.array([1e-3, 1.0, 0.0, 300.0])[:, None]
    x = jnp.asarray(sizes * np.random.default_rng(0).normal(size=(4, 64)), dtype)
    values, scale = quantize(x)
    assert values.dtype == jnp.int8 and scale.dtype == jnp.float32 and scale.shape == (4, 1)
    wide = np.asarray(x.astype(jnp.float32))
    np.testing.assert_allclose(scale[:, 0], np.abs(wide).max(1) / 127, rtol=1e-6)
    assert np.abs(values).max(axis=1).tolist() == [127, 127, 0, 127]
    error = np.abs(np.asarray(values, np.float32) * np.asarray(scale) - wide)
    assert (error <= np.asarray(scale) * (0.5 + 1e-4)).all()
    for entry, one in zip(x, values, strict=True):
        np.testing.assert_array_equal(quantize(entry)[0], one)


def test_an_entry_that_is_no_number_stays_none():
    values, scale = quantize(jnp.array([[1.0, jnp.nan], [1.0, jnp.inf], [1.0, 0.5]]))
    sums = jnp.sum(values.astype(jnp.float32) * scale, axis=1)
    assert np.isfinite(sums).tolist() == [False, False, True]


@pytest.mark.parametrize("rows", STARTS)
@pytest.mark.parametrize("layers, slot", [((), None), ((3,), None), ((3,), 2)])
@pytest.mark.parametrize("mask", [None, True, False])
def test_a_quantized_cache_is_written_like_one_of_floats(rows, layers, slot, mask):
    """Old entries keep their integers and scales; new ones are those of `quantize`."""
    cache, start = quantized(layers, rows), jnp.array(STARTS[rows], jnp.int32)
    stacked = layers if slot is None else ()
    new = jnp.asarray(np.random.default_rng(1).normal(size=(2, *stacked, rows, HEADS, 2, WIDTH)))
    k, v = new.astype(jnp.float32)
    scalar = None if mask is None else jnp.asarray(mask)
    written = write(cache, k, v, start, slot, scalar)
    (k_values, k_scale), (v_values, v_scale) = quantize(k), quantize(v)
    rounded = dequantized(KVCache(k_values, v_values, k_scale, v_scale))
    expected = write(dequantized(cache), rounded.k, rounded.v, start, slot, scalar)
    jax.tree.map(np.testing.assert_array_equal, dequantized(written), expected)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), written, cache)


@pytest.mark.parametrize("rows", STARTS)
@pytest.mark.parametrize("layers", [(), (3,)], ids=str)
def test_scales_go_where_their_entries_go(rows, layers):
    cache, start = quantized(layers, rows), jnp.array(STARTS[rows], jnp.int32)
    source = jnp.array([[4, 0, 5], [4, 4, 1]], jnp.int32)[:rows]
    same(move(cache, source, start), move(dequantized(cache), source, start))
    same(extend(cache, CAPACITY + 3), extend(dequantized(cache), CAPACITY + 3))
    row = jnp.int32(rows - 1)
    own = take_row(cache, row, rows)
    same(own, take_row(dequantized(cache), row, rows))
    other = jax.tree.map(lambda x: x[..., ::-1, :], own)
    put = put_row(dequantized(cache), dequantized(other), row, rows)
    same(put_row(cache, other, row, rows), put)


def same(cache: KVCache, expected: KVCache) -> None:
    """Assert that a quantized cache stands for exactly these floats."""
    jax.tree.map(np.testing.assert_array_equal, dequantized(cache), expected)


def test_an_empty_quantized_cache_stands_for_zeros():
    cache = empty(4, CAPACITY, WIDTH, "int8")
    assert cache.is_quantized and not empty(4, CAPACITY, WIDTH, "bfloat16").is_quantized
    assert cache.k.dtype == jnp.int8 and cache.capacity == CAPACITY
    same(cache, empty(4, CAPACITY, WIDTH, np.float32))
