"""The interface of a verifier."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, Self

import jax
from jaxtyping import Array, Float, Int, UInt32

from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.sampling.warp import shard_cutoff, warp
from easyspec_jax.verify.tree import Tree


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["seed", "round", "temperature", "top_k", "top_p"],
    meta_fields=[],
)
@dataclass(frozen=True)
class RowSampling:
    """Each row's noise and distribution: its seed, how many rounds it has had, its temperature, top-k and top-p."""

    seed: UInt32[Array, " batch"]
    round: Int[Array, " batch"]
    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]

    def repeat(self, times: int) -> Self:
        """Repeat each row a number of times in succession."""
        return jax.tree.map(lambda x: x.repeat(times), self)


CANDIDATES = 128
"""Ids that may follow a node: the draft's likeliest, as many of them as matter."""


class Branches(NamedTuple):
    """Worth of each token that may follow a node.

    score: decides which become nodes and which nodes are verified, best first; never above the parent's, -inf for
    never. log_prob: of the path from the root, under the draft. q: the token's probability after its parent.
    """

    score: Float[Array, "batch frontier ids"]
    log_prob: Float[Array, "batch frontier ids"]
    q: Float[Array, "batch frontier ids"]


class Verdict(NamedTuple):
    """The last accepted node (0, the root, if none is) and the token that follows it.

    The token is NO_CHOICE where the target's logits after that node are no numbers to choose by.
    """

    leaf: Int[Array, " batch"]
    token: Int[Array, " batch"]


def warp_rows(
    logits: Float[Array, "batch some vocab_shard"],
    request: RowSampling,
    axes: Axes,
    truncates: bool,
) -> Float[Array, "batch some vocab_shard"]:
    """Warped logits, whose vocabulary is split over axes. truncates: some row asks for top-k or top-p."""
    rows = logits.reshape(-1, logits.shape[-1])
    of_row = request.repeat(logits.shape[1])
    cut = (
        shard_cutoff(rows, of_row.temperature, of_row.top_k, of_row.top_p, axes)
        if truncates
        else None
    )
    return warp(rows, of_row.temperature, cut).reshape(logits.shape)


class Verifier(Protocol):
    """Called inside `shard_map`; hashable, because it is part of the compiled program."""

    def candidates(self, width: int) -> int:
        """Number of the draft's likeliest ids that branch() needs after each node of a tree of this width."""
        ...

    def branch(
        self,
        logits: Float[Array, "batch frontier ids"],
        ids: Int[Array, "batch frontier ids"],
        score: Float[Array, "batch frontier"],
        log_prob: Float[Array, "batch frontier"],
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Branches:
        """Rates the tokens at an absolute position, each of which may follow each node of the level before.

        logits: the draft's greatest after each of those nodes, in descending order, and their ids; score, log_prob: of
        those nodes, as Branches has them.
        """
        ...

    def verify(
        self,
        target: Float[Array, "batch nodes vocab_shard"],
        tree: Tree,
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Verdict:
        """Decides about a tree whose root is followed by the absolute position given.

        target: logits after each node, split over all devices. With a bare root this is plain decoding.
        """
        ...
