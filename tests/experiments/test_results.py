"""What the documents say was measured is what the results hold."""

import json
import re
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
    rows = re.findall(r"^\| (?:fuzzy, )?(exact|N = .*?) \| (\S+) \| (\S+) \|$", README, re.MULTILINE)
    assert len(rows) == 7
    pair, smollm2 = rates("acceptance_demo"), rates("acceptance")
    for draft, bundled, other in rows:
        assert bundled == f"{pair[draft]:.3f}"
        assert other == f"{smollm2[draft]:.3f}"
    for draft in ("N = 2", "N = 4", "N = 7"):
        rate = rates("acceptance_refit")[f"{draft}, refit"]
        assert f"| fuzzy, {draft}, refit with `--distill 60` | | {rate:.3f} |" in README


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
        ("llama.cpp, drafts of 5", "llama.cpp, drafts of five by the same draft, through its Python hook"),
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
        (row["lp_size"], row["refit"]): " ".join(f"{overlap:.3f}"[1:] for overlap in row["overlap"]) for row in results
    }


def test_the_documents_have_what_refits_keep():
    six, unseen = overlaps("table4_smollm2"), overlaps("table4_smollm2_unseen")
    assert six.keys() == unseen.keys()
    for size in {size for size, _ in six}:
        cells = [found[size, refit] for found in (six, unseen) for refit in (False, True)]
        assert f"| {size} | {' | '.join(cells)} |" in REFIT


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
    speeds = sorted(b["seconds"] / a["seconds"] for a, b in zip(results["convert"], results["copy"], strict=True))
    assert f"held at most {results['convert_peak_bytes'] / 2**30:.2f} GiB" in page
    assert f"ran at {results['speed_over_copy']:.2f} of the speed of copying" in page
    assert "rounds of {:.2f}, {:.2f} and {:.2f}".format(*speeds) in page
    assert {f"{opened['over_weights']:.2f}" for opened in results["open"].values()} == {"1.04"}
    assert "held 1.04 times the weights" in page
