"""Warping: the transformations of logits that are part of the distribution being preserved."""

from jaxtyping import Array, Float


def warp(logits: Float[Array, "rows vocab"], temperature: Float[Array, " rows"]) -> Float[Array, "rows vocab"]:
    """Logits over temperature, which must be positive."""
    return logits / temperature[:, None]
