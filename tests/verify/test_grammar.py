"""Texts follow the target's joint distribution within a grammar, by enumeration."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llguidance")

from easyspec_jax.decode import round as round_
from easyspec_jax.decode.round import RoundConfig
from easyspec_jax.options import SamplingParams
from easyspec_jax.sampling.adjustments import Kinds, row_adjustments
from easyspec_jax.sampling.grammar import Grammars
from easyspec_jax.sampling.vocabulary import NO_TOKEN
from easyspec_jax.verify import Coupled, Rejection
from easyspec_jax.verify.tree import Tree
from tests.support.grammar import END, tokenizer_of
from tests.verify.markov import LENGTH, TOKENS, draw_texts, make_request, program, softmax
from tests.verify.test_distribution import p_value
from tests.verify.test_options import EIGHT, EOS, LEVELS, ONE, PAIRS, SHAPES, count

LETTERS = "abcdefghijk"
SAMPLING = SamplingParams(
    0.7, max_new_tokens=LENGTH, choice=("aa", "ab", "abd", "ade", "adf", "b", "ba", "bda", "f")
)
DRAWS, ALPHA = 4000, 1e-4
FAULTS = ("none", "masks are a node late", "masks are those of another path")


@cache
def grammars() -> Grammars:
    """Return grammars of letters; "c", number 2, is the end instead."""
    tokens = [END if number in EOS else letter for number, letter in enumerate(LETTERS)]
    made = Grammars(tokenizer_of(tokens), 16, EOS)
    made.check(SAMPLING)
    return made


def joint(table: np.ndarray) -> np.ndarray:
    """Enumerate the probability of every text: [TOKENS + 1] * LENGTH; TOKENS stands for none."""
    result = np.zeros((TOKENS + 1,) * LENGTH)

    def follow(output: tuple[int, ...], probability: float) -> None:
        if len(output) == LENGTH or (output and output[-1] in EOS):
            result[(*output, *[TOKENS] * (LENGTH - len(output)))] += probability
            return
        text = "".join(LETTERS[token] for token in output)
        found = np.full(TOKENS, -np.inf)
        for token, letter in enumerate(LETTERS):
            more = text + letter if token not in EOS else None
            if any(whole.startswith(more) for whole in SAMPLING.choice if more):
                found[token] = table[(0, *output)[-1], token]
        if text in SAMPLING.choice:
            found[EOS[0]] = table[(0, *output)[-1], EOS[0]]
        after = softmax(found[None] / SAMPLING.temperature)[0]
        for token in np.flatnonzero(after).tolist():
            follow((*output, token), probability * after[token])

    follow((), 1.0)
    return result


def draw(run: Any, pair: str, number: int, fault: int = 0, vocab: int = 16) -> np.ndarray:
    seeds = np.arange(number)
    kinds = Kinds.of(SAMPLING)
    name = grammars().number(SAMPLING)
    rows = row_adjustments(kinds, SAMPLING, [(0,)] * number, vocab, name)
    request = make_request(seeds, SAMPLING.temperature)
    return draw_texts(run, PAIRS[pair], request, vocab, fault=fault, adjustments=rows, may_end=True)


@contextmanager
def planting(fault: jax.Array) -> Iterator[None]:
    """Plant a fault, by its number, in the paths that the target's masks are for."""
    real = round_.drafted_tokens

    def drafted_tokens(tree: Tree, levels: int) -> jax.Array:
        right = real(tree, levels)
        late = jnp.pad(right[:, :, 1:], ((0, 0), (0, 0), (0, 1)), constant_values=NO_TOKEN)
        other = jnp.roll(right, 1, axis=1)
        found = jnp.where(fault == FAULTS.index("masks are a node late"), late, right)
        return jnp.where(fault == FAULTS.index("masks are those of another path"), other, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_, "drafted_tokens", drafted_tokens)
        yield


@cache
def compiled(chosen: Any, shape: str, mesh: Any = ONE) -> Any:
    width, nodes = SHAPES[shape]
    config = RoundConfig(
        *(LEVELS, True, chosen, EOS, width, nodes), kinds=Kinds.of(SAMPLING), grammars=grammars()
    )
    return program(config, mesh, planting=planting)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chosen", [Rejection(), Coupled()], ids=repr)
def test_texts_follow_the_target_within_the_grammar(chosen, shape, fault):
    texts = draw(compiled(chosen, shape), "good", DRAWS, FAULTS.index(fault))
    found = p_value(count(texts), joint(PAIRS["good"].target))
    assert found > ALPHA if fault == "none" else found < 1e-9


@pytest.mark.slow
def test_the_mesh_changes_nothing():
    one, eight = (draw(compiled(Rejection(), "tree", mesh), "bad", 200) for mesh in (ONE, EIGHT))
    np.testing.assert_array_equal(eight, one)
