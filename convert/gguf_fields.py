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
    # Not supported. They are copied so that reading the configuration refuses them by name.
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
"""Keys of the tokens that end a text, a turn, and a message that calls a tool."""

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor that divides the RoPE frequencies; GGUF's way to store Llama 3's scaling."""
