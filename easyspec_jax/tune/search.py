"""Best first: whatever would be the fastest if its unmeasured figures were as good as they can be is measured next."""

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
    """Measurements on offer, each at a cost of seconds."""

    def verification(self, nodes: int) -> float:
        """Seconds of the target's pass over some nodes, the root included."""
        ...

    def step(self, draft: Draft, width: int) -> float:
        """Seconds of a fuzzy pass over some nodes, their logits included."""
        ...

    def first(self, draft: Draft, tokens: int) -> float:
        """Seconds of an exact pass over some pending tokens, the last one's logits included."""
        ...

    def acceptance(self, draft: Draft, width: int) -> dict[int, tuple[float, ...]]:
        """For this tree width, and others where they cost nothing, the mean accepted tokens by number of levels."""
        ...


Clock = Callable[[], float]
"""The share of the time for measuring that is over."""

PLACING, SEARCHING = 0.4, 0.6
"""By which share of the time other placements than the default, and the search, must be over; then comes confirming."""

HOPELESS = 0.85
"""Candidates below this share of plain decoding's speed, even at best, are not run."""


def search(
    candidates: Sequence[Candidate],
    figures: Figures,
    bench: Bench,
    finalists: int,
    clock: Clock,
    advance: Advance = lambda amount: None,
) -> list[Prediction]:
    """The predictions to confirm, best first: no two differ in their number of levels alone.

    figures grows with what is measured. There may be fewer than `finalists`: those that plain decoding beats for sure
    are left out. Out of time, candidates whose acceptance is known come first.
    """
    time_steps(candidates, figures, bench, clock, advance)
    # What was not reached stays out: it would look as fast as light.
    open_ = [candidate for candidate in candidates if candidate.draft in figures.step]
    settled: list[Prediction] = []
    while open_ and len(settled) < finalists:
        late = clock() > SEARCHING
        predictions = (predict(figures, candidate) for candidate in open_)
        best = max(predictions, key=_known_first if late else _score)
        if best.score < HOPELESS * plain_tokens_per_second(figures):
            break
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
    """Times a step of one token of every draft: first the placement that is the default of each grouping, then what
    differs least from the fastest so far, because time may not suffice for all.
    """
    drafts = list(dict.fromkeys(candidate.draft for candidate in candidates))
    defaults = {draft.lp_size: draft for draft in reversed(drafts)}.values()
    splits = {
        draft: [d.shape for d in drafts if d.layout == draft.layout].index(draft.shape)
        for draft in drafts
    }

    def distance(one: Draft, other: Draft) -> int:
        """Other splits of the mesh come last, because they matter least; each grouping has a default of its own."""
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
    """Measures the first figure that a prediction lacks."""
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
        # Two sizes, between which every number of levels lies.
        sizes = {pending_size(replace(speculative, num_speculative_tokens=n)) for n in (1, levels)}
        figures.first[draft] = {size: bench.first(draft, size) for size in sorted(sizes)}


def verification_sizes(candidates: Sequence[Candidate]) -> list[int]:
    """Numbers of nodes between which times are straight enough, up to the most of a candidate."""
    most = max(1 + c.speculative.num_speculative_tokens * c.speculative.width for c in candidates)
    return sorted({size for size in (2, 5, 9, 17, 33) if size < most} | {most})


def _same_but_for_levels(one: Candidate, other: Candidate) -> bool:
    return one.draft == other.draft and one.speculative.width == other.speculative.width
