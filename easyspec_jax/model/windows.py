"""Positions of the tokens of one pass, and which cache entries each of them may read.

One pass may hold consecutive tokens of a text (chain_windows) or nodes of a token tree
(tree_windows). Both are just masks and positions: attention itself does not know the difference.
Nor does it know whether its layer reads the whole text or, as a sliding layer, only the last
tokens: each kind of layer has a mask of its own.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from easyspec_jax.arithmetic import round_up
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.rope import Rope

ALIGNMENT = 128
"""Multiple of entries that are taken out of a cache."""

WORTH = 3
"""How many times as many entries a cache must have, since those taken out are written and read."""

SHORTEST = 512
"""Entries of the shortest part of a cache that is read instead of all."""

LARGE = 1024
"""Entries of the smallest cache of which only a part is read."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["start", "mask", "cos", "sin", "first", "part"],
    meta_fields=["size", "parts"],
)
@dataclass(frozen=True)
class Window:
    """Positions of the tokens of one pass, as layers of one kind see them.

    Attributes:
        start: Row b's tokens are written from start[b] of the cache on.
        mask: `mask[b, t, s]` says that token t may read entry s.
        cos: Cosines of each token's rotation, float32.
        sin: Sines of each token's rotation, float32.
        first: Row b's tokens read no entry before first[b]; None where they may read any.
        size: They read none from first[b] + size on; 0 where they may.
        part: Number of the shortest of `parts` that holds all entries which any row reads; None if
            that is not known.
        parts: Sizes of parts of the cache, each from its first entry on; the last one is all of it.
    """

    start: Int[Array, " batch"]
    mask: Bool[Array, "*slots batch tokens capacity"]
    cos: Float[Array, "*slots batch tokens half"]
    sin: Float[Array, "*slots batch tokens half"]
    first: Int[Array, " batch"] | None = None
    size: int = 0
    part: Int[Array, ""] | None = None
    parts: tuple[int, ...] = ()

    @property
    def everywhere(self) -> "Window":
        """The same, with a promise only about what no row reads."""
        return replace(self, first=None, size=0)

    def cut(
        self, x: Shaped[Array, "batch_parts capacity channels"]
    ) -> Shaped[Array, "batch_parts size channels"]:
        """Take out of every row the entries that are read.

        Args:
            x: Arrays over all entries; those of row b's parts are next to each other.
        """
        if self.first is None:
            return x
        parts = x.reshape(self.first.shape[0], -1, *x.shape[1:])
        taken = jax.vmap(
            lambda of_row, first: jax.lax.dynamic_slice_in_dim(of_row, first, self.size, axis=1)
        )(parts, self.first)
        return taken.reshape(-1, self.size, x.shape[-1])

    @property
    def cut_mask(self) -> Bool[Array, "batch tokens size"]:
        """The mask over cut() caches."""
        # [batch, tokens, capacity] -> [batch * tokens, capacity, 1], and back
        return self.cut(self.mask.reshape(-1, self.mask.shape[-1], 1)).reshape(
            *self.mask.shape[:2], -1
        )


Windows = tuple[Window, ...]
"""One Window for each of `ModelConfig.kinds`."""


def stacked(windows: Windows, kinds: Int[Array, " slots"]) -> tuple[Window, Window]:
    """Return a window for each of several layers of different kinds, stacked.

    Args:
        windows: The window of every kind.
        kinds: The kind of each layer.

    Returns:
        The stack, and the axis of each of its arrays for `vmap`: 0, or None for what all share.
    """
    own = ("mask", "cos", "sin")
    stacks = {name: jnp.stack([getattr(one, name) for one in windows])[kinds] for name in own}
    shared = windows[0].everywhere
    axes = replace(jax.tree.map(lambda _: None, shared), **dict.fromkeys(own, 0))
    return replace(shared, **stacks), axes


def chain_windows(
    start: Int[Array, " batch"],
    tokens: int,
    capacity: int,
    config: ModelConfig,
    cuts: bool = True,
    parts: bool = False,
    first: Int[Array, " batch"] | None = None,
) -> Windows:
    """Make the windows of consecutive tokens, each of which reads everything up to itself.

    Args:
        start: Position, and entry, of each row's first token.
        tokens: Tokens of each row.
        capacity: Entries of the cache.
        config: The model's configuration, for its kinds of layers.
        cuts: Whether sliding layers cut what they read out of large caches.
        parts: Whether other layers read only as large a part of them as texts need.
        first: First entry that each row's cache has; None for 0. The windows are then right for
            sliding layers only.
    """
    positions = start[:, None] + jnp.arange(tokens, dtype=start.dtype)[None, :]
    # Two tokens behind a text of three, capacity 6:
    #   token 0   1 1 1 1 0 0
    #   token 1   1 1 1 1 1 0
    entries = _entries(capacity, first, start.dtype)
    mask = entries <= positions[:, :, None]
    start = start if first is None else start - first
    stretch = Stretch(start, tokens, parts) if cuts else None
    return make_windows(start, mask, positions, entries, config, stretch)


def _entries(
    capacity: int, first: Int[Array, " batch"] | None, dtype: DTypeLike
) -> Int[Array, "#batch 1 capacity"]:
    """Number the entries of a cache."""
    entries = jnp.arange(capacity, dtype=dtype)[None, None, :]
    return entries if first is None else first[:, None, None] + entries


class Stretch(NamedTuple):
    """Which entries behind a text are read at all.

    Attributes:
        begin: Where each row's first token or root is in the cache.
        entries: How many from there on.
        parts: Whether layers may read only a part of a large cache.
    """

    begin: Int[Array, " batch"]
    entries: int
    parts: bool


class Nodes(NamedTuple):
    """Positions of some nodes of token trees.

    Node i of row b's tree has the cache entry root[b] + i, behind everything that all nodes may
    read. Its position in the text is root[b] + depth: siblings share a position, not an entry.

    Attributes:
        start: First entry that the nodes take; they take consecutive ones.
        root: Entry, and position, of the tree's root.
        depth: Levels below the root.
        ancestors: `ancestors[b, t, i]` says that token t may read node i.
    """

    start: Int[Array, " batch"]
    root: Int[Array, " batch"]
    depth: Int[Array, "batch tokens"]
    ancestors: Bool[Array, "batch tokens nodes"]


def tree_windows(
    nodes: Nodes,
    capacity: int,
    config: ModelConfig,
    cuts: bool = True,
    parts: bool = False,
    first: Int[Array, " batch"] | None = None,
) -> Windows:
    """Make the windows of nodes, each of which reads the text and its own path (tree attention).

    Args:
        nodes: The nodes.
        capacity: Entries of the cache.
        config: The model's configuration, for its kinds of layers.
        cuts: Whether sliding layers cut what they read out of large caches.
        parts: Whether other layers read only as large a part of them as texts need.
        first: As for chain_windows().
    """
    start, root, depth, ancestors = nodes
    # A text of two tokens, then a root (node 0) with children 1 and 2, capacity 6:
    #            text  tree
    #   node 0   1 1   1 0 0   0
    #   node 1   1 1   1 1 0   0
    #   node 2   1 1   1 0 1   0
    entries = _entries(capacity, first, root.dtype)
    before = jnp.broadcast_to(entries < root[:, None, None], (*depth.shape, capacity))
    begin = root
    if first is not None:
        start, begin = start - first, root - first
    put = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
    if _slides(config, capacity):
        # Entries of nodes have the positions of their depths. Parents have lower numbers than
        # children, so an ancestor's depth is the node's own less the ancestors that come after it:
        #            ancestors   depths, where they are ancestors
        #   node 2   1 0 1       0 . 1
        # Counted so, a missing node whose parents are missing too still reads itself: without
        # anything to read it would be NaN, and so would be all that has weight 0 for it.
        until = jnp.cumsum(ancestors, axis=2, dtype=root.dtype)
        depths = depth[:, :, None] - (until[:, :, -1:] - until)
        entries = jnp.broadcast_to(entries, before.shape)
        entries = put(entries, root[:, None, None] + depths, begin)
    mask, positions = put(before, ancestors, begin), root[:, None] + depth
    stretch = Stretch(begin, ancestors.shape[2], parts) if cuts else None
    return make_windows(start, mask, positions, entries, config, stretch)


def make_windows(
    start: Int[Array, " batch"],
    mask: Bool[Array, "batch tokens capacity"],
    positions: Int[Array, "batch tokens"],
    entries: Int[Array | np.ndarray, "#batch #tokens capacity"],
    config: ModelConfig,
    stretch: Stretch | None = None,
) -> Windows:
    """Make the window of every kind of layer.

    Args:
        start: Where each row's tokens are written in the cache.
        mask: Which entries each token may read where no window hides them.
        positions: Position of each token in its text.
        entries: Position of each entry in the text, right for those that the token may read.
        config: The model's configuration, for its kinds of layers.
        stretch: Which entries behind each text are read; None if they are ordered otherwise.
    """
    rotations, masks = {}, {}
    for kind in config.kinds:
        if kind.rope not in rotations:
            rotations[kind.rope] = _rotation(positions, kind.rope)
        if kind.window not in masks:
            masks[kind.window] = mask
            if kind.window is not None and kind.window < mask.shape[2]:
                # A window of 2 after a text of three; without it, token 0 reads 1 1 1 1 0 0:
                #   token 0   0 0 1 1 0 0
                #   token 1   0 0 0 1 1 0
                masks[kind.window] = mask & (entries > positions[:, :, None] - kind.window)
    windows = []
    for kind in config.kinds:
        window = Window(start, masks[kind.window], *rotations[kind.rope])
        windows.append(window if stretch is None else _bounded(window, kind.window, stretch))
    return tuple(windows)


def _bounded(window: Window, tokens: int | None, stretch: Stretch) -> Window:
    """Say which entries of a large cache are read at all.

    Args:
        window: The window.
        tokens: How many tokens a sliding layer reads; None if it reads all.
        stretch: Entries behind the text that are read at all.
    """
    capacity, (begin, entries, parts) = window.mask.shape[-1], stretch
    if parts and capacity >= LARGE:
        # A text that ends at entry 700 needs the second of the parts 512, 1024 and 2048.
        sizes = np.array(_parts(capacity), begin.dtype)
        part = jnp.sum(jnp.max(begin) + entries > sizes[:-1], dtype=jnp.int32)
        window = replace(window, part=part, parts=tuple(sizes.tolist()))
    if tokens is None:
        return window
    # A window of 4, and two tokens behind a text of ten, read entries 7 to 11.
    size = round_up(tokens - 1 + entries, ALIGNMENT)
    if capacity < WORTH * size:
        return window
    first = jnp.clip(begin - (tokens - 1), 0, capacity - size)
    return replace(window, first=first, size=size)


def _parts(capacity: int) -> list[int]:
    """Return the sizes of the parts of a cache.

    Examples:
        >>> _parts(2176)
        [512, 1024, 2048, 2176]
    """
    sizes = [SHORTEST]
    while 2 * sizes[-1] < capacity:
        sizes.append(2 * sizes[-1])
    return [*sizes, capacity]


def _slides(config: ModelConfig, capacity: int) -> bool:
    """Return whether some layers cannot read all entries of a cache."""
    return any(kind.window is not None and kind.window < capacity for kind in config.kinds)


def _rotation(
    positions: Int[Array, "batch tokens"], rope: Rope
) -> tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]]:
    """Return cosines and sines of each token's rotation."""
    frequencies = jnp.asarray(rope.frequencies())  # [dim / 2], radians per position
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.amplitude == 1:
        return cos, sin
    amplitude = np.float32(rope.amplitude)
    return cos * amplitude, sin * amplitude
