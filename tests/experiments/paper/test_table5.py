"""Rows agree with each other, and the same figures are the same picture."""

import json

import pytest

from experiments import draw
from experiments.paper.table5 import ATTENTION, EXACT, LAYERS, PLAIN, main
from tests.support.models import save_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The directory with the results of a tiny model that drafts for itself."""
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("table5")
    save_model(directory / "model", "smollm2")
    questions = directory / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "category": "qa", "turns": ["a fox"]}))
    model = str(directory / "model")
    assert (
        main(
            [
                "--target",
                model,
                "--draft",
                model,
                "--questions",
                str(questions),
                "--mesh",
                "2",
                "--platform",
                "cpu",
                "--lp-sizes",
                "2",
                "--tree-width",
                "1",
                "--num-speculative-tokens",
                "2",
                "--max-new-tokens",
                "8",
                "--repeats",
                "1",
                "--out",
                str(directory / "table5.json"),
            ]
        )
        == 0
    )
    return directory


@pytest.mark.exhaustive
def test_rows_agree_with_themselves(measured):
    plain, exact, attention, layers = json.loads((measured / "table5.json").read_text())["results"]
    assert [row["at_once"] for row in (plain, exact, attention, layers)] == [
        PLAIN,
        EXACT,
        ATTENTION,
        LAYERS,
    ]
    assert (plain["acceptance_rate"], plain["step_seconds"], plain["speedup"]) == (None, None, 1)
    assert exact["acceptance_rate"] == 1
    assert (attention["groups"], layers["groups"]) == ("0,1,2-3,4,5", "0,1,2-3x2,4,5")
    assert attention["groups"] != exact["groups"]
    for row in (exact, attention, layers):
        assert row["step_seconds"] > 0 < row["speedup"]
        assert 0 <= row["acceptance_rate"] <= 1 and row["refit"] is False


@pytest.mark.exhaustive
def test_the_same_results_are_the_same_picture(measured, tmp_path):
    again = tmp_path / "again.png"
    assert draw.main([str(measured / "table5.json"), "--out", str(again)]) == 0
    assert again.read_bytes() == (measured / "table5.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--questions", "absent.jsonl"], "--questions absent.jsonl cannot be read"),
        (["--out", "absent/table5.json"], "--out absent/table5.json must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "table5.json"), *arguments]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
