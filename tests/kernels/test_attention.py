"""attend() agrees with the plain path, in Pallas' interpreter."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from easyspec_jax.kernels.attention import attend
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.cache import KVCache
from tests.kernels.cases import Case

CASES = [
    Case(),
    Case(slots=1, tokens=64),  # 128 queries of a key head: two programs
    Case(slots=3, group=3, kv_heads=3, tokens=6, tree=True),
    Case(starts=(0, 40), tokens=5, tree=True),
    Case(starts=(7, 0, 90), head_dim=32, capacity=100),  # no whole number of tiles
    Case(slots=4, group=1, head_dim=128, tokens=2, starts=(120,)),
    Case(starts=(3, 300), tokens=5, tree=True, capacity=320, sliding=40),  # from another tile on
    Case(slots=1, head_dim=256, kv_heads=1, group=1, tokens=2, starts=(60,)),
]


def queries(case: Case) -> Array:
    rows = len(case.starts) * case.kv_heads
    return case.normal(9, case.slots, rows, case.group * case.tokens, case.head_dim)


def kernel(case: Case, splits: int | None = None) -> np.ndarray:
    mixed = attend(
        queries(case), *case.cache()[:2], case.window().mask, splits=splits, interpret=True
    )
    assert mixed.dtype == jnp.dtype(case.dtype)
    return np.asarray(mixed.astype(jnp.float32))


def plain(case: Case) -> np.ndarray:
    window = case.window()

    def call(attention: Attention, q: Array, cache: KVCache) -> Array:
        q = q.reshape(len(case.starts), -1, case.tokens, case.head_dim)
        return attention.attend(q, cache, window)

    mixed = jax.jit(jax.vmap(call))(case.attention(), queries(case), case.cache())
    return np.asarray(mixed.astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_agrees_with_the_plain_path(case, dtype):
    case = replace(case, dtype=dtype)
    case.assert_close(kernel(case), plain(case))


@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_any_number_of_splits_gives_the_same(splits):
    """With 16 splits of a text of three tiles, most have nothing to read."""
    case = Case(slots=1, starts=(0, 150), tokens=3, capacity=256, tree=True)
    case.assert_close(kernel(case, splits), plain(case))


def test_what_no_token_reads_is_not_read():
    """Zero times nan is nan, so values of masked entries must not even be multiplied by zero."""
    case = Case(starts=(3, 150), capacity=192, sliding=20)
    k, v = case.cache()[:2]
    entries, start = jnp.arange(192)[None, :], jnp.repeat(jnp.array(case.starts), 2)[:, None]
    # The tile in which a window begins is loaded whole: entry 131 is in that from 128 on.
    unread = (entries > start) | (entries < (start - 19) // 64 * 64)
    k, v = (jnp.where(unread[None, :, :, None], np.nan, x) for x in (k, v))
    mixed = attend(queries(case), k, v, case.window().mask, interpret=True)
    np.testing.assert_array_equal(np.asarray(mixed), kernel(case))
