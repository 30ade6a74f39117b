"""The measuring itself: passes as separate programs, acceptance by decoding."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from easyspec_jax.decode.round import RoundConfig
from easyspec_jax.draft.parallel import run_fuzzy
from easyspec_jax.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.model.transformer import run_exact
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.timing import Case, alone, pass_case, round_case
from easyspec_jax.tokenizer import Prompt
from easyspec_jax.tune.acceptance import Text, accepted_by_width
from easyspec_jax.tune.candidates import Draft

REPEATS = 5
"""Samples of a pass, each beside one of the plain step."""

SAMPLE_SECONDS = 0.03
"""A sample takes about this long at least, so that clocks and dispatch do not matter."""

LOOPS = 3
"""Draft steps in a loop on the device, as a round has them."""


@dataclass(frozen=True)
class Sample:
    """What acceptance is measured on. chat: prompts that are text are put as a user's."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    chat: bool = False


class DeviceBench:
    """Measures on the devices of an engine. The draft that was used last stays loaded.

    levels, widths: the most levels, and the tree widths, that are asked for. texts: what the target makes of the
    sample. plain: seconds of a step of plain decoding; overhead: seconds that the host adds to a step or round.
    """

    def __init__(self, engine: Engine, sample: Sample, levels: int, widths: Sequence[int]) -> None:
        self.engine, self.sample, self.levels, self.widths = engine, sample, levels, widths
        self._held: tuple[Draft, Engine] | None = None
        self.baseline = engine.baseline()
        self.baseline.compile(sample.prompts, SamplingParams(), chat=sample.chat)
        programs = self.baseline.programs(SamplingParams())
        widest = SpeculativeConfig(num_speculative_tokens=levels, tree_width=max(widths))
        config = RoundConfig.of(widest, SamplingParams(), ())
        prompt = max(len(engine.encode(prompt, sample.chat)) for prompt in sample.prompts)
        text = min(prompt + sample.sampling.max_new_tokens, engine.max_length)
        self._context = min(prompt, text // 2)
        self._capacity = replace(programs, config=config).capacity(text)
        self._target = alone(engine.mesh, self.baseline.load()[0])
        self._plain = round_case("plain step", programs, context=self._context, capacity=programs.capacity(text))
        self._plain.sample(1)
        self._calls = _calls(self._plain)
        self.texts, self.plain, self.overhead = self._write_texts()

    def _write_texts(self) -> tuple[list[Text], float, float]:
        """What the target makes of the prompts; seconds of a plain step, and what a token takes on top of it."""
        texts, steps, overheads = [], [], []
        for prompt in self.sample.prompts:
            done = next(self.baseline.generate([prompt], self.sample.sampling, chat=self.sample.chat))
            steps.append(self._plain.sample(self._calls))
            texts.append((len(done.prompt_ids), [*done.prompt_ids, *done.token_ids]))
            if done.stats.rounds:
                overheads.append(done.stats.decode_seconds / done.stats.rounds - steps[-1])
        if all(len(ids) - first <= self.levels for first, ids in texts):
            raise EasySpecError(
                f"the target ends each of these texts within {self.levels} tokens; give other prompts to measure on"
            )
        return texts, float(np.median(steps)), max(0.0, float(np.median(overheads)))

    def verification(self, nodes: int) -> float:
        """Seconds of the target's pass over so many nodes, the root included."""
        return self._seconds(
            pass_case("verification", self._target, nodes, run_exact, context=self._context, capacity=self._capacity)
        )

    def step(self, draft: Draft, width: int) -> float:
        """See search.Bench; infinite if the devices' memory does not suffice."""
        return self._draft_pass(draft, width, run_fuzzy, loops=LOOPS)

    def first(self, draft: Draft, tokens: int) -> float:
        """See search.Bench."""
        return self._draft_pass(draft, tokens, run_exact, scored=1)

    def acceptance(self, draft: Draft, width: int) -> dict[int, tuple[float, ...]]:
        """See search.Bench; narrower trees are parts of a wide one."""
        engine = self.with_draft(draft)
        model = engine.load()[1]
        assert model is not None
        widths = [narrower for narrower in self.widths if narrower <= width]
        return accepted_by_width(alone(engine.mesh, model), self.texts, self.levels, widths)

    def with_draft(self, draft: Draft) -> Engine:
        """An engine with the draft where it belongs."""
        if self._held is None or self._held[0] != draft:
            self._held = None  # frees the other's memory
            self._held = draft, self.engine.variant(draft.layout, draft.shape)
        return self._held[1]

    def release(self) -> None:
        """Frees the memory of the draft that was used last."""
        self._held = None

    def _draft_pass(self, draft: Draft, *args: object, **options: int) -> float:
        try:
            engine = self.with_draft(draft)
            model = engine.load()[1]
            assert model is not None
            make = partial(pass_case, "draft", alone(engine.mesh, model))
            return self._seconds(make(*args, **options, context=self._context, capacity=self._capacity))  # pyright: ignore[reportArgumentType]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return float("inf")

    def _seconds(self, case: Case) -> float:
        """As many plain steps as it takes, in the median of samples that alternate with them: machines drift."""
        case.sample(1)  # compiles
        calls = _calls(case)
        ratios = [case.sample(calls) / self._plain.sample(self._calls) for _ in range(REPEATS)]
        return float(np.median(ratios)) * self.plain


def _calls(case: Case) -> int:
    """Calls that make a sample long enough."""
    begun = time.perf_counter()
    case.sample(1)
    return max(1, round(SAMPLE_SECONDS / (time.perf_counter() - begun)))
