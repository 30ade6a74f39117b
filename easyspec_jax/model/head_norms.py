"""Norms of queries and keys: head by head, or over all heads of a token."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from easyspec_jax.model.norm import RMSNorm
from easyspec_jax.parallel.collectives import all_reduce, shard_index
from easyspec_jax.parallel.mesh import Axes

Heads = Float[Array, "batch heads tokens head_dim"]


class HeadNorms(nnx.Module):
    """Norms of each query and of each key.

    Attributes:
        query: Norm of a query, whose weight [head_dim] all heads share.
        key: Likewise of a key.
    """

    def __init__(self, query: RMSNorm, key: RMSNorm) -> None:
        self.query, self.key = query, key

    def __call__(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        """Norm queries and keys."""
        return self.query(q), self.key(k)

    @property
    def is_plain(self) -> bool:
        """Whether kernels can compute them; they know no offsets."""
        return self.query.offset == 0 and self.key.offset == 0


class FullNorms(nnx.Module):
    """Norms over all queries of a token, and over all its keys, as OLMo 2 has them.

    The heads lie on several devices, so the sums of squares take an all-reduce: one for both.

    Attributes:
        query: Weights of this share's queries, zero for heads that are padding.
        key: Likewise of its keys.
        counted: For each shard, which of its key heads count in the sum. A head that several
            shards have counts in the first.
        eps: Added to the mean square.
        sizes: Number of all query heads, and of all key heads, without copies and padding.
        axes: Mesh axes that split the heads.
    """

    is_plain = False  # for kernels, which compute head by head

    def __init__(
        self,
        query: Float[Array, "*slots queries_dim"],
        key: Float[Array, "*slots keys_dim"],
        *,
        kv_index: Int[np.ndarray, "shards kv_heads"],
        eps: float,
        sizes: tuple[int, int],
        axes: Axes,
    ) -> None:
        self.query, self.key = nnx.Param(query), nnx.Param(key)
        _, first = np.unique(kv_index, return_index=True)
        counted = np.isin(np.arange(kv_index.size), first) & (kv_index.reshape(-1) >= 0)
        # As tuples, which a module can compare and hash: [[0, 1], [1, -1]] -> ((1, 1), (0, 0)).
        self.counted = tuple(map(tuple, counted.reshape(kv_index.shape).astype(float).tolist()))
        self.eps, self.sizes, self.axes = eps, sizes, axes

    def __call__(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        """Norm queries and keys."""
        counted = jnp.asarray(self.counted, jnp.float32)[shard_index(self.axes)]
        # Mean squares of the heads: [batch, heads, tokens, head_dim] -> [batch, heads, tokens].
        of_queries, of_keys = (jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) for x in (q, k))
        own = jnp.sum(of_queries, axis=1), jnp.sum(of_keys * counted[None, :, None], axis=1)
        sums = all_reduce(jnp.stack(own), self.axes)  # [2, batch, tokens]
        query, key = (
            1.0 / jnp.sqrt(total / np.float32(heads) + np.float32(self.eps))
            for total, heads in zip(sums, self.sizes, strict=True)
        )
        return _scaled(q, query, self.query[...]), _scaled(k, key, self.key[...])


def _scaled(
    x: Heads, scale: Float[Array, "batch tokens"], weight: Float[Array, " heads_dim"]
) -> Heads:
    """Multiply heads by each token's scale and by each channel's weight."""
    weight = weight.reshape(1, x.shape[1], 1, x.shape[3])
    return (x.astype(jnp.float32) * scale[:, None, :, None]).astype(x.dtype) * weight
