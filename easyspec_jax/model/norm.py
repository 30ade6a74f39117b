"""Root-mean-square normalisation."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*leading hidden"], weight: Float[Array, " hidden"], eps: float
) -> Float[Array, "*leading hidden"]:
    """Divide x by its root mean square over the last axis, and multiply by a weight.

    Args:
        x: Any float dtype.
        weight: In x's dtype.
        eps: Added to the mean square.

    Returns:
        The result in x's dtype; the root mean square is computed in float32.

    Examples:
        >>> rms_norm(jnp.array([3.0, -4.0, 0.0, 0.0]), jnp.ones(4), eps=0.0).tolist()
        [1.2000000476837158, -1.600000023841858, 0.0, 0.0]
    """
    # A sum of squares in bfloat16 would lose too many digits.
    wide = x.astype(jnp.float32)
    scale = 1.0 / jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + np.float32(eps))
    return (wide * scale).astype(x.dtype) * jnp.expand_dims(weight, range(x.ndim - 1))
