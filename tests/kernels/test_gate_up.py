"""gate_up() agrees with the plain path, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.kernels import gate_up as kernel
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm
from easyspec_jax.model.projection import Output, Projection
from easyspec_jax.model.transformer import MLP
from tests.kernels.cases import EPS, Case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "batch, tokens, hidden, inner, bias",
    [(1, 1, 64, 160, False), (2, 3, 96, 64, True), (1, 70, 64, 48, False)],
)
def test_it_agrees_with_the_plain_path(batch, tokens, hidden, inner, bias, dtype):
    case = Case(dtype=dtype)
    norm = 1 + case.normal(0, hidden, scale=0.1)
    projection = Projection(
        RMSNorm(norm, eps=EPS),
        Matrix(case.normal(1, 2 * inner, hidden, scale=hidden**-0.5)),
        case.normal(2, 2 * inner) if bias else None,
        dtype=dtype,
    )
    down, h = jnp.eye(inner, dtype=dtype), case.normal(3, batch, tokens, hidden)
    own_bias = None if projection.bias is None else projection.bias[...]
    arrays = h, norm, projection.weight.values[...], own_bias
    got = kernel.gate_up(*arrays, eps=EPS, interpret=True)
    expected = jax.jit(MLP(projection, Output(Matrix(down))))(h)
    assert got.dtype == expected.dtype
    case.assert_close(got.astype(jnp.float32), expected.astype(jnp.float32))


def test_what_it_leaves_to_the_plain_path():
    assert kernel.supports(96, 160, np.dtype("float32"))
    assert not kernel.supports(96, 152, np.dtype("float32"))  # not whole tiles of 16
    assert not kernel.supports(72, 160, np.dtype("float32"))  # not whole tiles of 32
    assert not kernel.supports(96, 160, np.dtype("float16"))
