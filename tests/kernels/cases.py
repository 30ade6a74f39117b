"""Random attentions of a group, as the plain path and the kernels take them."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from easyspec_jax.kernels.projection import Weights
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.head_norms import HeadNorms
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm
from easyspec_jax.model.projection import Output, Projection
from easyspec_jax.model.windows import Window

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """Sizes of a group's attentions and of one pass through them."""

    slots: int = 2
    starts: tuple[int, ...] = (5,)
    tokens: int = 1
    hidden: int = 64
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    capacity: int = 128
    bias: bool = False
    head_norms: bool = False
    tree: bool = False
    padding_heads: int = 0
    sliding: int | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        fields = type(self).__dataclass_fields__.values()
        changed = [f.name for f in fields if getattr(self, f.name) != f.default]
        return ",".join(f"{name}={getattr(self, name)}" for name in changed) or "default"

    @property
    def heads(self) -> int:
        return self.kv_heads * (self.group + 2)

    def normal(self, seed: int, *shape: int, scale: float = 1.0) -> Array:
        numbers = np.random.default_rng(seed).normal(size=shape) * scale
        return jnp.asarray(numbers, self.dtype)

    def h(self) -> Array:
        return self.normal(0, len(self.starts), self.tokens, self.hidden)

    def weights(self) -> Weights:
        outputs = self.heads * self.head_dim
        matrix = self.normal(1, self.slots, outputs, self.hidden, scale=self.hidden**-0.5)
        for index in range(self.padding_heads):  # one of each kind, as head_layout() pads
            for last in (self.kv_heads * self.group, -self.kv_heads, 0):
                end = (last - index) * self.head_dim or None
                matrix = matrix.at[:, end and end - self.head_dim : end].set(0)
        norms = (1 + self.normal(seed, self.slots, self.head_dim, scale=0.1) for seed in (2, 3))
        return Weights(
            1 + self.normal(4, self.slots, self.hidden, scale=0.1),
            matrix,
            self.normal(5, self.slots, outputs) if self.bias else None,
            *(norms if self.head_norms else (None, None)),
        )

    def cache(self) -> KVCache:
        shape = self.slots, len(self.starts) * self.kv_heads, self.capacity, self.head_dim
        return KVCache(self.normal(6, *shape), self.normal(7, *shape))

    def window(self) -> Window:
        random = np.random.default_rng(8)
        start = np.array(self.starts, np.int32)
        entry, token = np.arange(self.capacity), np.arange(self.tokens)
        behind = entry[None, None, :] - start[:, None, None]  # [batch, 1, capacity]
        mask = behind <= token[None, :, None]
        if self.tree:
            # Of the nodes before it in the tree, a node reads some, and itself.
            readable = random.random(mask.shape) < 0.5
            mask &= (behind < 0) | (behind == token[None, :, None]) | readable
        if self.sliding is not None:
            mask &= behind > token[None, :, None] - self.sliding
        angles = random.uniform(0, 6, (len(start), self.tokens, self.head_dim // 2))
        cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        start, mask, cos, sin = map(jnp.asarray, (start, mask, cos, sin))
        return Window(start, mask, cos, sin)

    def attention(self) -> Attention:
        """Return the plain path's attentions, stacked. Their output matrices are the identity."""
        norm, matrix, bias, query_norm, key_norm = self.weights()
        norms = None
        if query_norm is not None and key_norm is not None:
            norms = HeadNorms(RMSNorm(query_norm, eps=EPS), RMSNorm(key_norm, eps=EPS))
        queries = self.kv_heads * self.group * self.head_dim
        identity = jnp.broadcast_to(
            jnp.eye(queries, dtype=self.dtype), (self.slots, queries, queries)
        )
        return Attention(
            Projection(RMSNorm(norm, eps=EPS), Matrix(matrix), bias, dtype=self.dtype),
            Output(Matrix(identity)),
            norms,
            kv_heads=self.kv_heads,
            group=self.group,
        )

    def assert_close(self, got: np.ndarray | Array, expected: np.ndarray | Array) -> None:
        """Compare with a result of the plain path, which sums in another order."""
        # bfloat16 has 8 bits: neighbors of 2.0 are 2**-6 away.
        rtol, atol = (2**-6, 2**-6) if self.dtype == "bfloat16" else (0, 1e-5)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)
