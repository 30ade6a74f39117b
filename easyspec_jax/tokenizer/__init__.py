"""Text and ids: open tokenizers, encode prompts and conversations, decode text that grows."""

from easyspec_jax.tokenizer.loading import check_same_ids, encode, load_tokenizer
from easyspec_jax.tokenizer.stream import TextStream, decode_text

__all__ = ["TextStream", "check_same_ids", "decode_text", "encode", "load_tokenizer"]
