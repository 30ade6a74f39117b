"""Measured acceptance is read from two kinds of files, and extrapolated with care."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import MAX_LEVELS
from easyspec_jax.plan.acceptance import (
    Acceptance,
    DraftKind,
    MeasuredAcceptance,
    read_acceptance,
)

ROW = {
    "temperature": 0.0,
    "calibration": True,
    "tree_width": 1,
    "lp_size": 1,
    "refit": False,
    "groups": "0,1,2,3",
    "rounds": 10,
    "accepted_per_position": [8, 4, 2],
}

SPECULATIVE = {
    "method": "easyspec",
    "lp_size": 3,
    "mlp_lp_size": 2,
    "refit": "auto",
    "tree_width": 4,
}


def experiment(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"target": "T", "draft": "D", "results": [ROW | row for row in rows]}


def tuned(*candidates: dict[str, Any]) -> dict[str, Any]:
    return {"target": "T", "draft": "D", "candidates": list(candidates)}


def read(tmp_path: Path, content: Any, num_layers: int = 8) -> MeasuredAcceptance:
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(content))
    return read_acceptance(path, num_layers)


@pytest.mark.parametrize("levels", [1, 2, 5, 8, MAX_LEVELS])
@pytest.mark.parametrize("rate", [0.9, 0.5])
def test_a_constant_rate_is_a_geometric_series(rate, levels):
    """Five levels were measured, and the rest continues at the same rate."""
    measured = [sum(rate**n for n in range(1, depth + 1)) for depth in range(1, 6)]
    acceptance = Acceptance(tuple(measured))
    assert acceptance.rates == pytest.approx([rate] * 5)
    expected = rate * (1 - rate**levels) / (1 - rate)
    assert acceptance.mean_accepted(levels) == pytest.approx(expected)


def test_a_falling_rate_falls_on():
    acceptance = Acceptance.of_positions([100, 80, 48], rounds=100)
    assert acceptance.rates == pytest.approx([1, 0.8, 0.6])
    # .6 * .75 = .45, .45 * .75 = .3375
    expected = 2.28 + 0.48 * 0.45 + 0.48 * 0.45 * 0.3375
    assert acceptance.mean_accepted(5) == pytest.approx(expected)


def test_a_rising_rate_does_not_rise_on():
    acceptance = Acceptance.of_positions([50, 25, 20], rounds=100)
    assert acceptance.rates == pytest.approx([0.5, 0.5, 0.8])
    # The lower of .5 and .8 is kept.
    assert acceptance.mean_accepted(5) == pytest.approx(0.95 + 0.2 * (0.5 + 0.25))


def test_one_level_says_nothing_of_the_next():
    assert Acceptance((0.9,)).mean_accepted(MAX_LEVELS) == 0.9


@pytest.mark.parametrize(
    "accepted", [(0.0, 0.0), (0.5, 0.5), (0.8, 0.7), (0.5, 1.4), (1.0, 2.0), (0.5, 0.9, 1.3)]
)
def test_noisy_means_give_probabilities(accepted):
    acceptance = Acceptance(accepted)
    assert all(0 <= rate <= 1 for rate in acceptance.rates)
    means = [acceptance.mean_accepted(levels) for levels in range(1, MAX_LEVELS + 1)]
    assert means[: len(accepted)] == list(accepted)
    gains = [after - before for before, after in pairwise(means)]
    beyond = gains[len(accepted) - 1 :]
    assert all(0 <= gain <= 1 for gain in beyond)
    assert beyond == sorted(beyond, reverse=True)


def test_rows_of_the_experiment_that_a_plan_can_use(tmp_path):
    refit = {"lp_size": 4, "refit": True, "groups": "0,1-3x2,4-7x2", "tree_width": 4}
    found = read(
        tmp_path,
        experiment(
            {},
            {"temperature": 0.8, "tree_width": 2},
            {"lp_size": 2, "calibration": False},
            refit,
        ),
    )
    assert (found.file, found.target, found.draft) == ("acceptance.json", "T", "D")
    assert list(found.curves) == [(DraftKind(), 1), (DraftKind(4, 2, refit=True), 4)]
    assert found.curves[DraftKind(), 1].accepted == pytest.approx((0.8, 1.2, 1.4))
    assert [kind.label for kind in found.kinds] == ["exact", "N=4 M=2 refit"]
    assert found.tree_widths == [1, 4]


def test_older_files_of_the_experiment_have_no_refit(tmp_path):
    content = experiment({"lp_size": 2})
    del content["results"][0]["refit"]
    assert list(read(tmp_path, content).curves) == [(DraftKind(2), 1)]


def test_what_tune_printed(tmp_path):
    exact = SPECULATIVE | {"method": "sd", "tree_width": None}
    plain = SPECULATIVE | {"refit": "none", "mlp_lp_size": 1}
    found = read(
        tmp_path,
        tuned(
            {"speculative": exact, "accepted_by_levels": [0.8, 1.3]},
            {"speculative": SPECULATIVE, "accepted_by_levels": [0.7, 1.1]},
            {"speculative": SPECULATIVE, "accepted_by_levels": [0.7, 1.1]},
            {"speculative": plain, "accepted_by_levels": None},
        ),
    )
    assert found.curves == {
        (DraftKind(), 1): Acceptance((0.8, 1.3)),
        (DraftKind(3, 2, refit=True), 4): Acceptance((0.7, 1.1)),
    }


def test_groups_that_the_draft_cannot_have_are_left_out(tmp_path):
    found = read(tmp_path, experiment({}, {"lp_size": 7}), num_layers=6)
    assert found.kinds == [DraftKind()]
    assert found.left_out == [DraftKind(7)]


NEITHER = "is neither the JSON of experiments.acceptance nor what this version's tune --json prints"


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, NEITHER),
        ({"results": 3}, NEITHER),
        ({"results": [3]}, NEITHER),
        ({"results": [{"temperature": 0.0}]}, NEITHER),
        ({"results": [ROW]}, NEITHER),
        (experiment({"rounds": 0}), NEITHER),
        (experiment({"accepted_per_position": []}), NEITHER),
        (experiment({"accepted_per_position": [11]}), NEITHER),
        (experiment({"accepted_per_position": [1] * (MAX_LEVELS + 1)}), NEITHER),
        (experiment({"accepted_per_position": ["1"]}), NEITHER),
        (experiment({"tree_width": 0}), NEITHER),
        (experiment({"lp_size": "4"}), NEITHER),
        (tuned({"speculative": SPECULATIVE, "acceptance_rate": 0.8}), NEITHER),
        (tuned({"speculative": SPECULATIVE, "accepted_by_levels": [float("nan")]}), NEITHER),
        (experiment({"temperature": 0.8}), "has no acceptance of greedy decoding"),
        (tuned(), "has no acceptance of greedy decoding"),
        (experiment({"lp_size": 9}), "only groups of more layers than the draft's 8"),
    ],
)
def test_files_without_acceptance_are_refused(tmp_path, content, message):
    with pytest.raises(EasySpecError, match=rf"^`acceptance` .*acceptance\.json .*{message}"):
        read(tmp_path, content)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(EasySpecError, match=r"^`acceptance` .*none\.json does not exist$"):
        read_acceptance(tmp_path / "none.json", 8)
    (tmp_path / "text").write_text("not JSON")
    with pytest.raises(EasySpecError, match="cannot be read as JSON"):
        read_acceptance(tmp_path / "text", 8)
