"""Root-mean-square normalisation."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*some hidden"], weight: Float[Array, " hidden"], eps: float
) -> Float[Array, "*some hidden"]:
    """x over its root mean square, times weight; computed in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = 1.0 / jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + np.float32(eps))
    return (wide * scale).astype(x.dtype) * jnp.expand_dims(weight, range(x.ndim - 1))
