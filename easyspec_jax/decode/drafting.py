"""Growing a token tree: one pass of the draft per level, over all nodes of the level at once."""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.model.windows import Nodes
from easyspec_jax.parallel.collectives import from_first_device
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.sampling.adjust import adjust
from easyspec_jax.sampling.adjustments import RowAdjustments
from easyspec_jax.sampling.vocabulary import NO_TOKEN, top
from easyspec_jax.verify import Branches, RowSampling
from easyspec_jax.verify.tree import Tree

T = TypeVar("T")


class Level(NamedTuple):
    """The nodes of one depth.

    Attributes:
        tokens: As in Tree, like the fields below.
        parent: Numbers of the nodes that these follow.
        rank: Which of its parent's candidates each node is.
        score: Worth of verifying each node; -inf where there is none.
        log_prob: Log-probability of each node's path; see Branches.
        ancestors: For each node, a mask over the whole tree: the node and its ancestors.
        drafted: For each node, the tokens from it up to the root; see verify.tree.drafted_tokens.
            None where no row's logits are changed.
    """

    tokens: Int[Array, "batch width"]
    parent: Int[Array, "batch width"]
    rank: Int[Array, "batch width"]
    score: Float[Array, "batch width"]
    log_prob: Float[Array, "batch width"]
    ancestors: Bool[Array, "batch width nodes"]
    drafted: Int[Array, "batch width levels"] | None = None


class Candidates(NamedTuple):
    """Tokens that may follow each node of a level.

    Attributes:
        ids: Token ids.
        q: Their probabilities under the draft.
    """

    ids: Int[Array, "batch width ids"]
    q: Float[Array, "batch width ids"]


class Grown(NamedTuple):
    """A tree while it grows.

    Attributes:
        depth: Depth of its deepest level, at least 1.
        level: That level.
        goes_on: Rows that draft another one.
        caches: The draft's caches.
        levels: Levels 1, 2, ... one after the other, [levels, batch, width, ...]; those to come
            have no nodes.
        candidates: Tokens that may follow the nodes of each of these levels, likewise; none below
            the deepest one.
    """

    depth: Int[Array, ""]
    level: Level
    goes_on: Bool[Array, " batch"]
    caches: Caches
    levels: Level
    candidates: Candidates


def draft_tree(
    draft: Decoder,
    h: Float[Array, "batch hidden"],
    caches: Caches,
    root: Int[Array, " batch"],
    position: Int[Array, " batch"],
    request: RowSampling,
    config: RoundConfig,
    adjustments: RowAdjustments | None = None,
    live: Bool[Array, " batch"] | None = None,
    threshold: Float[Array, ""] | None = None,
    committed: Int[Array, " batch"] | None = None,
) -> tuple[Tree, Float[Array, "batch levels"] | None, Caches]:
    """Grow a tree below each row's last token: config.levels levels at most, of config.width nodes.

    The hidden states of the roots decide the first level; each further level costs a fuzzy pass
    over the level above it. Nodes are numbered level by level. For width 2:

        level    0    1       2       3
        nodes    0    1 2     3 4     5 6

    Args:
        draft: The draft.
        h: Its final hidden states of the roots.
        caches: Its caches, which hold the text up to and including the root.
        root: Each row's root, the last token of its text.
        position: Position of the root in the text and in the caches; node i takes the cache entry
            position + i.
        request: Each row's noise and distribution.
        config: The round's configuration, of at least one level.
        adjustments: Each row's changes to logits, over the ids that the draft has here. It proposes
            what the changed logits prefer, since the target's are changed alike.
        live: Rows that need a draft; None for all.
        threshold: Confidence that another level needs; None for the configuration's.
        committed: Committed entries of each row in the draft's caches; None for all before the
            root.

    Returns:
        The trees, the same on every device; as in Report, the confidence; and the caches, with keys
        and values of all nodes but those of each row's last level.
    """
    live = jnp.ones(root.shape, bool) if live is None else live
    least = jnp.float32(config.confidence_threshold) if threshold is None else threshold
    growth = _Growth(draft, position, request, config, adjustments, live, least, committed)
    top_level = _root_level(root, config)
    if adjustments is not None:
        none = jnp.full((root.shape[0], 1, config.levels), NO_TOKEN, jnp.int32)
        top_level = top_level._replace(drafted=none)
    of_root, start = growth.begin(top_level, h, caches)
    # A loop, because its body compiles once however many levels there are. Only if something may
    # end it early is its length unknown to XLA, and to the planner.
    if config.ends_early:
        grown = jax.lax.while_loop(growth.is_unfinished, growth.deepen, start)
    else:
        grown = jax.lax.fori_loop(1, config.levels, lambda _, g: growth.deepen(g), start)
    tree = _assemble(top_level, of_root, grown.levels, grown.candidates, config.width)
    confidence = jnp.exp(_confidence(grown.levels)).T if config.learns_threshold else None
    if not draft.axes:
        # A replicated draft runs on every device by itself, and kernels need not round alike: let
        # all take the first device's tree.
        tree, confidence = from_first_device((tree, confidence), ALL_AXES)
    return tree, confidence, grown.caches


@dataclass(frozen=True)
class _Growth:
    """The arguments of draft_tree() that every level shares."""

    draft: Decoder
    position: Int[Array, " batch"]
    request: RowSampling
    config: RoundConfig
    adjustments: RowAdjustments | None
    live: Bool[Array, " batch"]
    threshold: Float[Array, ""]
    committed: Int[Array, " batch"] | None

    def begin(
        self, root: Level, h: Float[Array, "batch hidden"], caches: Caches
    ) -> tuple[Candidates, Grown]:
        """Choose the first level; return what may follow the root, too."""
        levels, one = self.config.levels, jnp.ones((), jnp.int32)
        first, of_root = self.choose(root, h[:, None], one)
        room = levels, *first.tokens.shape, of_root.ids.shape[2]
        return of_root, Grown(
            *(one, first, self.goes_on(first), caches),
            levels=_put(_no_levels(first, levels), first, one - 1),
            candidates=Candidates(
                jnp.full(room, NO_TOKEN, jnp.int32), jnp.zeros(room, of_root.q.dtype)
            ),
        )

    def is_unfinished(self, grown: Grown) -> Bool[Array, ""]:
        """Return whether any row needs another level."""
        return (grown.depth < self.config.levels) & jnp.any(grown.goes_on)

    def deepen(self, grown: Grown) -> Grown:
        """Run the draft over the deepest level, and choose the next one's nodes."""
        level, depth = grown.level, grown.depth
        entry = self.position + first_node(depth, self.config.width)
        depths = jnp.broadcast_to(depth, level.tokens.shape)
        nodes = Nodes(entry, self.position, depths, level.ancestors)
        h, caches = self.draft(level.tokens, grown.caches, nodes, run_fuzzy, self.committed)
        below, candidates = self.choose(level, h, depth + 1)
        if self.config.ends_early:
            below, candidates = _of_rows(grown.goes_on, below, candidates)
        return Grown(
            depth + 1,
            below,
            self.goes_on(below),
            caches,
            levels=_put(grown.levels, below, depth),
            candidates=_put(grown.candidates, candidates, depth - 1),
        )

    def choose(
        self, level: Level, h: Float[Array, "batch some hidden"], depth: Array
    ) -> tuple[Level, Candidates]:
        """Choose the nodes of a depth from the hidden states of the level above it."""
        config, draft, after = self.config, self.draft, self.position + depth
        logits = draft.logits(h)
        if self.adjustments is not None and level.drafted is not None:
            positions = jnp.broadcast_to(after[:, None], h.shape[:2])
            logits = adjust(
                *(logits, positions, level.drafted, self.adjustments, config.stop_ids, draft.axes),
                config.grammars,
            )
        # [batch, some, vocab_shard] -> [batch * some, vocab_shard] -> whole rows' best ids
        rows = logits.reshape(-1, logits.shape[-1])
        best, ids = top(rows, config.candidates, draft.axes)
        best, ids = best.reshape(*h.shape[:2], -1), ids.reshape(*h.shape[:2], -1)
        branches = config.verifier.branch(
            best, ids, level.score, level.log_prob, after, self.request
        )
        if self.adjustments is not None and self.adjustments.grammar is not None:
            branches = _without_dead_ends(branches, best)
        first, above = first_node(depth, config.width), first_node(depth - 1, config.width)
        chosen = best_branches(level, ids, branches, first, above, config.width)
        return chosen, Candidates(ids, branches.q)

    def goes_on(self, level: Level) -> Bool[Array, " batch"]:
        """Return which rows draft another level below this one."""
        if not self.config.ends_early:
            return self.live
        likely = jnp.exp(_confidence(level)) >= self.threshold
        if not self.draft.axes:
            likely = from_first_device(likely, ALL_AXES)  # passes communicate: all run as many
        return self.live & likely


def _confidence(level: Level) -> Float[Array, "*levels batch"]:
    """Return the log-probability of the path to each row's first node, of one level or a stack.

    The first node is the likeliest, except with Rejection, where nodes are drawn.
    """
    # Nodes of a further level push others out of a tree that is pruned. Whether one stays must not
    # depend on its own token, or rejection would not be exact. None can push out the first one.
    return jnp.where(level.score > -jnp.inf, level.log_prob, -jnp.inf)[..., 0]


def _of_rows(
    rows: Bool[Array, " batch"], level: Level, candidates: Candidates
) -> tuple[Level, Candidates]:
    """Leave out the nodes of other rows, and what could follow the nodes above."""
    # Whether a row goes on depends on the tokens that it has drafted, never on those to come. So
    # the texts of rejection sampling keep their distribution.
    score = jnp.where(rows[:, None], level.score, -jnp.inf)
    ids = jnp.where(rows[:, None, None], candidates.ids, NO_TOKEN)
    q = jnp.where(rows[:, None, None], candidates.q, 0.0)
    return level._replace(score=score), Candidates(ids, q)


def _no_levels(like: Level, levels: int) -> Level:
    """Make room for all levels, whose nodes do not exist yet."""
    room: Level = jax.tree.map(lambda x: jnp.zeros((levels, *x.shape), x.dtype), like)
    own = jnp.eye(like.ancestors.shape[2], dtype=bool)[1:]  # [levels * width, nodes]
    own = own.reshape(levels, 1, *like.ancestors.shape[1:])
    return room._replace(
        score=jnp.full_like(room.score, -jnp.inf),
        ancestors=jnp.broadcast_to(own, room.ancestors.shape),
    )


def _put(stack: T, one: T, index: Array) -> T:
    """Put the arrays of one level at an index of those of all."""
    return jax.tree.map(
        lambda every, x: jax.lax.dynamic_update_index_in_dim(every, x, index, 0), stack, one
    )


def _without_dead_ends(branches: Branches, logits: Float[Array, "batch some ids"]) -> Branches:
    """Leave out what follows nodes after which nothing is allowed; it has no probabilities."""
    dead = jnp.isneginf(logits[:, :, :1])  # the best of each node's
    return branches._replace(
        score=jnp.where(dead, -jnp.inf, branches.score), q=jnp.where(dead, 0.0, branches.q)
    )


def first_node(depth: Array, width: int) -> Array:
    """Return the number of a depth's first node; the root is node 0.

    Examples:
        >>> first_node(jnp.arange(4), width=3).tolist()
        [0, 1, 4, 7]
    """
    return jnp.maximum(1 + (depth - 1) * width, 0)


def best_branches(
    level: Level,
    ids: Int[Array, "batch some ids"],
    branches: Branches,
    first: Array,
    above: Array,
    width: int,
) -> Level:
    """Make the next level of the best `width` branches below a level.

    Branches compete over the whole level, so a node may get several children or none.

    Args:
        level: The level above.
        ids: Tokens that may follow each of its nodes.
        branches: Their worth.
        first: Number of the next level's first node.
        above: Number of the first node of the level above.
        width: Nodes to choose.

    Returns:
        The next level, best first.

    Examples:
        Below the root, number 0, two of three branches become nodes 1 and 2:

        >>> zero = jnp.zeros((1, 1), jnp.int32)
        >>> root = Level(zero, zero, zero, jnp.zeros((1, 1)), jnp.zeros((1, 1)),
        ...              jnp.array([[[True, False, False]]]))
        >>> score = jnp.log(jnp.array([[[0.2, 0.5, 0.3]]]))
        >>> ids = jnp.array([[[7, 8, 9]]])
        >>> branches = Branches(score, score, jnp.exp(score))
        >>> level = best_branches(root, ids, branches, jnp.array(1), jnp.array(0), width=2)
        >>> level.tokens.tolist(), level.parent.tolist(), level.rank.tolist()
        ([[8, 9]], [[0, 0]], [[1, 2]])
        >>> level.ancestors.astype(int).tolist()
        [[[1, 1, 0], [1, 0, 1]]]
    """

    def chosen(x: Array) -> Array:
        return jnp.take_along_axis(x.reshape(x.shape[0], -1), branch, axis=1)

    # All branches of the level in one row, [batch, some * ids]: branch = parent * ids + rank.
    score, branch = jax.lax.top_k(branches.score.reshape(ids.shape[0], -1), width)
    parent, rank = jnp.divmod(branch, ids.shape[2])
    own = jax.nn.one_hot(
        first + jnp.arange(width, dtype=jnp.int32), level.ancestors.shape[2], dtype=bool
    )
    tokens, drafted = chosen(ids), None
    if level.drafted is not None:
        # A node's own token comes before those of its parent: [7, 6, -] -> [8, 7, 6].
        above_it = jnp.take_along_axis(level.drafted, parent[:, :, None], axis=1)
        drafted = jnp.concatenate([tokens[:, :, None], above_it[:, :, :-1]], axis=2)
    return Level(
        tokens=tokens,
        parent=above + parent,
        rank=rank,
        score=score,
        log_prob=chosen(branches.log_prob),
        # A node's ancestors are its parent's and itself: [batch, width, nodes].
        ancestors=jnp.take_along_axis(level.ancestors, parent[:, :, None], axis=1) | own[None],
        drafted=drafted,
    )


def _root_level(tokens: Int[Array, " batch"], config: RoundConfig) -> Level:
    """Make level 0."""
    zero = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    certain = zero.astype(jnp.float32)
    nodes = 1 + config.levels * config.width
    is_root = jnp.broadcast_to(jnp.arange(nodes) == 0, (tokens.shape[0], 1, nodes))
    return Level(tokens[:, None], zero, zero, certain, certain, is_root)


def _assemble(
    root: Level, of_root: Candidates, levels: Level, candidates: Candidates, width: int
) -> Tree:
    """Join levels into a tree.

    Args:
        root: Level 0.
        of_root: The candidates below it.
        levels: All others, stacked.
        candidates: Those below them, stacked.
        width: Nodes of each level but level 0.
    """

    def in_order(first: Array, stacked: Array) -> Array:
        # [levels, batch, width, ...] -> [batch, levels, width, ...] -> [batch, levels * width, ...]
        stacked = jnp.moveaxis(stacked, 0, 1)
        flat = stacked.reshape(stacked.shape[0], -1, *stacked.shape[3:])
        return jnp.concatenate([first, flat], axis=1)

    nodes = jax.tree.map(in_order, root, levels)
    below = jax.tree.map(in_order, of_root, candidates)
    entry = np.arange(nodes.tokens.shape[1], dtype=np.int32)
    depth = -(entry // -width)  # rounded up: 0, then 1 `width` times, then 2, ...
    return Tree(
        tokens=nodes.tokens,
        parent=nodes.parent,
        depth=jnp.broadcast_to(depth, nodes.tokens.shape),
        entry=jnp.broadcast_to(entry, nodes.tokens.shape),
        score=nodes.score,
        ancestors=nodes.ancestors,
        rank=nodes.rank,
        candidates=below.ids,
        q=below.q,
        width=width,
    )
