"""Lookups find what a plain search finds, and read nothing behind a text's last token."""

import jax
import numpy as np
import pytest

from easyspec_jax.decode.lookup import Lookup, append, find

LEVELS = 6
look_up, put = jax.jit(find, static_argnums=(2, 3)), jax.jit(append)


def searched(text: list[int], lookup: Lookup) -> tuple[list[int], int]:
    """Search one text: the longest n-gram first, and of its places the latest."""
    for size in range(lookup.longest, lookup.shortest - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if len(text) > size and text[start : start + size] == text[-size:]:
                return continued(text, start + size), size
    return [], 0


def continued(text: list[int], start: int) -> list[int]:
    """Return LEVELS tokens from `start` on; each one behind the text's end joins the text."""
    text = list(text)
    for place in range(start, start + LEVELS):
        text.append(text[place])
    return text[-LEVELS:]


def random_texts(seed: int, rows: int = 200, capacity: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Draw texts of all lengths from few tokens, so that most repeat something."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, random.integers(1, 6, (rows, 1)) + 1, (rows, capacity))
    return tokens.astype(np.int32), random.integers(0, capacity, rows).astype(np.int32)


@pytest.mark.parametrize(
    "lookup", [Lookup(1, 1), Lookup(3, 1), Lookup(3, 3), Lookup(8, 2), Lookup(32, 1)], ids=str
)
def test_a_lookup_finds_what_a_search_finds(lookup):
    texts, last = random_texts(lookup.longest)
    found = look_up(texts, last, lookup, LEVELS)
    lengths = set()
    for row, (text, end) in enumerate(zip(texts.tolist(), last.tolist(), strict=True)):
        tokens, matched = searched(text[: end + 1], lookup)
        assert found.matched[row] == matched
        assert not matched or found.tokens[row].tolist() == tokens
        lengths.add(matched)
    assert {0, lookup.longest} <= lengths | ({lookup.longest} if lookup.longest > 24 else set())


def test_tokens_behind_a_text_are_not_read():
    texts, last = random_texts(0)
    other = np.where(np.arange(texts.shape[1]) <= last[:, None], texts, 77)
    assert (other != texts).any()
    found, again = (look_up(each, last, Lookup(4, 1), LEVELS) for each in (texts, other))
    np.testing.assert_array_equal(again.matched, found.matched)
    matched = np.asarray(found.matched) > 0
    np.testing.assert_array_equal(again.tokens[matched], found.tokens[matched])


@pytest.mark.parametrize("lookup", [Lookup(3, 1), Lookup(8, 2)], ids=str)
def test_a_longer_match_in_the_corpus_wins(lookup):
    texts, last = random_texts(lookup.longest)
    corpus = np.random.default_rng(1).integers(0, 5, 60).astype(np.int32)
    found = look_up(texts, last, lookup, LEVELS, corpus)
    won = 0
    for row, (text, end) in enumerate(zip(texts.tolist(), last.tolist(), strict=True)):
        tokens, matched = searched(text[: end + 1], lookup)
        for size in range(min(lookup.longest, end + 1), max(matched, lookup.shortest - 1), -1):
            end_of_text = text[end + 1 - size : end + 1]
            starts = range(len(corpus) - LEVELS - size, -1, -1)
            places = [at for at in starts if corpus[at : at + size].tolist() == end_of_text]
            if places:
                at = places[0] + size
                tokens, matched, won = corpus[at : at + LEVELS].tolist(), size, won + 1
                break
        assert found.matched[row] == matched
        assert bool(found.is_long[row]) == (matched == lookup.longest)
        assert not matched or found.tokens[row].tolist() == tokens
    assert 20 < won < 180


def test_a_corpus_shorter_than_a_draft_is_not_searched():
    texts, last = random_texts(0)
    corpus = np.arange(LEVELS, dtype=np.int32)
    found, plain = (look_up(texts, last, Lookup(3, 1), LEVELS, own) for own in (corpus, None))
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_what_is_appended_past_the_end_is_dropped():
    text = np.arange(8, dtype=np.int32).reshape(2, 4)
    start, count = np.array([3, 2], np.int32), np.array([3, 1], np.int32)
    appended = put(text, np.full((2, 3), 9, np.int32), start, count)
    assert appended.tolist() == [[0, 1, 2, 9], [4, 5, 9, 7]]
