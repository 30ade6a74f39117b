"""The refit, group by group: what each stale projection should have said, from what its group is fed.

Inside a fuzzy group a layer's queries, keys and values come from the group's input instead of the layer's own. One
affine map of that input, fitted to what the exact pass would have projected, takes the place of the layer's projection:
same shapes, plus a bias. The inputs are those that the fuzzy model itself has, all groups before it refit already. MLPs
that run at once are treated alike. Closed-form replacements of whole blocks are known (Neural Block Linearization,
arXiv 2505.21077; ReplaceMe, arXiv 2505.02819); these maps are what a group of layers needs to run at once.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

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
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import Decoder, Hidden, run_exact
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.refit.device import run
from easyspec_jax.refit.equations import NormalEquations
from easyspec_jax.refit.teacher import drafted_window, exact_window

TEXTS_A_BATCH = 8


class Batches(Protocol):
    """Hidden states in the exact and in the fuzzy pass, [texts, tokens, hidden], batch by batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class States:
    """Hidden states of every batch in the exact and in the fuzzy pass, on disk."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        exact, fuzzy = np.load(self._directory / f"{number}.npy")
        return exact, fuzzy

    def __setitem__(self, number: int, states: Sequence[ArrayLike]) -> None:
        self._count = max(self._count, number + 1)
        np.save(
            self._directory / f"{number}.npy", np.stack([np.asarray(x, np.float32) for x in states])
        )


def fit(
    loader: Loader,
    layout: Layout,
    texts: Int[np.ndarray, "texts tokens"],
    ridge: float,
    bar: Bar = no_bar,
) -> Tensors:
    """The replaced tensors of every stale projection of a draft, fitted on texts.

    ridge: the penalty on the distance from the plain projection, per pair of input and output, where inputs have a mean
    square of 1. Hidden states lie on disk between groups, so that memory does not grow with the number of texts.
    """
    fitted: Tensors = {}
    with TemporaryDirectory() as directory, bar("Refitting", len(layout.groups)) as advance:
        states = States(Path(directory))
        for number, h in enumerate(embed(loader, texts)):
            states[number] = h, h
        for group, mlps in layout:
            block = load_block(loader, group, mlps)
            if isinstance(block, LayerGroup):
                attentions = fit_attentions(loader, group, block, states, ridge)
                fitted |= fit_mlps(loader, group, block, attentions, states, ridge)
            for number in range(len(states)):
                states[number] = run(loader, through_block, block, states[number], (P(), P()))
            advance(1)
    return fitted


def fit_attentions(
    loader: Loader, group: Group, block: LayerGroup, states: Batches, ridge: float
) -> Tensors:
    """The tensors of a group's stale attentions, however its MLPs run."""
    stale = range(1, len(group))
    sites = [qkv_site(group[index]) for index in stale]
    return _fit_projections(loader, block, _attentions_fed, sites, stale, states, ridge)


def fit_mlps(
    loader: Loader,
    group: Group,
    block: LayerGroup,
    attentions: Tensors,
    states: Batches,
    ridge: float,
) -> Tensors:
    """A group's tensors: those of its attentions, and of the MLPs that are stale; the block then runs with them."""
    tensors = dict(attentions)
    block.refit = load_refit(loader, group, Held(tensors))
    for first in range(0, len(group), block.mlp_lp_size):
        stale = range(first + 1, min(first + block.mlp_lp_size, len(group)))
        if stale:
            sites = [gate_up_site(group[index]) for index in stale]
            tensors |= _fit_projections(loader, block, _mlps_fed, sites, stale, states, ridge)
            block.refit = load_refit(loader, group, Held(tensors))
    return tensors


Fed = tuple[Hidden, Hidden]
"""What a projection is fed in the fuzzy pass, and what in the exact one."""


def _attentions_fed(
    block: LayerGroup, config: ModelConfig, exact: Hidden, fuzzy: Hidden, stale: range
) -> list[Fed]:
    batch, tokens = exact.shape[:2]
    fed = block.trace_exact(
        exact, block.init_cache(batch, tokens), exact_window(batch, tokens, tokens, config)
    )[2]
    return [(fuzzy, fed[index][0]) for index in stale]


def _mlps_fed(
    block: LayerGroup, config: ModelConfig, exact: Hidden, fuzzy: Hidden, stale: range
) -> list[Fed]:
    batch, tokens = exact.shape[:2]
    cache = block.init_cache(batch, 2 * tokens)
    _, cache, expected = block.trace_exact(
        exact, cache, exact_window(batch, tokens, 2 * tokens, config)
    )
    got = block.trace_fuzzy(fuzzy, cache, drafted_window(1, batch, tokens, 2 * tokens, config))[2]
    return [(got[index], expected[index][1]) for index in stale]


def _fit_projections(
    loader: Loader,
    block: LayerGroup,
    fed: Callable[..., list[Fed]],
    sites: Sequence[Site],
    stale: range,
    states: Batches,
    ridge: float,
) -> Tensors:
    """The tensors of some projections, each from what it is fed to what it should have said."""
    modules = block, [target(loader, site) for site in sites]
    specs = ((P(), P(None, ALL_AXES)),) * len(sites)
    priors = [prior(loader, site) for site in sites]
    equations = [NormalEquations(*plain.shape) for plain in priors]
    for number in range(len(states)):
        texts, tokens, _ = states[number][0].shape
        sums = run(loader, _sums, modules, states[number], specs, fed, stale)
        for equation, plain, (xx, xy) in zip(equations, priors, sums, strict=True):
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
    block, targets = modules
    pairs = zip(targets, fed(block, config, exact, fuzzy, stale), strict=True)
    return tuple(products(got, target(expected), config) for target, (got, expected) in pairs)


def through_block(
    block: Any, config: ModelConfig, exact: Hidden, fuzzy: Hidden
) -> tuple[Hidden, Hidden]:
    """Outputs of both passes for a block's inputs."""
    batch, tokens = exact.shape[:2]
    cache = block.init_cache(batch, 2 * tokens)
    exact, cache = run_exact(block, exact, cache, exact_window(batch, tokens, 2 * tokens, config))
    fuzzy, _ = run_fuzzy(block, fuzzy, cache, drafted_window(1, batch, tokens, 2 * tokens, config))
    return exact, fuzzy


def embed(loader: Loader, texts: Int[np.ndarray, "texts tokens"]) -> Iterator[np.ndarray]:
    """Inputs of both passes, batch by batch: float32 [texts, tokens, hidden]."""
    decoder = loader.decoder(())
    for first in range(0, len(texts), TEXTS_A_BATCH):
        batch = texts[first : first + TEXTS_A_BATCH]
        yield np.asarray(run(loader, _embedded, decoder, (batch,), P()), np.float32)


def _embedded(decoder: Decoder, config: ModelConfig, tokens: Int[Array, "batch tokens"]) -> Hidden:
    return decoder.embed(tokens)
