"""Names of metadata fields in GGUF and in Hugging Face.

Names of tensors are in the tables of `easyspec_jax.checkpoint.families`.
"""

REQUIRED_FIELDS: dict[str, str] = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
"""Fields of `config.json`, with their metadata keys without the architecture in front.

A Llama's `hidden_size` is `llama.embedding_length`.
"""

OPTIONAL_FIELDS: dict[str, str] = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
    # Not supported. It is copied so that reading the configuration refuses it by name.
    "num_experts": "expert_count",
}

BIASES: dict[str, str] = {
    "attention_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_down.bias",
}
"""Fields of `config.json` that GGUF does not have, with a tensor of the models that set them."""

SCALING_FIELDS: dict[str, str] = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""Metadata keys below `rope.scaling`, with the fields of `rope_scaling` in `config.json`."""

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
"""Keys of the tokens that end a text, a turn, and a message that calls a tool."""

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor that divides the RoPE frequencies; GGUF's way to store Llama 3's scaling."""

LONGROPE_FACTORS: dict[str, str] = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}
"""Tensors that hold two fields of LongRoPE's `rope_scaling`."""
