import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.model.cache import KVCache, move, write


def _filled(value: float, tokens: int) -> jnp.ndarray:
    return jnp.full((2, 1, tokens, 3), value, jnp.float32)


def test_each_row_is_written_at_its_own_place():
    cache = KVCache(_filled(0, 6), _filled(0, 6))
    written = write(cache, _filled(1, 2), _filled(2, 2), jnp.array([0, 3], jnp.int32))
    assert np.asarray(written.k[:, 0, :, 0]).tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert np.asarray(written.v[:, 0, :, 0]).tolist() == [[2, 2, 0, 0, 0, 0], [0, 0, 0, 2, 2, 0]]


def test_a_device_that_is_not_in_turn_keeps_what_it_has():
    cache = KVCache(_filled(7, 6), _filled(8, 6))
    written = write(cache, _filled(1, 2), _filled(2, 2), jnp.array([0, 3], jnp.int32), where=jnp.asarray(False))
    assert np.array_equal(written.k, cache.k)
    assert np.array_equal(written.v, cache.v)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_each_row_moves_entries_of_its_own(leading):
    """All of them are read before any is written; layers of one group are stacked in front of the rows."""
    k = np.arange(np.prod([*leading, 2, 2, 6, 3]), dtype=np.float32).reshape(*leading, 2, 2, 6, 3)
    source, start = np.array([[1, 0, 5], [4, 4, 1]], np.int32), np.array([0, 2], np.int32)
    moved = move(KVCache(jnp.asarray(k), jnp.asarray(-k)), jnp.asarray(source), jnp.asarray(start))
    expected = k.copy()
    for row, (entries, at) in enumerate(zip(source, start, strict=True)):
        expected[..., row, :, at : at + 3, :] = k[..., row, :, :, :][..., entries, :]
    np.testing.assert_array_equal(moved.k, expected)
    np.testing.assert_array_equal(moved.v, -expected)
