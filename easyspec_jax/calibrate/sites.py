"""The four places of a layer whose inputs calibration sees, and the way from each to the next.

    h ──norm──► q, k, v ──attend──► o ──add──► between ──norm──► gate, up ──gate──► down ──add──► h

At each place the stream of a batch carries the arrays that the rest of the layer needs:

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
from easyspec_jax.model.transformer import MLP, Hidden, Layer
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


def _mlp(layer: Layer) -> MLP:
    assert isinstance(layer.mlp, MLP), "mixtures of experts have other sites"
    return layer.mlp


def _into_mlp(layer: Layer, stream: Stream) -> Hidden:
    return _mlp(layer).gate_up.normed(stream[0])


def _gate(layer: Layer, config: ModelConfig, stream: Stream) -> Stream:
    (between,) = stream
    return between, _mlp(layer).inner(between)


def _add_mlp(layer: Layer, config: ModelConfig, stream: Stream) -> Stream:
    between, inner = stream
    output = all_reduce(_mlp(layer).down(inner), layer.axes)
    return (between + layer.post_norms.after_mlp(output),)


SITES = (
    Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _into_attention, _attend, 2),
    Site(("self_attn.o_proj",), _last, _add_attention, 1),
    Site(("mlp.gate_proj", "mlp.up_proj"), _into_mlp, _gate, 2),
    Site(("mlp.down_proj",), _last, _add_mlp, 1),
)
"""A layer's sites in order."""


def square_sums(layer: Layer, config: ModelConfig, *rest: Any) -> Float[Array, "inputs inputs"]:
    """Return Σ x xᵀ over the tokens of one batch.

    Args:
        layer: The layer.
        config: The model's.
        rest: The arrays of the stream, then the Site whose inputs are x.
    """
    *arrays, site = rest
    x = site.inputs(layer, tuple(arrays))
    # [texts, tokens, inputs] -> [texts * tokens, inputs]
    x = x.reshape(-1, x.shape[-1])
    return x.T @ x


def onward(layer: Layer, config: ModelConfig, *rest: Any) -> Stream:
    """Take the stream of one batch past a site; arguments are those of square_sums()."""
    *arrays, site = rest
    return site.onward(layer, config, tuple(arrays))
