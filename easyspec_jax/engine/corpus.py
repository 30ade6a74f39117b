"""The corpus: a file in which drafts are looked up, in addition to the text itself."""

from pathlib import Path

import numpy as np
from jaxtyping import Int32

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.tokenizer.conversation import Tokenizer

MOST_TOKENS = 1 << 20
"""Tokens of the largest corpus: every round compares the end of each text with all of them."""

_MOST_BYTES = 64 << 20


def corpus_of(
    speculative: SpeculativeConfig, tokenizer: Tokenizer, vocab_size: int
) -> Int32[np.ndarray, " tokens"] | None:
    """Read and encode the corpus of a way to draft, or return None if it has none.

    Args:
        speculative: How to draft.
        tokenizer: The target's.
        vocab_size: Number of the target's token ids.

    Raises:
        EasySpecError: The file cannot be read, is not text, or is too large.
    """
    name = speculative.prompt_lookup_corpus
    if name is None:
        return None
    try:
        with Path(name).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        # One byte too many may be half a character.
        is_large = len(content) > _MOST_BYTES
        text = "" if is_large else content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"`prompt_lookup_corpus` {name} cannot be read: {error}") from None
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if is_large or len(ids) > MOST_TOKENS:
        raise EasySpecError(
            f"`prompt_lookup_corpus` {name} is too large: at most {MOST_TOKENS} tokens, "
            f"{_MOST_BYTES >> 20} MiB"
        )
    if not ids or max(ids) >= vocab_size:
        raise EasySpecError(f"`prompt_lookup_corpus` {name} holds no text that the target knows")
    return np.array(ids, np.int32)
