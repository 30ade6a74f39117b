"""Model families: a table of tensors and a reader of `config.json` each. docs/families.md shows how to add one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Tensor:
    """A canonical tensor: Llama's name and layout in Hugging Face, {} standing for a layer's number.

    shape: sizes by name, see `checkpoint.sizes`. hf, gguf: what the others call it; by default hf is the name, and
    without a gguf there is none. after: sizes of what lies before it, row by row, where several tensors are stored as
    one. pairs: the field of ModelConfig that counts its heads, where GGUF stores each head's rows as pairs of channels
    side by side.
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

    tensors: all of them; an untied head comes last. read_config: the contents of a `config.json` in Llama's terms, with
    the family's defaults. class_name: transformers' class. gguf: the architecture that GGUF files name; "" for none.
    """

    tensors: tuple[Tensor, ...]
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    class_name: str
    gguf: str = ""

    def has(self, name: str) -> bool:
        """Whether a layer has this tensor."""
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
"""What every family has: all but the queries and keys, which GGUF stores in two ways."""

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
    return config


def read_mistral(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    } | config  # only a null says that there is no window


def read_qwen2(config: dict[str, Any]) -> dict[str, Any]:
    # Qwen2's projections have their biases whatever attention_bias says.
    return read_qwen_window(config) | {"attention_bias": False}


def read_qwen3(config: dict[str, Any]) -> dict[str, Any]:
    return read_qwen_window(config) | {"head_dim": config.get("head_dim") or 128}


def read_qwen_window(config: dict[str, Any]) -> dict[str, Any]:
    """Clear `sliding_window` unless some layer slides: with `use_sliding_window`, those from `max_window_layers` on."""
    above = (
        config.get("layer_types") is None
        and config.get("max_window_layers", 28) < config["num_hidden_layers"]
    )
    slides = config.get("use_sliding_window") and above
    return config if slides else config | {"sliding_window": None}


FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA, read_llama, "LlamaForCausalLM", gguf="llama"),
    "mistral": Family(LLAMA, read_mistral, "MistralForCausalLM"),  # whose GGUF files say llama
    "qwen2": Family(QWEN2, read_qwen2, "Qwen2ForCausalLM", gguf="qwen2"),
    "qwen3": Family(QWEN3, read_qwen3, "Qwen3ForCausalLM", gguf="qwen3"),
}
