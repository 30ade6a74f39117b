"""What GGUF calls a model's metadata, and what Hugging Face calls it. Names of tensors are in the table of a family."""

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
    # As fields of the configuration these are refused by name where they would change a text.
    "num_experts": "expert_count",
    "sliding_window": "attention.sliding_window",
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
