"""How weights lie on the mesh: heads padded to any shard count, vocabularies aligned."""

from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from easyspec_jax.checkpoint.config import ModelConfig

VOCAB_BLOCK = 128
"""Vocabulary shards are whole blocks of this many ids, as accelerators lay out arrays."""


@dataclass(frozen=True)
class HeadLayout:
    """Which heads each tensor-parallel shard computes; -1 is a zero head.

    A shard has kv_heads key-value heads and `group` query heads for each. kv_index: int [shards, kv_heads];
    query_index: int [shards, kv_heads * group].
    """

    kv_heads: int
    group: int
    kv_index: np.ndarray
    query_index: np.ndarray


def head_layout(num_heads: int, num_kv_heads: int, shards: int) -> HeadLayout:
    """The layout for any head count with the least work per shard.

    Each key-value head is copied `copies` times and its queries split among the copies; whole copies are dealt out to
    shards. Work is counted in head projections: query and output for each query head, key and value for each copy.
    """
    queries = num_heads // num_kv_heads

    def work(copies: int) -> int:
        return -(-num_kv_heads * copies // shards) * (2 * -(-queries // copies) + 2)

    copies = min(range(1, queries + 1), key=work)
    per_copy = -(-queries // copies)
    per_shard = -(-num_kv_heads * copies // shards)
    kv_index = np.full(shards * per_shard, -1)
    query_index = np.full((shards * per_shard, per_copy), -1)
    for head in range(num_kv_heads):
        for copy in range(copies):
            unit = head * copies + copy
            chosen = np.arange(copy * per_copy, min((copy + 1) * per_copy, queries))
            kv_index[unit] = head
            query_index[unit, : len(chosen)] = head * queries + chosen
    return HeadLayout(
        per_shard, per_copy, kv_index.reshape(shards, -1), query_index.reshape(shards, -1)
    )


def padded_vocab_size(mesh: Mesh, *configs: ModelConfig) -> int:
    """Rows that the embeddings of models which share token ids get, so that their shards hold the same ids."""
    step = VOCAB_BLOCK * mesh.size
    return -(-max(config.vocab_size for config in configs) // step) * step
