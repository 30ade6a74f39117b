"""Bytes of a tokenizer's tokens, in byte-level BPE and in SentencePiece."""

import json
import re

from easyspec_jax.tokenizer.stream import Tokenizer

_BLANK = "▁"  # as SentencePiece writes it
_BYTE = re.compile("<0x[0-9A-F]{2}>")

Content = bytes | tuple[str, str]
"""Bytes of an ordinary token; kind and name of a special one."""


def token_contents(tokenizer: Tokenizer) -> dict[int, Content]:
    """Return the content of each id of a tokenizer."""
    # Imported here, because it takes a second that pairs with one tokenizer need not wait for.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added = tokenizer.added_tokens_decoder
    is_byte_level = _is_byte_level(tokenizer)
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    contents: dict[int, Content] = {}
    for token, number in tokenizer.get_vocab().items():
        if number in added and added[number].special:
            contents[number] = "special", token
        elif number in added:
            contents[number] = token.encode()
        elif is_byte_level and all(character in to_byte for character in token):
            contents[number] = bytes(to_byte[character] for character in token)
        else:
            contents[number] = _sentencepiece_bytes(token)
    return contents


def is_byte(token: str) -> bool:
    """Return whether a token is SentencePiece's spelling of a byte, as <0x0A> is."""
    return _BYTE.fullmatch(token) is not None


def _sentencepiece_bytes(token: str) -> bytes:
    """Return the bytes of a token in SentencePiece's spelling.

    Examples:
        >>> _sentencepiece_bytes("▁the"), _sentencepiece_bytes("<0x0A>")
        (b' the', b'\\n')
    """
    if is_byte(token):
        return bytes([int(token[3:5], 16)])
    return token.replace(_BLANK, " ").encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether tokens are spelled in the characters that stand for bytes."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    kinds = [decoder, *decoder.get("decoders", ())]
    return any(kind.get("type") == "ByteLevel" for kind in kinds)
