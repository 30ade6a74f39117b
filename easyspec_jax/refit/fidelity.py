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
from easyspec_jax.refit.teacher import drafted_window, exact_window
from easyspec_jax.sampling.vocabulary import argmax, normaliser

DEPTHS = 4


def fidelity(
    draft: Decoder,
    mesh: Mesh,
    texts: Int[np.ndarray, "texts tokens"],
    counted: Bool[np.ndarray, "texts tokens"],
    depths: int = DEPTHS,
) -> tuple[list[float], list[float]]:
    """At each depth from 1: the mean of Σ min(p_fuzzy, p_exact), and how often both have the same likeliest id.

    counted: the positions whose predictions are compared. Teacher-forced, at temperature 1.
    """
    specs = jax.tree.map(lambda x: x.sharding.spec, draft)

    def body(draft: Decoder, ids: Int[Array, "1 tokens"]) -> tuple[Array, Array]:
        with jax.default_matmul_precision("highest"):
            return _compare(draft, ids, depths)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)
    program: Any = jax.jit(mapped)
    results = [program(draft, ids[None].astype(np.int32)) for ids in texts]
    overlaps, agrees = (
        np.stack([np.asarray(result[i]) for result in results], axis=1) for i in range(2)
    )
    return [float(x[counted].mean()) for x in overlaps], [float(x[counted].mean()) for x in agrees]


def _compare(
    draft: Decoder, ids: Int[Array, "1 tokens"], depths: int
) -> tuple[Float[Array, "depths tokens"], Bool[Array, "depths tokens"]]:
    batch, tokens = ids.shape
    capacity = (depths + 1) * tokens
    caches: Caches = draft.init_caches(batch, capacity)
    h, caches = draft(ids, caches, exact_window(batch, tokens, capacity, draft.config))
    exact = draft.logits(h)[0]
    best = argmax(exact, draft.axes)
    overlaps, agrees = [], []
    for depth in range(1, depths + 1):
        h, caches = draft(
            ids, caches, drafted_window(depth, batch, tokens, capacity, draft.config), run_fuzzy
        )
        fuzzy = draft.logits(h)[0]
        overlaps.append(overlap(exact, fuzzy, draft.axes))
        agrees.append(argmax(fuzzy, draft.axes) == best)
    return jnp.stack(overlaps), jnp.stack(agrees)


def overlap(
    exact: Float[Array, "tokens vocab_shard"], fuzzy: Float[Array, "tokens vocab_shard"], axes: Axes
) -> Float[Array, " tokens"]:
    """Σ min(p, q) of two distributions, given by their logits."""
    p, q = (_probabilities(logits, axes) for logits in (exact, fuzzy))
    return all_reduce(jnp.sum(jnp.minimum(p, q), axis=-1), axes)


def _probabilities(
    logits: Float[Array, "tokens vocab_shard"], axes: Axes
) -> Float[Array, "tokens vocab_shard"]:
    greatest, total = normaliser(logits, axes)
    return jnp.exp(logits - greatest) / total
