"""Matrices that tokens are multiplied by: floats, or small integers with scales."""

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from easyspec_jax.kernels import grouped as kernel

FEW_TOKENS = 64
"""Up to this many tokens are multiplied by all outputs of a matrix with groups at once."""

_SUMS = 1 << 24
"""Sums of groups that are in memory at a time for more tokens than that: 64 MiB of float32."""


class Matrix(nnx.Module):
    """A matrix as checkpoints store it, [out, in], so that a row is contiguous.

    Quantized ones are as in checkpoint/quantized.py: values · scale + offset of their group of
    columns. An offset multiplies the sum of the group's inputs. With one group the scale waits
    until after the product, and no float copy of the matrix is written where the compiler fuses the
    values' conversion into the product.

    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        values: Floats, int8 or int4.
        scale: Scales of integers, or None.
        offset: Their offsets, or None.
        fused: Whether a kernel multiplies few tokens by integers with groups, where it supports the
            shapes.
        interpret: Run the kernel in Pallas' interpreter, as a CPU must.
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
        slot: int | None = None,
    ) -> None:
        self.values = nnx.Param(values)
        self.scale = None if scale is None else nnx.Param(scale)
        self.offset = None if offset is None else nnx.Param(offset)
        self.fused, self.interpret, self.slot = fused, interpret, slot

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
            # [out, in] times [batch, tokens, in] -> [out, batch, tokens]
            values = self._own(self.values).astype(x.dtype)
            y = jnp.einsum("oi,bti->obt", values, x, preferred_element_type=dtype)
        else:
            y = self._of_integers(self.scale, x)
            if self.offset is not None:
                y += _of_sums(self._own(self.offset), x)
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
            slot=slot,
        )

    def _own(self, stack: nnx.Param) -> Array:
        return stack[...] if self.slot is None else stack[self.slot]

    def _of_integers(
        self, scale: nnx.Param, x: Float[Array, "batch tokens inner"]
    ) -> Float[Array, "out batch tokens"]:
        """Multiply by a quantized matrix, by the kernel where it is on; the result is float32."""
        (batch, tokens, inner), (out, groups) = x.shape, scale.shape[-2:]
        if not self.is_fused(out, inner, groups, batch * tokens, x.dtype):
            return _scaled(self._own(self.values), self._own(scale), x)
        stacks = [leaf[None] if self.slot is None else leaf[...] for leaf in (self.values, scale)]
        y = kernel.multiply(stacks[0], stacks[1], x, slot=self.slot or 0, interpret=self.interpret)
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
        return self.fused and kernel.supports(out, inner, groups, tokens, dtype)

    def rows(self, numbers: Int[Array, "batch tokens"], dtype: DTypeLike) -> Array:
        """Look up rows, as an embedding does.

        Args:
            numbers: Rows to take.
            dtype: Type of the result.

        Returns:
            [batch, tokens, in].
        """
        found = self.values[...][numbers]
        if self.scale is None:
            return found.astype(dtype)
        scale = self.scale[...][numbers]  # [batch, tokens, groups]
        grouped = found.astype(jnp.float32).reshape(*scale.shape, -1)
        floats = grouped * scale[..., None]
        if self.offset is not None:
            floats += self.offset[...][numbers][..., None]
        return floats.reshape(found.shape).astype(dtype)


def sums_in_memory(out: int, groups: int, tokens: int) -> int:
    """Count the numbers that a plain product by a quantized matrix writes before it scales them.

    Args:
        out: Outputs of the matrix.
        groups: Scales of an output.
        tokens: Tokens of all rows.

    Examples:
        Gate and up of Llama-3.1-8B in groups of 128, by 21 and by 512 tokens:

        >>> sums_in_memory(28672, 32, 21), sums_in_memory(28672, 32, 512)
        (19267584, 16777216)
    """
    return 0 if groups == 1 else _block(out, groups, tokens) * groups * tokens


def _block(out: int, groups: int, tokens: int) -> int:
    """Return how many outputs of a matrix with groups are computed at a time."""
    return out if tokens <= FEW_TOKENS else min(out, max(1, _SUMS // (groups * tokens)))


def _scaled(
    values: Int[Array, "out inner"],
    scale: Float[Array, "out groups"],
    x: Float[Array, "batch tokens inner"],
) -> Float[Array, "out batch tokens"]:
    """Multiply by a quantized matrix; the result is float32."""
    out, groups = scale.shape
    if groups == 1:
        values = values.astype(x.dtype)
        y = jnp.einsum("oi,bti->obt", values, x, preferred_element_type=jnp.float32)
        return y * scale[:, :, None]
    x = x.reshape(*x.shape[:2], groups, -1)
    block = _block(out, groups, x.shape[0] * x.shape[1])
    if block == out:
        return _sum_of_groups(values, scale, x)

    def outputs(start: Int[Array, ""]) -> Float[Array, "block batch tokens"]:
        values_of, scale_of = (
            jax.lax.dynamic_slice_in_dim(whole, start, block) for whole in (values, scale)
        )
        return _sum_of_groups(values_of, scale_of, x)

    # 10 outputs in blocks of 4 start at 0, 4 and 6, so that the last block is a whole one too.
    starts = jnp.minimum(jnp.arange(0, out, block), out - block)
    y = jax.lax.map(outputs, starts)  # [blocks, block, batch, tokens]
    again = len(starts) * block - out  # of the last block, 2 outputs are in the one before
    return jnp.concatenate([y[:-1].reshape(-1, *y.shape[2:]), y[-1, again:]])


def _of_sums(
    offset: Float[Array, "out groups"], x: Float[Array, "batch tokens inner"]
) -> Float[Array, "out batch tokens"]:
    """Multiply the sum of each group of inputs by its offset; the result is float32."""
    grouped = x.astype(jnp.float32).reshape(*x.shape[:2], offset.shape[1], -1)
    return jnp.einsum("og,btg->obt", offset, jnp.sum(grouped, axis=-1))


def _sum_of_groups(
    values: Int[Array, "out inner"],
    scale: Float[Array, "out groups"],
    x: Float[Array, "batch tokens groups group"],
) -> Float[Array, "out batch tokens"]:
    """Multiply each group separately and add up the scaled products."""
    # [out, groups, batch, tokens] · [out, groups, 1, 1] -> [out, batch, tokens]
    grouped = values.astype(x.dtype).reshape(*scale.shape, -1)
    parts = jnp.einsum("ogi,btgi->ogbt", grouped, x, preferred_element_type=jnp.float32)
    return jnp.sum(parts * scale[:, :, None, None], axis=1)
