"""project_and_write() agrees with the plain path, in Pallas' interpreter."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array

from easyspec_jax.kernels import tiles
from easyspec_jax.kernels.projection import project_and_write, project_out, supports
from easyspec_jax.model.attention import Attention, rotate
from easyspec_jax.model.cache import KVCache, write
from easyspec_jax.model.matrix import Matrix
from tests.kernels.cases import EPS, Case

CASES = [
    Case(),
    Case(slots=1, tokens=64),
    Case(slots=3, group=3, kv_heads=3, hidden=192, tokens=6),
    Case(starts=(0, 40), tokens=5, bias=True),
    Case(starts=(7, 0, 90), head_norms=True, head_dim=32),
    Case(slots=4, group=1, head_dim=128, bias=True, head_norms=True, tokens=2),
    Case(starts=(3, 9), tokens=40, kv_heads=1),  # 80 rows: two programs a head
    Case(padding_heads=1, tokens=3),
]


def kernel(case: Case) -> tuple[Array, tuple[Array, Array]]:
    window = case.window()
    return project_and_write(
        case.h(),
        case.weights(),
        case.cache()[:2],
        window.start,
        (window.cos, window.sin),
        kv_heads=case.kv_heads,
        eps=EPS,
        interpret=True,
    )


def plain(case: Case) -> tuple[Array, KVCache]:
    h, window = case.h(), case.window()

    def call(attention: Attention, cache: KVCache) -> tuple[Array, KVCache]:
        q, k, v = attention.heads(attention.qkv(h))
        # [batch, kv_heads * group, tokens, head_dim] -> [batch * kv_heads, group * tokens, ...]
        q = rotate(q, window).reshape(-1, case.group * case.tokens, case.head_dim)
        return q, write(cache, rotate(k, window), v, window.start)

    return jax.jit(jax.vmap(call))(case.attention(), case.cache())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_agrees_with_the_plain_path(case, dtype):
    case = replace(case, dtype=dtype)
    got, expected = kernel(case), plain(case)
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.dtype(dtype)] * 3
    wide = [[x.astype(jnp.float32) for x in jax.tree.leaves(tree)] for tree in (got, expected)]
    jax.tree.map(case.assert_close, *wide)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "slots, batch, tokens, hidden, inner", [(2, 1, 1, 64, 96), (1, 2, 40, 96, 64)]
)
def test_the_product_by_output_matrices(slots, batch, tokens, hidden, inner, dtype):
    case = Case(dtype=dtype)
    x = case.normal(0, slots, batch, tokens, inner)
    matrix = case.normal(1, slots, hidden, inner, scale=inner**-0.5)
    got, expected = (
        project_out(x, matrix, interpret=True),
        jax.vmap(lambda m, x: m(x))(Matrix(matrix), x),
    )
    assert got.dtype == expected.dtype
    case.assert_close(got.astype(jnp.float32), expected.astype(jnp.float32))


@settings(max_examples=10, deadline=None)
@given(starts=st.tuples(st.integers(0, 15), st.integers(0, 15)))
def test_other_entries_keep_every_bit(starts):
    """A start past the last one that fits is moved back, as the plain path moves it."""
    case = Case(starts=starts, tokens=4, capacity=16, head_dim=32)
    _, got = kernel(case)
    for before, after in zip(case.cache()[:2], got, strict=True):
        before, after = (np.asarray(x.reshape(2, 2, 2, 16, 32)) for x in (before, after))
        for row, start in enumerate(starts):
            changed = (before != after)[:, row].any(axis=(0, 1, 3))
            first = min(start, 12)
            assert np.flatnonzero(changed).tolist() == list(range(first, first + 4))


def test_what_it_leaves_to_the_plain_path(monkeypatch):
    assert supports(576, 64, jnp.bfloat16)
    assert not supports(576, 96, jnp.bfloat16)  # not a power of two
    assert not supports(576, 16, jnp.bfloat16)  # half a head is no tile
    assert not supports(600, 64, jnp.bfloat16)  # not whole tiles of 32
    assert not supports(576, 64, jnp.float16)
    monkeypatch.setattr(tiles, "triton", None)  # a JAX without it
    assert not supports(576, 64, jnp.bfloat16)
