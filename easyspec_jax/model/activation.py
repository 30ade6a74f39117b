"""How the gate of a feed-forward part acts on its other half."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from easyspec_jax.checkpoint.config import Activation

Half = Float[Array, "*shape inner"]

CLAMP = np.float32(7)
"""Largest gate of a clamped SwiGLU, and largest size of what it acts on."""

GAIN = np.float32(1.702)
"""Factor of its gate within the sigmoid."""


def _clamped_swiglu(gate: Half, up: Half) -> Half:
    # Scalars that are cast, because gate and up may be bfloat16.
    clamp, gain, one = (np.asarray(x, gate.dtype) for x in (CLAMP, GAIN, 1))
    gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
    return (up + one) * gate * jax.nn.sigmoid(gain * gate)


_GATED: dict[Activation, Callable[[Half, Half], Half]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu_pytorch_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "clamped_swiglu": _clamped_swiglu,
}


def gated(activation: Activation, gate: Half, up: Half) -> Half:
    """Return what the output matrix of a feed-forward part is multiplied by.

    Args:
        activation: Function of the gate.
        gate: Outputs of the gate.
        up: The other half.

    Examples:
        >>> gate, up = jnp.array([0.0, 9.0]), jnp.array([1.0, -9.0])
        >>> [round(float(x), 3) for x in gated("clamped_swiglu", gate, up)]
        [0.0, -42.0]
    """
    return _GATED[activation](gate, up)
