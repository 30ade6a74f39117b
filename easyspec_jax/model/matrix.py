"""Matrices that tokens are multiplied by: floats, or small integers with scales."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num


class Matrix(nnx.Module):
    """A matrix as checkpoints store it, [out, in], so that a row is contiguous.

    Quantized ones are as in checkpoint/quantized.py: values · scale of their group of columns. With
    one group the scale waits until after the product, and no float copy of the matrix is written
    where the compiler fuses the values' conversion into the product.

    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        values: Floats, int8 or int4.
        scale: Scales of integers, or None.
    """

    def __init__(
        self,
        values: Num[Array, "*slots out inner"],
        scale: Float[Array, "*slots out groups"] | None = None,
    ) -> None:
        self.values = nnx.Param(values)
        self.scale = None if scale is None else nnx.Param(scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape

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
        values = self.values[...].astype(x.dtype)
        if self.scale is None:
            # [out, in] times [batch, tokens, in] -> [out, batch, tokens]
            y = jnp.einsum("oi,bti->obt", values, x, preferred_element_type=dtype)
        else:
            y = _scaled(values, self.scale[...], x).astype(dtype or x.dtype)
        return jnp.moveaxis(y, 0, 2)

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
        return (grouped * scale[..., None]).reshape(found.shape).astype(dtype)


def _scaled(
    values: Float[Array, "out inner"],
    scale: Float[Array, "out groups"],
    x: Float[Array, "batch tokens inner"],
) -> Float[Array, "out batch tokens"]:
    """Multiply by a quantized matrix whose values are in x's type; the result is float32."""
    groups = scale.shape[1]
    if groups == 1:
        y = jnp.einsum("oi,bti->obt", values, x, preferred_element_type=jnp.float32)
        return y * scale[:, :, None]
    # One product for each group, then their scaled sum:
    # [out, groups, batch, tokens] · [out, groups, 1, 1] -> [out, batch, tokens]
    values = values.reshape(values.shape[0], groups, -1)
    x = x.reshape(*x.shape[:2], groups, -1)
    parts = jnp.einsum("ogi,btgi->ogbt", values, x, preferred_element_type=jnp.float32)
    return jnp.sum(parts * scale[:, :, None, None], axis=1)
