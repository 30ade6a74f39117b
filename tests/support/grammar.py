"""Tokenizers of few tokens, for grammars that can be enumerated."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"


def tokenizer_of(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose ids are the places of tokens; END is a special one."""
    vocab = {token: number for number, token in enumerate(tokens)}
    # Of two letters, each by a merge.
    merges = [(token[0], token[1]) for token in tokens if len(token) == 2]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
