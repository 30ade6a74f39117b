"""One kernel for the first half of a feed-forward part: norm, gate and up, and their product."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from easyspec_jax.kernels.projection import MAX_ROWS, products, reciprocal_rms
from easyspec_jax.kernels.tiles import estimate, row_tile, span, triton


def supports(hidden: int, inner: int, dtype: DTypeLike) -> bool:
    """Return whether gate_up() takes these shapes.

    Args:
        hidden: Size of the hidden states.
        inner: Outputs of the gate.
        dtype: Dtype of weights and hidden states.

    Examples:
        >>> supports(2048, 8192, jnp.bfloat16), supports(2048, 8200, jnp.bfloat16)
        (True, False)
    """
    known = jnp.dtype(dtype) in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
    return triton is not None and known and hidden % 32 == 0 and inner % 16 == 0


def gate_up(
    h: Float[Array, "batch tokens hidden"],
    norm: Float[Array, " hidden"],
    matrix: Float[Array, "both hidden"],
    bias: Float[Array, " both"] | None,
    *,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "batch tokens inner"]:
    """Compute silu(gate) * up of normed hidden states.

    Args:
        h: Hidden states.
        norm: Weight of the norm.
        matrix: Rows are [gate | up].
        bias: Added to the product, or None.
        eps: Epsilon of the norm.
        interpret: Run in Pallas' interpreter, on any platform.
    """
    (batch, tokens, hidden), inner = h.shape, matrix.shape[0] // 2
    rows, outputs = row_tile(batch * tokens, MAX_ROWS), math.gcd(inner, 64)
    out = jax.ShapeDtypeStruct((batch * tokens, inner), h.dtype)
    result = pl.pallas_call(
        partial(_kernel, rows=rows, outputs=outputs, eps=eps),
        name="gate_up",
        out_shape=out,
        cost_estimate=estimate(2 * batch * tokens * matrix.size, h, matrix, out),
        grid=(inner // outputs, pl.cdiv(batch * tokens, rows)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(h.reshape(batch * tokens, hidden), norm, matrix, bias)
    return result.reshape(batch, tokens, inner)


def _kernel(
    h: Any,
    norm: Any,
    matrix: Any,
    bias: Any,
    out: Any,
    *,
    rows: int,
    outputs: int,
    eps: float,
) -> None:
    """Compute some outputs for some rows; bias may be None."""
    output, row = span(pl.program_id(0), outputs), span(pl.program_id(1), rows)
    real = row < h.shape[0]  # others are padding
    scale = reciprocal_rms(h, row, real, eps)

    def normed(column: Array) -> Array:
        x = triton.load(h.at[row[:, None], column[None, :]], mask=real[:, None], other=0)
        return (x.astype(jnp.float32) * scale).astype(h.dtype) * norm[column][None, :]

    def tile(first: int, column: Array) -> Array:
        return matrix[first + output[:, None], column[None, :]]

    inner = out.shape[1]
    tiles = [partial(tile, 0), partial(tile, inner)]
    gate, up = products(h.shape[1], normed, tiles, (rows, outputs), h.dtype)
    if bias is not None:
        gate, up = gate + bias[output][None, :], up + bias[inner + output][None, :]
    # silu in float32, rounded once, as XLA fuses it.
    wide = gate.astype(jnp.float32)
    active = (wide / (1.0 + jnp.exp(-wide))).astype(h.dtype)
    triton.store(out.at[row[:, None], output[None, :]], active * up, mask=real[:, None])
