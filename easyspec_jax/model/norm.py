"""Root-mean-square normalisation."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*leading hidden"],
    weight: Float[Array, " hidden"],
    eps: float,
    offset: float = 0.0,
) -> Float[Array, "*leading hidden"]:
    """Divide x by its root mean square over the last axis, and multiply by a weight.

    Args:
        x: Any float dtype.
        weight: In x's dtype.
        eps: Added to the mean square.
        offset: Added to the weight, in float32: Gemma stores weights less one.

    Returns:
        The result in x's dtype; the root mean square is computed in float32.

    Examples:
        >>> rms_norm(jnp.array([3.0, -4.0, 0.0, 0.0]), jnp.ones(4), eps=0.0).tolist()
        [1.2000000476837158, -1.600000023841858, 0.0, 0.0]
    """
    # A sum of squares in bfloat16 would lose too many digits.
    wide = x.astype(jnp.float32)
    scale = 1.0 / jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + np.float32(eps))
    weight = jnp.expand_dims(weight, range(x.ndim - 1))
    if offset:
        # In bfloat16, 1 + weight would lose most digits of the weight.
        weight = weight.astype(jnp.float32) + np.float32(offset)
        return (wide * scale * weight).astype(x.dtype)
    return (wide * scale).astype(x.dtype) * weight


class RMSNorm(nnx.Module):
    """A root-mean-square norm and its weight; see rms_norm().

    The weight may carry a leading slot axis to `vmap` over.

    Attributes:
        weight: As checkpoints store it.
        eps: Added to the mean square.
        offset: Added to the weight.
    """

    def __init__(
        self, weight: Float[Array, "*slots hidden"], *, eps: float, offset: float = 0.0
    ) -> None:
        self.weight, self.eps, self.offset = nnx.Param(weight), eps, offset

    @property
    def dtype(self) -> DTypeLike:
        """Type of the weight, which is that of the hidden states."""
        return self.weight.dtype

    def __call__(self, x: Float[Array, "*leading hidden"]) -> Float[Array, "*leading hidden"]:
        """Norm x, in its dtype."""
        return rms_norm(x, self.weight[...], self.eps, self.offset)
