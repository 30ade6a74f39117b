"""A pre-norm and the product behind it, the way into attention and into a feed-forward part."""

from flax import nnx
from jaxtyping import Array, Float

from easyspec_jax.model.norm import rms_norm


class Projection(nnx.Module):
    """RMS norm, product and, in some families, bias; weights are [in, out]. Leaves may carry a leading slot axis."""

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
        x = rms_norm(h, self.norm[...], self.eps) @ self.weight[...]
        return x if self.bias is None else x + self.bias[...][None, None, :]
