"""A draft step between two processes and in one; the same figures are the same picture."""

import json
import os

import pytest

from experiments import draw
from experiments.endurance.two_processes import main
from tests.support.models import save_model


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores",
)
def test_both_processes_take_every_step(tmp_path):
    pytest.importorskip("matplotlib")
    model, out = tmp_path / "model", tmp_path / "two_processes.json"
    save_model(model, "llama3")
    flags = ["--target", str(model), "--draft", str(model), "--lp-sizes", "2", "--context", "16"]
    assert main([*flags, "--repeats", "2", "--calls", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    ways = ["a copy on each", "TP", "N = 2, a copy on each", "N = 2, TP"]
    assert [(row["processes"], row["way"]) for row in rows] == [
        (count, way) for count in (2, 1) for way in ways
    ]
    for row in rows:
        assert row["step_seconds"] > 0
        assert (row["time_of_tp"] == 1) == (row["way"] == "TP")
    of_two = {row["way"]: row["collectives"] for row in rows[: len(ways)]}
    assert of_two["a copy on each"] == 0 < of_two["N = 2, TP"] < of_two["TP"]
    again = tmp_path / "again.png"
    assert draw.main([str(out), "--out", str(again)]) == 0
    assert again.read_bytes() == out.with_suffix(".png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--calls", "0"], "--context must be at least 1"),
        (
            ["--out", "absent/two_processes.json"],
            "--out absent/two_processes.json must be a .json file",
        ),
        (["--draft", "absent"], "absent"),
    ],
)
def test_bad_arguments_are_one_line(flags, complaint, capfd):
    assert main(flags) == 2
    printed = capfd.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
