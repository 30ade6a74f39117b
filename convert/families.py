"""What GGUF calls a model's metadata and tensors, and what Hugging Face calls them."""

from dataclasses import dataclass

from easyspec_jax.checkpoint import EMBEDDING, FINAL_NORM, HEAD


@dataclass(frozen=True)
class Architecture:
    """What a GGUF `general.architecture` means.

    permuted: rows of the query and key projections are stored in pairs for an interleaved RoPE.
    """

    model_type: str
    class_name: str
    permuted: bool


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", permuted=False),
}

REQUIRED_FIELDS: dict[str, str] = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
"""Field of `config.json` to metadata key, without the architecture in front."""

OPTIONAL_FIELDS: dict[str, str] = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    # No model that has one of these is supported; as fields of the configuration they are refused by name.
    "num_experts": "expert_count",
    "use_sliding_window": "attention.sliding_window",
}

TOKEN_IDS: dict[str, str] = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

STOP_IDS: tuple[str, ...] = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
"""Ends of a text, of a turn and of a message that calls a tool."""

ROPE_FACTORS = "rope_freqs.weight"

_TENSORS = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}

_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def canonical_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name stays as it is, to be refused under it later."""
    block, _, rest = name.partition(".")
    layer, _, tensor = rest.partition(".")
    if block == "blk" and tensor in _LAYER_TENSORS:
        return f"model.layers.{layer}.{_LAYER_TENSORS[tensor]}"
    return _TENSORS.get(name, name)
