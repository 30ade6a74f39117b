"""Coupled sampling: draft and target choose by the same random numbers, so they often agree.

With one seed the text is the same with any draft, method or mesh, at any temperature. The method is
that of Daliri, Musco and Suresh 2024 (arXiv 2408.07978).
"""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.sampling.noise import Purpose, gumbel, noise_keys
from easyspec_jax.verify.greedy import Greedy
from easyspec_jax.verify.verifier import CANDIDATES, RowSampling, warp_rows


@dataclass(frozen=True)
class Coupled(Greedy):
    """Greedy decoding of warped logits plus Gumbel noise.

    Noise belongs to the request, the position and the token id. Over that noise, the arg-max of
    warped logits plus Gumbel noise is a sample of the warped distribution (the Gumbel-max trick).
    The draft adds the same noise to its own logits, so its arg-max is often the target's. A token
    is accepted only if it is the target's own choice, so the text is a function of the target and
    the noise.

    Attributes:
        truncates: Whether some request asks for top-k or top-p.
    """

    truncates: bool = False

    def candidates(self, width: int) -> int:
        """Return CANDIDATES or width, whichever is more: noise may prefer any of the likely ids."""
        return max(width, CANDIDATES)

    def preference(
        self,
        logits: Float[Array, "batch nodes ids"],
        ids: Int[Array, "batch nodes ids"],
        position: Int[Array, "batch nodes"],
        request: RowSampling,
        axes: Axes,
    ) -> Float[Array, "batch nodes ids"]:
        """Return warped logits plus each position's noise. See Greedy.preference for arguments."""
        # Round 0 always: a position that is drafted again keeps its noise, and the target's choice
        # there does not depend on how many rounds the text has taken.
        keys = noise_keys(request.seed, position, 0 * request.round, Purpose.TOKEN)
        return warp_rows(logits, request, axes, self.truncates) + gumbel(keys, ids)
