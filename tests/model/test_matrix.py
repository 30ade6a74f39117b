"""Products by quantized matrices agree with products by the floats that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.checkpoint.quantized import quantize
from easyspec_jax.model.matrix import Matrix

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


def test_a_stack_of_matrices_is_one_for_each_slot():
    one, other = _case("int8", INNER)[0], _case("int8", INNER)[0]
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, other)
    x = jnp.ones((2, 1, 3, INNER))
    got = jax.vmap(lambda matrix, x: matrix(x))(stack, x)
    np.testing.assert_allclose(got[1], other(x[1]), rtol=1e-6)
