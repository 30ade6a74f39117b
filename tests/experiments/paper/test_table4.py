"""The table has a row for every way that is asked for."""

import json

import pytest

from experiments import draw
from experiments.paper import table4
from tests.support.models import save_model


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """Save a draft of four layers, the middle ones of which may run at once, and a prompt."""
    directory = tmp_path_factory.mktemp("table4")
    save_model(directory / "draft", "smollm2", num_hidden_layers=4)
    (directory / "prompts.txt").write_text("a fox\n")
    return directory


def flags(directory) -> list[str]:
    prompts = ["--prompts", str(directory / "prompts.txt"), "--max-new-tokens", "10"]
    return ["--draft", str(directory / "draft"), *prompts]


def test_the_table_has_every_way(draft, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "table4.json"
    assert table4.main([*flags(draft), "--lp-sizes", "3", "4", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    # Two collectives for each layer alone; a group's one, and one for each MLP.
    found = [(row["lp_size"], row["groups"], row["collectives"]) for row in rows]
    assert found == [(3, "0,1-2,3", 7), (4, "0,1-2,3", 7)]
    again = tmp_path / "again.png"
    assert draw.main([str(out), "--out", str(again)]) == 0
    assert again.read_bytes() == out.with_suffix(".png").read_bytes()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--lp-sizes", "1"], "in groups of one layer nothing is fuzzy"),
        (["--lp-sizes", "3", "--refit", "nowhere"], "--refit nowhere has no lp3.safetensors"),
        (["--prompts", "absent.txt"], "--prompt-file absent.txt cannot be read"),
        (["--out", "absent/table4.json"], "must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(draft, arguments, complaint, capsys):
    assert table4.main([*flags(draft), *arguments]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
