"""The search finds what an exhaustive one finds, and measures less."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import pytest

from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.tune.candidates import Candidate, Draft, Space, candidates
from easyspec_jax.tune.predict import SLACK, Figures, predict
from easyspec_jax.tune.search import measure, search
from easyspec_jax.tune.tuning import rows

LEVELS, WIDTHS = 6, (1, 4)


@dataclass
class Planted:
    """Figures by formula: larger groups are faster but see less far, and a layer axis helps.

    likely: probability that a level of an ordinary draft passes if the one above it did.
    """

    likely: float = 0.9
    loss: float = 0.03
    calls: list[tuple[str, Any, int]] = field(default_factory=list)

    def verification(self, nodes: int) -> float:
        self.calls.append(("verification", None, nodes))
        return max(10.0, 6.0 + nodes)

    def step(self, draft: Draft, width: int) -> float:
        self.calls.append(("step", draft, width))
        slow = 2.0 if draft.layout.draft_tensor_parallel_size == "1" else 1.0
        layers = (2.0 + 1.0 / draft.layout.mlp_lp_size) / draft.lp_size
        return slow * (0.5 + layers + 0.5 / draft.shape.layer) * (1 + 0.05 * width)

    def first(self, draft: Draft, tokens: int) -> float:
        self.calls.append(("first", draft, tokens))
        slow = 2.0 if draft.layout.draft_tensor_parallel_size == "1" else 1.0
        return slow * (4.0 + 0.1 * tokens + 0.2 * draft.shape.layer)

    def acceptance(self, draft: Draft, width: int) -> dict[int, tuple[float, ...]]:
        self.calls.append(("acceptance", draft, width))
        stale = draft.lp_size + draft.layout.mlp_lp_size - 2
        rate = self.likely - self.loss * stale + 0.02 * (width - 1)
        return {width: tuple(sum(rate**i for i in range(1, n + 1)) for n in range(1, LEVELS + 1))}


def figures() -> Figures:
    return Figures(plain=9.0, overhead=0.0, verification={2: 10.0, 5: 11.0})


def ways(mlp_lp_sizes: Sequence[int]) -> list[Candidate]:
    return candidates("8", 12, Space([1, 2, 3, 4, 7], WIDTHS, LEVELS, mlp_lp_sizes=mlp_lp_sizes))


@pytest.fixture
def found():
    return ways([1])


def exhaustive(found, bench) -> tuple[Figures, int]:
    """Everything measured, and with how many calls."""
    known = figures()
    for candidate in found:
        known.step.setdefault(candidate.draft, {1: bench.step(candidate.draft, 1)})
        while (prediction := predict(known, candidate)).missing:
            measure(prediction, known, bench, found)
    return known, len(bench.calls)


@pytest.mark.slow
@pytest.mark.parametrize("mlp_lp_sizes", [[1], [1, 2]])
@pytest.mark.parametrize("likely, loss", [(0.9, 0.03), (0.6, 0.02), (0.5, 0.1), (0.95, 0.0)])
def test_the_best_is_found_with_fewer_measurements(likely, loss, mlp_lp_sizes):
    found = ways(mlp_lp_sizes)
    everything, calls = exhaustive(found, Planted(likely, loss))
    truth = max(predict(everything, candidate).tokens_per_second for candidate in found)
    bench = Planted(likely, loss)
    best = search(found, figures(), bench, 3, clock=lambda: 0.0)
    assert best[0].tokens_per_second >= truth / SLACK
    assert best[0].missing == ()
    assert len(bench.calls) < calls / 2
    assert len(set(bench.calls)) == len(bench.calls)


def test_finalists_differ_in_more_than_levels(found):
    best = search(found, figures(), Planted(), 4, clock=lambda: 0.0)
    assert len({(p.candidate.draft, p.candidate.speculative.width) for p in best}) == 4
    assert [p.score for p in best] == sorted((p.score for p in best), reverse=True)


def test_hopeless_candidates_are_neither_measured_nor_run(found):
    slow = Figures(plain=0.5, overhead=0.0, verification={2: 10.0, 5: 11.0})
    bench = Planted()
    assert search(found, slow, bench, 3, clock=lambda: 0.0) == []
    assert {phase for phase, *_ in bench.calls} == {"step"}


def test_out_of_time_what_is_known_comes_first(found):
    bench = Planted()
    best = search(found, figures(), bench, 3, clock=lambda: len(bench.calls) / 40)
    assert len(bench.calls) == 25
    known = ["acceptance" not in prediction.missing for prediction in best]
    assert known[0]
    assert known == sorted(known, reverse=True)


def test_one_draft_is_timed_whatever_the_time(found):
    bench = Planted()
    (only,) = search(found, figures(), bench, 1, clock=lambda: 1.0)
    assert [(phase, draft) for phase, draft, _ in bench.calls] == [("step", only.candidate.draft)]


def test_the_default_placements_come_first_and_then_neighbours_of_the_fastest(found):
    bench = Planted()
    search(found, figures(), bench, 1, clock=lambda: 0.0)
    steps = [draft for phase, draft, width in bench.calls if phase == "step" and width == 1]
    default = steps[:5]
    assert {draft.layout.draft_tensor_parallel_size for draft in default} == {"all"}
    assert [draft.shape for draft in default if draft.layout.lp_size == 7] == [MeshShape(4, 2)]
    # Groups of 7 are the fastest.
    assert (steps[5].layout.lp_size, steps[5].shape) == (7, MeshShape(4, 2))
    assert steps[5].layout.draft_tensor_parallel_size == "1"
    assert len(set(steps[:10])) == 10
    assert {draft.drafting for draft in steps[5:10]} == {
        draft.drafting for draft in default
    }  # then other splits
    assert len(set(steps)) == len(steps) == len({candidate.draft for candidate in found})


def test_a_draft_that_does_not_fit_is_no_candidate(found):
    """Its step time is infinite, and a round of one level has no such step: 0 * inf is NaN."""

    class Crowded(Planted):
        def step(self, draft, width):
            seconds = super().step(draft, width)
            return float("inf") if draft.lp_size > 1 else seconds

    known = figures()
    best = search(found, known, Crowded(), 4, clock=lambda: 0.0)
    assert best and all(prediction.candidate.draft.lp_size == 1 for prediction in best)
    listed = rows(found, known, {})
    assert {row.prediction.candidate.draft.lp_size for row in listed} == {1}
    assert all(isfinite(row.prediction.tokens_per_second) for row in listed)
