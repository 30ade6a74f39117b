"""The projections that a refit replaces: what they are called, what they should say, what they become."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import Hidden
from easyspec_jax.parallel.mesh import ALL_AXES

Tensors = dict[str, np.ndarray]
"""Canonical tensors by name, float32."""


@dataclass(frozen=True)
class Site:
    """A projection by the canonical names of its parts."""

    norm: str
    parts: tuple[str, ...]


def qkv_site(layer: int) -> Site:
    prefix = f"model.layers.{layer}."
    return Site(
        f"{prefix}input_layernorm", tuple(f"{prefix}self_attn.{name}_proj" for name in "qkv")
    )


def gate_up_site(layer: int) -> Site:
    prefix = f"model.layers.{layer}."
    return Site(
        f"{prefix}post_attention_layernorm",
        tuple(f"{prefix}mlp.{name}_proj" for name in ("gate", "up")),
    )


def stale_sites(layout: Layout) -> Iterator[Site]:
    """The projections that a fuzzy pass feeds something else than the exact one does."""
    for group, mlps in layout:
        yield from (qkv_site(layer) for layer in group[1:])
        yield from (gate_up_site(layer) for layer in group if (layer - group.start) % mlps)


def prior(loader: Loader, site: Site) -> np.ndarray:
    """A projection of normed inputs and a 1: [hidden + 1, out], in float64."""
    norm = loader.source.read(f"{site.norm}.weight").astype(np.float64)
    weights = [
        loader.source.read(f"{part}.weight").astype(np.float64).T * norm[:, None]
        for part in site.parts
    ]
    return np.concatenate([np.concatenate(weights, axis=1), _bias(loader, site)[None]])


def _bias(loader: Loader, site: Site) -> np.ndarray:
    shapes = loader.source.shapes()
    biases = (
        loader.source.read(f"{part}.bias")
        if f"{part}.bias" in shapes
        else np.zeros(shapes[f"{part}.weight"][0])
        for part in site.parts
    )
    return np.concatenate([bias.astype(np.float64) for bias in biases])


def target(loader: Loader, site: Site) -> Projection:
    """A projection as the checkpoint has it, its outputs split over all devices in order."""
    weight = np.concatenate([loader.source.read(f"{part}.weight") for part in site.parts]).T
    padding = -weight.shape[1] % loader.mesh.size
    return Projection(
        norm=loader.place(loader.source.read(f"{site.norm}.weight"), P(None)),
        weight=loader.place(np.pad(weight, [(0, 0), (0, padding)]), P(None, ALL_AXES)),
        bias=loader.place(np.pad(_bias(loader, site), (0, padding)), P(ALL_AXES)),
        eps=loader.config.rms_norm_eps,
    )


def named(loader: Loader, site: Site, projection: Float[np.ndarray, "inputs out"]) -> Tensors:
    """A projection of normed inputs under its canonical names, with a norm that does nothing more."""
    sizes = [loader.source.shapes()[f"{part}.weight"][0] for part in site.parts]
    columns = np.split(projection, np.cumsum(sizes)[:-1], axis=1)
    tensors: Tensors = {f"{site.norm}.weight": np.ones(projection.shape[0] - 1, np.float32)}
    for part, values in zip(site.parts, columns, strict=True):
        tensors |= {
            f"{part}.weight": np.ascontiguousarray(values[:-1].T),
            f"{part}.bias": values[-1],
        }
    return tensors


def joined(tensors: Tensors, site: Site) -> Float[np.ndarray, "inputs out"]:
    """The inverse of named()."""
    columns = [
        np.concatenate([tensors[f"{part}.weight"].T, tensors[f"{part}.bias"][None]])
        for part in site.parts
    ]
    return np.concatenate(columns, axis=1)


def products(
    h: Hidden, y: Float[Array, "batch tokens out"], config: ModelConfig
) -> tuple[Array, Array]:
    """xᵀx and xᵀy of the inputs x that a refit projection has: normed, with a 1 for the bias."""
    x = rms_norm(h.astype(jnp.float32), jnp.ones(h.shape[-1], jnp.float32), config.rms_norm_eps)
    x = jnp.concatenate([x, jnp.ones((*x.shape[:2], 1), jnp.float32)], axis=-1).reshape(
        -1, x.shape[-1] + 1
    )
    y = y.astype(jnp.float32).reshape(x.shape[0], -1)
    return x.T @ x, x.T @ y
