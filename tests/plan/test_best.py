"""The best depth follows from what a level costs and what it yields."""

from dataclasses import replace

import pytest

from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.options import MAX_LEVELS
from easyspec_jax.plan.acceptance import Acceptance, DraftKind, MeasuredAcceptance
from easyspec_jax.plan.best import Choice, choices, fastest, find_best
from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.machines import parse_topology
from easyspec_jax.plan.steps import Round, Way
from tests.support.plans import UNIT, absent, pair

HALF = Acceptance((0.5, 0.75))
"""Every level is accepted with probability 1/2 if the one above was."""


def depths(step: int, acceptance: Acceptance = HALF, memory: int = 0) -> list[Choice]:
    """Return the choices if a round takes 10 seconds, and `step` more for each level."""
    counted = [Round(Cost(kernels=10 + step * n), memory) for n in range(1, MAX_LEVELS + 1)]
    return choices(Way("sd"), 1, acceptance, counted, UNIT)


def test_speeds_are_tokens_over_seconds():
    for levels, choice in enumerate(depths(step=2), start=1):
        assert choice.levels == levels
        assert choice.extrapolated == (levels > 2)
        assert choice.tokens == pytest.approx(2 - 0.5**levels)  # 1 + 1/2 + 1/4 + …
        assert choice.seconds == 10 + 2 * levels
        assert choice.tokens_per_second == pytest.approx(choice.tokens / choice.seconds)


def test_free_levels_go_deepest_and_dear_ones_shallow():
    best = [fastest(depths(step)).levels for step in (0, 1, 2, 5, 100)]
    assert best[0] == MAX_LEVELS
    assert best[-1] == 1
    assert best == sorted(best, reverse=True)
    assert len(set(best)) > 2


def test_of_equally_fast_depths_the_shallowest_is_chosen():
    assert fastest(depths(step=0, acceptance=Acceptance((0.5, 0.5, 0.5)))).levels == 1


def test_what_does_not_fit_comes_last():
    small, large = depths(step=50, memory=10)[0], depths(step=0, memory=11)[-1]
    assert (small.fits, large.fits) == (True, False)
    assert large.tokens_per_second > small.tokens_per_second
    assert fastest([large, small]) is small
    assert fastest([large]) is large


@pytest.mark.slow
def test_only_what_was_measured_is_compared():
    curves = {
        (DraftKind(), 1): HALF,
        (DraftKind(), 2): HALF,
        (DraftKind(4), 1): HALF,
        (DraftKind(4, 2, refit=True), 1): HALF,
    }
    best = find_best(pair(), MeasuredAcceptance("f", "T", "D", curves), absent, UNIT)
    found = {(choice.way, choice.tree_width) for choice in best.choices}
    assert found == {
        (Way("sd", 1, "1"), 1),
        (Way("sd", 1, "all"), 1),
        (Way("tree", 1, "1"), 2),
        (Way("tree", 1, "all"), 2),
        (Way("easyspec", 4, "1"), 1),
        (Way("easyspec", 4, "all"), 1),
        # MLPs at once save collectives, of which a replicated draft has none.
        (Way("easyspec", 4, "all", 2, refit=True), 1),
    }
    ranks = [choice.rank for choice in best.choices]
    assert ranks == sorted(ranks, reverse=True)
    assert best.at_levels.levels == pair().num_speculative_tokens
    assert all(len(by_depth) == MAX_LEVELS for by_depth in best.by_depth)
    # As the speeds were made up alike, the cheapest round is the fastest at the same depth.
    alike = [by_depth[best.at_levels.levels - 1] for by_depth in best.by_depth]
    assert best.at_levels.seconds == min(choice.seconds for choice in alike)


def test_one_device_has_one_placement():
    alone = replace(pair(), mesh="1")
    measured = MeasuredAcceptance("f", "T", "D", {(DraftKind(), 1): HALF})
    machine = parse_topology("cpu:1").machine
    best = find_best(alone, measured, lambda shape: absent_mesh(shape, "cpu"), machine)
    assert [choice.way for choice in best.choices] == [Way("sd", 1, "all")]
    assert best.at_levels.fits is None
