"""Best-first search: measure next whatever would be fastest if its unknown figures were ideal."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from easyspec_jax.progress import Advance
from easyspec_jax.tune.candidates import Candidate, Draft
from easyspec_jax.tune.predict import (
    Figures,
    Prediction,
    pending_size,
    plain_tokens_per_second,
    predict,
)


class Bench(Protocol):
    """Measurements that the search can ask for; each takes seconds."""

    def verification(self, nodes: int) -> float:
        """Return the seconds of the target's pass over some nodes, including the root."""
        ...

    def step(self, draft: Draft, width: int) -> float:
        """Return the seconds of a fuzzy pass over some nodes, including their logits."""
        ...

    def first(self, draft: Draft, tokens: int) -> float:
        """Return the seconds of an exact pass over pending tokens, with the last one's logits."""
        ...

    def acceptance(self, draft: Draft, width: int) -> dict[int, tuple[float, ...]]:
        """Return the mean accepted tokens by number of levels.

        The result is by tree width: this one, and others that cost nothing extra.
        """
        ...


Clock = Callable[[], float]
"""Returns the share of the time for measuring that is used up."""

PLACING = 0.4
"""Share of the time after which only default placements are timed."""

SEARCHING = 0.6
"""Share of the time after which the search ends; the rest is for confirming."""

HOPELESS = 0.85
"""Share of plain decoding's speed. A candidate whose best possible speed is below it is not run."""


def search(
    candidates: Sequence[Candidate],
    figures: Figures,
    bench: Bench,
    finalists: int,
    clock: Clock,
    advance: Advance = lambda amount: None,
) -> list[Prediction]:
    """Find the candidates worth running.

    Args:
        candidates: All candidates.
        figures: Measurements so far; more are added.
        bench: Measures what is missing.
        finalists: How many predictions to return at most.
        clock: Tells how much of the time is used up.
        advance: Called after every measurement.

    Returns:
        Predictions, best first; no two differ only in their number of levels. Candidates that plain
        decoding beats for certain are left out. When time runs out, those whose acceptance is known
        come first.
    """
    time_steps(candidates, figures, bench, clock, advance)
    open_ = [candidate for candidate in candidates if figures.timed(candidate.draft)]
    settled: list[Prediction] = []
    while open_ and len(settled) < finalists:
        # Out of time, what is known counts more than what might be.
        late = clock() > SEARCHING
        predictions = (predict(figures, candidate) for candidate in open_)
        best = max(predictions, key=_known_first if late else _score)
        if best.score < HOPELESS * plain_tokens_per_second(figures):
            break
        # The best is only a guess while a figure is missing: measure it and look again.
        if best.missing and not late:
            measure(best, figures, bench, candidates)
            advance(1)
            continue
        settled.append(best)
        open_ = [
            candidate for candidate in open_ if not _same_but_for_levels(candidate, best.candidate)
        ]
    return sorted(settled, key=_known_first, reverse=True)


def _score(prediction: Prediction) -> float:
    return prediction.score


def _known_first(prediction: Prediction) -> tuple[bool, float]:
    return "acceptance" not in prediction.missing, prediction.score


def time_steps(
    candidates: Sequence[Candidate], figures: Figures, bench: Bench, clock: Clock, advance: Advance
) -> None:
    """Time a step of one token of every draft, as far as time allows.

    The default placement of each grouping comes first. Then come the drafts that differ least from
    the fastest one so far.
    """
    drafts = list(dict.fromkeys(candidate.draft for candidate in candidates))
    defaults = {draft.lp_size: draft for draft in reversed(drafts)}.values()
    # Position of each draft's split among the splits of its layout: 0 is the default.
    splits = {}
    for draft in drafts:
        shapes = [other.shape for other in drafts if other.layout == draft.layout]
        splits[draft] = shapes.index(draft.shape)

    def distance(one: Draft, other: Draft) -> int:
        """Count differences; another split of the mesh counts twice: it matters least."""
        tp = one.layout.draft_tensor_parallel_size != other.layout.draft_tensor_parallel_size
        return 2 * (splits[one] != splits[other]) + (one.drafting != other.drafting) + tp

    todo = [*defaults, *(draft for draft in drafts if draft not in defaults)]
    for number in range(len(todo)):
        if number >= len(defaults):
            fastest = min(figures.step, key=lambda draft: figures.step[draft][1])
            todo[number:] = sorted(todo[number:], key=lambda draft: distance(draft, fastest))
        if number and clock() > (PLACING if number >= len(defaults) else SEARCHING):
            return
        figures.step[todo[number]] = {1: bench.step(todo[number], 1)}
        advance(1)


def measure(
    best: Prediction, figures: Figures, bench: Bench, candidates: Sequence[Candidate]
) -> None:
    """Measure the first figure that a prediction lacks."""
    draft, speculative = best.candidate.draft, best.candidate.speculative
    width, phase = speculative.width, best.missing[0]
    levels = max(candidate.speculative.num_speculative_tokens for candidate in candidates)
    if phase == "step":
        figures.step[draft][width] = bench.step(draft, width)
    elif phase == "verification":
        larger = [
            size for size in verification_sizes(candidates) if size > max(figures.verification)
        ]
        figures.verification[larger[0]] = bench.verification(larger[0])
    elif phase == "acceptance":
        known = figures.acceptance.setdefault(draft.drafting, {})
        known |= bench.acceptance(draft, width)
    else:
        # The sizes for one level and for the most; all others are interpolated.
        sizes = {pending_size(replace(speculative, num_speculative_tokens=n)) for n in (1, levels)}
        figures.first[draft] = {size: bench.first(draft, size) for size in sorted(sizes)}


def verification_sizes(candidates: Sequence[Candidate]) -> list[int]:
    """Return numbers of nodes, up to a candidate's most, between which time is nearly linear."""
    most = max(1 + c.speculative.num_speculative_tokens * c.speculative.width for c in candidates)
    return sorted({size for size in (2, 5, 9, 17, 33) if size < most} | {most})


def _same_but_for_levels(one: Candidate, other: Candidate) -> bool:
    return one.draft == other.draft and one.speculative.width == other.speculative.width
