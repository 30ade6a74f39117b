"""An endless stream of requests for the bundled pair: pieces of code, all lengths and samplings."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import NamedTuple

from easyspec_jax import SamplingParams
from easyspec_jax.cli.command import read_prompts
from experiments.lib.pair import DATA

WAYS = (SamplingParams(), SamplingParams(0.8), SamplingParams(1.0, top_k=40, top_p=0.95))
"""One for each kind of program: greedy, sampling, and sampling from the likeliest."""


class RowSampling(NamedTuple):
    """A prompt and how it is continued."""

    prompt: str
    sampling: SamplingParams


def piece(random: Random, lines: int) -> str:
    """Draw at most that many lines of code, the last one cut anywhere; never empty."""
    chosen = random.choices(read_prompts(DATA / "code_prompts.txt"), k=random.randint(1, lines))
    return "\n    ".join([*chosen[:-1], chosen[-1][: random.randint(1, len(chosen[-1]))]])


def sampling(random: Random, way: int, fewest: int, most: int) -> SamplingParams:
    """Return one of WAYS with noise and a length of its own."""
    seed, length = random.randrange(2**32), random.randint(fewest, most)
    return replace(WAYS[way], seed=seed, max_new_tokens=length)


def blocks(seed: int, rows: int, size: int) -> Iterator[RowSampling]:
    """Yield blocks of `size` requests, each block with one way of sampling.

    A block begins with a short request for each row of a batch and goes on with a long one, so that
    caches start small and grow.
    """
    random, way = Random(seed), 0
    while True:
        for place in range(size):
            if place < rows:
                yield RowSampling(piece(random, 1), sampling(random, way, 4, 24))
            elif place == rows:
                yield RowSampling(piece(random, 1), sampling(random, way, 150, 160))
            else:
                yield RowSampling(piece(random, 12), sampling(random, way, 4, 48))
        way = (way + 1) % len(WAYS)
