"""Products that lead into an attention or an MLP, and out of it."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm


class Projection(nnx.Module):
    """The product that leads into an attention or an MLP: norm, matrix and bias.

    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        norm: The norm before the product, or None in families without one.
        weight: [out, hidden].
        bias: Added to the product, or None.
        dtype: Type of the hidden states.
    """

    def __init__(
        self,
        norm: RMSNorm | None,
        weight: Matrix,
        bias: Float[Array, "*slots out"] | None,
        *,
        dtype: DTypeLike,
    ) -> None:
        self.norm, self.weight, self.dtype = norm, weight, dtype
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, h: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens out"]:
        """Project hidden states, in their dtype."""
        x = self.weight(self.normed(h))
        return x if self.bias is None else x + self.bias[...][None, None, :]

    def normed(self, h: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens hidden"]:
        """Norm hidden states where the family does: the input of the matrix."""
        return h if self.norm is None else self.norm(h)

    @property
    def fusible_norm(self) -> RMSNorm | None:
        """The norm, if kernels can compute it; they know no offsets."""
        return self.norm if self.norm is not None and self.norm.offset == 0 else None


class Output(nnx.Module):
    """The product that leads out of an attention or an MLP: matrix, bias and multiplier.

    One device has some columns of the matrix, so its result is an addend of the layer's output.
    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        weight: [hidden, inner].
        bias: Added to the product, or None. Zero on all devices but one, so that their sum has it
            once.
        multiplier: Multiplies the output before it is added to the hidden states.
    """

    def __init__(
        self,
        weight: Matrix,
        bias: Float[Array, "*slots hidden"] | None = None,
        *,
        multiplier: float = 1.0,
    ) -> None:
        self.weight, self.multiplier = weight, multiplier
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(
        self, x: Float[Array, "batch tokens inner"]
    ) -> Float[Array, "batch tokens hidden"]:
        """Compute this device's addend, in x's dtype."""
        y = self.weight(x)
        y = y if self.bias is None else y + self.bias[...][None, None, :]
        if self.multiplier == 1:
            return y
        # Rounded to bfloat16 first, the multiplier 0.22 of Granite would be 0.1 % too small.
        return (y.astype(jnp.float32) * np.float32(self.multiplier)).astype(y.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether it is a product and nothing else."""
        return self.bias is None and self.multiplier == 1
