"""Distillation: a refit's projections trained together towards the exact draft's distribution.

Least squares bring each projection as near as possible to what it should give by itself, but some
errors matter more than others to the distribution in the end. Gradient descent continues from the
least squares. The draft, run exactly, is its own teacher, and only the replaced projections are
free. The loss is

    mean over tokens of KL(p ‖ q) = Σ p (log p - log q),  p exact, q fuzzy at depth 1

This follows DistillSpec (arXiv 2310.08461), which distils a target into its draft. Of its
divergences the forward KL gained most here (docs/refit.md).
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

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.layer_group import LayerGroup, Refit, load_draft, load_refit, run_fuzzy
from easyspec_jax.draft.sites import Site, Tensors, joined, named, stale_sites
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.parallel.collectives import all_reduce
from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.parallel.spmd import partition_specs, spmd
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.refit.teacher import drafted_window, exact_window
from easyspec_jax.sampling.vocabulary import LOWEST, normaliser

RATE = 1e-4
"""Adam's rate after a warm-up of a tenth of the steps. It then falls to zero along a cosine."""

TEXTS_A_STEP = 2
"""Texts of one step of gradient descent."""

Trained = list[Float[Array, "inputs outputs"]]
"""Projections of [normed input, 1], float32, in the order of stale_sites()."""

Columns = Int[Array, " placed"]
"""The column of a projection at each place on the mesh, counted from 1; 0 is padding."""


def distill(
    loader: Loader,
    layout: Layout,
    tensors: Tensors,
    texts: Int[np.ndarray, "texts tokens"],
    steps: int,
    bar: Bar = no_bar,
) -> Tensors:
    """Train a refit's projections by gradient descent.

    Every device holds all projections and their two moments in float32; only products are split.

    Args:
        loader: Loader of the draft. Its dtype is that of all but the projections.
        layout: Groups of the refit.
        tensors: The refit to begin with.
        texts: Token ids, which are taken in random order.
        steps: Steps of gradient descent, TEXTS_A_STEP texts each.
        bar: Shows progress.

    Returns:
        The refit's tensors after the last step. Norms do not move.
    """
    sites = list(stale_sites(layout))
    # Kernels have no gradients.
    draft = load_draft(replace(loader, settings=PlatformSettings()), layout, Held(tensors))
    everywhere = NamedSharding(loader.mesh, P())
    trained: Trained = [jax.device_put(joined(tensors, site), everywhere) for site in sites]
    columns = _columns(loader, layout, sites, trained)
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, ceil_div(steps, 10), steps)
    optimizer = optax.adam(schedule, b2=0.99)
    moments = jax.device_put(optimizer.init(trained), everywhere)
    program = _step(optimizer, draft, loader.mesh)
    order = _shuffled(len(texts))
    with bar("Distilling", steps) as advance:
        for _ in range(steps):
            ids = jax.device_put(texts[list(itertools.islice(order, TEXTS_A_STEP))], everywhere)
            # Waiting keeps the bar in step with the devices.
            trained, moments = jax.block_until_ready(program(trained, moments, draft, columns, ids))
            advance(1)
    distilled: Tensors = {}
    for site, projection in zip(sites, trained, strict=True):
        distilled |= named(loader, site, np.asarray(projection))
    return distilled


def _shuffled(count: int) -> Iterator[int]:
    """Yield all numbers below `count` in random order, then again in another, without end."""
    generator = np.random.default_rng(0)
    while True:
        yield from generator.permutation(count).tolist()


def _step(optimizer: optax.GradientTransformation, draft: Decoder, mesh: Mesh) -> Any:
    """Compile one step: (projections, moments, draft, columns, texts) -> (projections, moments)."""
    loss = spmd(_loss, mesh, (partition_specs(draft), P()), P())

    def step(
        trained: Trained, moments: Any, draft: Decoder, columns: list[Columns], ids: Array
    ) -> tuple[Trained, Any]:
        # _with() stays outside shard_map: XLA moves columns to their devices, and gradients back.
        with jax.default_matmul_precision("highest"):
            gradient = jax.grad(lambda trained: loss(_with(draft, columns, trained), ids))(trained)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats and counts
            updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(trained, updates), moments  # pyright: ignore[reportReturnType]

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=NamedSharding(mesh, P()))


def _loss(draft: Decoder, ids: Int[Array, "texts tokens"]) -> Float[Array, ""]:
    """Mean KL(exact, fuzzy) at draft depth 1 and temperature 1 over all tokens, in nats."""
    batch, tokens = ids.shape
    capacity, config = 2 * tokens, draft.config
    window = exact_window(batch, tokens, capacity, config)
    h, caches = draft(ids, draft.init_caches(batch, capacity), window)
    # [texts, tokens, vocab_shard] -> [texts * tokens, vocab_shard]. The teacher does not learn;
    # its caches hold nothing of the refit, as the exact pass runs without it.
    exact = jax.lax.stop_gradient(draft.logits(h).reshape(batch * tokens, -1))
    h, _ = draft(ids, caches, drafted_window(1, batch, tokens, capacity, config), run_fuzzy)
    fuzzy = draft.logits(h).reshape(batch * tokens, -1)
    return jnp.mean(_divergence(exact, fuzzy, draft.axes))


def _divergence(
    exact: Float[Array, "tokens vocab_shard"], fuzzy: Float[Array, "tokens vocab_shard"], axes: Axes
) -> Float[Array, " tokens"]:
    """KL(exact, fuzzy) of each token, summed over the shards of the vocabulary."""
    p, q = _log_probabilities(exact, axes), _log_probabilities(fuzzy, axes)
    return all_reduce(jnp.sum(jnp.exp(p) * (p - q), axis=-1), axes)


def _log_probabilities(
    logits: Float[Array, "tokens vocab_shard"], axes: Axes
) -> Float[Array, "tokens vocab_shard"]:
    """Log-softmax over all shards. Padding ids get a finite value, as 0 * (-inf) would be NaN."""
    greatest, total = normaliser(logits, axes)
    return jnp.maximum(logits, LOWEST) - greatest - jnp.log(total)


def _columns(
    loader: Loader, layout: Layout, sites: Sequence[Site], trained: Trained
) -> list[Columns]:
    """Find where the mesh has each column of each projection.

    The loader splits a projection over devices, groups the heads of q, k and v, and pads. Instead
    of repeating that, load a refit whose biases are the numbers of their columns, and look.
    """
    numbered: Tensors = {}
    for site, projection in zip(sites, trained, strict=True):
        numbers = np.zeros(projection.shape, np.float32)
        numbers[-1] = np.arange(1, projection.shape[1] + 1)  # the last row is the bias
        numbered |= named(loader, site, numbers)
    # Narrower types could not tell large numbers apart.
    precise = replace(loader, dtype=np.dtype(np.float32))
    columns = []
    for group in layout.groups:
        if len(group) > 1:
            found = load_refit(precise, group, Held(numbered))
            # In the order of stale_sites(): a group's attentions, then its MLPs.
            columns += [_bias(found.qkv)[slot] for slot in range(1, len(group))]
            columns += [_bias(own) for own in found.gate_up if own is not None]
    return [numbers.astype(jnp.int32) for numbers in columns]


def _with(draft: Decoder, columns: Sequence[Columns], trained: Trained) -> Decoder:
    """Put projections into the draft's refit, each column where the mesh has it."""
    # A module can only be changed in the trace that made it, hence a copy.
    draft = jax.tree.map(lambda leaf: leaf, draft)
    dtype = draft.norm.dtype
    placed = []
    for projection, numbers in zip(trained, columns, strict=True):
        # A column of zeros in front is what 0 stands for. With columns a b c and numbers 1 3 | 2 0:
        # 0 a b c -> a c | b 0
        padded = jnp.pad(projection, ((0, 0), (1, 0)))
        placed.append(padded[:, numbers].astype(dtype))
    following = iter(placed)
    for block in draft.blocks:
        if isinstance(block, LayerGroup) and block.refit is not None:
            block.refit = _refilled(block.refit, len(block.mlps) - 1, following)
    return draft


def _refilled(refit: Refit, stale: int, placed: Iterator[Float[Array, "inputs placed"]]) -> Refit:
    """Fill a group's refit with the next projections: `stale` attentions, then MLPs."""
    # Slot 0 is the first attention, which is fed what it expects; slots past the last are padding.
    slots = slice(1, 1 + stale)
    qkv = jnp.stack(list(itertools.islice(placed, stale)))  # [stale, inputs, placed]
    return Refit(
        Projection(
            refit.qkv.norm,
            Matrix(refit.qkv.weight.values[...].at[slots].set(qkv[:, :-1].mT)),
            _bias(refit.qkv).at[slots].set(qkv[:, -1]),
            dtype=refit.qkv.dtype,
        ),
        [None if own is None else _of_rows(own, next(placed)) for own in refit.gate_up],
    )


def _of_rows(own: Projection, rows: Float[Array, "inputs placed"]) -> Projection:
    """Replace a projection's weight by all rows but the last, transposed; its bias by the last."""
    return Projection(own.norm, Matrix(rows[:-1].T), rows[-1], dtype=own.dtype)


def _bias(projection: Projection) -> Array:
    assert projection.bias is not None, "a refit projection has a bias"
    return projection.bias[...]
