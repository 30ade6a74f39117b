"""The projections that a refit replaces: their names, their targets, and the tensors they become.

A projection here is a matrix [hidden + 1, out] that maps a normed hidden state with a 1 appended to
outputs: the last row is the bias.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.quantized import Dequantized
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm, rms_norm
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.transformer import Hidden
from easyspec_jax.parallel.mesh import ALL_AXES

Tensors = dict[str, np.ndarray]
"""Canonical tensors by name, float32."""


@dataclass(frozen=True)
class Site:
    """One norm and the projections that read it, by canonical tensor names without ".weight".

    Attributes:
        norm: The norm before the projections.
        parts: The projections; their outputs are joined in this order.
    """

    norm: str
    parts: tuple[str, ...]


def qkv_site(layer: int) -> Site:
    """Name the query, key and value projections of a layer.

    Examples:
        >>> qkv_site(3).norm, qkv_site(3).parts[0]
        ('model.layers.3.input_layernorm', 'model.layers.3.self_attn.q_proj')
    """
    prefix = f"model.layers.{layer}."
    attention = f"{prefix}self_attn."
    return Site(
        f"{prefix}input_layernorm",
        (f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
    )


def gate_up_site(layer: int) -> Site:
    """Name the gate and up projections of a layer's MLP.

    Examples:
        >>> gate_up_site(3).parts
        ('model.layers.3.mlp.gate_proj', 'model.layers.3.mlp.up_proj')
    """
    prefix = f"model.layers.{layer}."
    return Site(
        f"{prefix}post_attention_layernorm", (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")
    )


def stale_sites(layout: Layout) -> Iterator[Site]:
    """List the projections that a fuzzy pass feeds stale inputs.

    A group's first attention reads the group's input, as in the exact pass; all others read it too,
    instead of what the layers before them made of it. Of MLPs that run at once, the first one is
    fed all that came before; the others lack the outputs of the MLPs that run with them.

    Args:
        layout: The draft's groups.

    Yields:
        Each group's sites: first attentions, then MLPs.

    Examples:
        >>> layout = Layout((range(0, 1), range(1, 4)), (1, 2))
        >>> for site in stale_sites(layout):
        ...     print(site.parts[0])
        model.layers.2.self_attn.q_proj
        model.layers.3.self_attn.q_proj
        model.layers.2.mlp.gate_proj
    """
    # Group 4-7 with two MLPs at once runs MLPs 4 and 5, then 6 and 7:
    #   stale attentions  5 6 7
    #   stale MLPs        5 7      fed without the outputs of MLPs 4 and 6
    for group, mlps in layout:
        for layer in group[1:]:
            yield qkv_site(layer)
        for layer in group:
            if (layer - group.start) % mlps:
                yield gate_up_site(layer)


def prior(loader: Loader, site: Site) -> np.ndarray:
    """Return a site's projection as the checkpoint has it, its norm's weight multiplied in.

    Args:
        loader: Loader of the draft's checkpoint.
        site: The site.

    Returns:
        float64 [hidden + 1, out], for inputs that are normed without a weight.
    """
    norm = _norm(loader, site)
    weights, source = [], Dequantized(loader.source)
    for part in site.parts:
        # [out of part, hidden]
        weight = source.read(f"{part}.weight").astype(np.float64)
        # (x * norm) @ weight.T = x @ (weight.T * norm), with the norm's weight along the rows.
        weights.append(weight.T * norm[:, None])
    return np.concatenate([np.concatenate(weights, axis=1), _bias(loader, site)[None]])


def _norm(loader: Loader, site: Site) -> np.ndarray:
    """Read what a site's norm multiplies by, 1 in families without pre-norms: float64 [hidden]."""
    if not loader.config.pre_norm:
        return np.ones(loader.config.hidden_size)
    weight = loader.source.read(f"{site.norm}.weight").astype(np.float64)
    return weight + loader.config.norm_offset


def _bias(loader: Loader, site: Site) -> np.ndarray:
    """Read a site's biases, zero where the checkpoint has none: float64 [out]."""
    shapes = loader.source.shapes()
    biases = []
    for part in site.parts:
        name = f"{part}.bias"
        stored = name in shapes
        bias = loader.source.read(name) if stored else np.zeros(shapes[f"{part}.weight"][0])
        biases.append(bias.astype(np.float64))
    return np.concatenate(biases)


def target(loader: Loader, site: Site) -> Projection:
    """Load a site's projection as the checkpoint has it, its outputs split over all devices.

    Args:
        loader: Loader of the draft's checkpoint.
        site: The site.

    Returns:
        A Projection with zero rows added until they divide among the devices.
    """
    source = Dequantized(loader.source)
    weights = [source.read(f"{part}.weight") for part in site.parts]
    weight = np.concatenate(weights)  # [out, hidden]
    padding = -weight.shape[0] % loader.mesh.size
    norm, config = None, loader.config
    if config.pre_norm:
        stored = loader.place(loader.source.read(f"{site.norm}.weight"), P(None))
        norm = RMSNorm(stored, eps=config.rms_norm_eps, offset=config.norm_offset)
    return Projection(
        norm,
        Matrix(loader.place(np.pad(weight, [(0, padding), (0, 0)]), P(ALL_AXES, None))),
        loader.place(np.pad(_bias(loader, site), (0, padding)), P(ALL_AXES)),
        dtype=loader.dtype,
    )


def named(loader: Loader, site: Site, projection: Float[np.ndarray, "inputs out"]) -> Tensors:
    """Split a projection into canonical tensors, with a norm that multiplies by 1.

    Args:
        loader: Loader of the draft's checkpoint, which knows how many outputs each part has.
        site: The site.
        projection: [hidden + 1, out].

    Returns:
        The site's norm, in families with pre-norms, and each part's weight and bias.
    """
    shapes = loader.source.shapes()
    tensors: Tensors = {}
    if loader.config.pre_norm:
        one = 1 - loader.config.norm_offset
        tensors[f"{site.norm}.weight"] = np.full(projection.shape[0] - 1, one, np.float32)
    # Columns are joined in the order of the parts: [queries | keys | values], or [gate | up].
    start = 0
    for part in site.parts:
        stop = start + shapes[f"{part}.weight"][0]
        columns = projection[:, start:stop]
        tensors[f"{part}.weight"] = np.ascontiguousarray(columns[:-1].T)
        tensors[f"{part}.bias"] = columns[-1]
        start = stop
    return tensors


def joined(tensors: Tensors, site: Site) -> Float[np.ndarray, "inputs out"]:
    """Join a site's canonical tensors into one projection; the inverse of named().

    Examples:
        >>> site = Site("norm", ("q",))
        >>> tensors = {"q.weight": np.array([[1.0, 2.0]]), "q.bias": np.array([3.0])}
        >>> joined(tensors, site).tolist()
        [[1.0], [2.0], [3.0]]
    """
    columns = []
    for part in site.parts:
        columns.append(np.concatenate([tensors[f"{part}.weight"].T, tensors[f"{part}.bias"][None]]))
    return np.concatenate(columns, axis=1)


def products(
    h: Hidden, y: Float[Array, "batch tokens out"], config: ModelConfig
) -> tuple[Array, Array]:
    """Compute xᵀx and xᵀy, the sums that least squares needs, over all tokens.

    Args:
        h: Hidden states that the projection is fed.
        y: Outputs that it should have for them.
        config: The draft's configuration, for the norm's epsilon.

    Returns:
        float32 [hidden + 1, hidden + 1] and [hidden + 1, out]. A row of x is a token's h, normed
        without a weight where the family has pre-norms, with a 1 appended for the bias.
    """
    x = h.astype(jnp.float32)
    if config.pre_norm:
        x = rms_norm(x, jnp.ones(h.shape[-1], jnp.float32), config.rms_norm_eps)
    ones = jnp.ones((*x.shape[:2], 1), jnp.float32)
    # [batch, tokens, hidden + 1] -> [batch * tokens, hidden + 1]
    x = jnp.concatenate([x, ones], axis=-1).reshape(-1, x.shape[-1] + 1)
    y = y.astype(jnp.float32).reshape(x.shape[0], -1)
    return x.T @ x, x.T @ y
