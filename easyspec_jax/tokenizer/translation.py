"""Ids of a draft in place of its target's, where the two have different tokenizers."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer.contents import Content, is_byte, token_contents
from easyspec_jax.tokenizer.stream import Tokenizer

LEAST_SHARE = 0.25
"""Share of the smaller vocabulary that both must have; with less, few drafts could be accepted."""


@dataclass(frozen=True)
class Translation:
    """The draft's ids for the target's.

    Attributes:
        draft_ids: For each of the target's ids the draft's id of the same bytes; where it has none,
            the last of its ids for that text, which stands in when the token is read.
        known: Whether there is one of the same bytes.
        share: How much of the smaller vocabulary is in both.
    """

    draft_ids: Int[np.ndarray, " ids"]
    known: Bool[np.ndarray, " ids"]
    share: float


def translate(target: Tokenizer, draft: Tokenizer, ids: int, draft_ids: int) -> Translation:
    """Find the tokens that two tokenizers have in common.

    A draft may propose these alone, and the target verifies them like any others: token-level
    intersection (TLI, arXiv 2502.05202).

    Args:
        target: The target's tokenizer.
        draft: The draft's.
        ids: Ids of the target.
        draft_ids: Ids of the draft; a tokenizer may have more than its model.

    Raises:
        EasySpecError: They have too little in common; names the share.
    """
    numbers = _ids_by_content(draft, draft_ids)
    contents = {number: own for number, own in token_contents(target).items() if number < ids}
    found = np.full(ids, -1, np.int32)
    for number, content in contents.items():
        found[number] = numbers.get(content, -1)
    # Ends and beginnings of texts may have other names.
    for number, other in (
        (target.eos_token_id, draft.eos_token_id),
        (target.bos_token_id, draft.bos_token_id),
    ):
        if number is not None and other is not None and number < ids and found[number] < 0:
            found[number] = other
    known = (found >= 0) & (found < draft_ids)
    smaller = min(len(contents), len(numbers))
    share = int(known.sum()) / max(smaller, 1)
    if share < LEAST_SHARE:
        raise EasySpecError(
            f"target and draft have {int(known.sum()):,} tokens in common, {share:.0%} of the "
            f"smaller vocabulary and less than {LEAST_SHARE:.0%}; choose a draft whose tokenizer "
            "is more like the target's"
        )
    unknown = np.flatnonzero(~known)
    found[unknown] = _stand_ins(draft, [contents.get(number, b"") for number in unknown.tolist()])
    return Translation(np.where(found < draft_ids, found, 0), known, share)


def _ids_by_content(tokenizer: Tokenizer, ids: int) -> dict[Content, int]:
    """Return the id of each content below a number of ids.

    SentencePiece has bytes of their own for what it has no token for; a token goes before them.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(ids, len(tokenizer)))))
    contents = token_contents(tokenizer)
    numbers: dict[Content, int] = {}
    for number, token in enumerate(tokens):
        content = contents.get(number)
        if content is not None and not (content in numbers and is_byte(token)):
            numbers[content] = number
    return numbers


def _stand_ins(draft: Tokenizer, contents: list[Content]) -> list[int]:
    """Return the draft's last id of each text; an arbitrary one where there is none."""
    texts = [
        content.decode(errors="ignore") if isinstance(content, bytes) else content[1]
        for content in contents
    ]
    if not texts:
        return []
    pieces = draft(texts, add_special_tokens=False).input_ids
    return [found[-1] if found else 0 for found in pieces]
