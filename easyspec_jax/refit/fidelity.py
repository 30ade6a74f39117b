"""How much of an exact draft's distribution its fuzzy passes keep, by draft depth."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.parallel.collectives import all_reduce
from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.parallel.spmd import partition_specs, spmd
from easyspec_jax.refit.teacher import drafted_window, exact_window
from easyspec_jax.sampling.vocabulary import argmax, normaliser

DEPTHS = 4
"""Depths that drafts are compared at, unless a caller says otherwise."""


def fidelity(
    draft: Decoder,
    mesh: Mesh,
    texts: Int[np.ndarray, "texts tokens"],
    counted: Bool[np.ndarray, "texts tokens"],
    depths: int = DEPTHS,
) -> tuple[list[float], list[float]]:
    """Compare a draft's fuzzy distributions with its exact ones, teacher-forced, at temperature 1.

    Args:
        draft: The draft, on the mesh.
        mesh: The mesh.
        texts: Token ids. Everything before a draft is read exactly.
        counted: Positions whose predictions are compared.
        depths: Number of draft depths, from 1.

    Returns:
        For each depth, the mean of Σ min(p fuzzy, p exact), which is the acceptance rate of
        rejection sampling if the exact draft were the target; and the share of positions where
        both find the same id the likeliest.
    """

    def body(draft: Decoder, ids: Int[Array, "1 tokens"]) -> tuple[Array, Array]:
        with jax.default_matmul_precision("highest"):
            return _compare(draft, ids, depths)

    program: Any = jax.jit(spmd(body, mesh, (partition_specs(draft), P()), P()))
    overlaps, agrees = [], []
    for ids in texts:
        # A batch of one: a whole text's logits at all depths take enough memory by themselves.
        overlap_of_text, agrees_in_text = program(draft, ids[None].astype(np.int32))
        overlaps.append(np.asarray(overlap_of_text))
        agrees.append(np.asarray(agrees_in_text))
    return _means(overlaps, counted), _means(agrees, counted)


def _means(by_text: list[np.ndarray], counted: Bool[np.ndarray, "texts tokens"]) -> list[float]:
    """Average each depth's values over the counted positions of all texts."""
    by_depth = np.stack(by_text, axis=1)  # texts of [depths, tokens] -> [depths, texts, tokens]
    return [float(values[counted].mean()) for values in by_depth]


def _compare(
    draft: Decoder, ids: Int[Array, "1 tokens"], depths: int
) -> tuple[Float[Array, "depths tokens"], Bool[Array, "depths tokens"]]:
    """Run one text exactly, then fuzzily at each depth on the exact and all shallower KV."""
    batch, tokens = ids.shape
    # Entries for the exact KV and, behind them, for the KV of each depth; see teacher.py.
    capacity = (depths + 1) * tokens
    caches: Caches = draft.init_caches(batch, capacity)
    h, caches = draft(ids, caches, exact_window(batch, tokens, capacity, draft.config))
    exact = draft.logits(h)[0]
    best = argmax(exact, draft.axes)
    overlaps, agrees = [], []
    for depth in range(1, depths + 1):
        window = drafted_window(depth, batch, tokens, capacity, draft.config)
        h, caches = draft(ids, caches, window, run_fuzzy)
        fuzzy = draft.logits(h)[0]
        overlaps.append(overlap(exact, fuzzy, draft.axes))
        agrees.append(argmax(fuzzy, draft.axes) == best)
    return jnp.stack(overlaps), jnp.stack(agrees)


def overlap(
    exact: Float[Array, "tokens vocab_shard"], fuzzy: Float[Array, "tokens vocab_shard"], axes: Axes
) -> Float[Array, " tokens"]:
    """Return Σ min(p, q) of two distributions; 1 if they are equal, 0 if they are disjoint.

    Args:
        exact: Logits of p, one shard of the vocabulary on each device.
        fuzzy: Logits of q, likewise.
        axes: Mesh axes that the vocabulary is split over.

    Examples:
        >>> p, q = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.log(jnp.array([[0.2, 0.3, 0.5]]))
        >>> f"{overlap(p, q, axes=())[0]:.3f}"  # 0.2 + 0.3 + 0.2
        '0.700'
    """
    # Each device sums over its own ids; the all-reduce adds the shards up.
    p, q = _probabilities(exact, axes), _probabilities(fuzzy, axes)
    return all_reduce(jnp.sum(jnp.minimum(p, q), axis=-1), axes)


def _probabilities(
    logits: Float[Array, "tokens vocab_shard"], axes: Axes
) -> Float[Array, "tokens vocab_shard"]:
    """Softmax over all shards."""
    greatest, total = normaliser(logits, axes)
    return jnp.exp(logits - greatest) / total
