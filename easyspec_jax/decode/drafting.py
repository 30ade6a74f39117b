"""Growing a token tree: one pass of the draft a level, over all of the level's nodes at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.model.attention import Nodes
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.parallel.collectives import from_first_device
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.sampling.vocabulary import top
from easyspec_jax.verify import Branches, RowSampling, Verifier
from easyspec_jax.verify.tree import Tree


class Level(NamedTuple):
    """The nodes of one depth; fields as those of Tree, and log_prob as that of Branches."""

    tokens: Int[Array, "batch width"]
    parent: Int[Array, "batch width"]
    rank: Int[Array, "batch width"]
    score: Float[Array, "batch width"]
    log_prob: Float[Array, "batch width"]
    ancestors: Bool[Array, "batch width nodes"]


class Candidates(NamedTuple):
    """For each node of a level, the ids that may follow it and their probabilities under the draft."""

    ids: Int[Array, "batch width ids"]
    q: Float[Array, "batch width ids"]


def draft_tree(
    draft: Decoder,
    h: Float[Array, "batch hidden"],
    caches: Caches,
    root: Int[Array, " batch"],
    position: Int[Array, " batch"],
    request: RowSampling,
    verifier: Verifier,
    levels: int,
    width: int,
) -> tuple[Tree, Caches]:
    """`levels` levels of `width` nodes below each row's token `root`, and caches with the KV of all but the last level.

    h: the draft's hidden states of the roots, which decide the first level; each further one costs a fuzzy pass.
    position: of the roots, in the text and in the caches, where node i takes the entry position + i.
    """

    def grow(
        level: Level, h: Float[Array, "batch some hidden"], depth: Array
    ) -> tuple[Level, Candidates]:
        logits = draft.logits(h)
        best, ids = top(
            logits.reshape(-1, logits.shape[-1]), verifier.candidates(width), draft.axes
        )
        best, ids = (x.reshape(*h.shape[:2], -1) for x in (best, ids))
        branches = verifier.branch(
            best, ids, level.score, level.log_prob, position + depth, request
        )
        first, above = first_node(depth, width), first_node(depth - 1, width)
        return best_branches(level, ids, branches, first, above, width), Candidates(ids, branches.q)

    def deepen(
        carry: tuple[Level, Caches], depth: Array
    ) -> tuple[tuple[Level, Caches], tuple[Level, Candidates]]:
        level, caches = carry
        depths = jnp.broadcast_to(depth, level.tokens.shape)
        nodes = Nodes(position + first_node(depth, width), position, depths, level.ancestors)
        h, caches = draft(level.tokens, caches, nodes, run_fuzzy)
        level, candidates = grow(level, h, depth + 1)
        return (level, caches), (level, candidates)

    top_level = _root_level(root, 1 + levels * width)
    first, of_root = grow(top_level, h[:, None], jnp.ones((), jnp.int32))
    # A loop, because its body compiles once however many levels there are.
    (_, caches), (later, of_later) = jax.lax.scan(
        deepen, (first, caches), jnp.arange(1, levels, dtype=jnp.int32)
    )
    tree = _assemble((top_level, first, later), (of_root, of_later), width)
    # Where each device has drafted for itself, kernels need not round alike.
    return (tree if draft.axes else from_first_device(tree, ALL_AXES)), caches


def first_node(depth: Array, width: int) -> Array:
    """The number of a depth's first node; the root is node 0."""
    return jnp.maximum(1 + (depth - 1) * width, 0)


def best_branches(
    level: Level,
    ids: Int[Array, "batch some ids"],
    branches: Branches,
    first: Array,
    above: Array,
    width: int,
) -> Level:
    """The best `width` branches of a level as the next level; first, above: numbers of both levels' first nodes."""

    def chosen(x: Array) -> Array:
        return jnp.take_along_axis(x.reshape(x.shape[0], -1), place, axis=1)

    score, place = jax.lax.top_k(branches.score.reshape(ids.shape[0], -1), width)
    parent, rank = jnp.divmod(place, ids.shape[2])
    own = jax.nn.one_hot(
        first + jnp.arange(width, dtype=jnp.int32), level.ancestors.shape[2], dtype=bool
    )
    return Level(
        tokens=chosen(ids),
        parent=above + parent,
        rank=rank,
        score=score,
        log_prob=chosen(branches.log_prob),
        ancestors=jnp.take_along_axis(level.ancestors, parent[:, :, None], axis=1) | own[None],
    )


def _root_level(tokens: Int[Array, " batch"], nodes: int) -> Level:
    """Level 0 of a tree."""
    zero = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    certain = zero.astype(jnp.float32)
    is_root = jnp.broadcast_to(jnp.arange(nodes) == 0, (tokens.shape[0], 1, nodes))
    return Level(tokens[:, None], zero, zero, certain, certain, is_root)


def _assemble(
    levels: tuple[Level, Level, Level], candidates: tuple[Candidates, Candidates], width: int
) -> Tree:
    """The tree of levels 0, 1 and, stacked, the others; candidates: of level 0 and, stacked, of all but the last."""

    def in_order(first: Array, *others: Array) -> Array:
        *single, stacked = others
        stacked = jnp.moveaxis(stacked, 0, 1)
        flat = stacked.reshape(stacked.shape[0], -1, *stacked.shape[3:])
        return jnp.concatenate([first, *single, flat], axis=1)

    nodes = jax.tree.map(in_order, *levels)
    entry = np.arange(nodes.tokens.shape[1], dtype=np.int32)
    depth = -(entry // -width)
    ids, q = (
        jnp.pad(x, [(0, 0), (0, width), (0, 0)])  # leaves have none
        for x in jax.tree.map(in_order, *candidates)
    )
    return Tree(
        tokens=nodes.tokens,
        parent=nodes.parent,
        depth=jnp.broadcast_to(depth, nodes.tokens.shape),
        entry=jnp.broadcast_to(entry, nodes.tokens.shape),
        score=nodes.score,
        ancestors=nodes.ancestors,
        rank=nodes.rank,
        candidates=ids,
        q=q,
        width=width,
    )
