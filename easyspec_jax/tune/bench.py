"""Measurements: passes as separate programs, and acceptance on texts that the target writes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.decode.timing import Case, alone, pass_case, round_case
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.engine.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.model.transformer import run_exact
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.tokenizer.conversation import Prompt
from easyspec_jax.tune.acceptance import EarlyEnd, Text, foresee
from easyspec_jax.tune.candidates import Draft
from easyspec_jax.tune.search import Clock

REPEATS = 5
"""Samples of a pass, alternating with plain steps; after CASE_SECONDS, three are enough."""

CASE_SECONDS = 1.5

WRITING = 0.15
"""Share of the time after which no more texts are begun, of those to measure acceptance on."""

SAMPLE_SECONDS = 0.03
"""Least length of a sample, about, so that clocks and dispatch do not matter."""

LOOPS = 3
"""Draft steps in one program, because a round runs them in a loop on the devices."""


@dataclass(frozen=True)
class Sample:
    """Prompts that acceptance is measured on.

    Attributes:
        prompts: The prompts.
        sampling: How the target continues them.
        chat: Put prompts that are text as a user's message.
    """

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    chat: bool = False


class DeviceBench:
    """Measures on the devices of an engine. The draft that was used last stays loaded.

    Attributes:
        engine: The pair.
        sample: Prompts to measure on.
        levels: The most levels that will be asked for.
        widths: The tree widths that will be asked for.
        texts: The target's continuations of the sample.
        early_ends: What rounds do that end early, by a draft's `drafting` and the tree width.
        plain: Seconds of a step of plain decoding.
        overhead: Seconds that the host adds to a step or a round.
    """

    def __init__(
        self,
        engine: Engine,
        sample: Sample,
        levels: int,
        widths: Sequence[int],
        clock: Clock = lambda: 0.0,
    ) -> None:
        self.engine = engine
        self.sample = sample
        self.levels = levels
        self.widths = widths
        self.early_ends: dict[tuple[SpeculativeConfig, int], tuple[EarlyEnd, ...]] = {}
        self._held: tuple[Draft, Engine] | None = None
        self.baseline = engine.baseline()
        # All passes are timed with the caches of the longest text, which all others fit into.
        self.longest = max(sample.prompts, key=self.text_length)
        self.baseline.compile(sample.prompts, sample.sampling, chat=sample.chat)
        programs = self.baseline.programs(sample.sampling)
        widest = SpeculativeConfig(num_speculative_tokens=levels, tree_width=max(widths))
        config = RoundConfig.of(widest, sample.sampling, ())
        # Attention is timed at half the longest text, about where it is on average.
        text = self.text_length(self.longest)
        self._lengths = {
            "context": text // 2,
            "capacity": replace(programs, config=config).sizes.capacity(text),
        }
        self._target = alone(engine.mesh, self.baseline.load()[0])
        self._plain = round_case(
            "plain step", programs, context=text // 2, capacity=programs.sizes.capacity(text)
        )
        self._plain.sample(1)
        self._calls = _calls(self._plain)
        self.texts, self.plain, self.overhead = self._write_texts(clock)

    def text_length(self, prompt: Prompt) -> int:
        """Return the length in tokens of a prompt and its longest continuation."""
        prompt_length = len(self.engine.encode(prompt, self.sample.chat))
        return min(prompt_length + self.sample.sampling.max_new_tokens, self.engine.max_length)

    def _write_texts(self, clock: Clock) -> tuple[list[Text], float, float]:
        """Write texts with the target.

        Returns:
            The texts, the seconds of a plain step, and the seconds that a token takes on top.
        """
        texts, steps, overheads = [], [], []
        for prompt in self.sample.prompts:
            if texts and clock() > WRITING:
                break
            done = next(
                self.baseline.generate([prompt], self.sample.sampling, chat=self.sample.chat)
            )
            # Timed next to every text, so that overhead is the difference of neighbours in time.
            steps.append(self._plain.sample(self._calls))
            # Shorter texts hold no position from which the deepest draft can be judged.
            if len(done.token_ids) > self.levels:
                texts.append((len(done.prompt_ids), [*done.prompt_ids, *done.token_ids]))
                overheads.append(done.stats.decode_seconds / done.stats.rounds - steps[-1])
        if not texts:
            raise EasySpecError(
                f"the target ends each of these texts within {self.levels} tokens; give other "
                "prompts to measure on"
            )
        return texts, float(np.median(steps)), max(0.0, float(np.median(overheads)))

    def verification(self, nodes: int) -> float:
        """Return the seconds of the target's pass over some nodes, including the root."""
        return self._seconds(
            pass_case("verification", self._target, nodes, run_exact, **self._lengths)
        )

    def step(self, draft: Draft, width: int) -> float:
        """See search.Bench. Infinite if the devices' memory does not suffice."""
        return self._draft_pass(draft, width, run_fuzzy, loops=LOOPS)

    def first(self, draft: Draft, tokens: int) -> float:
        """See search.Bench."""
        return self._draft_pass(draft, tokens, run_exact, scored=1)

    def acceptance(self, draft: Draft, width: int) -> dict[int, tuple[float, ...]]:
        """See search.Bench. Narrower trees are cut out of a wide one."""
        engine = self.with_draft(draft)
        model = engine.load()[1]
        assert model is not None
        widths = [narrower for narrower in self.widths if narrower <= width]
        seen = foresee(alone(engine.mesh, model), self.texts, self.levels, widths)
        for narrower, foresight in seen.items():
            self.early_ends[draft.drafting, narrower] = foresight.early_ends()
        return {narrower: foresight.accepted() for narrower, foresight in seen.items()}

    def with_draft(self, draft: Draft) -> Engine:
        """Return an engine whose draft is placed as asked."""
        if self._held is None or self._held[0] != draft:
            self._held = None  # frees the memory of the other draft first
            self._held = draft, self.engine.variant(draft.layout, draft.shape)
        return self._held[1]

    def release(self) -> None:
        """Free the memory of the draft that was used last."""
        self._held = None

    def _draft_pass(self, draft: Draft, *args: object, **options: int) -> float:
        try:
            engine = self.with_draft(draft)
            model = engine.load()[1]
            assert model is not None
            make = partial(pass_case, "draft", alone(engine.mesh, model))
            return self._seconds(make(*args, **options, **self._lengths))  # pyright: ignore[reportArgumentType]
        except jax.errors.JaxRuntimeError as error:
            # A draft that does not fit is not an error here: it loses against all others.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return float("inf")

    def _seconds(self, case: Case) -> float:
        """Return the seconds of a case, measured in plain steps.

        Machines drift, so samples alternate with plain steps; the median ratio times the seconds of
        a plain step is the result.
        """
        case.sample(1)  # compiles
        calls = _calls(case)
        begun, ratios = time.perf_counter(), []
        while len(ratios) < REPEATS and (
            len(ratios) < 3 or time.perf_counter() - begun < CASE_SECONDS
        ):
            # Neighbours in time share the machine's mood, so their ratio is steadier than either.
            ratios.append(case.sample(calls) / self._plain.sample(self._calls))
        return float(np.median(ratios)) * self.plain


def _calls(case: Case) -> int:
    """Return how many calls make a sample long enough."""
    begun = time.perf_counter()
    case.sample(1)
    return max(1, round(SAMPLE_SECONDS / (time.perf_counter() - begun)))
