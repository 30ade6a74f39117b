"""Tokens of the same bytes are found, whatever their ids, spelling and names are."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import translate

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(tokens: list[str], special: tuple[str, ...] = (), **names: str):
    """Make a tokenizer of byte-level BPE without merges; what is special comes last."""
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return finished(backend, special, names)


def sentencepiece(tokens: list[str], special: tuple[str, ...] = (), **names: str):
    """Make a tokenizer of words and bytes, in SentencePiece's spelling."""
    vocab = {token: number for number, token in enumerate(["<unk>", *BYTES, *tokens])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return finished(backend, special, names)


def finished(backend: Tokenizer, special: tuple[str, ...], names: dict[str, str]):
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_bytes_are_compared_across_spellings():
    """Ġ is a blank and Ċ a line break in byte-level BPE; SentencePiece writes ▁ and <0x0A>."""
    target = byte_level(["a", "Ġthe", "Ċ", "Ã¶", "Ã", "xyz"])
    draft = sentencepiece(["▁the", "ö", "a", "q"])
    found = translate(target, draft, ids=6, draft_ids=len(draft))
    first = 1 + 256
    assert found.known.tolist() == [True, True, True, True, True, False]
    expected = [first + 2, first, 1 + 0x0A, first + 1, 1 + 0xC3]
    assert found.draft_ids[:5].tolist() == expected
    assert found.share == pytest.approx(5 / 6)


def test_a_token_goes_before_the_byte_that_it_is():
    target = byte_level(["a", "b"])
    draft = sentencepiece(["b", "a"])
    found = translate(target, draft, ids=2, draft_ids=len(draft))
    assert found.draft_ids.tolist() == [258, 257]


def test_special_tokens_keep_their_names_and_else_their_parts():
    """<s> is text in the target. Both end turns by <end>; their ends of text have two names."""
    target = byte_level(
        ["a", "b", "<s>"], ("<end>", "<eot>", "<own>"), eos_token="<eot>", bos_token="<own>"
    )
    draft = byte_level(["b", "a"], ("<s>", "<end>", "</s>"), eos_token="</s>", bos_token="<s>")
    found = translate(target, draft, ids=6, draft_ids=5)
    assert found.known.tolist() == [True, True, False, True, True, True]
    assert found.draft_ids[[0, 1, 3, 4, 5]].tolist() == [1, 0, 3, 4, 2]


def test_what_the_draft_lacks_is_read_as_the_end_of_its_text():
    target = byte_level(["a", "b", "ab", "ba"])
    draft = byte_level(["b", "a"])
    found = translate(target, draft, ids=8, draft_ids=2)
    assert found.known.tolist() == [True, True, *[False] * 6]
    # "ab" ends in b, "ba" in a; ids 4 to 7 are no tokens of the target.
    assert found.draft_ids.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


def test_ids_that_the_draft_has_no_row_for_are_not_used():
    target = byte_level(["a", "b", "c"])
    draft = byte_level(["b", "c", "a"])
    found = translate(target, draft, ids=3, draft_ids=2)
    assert found.known.tolist() == [False, True, True]
    assert np.all(found.draft_ids < 2)


def test_too_little_in_common_is_refused_with_the_share():
    letters = [chr(number) for number in range(ord("a"), ord("k"))]
    target = byte_level(letters)
    draft = byte_level([letter.upper() for letter in letters[:9]] + ["a"])
    with pytest.raises(EasySpecError) as refusal:
        translate(target, draft, ids=10, draft_ids=10)
    assert "1 tokens in common, 10% of the smaller vocabulary" in str(refusal.value)
    assert "\n" not in str(refusal.value)
