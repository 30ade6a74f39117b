"""Masks of grammars, by brute force over texts of few tokens."""

import itertools
import re

import numpy as np
import pytest

pytest.importorskip("llguidance")

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel import hosts
from easyspec_jax.sampling import grammar_compiler
from easyspec_jax.sampling.grammar import NO_GRAMMAR, Grammars
from easyspec_jax.sampling.vocabulary import NO_TOKEN
from tests.support.grammar import END, tokenizer_of

TOKENS = ["a", "b", END, "c", "ab", "bc", "cc"]
STOP, VOCAB, WORDS = 2, 40, 3
EVERYTHING = [True] * VOCAB


@pytest.fixture(scope="module")
def grammars():
    return Grammars(tokenizer_of(TOKENS), VOCAB, (STOP,))


def numbered(grammars, sampling):
    grammars.check(sampling)
    return grammars.number(sampling)


def ask(grammars, numbers, outputs, paths, levels=3, room=8, ahead=0):
    """Return the masks as bits: bool [rows, nodes, VOCAB]."""
    rows = []
    for number, output, own in zip(numbers, outputs, paths, strict=True):
        drafted = [[*path[::-1], *[NO_TOKEN] * (levels - len(path))] for path in own]
        filled = [*output, *[NO_TOKEN] * (room - len(output))]
        rows += [number, len(output), ahead, *itertools.chain(*drafted), *filled]
    pieces = np.split(np.asarray(rows, np.int32), [5, 11])
    masks = grammars.masks(WORDS, (len(numbers), len(paths[0]), levels), *pieces)
    bits = np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")
    return bits[..., :VOCAB].astype(bool)


def allowed(texts: set[str], ids: tuple[int, ...]) -> list[bool]:
    """Return what may follow some ids: what leads to one of the texts, or ends it."""
    if STOP in ids:
        return EVERYTHING
    text = "".join(TOKENS[token] for token in ids)
    if not any(whole.startswith(text) for whole in texts):
        return EVERYTHING
    found = [any(w.startswith(text + token) for w in texts) for token in TOKENS]
    found[STOP] = text in texts
    return found + [False] * (VOCAB - len(TOKENS))


CHOICES = ("ab", "ac", "b", "bca", "bcb", "cc", "ca")
GRAMMARS = {
    "choice": ({"choice": CHOICES}, set(CHOICES)),
    "regex": ({"regex": "(ab|c){1,2}"}, {"ab", "c", "abab", "abc", "cab", "cc"}),
    "nothing": ({"regex": ""}, {""}),
}


def test_a_grammar_is_tried_once(grammars, monkeypatch):
    """Others may push it out of what is kept compiled, but it is never refused later."""
    grammars.check(SamplingParams(regex="a{7}"))
    grammars._compiled.clear()
    monkeypatch.setattr(grammar_compiler, "complaint", lambda *_: pytest.fail("tried again"))
    grammars.check(SamplingParams(regex="a{7}"))


@pytest.mark.parametrize("case", GRAMMARS)
def test_masks_are_those_of_all_texts(grammars, case):
    """After every output of up to two tokens, for every path of up to two.

    Nothing is forced anywhere: some other text, or the end, is always possible.
    """
    fields, texts = GRAMMARS[case]
    number = numbered(grammars, SamplingParams(**fields))
    ids = range(len(TOKENS))
    short = [(), *((one,) for one in ids), *itertools.product(ids, ids)]
    # An output is always one that masks allow.
    outputs = [
        ids for ids in short if all(allowed(texts, ids[:n])[ids[n]] for n in range(len(ids)))
    ]
    for output in outputs:
        (found,) = ask(grammars, [number], [output], [short])
        for path, mask in zip(short, found, strict=True):
            assert mask.tolist() == allowed(texts, output + path), (output, path)


def test_a_regular_expression_matches_the_whole_text(grammars):
    number = numbered(grammars, SamplingParams(regex="(a|bc)*c?"))
    (found,) = ask(grammars, [number], [()], [[(), (0,), (3,), (5, 5)]])
    for path, mask in zip(((), (0,), (3,), (5, 5)), found, strict=True):
        text = "".join(TOKENS[token] for token in path)
        assert mask[STOP] == bool(re.fullmatch("(a|bc)*c?", text))


def test_rows_have_their_own_grammars_and_order_does_not_matter(grammars):
    """Also that of a device that asks again for what was before."""
    numbers = [
        numbered(grammars, SamplingParams(choice=("a", "ab"))),
        NO_GRAMMAR,
        numbered(grammars, SamplingParams(choice=("b", "bc", "c", "cc"))),
    ]
    texts = [{"a", "ab"}, None, {"b", "bc", "c", "cc"}]
    outputs = [[(), (), ()], [(0,), (0,), (1,)], [(4, STOP), (6,), (6,)], [(0, 1), (), (1, 3)]]
    for round_number in (0, 1, 2, 1, 3, 0, 2, 3):
        own = outputs[round_number]
        found = ask(grammars, numbers, own, [[()]] * 3)
        for mask, text, output in zip(found, texts, own, strict=True):
            assert mask[0].tolist() == (EVERYTHING if text is None else allowed(text, output))


def test_forced_text_has_its_usual_tokens(grammars):
    """Those that the tokenizer would give it, where a grammar leaves no choice."""
    number = numbered(grammars, SamplingParams(choice=("abcb",)))
    (found,) = ask(grammars, [number], [()], [[(), (4,), (4, 3), (4, 3, 1)]])
    assert [np.flatnonzero(mask).tolist() for mask in found] == [[4], [3], [1], [STOP]]


def test_tokens_are_forced_where_masks_allow_one(grammars):
    number = numbered(grammars, SamplingParams(choice=("abcb", "cca", "ccb")))
    # Each row: its grammar's number, how long its output is, and the output with room for 3.
    rows = [
        [number, 0, 9, 9, 9],  # ab or cc
        [number, 1, 4, 9, 9],  # ab, so c, b and the end
        [number, 1, 6, 9, 9],  # cc, so a or b
        [number, 2, 6, 0, 9],  # cca, so the end
        [number, 3, 6, 0, STOP],  # the end
        [NO_GRAMMAR, 1, 4, 9, 9],
    ]
    pieces = np.split(np.asarray(rows, np.int32).reshape(-1), [7, 8])
    none = [NO_TOKEN] * 4
    assert grammars.forced((6, 4), *pieces).tolist() == [
        none,
        [3, 1, STOP, NO_TOKEN],
        none,
        [STOP, NO_TOKEN, NO_TOKEN, NO_TOKEN],
        none,
        none,
    ]
    assert grammars.forced((6, 2), *pieces)[1].tolist() == [3, 1]


def test_masks_below_what_is_ahead_are_those_of_longer_paths(grammars):
    """A draft runs ahead of the output by what is forced; the verifier has it in the tree."""
    number = numbered(grammars, SamplingParams(choice=("abcb", "abcc", "b")))
    paths = [(), (3,), (3, 1), (1,)]
    longer = [(4, *path) for path in paths]
    (wanted,) = ask(grammars, [number], [()], [longer])
    (found,) = ask(grammars, [number], [(4,)], [paths], ahead=1)
    np.testing.assert_array_equal(found, wanted)


def test_other_tokens_can_end_a_text(grammars):
    """At the end of the grammar; or before, where it allows them as text."""
    sampling = SamplingParams(regex="ab+", stop_token_ids=(6, 1), ignore_eos=True)
    (found,) = ask(grammars, [numbered(grammars, sampling)], [()], [[(0,), (4,), (0, 1)]])
    assert np.flatnonzero(found[0]).tolist() == [1]
    assert np.flatnonzero(found[1]).tolist() == [1, 6]
    assert found[2].tolist() == EVERYTHING


def test_several_processes_are_refused(grammars, monkeypatch):
    """Each compiles with a limit of its own, and so they might disagree."""
    monkeypatch.setattr(hosts, "count", lambda: 2)
    with pytest.raises(EasySpecError, match="`regex` works in one process only"):
        grammars.check(SamplingParams(regex="a"))
    grammars.check(SamplingParams())


def test_equal_grammars_have_one_number(grammars):
    one, other = SamplingParams(choice=("a",)), SamplingParams(choice=("a", "b"))
    assert numbered(grammars, one) == numbered(grammars, SamplingParams(0.5, choice=("a",)))
    assert numbered(grammars, one) != numbered(grammars, other)
    assert numbered(grammars, SamplingParams()) == NO_GRAMMAR
