"""Products of a few tokens by small integers that share a scale in groups of columns.

XLA fuses no scale between partial sums: it writes the sums of every group to memory, [out, groups,
tokens] of float32, before it scales and adds them. For six tokens and groups of 128 columns of int4
that is more than a third of the matrix. Here each group's sum is scaled in registers, and its
offset, if it has one, is added there.

Integers with one scale for all columns need this only in a stack, of which XLA would write floats.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from easyspec_jax.kernels.tiles import (
    SMALLEST_DOT,
    estimate,
    row_tile,
    span,
    times_transposed,
    triton,
)

MAX_TOKENS = 64
"""Tokens of all rows of a batch that a program takes at most."""

GROUPS = (32, 64, 128)
"""Columns that are multiplied at a time: those that share a scale, or 128 if all do."""

PROGRAMS = 64
"""Programs that a product should have at least. More of them would read all tokens more often."""


def supports(out: int, inner: int, groups: int, tokens: int, dtype: DTypeLike) -> bool:
    """Return whether multiply() takes these shapes.

    Args:
        out: Outputs of the matrix.
        inner: Its columns.
        groups: Scales of an output.
        tokens: Tokens of all rows.
        dtype: Dtype of the tokens.

    Examples:
        Gate and up of Llama-3.1-8B, by the tokens of a round and by those of a prompt:

        >>> shape = dict(out=28672, inner=4096, groups=32, dtype=jnp.bfloat16)
        >>> supports(**shape, tokens=6), supports(**shape, tokens=512)
        (True, False)
    """
    known = jnp.dtype(dtype) in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
    columns = _columns(inner, groups)
    whole = out % SMALLEST_DOT == 0 and inner % columns == 0 and columns in GROUPS
    return triton is not None and known and whole and tokens <= MAX_TOKENS


def _columns(inner: int, groups: int) -> int:
    """Return how many columns are multiplied at a time."""
    return inner // groups if groups > 1 else GROUPS[-1]


def multiply(
    x: Float[Array, "batch tokens inner"],
    values: Int[Array, "slots out inner"],
    scale: Float[Array, "slots out groups"],
    offset: Float[Array, "slots out groups"] | None = None,
    *,
    slot: int = 0,
    interpret: bool = False,
) -> Float[Array, "batch tokens out"]:
    """Multiply tokens by values · scale + offset of their group of columns.

    Args:
        x: The tokens; see supports().
        values: int4 or int8.
        scale: float32.
        offset: float32, or None for zeros.
        slot: Which matrix of the stack to multiply by, so that none has to be cut out.
        interpret: Run in Pallas' interpreter, on any platform.

    Returns:
        Products in float32.
    """
    (batch, tokens, inner), (slots, out, groups) = x.shape, scale.shape
    rows, outputs = row_tile(batch * tokens, MAX_TOKENS), output_tile(out)
    by_group = (scale,) if offset is None else (scale, offset)
    own = (jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype) for stack in (values, *by_group))
    products = jax.ShapeDtypeStruct((batch * tokens, out), jnp.float32)
    result = pl.pallas_call(
        partial(_kernel, slot=slot, rows=rows, outputs=outputs),
        name="grouped",
        out_shape=products,
        cost_estimate=estimate(2 * batch * tokens * out * inner, *own, x, products),
        grid=(out // outputs,),
        compiler_params=triton.CompilerParams(num_warps=outputs // SMALLEST_DOT, num_stages=4),
        interpret=interpret,
    )(
        x.reshape(batch * tokens, inner),
        values.reshape(slots, out, -1, _columns(inner, groups)),
        *by_group,
    )
    return result.reshape(batch, tokens, out)


def output_tile(out: int) -> int:
    """Return how many outputs a program computes: 64, or 32 or 16 where programs would be few.

    Examples:
        Gate and up, and queries, keys and values of Llama-3.3-70B on eight devices:

        >>> output_tile(7168), output_tile(1280)
        (64, 16)
    """
    for outputs in (64, 32):
        if out % outputs == 0 and out // outputs >= PROGRAMS:
            return outputs
    return SMALLEST_DOT


def _kernel(
    x: Any, values: Any, scale: Any, *others: Any, slot: int, rows: int, outputs: int
) -> None:
    """Compute some outputs for all rows; values are [slots, out, parts, columns of a part]."""
    *offsets, out = others
    _, _, parts, size = values.shape
    has_one_group = scale.shape[-1] == 1
    first, output = pl.program_id(0) * outputs, span(pl.program_id(0), outputs)
    row = span(0, rows)
    real = row < x.shape[0]  # others are padding

    def add(part: Array, total: Float[Array, "outputs rows"]) -> Float[Array, "outputs rows"]:
        # The columns are a whole slice, because Pallas then loads two int4 as one byte. It would
        # load the byte of each number of an array of columns.
        integers = values[slot, pl.ds(first, outputs), part, :]
        column = span(part, size)
        token = triton.load(x.at[row[:, None], column[None, :]], mask=real[:, None], other=0)
        product = times_transposed(integers.astype(jnp.int8).astype(token.dtype), token)
        group = 0 if has_one_group else part
        total += scale[slot, output, group][:, None] * product
        for offset in offsets:
            inputs = jnp.sum(token.astype(jnp.float32), axis=1)
            total += offset[slot, output, group][:, None] * inputs[None, :]
        return total

    total = jax.lax.fori_loop(0, parts, add, jnp.zeros((outputs, rows), jnp.float32))
    triton.store(out.at[row[None, :], output[:, None]], total, mask=real[None, :])
