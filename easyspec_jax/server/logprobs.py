"""Log-probabilities of an answer's tokens in OpenAI's two forms."""

from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from typing import Any

from easyspec_jax.engine.completion import TokenLogprobs
from easyspec_jax.tokenizer.contents import Content

Contents = Mapping[int, Content]
"""Content of each token id."""


def of_chat(listed: Sequence[TokenLogprobs], contents: Contents) -> dict[str, Any]:
    """Return the `logprobs` of a chat's choice.

    Args:
        listed: Those of its tokens, or of a chunk's.
        contents: Content of each token id.

    Examples:
        >>> found = of_chat([TokenLogprobs(7, -0.5, [(7, -0.5)])], {7: b" a"})
        >>> found["content"][0]["token"], found["content"][0]["bytes"]
        (' a', [32, 97])
    """
    tokens = []
    for one in listed:
        best = [_entry(number, logprob, contents) for number, logprob in one.top]
        tokens.append(_entry(one.token_id, one.logprob, contents) | {"top_logprobs": best})
    return {"content": tokens, "refusal": None}


class TextOffsets:
    """Counts the characters of a text, token by token; one may end within a character.

    Examples:
        >>> offsets = TextOffsets()
        >>> [offsets.begin(spelled) for spelled in (b"\\xe2\\x82", b"\\xac", b" a", b"b")]
        [0, 0, 1, 3]
    """

    def __init__(self) -> None:
        self._decoder, self._characters = getincrementaldecoder("utf-8")("replace"), 0

    def begin(self, spelled: bytes) -> int:
        """Return where the next token, with these bytes, begins in the text."""
        begin = self._characters
        self._characters += len(self._decoder.decode(spelled))
        return begin


def of_completion(
    listed: Sequence[TokenLogprobs], contents: Contents, offsets: TextOffsets
) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice.

    Args:
        listed: Those of its tokens, or of a chunk's.
        contents: Content of each token id.
        offsets: Has counted the tokens before, and counts these.

    Examples:
        >>> tokens = [TokenLogprobs(7, -0.5, []), TokenLogprobs(8, -0.1, [(9, -0.09)])]
        >>> found = of_completion(tokens, {7: b" a", 8: b"b", 9: b"c"}, TextOffsets())
        >>> found["tokens"], found["text_offset"], found["top_logprobs"][1]
        ([' a', 'b'], [0, 2], {'c': -0.09, 'b': -0.1})
    """
    tokens = [_text(one.token_id, contents) for one in listed]
    best = []
    for token, one in zip(tokens, listed, strict=True):
        own = {_text(number, contents): logprob for number, logprob in one.top}
        best.append(own | {token: one.logprob})
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in listed],
        "top_logprobs": best,
        "text_offset": [offsets.begin(_bytes(one.token_id, contents)) for one in listed],
    }


def _entry(number: int, logprob: float, contents: Contents) -> dict[str, Any]:
    spelled = list(_bytes(number, contents))
    return {"token": _text(number, contents), "logprob": logprob, "bytes": spelled}


def _text(number: int, contents: Contents) -> str:
    """Return a token's text; where it ends within a character, its bytes as OpenAI spells them.

    Examples:
        >>> _text(1, {1: b"\\xe2\\x82"})
        'bytes:\\\\xe2\\\\x82'
    """
    spelled = _bytes(number, contents)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _bytes(number: int, contents: Contents) -> bytes:
    # A model may have more ids than its tokenizer; those have no text.
    content = contents.get(number, b"")
    return content if isinstance(content, bytes) else content[1].encode()
