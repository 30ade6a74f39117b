"""Texts follow the target's joint distribution under every sampling option, by enumeration.

One program of each verifier and shape has all kinds of options; the numbers of a case make some of
them neutral. The reference applies vLLM's definitions to each prefix of each text, in NumPy. By
default every option comes up with some verifier, with 40,000 draws; `pytest -m exhaustive` takes
all of them, with 400,000.
"""

import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.decode import accepting
from easyspec_jax.decode import round as round_
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.sampling.adjustments import Kinds, RowAdjustments, row_adjustments
from easyspec_jax.sampling.vocabulary import NO_TOKEN
from easyspec_jax.verify import Block, Coupled, Greedy, Rejection, RowSampling, verifier
from easyspec_jax.verify.tree import Tree
from tests.verify.markov import (
    LENGTH,
    TOKENS,
    Truncation,
    draw_texts,
    make_pairs,
    make_request,
    program,
    softmax,
    truncated,
)
from tests.verify.test_distribution import p_value

ONE, EIGHT = MeshShape(1, 1), MeshShape(4, 2)
CHUNK, LEVELS, PROMPT, EOS = 20_000, 2, (0,), (2,)
PAIRS = make_pairs()
ALL = Kinds(min_p=True, bias=True, stops=True, penalties=True)
SHAPES = {"chain": (1, None), "tree": (4, 5)}
WAYS = (*itertools.product((Rejection, Coupled), SHAPES), (Block, "chain"))

ALONE = {
    "min_p": SamplingParams(0.7, min_p=0.2),
    "logit_bias": SamplingParams(0.7, logit_bias={3: 2.0, 5: -3.0, 0: -100.0}),
    "stop_token_ids": SamplingParams(0.7, stop_token_ids=(4, 9)),
    "ignore_eos": SamplingParams(0.7, ignore_eos=True),
    "min_new_tokens": SamplingParams(0.7, min_new_tokens=2, stop_token_ids=(4, 7)),
    "presence_penalty": SamplingParams(0.7, presence_penalty=1.5),
    "frequency_penalty": SamplingParams(0.7, frequency_penalty=1.2),
    "repetition_penalty": SamplingParams(0.7, repetition_penalty=1.8),
}
TOGETHER = {
    "penalties": SamplingParams(
        0.7, presence_penalty=-1.0, frequency_penalty=1.5, repetition_penalty=1.4
    ),
    "penalties-cut": SamplingParams(
        1.0, top_k=7, top_p=0.9, presence_penalty=0.8, repetition_penalty=0.7
    ),
    "min_p-cut": SamplingParams(1.0, top_k=8, top_p=0.85, min_p=0.1),
    "bias-min_p": SamplingParams(0.7, logit_bias={1: 1.5, 6: -2.0}, min_p=0.15),
    "bias-penalties": SamplingParams(
        0.7, logit_bias={1: 1.5, 8: 2.0}, repetition_penalty=1.5, frequency_penalty=-0.7
    ),
    "everything": SamplingParams(
        1.0,
        top_k=9,
        top_p=0.95,
        min_p=0.05,
        logit_bias={1: 1.0, 8: -1.0},
        min_new_tokens=1,
        ignore_eos=True,
        stop_token_ids=(4,),
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.3,
    ),
}
OPTIONS = ALONE | TOGETHER


def likely(
    logits: np.ndarray, output: tuple[int, ...], sampling: SamplingParams, eos: tuple[int, ...]
) -> np.ndarray:
    """Return the target's distribution after some output, or its arg-max at temperature 0."""
    x = logits.astype(np.float64)
    if len(output) < sampling.min_new_tokens:
        x[[*eos, *sampling.stop_token_ids]] = -np.inf
    for number, bias in sampling.biases.items():
        x[number] += bias
    counts = np.bincount(output, minlength=TOKENS)
    repeated = (counts > 0) | np.isin(np.arange(TOKENS), PROMPT)
    penalty = sampling.repetition_penalty
    x = np.where(repeated, np.where(x > 0, x / penalty, x * penalty), x)
    x = x - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    if sampling.temperature == 0:
        return np.eye(TOKENS)[np.argmax(x)]
    p = softmax(x[None] / sampling.temperature)
    p = np.where(p >= sampling.min_p * p.max(), p, 0)
    return truncated(p / p.sum(), Truncation(sampling.top_k, sampling.top_p))[0]


def joint(table: np.ndarray, sampling: SamplingParams, eos: tuple[int, ...] = EOS) -> np.ndarray:
    """Enumerate the probability of every text: [TOKENS + 1] * LENGTH; TOKENS stands for none."""
    result = np.zeros((TOKENS + 1,) * LENGTH)
    ends = sampling.end_ids(eos)

    def follow(output: tuple[int, ...], probability: float) -> None:
        if len(output) == LENGTH or (output and output[-1] in ends):
            result[(*output, *[TOKENS] * (LENGTH - len(output)))] += probability
            return
        after = likely(table[(*PROMPT, *output)[-1]], output, sampling, eos)
        for token in np.flatnonzero(after).tolist():
            follow((*output, token), probability * after[token])

    follow((), 1.0)
    return result


@cache
def compiled(
    chosen: Any, shape: str, kinds: Kinds = ALL, mesh: MeshShape = ONE, axes: Axes = ALL_AXES
) -> Any:
    width, nodes = SHAPES[shape]
    config = RoundConfig(LEVELS, True, chosen, EOS, width, nodes, kinds=kinds)
    return program(config, mesh, axes)


def rows(
    sampling: SamplingParams, seeds: np.ndarray, kinds: Kinds = ALL, vocab: int = 16
) -> tuple[RowSampling, RowAdjustments | None]:
    """Return the rows of a request, one per seed."""
    # The program sees tokens spread over the ids of a vocabulary.
    step = vocab // TOKENS
    spread = replace(
        sampling,
        logit_bias={number * step: bias for number, bias in sampling.biases.items()},
        stop_token_ids=tuple(number * step for number in sampling.stop_token_ids),
    )
    request = make_request(seeds, sampling.temperature, Truncation(sampling.top_k, sampling.top_p))
    if kinds.min_p:
        request = replace(request, min_p=np.full(seeds.shape, sampling.min_p, np.float32))  # pyright: ignore[reportArgumentType]
    return request, row_adjustments(kinds, spread, [PROMPT] * len(seeds), vocab)


def draw(
    run: Any, pair: str, sampling: SamplingParams, seeds: np.ndarray, **how: Any
) -> np.ndarray:
    request, adjustments = rows(sampling, seeds)
    return draw_texts(run, PAIRS[pair], request, adjustments=adjustments, may_end=True, **how)


def count(texts: np.ndarray) -> np.ndarray:
    counts = np.zeros((TOKENS + 1,) * LENGTH, int)
    np.add.at(counts, tuple(texts.T), 1)
    return counts


@dataclass(frozen=True)
class Case:
    verifier: type[Rejection] | type[Coupled] | type[Block]
    shape: str
    option: str
    pair: str

    def __str__(self) -> str:
        return f"{self.verifier.__name__.lower()}-{self.shape}-{self.option}-{self.pair}"

    def p_value(self, chunks: int) -> float:
        """Draw texts and test whether they follow the target. The case's name decides the seeds."""
        start = zlib.crc32(str(self).encode())
        sampling, run = OPTIONS[self.option], compiled(self.verifier(truncates=True), self.shape)
        counts = sum(
            count(
                draw(
                    run, self.pair, sampling, np.arange(start + i * CHUNK, start + (i + 1) * CHUNK)
                )
            )
            for i in range(chunks)
        )
        return p_value(np.asarray(counts), joint(PAIRS[self.pair].target, sampling))


def every_case() -> Iterator[Case]:
    """List all options with every verifier, chains and trees; the drafts take turns."""
    pairs = itertools.cycle(("good", "bad", "good"))
    for option, (chosen, shape) in itertools.product(OPTIONS, WAYS):
        yield Case(chosen, shape, option, next(pairs))


EVERY_CASE = list(every_case())
# The smallest p-value must be below this for Holm's procedure at 1 % to reject anything.
ALPHA = 0.01 / len(EVERY_CASE)
# Every option with one verifier and shape, each of which comes up in turn.
FEW_CASES = [EVERY_CASE[len(WAYS) * index + index % len(WAYS)] for index in range(len(OPTIONS))]


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_texts_follow_the_target(case):
    assert case.p_value(2) > ALPHA


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_many_texts_follow_the_target(case):
    assert case.p_value(20) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_texts_are_the_likeliest_tokens(shape):
    run = compiled(Greedy(), shape)
    for option, sampling in OPTIONS.items():
        greedy = replace(sampling, temperature=0.0)
        for pair in PAIRS:
            (text,) = draw(run, pair, greedy, np.arange(1)).tolist()
            expected = joint(PAIRS[pair].target, greedy)
            assert expected[tuple(text)] == 1, (option, pair, text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen", [Rejection(), pytest.param(Coupled(), marks=pytest.mark.exhaustive)], ids=repr
)
def test_an_option_alone_has_the_text_that_it_has_among_neutral_ones(chosen):
    """What is neutral changes no bit, and a request does not depend on its neighbours' kinds."""
    for option, sampling in ALONE.items():
        own = replace(chosen, truncates=False)
        kinds, seeds = Kinds.of(sampling), np.arange(300)
        request, adjustments = rows(sampling, seeds, kinds)
        alone = draw_texts(
            compiled(own, "tree", kinds),
            PAIRS["bad"],
            request,
            adjustments=adjustments,
            may_end=True,
        )
        among = draw(compiled(replace(own, truncates=True), "tree"), "bad", sampling, seeds)
        np.testing.assert_array_equal(alone, among, err_msg=option)


@pytest.mark.slow
def test_the_mesh_changes_nothing():
    """Rows of all options are in one batch. The draft is split in one case, else replicated."""
    run = [
        compiled(Rejection(True), "tree", ALL, *layout)
        for layout in ((ONE, ALL_AXES), (EIGHT, ALL_AXES), (EIGHT, ()))
    ]
    parts = [rows(sampling, np.arange(100), vocab=128) for sampling in OPTIONS.values()]
    request, adjustments = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    one, *others = (
        draw_texts(each, PAIRS["good"], request, 128, axes, adjustments=adjustments, may_end=True)
        for each, axes in zip(run, (ALL_AXES, ALL_AXES, ()), strict=True)
    )
    for other in others:
        np.testing.assert_array_equal(other, one)


FAULTS = {
    "none": ("everything", "good"),
    "penalties are those of another path": ("frequency_penalty", "good"),
    "penalties leave out the path": ("presence_penalty", "good"),
    "penalties leave out the text": ("presence_penalty", "bad"),
    "penalties leave out the prompt": ("repetition_penalty", "good"),
    "stop tokens are masked a node late": ("min_new_tokens", "good"),
    "min-p comes before temperature": ("min_p", "good"),
    "the bias comes after the penalties": ("bias-penalties", "good"),
}
"""Faults of the target's side, and the option and draft that each shows with.

With a good draft most texts are one round, in which the path counts; with a bad one, several.
"""


@contextmanager
def planting(fault: jax.Array) -> Iterator[None]:
    """Plant a fault, by its number, in what the target is verified with."""
    real_adjust, real_drafted = round_.adjust, round_.drafted_tokens
    real_output, real_cutoff = round_.with_output, verifier.shard_cutoff

    def has(name: str) -> jax.Array:
        return fault == list(FAULTS).index(name)

    def adjust(logits: Any, position: Any, drafted: Any, rows: Any, *rest: Any) -> jax.Array:
        position = position - has("stop tokens are masked a node late").astype(jnp.int32)
        no_prompt = has("penalties leave out the prompt")
        own = rows.penalties
        blind = replace(own, prompted=own.prompted & ~no_prompt)
        right = real_adjust(logits, position, drafted, replace(rows, penalties=blind), *rest)
        late = real_adjust(logits, position, drafted, replace(rows, bias=None), *rest)
        late = late + rows.bias[:, None, :]
        return jnp.where(has("the bias comes after the penalties"), late, right)

    def drafted_tokens(tree: Tree, levels: int) -> jax.Array:
        right = real_drafted(tree, levels)
        other = jnp.where(
            has("penalties are those of another path"), jnp.roll(right, 1, axis=1), right
        )
        return jnp.where(has("penalties leave out the path"), NO_TOKEN, other)

    def with_output(rows: Any, tokens: jax.Array, num_tokens: jax.Array) -> Any:
        return real_output(
            rows, tokens, jnp.where(has("penalties leave out the text"), 0, num_tokens)
        )

    def shard_cutoff(
        logits: Any, temperature: Any, top_k: Any, top_p: Any, axes: Axes, min_p: Any
    ) -> jax.Array:
        # The target's rows are split over axes, the draft's candidates are not.
        right = real_cutoff(logits, temperature, top_k, top_p, axes, min_p)
        early = verifier.min_p_cutoff(logits, jnp.ones_like(temperature), min_p, axes) / temperature
        return jnp.where(has("min-p comes before temperature") & bool(axes), early, right)

    with pytest.MonkeyPatch.context() as patch:
        for function in (adjust, drafted_tokens, with_output):
            patch.setattr(round_, function.__name__, function)
        patch.setattr(accepting, "with_output", with_output)
        patch.setattr(verifier, "shard_cutoff", shard_cutoff)
        yield


@cache
def with_faults(chosen: Any, shape: str) -> Any:
    width, nodes = SHAPES[shape]
    return program(
        RoundConfig(LEVELS, True, chosen, EOS, width, nodes, kinds=ALL), ONE, planting=planting
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("chosen", [Rejection, pytest.param(Coupled, marks=pytest.mark.exhaustive)])
def test_planted_faults_are_noticed(chosen, fault):
    """In trees: in a chain, the path of another node is often the path of an ancestor."""
    option, pair = FAULTS[fault]
    sampling, run = OPTIONS[option], with_faults(chosen(truncates=True), "tree")
    starts = (3 * 10**9 + i * CHUNK for i in range(2))
    texts = [
        draw(run, pair, sampling, np.arange(s, s + CHUNK), fault=list(FAULTS).index(fault))
        for s in starts
    ]
    noticed = p_value(count(np.concatenate(texts)), joint(PAIRS[pair].target, sampling))
    assert noticed > ALPHA if fault == "none" else noticed < 1e-9
