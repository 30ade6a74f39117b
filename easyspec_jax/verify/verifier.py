"""The interface of a verifier.

A verifier answers two questions in every round. While the draft grows a tree: which tokens are
worth a node (branch)? When the target's logits of all nodes are there: how far does the text follow
the tree, and which token comes next (verify)?
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, Self

import jax
from jaxtyping import Array, Float, Int, UInt32

from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.sampling.warp import min_p_cutoff, shard_cutoff, warp
from easyspec_jax.verify.tree import Tree


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["seed", "round", "temperature", "top_k", "top_p", "min_p"],
    meta_fields=[],
)
@dataclass(frozen=True)
class RowSampling:
    """Each row's own noise and distribution, as arrays, so that no value needs its own program.

    Attributes:
        seed: Request seed.
        round: Rounds that the request has had.
        temperature: Above 0, except with Greedy, which does not read it.
        top_k: Ids to keep; 0 keeps all.
        top_p: Probability to keep; 1 keeps all.
        min_p: Least probability to keep, as a share of the greatest; 0 keeps all. None if no row
            of the batch asks for any.
    """

    seed: UInt32[Array, " batch"]
    round: Int[Array, " batch"]
    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"] | None = None

    def repeat(self, times: int) -> Self:
        """Repeat each row: [a, b] -> [a, a, b, b] for 2 times."""
        return jax.tree.map(lambda x: x.repeat(times), self)


CANDIDATES = 128
"""Likeliest ids of the draft that sampling and trees consider after a node; no other is drafted."""


class Branches(NamedTuple):
    """Worth of each token that may follow each node of a level.

    Attributes:
        score: Decides which tokens become nodes and which nodes are verified, the best first. Never
            above the parent's score; -inf for a token that must not become a node.
        log_prob: Log-probability of the path from the root under the draft; Greedy and Coupled use
            it as the score, too. It decides where a draft ends early.
        q: The draft's probability of the token after its parent.
    """

    score: Float[Array, "batch frontier ids"]
    log_prob: Float[Array, "batch frontier ids"]
    q: Float[Array, "batch frontier ids"]


class Verdict(NamedTuple):
    """How far the text follows a tree, and how it goes on.

    Attributes:
        leaf: The last accepted node; 0, the root, if no drafted token is accepted.
        token: The token after that node, chosen by the target. NO_CHOICE where the target's logits
            there do not define a choice (a NaN, or nothing that is finite).
    """

    leaf: Int[Array, " batch"]
    token: Int[Array, " batch"]


def warp_rows(
    logits: Float[Array, "batch nodes vocab_shard"],
    request: RowSampling,
    axes: Axes,
    truncates: bool,
) -> Float[Array, "batch nodes vocab_shard"]:
    """Warp the logits of several nodes per row.

    Args:
        logits: Logits after each node; the vocabulary is split over axes.
        request: Each row's temperature, min-p, top-k and top-p.
        axes: Mesh axes that split the vocabulary; () for whole rows.
        truncates: Whether some row asks for top-k or top-p. If not, nothing is sorted or sent.

    Returns:
        Logits over temperature, -inf where truncated.
    """
    # Every node is a row of its own: [batch, nodes, vocab_shard] -> [batch * nodes, vocab_shard].
    # A text's numbers are repeated for each of its nodes: [batch] -> [batch * nodes].
    rows = logits.reshape(-1, logits.shape[-1])
    of_row = request.repeat(logits.shape[1])
    cut = None
    if truncates:
        numbers = of_row.temperature, of_row.top_k, of_row.top_p
        cut = shard_cutoff(rows, *numbers, axes, of_row.min_p)
    elif of_row.min_p is not None:
        cut = min_p_cutoff(rows, of_row.temperature, of_row.min_p, axes)
    return warp(rows, of_row.temperature, cut).reshape(logits.shape)


class Verifier(Protocol):
    """Rules by which a draft proposes and the target accepts.

    Methods are called inside `shard_map`. Instances must be hashable: they are static arguments of
    the compiled program.
    """

    def candidates(self, width: int) -> int:
        """Return how many of the draft's likeliest ids branch() needs after each node.

        Args:
            width: Nodes per level of the tree.
        """
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
        """Rate the tokens that may follow the nodes of the deepest level so far.

        Args:
            logits: The draft's greatest logits after each node, in descending order.
            ids: Their token ids.
            score: The nodes' own scores, as an earlier call gave them; 0 for the root.
            log_prob: Likewise their log-probabilities; 0 for the root.
            position: Absolute position of the tokens to rate.
            request: Each row's noise and distribution.
        """
        ...

    def verify(
        self,
        target: Float[Array, "batch nodes vocab_shard"],
        tree: Tree,
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Verdict:
        """Decide about a whole tree at once. With a bare root this is plain decoding.

        Args:
            target: The target's logits after each node, changed already as sampling/adjust.py does;
                the vocabulary is split over all devices.
            tree: The drafted tree.
            position: Absolute position of the token after the root.
            request: Each row's noise and distribution.
        """
        ...
