"""Greedy decoding: a drafted token passes if it is the target's arg-max."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyspec_jax.mesh import ALL_AXES, Axes
from easyspec_jax.sampling.shards import argmax
from easyspec_jax.verify.base import Request, Verdict


@dataclass(frozen=True)
class Greedy:
    """The arg-max stays on vocabulary shards; no row moves."""

    def propose(
        self, logits: Float[Array, "batch vocab_shard"], position: Int[Array, " batch"], request: Request, axes: Axes
    ) -> Int[Array, " batch"]:
        """The draft's arg-max."""
        return argmax(logits, axes)

    def verify(
        self,
        target: Float[Array, "batch levels+1 vocab_shard"],
        draft: Float[Array, "batch levels draft_shard"],
        drafted: Int[Array, "batch levels"],
        position: Int[Array, " batch"],
        request: Request,
        draft_axes: Axes,
    ) -> Verdict:
        """Accepts the tokens that the target would have proposed in the draft's place."""
        batch, columns, _ = target.shape
        positions = position[:, None] + jnp.arange(columns, dtype=position.dtype)[None, :]
        rows = jnp.repeat(jnp.arange(batch), columns)
        tokens = self.propose(target.reshape(batch * columns, -1), positions.reshape(-1), request.take(rows), ALL_AXES)
        tokens = tokens.reshape(batch, columns)
        return Verdict(tokens[:, : drafted.shape[1]] == drafted, tokens)
