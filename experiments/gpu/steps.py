"""The steps of an hour on a GPU, the most valuable first, as data."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.gpu import headlines
from experiments.gpu.headlines import Headline

OUT = "{out}"
"""Stands in a command for the file of results. Where it is missing, stdout is the results."""


@dataclass(frozen=True)
class Step:
    """A command with a budget of time.

    Attributes:
        name: Its results are NAME.json, and what it prints is NAME.log.
        about: What it measures, in a few words.
        minutes: The most that it may take.
        command: What follows `python -m` on a GPU.
        rehearsal: What follows it on a CPU.
        headline: Returns the figures for the summary.
        memory: GiB that the device must have.
        modules: Modules without which it is skipped.
    """

    name: str
    about: str
    minutes: float
    command: str
    rehearsal: str
    headline: Headline
    memory: float = 0
    modules: tuple[str, ...] = ()

    def template(self, rehearse: bool) -> str:
        """Return the command that is run, with OUT for the file of results."""
        return self.rehearsal if rehearse else self.command

    def words(self, rehearse: bool, out: Path) -> list[str]:
        """Return the command's words."""
        words = shlex.split(self.template(rehearse))
        return [sys.executable, "-m", *(str(out) if word == OUT else word for word in words)]


ROOFLINE = f"experiments.bench_roofline --out {OUT}"
PAIR = f"{ROOFLINE} --shape h200-8b-1b"
TINY = (
    f"{ROOFLINE} --shape tiny --repeats 1 --calls 1 --context 16 --max-new-tokens 8 --memory-mib 4"
)
CORRECTNESS = f"experiments.gpu_correctness --out {OUT}"

STEPS = (
    Step(
        "environment",
        "device, memory, clocks, versions",
        1,
        f"experiments.gpu_environment --out {OUT}",
        f"experiments.gpu_environment --out {OUT}",
        headlines.environment,
    ),
    Step(
        "correctness",
        "tokens and logits against a CPU's",
        4,
        CORRECTNESS,
        f"{CORRECTNESS} --max-new-tokens 12 --ways 'easyspec, N = 4'",
        headlines.correctness,
    ),
    Step(
        "passes",
        "bandwidth, a plain step, verification of 1 to 64 tokens",
        3,
        f"{PAIR} --only bandwidth target",
        f"{TINY} --only bandwidth target",
        headlines.passes,
        memory=30,
    ),
    Step(
        "drafts",
        "exact and fuzzy draft steps",
        3,
        f"{PAIR} --only draft",
        f"{TINY} --only draft",
        headlines.drafts,
        memory=30,
    ),
    Step(
        "rounds",
        "whole rounds and their parts",
        4,
        f"{PAIR} --only round",
        f"{TINY} --only round",
        headlines.rounds,
        memory=30,
    ),
    Step(
        "profile",
        "kernels of a round and the gaps between them",
        3,
        f"{PAIR} --only profile",
        f"{TINY} --only profile",
        headlines.profile,
        memory=30,
    ),
    Step(
        "peers",
        "whole texts against transformers' with the same acceptance",
        6,
        f"{PAIR} --only peers --repeats 3",
        f"{TINY} --only peers",
        headlines.peers,
        memory=30,
        modules=("torch", "transformers"),
    ),
    Step(
        "synthetic",
        "whole texts at prescribed acceptance",
        3,
        f"{PAIR} --only synthetic --synthetic-acceptance .6 .8 .9 --repeats 5",
        f"{TINY} --only synthetic --synthetic-acceptance .8",
        headlines.synthetic,
        memory=30,
    ),
    Step(
        "large",
        "a pair of 32B and 1.5B",
        6,
        f"{ROOFLINE} --shape h200-32b-1.5b --only target round synthetic "
        "--synthetic-acceptance .8 --repeats 3",
        f"{TINY} --only synthetic --synthetic-acceptance .9",
        headlines.large,
        memory=100,
    ),
    Step(
        "options",
        "the round with sets of XLA's options",
        5,
        f"{PAIR} --only options --repeats 5",
        f"{TINY} --only options",
        headlines.options,
        memory=30,
    ),
    Step(
        "tune",
        "what tune chooses for the bundled pair",
        4,
        "easyspec_jax.tune --no-store --json",
        "easyspec_jax.tune --no-store --json --seconds 5 --confirm 1 --lp-sizes 1 4 "
        "--mlp-lp-sizes 1 --tree-widths 1 --max-levels 2 --max-new-tokens 8",
        headlines.tune,
    ),
    Step(
        "context_8k",
        "a text of 8,000 tokens",
        3,
        f"{PAIR} --only target round --context 8000 --repeats 5",
        f"{TINY} --only target --context 500",
        headlines.long_context,
        memory=30,
    ),
    Step(
        "context_32k",
        "a text of 32,000 tokens",
        3,
        # With 32,000 the caches end at 32,768; those of a longer text would be twice as large.
        f"{PAIR} --only target round --context 32000 --repeats 5",
        f"{TINY} --only target --context 900",
        headlines.long_context,
        memory=70,
    ),
)
"""A new step is one entry here; one for what may be missing names the module in `modules`."""


def named(names: list[str]) -> list[Step]:
    """Return the steps of these names, in the order of STEPS."""
    return [step for step in STEPS if step.name in names]
