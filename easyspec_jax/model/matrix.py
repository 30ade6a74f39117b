"""Matrices that tokens are multiplied by: floats, or small integers with scales."""

from collections.abc import Callable
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from easyspec_jax.arithmetic import ceil_div, round_up
from easyspec_jax.kernels import grouped as kernel

FEW_TOKENS = 64
"""Up to this many tokens are multiplied by integers with groups as they are, more by floats."""

_FLOATS = 1 << 26
"""Floats of such a matrix that are in memory at a time: 128 MiB of bfloat16."""


class Matrix(nnx.Module):
    """A matrix as checkpoints store it, [out, in], so that a row is contiguous.

    Quantized ones are as in checkpoint/quantized.py: values · scale + offset of their group of
    columns. An offset multiplies the sum of the group's inputs. With one group the scale waits
    until after the product, and no float copy of the matrix is written where the compiler fuses the
    values' conversion into the product. With more, each group's sum is scaled where tokens are few;
    many tokens have more sums than the matrix has numbers, so it becomes floats, a block of outputs
    at a time.

    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        values: Floats, int8 or int4.
        scale: Scales of integers, or None.
        offset: Their offsets, or None.
        fused: Whether a kernel multiplies few tokens by integers with groups, and by those of one
            slot of a stack, where it supports the shapes.
        interpret: Run the kernel in Pallas' interpreter, as a CPU must.
        pairs: Multiply a single token by integers as one of two, and look its row up likewise.
        fills: Multiply 5 to 15 tokens in float32 as 8 or 16.
        slot: Which of its slots this matrix is, if the leaves are a stack; see at().
    """

    def __init__(
        self,
        values: Num[Array, "*slots out inner"],
        scale: Float[Array, "*slots out groups"] | None = None,
        offset: Float[Array, "*slots out groups"] | None = None,
        *,
        fused: bool = False,
        interpret: bool = False,
        pairs: bool = False,
        fills: bool = False,
        slot: int | None = None,
    ) -> None:
        self.values = nnx.Param(values)
        self.scale = None if scale is None else nnx.Param(scale)
        self.offset = None if offset is None else nnx.Param(offset)
        self.fused, self.interpret, self.slot = fused, interpret, slot
        self.pairs, self.fills = pairs, fills

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values, slots in front unless it is one of them."""
        return self.values.shape if self.slot is None else self.values.shape[1:]

    @property
    def dtype(self) -> DTypeLike:
        """Type of the values."""
        return self.values.dtype

    def __call__(
        self, x: Float[Array, "batch tokens inner"], dtype: DTypeLike | None = None
    ) -> Float[Array, "batch tokens out"]:
        """Multiply each token's x, with results in dtype (by default x's).

        An output is the sum over one stretch of memory. With [in, out], XLA's GPU backend copied
        whole stacks of matrices into this form before it multiplied them by one token. The matrix
        is also the left operand, because the CPU backend reads it faster that way.
        """
        if self.scale is None:
            values = self._own(self.values).astype(x.dtype)
            product = partial(_product, values, dtype=dtype)
            y = _as_many(product, x) if self.fills and x.dtype == jnp.float32 else product(x)
        else:
            of_integers = partial(self._of_integers, self.scale)
            y = _as_one_of_two(of_integers, x, axis=2) if self._is_paired(x) else of_integers(x)
            y = y.astype(dtype or x.dtype)
        return jnp.moveaxis(y, 0, 2)

    def at(self, slot: int) -> Self:
        """Return the matrix of a slot.

        It keeps the whole stack where the kernel may multiply by it, because XLA would copy a slice
        before a kernel reads it.
        """
        if not self.fused:
            return jax.tree.map(lambda stack: stack[slot], self)
        return type(self)(
            self.values[...],
            None if self.scale is None else self.scale[...],
            None if self.offset is None else self.offset[...],
            fused=True,
            interpret=self.interpret,
            pairs=self.pairs,
            fills=self.fills,
            slot=slot,
        )

    def _is_paired(self, tokens: Num[Array, "batch tokens *rest"]) -> bool:
        return self.pairs and tokens.shape[:2] == (1, 1)

    def _own(self, stack: nnx.Param) -> Array:
        return stack[...] if self.slot is None else stack[self.slot]

    def _of_integers(
        self, scale: nnx.Param, x: Float[Array, "batch tokens inner"]
    ) -> Float[Array, "out batch tokens"]:
        """Multiply by a quantized matrix, by the kernel where it is on; the result is float32."""
        (batch, tokens, inner), (out, groups) = x.shape, scale.shape[-2:]
        if not self.is_fused(out, inner, groups, batch * tokens, x.dtype):
            y = _scaled(self._own(self.values), self._own(scale), x)
            return y if self.offset is None else y + _of_sums(self._own(self.offset), x)
        leaves = [leaf for leaf in (self.values, scale, self.offset) if leaf is not None]
        stacks = [leaf[None] if self.slot is None else leaf[...] for leaf in leaves]
        y = kernel.multiply(x, *stacks, slot=self.slot or 0, interpret=self.interpret)
        return jnp.moveaxis(y, 2, 0)

    def is_fused(self, out: int, inner: int, groups: int, tokens: int, dtype: DTypeLike) -> bool:
        """Return whether the kernel multiplies tokens by this matrix, or by a device's share of it.

        Args:
            out: Outputs of the share.
            inner: Its columns.
            groups: Scales of an output.
            tokens: Tokens of all rows.
            dtype: Dtype of the tokens.
        """
        needed = groups > 1 or self.slot is not None
        return self.fused and needed and kernel.supports(out, inner, groups, tokens, dtype)

    def rows(self, numbers: Int[Array, "batch tokens"], dtype: DTypeLike) -> Array:
        """Look up rows, as an embedding does.

        Args:
            numbers: Rows to take.
            dtype: Type of the result.

        Returns:
            [batch, tokens, in].
        """
        if self.scale is None:
            return self.values[...][numbers].astype(dtype)
        look_up = self.values[...].__getitem__
        paired = self._is_paired(numbers)
        found = _as_one_of_two(look_up, numbers, axis=1) if paired else look_up(numbers)
        offset = None if self.offset is None else self.offset[...][numbers]
        return _floats(found, self.scale[...][numbers], offset).astype(dtype)


def bytes_in_memory(out: int, inner: int, groups: int, tokens: int, dtype: DTypeLike) -> int:
    """Count what a plain product by a quantized matrix writes besides its result.

    Args:
        out: Outputs of the matrix.
        inner: Its columns.
        groups: Scales of an output.
        tokens: Tokens of all rows.
        dtype: Dtype of the tokens.

    Examples:
        Gate and up of Llama-3.1-8B in groups of 128: sums of groups for 21 tokens, and a block of
        floats for 512.

        >>> shape = dict(out=28672, inner=4096, groups=32, dtype=jnp.bfloat16)
        >>> bytes_in_memory(**shape, tokens=21), bytes_in_memory(**shape, tokens=512)
        (77070336, 117440512)
    """
    if groups == 1:
        return 0
    if tokens <= FEW_TOKENS:
        return 4 * out * groups * tokens
    return jnp.dtype(dtype).itemsize * _block(out, inner) * inner


def _block(out: int, inner: int) -> int:
    """Return how many outputs of a matrix with groups become floats at a time.

    Blocks are as even as they can be, because the last one overlaps that before it.
    """
    blocks = ceil_div(out * inner, _FLOATS)
    return ceil_div(out, blocks)


def _scaled(
    values: Int[Array, "out inner"],
    scale: Float[Array, "out groups"],
    x: Float[Array, "batch tokens inner"],
) -> Float[Array, "out batch tokens"]:
    """Multiply by a quantized matrix; the result is float32."""
    out, groups = scale.shape
    if groups == 1:
        return _product(values.astype(x.dtype), x) * scale[:, :, None]
    if x.shape[0] * x.shape[1] <= FEW_TOKENS:
        return _sum_of_groups(values, scale, x)
    block = _block(out, x.shape[2])

    def outputs(start: Int[Array, ""]) -> Float[Array, "block batch tokens"]:
        values_of, scale_of = (
            jax.lax.dynamic_slice_in_dim(whole, start, block) for whole in (values, scale)
        )
        return _product(_floats(values_of, scale_of).astype(x.dtype), x)

    if block == out:
        return outputs(jnp.zeros((), jnp.int32))
    # 10 outputs in blocks of 4 start at 0, 4 and 6, so that the last block is a whole one too.
    starts = jnp.minimum(jnp.arange(0, out, block), out - block)
    y = jax.lax.map(outputs, starts)  # [blocks, block, batch, tokens]
    again = len(starts) * block - out  # of the last block, 2 outputs are in the one before
    return jnp.concatenate([y[:-1].reshape(-1, *y.shape[2:]), y[-1, again:]])


def _product(
    values: Float[Array, "out inner"],
    x: Float[Array, "batch tokens inner"],
    dtype: DTypeLike | None = jnp.float32,
) -> Float[Array, "out batch tokens"]:
    """Multiply floats; None is the dtype of both."""
    return jnp.einsum("oi,bti->obt", values, x, preferred_element_type=dtype)


def _as_many(
    product: Callable[[Array], Array], x: Float[Array, "batch tokens inner"]
) -> Float[Array, "out batch tokens"]:
    """Multiply 5 to 7 tokens of all rows together as 8, and 9 to 15 as 16."""
    batch, tokens, inner = x.shape
    count = batch * tokens
    if not 4 < count < 16 or count == 8:
        return product(x)
    rows = jnp.pad(x.reshape(1, count, inner), ((0, 0), (0, round_up(count, 8) - count), (0, 0)))
    return product(rows)[:, 0, :count].reshape(-1, batch, tokens)


def _as_one_of_two(
    operation: Callable[[Array], Array], token: Num[Array, "1 1 *rest"], axis: int
) -> Array:
    """Apply an operation to a token and another one of zeros, and return its own result.

    Barriers keep XLA from leaving the other one out.

    Args:
        operation: What maps tokens to results.
        token: The token.
        axis: The axis of tokens in the results.
    """
    padding = [(0, 0), (0, 1), *[(0, 0)] * (token.ndim - 2)]
    both = operation(jax.lax.optimization_barrier(jnp.pad(token, padding)))
    return jax.lax.slice_in_dim(jax.lax.optimization_barrier(both), 0, 1, axis=axis)


def _floats(
    values: Int[Array, "*rows inner"],
    scale: Float[Array, "*rows groups"],
    offset: Float[Array, "*rows groups"] | None = None,
) -> Float[Array, "*rows inner"]:
    """Return what quantized rows stand for, in float32."""
    floats = values.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
    if offset is not None:
        floats += offset[..., None]
    return floats.reshape(values.shape)


def _of_sums(
    offset: Float[Array, "out groups"], x: Float[Array, "batch tokens inner"]
) -> Float[Array, "out batch tokens"]:
    """Multiply the sum of each group of inputs by its offset; the result is float32."""
    grouped = x.astype(jnp.float32).reshape(*x.shape[:2], offset.shape[1], -1)
    sums = jnp.sum(grouped, axis=-1)
    # Scales are not rounded either, and a sum stands for many numbers.
    return jnp.einsum("og,btg->obt", offset, sums, precision=jax.lax.Precision.HIGHEST)


def _sum_of_groups(
    values: Int[Array, "out inner"],
    scale: Float[Array, "out groups"],
    x: Float[Array, "batch tokens inner"],
) -> Float[Array, "out batch tokens"]:
    """Multiply each group separately and add up the scaled products; the result is float32."""
    # [out, groups, batch, tokens] · [out, groups, 1, 1] -> [out, batch, tokens]
    x = x.reshape(*x.shape[:2], scale.shape[1], -1)
    grouped = values.astype(x.dtype).reshape(*scale.shape, -1)
    parts = jnp.einsum("ogi,btgi->ogbt", grouped, x, preferred_element_type=jnp.float32)
    return jnp.sum(parts * scale[:, :, None, None], axis=1)
