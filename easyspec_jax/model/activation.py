"""Functions of the gate of a feed-forward part."""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array

from easyspec_jax.checkpoint.config import Activation

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
"""By the names of Hugging Face's `hidden_act`."""
