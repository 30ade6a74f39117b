"""Acceptance of drafts, measured on texts that the target has written. No round needs to run.

A draft grows a tree at every position of such a text. From then on greedy decoding is arithmetic: a
round that begins at a position ends where the tree leaves the text, and the next round begins one
token later. So one pass through the texts answers for every number of levels and every narrower
tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easyspec_jax.arithmetic import ceil_div, round_up
from easyspec_jax.decode.drafting import draft_tree
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.decode.threshold import THRESHOLDS
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.verify import Greedy, RowSampling

Text = tuple[int, Sequence[int]]
"""Position of the first round's root, and the token ids of prompt and completion."""

COPIES = 4
"""Rows that work on different parts of one text at once."""


class EarlyEnd(NamedTuple):
    """Rounds that draft no further where no path is likely.

    Attributes:
        threshold: As SpeculativeConfig.confidence_threshold.
        accepted: Mean accepted tokens of a round.
        steps: Mean steps of the draft, after its first pass.
    """

    threshold: float
    accepted: float
    steps: float


@dataclass(frozen=True)
class Foresight:
    """How far a draft sees ahead in some texts.

    Attributes:
        reached: Tokens after each spot that lie on one path of its tree.
        likeliest: Log-probability of the likeliest path of each level there, under the draft.
        known: How many spots of each text have `levels` tokens after them; rounds begin there.
    """

    reached: Int[np.ndarray, "texts spots"]
    likeliest: Float[np.ndarray, "texts spots levels"]
    known: Int[np.ndarray, " texts"]

    def accepted(self) -> tuple[float, ...]:
        """Return the mean number of tokens that rounds of 1, 2, … levels accept."""
        levels = range(1, 1 + self.likeliest.shape[-1])
        return tuple(mean_round(self.reached, self.known, level)[0] for level in levels)

    def early_ends(self, thresholds: Sequence[float] = THRESHOLDS) -> tuple[EarlyEnd, ...]:
        """Return what rounds do that may have all levels, and end below a threshold."""
        found = []
        for threshold in thresholds:
            # The level below an unlikely one is not drafted, nor are those below that.
            likely = np.exp(self.likeliest[..., :-1]) >= threshold
            drafted = 1 + np.cumprod(likely, axis=-1).sum(axis=-1)
            accepted, levels = mean_round(self.reached, self.known, drafted)
            found.append(EarlyEnd(threshold, accepted, levels - 1))
        return tuple(found)


def foresee(
    programs: Programs, texts: Sequence[Text], levels: int, widths: Sequence[int]
) -> dict[int, Foresight]:
    """Return how far a draft sees ahead, by tree width.

    Narrower trees are cut out of the widest one, which now and then misses a node.

    Args:
        programs: The draft by itself, see timing.alone.
        texts: At least one has more than `levels` tokens after its first root.
        levels: Depth of the deepest draft.
        widths: Tree widths.
    """
    firsts = np.asarray([first for first, _ in texts])
    lengths = np.asarray([len(ids) for _, ids in texts])
    spots = int(np.max(lengths - firsts)) - levels
    # Few lengths are ever compiled if they are multiples of 128.
    ids = np.zeros((len(texts), round_up(int(lengths.max()), 128)), np.int32)
    for row, (_, text) in enumerate(texts):
        ids[row, : len(text)] = text
    steps = ceil_div(spots, COPIES)
    # Row r is copy r // len(texts) of text r % len(texts). Copy c visits spots c * steps and on.
    # Two texts, COPIES = 4 and 8 spots: 2 steps of 8 rows; the first step visits spots
    # 0 0 2 2 4 4 6 6, the second 1 1 3 3 5 5 7 7.
    offsets = np.arange(steps)[:, None, None] + np.arange(COPIES)[:, None] * steps
    starts = np.minimum(firsts + offsets, lengths - 1).reshape(steps, -1)
    grown = drafts(programs, ids, starts.astype(np.int32), levels, max(widths))
    tokens, parents, scores = (_by_text(x, len(texts)) for x in grown)
    following = np.stack([_ahead(text[first:], tokens.shape[1], levels) for first, text in texts])
    known = lengths - firsts - levels
    return {
        width: Foresight(*reach(tokens, parents, scores, following, width), known)
        for width in widths
    }


def drafts(
    programs: Programs,
    ids: Int[np.ndarray, "texts length"],
    starts: Int[np.ndarray, "steps rows"],
    levels: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grow a tree below the token at each of some positions.

    Args:
        programs: The draft by itself.
        ids: Texts, padded.
        starts: Positions of the roots.
        levels: Depth of the trees.
        width: Nodes per level.

    Returns:
        Tokens and parents of the nodes, int32 [steps, rows, nodes], and their paths'
        log-probabilities, float32 likewise.
    """
    nodes = 1 + levels * width
    capacity = 1 << (ids.shape[1] + nodes - 1).bit_length()
    body = partial(_drafts, levels=levels, width=width, capacity=capacity)
    program = jax.jit(programs.compiled.mapped(body, (P(), P()), (P(), P(), P())))
    return jax.device_get(program(programs.leaves, ids, starts))


def _drafts(
    draft: Decoder,
    _: None,
    ids: Int[Array, "texts length"],
    starts: Int[Array, "steps rows"],
    *,
    levels: int,
    width: int,
    capacity: int,
) -> tuple[Array, Array, Array]:
    rows = starts.shape[1]
    zero = jnp.zeros((ids.shape[0],), jnp.int32)
    h, caches = draft(ids, draft.init_caches(ids.shape[0], capacity), zero)

    copies = rows // ids.shape[0]

    def copied(axis: int, x: Array) -> Array:
        return jnp.concatenate([x] * copies, axis=axis)

    h = copied(0, h)
    ids = copied(0, ids)
    # Rows and heads are one axis of a cache, [..., rows * heads, tokens, head_dim].
    caches = jax.tree.map(partial(copied, -3), caches)
    floats = jnp.zeros((rows,), jnp.float32)
    integers = jnp.zeros((rows,), jnp.int32)
    request = RowSampling(
        seed=integers.astype(jnp.uint32),
        round=integers,
        temperature=floats,
        top_k=integers,
        top_p=floats,
    )

    # With a threshold that ends nothing, chains have probabilities as well.
    config = RoundConfig(levels, True, Greedy(), (), width, confidence_threshold=1e-30)

    def at(position: Int[Array, " rows"]) -> tuple[Array, Array, Array]:
        here = position[:, None]
        root = jnp.take_along_axis(ids, here, axis=1)[:, 0]
        state = jnp.take_along_axis(h, here[:, :, None], axis=1)[:, 0]
        tree, *_ = draft_tree(draft, state, caches, root, position, request, config)
        return tree.tokens, tree.parent, tree.score

    return jax.lax.map(at, starts)


def reach(
    tokens: Int[np.ndarray, "texts spots nodes"],
    parents: Int[np.ndarray, "texts spots nodes"],
    scores: Float[np.ndarray, "texts spots nodes"],
    following: Int[np.ndarray, "texts spots levels"],
    width: int,
) -> tuple[Int[np.ndarray, "texts spots"], Float[np.ndarray, "texts spots levels"]]:
    """Follow each text through the trees that are grown along it.

    Args:
        tokens: Nodes of the trees; the root comes first, then level by level, likeliest first.
        parents: Index of each node's parent.
        scores: Log-probability of each node's path.
        following: The tokens that the target wrote after each spot.
        width: Nodes per level that the trees are cut to.

    Returns:
        How many of the tokens after each spot lie on one path of its tree; and the
        log-probability of the likeliest path of each level.
    """
    levels = following.shape[-1]
    widest = (tokens.shape[-1] - 1) // levels
    # kept: nodes of the narrower tree. right: kept nodes whose whole path is the text.
    kept = np.zeros(tokens.shape, bool)
    right = np.zeros(tokens.shape, bool)
    kept[..., 0] = right[..., 0] = True
    reached, likeliest = np.zeros(tokens.shape[:-1], int), np.zeros(following.shape)
    for level in range(levels):
        nodes = slice(1 + level * widest, 1 + (level + 1) * widest)
        above = parents[..., nodes]
        own = np.take_along_axis(kept, above, axis=-1)
        # The first `width` nodes whose parents were kept are the likeliest of those.
        kept[..., nodes] = own & (np.cumsum(own, axis=-1) <= width)
        same = tokens[..., nodes] == following[..., level, None]
        right[..., nodes] = kept[..., nodes] & same & np.take_along_axis(right, above, axis=-1)
        reached += right[..., nodes].any(axis=-1)
        likeliest[..., level] = np.where(kept, scores, -np.inf)[..., nodes].max(axis=-1)
    return reached, likeliest


def mean_round(
    reached: Int[np.ndarray, "texts spots"],
    known: Int[np.ndarray, " texts"],
    levels: int | Int[np.ndarray, "texts spots"],
) -> tuple[float, float]:
    """Return the mean number of accepted tokens of a round, and of its levels.

    Args:
        reached: Tokens after each spot that lie on one path of its tree.
        known: At how many spots of each text rounds may begin.
        levels: Levels that a round drafts, or those of one that begins at each spot.

    Examples:
        Rounds of up to two levels begin at spots 0, 3 and 4, and accept 2, 0 and 1 tokens:

        >>> mean_round(np.array([[2, 0, 1, 0, 1]]), np.array([5]), levels=2)
        (1.0, 2.0)
    """
    levels = np.broadcast_to(levels, reached.shape)
    rounds = accepted = drafted = 0
    for own, most, count in zip(reached, levels, known, strict=True):
        spot = 0
        while spot < count:
            passed = min(int(own[spot]), int(most[spot]))
            rounds += 1
            accepted += passed
            drafted += int(most[spot])
            spot += passed + 1
    return accepted / rounds, drafted / rounds


def _by_text(x: np.ndarray, texts: int) -> np.ndarray:
    """Reorder [steps, copies * texts, nodes] to [texts, copies * steps, nodes]."""
    steps, rows, nodes = x.shape
    return (
        x.reshape(steps, rows // texts, texts, nodes)
        .transpose(2, 1, 0, 3)
        .reshape(texts, -1, nodes)
    )


def _ahead(text: Sequence[int], spots: int, levels: int) -> np.ndarray:
    """Return the `levels` tokens after each of the first spots; -1 past the end."""
    padded = np.full(spots + levels, -1)
    padded[: min(len(text) - 1, len(padded))] = text[1 : 1 + len(padded)]
    return np.lib.stride_tricks.sliding_window_view(padded, levels)[:spots]
