"""The demo pair as a function to train: the Llama architecture over whole windows of text.

Training needs no mesh and no cache, generation no gradient. Tests hold the two implementations
together.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Params = dict[str, Any]

QUERY_BLOCK = 128
"""Queries that are scored together; keys after the block's last query are left out."""


@dataclass(frozen=True)
class Shape:
    """A Llama model with a tied head; the fields are those of its config.json."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def config(self, positions: int) -> dict[str, Any]:
        """Return the content of config.json."""
        return asdict(self) | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": None,
            "eos_token_id": 0,
            "max_position_embeddings": positions,
            "dtype": "bfloat16",
        }


def init(shape: Shape, key: Array) -> Params:
    """Draw float32 parameters; the matrices of all layers are stacked, [layers, in, out]."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    keys_values = shape.num_key_value_heads * shape.head_dim
    matrices = {
        "q": (hidden, heads),
        "k": (hidden, keys_values),
        "v": (hidden, keys_values),
        "o": (heads, hidden),
        "gate": (hidden, shape.intermediate_size),
        "up": (hidden, shape.intermediate_size),
        "down": (shape.intermediate_size, hidden),
    }
    layers = shape.num_hidden_layers
    outputs = {"o", "down"}  # start small, so that the residual stream starts as the embedding

    def matrix(key: Array, name: str, size: tuple[int, int]) -> Array:
        scale = size[0] ** -0.5 * (0.1 if name in outputs else 1.0)
        return scale * jax.random.normal(key, (layers, *size))

    first, *others = jax.random.split(key, len(matrices) + 1)
    weights = {
        name: matrix(own, name, size)
        for own, (name, size) in zip(others, matrices.items(), strict=True)
    }
    norms = {name: jnp.ones((layers, hidden)) for name in ("attention_norm", "mlp_norm")}
    return {
        "embedding": 0.02 * jax.random.normal(first, (shape.vocab_size, hidden)),
        "layers": weights | norms,
        "norm": jnp.ones((hidden,)),
    }


def logits(
    shape: Shape, params: Params, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    """Return next-token logits at every position of windows that start at position 0."""
    cos, sin = _rotation(shape, tokens.shape[1])

    def layer(h: Array, weights: Params) -> tuple[Array, None]:
        h = h + _attention(shape, weights, _norm(shape, h, weights["attention_norm"]), cos, sin)
        x = _norm(shape, h, weights["mlp_norm"])
        return h + (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"], None

    h, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"], unroll=True)
    return _norm(shape, h, params["norm"]) @ params["embedding"].T


def _norm(shape: Shape, x: Array, weight: Array) -> Array:
    return (
        x
        * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + shape.rms_norm_eps)
        * weight[None, None]
    )


def _rotation(shape: Shape, length: int) -> tuple[Array, Array]:
    frequencies = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = np.outer(np.arange(length), frequencies).astype(np.float32)[None, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(shape: Shape, weights: Params, x: Array, cos: Array, sin: Array) -> Array:
    batch, length, _ = x.shape
    split = partial(jnp.reshape, shape=(batch, length, -1, shape.head_dim))
    q = _rotate(split(x @ weights["q"]), cos, sin) * shape.head_dim**-0.5
    k, v = _rotate(split(x @ weights["k"]), cos, sin), split(x @ weights["v"])
    q = q.reshape(batch, length, shape.num_key_value_heads, -1, shape.head_dim)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        causal = np.arange(start, stop)[:, None] >= np.arange(stop)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q[:, start:stop], k[:, :stop])
        mixed = jax.nn.softmax(jnp.where(causal[None, None, None], scores, -jnp.inf))
        outputs.append(jnp.einsum("bhgqk,bkhd->bqhgd", mixed, v[:, :stop]))
    return jnp.concatenate(outputs, axis=1).reshape(batch, length, -1) @ weights["o"]


def checkpoint(shape: Shape, params: Params) -> dict[str, np.ndarray]:
    """Return the parameters under Hugging Face's names and layouts, in float32."""
    names = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    tensors = {
        f"model.layers.{layer}.{name}.weight": np.ascontiguousarray(
            np.asarray(params["layers"][ours][layer]).T
        )
        for layer in range(shape.num_hidden_layers)
        for ours, name in names.items()
    }
    ends = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]}
    return tensors | {name: np.asarray(value) for name, value in ends.items()}
