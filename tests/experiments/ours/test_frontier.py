"""Every layout is measured by itself and beside its refit, and the picture can be drawn again."""

import json

import pytest

from easyspec_jax.refit.__main__ import main as refit
from experiments import draw
from experiments.ours import frontier
from tests.support.models import save_model

STRATEGIES = ("0,1-2,3", "0,1-2x2,3")


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    directory = tmp_path_factory.mktemp("frontier")
    save_model(directory / "draft", "smollm2", num_hidden_layers=4)
    (directory / "prompts.txt").write_text("a fox\n")
    return directory


def flags(directory, *strategies) -> list[str]:
    prompts = ["--prompts", str(directory / "prompts.txt"), "--max-new-tokens", "10"]
    return [
        "--draft",
        str(directory / "draft"),
        *prompts,
        "--lp-strategies",
        *(strategies or STRATEGIES),
    ]


@pytest.mark.exhaustive
def test_every_layout_and_those_that_have_a_refit_with_it(draft, tmp_path):
    pytest.importorskip("matplotlib")
    for strategy in STRATEGIES[1:]:
        made = ["--tokens", "1000", "--lp-strategy", strategy, "--out", str(tmp_path / "refit")]
        assert refit(["--draft", str(draft / "draft"), *made]) == 0
    out = tmp_path / "frontier.json"
    assert (
        frontier.main([*flags(draft), "--refit", str(tmp_path / "refit"), "--out", str(out)]) == 0
    )
    rows = json.loads(out.read_text())["results"]
    counted = [
        (row["refit"], row["collectives"], row["sequential_mlps"], row["groups"]) for row in rows
    ]
    assert counted == [
        (False, 7, 4, "0,1-2,3"),
        (False, 6, 3, "0,1-2x2,3"),
        (True, 6, 3, "0,1-2x2,3"),
    ]
    assert len({tuple(row["overlap"]) for row in rows}) == 3, "refits must matter"
    again = tmp_path / "again.png"
    assert draw.main([str(out), "--out", str(again)]) == 0
    assert again.read_bytes() == out.with_suffix(".png").read_bytes()


def test_a_layout_that_another_beats_is_not_on_the_line():
    def row(collectives, *overlap):
        return {"collectives": collectives, "overlap": overlap}

    rows = [row(10, 0.5, 0.4), row(12, 0.4, 0.45), row(14, 0.9, 0.8), row(14, 0.7, 0.9)]
    assert frontier.frontier(rows, 0) == [(10, 0.5), (14, 0.9)]
    assert frontier.frontier(rows, 1) == [(10, 0.4), (12, 0.45), (14, 0.9)]


def test_the_paper_s_groups_are_the_default():
    found = frontier.default_strategies(6)
    assert found[:2] == ["0,1,2-3,4,5", "0,1,2-3x2,4,5"]
    assert len(found) == len(set(found)) == 7


@pytest.mark.parametrize(
    ("strategies", "complaint"),
    [
        (["0,1,2,3"], "in groups of one layer nothing is fuzzy"),
        (["0,1-2"], "leaves out layer 3"),
        (["0,1-2,3", "--refit", "nowhere"], "--refit nowhere has none for these layouts"),
        (["0,1-2,3", "--out", "absent/frontier.json"], "must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(draft, strategies, complaint, capsys):
    assert frontier.main(flags(draft, *strategies)) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
