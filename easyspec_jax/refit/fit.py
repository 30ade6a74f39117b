"""The refit, group by group: what each stale projection should have said, from what its group is fed.

Inside a fuzzy group a layer's queries, keys and values come from the group's input instead of the layer's own. One
affine map of that input, fitted to what the exact pass would have projected, takes the place of the layer's projection:
same shapes, plus a bias. The inputs are those that the fuzzy model itself has, all groups before it refit already. MLPs
that run at once are treated alike. Closed-form replacements of whole blocks are known (Neural Block Linearization,
arXiv 2505.21077; ReplaceMe, arXiv 2505.02819); these maps are what a group of layers needs to run at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easyspec_jax.config import ModelConfig
from easyspec_jax.draft.grouping import Group, Layout
from easyspec_jax.draft.parallel import LayerGroup, load_block, load_refit, run_fuzzy
from easyspec_jax.mesh import ALL_AXES
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import Decoder, Hidden, run_exact
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.refit.equations import NormalEquations
from easyspec_jax.refit.store import Held
from easyspec_jax.refit.teacher import drafted_window, exact_window

TEXTS_A_BATCH = 8

Tensors = dict[str, np.ndarray]
"""Canonical tensors by name, float32."""


def fit(
    loader: Loader, layout: Layout, texts: Int[np.ndarray, "texts tokens"], ridge: float, bar: Bar = no_bar
) -> Tensors:
    """The replaced tensors of every stale projection of a draft, fitted on texts.

    ridge: the penalty on the distance from the plain projection, per pair of input and output, where inputs have a mean
    square of 1. Hidden states lie on disk between groups, so that memory does not grow with the number of texts.
    """
    fitted: Tensors = {}
    with TemporaryDirectory() as directory, bar("Refitting", len(layout.groups)) as advance:
        states = _embed(loader, texts, Path(directory))
        for group in layout.groups:
            block = load_block(loader, group, layout.mlp_lp_size)
            if isinstance(block, LayerGroup):
                fitted |= _fit_group(loader, block, group, states, ridge)
            for number in range(len(states)):
                states[number] = _run(loader, _advance, block, states[number], (P(), P()))
            advance(1)
    return fitted


def _fit_group(loader: Loader, block: LayerGroup, group: Group, states: "States", ridge: float) -> Tensors:
    """The tensors of one group, with which the block then runs."""
    tensors: Tensors = {}

    def improve(fed: Callable[..., list[Fed]], sites: Sequence[Site], stale: range) -> None:
        tensors.update(_fit_projections(loader, block, fed, sites, stale, states, ridge))
        block.refit = load_refit(loader, group, Held(tensors))

    everything_but_first = range(1, len(group))
    improve(_attentions_fed, [_qkv(group[index]) for index in everything_but_first], everything_but_first)
    for first in range(0, len(group), block.mlp_lp_size):
        stale = range(first + 1, min(first + block.mlp_lp_size, len(group)))
        if stale:
            improve(_mlps_fed, [_gate_up(group[index]) for index in stale], stale)
    return tensors


@dataclass(frozen=True)
class Site:
    """A projection by the canonical names of its parts."""

    norm: str
    parts: tuple[str, ...]


def _qkv(layer: int) -> Site:
    prefix = f"model.layers.{layer}."
    return Site(f"{prefix}input_layernorm", tuple(f"{prefix}self_attn.{name}_proj" for name in "qkv"))


def _gate_up(layer: int) -> Site:
    prefix = f"model.layers.{layer}."
    return Site(f"{prefix}post_attention_layernorm", tuple(f"{prefix}mlp.{name}_proj" for name in ("gate", "up")))


Fed = tuple[Hidden, Hidden]
"""What a projection is fed in the fuzzy pass, and what in the exact one."""


def _attentions_fed(block: LayerGroup, config: ModelConfig, exact: Hidden, fuzzy: Hidden, stale: range) -> list[Fed]:
    batch, tokens = exact.shape[:2]
    fed = block.trace_exact(exact, block.init_cache(batch, tokens), exact_window(batch, tokens, tokens, config))[2]
    return [(fuzzy, fed[index][0]) for index in stale]


def _mlps_fed(block: LayerGroup, config: ModelConfig, exact: Hidden, fuzzy: Hidden, stale: range) -> list[Fed]:
    batch, tokens = exact.shape[:2]
    cache = block.init_cache(batch, 2 * tokens)
    _, cache, expected = block.trace_exact(exact, cache, exact_window(batch, tokens, 2 * tokens, config))
    got = block.trace_fuzzy(fuzzy, cache, drafted_window(1, batch, tokens, 2 * tokens, config))[2]
    return [(got[index], expected[index][1]) for index in stale]


def _fit_projections(
    loader: Loader,
    block: LayerGroup,
    fed: Callable[..., list[Fed]],
    sites: Sequence[Site],
    stale: range,
    states: "States",
    ridge: float,
) -> Tensors:
    """The tensors of some projections, each from what it is fed to what it should have said."""
    priors = [_prior(loader, site) for site in sites]
    modules = block, [_target(loader, site) for site in sites]
    equations = [NormalEquations(*prior.shape) for prior in priors]
    specs = ((P(), P(None, ALL_AXES)),) * len(sites)
    for number in range(len(states)):
        exact, fuzzy = states[number]
        sums = _run(loader, _sums, modules, (exact, fuzzy), specs, fed, stale)
        for equation, prior, (xx, xy) in zip(equations, priors, sums, strict=True):
            equation.add(np.asarray(xx), np.asarray(xy)[:, : prior.shape[1]], exact.shape[0] * exact.shape[1])
    tensors: Tensors = {}
    for site, prior, equation in zip(sites, priors, equations, strict=True):
        tensors |= _named(loader, site, equation.solve(prior, ridge).astype(np.float32))
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
    return tuple(_products(got, target(expected), config) for target, (got, expected) in pairs)


def _products(h: Hidden, y: Float[Array, "batch tokens out"], config: ModelConfig) -> tuple[Array, Array]:
    """xᵀx and xᵀy of the inputs x that a refit projection has: normed, with a 1 for the bias."""
    x = rms_norm(h.astype(jnp.float32), jnp.ones(h.shape[-1], jnp.float32), config.rms_norm_eps)
    x = jnp.concatenate([x, jnp.ones((*x.shape[:2], 1), jnp.float32)], axis=-1).reshape(-1, x.shape[-1] + 1)
    y = y.astype(jnp.float32).reshape(x.shape[0], -1)
    return x.T @ x, x.T @ y


def _advance(block: Any, config: ModelConfig, exact: Hidden, fuzzy: Hidden) -> tuple[Hidden, Hidden]:
    """What both passes make of a block's inputs."""
    batch, tokens = exact.shape[:2]
    cache = block.init_cache(batch, 2 * tokens)
    exact, cache = run_exact(block, exact, cache, exact_window(batch, tokens, 2 * tokens, config))
    fuzzy, _ = run_fuzzy(block, fuzzy, cache, drafted_window(1, batch, tokens, 2 * tokens, config))
    return exact, fuzzy


def _prior(loader: Loader, site: Site) -> np.ndarray:
    """A projection of normed inputs and a 1: [hidden + 1, out], in float64."""
    norm = loader.source.read(f"{site.norm}.weight").astype(np.float64)
    weights = [loader.source.read(f"{part}.weight").astype(np.float64).T * norm[:, None] for part in site.parts]
    return np.concatenate([np.concatenate(weights, axis=1), _bias(loader, site)[None]])


def _bias(loader: Loader, site: Site) -> np.ndarray:
    shapes = loader.source.shapes()
    biases = (
        loader.source.read(f"{part}.bias") if f"{part}.bias" in shapes else np.zeros(shapes[f"{part}.weight"][0])
        for part in site.parts
    )
    return np.concatenate([bias.astype(np.float64) for bias in biases])


def _target(loader: Loader, site: Site) -> Projection:
    """A projection as the checkpoint has it, its outputs split over all devices in order."""
    weight = np.concatenate([loader.source.read(f"{part}.weight") for part in site.parts]).T
    padding = -weight.shape[1] % loader.mesh.size
    return Projection(
        norm=loader.place(loader.source.read(f"{site.norm}.weight"), P(None)),
        weight=loader.place(np.pad(weight, [(0, 0), (0, padding)]), P(None, ALL_AXES)),
        bias=loader.place(np.pad(_bias(loader, site), (0, padding)), P(ALL_AXES)),
        eps=loader.config.rms_norm_eps,
    )


def _named(loader: Loader, site: Site, projection: Float[np.ndarray, "inputs out"]) -> Tensors:
    """A projection of normed inputs under its canonical names, with a norm that does nothing more."""
    sizes = [loader.source.shapes()[f"{part}.weight"][0] for part in site.parts]
    columns = np.split(projection, np.cumsum(sizes)[:-1], axis=1)
    tensors: Tensors = {f"{site.norm}.weight": np.ones(projection.shape[0] - 1, np.float32)}
    for part, values in zip(site.parts, columns, strict=True):
        tensors |= {f"{part}.weight": np.ascontiguousarray(values[:-1].T), f"{part}.bias": values[-1]}
    return tensors


class States:
    """Hidden states of every batch in the exact and in the fuzzy pass, on disk."""

    def __init__(self, directory: Path, count: int) -> None:
        self._directory, self._count = directory, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        exact, fuzzy = np.load(self._directory / f"{number}.npy")
        return exact, fuzzy

    def __setitem__(self, number: int, states: tuple[Array, Array]) -> None:
        np.save(self._directory / f"{number}.npy", np.stack([np.asarray(x, np.float32) for x in states]))


def _embed(loader: Loader, texts: Int[np.ndarray, "texts tokens"], directory: Path) -> States:
    """The states that both passes begin with."""
    decoder = loader.decoder(())
    batches = [texts[first : first + TEXTS_A_BATCH] for first in range(0, len(texts), TEXTS_A_BATCH)]
    states = States(directory, len(batches))
    for number, batch in enumerate(batches):
        h = _run(loader, _embedded, decoder, (batch,), P())
        states[number] = h, h
    return states


def _embedded(decoder: Decoder, config: ModelConfig, tokens: Int[Array, "batch tokens"]) -> Hidden:
    return decoder.embed(tokens)


def _run(loader: Loader, step: Callable[..., Any], modules: Any, arrays: Sequence[np.ndarray], specs: Any,
         *static: Any) -> Any:  # fmt: skip
    """step(modules, config, *arrays, *static) on every device; specs: of the results."""
    leaves, structure = jax.tree.flatten(modules)
    leaf_specs = tuple(leaf.sharding.spec for leaf in leaves)
    program = _program(step, static, loader.mesh, loader.config, structure, leaf_specs, len(arrays), specs)
    dtypes = (loader.dtype if array.dtype.kind == "f" else array.dtype for array in arrays)
    everywhere = NamedSharding(loader.mesh, P())
    placed = [jax.device_put(x.astype(dtype), everywhere) for x, dtype in zip(arrays, dtypes, strict=True)]
    return program(leaves, *placed)


@cache
def _program(
    step: Callable[..., Any],
    static: tuple[Any, ...],
    mesh: Mesh,
    config: ModelConfig,
    structure: Any,
    leaf_specs: tuple[P, ...],
    count: int,
    specs: Any,
) -> Callable[..., Any]:
    """Compiled once for all groups of one shape."""

    def body(leaves: tuple[jax.Array, ...], *arrays: Array) -> Any:
        with jax.default_matmul_precision("highest"):
            return step(jax.tree.unflatten(structure, leaves), config, *arrays, *static)

    in_specs = (list(leaf_specs), *(P(),) * count)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=specs, check_vma=False))
