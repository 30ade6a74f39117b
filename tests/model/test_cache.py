import jax.numpy as jnp
import numpy as np

from easyspec_jax.model.cache import KVCache, write


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
