"""There is a row for every pair and way, and a truncated draft has the first layers."""

import json

import pytest

from easyspec_jax import demo
from easyspec_jax.checkpoint.directory import open_checkpoint
from experiments import draw
from experiments.paper.table8 import main, truncated
from tests.support.models import save_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The directory with the results of a tiny model that drafts for itself."""
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("table8")
    save_model(directory / "model", "smollm2")
    questions = directory / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "category": "qa", "turns": ["a fox"]}))
    model = str(directory / "model")
    assert (
        main(
            [
                "--pairs",
                model,
                model,
                "--questions",
                str(questions),
                "--platform",
                "cpu",
                "--lp-size",
                "2",
                "--tree-width",
                "2",
                "--num-speculative-tokens",
                "2",
                "--max-new-tokens",
                "8",
                "--out",
                str(directory / "table8.json"),
            ]
        )
        == 0
    )
    return directory


def test_rows_agree_with_themselves(measured):
    rows = json.loads((measured / "table8.json").read_text())["results"]
    assert [row["way"] for row in rows] == ["one device", "sd", "tree", "easyspec"]
    plain, exact, _, fuzzy = rows
    assert (plain["speedup"], plain["acceptance_rate"]) == (1, None)
    assert exact["acceptance_rate"] == 1 and 0 <= fuzzy["acceptance_rate"] <= 1
    assert {(row["target"], row["draft"], row["lp_size"]) for row in rows} == {
        ("model", "model", 2)
    }


def test_a_truncated_draft_has_the_first_layers(tmp_path):
    short = open_checkpoint(truncated(demo.TARGET, 3, tmp_path / "short"))
    assert (
        short.config.num_hidden_layers == 3 < open_checkpoint(demo.TARGET).config.num_hidden_layers
    )


def test_the_same_results_are_the_same_picture(measured, tmp_path):
    again = tmp_path / "again.png"
    assert draw.main([str(measured / "table8.json"), "--out", str(again)]) == 0
    assert again.read_bytes() == (measured / "table8.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pairs", "alone"], "a target and a draft for each pair; one directory is left over"),
        (["--questions", "absent.jsonl"], "--questions absent.jsonl cannot be read"),
        (["--out", "absent/table8.json"], "--out absent/table8.json must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "table8.json"), *arguments]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
