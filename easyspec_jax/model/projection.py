"""Matrix products, and the norm and product that lead into an attention and into an MLP."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from easyspec_jax.model.norm import rms_norm


def product(
    matrix: Float[Array, "out inner"],
    x: Float[Array, "batch tokens inner"],
    dtype: DTypeLike | None = None,
) -> Float[Array, "batch tokens out"]:
    """Multiply each token's x by a matrix, with results in dtype (by default x's).

    Every matrix is kept as checkpoints store it, [out, inner], so that a row is contiguous: an
    output is the sum over one stretch of memory. With [inner, out], XLA's GPU backend copied whole
    stacks of matrices into this form before it multiplied them by one token. The matrix is also the
    left operand, because the CPU backend reads it faster that way.
    """
    # [out, inner] times [batch, tokens, inner] -> [out, batch, tokens] -> [batch, tokens, out]
    return jnp.moveaxis(jnp.einsum("oi,bti->obt", matrix, x, preferred_element_type=dtype), 0, 2)


class Projection(nnx.Module):
    """RMS norm, product and, in some families, bias.

    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        norm: Weight of the norm.
        weight: [out, hidden].
        bias: Added to the product, or None.
        eps: The norm's epsilon.
    """

    def __init__(
        self,
        norm: Float[Array, "*slots hidden"],
        weight: Float[Array, "*slots out hidden"],
        bias: Float[Array, "*slots out"] | None,
        *,
        eps: float,
    ) -> None:
        self.norm, self.weight = nnx.Param(norm), nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.eps = eps

    def __call__(self, h: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens out"]:
        """Project hidden states, in their dtype."""
        x = product(self.weight[...], rms_norm(h, self.norm[...], self.eps))
        return x if self.bias is None else x + self.bias[...][None, None, :]
