"""Model families: for each, a table of tensors and a reader of `config.json`.

docs/families.md shows how to add one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Tensor:
    """A canonical tensor, with the name and layout of Llama in Hugging Face.

    Attributes:
        name: Its name; `{}` stands for the layer's number.
        shape: Its dimensions by name, see `canonical.sizes`.
        gguf: Its name in GGUF files; empty if they do not have it.
        hf: Its name in Hugging Face files, if other than `name`.
        after: If several tensors are stored as one, the dimensions of those whose rows come
            before it. Phi-3 stores queries, keys and values as `qkv_proj`; there the values come
            after ("queries", "keys").
        pairs: The field of ModelConfig that counts its heads, if GGUF permutes the rows of each
            head for its rotary embedding (see `canonical.unpermute`); otherwise empty.
    """

    name: str
    shape: tuple[str, ...]
    gguf: str = ""
    hf: str = ""
    after: tuple[str, ...] = ()
    pairs: str = ""


@dataclass(frozen=True)
class Family:
    """Definition of a `model_type`.

    Attributes:
        tensors: Every tensor, the untied head included.
        read_config: Translates the contents of `config.json` into Llama's terms, with the
            family's defaults filled in.
        class_name: The class of transformers.
        gguf: The architecture that GGUF files name; empty for none.
    """

    tensors: tuple[Tensor, ...]
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    class_name: str
    gguf: str = ""

    def has(self, name: str) -> bool:
        """Whether each layer has this tensor.

        Examples:
            >>> FAMILIES["qwen3"].has("self_attn.q_norm.weight")
            True
        """
        return any(tensor.name == f"model.layers.{{}}.{name}" for tensor in self.tensors)


def _layer(name: str, shape: tuple[str, ...], gguf: str) -> Tensor:
    return Tensor(f"model.layers.{{}}.{name}", shape, f"blk.{{}}.{gguf}")


QUERIES = _layer("self_attn.q_proj.weight", ("queries", "hidden"), "attn_q.weight")
KEYS = _layer("self_attn.k_proj.weight", ("keys", "hidden"), "attn_k.weight")

COMMON = (
    Tensor(EMBEDDING, ("vocab", "hidden"), "token_embd.weight"),
    Tensor(FINAL_NORM, ("hidden",), "output_norm.weight"),
    _layer("input_layernorm.weight", ("hidden",), "attn_norm.weight"),
    _layer("self_attn.v_proj.weight", ("keys", "hidden"), "attn_v.weight"),
    _layer("self_attn.o_proj.weight", ("hidden", "queries"), "attn_output.weight"),
    _layer("post_attention_layernorm.weight", ("hidden",), "ffn_norm.weight"),
    _layer("mlp.gate_proj.weight", ("inner", "hidden"), "ffn_gate.weight"),
    _layer("mlp.up_proj.weight", ("inner", "hidden"), "ffn_up.weight"),
    _layer("mlp.down_proj.weight", ("hidden", "inner"), "ffn_down.weight"),
    Tensor(HEAD, ("vocab", "hidden"), "output.weight"),
)
"""Tensors of every family. Queries and keys are missing, because GGUF stores them in two ways."""

# llama.cpp rotates neighbouring channels for Llama and the two halves of a head for Qwen, so only
# Llama's query and key rows are permuted in GGUF files.
LLAMA = (
    *COMMON,
    replace(QUERIES, pairs="num_attention_heads"),
    replace(KEYS, pairs="num_key_value_heads"),
)

QWEN2 = (
    *COMMON,
    QUERIES,
    KEYS,
    _layer("self_attn.q_proj.bias", ("queries",), "attn_q.bias"),
    _layer("self_attn.k_proj.bias", ("keys",), "attn_k.bias"),
    _layer("self_attn.v_proj.bias", ("keys",), "attn_v.bias"),
)

QWEN3 = (
    *COMMON,
    QUERIES,
    KEYS,
    _layer("self_attn.q_norm.weight", ("head_dim",), "attn_q_norm.weight"),
    _layer("self_attn.k_norm.weight", ("head_dim",), "attn_k_norm.weight"),
)


def read_llama(config: dict[str, Any]) -> dict[str, Any]:
    """Return a Llama configuration as it is."""
    return config


def read_mistral(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of Mistral 7B v0.1."""
    # An absent sliding_window means 4096; only an explicit null turns the window off.
    return {"sliding_window": 4096, "num_key_value_heads": 8} | config


def read_qwen2(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Qwen2's defaults."""
    # Qwen2's projections have biases whatever attention_bias says; the table lists them.
    return read_qwen_window(config) | {"attention_bias": False}


def read_qwen3(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Qwen3's defaults."""
    return read_qwen_window(config) | {"head_dim": config.get("head_dim") or 128}


def read_qwen_window(config: dict[str, Any]) -> dict[str, Any]:
    """Clear `sliding_window` unless some layer uses it."""
    # With use_sliding_window the layers from max_window_layers on slide, unless layer_types lists
    # each layer's kind; the caller checks that list.
    above = (
        config.get("layer_types") is None
        and config.get("max_window_layers", 28) < config["num_hidden_layers"]
    )
    slides = config.get("use_sliding_window") and above
    return config if slides else config | {"sliding_window": None}


FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA, read_llama, "LlamaForCausalLM", gguf="llama"),
    # GGUF files of Mistral models say that their architecture is llama.
    "mistral": Family(LLAMA, read_mistral, "MistralForCausalLM"),
    "qwen2": Family(QWEN2, read_qwen2, "Qwen2ForCausalLM", gguf="qwen2"),
    "qwen3": Family(QWEN3, read_qwen3, "Qwen3ForCausalLM", gguf="qwen3"),
}
"""Every supported `model_type`."""
