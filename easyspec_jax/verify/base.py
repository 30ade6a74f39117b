"""What a verifier is."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, Self

import jax
from jaxtyping import Array, Bool, Float, Int, UInt32

from easyspec_jax.mesh import Axes
from easyspec_jax.sampling.warp import shard_cutoff, warp


@partial(
    jax.tree_util.register_dataclass, data_fields=["seed", "round", "temperature", "top_k", "top_p"], meta_fields=[]
)
@dataclass(frozen=True)
class Request:
    """Each row's noise and distribution: its seed, how many rounds it has had, its temperature, top-k and top-p."""

    seed: UInt32[Array, " batch"]
    round: Int[Array, " batch"]
    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]

    def take(self, rows: Int[Array, " rows"]) -> Self:
        """The same for some of the rows, perhaps several times."""
        return jax.tree.map(lambda x: x[rows], self)


class Verdict(NamedTuple):
    """accept[b, i]: drafted token i passes if all before it did. token[b, i]: what follows if i is the first not to.

    token has one column more, the bonus token after a draft that passed whole.
    """

    accept: Bool[Array, "batch levels"]
    token: Int[Array, "batch levels+1"]


def warp_shards(
    logits: Float[Array, "rows vocab_shard"], request: Request, axes: Axes, truncates: bool
) -> Float[Array, "rows vocab_shard"]:
    """The rows' warped logits, whose vocabulary is split over axes. truncates: some row asks for top-k or top-p."""
    cut = shard_cutoff(logits, request.temperature, request.top_k, request.top_p, axes) if truncates else None
    return warp(logits, request.temperature, cut)


class Verifier(Protocol):
    """Called inside `shard_map`; hashable, because it is part of the compiled program."""

    def propose(
        self, logits: Float[Array, "batch vocab_shard"], position: Int[Array, " batch"], request: Request, axes: Axes
    ) -> Int[Array, " batch"]:
        """The draft's token for an absolute position; axes: what the draft's logits are split over."""
        ...

    def verify(
        self,
        target: Float[Array, "batch levels+1 vocab_shard"],
        draft: Float[Array, "batch levels draft_shard"],
        drafted: Int[Array, "batch levels"],
        position: Int[Array, " batch"],
        request: Request,
        draft_axes: Axes,
    ) -> Verdict:
        """Decides about drafted tokens, the first at the absolute position given.

        target: logits before each drafted token and after the last, split over all devices; draft: those it was drawn
        from, split over draft_axes. Without drafted tokens this is plain decoding.
        """
        ...
