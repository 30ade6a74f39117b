"""Drafts without a model: text that repeats is looked up in the text itself.

The last tokens of a text often stand earlier in it: in code that is edited, in names, in what a
prompt asks to be quoted. Whatever followed there becomes the draft. This is prompt lookup decoding
(Saxena 2023), after LLMA (Yang et al. 2023, arXiv 2304.04487).

The text is an array of the round's state, so the lookup is part of the compiled round. The host
still dispatches a round before it has read the one before, and all processes find the same.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from easyspec_jax.sampling.vocabulary import NO_TOKEN

Text = Int[Array, "batch capacity"]
"""Tokens of each row's text."""


@dataclass(frozen=True)
class Lookup:
    """Which repeats are worth a draft.

    Attributes:
        longest: Tokens that are compared at most. Of the places that agree in as many, the most
            recent one is taken.
        shortest: Tokens that must agree at least.
    """

    longest: int
    shortest: int


class Found(NamedTuple):
    """The continuation of the best match of each text's last tokens.

    Attributes:
        tokens: The tokens that followed there; they mean nothing where nothing matched.
        matched: How many tokens agreed; 0 where fewer than Lookup.shortest did.
        is_long: Whether Lookup.longest tokens agreed.
    """

    tokens: Int[Array, "batch levels"]
    matched: Int[Array, " batch"]
    is_long: Bool[Array, " batch"]


def find(
    text: Int[Array, "batch capacity"],
    last: Int[Array, " batch"],
    lookup: Lookup,
    levels: int,
    corpus: Int[Array, " tokens"] | None = None,
) -> Found:
    """Find the latest place where most of the last tokens of each text stood before.

    A longer match in the corpus wins.

    A continuation that reaches the end of the text goes on with its own beginning, as if the text
    were periodic:

        text           a  b  c  d  b  c         the last tokens b c stood before, 3 tokens earlier
        continuation            d  b  c  d  b

    Args:
        text: Token ids; those behind the last one mean nothing and are not read.
        last: Index of each text's last token.
        lookup: Which matches count.
        levels: Tokens to return.
        corpus: Other tokens that are searched as well, or None.

    Examples:
        >>> text = jnp.array([[1, 2, 3, 4, 2, 3, 9, 9], [5, 6, 7, 8, 9, 9, 9, 9]])
        >>> found = find(text, jnp.array([5, 4]), Lookup(longest=3, shortest=1), levels=5)
        >>> found.tokens[0].tolist(), found.matched.tolist()
        ([4, 2, 3, 4, 2], [2, 0])
    """
    own = _find_in_text(text, last, lookup, levels)
    if corpus is None or corpus.shape[0] <= levels:
        return own
    other = _find_in_corpus(corpus, text, last, lookup, levels)
    is_longer = other.matched > own.matched
    return Found(
        jnp.where(is_longer[:, None], other.tokens, own.tokens),
        jnp.maximum(other.matched, own.matched),
        other.is_long | own.is_long,
    )


def _find_in_text(text: Text, last: Int[Array, " batch"], lookup: Lookup, levels: int) -> Found:
    """Search the texts themselves; see find()."""
    columns = jnp.arange(text.shape[1], dtype=jnp.int32)[None, :]
    length, end = _best(text, columns < last[:, None], text, last, lookup)
    period = jnp.maximum(last - end, 1)
    steps = jnp.arange(levels, dtype=jnp.int32)[None, :] % period[:, None]
    tokens = jnp.take_along_axis(text, end[:, None] + 1 + steps, axis=1)
    return Found(tokens, length, length == lookup.longest)


def _find_in_corpus(
    corpus: Int[Array, " tokens"],
    text: Text,
    last: Int[Array, " batch"],
    lookup: Lookup,
    levels: int,
) -> Found:
    """Search the corpus, up to the last place that has `levels` tokens behind it; see find()."""
    columns = jnp.arange(corpus.shape[0], dtype=jnp.int32)[None, :]
    length, end = _best(corpus[None, :], columns < corpus.shape[0] - levels, text, last, lookup)
    steps = jnp.arange(1, levels + 1, dtype=jnp.int32)[None, :]
    return Found(corpus[end[:, None] + steps], length, length == lookup.longest)


def _best(
    places: Int[Array, "#batch places"],
    allowed: Bool[Array, "#batch places"],
    text: Text,
    last: Int[Array, " batch"],
    lookup: Lookup,
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Find where most of each text's last tokens stand, and of such places the latest.

    Args:
        places: Tokens to search.
        allowed: Places where what stands may end.
        text: The texts.
        last: Index of each text's last token.
        lookup: Which matches count.

    Returns:
        How many tokens agree there, 0 where fewer than Lookup.shortest do; and the place.
    """
    size, front = places.shape[1], lookup.longest
    # matched[b, i]: how many tokens, going back from i, agree with those going back from the last
    # one. `agrees` stays true for as long as all of them have.
    agrees = jnp.broadcast_to(allowed, (text.shape[0], size))
    matched = jnp.zeros(agrees.shape, jnp.int32)
    padded = jnp.pad(places, ((0, 0), (front, 0)), constant_values=NO_TOKEN)
    for back in range(front):
        # shifted[b, i] = places[b, i - back], and nothing that agrees in front. Slices of one
        # padded array, because XLA would check each element of a text padded anew.
        shifted = padded[:, front - back : front - back + size]
        own = jnp.take_along_axis(text, jnp.maximum(last - back, 0)[:, None], axis=1)
        agrees &= (shifted == own) & (last >= back)[:, None]
        matched += agrees.astype(jnp.int32)
    # One number for each place, so that one reduction finds the longest match and, of these, the
    # latest.
    columns = jnp.arange(size, dtype=jnp.int32)[None, :]
    worth = jnp.where(matched >= lookup.shortest, matched * size + columns, 0)
    length, end = jnp.divmod(jnp.max(worth, axis=1), size)
    return length, end


def append(
    text: Text,
    tokens: Int[Array, "batch some"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> Text:
    """Write row b's first count[b] tokens at start[b].

    Examples:
        >>> text = jnp.zeros((2, 4), jnp.int32)
        >>> append(text, jnp.array([[5, 6], [7, 8]]), jnp.array([1, 3]), jnp.array([2, 0])).tolist()
        [[0, 5, 6, 0], [0, 0, 0, 0]]
    """
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    # Places out of bounds are dropped.
    places = jnp.where(columns < count[:, None], start[:, None] + columns, text.shape[1])
    return jax.vmap(lambda row, place, new: row.at[place].set(new, mode="drop"))(
        text, places, tokens
    )
