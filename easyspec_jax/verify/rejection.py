"""Rejection sampling along a chain: the output has exactly the target's distribution, whatever the draft.

Leviathan, Kalman, Matias 2022 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.mesh import ALL_AXES, Axes
from easyspec_jax.model.collectives import shard_index
from easyspec_jax.sampling.noise import Keys, Purpose, gumbel, noise_keys, uniform
from easyspec_jax.sampling.shards import argmax, gather_rows, own_rows, whole_rows
from easyspec_jax.verify.base import Request, Verdict, warp_shards


@dataclass(frozen=True)
class Rejection:
    """The draft samples from its own warped distribution q; the target accepts with min(1, p / q).

    truncates: some request asks for top-k or top-p.
    """

    truncates: bool = False

    def propose(
        self, logits: Float[Array, "batch vocab_shard"], position: Int[Array, " batch"], request: Request, axes: Axes
    ) -> Int[Array, " batch"]:
        """A sample of the draft's warped distribution."""
        keys = noise_keys(request.seed, position[:, None], request.round, Purpose.DRAFT)[:, 0]
        size = logits.shape[-1]
        noise = gumbel(keys, shard_index(axes) * size, size)
        return argmax(warp_shards(logits, request, axes, self.truncates) + noise, axes)

    def verify(
        self,
        target: Float[Array, "batch levels+1 vocab_shard"],
        draft: Float[Array, "batch levels draft_shard"],
        drafted: Int[Array, "batch levels"],
        position: Int[Array, " batch"],
        request: Request,
        draft_axes: Axes,
    ) -> Verdict:
        """One all-to-all deals whole rows out to the devices, which decide about them independently."""
        batch, columns, _ = target.shape
        rows = batch * columns
        bonus = [(0, 0), (0, 1)]  # a column without a draft
        positions = position[:, None] + jnp.arange(columns, dtype=position.dtype)[None, :]
        of_row = request.take(jnp.repeat(jnp.arange(batch), columns))
        own = jax.tree.map(lambda x: own_rows(x, ALL_AXES), of_row)

        def keys(purpose: Purpose) -> Keys:
            return own_rows(noise_keys(request.seed, positions, request.round, purpose).reshape(rows), ALL_AXES)

        logits = jnp.pad(draft, [*bonus, (0, 0)]).reshape(rows, -1)
        p = self._distribution(whole_rows(target.reshape(rows, -1), ALL_AXES), own)
        q = self._distribution(whole_rows(logits, ALL_AXES, split=bool(draft_axes)), own)
        token = own_rows(jnp.pad(drafted, bonus).reshape(rows), ALL_AXES)
        has_draft = own_rows(jnp.pad(jnp.ones_like(drafted, bool), bonus).reshape(rows), ALL_AXES)

        passed = accept(p, q, token, uniform(keys(Purpose.ACCEPT)))
        noise = gumbel(keys(Purpose.RESIDUAL), 0, p.shape[-1])
        instead = sample(residual(p, jnp.where(has_draft[:, None], q, 0.0)), noise)
        passed = gather_rows(passed, rows, ALL_AXES).reshape(batch, columns)
        instead = gather_rows(instead, rows, ALL_AXES).reshape(batch, columns)
        return Verdict(passed[:, : columns - 1], instead)

    def _distribution(self, logits: Float[Array, "rows vocab"], request: Request) -> Float[Array, "rows vocab"]:
        return jax.nn.softmax(warp_shards(logits, request, (), self.truncates), axis=-1)


def accept(
    p: Float[Array, "rows vocab"],
    q: Float[Array, "rows vocab"],
    token: Int[Array, " rows"],
    u: Float[Array, " rows"],
) -> Bool[Array, " rows"]:
    """True with probability min(1, p(token) / q(token)) over u uniform in [0, 1)."""
    chosen = token[:, None]
    return u * jnp.take_along_axis(q, chosen, axis=-1)[:, 0] < jnp.take_along_axis(p, chosen, axis=-1)[:, 0]


def residual(p: Float[Array, "rows vocab"], q: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
    """max(0, p - q), unnormalised: what a rejected token is replaced from; p where it rounds to nothing."""
    rest = jnp.maximum(p - q, 0.0)
    return jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)


def sample(weights: Float[Array, "rows vocab"], noise: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """An id drawn with probability proportional to weights, by Gumbel noise."""
    return jnp.argmax(jnp.log(weights) + noise, axis=-1).astype(jnp.int32)
