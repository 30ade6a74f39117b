"""Text and ids: open tokenizers, encode prompts and conversations, decode text that grows."""

from easyspec_jax.tokenizer.loading import bad_words_ids, encode, have_same_ids, load_tokenizer
from easyspec_jax.tokenizer.stream import TextStream, decode_text
from easyspec_jax.tokenizer.translation import translate

__all__ = [
    "TextStream",
    "bad_words_ids",
    "decode_text",
    "encode",
    "have_same_ids",
    "load_tokenizer",
    "translate",
]
