"""Log-probabilities of an answer's tokens in OpenAI's two forms."""

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


def of_completion(
    listed: Sequence[TokenLogprobs], contents: Contents, offset: int = 0
) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice.

    Args:
        listed: Those of its tokens, or of a chunk's.
        contents: Content of each token id.
        offset: Characters of the tokens before.

    Examples:
        >>> tokens = [TokenLogprobs(7, -0.5, []), TokenLogprobs(8, -0.1, [(9, -0.09)])]
        >>> found = of_completion(tokens, {7: b" a", 8: b"b", 9: b"c"}, offset=3)
        >>> found["tokens"], found["text_offset"], found["top_logprobs"][1]
        ([' a', 'b'], [3, 5], {'c': -0.09, 'b': -0.1})
    """
    tokens = [_text(one.token_id, contents) for one in listed]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    best = []
    for token, one in zip(tokens, listed, strict=True):
        own = {_text(number, contents): logprob for number, logprob in one.top}
        best.append(own | {token: one.logprob})
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in listed],
        "top_logprobs": best,
        "text_offset": offsets,
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
