"""What the documents say was measured is what the results hold."""

import json
import re
from itertools import product
from pathlib import Path
from statistics import median

import pytest

import experiments
from easyspec_jax import demo
from experiments import draw_round

ROOT = Path(experiments.__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFIT = (ROOT / "docs" / "refit.md").read_text(encoding="utf-8")
CARD = (demo.TARGET.parent / "README.md").read_text(encoding="utf-8")


def rates(name):
    """Greedy acceptance of chains, by draft."""
    results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    chains = [row for row in results if row["temperature"] == 0 and row["tree_width"] == 1]
    return {row["draft"]: row["acceptance_rate"] for row in chains}


def test_the_readme_has_the_acceptance_that_was_measured():
    rows = re.findall(
        r"^\| (?:fuzzy, )?(exact|N = .*?) \| (\S*) ?\| (\S*) ?\|$", README, re.MULTILINE
    )
    assert len(rows) == 12
    for place, name, drafts in ((1, "acceptance_demo", 7), (2, "acceptance", 10)):
        told = {row[0]: row[place] for row in rows if row[place]}
        measured = rates(name)
        assert len(told) == drafts and told == {draft: f"{measured[draft]:.3f}" for draft in told}


def test_the_documents_have_the_acceptance_of_refits():
    results = json.loads((RESULTS / "acceptance.json").read_text())["results"]
    page = " ".join(REFIT.split())

    def told(refit, width, verifier):
        rows = [row for row in results if (row["tree_width"], row["verifier"]) == (width, verifier)]
        chosen = [
            row
            for row in rows
            if row["lp_size"] > 1 and row["calibration"] and row["refit"] == refit
        ]
        return " ".join(f"{row['acceptance_rate']:.3f}"[1:] for row in chosen)

    for width, verifier in product((1, 4), ("greedy", "coupled")):
        assert f"{told(False, width, verifier)} become {told(True, width, verifier)}" in page


def test_the_model_card_has_the_acceptance_that_was_measured():
    for draft, rate in rates("acceptance_demo").items():
        assert f"| {draft} | {rate:.3f} |" in CARD


@pytest.mark.parametrize(
    ("way", "row"),
    [
        ("easyspec, N = 4", "easyspec, N = 4"),
        ("sd", "an ordinary draft (`--method sd`)"),
        ("transformers", "transformers, plain"),
        ("transformers, assisted", "transformers, assisted generation"),
        ("llama.cpp", "llama.cpp, plain"),
        (
            "llama.cpp, drafts of 5",
            "llama.cpp, drafts of five by the same draft, through its Python hook",
        ),
    ],
)
def test_the_readme_has_the_speeds_that_were_measured(way, row):
    results = json.loads((RESULTS / "peers.json").read_text())["results"]
    (ratios,) = (result["over_plain"] for result in results if result["name"] == way)
    assert f"| {row} | {median(ratios):.2f} |" in README


def overlaps(name):
    """At each depth as the documents write it, by layers at once and whether with a refit."""
    results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    return {
        (row["lp_size"], row["refit"]): " ".join(f"{overlap:.3f}"[1:] for overlap in row["overlap"])
        for row in results
    }


def test_the_documents_have_what_refits_keep():
    six, unseen = overlaps("table4_smollm2"), overlaps("table4_smollm2_unseen")
    assert six.keys() == unseen.keys()
    for size in {size for size, _ in six}:
        cells = [found[size, refit] for found in (six, unseen) for refit in (False, True)]
        assert f"| {size} | {' | '.join(cells)} |" in REFIT


@pytest.mark.parametrize("name", ["table4_smollm2", "table4_smollm2_unseen"])
def test_refits_keep_what_they_are_for(name):
    """On prompts that no fit has seen."""
    results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    least = {4: (0.88, 0.85, 0.83, 0.81), 7: (0.84, 0.80, 0.76, 0.73), 14: (0.74, 0.65, 0.60, 0.57)}
    kept = {row["lp_size"]: row["overlap"] for row in results if row["refit"]}
    for size, floor in least.items():
        assert all(
            round(overlap, 3) >= asked for overlap, asked in zip(kept[size], floor, strict=True)
        )


def test_the_choice_of_tune_is_near_the_fastest():
    names = ("tune_check", "tune_check_smollm2")
    found = [json.loads((RESULTS / f"{name}.json").read_text())["results"] for name in names]
    assert [[row["mesh"] for row in rows] for rows in found] == [["1", "8"], ["1", "8"]]
    least = min(row["share_of_fastest"] for rows in found for row in rows)
    assert least >= 0.9 and f"at least {least:.2f} times as fast" in README
    assert max(row["seconds"] for rows in found for row in rows) < 180


def test_a_refit_of_the_bundled_draft_loses_at_most_half_as_much():
    """Where all drafts make the same texts; rejection makes other ones with each."""
    results = json.loads((RESULTS / "acceptance_demo_refit.json").read_text())["results"]
    same = [row for row in results if row["verifier"] != "rejection"]
    exact, plain, refit = (
        sum(row["acceptance_rate"] for row in same if row["draft"] == draft)
        for draft in ("exact", "N = 4", "N = 4, refit")
    )
    assert exact - refit <= (exact - plain) / 2
    for draft in ("exact", "N = 4", "N = 4, refit"):
        for row in results:
            assert row["draft"] != draft or f"{row['acceptance_rate']:.3f}"[1:] in REFIT


@pytest.mark.parametrize("name", ["table2", "table2_smollm2"])
def test_phases_make_up_a_round(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    assert max(abs(row.get("phases_over_round", 1) - 1) for row in results) < 0.2


def test_the_picture_is_of_the_round_that_is_drawn_today():
    shape = draw_round.Round(draw_round.paper_groups(12, 4), draw_round.parse_mesh("4", 4), 5)
    assert shape.title in (ROOT / "docs" / "round.svg").read_text(encoding="utf-8")


def test_the_documents_have_what_checkpoints_took():
    results = json.loads((RESULTS / "bench_checkpoints_7b.json").read_text())
    page = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    speeds = sorted(
        b["seconds"] / a["seconds"]
        for a, b in zip(results["convert"], results["copy"], strict=True)
    )
    assert f"held at most {results['convert_peak_bytes'] / 2**30:.2f} GiB" in page
    assert f"ran at {results['speed_over_copy']:.2f} of the speed of copying" in page
    assert "rounds of {:.2f}, {:.2f} and {:.2f}".format(*speeds) in page
    assert {f"{opened['over_weights']:.2f}" for opened in results["open"].values()} == {"1.04"}
    assert "held 1.04 times the weights" in page
