"""The fit, group by group: each stale projection is mapped to what its exact input would give.

Inside a fuzzy group, a layer's queries, keys and values are computed from the group's input instead
of the layer's own. One affine map of that input, fitted to what the exact pass projects, stands in
for the layer's projection: the same shapes, and a bias. MLPs that run at once are treated alike.

For an input h of the group, x = [rms(h), 1] and y the layer's exact projection, over n tokens:

    W' = argmin Σ |x W' - y|² + ridge · n · |W' - W|²

where W is the plain projection, its norm's weight multiplied in. Inputs are those that the fuzzy
model itself has, with all groups before this one refit already, so a group also makes up for what
earlier ones lose.

Closed-form replacements of whole blocks are known (Neural Block Linearization, arXiv 2505.21077;
ReplaceMe, arXiv 2505.02819); these maps are what a group of layers needs to run at once.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.draft.grouping import Group, Layout
from easyspec_jax.draft.layer_group import LayerGroup, load_block, load_refit, run_fuzzy
from easyspec_jax.draft.sites import (
    Site,
    Tensors,
    gate_up_site,
    named,
    prior,
    products,
    qkv_site,
    target,
)
from easyspec_jax.model.batches import Batches
from easyspec_jax.model.device import run
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import Decoder, Hidden, run_exact
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.refit.equations import NormalEquations
from easyspec_jax.refit.teacher import drafted_window, exact_window

TEXTS_A_BATCH = 8
"""Texts that go through a block together."""


class States(Protocol):
    """Hidden states of the exact and the fuzzy pass, each [texts, tokens, hidden], by batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sequence[np.ndarray]: ...


def fit(
    loader: Loader,
    layout: Layout,
    texts: Int[np.ndarray, "texts tokens"],
    ridge: float,
    bar: Bar = no_bar,
) -> Tensors:
    """Fit every stale projection of a draft on texts.

    Hidden states lie on disk between groups, so memory does not grow with the number of texts.

    Args:
        loader: Loader of the draft.
        layout: Its groups.
        texts: Token ids.
        ridge: Penalty for each pair (input, output), which holds projections to the plain ones.
            Inputs have a mean square of 1, so one value suits models of any width.
        bar: Shows progress.

    Returns:
        The tensors that replace the draft's own in fuzzy passes, float32, by canonical name.
    """
    fitted: Tensors = {}
    with TemporaryDirectory() as directory, bar("Refitting", len(layout.groups)) as advance:
        states = Batches(Path(directory))
        for number, h in enumerate(embed(loader, texts)):
            # Nothing is fuzzy before the first layer.
            states[number] = h, h
        for group, mlps in layout:
            block = load_block(loader, group, mlps)
            if isinstance(block, LayerGroup):
                attentions = fit_attentions(loader, group, block, states, ridge)
                fitted |= fit_mlps(loader, group, block, attentions, states, ridge)
            # The block runs with its refit here, and the next group is fitted to what that gives.
            for number in range(len(states)):
                states[number] = run(loader, through_block, block, states[number], (P(), P()))
            advance(1)
    return fitted


def fit_attentions(
    loader: Loader, group: Group, block: LayerGroup, states: States, ridge: float
) -> Tensors:
    """Fit the attentions of a group that have stale inputs: all but the first.

    Args:
        loader: Loader of the draft.
        group: The group's layers.
        block: The group, without a refit. How its MLPs run does not matter.
        states: Inputs of the group.
        ridge: As for `fit`.
    """
    stale = range(1, len(group))
    sites = [qkv_site(group[index]) for index in stale]
    return _fit_projections(loader, block, _attentions_fed, sites, stale, states, ridge)


def fit_mlps(
    loader: Loader,
    group: Group,
    block: LayerGroup,
    attentions: Tensors,
    states: States,
    ridge: float,
) -> Tensors:
    """Fit the MLPs of a group that have stale inputs, turn by turn.

    Args:
        loader: Loader of the draft.
        group: The group's layers.
        block: The group. It has the whole refit afterwards and runs with it.
        attentions: Result of `fit_attentions`.
        states: Inputs of the group.
        ridge: As for `fit`.

    Returns:
        The tensors of all the group's stale projections, those of `attentions` included.
    """
    tensors = dict(attentions)
    block.refit = load_refit(loader, group, Held(tensors))
    # With 5 layers, 2 MLPs at a time, the turns are 0-1 | 2-3 | 4, and MLPs 1 and 3 are stale.
    for first in range(0, len(group), block.mlp_lp_size):
        stale = range(first + 1, min(first + block.mlp_lp_size, len(group)))
        if stale:
            sites = [gate_up_site(group[index]) for index in stale]
            tensors |= _fit_projections(loader, block, _mlps_fed, sites, stale, states, ridge)
            # Later turns see the outputs of this one, so they are fitted with its refit in place.
            block.refit = load_refit(loader, group, Held(tensors))
    return tensors


Fed = tuple[Hidden, Hidden]
"""Inputs of a projection in the fuzzy and in the exact pass."""


def _attentions_fed(
    block: LayerGroup, config: ModelConfig, exact: Hidden, fuzzy: Hidden, stale: range
) -> list[Fed]:
    """In the fuzzy pass every attention is fed the group's input."""
    batch, tokens = exact.shape[:2]
    window = exact_window(batch, tokens, tokens, config)
    _, _, expected = block.trace_exact(exact, block.init_cache(batch, tokens), window)
    return [(fuzzy, expected[index][0]) for index in stale]


def _mlps_fed(
    block: LayerGroup, config: ModelConfig, exact: Hidden, fuzzy: Hidden, stale: range
) -> list[Fed]:
    """MLPs are fed what the attentions and the earlier turns, as refit so far, add up to."""
    batch, tokens = exact.shape[:2]
    cache = block.init_cache(batch, 2 * tokens)
    window = exact_window(batch, tokens, 2 * tokens, config)
    _, cache, expected = block.trace_exact(exact, cache, window)
    window = drafted_window(1, batch, tokens, 2 * tokens, config)
    _, _, got = block.trace_fuzzy(fuzzy, cache, window)
    return [(got[index], expected[index][1]) for index in stale]


def _fit_projections(
    loader: Loader,
    block: LayerGroup,
    fed: Callable[..., list[Fed]],
    sites: Sequence[Site],
    stale: range,
    states: States,
    ridge: float,
) -> Tensors:
    """Fit some projections of a group, which `fed` traces, in one pass over all batches."""
    modules = block, [target(loader, site) for site in sites]
    # xᵀx is whole on every device; the columns of xᵀy are split like the projection's outputs.
    specs = ((P(), P(None, ALL_AXES)),) * len(sites)
    priors = [prior(loader, site) for site in sites]
    equations = [NormalEquations(*plain.shape) for plain in priors]
    for number in range(len(states)):
        texts, tokens, _ = states[number][0].shape
        sums = run(loader, _sums, modules, states[number], specs, fed, stale)
        for equation, plain, (xx, xy) in zip(equations, priors, sums, strict=True):
            # Columns past the projection's own pad it to a multiple of the number of devices.
            equation.add(np.asarray(xx), np.asarray(xy)[:, : plain.shape[1]], texts * tokens)
    tensors: Tensors = {}
    for site, plain, equation in zip(sites, priors, equations, strict=True):
        tensors |= named(loader, site, equation.solve(plain, ridge).astype(np.float32))
    return tensors


def _sums(
    modules: tuple[LayerGroup, list[Projection]],
    config: ModelConfig,
    exact: Hidden,
    fuzzy: Hidden,
    fed: Callable[..., list[Fed]],
    stale: range,
) -> tuple[tuple[Float[Array, "inputs inputs"], Float[Array, "inputs outputs"]], ...]:
    """Return xᵀx and xᵀy of one batch for each stale projection."""
    block, targets = modules
    pairs = zip(targets, fed(block, config, exact, fuzzy, stale), strict=True)
    return tuple(products(got, target(expected), config) for target, (got, expected) in pairs)


def through_block(
    block: Any, config: ModelConfig, exact: Hidden, fuzzy: Hidden
) -> tuple[Hidden, Hidden]:
    """Run a block exactly and then, on the KV that this leaves, fuzzily at depth 1."""
    batch, tokens = exact.shape[:2]
    cache = block.init_cache(batch, 2 * tokens)
    exact, cache = run_exact(block, exact, cache, exact_window(batch, tokens, 2 * tokens, config))
    fuzzy, _ = run_fuzzy(block, fuzzy, cache, drafted_window(1, batch, tokens, 2 * tokens, config))
    return exact, fuzzy


def embed(loader: Loader, texts: Int[np.ndarray, "texts tokens"]) -> Iterator[np.ndarray]:
    """Yield the first layer's inputs batch by batch: float32 [TEXTS_A_BATCH, tokens, hidden]."""
    decoder = loader.decoder(())
    for first in range(0, len(texts), TEXTS_A_BATCH):
        batch = texts[first : first + TEXTS_A_BATCH]
        yield np.asarray(run(loader, _embedded, decoder, (batch,), P()), np.float32)


def _embedded(decoder: Decoder, config: ModelConfig, tokens: Int[Array, "batch tokens"]) -> Hidden:
    return decoder.embed(tokens)
