"""A norm and the matrix product behind it: the way into an attention and into an MLP."""

from flax import nnx
from jaxtyping import Array, Float

from easyspec_jax.model.norm import rms_norm


class Projection(nnx.Module):
    """RMS norm, product and, in some families, bias.

    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        norm: Weight of the norm.
        weight: [hidden, out].
        bias: Added to the product, or None.
        eps: The norm's epsilon.
    """

    def __init__(
        self,
        norm: Float[Array, "*slots hidden"],
        weight: Float[Array, "*slots hidden out"],
        bias: Float[Array, "*slots out"] | None,
        *,
        eps: float,
    ) -> None:
        self.norm, self.weight = nnx.Param(norm), nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.eps = eps

    def __call__(self, h: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens out"]:
        """Project hidden states, in their dtype."""
        x = rms_norm(h, self.norm[...], self.eps) @ self.weight[...]
        return x if self.bias is None else x + self.bias[...][None, None, :]
