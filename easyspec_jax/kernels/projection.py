"""Products of a group: into its attentions, up to the caches, and out of them.

One kernel each, for all layers of the group at once, which read the same hidden states.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from easyspec_jax.arithmetic import power_of_two
from easyspec_jax.kernels.tiles import (
    estimate,
    row_tile,
    span,
    supports_heads,
    times_transposed,
    triton,
)

MAX_ROWS = 64
"""Tokens of all rows of a batch that a program takes at most; others read the weight again."""

STAGE_BYTES = 2**15
"""Bytes of a head's rows that a program loads at a time; several such loads are under way."""

NORM_TILE = 8192
"""Numbers that a program holds while it computes the root mean squares."""


class Weights(NamedTuple):
    """Weights on the way into the attentions of a group, slots in front.

    Attributes:
        norm: Weight of the norm of the hidden states.
        matrix: [slots, out, hidden]; outputs are [queries | keys | values], head by head.
        bias: Added to the product, or None.
        query_norm: Weight of the norm of each query, or None.
        key_norm: Likewise of each key.
    """

    norm: Float[Array, "slots hidden"]
    matrix: Float[Array, "slots out hidden"]
    bias: Float[Array, "slots out"] | None = None
    query_norm: Float[Array, "slots head_dim"] | None = None
    key_norm: Float[Array, "slots head_dim"] | None = None


def supports(hidden: int, head_dim: int, dtype: DTypeLike) -> bool:
    """Return whether project_and_write() takes these shapes.

    Args:
        hidden: Size of the hidden states.
        head_dim: Size of a head.
        dtype: Dtype of weights, hidden states and caches.

    Examples:
        >>> supports(2048, 64, np.float32), supports(2048, 96, np.float32)
        (True, False)
    """
    return hidden % 32 == 0 and supports_heads(head_dim, dtype)


def project_and_write(
    h: Float[Array, "batch tokens hidden"],
    weights: Weights,
    cache: tuple[
        Float[Array, "slots batch_heads capacity head_dim"],
        Float[Array, "slots batch_heads capacity head_dim"],
    ],
    start: Int[Array, " batch"],
    rotation: tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]],
    *,
    kv_heads: int,
    eps: float,
    interpret: bool = False,
) -> tuple[Array, tuple[Array, Array]]:
    """Norm, project, rotate, and write keys and values in place.

    A program computes one head of one slot for up to 64 tokens: it streams the head's rows of the
    matrix, and normalizes the hidden states on the way.

    Args:
        h: Hidden states, which all slots read.
        weights: Weights of all slots.
        cache: Keys and values. They are overwritten where XLA need not keep the old ones.
        start: Row b's tokens take the entries from start[b] on.
        rotation: Cosines and sines of each token's rotation, float32.
        kv_heads: Key heads of a row of the batch.
        eps: Epsilon of all norms.
        interpret: Run in Pallas' interpreter, on any platform.

    Returns:
        Rotated queries [slots, batch * kv_heads, group * tokens, head_dim], in the caches' dtype;
        and the new caches.
    """
    k, v = cache
    (batch, tokens, _), (slots, outputs, _), head_dim = h.shape, weights.matrix.shape, k.shape[3]
    heads = outputs // head_dim
    rows = row_tile(batch * tokens, MAX_ROWS)
    queries = jax.ShapeDtypeStruct(
        (slots, batch * kv_heads, (heads // kv_heads - 2) * tokens, head_dim), h.dtype
    )
    kernel = partial(_kernel, rows=rows, tokens=tokens, kv_heads=kv_heads, eps=eps)
    call = pl.pallas_call(
        kernel,
        name="project_and_write",
        out_shape=(queries, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache)),
        grid=(heads, slots, pl.cdiv(batch * tokens, rows)),
        input_output_aliases={0: 1, 1: 2},
        # The caches hardly count: a few entries of them are written.
        cost_estimate=estimate(
            2 * batch * tokens * weights.matrix.size, h, weights.matrix, queries
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )
    # Rows of the batch and tokens are one axis: [batch, tokens, n] -> [batch * tokens, n].
    h, cos, sin = (x.reshape(batch * tokens, x.shape[-1]) for x in (h, *rotation))
    q, k, v = call(k, v, h, weights, start, cos, sin)
    return q, (k, v)


def project_out(
    x: Float[Array, "slots batch tokens inner"],
    matrix: Float[Array, "slots hidden inner"],
    *,
    interpret: bool = False,
) -> Float[Array, "slots batch tokens hidden"]:
    """Multiply each slot's tokens by its matrix.

    Where there are several tokens, XLA may split the sums of such a product, add them up in a
    second kernel and transpose the result in a third.

    Args:
        x: Mixed values of attentions, as attend() returns them.
        matrix: Output matrices.
        interpret: Run in Pallas' interpreter, on any platform.
    """
    (slots, batch, tokens, inner), hidden = x.shape, matrix.shape[1]
    rows, outputs = row_tile(batch * tokens, MAX_ROWS), math.gcd(hidden, 64)
    out = jax.ShapeDtypeStruct((slots, batch * tokens, hidden), x.dtype)
    projected = pl.pallas_call(
        partial(_out_kernel, rows=rows, outputs=outputs),
        name="project_out",
        out_shape=out,
        cost_estimate=estimate(2 * x.size * hidden, x, matrix, out),
        grid=(hidden // outputs, slots, pl.cdiv(batch * tokens, rows)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(x.reshape(slots, batch * tokens, inner), matrix)
    return projected.reshape(slots, batch, tokens, hidden)


def _out_kernel(x: Any, matrix: Any, out: Any, *, rows: int, outputs: int) -> None:
    """Compute some outputs of one slot for some rows."""
    output = span(pl.program_id(0), outputs)
    slot, row = pl.program_id(1), span(pl.program_id(2), rows)
    real = (row < x.shape[1])[:, None]

    def load(column: Array) -> Array:
        return triton.load(x.at[slot, row[:, None], column[None, :]], mask=real, other=0)

    def tile(column: Array) -> Array:
        return matrix[slot, output[:, None], column[None, :]]

    (product,) = products(x.shape[2], load, [tile], (rows, outputs), x.dtype)
    triton.store(out.at[slot, row[:, None], output[None, :]], product, mask=real)


def _kernel(
    _k: Any,
    _v: Any,
    h: Any,
    weights: Any,
    start: Any,
    cos: Any,
    sin: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    rows: int,
    tokens: int,
    kv_heads: int,
    eps: float,
) -> None:
    """Compute one head of one slot for some rows; arguments are references to whole arrays."""
    head, slot = pl.program_id(0), pl.program_id(1)
    total, head_dim = h.shape[0], k.shape[3]
    half, group = head_dim // 2, q.shape[2] // tokens
    row = span(pl.program_id(2), rows)
    real = row < total  # others are padding
    scale = reciprocal_rms(h, row, real, eps)
    # Rotation pairs channel i with i + half, so the halves of a head are separate tiles.
    halves = _product(h, weights, row, real, scale, slot, head * head_dim, half)
    channels = span(0, half), span(1, half)
    if weights.bias is not None:
        halves = [
            x + weights.bias[slot, head * head_dim + channel][None, :]
            for x, channel in zip(halves, channels, strict=True)
        ]
    is_query, is_key = head < kv_heads * group, head < kv_heads * (group + 1)
    turned = halves
    if weights.query_norm is not None:
        turned = _head_norm(halves, channels, weights, slot, is_query, eps)
    turned = _rotate(turned, cos, sin, row, real)
    batch, token = jax.lax.div(row, tokens), jax.lax.rem(row, tokens)
    # Query head 5 of group 4 belongs to key head 1, of which it is query 1.
    at = batch * kv_heads + jax.lax.div(head, group), jax.lax.rem(head, group) * tokens + token
    _store(q, slot, *at, channels, turned, real & is_query)
    own = batch * kv_heads + jax.lax.rem(head, kv_heads)
    first = triton.load(start.at[batch], mask=real, other=0)
    # A start past the last one that fits is moved back, as by dynamic_update_slice.
    entry = jnp.clip(first, 0, k.shape[2] - tokens) + token
    _store(k, slot, own, entry, channels, turned, real & is_key & ~is_query)
    _store(v, slot, own, entry, channels, halves, real & ~is_key)


def reciprocal_rms(h: Any, row: Array, real: Array, eps: float) -> Float[Array, "rows 1"]:
    """Return the reciprocal root mean square of each row."""
    hidden, rows = h.shape[1], row.shape[0]
    size = min(power_of_two(hidden), max(NORM_TILE // rows, 64))
    total = jnp.zeros(rows, jnp.float32)
    # Unrolled, so that the loads need not wait for each other.
    for index in range(pl.cdiv(hidden, size)):
        column = span(index, size)
        inside = real[:, None] & (column < hidden)[None, :]
        x = triton.load(h.at[row[:, None], column[None, :]], mask=inside, other=0)
        total += jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1)
    return (1.0 / jnp.sqrt(total / np.float32(hidden) + np.float32(eps)))[:, None]


def _product(
    h: Any,
    weights: Any,
    row: Array,
    real: Array,
    scale: Float[Array, "rows 1"],
    slot: Array,
    first: Array,
    half: int,
) -> list[Float[Array, "rows half"]]:
    """Multiply normed rows by both halves of the head whose outputs begin at `first`."""
    hidden = h.shape[1]

    def normed(column: Array) -> Array:
        x = triton.load(h.at[row[:, None], column[None, :]], mask=real[:, None], other=0)
        return (x.astype(jnp.float32) * scale).astype(h.dtype) * weights.norm[slot, column][None, :]

    def tile(part: int, column: Array) -> Array:
        return weights.matrix[slot, first + span(part, half)[:, None], column[None, :]]

    matrices = [partial(tile, 0), partial(tile, 1)]
    return products(hidden, normed, matrices, (row.shape[0], half), h.dtype)


def products(
    width: int,
    rows: Callable[[Array], Array],
    matrices: Sequence[Callable[[Array], Array]],
    shape: tuple[int, int],
    dtype: DTypeLike,
) -> list[Array]:
    """Multiply rows by each matrix' transpose, some columns at a time.

    Args:
        width: Columns of rows and matrices.
        rows: Loads columns of the rows: [columns] -> [rows, columns].
        matrices: Each loads columns of a matrix: [columns] -> [outputs, columns].
        shape: (rows, outputs).
        dtype: Of all factors and of the products; sums are in float32.
    """
    # bfloat16 and head_dim 64: 2048 in 16 steps of 128 columns; 576 in 9 steps of 64.
    column_bytes = len(matrices) * shape[1] * jnp.dtype(dtype).itemsize
    size = math.gcd(width, min(128, STAGE_BYTES // column_bytes))

    def step(index: Array, sums: list[Array]) -> list[Array]:
        column = span(index, size)
        x, tiles = rows(column), [matrix(column) for matrix in matrices]
        return [total + times_transposed(x, y) for total, y in zip(sums, tiles, strict=True)]

    zeros = [jnp.zeros(shape, jnp.float32) for _ in matrices]
    sums = jax.lax.fori_loop(0, width // size, step, zeros)
    return [total.astype(dtype) for total in sums]


def _head_norm(
    halves: list[Array],
    channels: tuple[Array, Array],
    weights: Any,
    slot: Array,
    is_query: Array,
    eps: float,
) -> list[Array]:
    """Norm a query or key; both halves share the root mean square."""
    wide = [x.astype(jnp.float32) for x in halves]
    total = sum(jnp.sum(jnp.square(x), axis=1) for x in wide)
    size = np.float32(2 * wide[0].shape[1])
    scale = (1.0 / jnp.sqrt(total / size + np.float32(eps)))[:, None]
    normed = []
    for x, own, channel in zip(wide, halves, channels, strict=True):
        weight = jnp.where(
            is_query, weights.query_norm[slot, channel], weights.key_norm[slot, channel]
        )
        normed.append((x * scale).astype(own.dtype) * weight[None, :])
    return normed


def _rotate(halves: list[Array], cos: Any, sin: Any, row: Array, real: Array) -> list[Array]:
    """Turn each pair of channels by its token's angle, in float32."""
    column = span(0, cos.shape[1])
    cos, sin = (
        triton.load(x.at[row[:, None], column[None, :]], mask=real[:, None], other=0)
        for x in (cos, sin)
    )
    first, second = (x.astype(jnp.float32) for x in halves)
    turned = first * cos - second * sin, second * cos + first * sin
    return [x.astype(halves[0].dtype) for x in turned]


def _store(
    ref: Any,
    slot: Array,
    head: Array,
    entry: Array,
    channels: tuple[Array, Array],
    halves: list[Array],
    mask: Array,
) -> None:
    """Store each row's two halves at its entry of its head, where the mask says so."""
    for channel, x in zip(channels, halves, strict=True):
        triton.store(
            ref.at[slot, head[:, None], entry[:, None], channel[None, :]], x, mask=mask[:, None]
        )
