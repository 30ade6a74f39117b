"""The grid is complete, and what is written agrees with itself."""

import json
import shlex
from dataclasses import astuple

import pytest

from easyspec_jax.refit.__main__ import main as refit
from experiments import draw
from experiments.ours import acceptance
from experiments.ours.acceptance import main, variants
from tests.support.models import save_model

PAIR = ("rejection", "coupled")


def test_every_variant_of_the_grid_comes_once():
    grid = variants((0.0, 0.8), PAIR, (1, 4), (1, 2, 3))
    ways = [(0.0, "greedy"), (0.8, "rejection"), (0.8, "coupled")]
    drafts = [
        (1, True, False),
        *((size, calibrated, False) for size in (2, 3) for calibrated in (True, False)),
    ]
    assert [astuple(variant) for variant in grid] == [
        (*way, width, *draft) for way in ways for width in (1, 4) for draft in drafts
    ]
    assert variants((0.0, 0.8, 0.8), PAIR * 2, (1, 4, 1), (1, 2, 3, 2)) == grid
    refit = [
        variant for variant in variants((0.0,), PAIR, (1,), (1, 2, 3), {3, 4}) if variant.refit
    ]
    assert [(variant.lp_size, variant.calibration) for variant in refit] == [(3, True)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A directory with the results of three variants of a tiny model that drafts for itself."""
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("acceptance")
    save_model(directory / "model", "smollm2")
    few = [
        "--lp-size",
        "2",
        "--tokens",
        "1000",
        "--borders",
        "paper",
        "--out",
        str(directory / "refit"),
    ]
    assert refit(["--draft", str(directory / "model"), *few]) == 0
    (directory / "prompts.txt").write_text("one\ntwo\n")
    pair = ["--target", str(directory / "model"), "--draft", str(directory / "model")]
    texts = [
        "--prompt-file",
        str(directory / "prompts.txt"),
        "--max-new-tokens",
        "12",
        "--batch-size",
        "2",
    ]
    grid = [
        "--widths",
        "2",
        "--lp-sizes",
        "2",
        "--temperatures",
        "0",
        "0.8",
        "--verifiers",
        "coupled",
        "--refit",
        str(directory / "refit"),
    ]
    assert (
        main([*pair, *texts, *grid, "--num-speculative-tokens", "2", "--out", str(directory)]) == 0
    )
    return directory


def test_rows_agree_with_themselves(measured):
    results = json.loads((measured / "acceptance.json").read_text())["results"]
    drafts = ["N = 2", "N = 2, no calibration", "N = 2, refit"]
    assert [row["draft"] for row in results] == 2 * drafts
    for row in results:
        assert row["groups"] == "0,1,2-3,4,5"
        assert row["accepted"] == sum(row["accepted_per_position"])
        assert 0 < row["accepted"] <= row["drafted"] <= 2 * row["rounds"]
        assert row["acceptance_rate"] == row["accepted"] / row["drafted"]
        assert row["mean_acceptance_length"] == 1 + row["accepted"] / row["rounds"]
        assert row["equals_plain"]
    assert not list(measured.glob("*.partial"))


def test_a_run_is_resumed(measured, monkeypatch):
    """Rows that are there stay; the others are measured, and all come in the grid's order."""
    whole = json.loads((measured / "acceptance.json").read_text())
    command = shlex.split(whole["command"])[3:]
    command[command.index("model")] = command[command.index("model")] = str(measured / "model")
    command[command.index("prompts.txt")] = str(measured / "prompts.txt")
    command[command.index("refit")] = str(measured / "refit")
    first, *rest = whole["results"]
    part = measured / "part.json"
    part.write_text(json.dumps(whole | {"results": [first | {"rounds": 1000}, *rest[1:]]}))
    calls = []
    completed = acceptance.complete
    monkeypatch.setattr(
        acceptance, "complete", lambda *args: calls.append(args) or completed(*args)
    )
    assert main([*command, "--resume", "--out", str(part)]) == 0
    assert len(calls) == 2  # plain decoding, and the one variant that was missing
    again = json.loads(part.read_text())
    assert again["results"] == [first | {"rounds": 1000}, *rest]
    assert again["command"] == whole["command"]


def test_rows_of_other_settings_are_not_mixed(measured, monkeypatch, capsys):
    monkeypatch.setattr(acceptance, "complete", lambda *_: pytest.fail("measured"))
    pair = ["--target", str(measured / "model"), "--draft", str(measured / "model")]
    before = (measured / "acceptance.json").read_bytes()
    out = ["--resume", "--out", str(measured / "acceptance.json")]
    assert main([*pair, *out, "--num-speculative-tokens", "3"]) == 2
    error = capsys.readouterr().err
    assert "was measured with num_speculative_tokens 2, not 3; give another --out" in error
    texts = ["--prompt-file", str(measured / "prompts.txt"), "--num-speculative-tokens", "2"]
    command = shlex.split(json.loads(before)["command"])
    length = [*command[command.index("--max-new-tokens") :][:2], "--batch-size", "2"]
    assert main([*pair, *out, *texts, *length, "--widths", "1", "--lp-sizes", "1"]) == 2
    error = capsys.readouterr().err
    assert "these flags leave out; name all of them, or give another --out" in error
    assert (measured / "acceptance.json").read_bytes() == before


def test_missing_refits_are_noticed_before_anything_is_measured(measured, monkeypatch, capsys):
    monkeypatch.setattr(acceptance, "complete", lambda *_: pytest.fail("measured"))
    pair = ["--target", str(measured / "model"), "--draft", str(measured / "model")]
    out = ["--out", str(measured / "other.json")]
    assert main([*pair, *out, "--lp-sizes", "1", "3", "--refit", str(measured / "refit")]) == 2
    assert "has no refit for any of --lp-sizes" in capsys.readouterr().err
    assert not (measured / "other.json").exists()


def test_the_same_results_are_the_same_picture(measured, tmp_path):
    again = tmp_path / "again.png"
    assert draw.main([str(measured / "acceptance.json"), "--out", str(again)]) == 0
    assert again.read_bytes() == (measured / "acceptance.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--widths", "1", "65"], "`tree_width` 65 must be from 1 to 64"),
        (["--lp-sizes", "0"], "`lp_size` 0 must be at least 1"),
        (["--temperatures", "-1"], "`temperature` -1.0 must be 0 (greedy)"),
        (["--verifiers", "typical"], "invalid choice: 'typical'"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--out", "absent/acceptance.json"], "--out absent/acceptance.json must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("experiments.acceptance: error: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}", "is not a results file of an experiment"),
        ('{"results": 1}', "is not a results file of an experiment"),
        ("nothing", "cannot be read as JSON"),
    ],
)
def test_what_is_no_result_is_not_drawn(content, complaint, tmp_path, capsys):
    path = tmp_path / "acceptance.json"
    path.write_text(content)
    assert draw.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_losses_are_against_the_exact_draft():
    common = {"temperature": 0.0, "tree_width": 1, "calibration": True, "refit": False}
    rows = [
        common | {"lp_size": 1, "acceptance_rate": 0.75},
        common | {"lp_size": 2, "acceptance_rate": 0.5},
        common | {"lp_size": 2, "acceptance_rate": 0.625, "refit": True},
        common | {"lp_size": 2, "acceptance_rate": 0.1, "temperature": 0.8},
        common | {"lp_size": 1, "acceptance_rate": 0.875, "tree_width": 4},
    ]
    exact, pair, exact_tree, _ = acceptance.tabulate({"results": rows})
    assert exact["α, calibrated"] == 0.75 and exact["α, refit"] is None
    assert (exact["width"], exact_tree["width"], exact_tree["α, calibrated"]) == (1, 4, 0.875)
    assert (pair["loss, calibrated"], pair["loss, refit"]) == (0.25, 0.125)
