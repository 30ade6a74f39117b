"""Which heads, rows and columns each shard of a weight has, for any number of shards."""

from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from easyspec_jax.arithmetic import ceil_div, round_up
from easyspec_jax.checkpoint.config import ModelConfig

VOCAB_BLOCK = 128
"""Vocabulary shards are multiples of this many ids: accelerators lay out arrays in such blocks."""

Entries = Int[np.ndarray, "shards entries"]
"""Numbers of the stored rows or columns that each shard has, in order; -1 is padding."""


@dataclass(frozen=True)
class HeadLayout:
    """Which heads each tensor-parallel shard computes; -1 stands for a head of zeros.

    Attributes:
        kv_heads: Key-value heads of a shard.
        group: Query heads for each of them.
        kv_index: Key-value heads of each shard, int [shards, kv_heads].
        query_index: Query heads of each shard, int [shards, kv_heads * group].
    """

    kv_heads: int
    group: int
    kv_index: np.ndarray
    query_index: np.ndarray


def head_layout(num_heads: int, num_kv_heads: int, shards: int) -> HeadLayout:
    """Deal heads out to shards so that the busiest shard has the least work.

    Heads need not divide among the shards. Each key-value head is copied `copies` times, and its
    queries are split among the copies; then whole copies are dealt out, an equal number to each
    shard, with heads of zeros for what is missing. Work is counted in head projections: query and
    output for each query head, key and value for each copy.

    Args:
        num_heads: Query heads; a multiple of num_kv_heads.
        num_kv_heads: Key-value heads.
        shards: Tensor-parallel shards.

    Returns:
        The layout, which is the plain split wherever heads divide and copies do not pay.

    Examples:
        Nine query and three key-value heads on eight shards. Two copies of each key-value head
        occupy six shards, with at most two queries each:

        >>> layout = head_layout(num_heads=9, num_kv_heads=3, shards=8)
        >>> layout.kv_index[:, 0].tolist()
        [0, 0, 1, 1, 2, 2, -1, -1]
        >>> layout.query_index.tolist()
        [[0, 1], [2, -1], [3, 4], [5, -1], [6, 7], [8, -1], [-1, -1], [-1, -1]]
    """
    queries = num_heads // num_kv_heads

    # Work of a shard = its copies * (queries and outputs of a copy + one key and one value).
    def work(copies: int) -> int:
        units = ceil_div(num_kv_heads * copies, shards)
        return units * (2 * ceil_div(queries, copies) + 2)

    copies = min(range(1, queries + 1), key=work)
    per_copy = ceil_div(queries, copies)
    per_shard = ceil_div(num_kv_heads * copies, shards)
    kv_index = np.full(shards * per_shard, -1)
    query_index = np.full((shards * per_shard, per_copy), -1)
    # Unit = one copy of one key-value head with its share of the queries. In the example above,
    # units 0 and 1 are copies of head 0, with queries (0, 1) and (2,).
    for head in range(num_kv_heads):
        for copy in range(copies):
            unit = head * copies + copy
            chosen = np.arange(copy * per_copy, min((copy + 1) * per_copy, queries))
            kv_index[unit] = head
            query_index[unit, : len(chosen)] = head * queries + chosen
    # 9 queries, 3 keys and 8 shards make 2 copies of each key, one to a shard:
    # kv_index [[0], [0], [1], [1], [2], [2], [-1], [-1]]
    # query_index [[0, 1], [2, -1], [3, 4], [5, -1], [6, 7], [8, -1], [-1, -1], [-1, -1]]
    return HeadLayout(
        kv_heads=per_shard,
        group=per_copy,
        kv_index=kv_index.reshape(shards, -1),
        query_index=query_index.reshape(shards, -1),
    )


def padded_vocab_size(mesh: Mesh, *configs: ModelConfig) -> int:
    """Count the embedding rows that models with the same token ids get on a mesh.

    All get the same number, so that a device's vocabulary shards of target and draft hold the same
    ids.

    Args:
        mesh: Its devices split the rows.
        configs: The models.

    Returns:
        The largest vocabulary, rounded up to whole VOCAB_BLOCKs on every device.
    """
    step = VOCAB_BLOCK * mesh.size
    return round_up(max(config.vocab_size for config in configs), step)


def even_entries(size: int, width: int, shards: int) -> Entries:
    """Deal out `size` entries, `width` to each shard until none are left.

    Examples:
        >>> even_entries(size=5, width=3, shards=2).tolist()
        [[0, 1, 2], [3, 4, -1]]
    """
    entries = np.arange(shards * width).reshape(shards, width)
    return np.where(entries < size, entries, -1)


def head_entries(heads: Int[np.ndarray, "shards heads"], head_dim: int) -> Entries:
    """Return the entries of heads: head h has those from h * head_dim on, and -1 has padding.

    Examples:
        >>> head_entries(np.array([[1, 2], [0, -1]]), head_dim=2).tolist()
        [[2, 3, 4, 5], [0, 1, -1, -1]]
    """
    # [shards, heads] -> [shards, heads, head_dim] -> [shards, heads * head_dim]
    entries = heads[:, :, None] * head_dim + np.arange(head_dim)
    return np.where(heads[:, :, None] < 0, -1, entries).reshape(len(heads), -1)
