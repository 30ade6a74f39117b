"""The norm and product that lead into an attention and into an MLP."""

from flax import nnx
from jaxtyping import Array, Float

from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import rms_norm


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
        weight: Matrix,
        bias: Float[Array, "*slots out"] | None,
        *,
        eps: float,
    ) -> None:
        self.norm, self.weight = nnx.Param(norm), weight
        self.bias = None if bias is None else nnx.Param(bias)
        self.eps = eps

    def __call__(self, h: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens out"]:
        """Project hidden states, in their dtype."""
        x = self.weight(rms_norm(h, self.norm[...], self.eps))
        return x if self.bias is None else x + self.bias[...][None, None, :]
