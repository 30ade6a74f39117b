"""Times add up, sizes are interpolated, and what was not measured is as good as it can be."""

from dataclasses import replace

import pytest

from easyspec_jax.options import DraftTensorParallelSize, SpeculativeConfig
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.tune.candidates import Candidate
from easyspec_jax.tune.predict import SLACK, Figures, frontier, plain_tokens_per_second, predict

SHAPE = MeshShape(2, 1)


def fuzzy(
    levels: int, width: int = 1, lp_size: int = 2, tp: DraftTensorParallelSize = "all"
) -> Candidate:
    speculative = SpeculativeConfig(
        num_speculative_tokens=levels,
        tree_width=width,
        lp_size=lp_size,
        draft_tensor_parallel_size=tp,
    )
    return Candidate(SHAPE, speculative)


def ordinary(levels: int) -> Candidate:
    return Candidate(SHAPE, SpeculativeConfig(method="sd", num_speculative_tokens=levels))


@pytest.fixture
def figures() -> Figures:
    return Figures(plain=10.0, overhead=0.5, verification={2: 10.0, 4: 12.0, 8: 16.0, 16: 32.0})


def test_a_round_is_its_passes(figures):
    draft = fuzzy(3).draft
    figures.step[draft] = {1: 1.0}
    figures.first[draft] = {2: 3.0, 6: 5.0}
    figures.acceptance[draft.drafting] = {1: (0.8, 1.4, 1.9)}
    found = predict(figures, fuzzy(3))
    assert found.missing == ()
    # 4 pending tokens, 2 more levels, 4 nodes
    assert (found.first, found.step, found.verification, found.overhead) == (4.0, 1.0, 12.0, 0.5)
    assert found.seconds == 4.0 + 2 * 1.0 + 12.0 + 0.5
    assert found.tokens_per_second == (1 + 1.9) / found.seconds
    assert predict(figures, fuzzy(2)).tokens_per_second == (1 + 1.4) / (3.5 + 1.0 + 11.0 + 0.5)
    assert plain_tokens_per_second(figures) == 1 / 10.5


def test_trees_verify_all_their_nodes(figures):
    draft = fuzzy(3, 4).draft
    figures.step[draft] = {1: 1.0, 5: 3.0}
    assert predict(figures, fuzzy(3, 4)).verification == pytest.approx(26.0)  # 13 nodes
    assert predict(figures, fuzzy(3, 4)).step == 2.5
    assert "step" not in predict(figures, fuzzy(3, 4)).missing
    assert predict(figures, fuzzy(3, 8)).step == 3.0  # of the widest that is known
    assert "step" in predict(figures, fuzzy(3, 8)).missing


def test_an_ordinary_draft_has_no_pass_of_its_own_to_calibrate(figures):
    draft = ordinary(3).draft
    figures.step[draft] = {1: 1.0, 4: 4.0}
    figures.acceptance[draft.drafting] = {1: (1.0, 2.0, 3.0)}
    found = predict(figures, ordinary(3))
    assert found.missing == ()
    assert found.first == 2.0  # two tokens may be pending


def test_what_is_unknown_is_as_good_as_it_can_be(figures):
    found = predict(figures, fuzzy(3))
    assert found.missing == ("step", "acceptance", "first")
    assert (found.first, found.step, found.accepted) == (0.0, 0.0, 3)
    figures.step[fuzzy(3).draft] = {1: 1.0}
    assert predict(figures, fuzzy(3)).first == 1.0  # an exact pass is no faster than a fuzzy one
    assert predict(figures, fuzzy(3)).score == predict(figures, fuzzy(3)).tokens_per_second / SLACK


def test_exact_passes_of_drafts_that_are_placed_alike_bound_each_other(figures):
    figures.first[fuzzy(3).draft] = {2: 8.0, 6: 8.0}
    assert predict(figures, fuzzy(3, lp_size=4)).first == 8.0 / SLACK
    assert predict(figures, fuzzy(3, lp_size=4, tp="1")).first == 0.0


def test_smaller_groups_and_wider_trees_bound_acceptance(figures):
    narrow = fuzzy(3, lp_size=2).draft.drafting
    figures.acceptance[narrow] = {4: (0.5, 0.8, 0.9)}
    assert predict(figures, fuzzy(3, 1, lp_size=4)).accepted == 0.9 * SLACK
    assert predict(figures, fuzzy(3, 4, lp_size=4)).accepted == 0.9 * SLACK
    assert predict(figures, fuzzy(3, 8, lp_size=4)).accepted == 3
    assert predict(figures, ordinary(3)).accepted == 3
    figures.acceptance[ordinary(3).draft.drafting] = {4: (0.4, 0.5, 0.6)}
    assert predict(figures, fuzzy(3, 1, lp_size=4)).accepted == 0.6 * SLACK


def test_a_refit_is_not_bounded_by_what_has_none(figures):
    def with_refit(lp_size: int, mlp_lp_size: int, refit: str) -> Candidate:
        return Candidate(
            SHAPE,
            replace(fuzzy(1).speculative, lp_size=lp_size, mlp_lp_size=mlp_lp_size, refit=refit),
        )

    figures.acceptance[with_refit(2, 1, "none").draft.drafting] = {1: (0.5,)}
    assert predict(figures, with_refit(4, 1, "none")).accepted == 0.5 * SLACK
    assert predict(figures, with_refit(2, 2, "none")).accepted == 0.5 * SLACK
    assert predict(figures, with_refit(4, 1, "auto")).accepted == 1


def test_acceptance_does_not_depend_on_the_placement(figures):
    figures.acceptance[fuzzy(3).draft.drafting] = {1: (0.1, 0.2, 0.3)}
    elsewhere = Candidate(MeshShape(1, 2), fuzzy(3, tp="1").speculative)
    assert predict(figures, elsewhere).accepted == 0.3
    assert "acceptance" not in predict(figures, elsewhere).missing


def test_frontier():
    points = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6), (1.0, 0.4), (1.0, 0.5), (0.5, 0.9)]
    assert frontier(points[:5], [True] * 5) == [True, True, False, False, True]
    assert frontier(points, [True] * 5 + [False]) == [True, True, False, False, True, False]
    assert frontier(points, [True] * 6) == [False] * 5 + [True]


def test_larger_trees_take_at_least_what_a_straight_line_says(figures):
    found = predict(figures, fuzzy(5, 4))
    assert "verification" in found.missing
    assert found.verification == 32.0 + 5 * 2.0  # 21 nodes
    assert "verification" not in predict(figures, fuzzy(3, 5)).missing
    flat = Figures(1.0, 0.0, {2: 5.0, 4: 4.0})
    assert predict(flat, fuzzy(5, 4)).verification == 4.0  # noise makes no pass faster


def test_one_size_of_verification_is_enough_for_chains_of_one(figures):
    """With `--max-levels 1 --tree-widths 1` all rounds have two nodes."""
    assert predict(replace(figures, verification={2: 7.0}), fuzzy(1)).verification == 7.0
