"""Planted faults are found; a small run finds none."""

import json

import pytest

from experiments import draw
from experiments.endurance import load

ROW = {
    "clients": 8,
    "seconds": 60.0,
    "answers": {"right": 90, "left": 9, "refused": 5, "status 429": 3},
    "tokens_per_second": 100.0,
    "first_token_median": 0.1,
    "first_token_p95": 0.4,
    "rows_taken_after": 0.0,
    "resident_bytes": 2**30,
}
END = {"sent": 8, "under_way": 8.0, "right": 8, "exit": 0}


def test_a_run_without_a_fault_is_good():
    assert load.is_good([ROW], END)


@pytest.mark.parametrize("what", ["wrong", "status 500", "no answer: ConnectionResetError"])
def test_planted_answers_are_found(what):
    assert not load.is_good([ROW | {"answers": ROW["answers"] | {what: 1}}], END)


@pytest.mark.parametrize("planted", [{"right": 7}, {"exit": 1}])
def test_an_answer_that_sigterm_loses_is_found(planted):
    assert not load.is_good([ROW], END | planted)


def test_a_row_that_stays_taken_is_found():
    assert not load.is_good([ROW | {"rows_taken_after": 1.0}], END)


def test_memory_that_grows_is_found():
    assert load.is_good([ROW, ROW | {"resident_bytes": 1.04 * 2**30}], END)
    assert not load.is_good([ROW, ROW | {"resident_bytes": 1.06 * 2**30}], END)


def test_levels_of_load_are_tabulated():
    (row,) = load.tabulate({"results": [ROW]})
    assert (row["clients"], row["texts"], row["wrong"], row["memory, MiB"]) == (8, 90, 0, 1024)


def test_the_same_figures_are_the_same_picture(tmp_path):
    pytest.importorskip("matplotlib")
    measured = {"batch_size": 4, "texts": 90, "wrong": 0, "results": [ROW, ROW | {"clients": 32}]}
    path = tmp_path / "load.json"
    path.write_text(json.dumps(measured))
    assert draw.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes() == load.draw(measured)
