"""The four places of a layer whose inputs calibration sees, and the way from each to the next.

    h ──norm──► q, k, v ──attend──► o ──add──► between ──norm──► gate, up ──gate──► down ──add──► h

At each place a stream carries the arrays that the rest of the layer needs:

    place       q, k, v      o            gate, up      down
    arrays      h            h, mixed     between       between, inner
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.model.cache import write
from easyspec_jax.model.transformer import Hidden, Layer
from easyspec_jax.model.windows import chain_windows
from easyspec_jax.parallel.collectives import all_reduce

Stream = tuple[Array, ...]
"""The arrays that a batch of texts has at a place, each [texts, tokens, …]."""


@dataclass(frozen=True)
class Site:
    """Matrices of a layer that read the same inputs.

    Attributes:
        parts: Their names within the layer.
        inputs: Returns their inputs, [texts, tokens, inputs].
        onward: Runs the layer from here to the next site; after the last one, to the next layer.
        arrays_onward: Number of arrays that a stream has there.
    """

    parts: tuple[str, ...]
    inputs: Callable[[Layer, Stream], Array]
    onward: Callable[[Layer, ModelConfig, Stream], Stream]
    arrays_onward: int


def _into_attention(layer: Layer, stream: Stream) -> Hidden:
    return layer.attention.qkv.normed(stream[0])


def _attend(layer: Layer, config: ModelConfig, stream: Stream) -> Stream:
    (h,) = stream
    texts, tokens, _ = h.shape
    start = jnp.zeros((texts,), jnp.int32)
    window = chain_windows(start, tokens, tokens, config)[layer.kind]
    q, k, v = layer.attention.rotated(h, window)
    cache = write(layer.init_cache(texts, tokens), k, v, window.start)
    return h, layer.attention.mix(q, cache, window)


def _last(layer: Layer, stream: Stream) -> Array:
    return stream[-1]


def _add_attention(layer: Layer, config: ModelConfig, stream: Stream) -> Stream:
    h, mixed = stream
    attended = all_reduce(layer.attention.out(mixed), layer.axes)
    return (h + layer.post_norms.after_attention(attended),)


def _into_mlp(layer: Layer, stream: Stream) -> Hidden:
    return layer.mlp.gate_up.normed(stream[0])


def _gate(layer: Layer, config: ModelConfig, stream: Stream) -> Stream:
    (between,) = stream
    return between, layer.mlp.inner(between)


def _add_mlp(layer: Layer, config: ModelConfig, stream: Stream) -> Stream:
    between, inner = stream
    return (between + layer.post_norms.after_mlp(all_reduce(layer.mlp.down(inner), layer.axes)),)


SITES = (
    Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _into_attention, _attend, 2),
    Site(("self_attn.o_proj",), _last, _add_attention, 1),
    Site(("mlp.gate_proj", "mlp.up_proj"), _into_mlp, _gate, 2),
    Site(("mlp.down_proj",), _last, _add_mlp, 1),
)
"""A layer's sites in order."""


def moments(
    layers: tuple[Layer, Layer], config: ModelConfig, *rest: Any
) -> tuple[Float[Array, "inputs inputs"], Float[Array, "inputs inputs"]]:
    """Return Σ x xᵀ and Σ x yᵀ of one batch.

    Args:
        layers: The layer as it is, and with the matrices before this site rounded.
        config: The model's.
        arrays: The stream through the model as it is, then that through the rounded one.
        site: Where x and y are.

    Returns:
        Sums over tokens, where x is the site's input in the rounded model and y that in the model
        as it is.
    """
    *arrays, site = rest
    exact, rounded = _both(layers, arrays)
    y, x = site.inputs(*exact), site.inputs(*rounded)
    # [texts, tokens, inputs] -> [texts * tokens, inputs]
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return x.T @ x, x.T @ y


def onward(layers: tuple[Layer, Layer], config: ModelConfig, *rest: Any) -> Stream:
    """Take both streams of one batch past a site; arguments are those of moments()."""
    *arrays, site = rest
    (plain, exact), (own, rounded) = _both(layers, arrays)
    return (*site.onward(plain, config, exact), *site.onward(own, config, rounded))


def _both(
    layers: tuple[Layer, Layer], arrays: Stream
) -> tuple[tuple[Layer, Stream], tuple[Layer, Stream]]:
    half = len(arrays) // 2
    return (layers[0], arrays[:half]), (layers[1], arrays[half:])
