"""How far drafts see ahead, told on texts that the target has written: no round needs to run.

A draft is let loose at every position of such a text. Greedy decoding is then arithmetic: a round that begins at a
position ends where the draft leaves the text, and the next one begins one token later. So one pass through the texts
answers for every number of levels, and for every tree that is narrower.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from easyspec_jax.decode.drafting import draft_tree
from easyspec_jax.decode.programs import Programs
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.verify import Greedy, RowSampling

Text = tuple[int, Sequence[int]]
"""Where the root of the first round is, and the token ids of prompt and completion."""

COPIES = 4
"""Rows that go through different parts of one text at once."""


def accepted_by_width(
    programs: Programs, texts: Sequence[Text], levels: int, widths: Sequence[int]
) -> dict[int, tuple[float, ...]]:
    """For each tree width the mean number of accepted tokens of a round of 1, 2, … `levels` levels.

    programs: see timing.alone, of the draft. texts: one at least has more than `levels` tokens behind its first root.
    Trees narrower than the widest are cut out of it, which now and then misses a node.
    """
    firsts = np.asarray([first for first, _ in texts])
    lengths = np.asarray([len(ids) for _, ids in texts])
    spots = int(np.max(lengths - firsts)) - levels
    ids = np.zeros((len(texts), -(-int(lengths.max()) // 128) * 128), np.int32)
    for row, (_, text) in enumerate(texts):
        ids[row, : len(text)] = text
    steps = -(-spots // COPIES)
    # Row r is copy r // len(texts) of text r % len(texts); copy c looks at spots c * steps and on.
    offsets = np.arange(steps)[:, None, None] + np.arange(COPIES)[:, None] * steps
    starts = np.minimum(firsts + offsets, lengths - 1).reshape(steps, -1)
    tokens, parents = drafts(programs, ids, starts.astype(np.int32), levels, max(widths))
    tokens, parents = (_by_text(x, len(texts)) for x in (tokens, parents))
    following = np.stack([_ahead(text[first:], tokens.shape[1], levels) for first, text in texts])
    known = lengths - firsts - levels
    return {
        width: tuple(
            mean_accepted(reach(tokens, parents, following, width), known, depth + 1)
            for depth in range(levels)
        )
        for width in widths
    }


def drafts(
    programs: Programs,
    ids: Int[np.ndarray, "texts length"],
    starts: Int[np.ndarray, "steps rows"],
    levels: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and parents, int32 [steps, rows, nodes], of the trees below the tokens at `starts`."""
    nodes = 1 + levels * width
    capacity = 1 << (ids.shape[1] + nodes - 1).bit_length()
    body = partial(_drafts, levels=levels, width=width, capacity=capacity)
    program = jax.jit(programs.mapped(body, (P(), P()), (P(), P())))
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
) -> tuple[Array, Array]:
    rows = starts.shape[1]
    zero = jnp.zeros((ids.shape[0],), jnp.int32)
    h, caches = draft(ids, draft.init_caches(ids.shape[0], capacity), zero)

    def copied(axis: int, x: Array) -> Array:
        return jnp.concatenate([x] * (rows // ids.shape[0]), axis=axis)

    # Rows and heads are one axis of a cache, the third from behind.
    h, ids, caches = copied(0, h), copied(0, ids), jax.tree.map(partial(copied, -3), caches)
    nothing = jnp.zeros((rows,), jnp.float32)
    request = RowSampling(
        nothing.astype(jnp.uint32),
        nothing.astype(jnp.int32),
        nothing,
        nothing.astype(jnp.int32),
        nothing,
    )

    def at(position: Int[Array, " rows"]) -> tuple[Array, Array]:
        here = position[:, None]
        root = jnp.take_along_axis(ids, here, axis=1)[:, 0]
        state = jnp.take_along_axis(h, here[:, :, None], axis=1)[:, 0]
        tree, _ = draft_tree(draft, state, caches, root, position, request, Greedy(), levels, width)
        return tree.tokens, tree.parent

    return jax.lax.map(at, starts)


def reach(
    tokens: Int[np.ndarray, "texts spots nodes"],
    parents: Int[np.ndarray, "texts spots nodes"],
    following: Int[np.ndarray, "texts spots levels"],
    width: int,
) -> Int[np.ndarray, "texts spots"]:
    """How many of the tokens that follow a spot are on one path of its tree, cut to `width` nodes a level."""
    levels = following.shape[-1]
    widest = (tokens.shape[-1] - 1) // levels
    kept, right = (np.zeros(tokens.shape, bool) for _ in range(2))
    kept[..., 0] = right[..., 0] = True
    reached = np.zeros(tokens.shape[:-1], int)
    for level in range(levels):
        nodes = slice(1 + level * widest, 1 + (level + 1) * widest)
        above = parents[..., nodes]
        own = np.take_along_axis(kept, above, axis=-1)
        kept[..., nodes] = own & (
            np.cumsum(own, axis=-1) <= width
        )  # nodes of a level are sorted, the best first
        same = tokens[..., nodes] == following[..., level, None]
        right[..., nodes] = kept[..., nodes] & same & np.take_along_axis(right, above, axis=-1)
        reached += right[..., nodes].any(axis=-1)
    return reached


def mean_accepted(
    reached: Int[np.ndarray, "texts spots"], known: Int[np.ndarray, " texts"], levels: int
) -> float:
    """Accepted tokens of a round, over all rounds that begin at one of a text's `known` first spots."""
    rounds = accepted = 0
    for own, count in zip(reached, known, strict=True):
        spot = 0
        while spot < count:
            passed = min(int(own[spot]), levels)
            rounds, accepted, spot = rounds + 1, accepted + passed, spot + passed + 1
    return accepted / rounds


def _by_text(x: np.ndarray, texts: int) -> np.ndarray:
    """[steps, copies * texts, nodes] to [texts, copies * steps, nodes]."""
    steps, rows, nodes = x.shape
    return (
        x.reshape(steps, rows // texts, texts, nodes)
        .transpose(2, 1, 0, 3)
        .reshape(texts, -1, nodes)
    )


def _ahead(text: Sequence[int], spots: int, levels: int) -> np.ndarray:
    """The `levels` tokens behind each of so many; -1 past the end."""
    padded = np.full(spots + levels, -1)
    padded[: min(len(text) - 1, len(padded))] = text[1 : 1 + len(padded)]
    return np.lib.stride_tricks.sliding_window_view(padded, levels)[:spots]
