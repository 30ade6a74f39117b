"""Rows agree with each other, and the same figures are the same picture."""

import json
import os

import pytest

from experiments import draw
from experiments.paper.table2 import ONE_DEVICE, TENSOR_PARALLEL, apart, main
from tests.support.models import save_model

QUESTIONS = [
    {"question_id": 1, "category": "qa", "turns": ["a fox"]},
    {"question_id": 2, "category": "qa", "turns": ["and a dog"]},
    {"question_id": 3, "category": "rag", "turns": ["a much shorter fox"]},
]
WAYS = ["+sd", "+tree", "EasySpec, N = 3", "EasySpec, N = 3, refit"]


def command(directory, *words):
    """The flags for a tiny model in this directory, which drafts for itself on two devices."""
    save_model(directory / "model", "smollm2")
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    models = ["--target", str(directory / "model"), "--draft", str(directory / "model")]
    paths = ["--questions", str(directory / "questions.jsonl"), "--out", f"{directory}/table2.json"]
    drafts = "--lp-size 3 --tree-width 2 --num-speculative-tokens 2 --max-new-tokens 10"
    platform = "--mesh 2 --platform cpu --temperatures 0"
    return [*models, *paths, *drafts.split(), *platform.split(), *words]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The directory with the results of a tiny model that drafts for itself."""
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("table2")
    words = ["--profile-phases", "--repeats", "2", "--fit-tokens", "1000"]
    assert main(command(directory, *words)) == 0
    return directory


def test_rows_agree_with_themselves(measured):
    rows = json.loads((measured / "table2.json").read_text())["results"]
    names = [ONE_DEVICE, TENSOR_PARALLEL, *WAYS]
    assert [(row["set"], row["way"]) for row in rows] == [
        (name, way) for name in ("qa", "rag") for way in names
    ]
    for row in rows:
        assert row["prompts"] == (2 if row["set"] == "qa" else 1)
        assert row["seconds_per_100_tokens"] > 0
        if row["way"] == ONE_DEVICE:
            assert (row["speedup"], row["speedup_deviation"]) == (1, 0)
        if row["way"] in WAYS:
            passes = (row["drafting"] + row["verification"]) / row["seconds_per_100_tokens"]
            assert row["drafting"] > 0 < row["verification"]
            # With two repeats, the medians of the phases and of their sum are means.
            assert passes == pytest.approx(row["phases_over_round"])
            assert 0 < row["acceptance_rate"] <= 1
        else:
            assert "drafting" not in row and row["acceptance_rate"] is None
            assert row["rounds_per_100_tokens"] == 100
        if row["prompts"] == 1:
            assert (
                row["seconds_per_100_tokens_deviation"]
                == 0
                == (row["acceptance_rate_deviation"] or 0)
            )
        else:
            assert row["seconds_per_100_tokens_deviation"] > 0
    exact = next(row for row in rows if row["way"] == "+sd")
    assert (exact["acceptance_rate"], exact["acceptance_rate_deviation"]) == (1, 0)
    assert exact["rounds_per_100_tokens"] == pytest.approx(100 / 3)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores",
)
@pytest.mark.exhaustive
def test_a_process_for_every_device(tmp_path):
    pytest.importorskip("matplotlib")
    words = ["--processes", "2", "--per-set", "1", "--profile-phases", "--repeats", "2"]
    assert main(command(tmp_path, *words)) == 0
    rows = json.loads((tmp_path / "table2.json").read_text())["results"]
    ways = [ONE_DEVICE, TENSOR_PARALLEL, "+sd", "+tree", "EasySpec, N = 3"]
    assert sorted({row["way"] for row in rows}) == sorted(ways)
    assert len(rows) == 2 * len(ways)
    plain = {row["set"]: row for row in rows if row["way"] == ONE_DEVICE}
    for row in rows:
        assert row["prompts"] == 1
        seconds = plain[row["set"]]["seconds_per_100_tokens"]
        assert row["speedup"] == seconds / row["seconds_per_100_tokens"]
        assert row["speedup_deviation"] is None
        assert ("drafting" in row) == (row["way"] not in (ONE_DEVICE, TENSOR_PARALLEL))


def test_phases_that_do_not_make_a_round_are_told():
    common = {"temperature": 0.0, "way": "+sd"}
    near, far, unprofiled = (
        common | {"phases_over_round": 1.15},
        common | {"phases_over_round": 0.75},
        common,
    )
    assert apart([near, unprofiled], "cpu") == []
    (line,) = apart([far, far], "cpu")
    assert "+sd, T = 0: phases take 0.75 of the round" in line and "20%" in line
    assert len(apart([near], "gpu")) == 1


def test_the_same_results_are_the_same_picture(measured, tmp_path):
    again = tmp_path / "again.png"
    assert draw.main([str(measured / "table2.json"), "--out", str(again)]) == 0
    assert again.read_bytes() == (measured / "table2.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tree-width", "65"], "--tree-width 65 must be from 1 to 64"),
        (["--questions", "absent.jsonl"], "--questions absent.jsonl cannot be read"),
        (
            ["--refit", "there", "--fit-tokens", "1000"],
            "--fit-tokens: not allowed with argument --refit",
        ),
        (["--out", "absent/table2.json"], "--out absent/table2.json must be a .json file"),
        (["--processes", "2"], "--processes 2 needs --mesh 2"),
        (["--per-set", "0"], "--per-set 0 must be at least 1"),
        (["--temperatures", "-1"], "`temperature` -1.0 must be 0 (greedy)"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
