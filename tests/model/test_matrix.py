"""Products by quantized matrices agree with products by the floats that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.checkpoint.rounding import quantize
from easyspec_jax.model import matrix as module
from easyspec_jax.model.matrix import FEW_TOKENS, Matrix, bytes_in_memory

OUT, INNER = 24, 64


def _case(dtype: str, group: int) -> tuple[Matrix, np.ndarray]:
    """Return a quantized matrix, and the floats it stands for."""
    weight = np.random.default_rng(group).normal(size=(OUT, INNER)).astype(np.float32)
    values, scale = quantize(weight, dtype, group)
    floats = values.astype(np.float32) * np.repeat(scale, group, axis=1)
    return Matrix(jnp.asarray(values), jnp.asarray(scale)), floats


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("dtype, group", [("int8", INNER), ("int8", 16), ("int4", 32)])
def test_a_product_is_that_of_the_floats(dtype, group, tokens):
    matrix, floats = _case(dtype, group)
    x = np.random.default_rng(1).normal(size=(2, tokens, INNER)).astype(np.float32)
    got = jax.jit(matrix)(x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, x @ floats.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, group", [("int8", INNER), ("int4", 16)])
def test_offsets_are_added_to_every_column_of_a_group(dtype, group):
    matrix, floats = _case(dtype, group)
    assert matrix.scale is not None
    offset = np.random.default_rng(2).normal(size=matrix.scale.shape).astype(np.float32)
    floats = floats + np.repeat(offset, group, axis=1)
    matrix = Matrix(matrix.values[...], matrix.scale[...], jnp.asarray(offset))
    x = np.random.default_rng(1).normal(size=(2, 3, INNER)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(matrix)(x), x @ floats.T, rtol=1e-5, atol=1e-5)
    found = matrix.rows(jnp.asarray([[3, 0, 23]], jnp.int32), jnp.float32)
    np.testing.assert_allclose(found, floats[np.array([[3, 0, 23]])], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit, block", [(1, 1), (7, 6), (10, 8), (12, 12), (24, 24)])
def test_many_tokens_are_multiplied_by_even_blocks_of_outputs(monkeypatch, limit, block):
    """With room for 7 of 24 outputs at a time, there are four blocks of 6."""
    matrix, floats = _case("int4", 16)
    tokens = FEW_TOKENS // 2 + 1  # in each of two rows
    monkeypatch.setattr(module, "_FLOATS", limit * INNER)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, tokens, INNER)), jnp.float32)
    whole = jnp.stack([matrix(x[:, token : token + 1])[:, 0] for token in range(tokens)], axis=1)
    assert bytes_in_memory(OUT, INNER, 4, 2 * tokens, jnp.float32) == 4 * block * INNER
    np.testing.assert_allclose(jax.jit(matrix)(x), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole, x @ floats.T, rtol=1e-5, atol=1e-5)


def test_the_last_block_overlaps_the_one_before_where_blocks_are_uneven(monkeypatch):
    """24 outputs in five blocks of 5 are one output too many."""
    matrix, floats = _case("int8", 16)
    monkeypatch.setattr(module, "_FLOATS", 5 * INNER)
    x = np.random.default_rng(1).normal(size=(1, FEW_TOKENS + 1, INNER)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(matrix)(x), x @ floats.T, rtol=1e-5, atol=1e-5)


def test_floats_of_a_matrix_are_never_all_in_memory(monkeypatch):
    """All would be 4 MiB, and the sums of 64 groups for 256 tokens 32 MiB."""
    monkeypatch.setattr(module, "_FLOATS", 1 << 17)
    matrix = Matrix(jnp.zeros((512, 2048), jnp.int4), jnp.zeros((512, 64)))
    compiled = jax.jit(matrix.__call__).lower(jnp.zeros((1, 256, 2048))).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 4 << 20


@pytest.mark.parametrize("dtype, group", [("int8", INNER), ("int4", 16)])
def test_sums_are_float32_and_results_in_the_type_asked_for(dtype, group):
    matrix, floats = _case(dtype, group)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, INNER)), jnp.bfloat16)
    expected = np.asarray(x, np.float32) @ floats.T
    precise = matrix(x, jnp.float32)
    assert precise.dtype == jnp.float32 and matrix(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(precise, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(matrix(x), precise.astype(jnp.bfloat16))


def test_bfloat16_matrices_multiply_float32_tokens_exactly():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(OUT, INNER)), jnp.bfloat16)
    x = np.random.default_rng(1).normal(size=(1, 3, INNER)).astype(np.float32)
    expected = Matrix(weight.astype(jnp.float32))(jnp.asarray(x))
    np.testing.assert_array_equal(Matrix(weight)(jnp.asarray(x)), expected)


@pytest.mark.parametrize("dtype, group", [("int8", INNER), ("int8", 16), ("int4", 32)])
def test_rows_are_those_of_the_floats(dtype, group):
    matrix, floats = _case(dtype, group)
    numbers = jnp.asarray([[3, 0, 23]], jnp.int32)
    found = matrix.rows(numbers, jnp.float32)
    np.testing.assert_allclose(found, floats[np.asarray(numbers)], rtol=1e-6)
    assert matrix.rows(numbers, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("group", [INNER, 16])
def test_a_single_token_may_be_multiplied_as_one_of_two(group, shape):
    plain, _ = _case("int8", group)
    assert plain.scale is not None
    offset = jnp.ones_like(plain.scale[...])
    arrays = plain.values[...], plain.scale[...], offset
    plain, paired = Matrix(*arrays), Matrix(*arrays, pairs=True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*shape, INNER)), jnp.float32)
    np.testing.assert_allclose(jax.jit(paired)(x), plain(x), rtol=1e-5, atol=1e-5)
    numbers = jnp.full(shape, 3, jnp.int32)
    found = jax.jit(lambda numbers: paired.rows(numbers, jnp.float32))(numbers)
    np.testing.assert_array_equal(found, plain.rows(numbers, jnp.float32))
    assert ("optimization_barrier" in str(jax.make_jaxpr(paired)(x))) == (shape == (1, 1))


@pytest.mark.parametrize(
    ("batch", "tokens", "many"),
    [(1, 1, 1), (1, 4, 4), (1, 6, 8), (3, 2, 8), (1, 8, 8), (1, 11, 16), (2, 7, 16), (1, 17, 17)],
)
def test_few_tokens_may_be_multiplied_as_eight_or_sixteen(batch, tokens, many):
    random = np.random.default_rng(1)
    values = jnp.asarray(random.normal(size=(24, INNER)), jnp.float32)
    x = jnp.asarray(random.normal(size=(batch, tokens, INNER)), jnp.float32)
    filled = Matrix(values, fills=True)
    np.testing.assert_allclose(filled(x), Matrix(values)(x), rtol=1e-5, atol=1e-5)
    product = next(
        line for line in str(jax.make_jaxpr(filled)(x)).splitlines() if "dot_general" in line
    )
    assert f"f32[24,{batch},{many}]" in product or f"f32[24,1,{many}]" in product


def test_a_stack_of_matrices_is_one_for_each_slot():
    plain = _case("int8", INNER)[0]
    assert plain.scale is not None
    scale = plain.scale[...]
    one, other = (Matrix(plain.values[...], scale, offset) for offset in (scale, -3 * scale))
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, other)
    x = jnp.ones((2, 1, 3, INNER))
    got = jax.vmap(lambda matrix, x: matrix(x))(stack, x)
    np.testing.assert_allclose(got[1], other(x[1]), rtol=1e-6)
    assert np.abs(got[1] - got[0]).max() > 1


@pytest.mark.parametrize("tokens", [3, 100])
def test_offsets_are_not_rounded_where_products_are(tokens):
    """ "default" would round both factors to bfloat16 on a TPU, as it may for integers."""
    matrix, _ = _case("int8", 16)
    assert matrix.scale is not None
    own = Matrix(matrix.values[...], matrix.scale[...], matrix.scale[...])
    with jax.default_matmul_precision("default"):
        jaxpr = str(jax.make_jaxpr(own.__call__)(jnp.ones((1, tokens, INNER), jnp.bfloat16)))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert jaxpr.count("HIGHEST") == 2  # of both factors of one


@pytest.mark.parametrize("fused", [False, True])
def test_a_slot_of_a_stack_keeps_its_offsets(fused):
    matrix, _ = _case("int8", 16)
    assert matrix.scale is not None
    offset = np.random.default_rng(2).normal(size=matrix.scale.shape).astype(np.float32)
    arrays = matrix.values[...], matrix.scale[...], jnp.asarray(offset)
    stacks = [jnp.stack([jnp.zeros_like(x), x]) for x in arrays]
    stack = Matrix(*stacks, fused=fused, interpret=True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, INNER)), jnp.float32)
    np.testing.assert_allclose(stack.at(1)(x), Matrix(*arrays)(x), rtol=1e-5, atol=1e-5)
