"""The committed results show what the documents claim of them."""

import json

import pytest

from experiments.lib.output import RESULTS
from experiments.page import ROOT
from experiments.paper import round_picture


def rows(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


@pytest.mark.parametrize("name", ["table4_smollm2", "table4_smollm2_unseen"])
def test_refits_keep_what_they_are_for(name):
    """On prompts that no fit has seen."""
    least = {4: (0.88, 0.85, 0.83, 0.81), 7: (0.84, 0.80, 0.76, 0.73), 14: (0.74, 0.65, 0.60, 0.57)}
    kept = {row["lp_size"]: row["overlap"] for row in rows(name) if row["refit"]}
    for size, floor in least.items():
        for overlap, asked in zip(kept[size], floor, strict=True):
            assert round(overlap, 3) >= asked


@pytest.mark.parametrize("name", ["tune_check", "tune_check_smollm2"])
def test_the_choice_of_tune_is_near_the_fastest(name):
    assert [row["mesh"] for row in rows(name)] == ["1", "8"]
    assert min(row["share_of_fastest"] for row in rows(name)) >= 0.9
    assert max(row["seconds"] for row in rows(name)) < 180


def test_a_refit_of_the_bundled_draft_loses_at_most_half_as_much():
    """Where all drafts make the same texts; by rejection each makes texts of its own."""
    same = [row for row in rows("acceptance_demo_refit") if row["verifier"] != "rejection"]
    exact, plain, refit = (
        sum(row["acceptance_rate"] for row in same if row["draft"] == draft)
        for draft in ("exact", "N = 4", "N = 4, refit")
    )
    assert exact - refit <= (exact - plain) / 2


@pytest.mark.parametrize("name", ["table2", "table2_smollm2"])
def test_phases_make_up_a_round(name):
    assert max(abs(row.get("phases_over_round", 1) - 1) for row in rows(name)) < 0.2


def test_opening_a_checkpoint_holds_little_more_than_the_weights():
    measured = json.loads((RESULTS / "bench_checkpoints_7b.json").read_text())
    assert max(opened["over_weights"] for opened in measured["open"].values()) < 1.05


def test_the_picture_is_of_the_round_that_is_drawn_today():
    mesh = round_picture.parse_mesh("4", 4)
    shape = round_picture.Round(round_picture.paper_groups(12, 4), mesh, 5)
    assert shape.title in (ROOT / "docs" / "round.svg").read_text(encoding="utf-8")
