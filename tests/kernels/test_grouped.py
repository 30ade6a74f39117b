"""grouped.multiply() agrees with the plain path, in Pallas' interpreter."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from easyspec_jax.kernels import grouped
from easyspec_jax.kernels.grouped import GROUPS, MAX_TOKENS, output_tile, supports
from easyspec_jax.kernels.tiles import estimate
from easyspec_jax.model.matrix import FEW_TOKENS, Matrix


@dataclass(frozen=True)
class Product:
    """Random integers with scales, and the tokens that they multiply."""

    out: int = 48
    group: int = 32
    groups: int = 3
    batch: int = 1
    tokens: int = 6
    values: str = "int4"
    dtype: str = "float32"
    has_offsets: bool = False

    def matrix(self, fused: bool) -> Matrix:
        random, most = np.random.default_rng(0), {"int4": 8, "int8": 128}[self.values]
        values = random.integers(-most, most, (self.out, self.group * self.groups))
        scale = random.normal(size=(self.out, self.groups)).astype(np.float32) / most
        offset = random.normal(size=scale.shape).astype(np.float32) if self.has_offsets else None
        arrays = jnp.asarray(values, self.values), *jax.tree.map(jnp.asarray, (scale, offset))
        return Matrix(*arrays, fused=fused, interpret=True)

    def x(self) -> Float[Array, "batch tokens inner"]:
        shape = self.batch, self.tokens, self.group * self.groups
        return jnp.asarray(np.random.default_rng(1).normal(size=shape), self.dtype)


def is_kernel(matrix: Matrix, x: Array) -> bool:
    """Return whether a product runs the kernel."""
    return "pallas_call" in str(jax.make_jaxpr(matrix.__call__)(x))


def assert_same(matrix: Matrix, reference: Matrix, x: Array) -> None:
    """Compare products in float32, where both sum exact terms but in another order."""
    assert is_kernel(matrix, x) and not is_kernel(reference, x)
    got, expected = (jax.jit(lambda x, of=of: of(x, jnp.float32))(x) for of in (matrix, reference))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "product",
    [
        {"tokens": 1},
        {"tokens": 6, "group": 64},
        {"tokens": 21, "group": 128},
        {"tokens": 64, "out": 16},
        {"batch": 3, "tokens": 5, "out": 80},  # neither divides a tile of 64
        {"tokens": 6, "values": "int8"},
        {"tokens": 6, "has_offsets": True},
        {"batch": 3, "tokens": 5, "out": 80, "has_offsets": True},
    ],
    ids=str,
)
def test_it_agrees_with_the_plain_path(product, dtype):
    product = Product(**product, dtype=dtype)
    assert_same(product.matrix(True), product.matrix(False), product.x())


def test_large_tiles(monkeypatch):
    monkeypatch.setattr(grouped, "PROGRAMS", 2)
    product = Product(out=192)
    assert output_tile(product.out) == 64
    assert_same(product.matrix(True), product.matrix(False), product.x())


def test_scales_of_another_group_are_noticed():
    product = Product()
    matrix = product.matrix(True)
    assert matrix.scale is not None
    wrong = Matrix(
        matrix.values[...], jnp.roll(matrix.scale[...], 1, axis=1), fused=True, interpret=True
    )
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_same(wrong, product.matrix(False), product.x())


def test_offsets_of_another_group_are_noticed():
    product = Product(has_offsets=True)
    matrix = product.matrix(True)
    assert matrix.scale is not None and matrix.offset is not None
    rolled = jnp.roll(matrix.offset[...], 1, axis=1)
    wrong = Matrix(matrix.values[...], matrix.scale[...], rolled, fused=True, interpret=True)
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_same(wrong, product.matrix(False), product.x())


def test_a_stack_of_matrices_is_one_for_each_slot():
    product = Product(has_offsets=True)
    one, x = product.matrix(True), product.x()
    assert one.scale is not None and one.offset is not None
    values = jnp.stack([one.values[...]] * 2)
    by_group = (jnp.stack([each, -each]) for each in (one.scale[...], one.offset[...]))
    stack = Matrix(values, *by_group, fused=True, interpret=True)
    expected = np.asarray(one(x))
    got = jax.vmap(lambda matrix: matrix(x))(stack)
    np.testing.assert_allclose(got, [expected, -expected], rtol=1e-6)


@pytest.mark.parametrize(
    "product",
    [
        Product(),
        Product(has_offsets=True),
        Product(values="int8", groups=1, group=256),
        Product(values="int8", groups=1, group=256, has_offsets=True),
    ],
    ids=str,
)
def test_a_slot_is_read_where_it_is_in_the_stack(product):
    """No operation of the trace takes it out, unless the plain path multiplies by it."""
    stack = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), product.matrix(True))
    for tokens, sliced in ((6, False), (FEW_TOKENS + 1, True)):
        x = replace(product, tokens=tokens).x()
        own = stack.at(1)
        assert own.shape == (48, product.group * product.groups)
        assert is_kernel(own, x) != sliced
        before_kernel = str(jax.make_jaxpr(own.__call__)(x)).partition("pallas_call")[0]
        assert ("slice" in before_kernel) == sliced
        np.testing.assert_allclose(own(x), product.matrix(False)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "product, fused",
    [
        (Product(), False),  # not where the settings leave it off
        (Product(tokens=FEW_TOKENS + 1), True),
        (Product(out=40), True),  # not whole tiles of 16
        (Product(group=16), True),
        (Product(group=256, groups=1), True),  # its scale waits until after the product
        (Product(dtype="float16"), True),
    ],
    ids=str,
)
def test_what_is_left_to_the_plain_path(product, fused):
    assert not is_kernel(product.matrix(fused), product.x())


def test_it_takes_all_that_the_plain_path_multiplies_at_once(monkeypatch):
    assert MAX_TOKENS == FEW_TOKENS
    for group in GROUPS:
        assert supports(64, 4 * group, 4, FEW_TOKENS, jnp.bfloat16)
    monkeypatch.setattr(grouped, "triton", None)  # a JAX without it
    assert not supports(64, 128, 4, 1, jnp.bfloat16)


def test_two_int4_count_as_one_byte():
    assert estimate(0, jnp.zeros((3, 4), jnp.int4), jnp.zeros(2)).bytes_accessed == 6 + 8
