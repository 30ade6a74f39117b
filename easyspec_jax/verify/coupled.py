"""Common random numbers: with one seed the text is the same with any draft, method or mesh, at any temperature.

Daliri, Musco, Suresh 2024 (arXiv 2408.07978).
"""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.sampling.noise import Purpose, gumbel, noise_keys
from easyspec_jax.verify.greedy import Greedy
from easyspec_jax.verify.verifier import CANDIDATES, RowSampling, warp_rows


@dataclass(frozen=True)
class Coupled(Greedy):
    """The token at a position is the arg-max of warped logits plus noise that belongs to the request and the position.

    Over the noise this is a sample of the warped distribution (the Gumbel-max trick). The draft adds the same noise to
    its own logits, so it agrees often; a token is accepted only if it is the target's own, so the text is a function
    of the target and the noise. truncates: some request asks for top-k or top-p.
    """

    truncates: bool = False

    def candidates(self, width: int) -> int:
        """Noise may prefer any of them."""
        return max(width, CANDIDATES)

    def preference(
        self,
        logits: Float[Array, "batch some ids"],
        ids: Int[Array, "batch some ids"],
        position: Int[Array, "batch some"],
        request: RowSampling,
        axes: Axes,
    ) -> Float[Array, "batch some ids"]:
        """Warped logits under the positions' noise."""
        keys = noise_keys(request.seed, position, 0 * request.round, Purpose.TOKEN)
        return warp_rows(logits, request, axes, self.truncates) + gumbel(keys, ids)
