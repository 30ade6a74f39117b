"""A refit's projections trained together, towards what the draft says when it runs exactly.

Least squares bring each projection nearest to what it should have said by itself; some errors matter more than others
to what the whole draft says. From the least squares on, gradient descent brings that nearer, in a number of steps: the
draft, run exactly, is its own teacher, and only the replaced projections are free. After DistillSpec (arXiv
2310.08461), which distils a target into its draft; of its divergences the forward KL gained most here (docs/refit.md).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.layer_group import LayerGroup, Refit, load_draft, load_refit, run_fuzzy
from easyspec_jax.draft.sites import Site, Tensors, joined, named, stale_sites
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.parallel.collectives import all_reduce
from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.refit.teacher import drafted_window, exact_window
from easyspec_jax.sampling.vocabulary import LOWEST, normaliser

RATE = 1e-4
"""Adam's, after a tenth of the steps; it then goes down as a cosine."""

TEXTS_A_STEP = 2

Trained = list[Float[Array, "inputs outputs"]]
"""Projections of normed inputs and a 1, float32, in the order of stale_sites()."""

Columns = Int[Array, " placed"]
"""Which column of a projection lies where on the mesh, from 1; 0 is padding."""


def distill(
    loader: Loader,
    layout: Layout,
    tensors: Tensors,
    texts: Int[np.ndarray, "texts tokens"],
    steps: int,
    bar: Bar = no_bar,
) -> Tensors:
    """Return a refit's tensors after `steps` steps on texts, which are taken in random order.

    Every device holds all projections in float32, and two moments of them; only products are split.
    """
    sites = list(stale_sites(layout))
    draft = load_draft(loader, layout, Held(tensors))
    everywhere = NamedSharding(loader.mesh, P())
    trained: Trained = [jax.device_put(joined(tensors, site), everywhere) for site in sites]
    columns = _columns(loader, layout, sites, trained)
    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, RATE, -(-steps // 10), steps), b2=0.99
    )
    moments = jax.device_put(optimizer.init(trained), everywhere)
    program, order = _step(optimizer, draft, loader.mesh), _shuffled(len(texts))
    with bar("Distilling", steps) as advance:
        for _ in range(steps):
            ids = jax.device_put(texts[list(itertools.islice(order, TEXTS_A_STEP))], everywhere)
            trained, moments = jax.block_until_ready(program(trained, moments, draft, columns, ids))
            advance(1)
    distilled: Tensors = {}
    for site, projection in zip(sites, trained, strict=True):
        distilled |= named(loader, site, np.asarray(projection))
    return distilled


def _shuffled(count: int) -> Iterator[int]:
    """All numbers below count, in an order that is new every time, for ever."""
    generator = np.random.default_rng(0)
    while True:
        yield from generator.permutation(count).tolist()


def _step(optimizer: optax.GradientTransformation, draft: Decoder, mesh: Mesh) -> Any:
    """The program of one step down the gradient: projections and moments, draft, columns and texts to the former."""
    specs = jax.tree.map(lambda x: x.sharding.spec, draft)
    loss = jax.shard_map(_loss, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)

    def step(
        trained: Trained, moments: Any, draft: Decoder, columns: list[Columns], ids: Array
    ) -> tuple[Trained, Any]:
        with jax.default_matmul_precision("highest"):
            gradient = jax.grad(lambda trained: loss(_with(draft, columns, trained), ids))(trained)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats and counts
            updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(trained, updates), moments  # pyright: ignore[reportReturnType]

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=NamedSharding(mesh, P()))


def _loss(draft: Decoder, ids: Int[Array, "texts tokens"]) -> Float[Array, ""]:
    """KL(exact, fuzzy) of what the draft says at depth 1, at temperature 1; its mean over all tokens, in nats."""
    batch, tokens = ids.shape
    capacity, config = 2 * tokens, draft.config
    h, caches = draft(
        ids, draft.init_caches(batch, capacity), exact_window(batch, tokens, capacity, config)
    )
    exact = jax.lax.stop_gradient(draft.logits(h).reshape(batch * tokens, -1))
    h, _ = draft(ids, caches, drafted_window(1, batch, tokens, capacity, config), run_fuzzy)
    fuzzy = draft.logits(h).reshape(batch * tokens, -1)
    return jnp.mean(_divergence(exact, fuzzy, draft.axes))


def _divergence(
    exact: Float[Array, "tokens vocab_shard"], fuzzy: Float[Array, "tokens vocab_shard"], axes: Axes
) -> Float[Array, " tokens"]:
    p, q = (_log_probabilities(logits, axes) for logits in (exact, fuzzy))
    return all_reduce(jnp.sum(jnp.exp(p) * (p - q), axis=-1), axes)


def _log_probabilities(
    logits: Float[Array, "tokens vocab_shard"], axes: Axes
) -> Float[Array, "tokens vocab_shard"]:
    """Finite also for ids that do not exist."""
    greatest, total = normaliser(logits, axes)
    return jnp.maximum(logits, LOWEST) - greatest - jnp.log(total)


def _columns(
    loader: Loader, layout: Layout, sites: Sequence[Site], trained: Trained
) -> list[Columns]:
    """Found by loading a refit whose biases are the numbers of their columns."""
    numbered: Tensors = {}
    for site, projection in zip(sites, trained, strict=True):
        numbers = np.zeros(projection.shape, np.float32)
        numbers[-1] = np.arange(1, projection.shape[1] + 1)
        numbered |= named(loader, site, numbers)
    precise = replace(loader, dtype=np.dtype(np.float32))
    columns = []
    for group in layout.groups:
        if len(group) > 1:
            found = load_refit(precise, group, Held(numbered))
            columns += [_bias(found.qkv)[slot] for slot in range(1, len(group))]
            columns += [_bias(own) for own in found.gate_up if own is not None]
    return [numbers.astype(jnp.int32) for numbers in columns]


def _with(draft: Decoder, columns: Sequence[Columns], trained: Trained) -> Decoder:
    """The draft with these projections in its refit."""
    draft = jax.tree.map(
        lambda leaf: leaf, draft
    )  # a module can only be changed in the trace that made it
    dtype = draft.embedding[...].dtype
    pairs = zip(trained, columns, strict=True)
    placed = iter([jnp.pad(x, ((0, 0), (1, 0)))[:, numbers].astype(dtype) for x, numbers in pairs])
    for block in draft.blocks:
        if isinstance(block, LayerGroup) and block.refit is not None:
            block.refit = _refilled(block.refit, len(block.mlps) - 1, placed)
    return draft


def _refilled(refit: Refit, stale: int, placed: Iterator[Float[Array, "inputs placed"]]) -> Refit:
    """stale: attentions behind the first."""
    slots = slice(1, 1 + stale)
    qkv = jnp.stack(list(itertools.islice(placed, stale)))
    return Refit(
        Projection(
            refit.qkv.norm[...],
            refit.qkv.weight[...].at[slots].set(qkv[:, :-1]),
            _bias(refit.qkv).at[slots].set(qkv[:, -1]),
            eps=refit.qkv.eps,
        ),
        [None if own is None else _of_rows(own, next(placed)) for own in refit.gate_up],
    )


def _of_rows(own: Projection, rows: Float[Array, "inputs placed"]) -> Projection:
    return Projection(own.norm[...], rows[:-1], rows[-1], eps=own.eps)


def _bias(projection: Projection) -> Array:
    assert projection.bias is not None, "what is refit has one"
    return projection.bias[...]
