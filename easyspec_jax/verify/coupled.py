"""Common random numbers: with one seed the text is the same with any draft, method or mesh, at any temperature.

Daliri, Musco, Suresh 2024 (arXiv 2408.07978).
"""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from easyspec_jax.mesh import Axes
from easyspec_jax.model.collectives import shard_index
from easyspec_jax.sampling.noise import Purpose, gumbel, noise_keys
from easyspec_jax.sampling.shards import argmax
from easyspec_jax.verify.base import Request, warp_shards
from easyspec_jax.verify.greedy import Greedy


@dataclass(frozen=True)
class Coupled(Greedy):
    """The token at a position is the arg-max of warped logits plus noise that belongs to the request and the position.

    Over the noise this is a sample of the warped distribution (the Gumbel-max trick). The draft adds the same noise to
    its own logits, so it agrees often; a token is accepted only if it is the target's own, so the text is a function
    of the target and the noise. truncates: some request asks for top-k or top-p.
    """

    truncates: bool = False

    def propose(
        self, logits: Float[Array, "batch vocab_shard"], position: Int[Array, " batch"], request: Request, axes: Axes
    ) -> Int[Array, " batch"]:
        """The draft's arg-max under the position's noise."""
        keys = noise_keys(request.seed, position[:, None], 0 * request.round, Purpose.TOKEN)[:, 0]
        size = logits.shape[-1]
        noise = gumbel(keys, shard_index(axes) * size, size)
        return argmax(warp_shards(logits, request, axes, self.truncates) + noise, axes)
