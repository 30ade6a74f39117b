"""Bookkeeping is what a round takes beyond its passes."""

import json

import pytest

from experiments.bench.bench_round import main, tabulate


@pytest.mark.slow
def test_a_row_for_every_way_of_sampling(tmp_path, capsys):
    out = tmp_path / "bench_round.json"
    flags = ["--repeats", "2", "--tree-width", "2", "--lp-size", "2", "--verifiers", "coupled"]
    assert main([*flags, "--num-speculative-tokens", "2", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert [row["verifier"] for row in measured["results"]] == ["greedy", "coupled"]
    for row, shown in zip(measured["results"], tabulate(measured), strict=True):
        assert len(row["passes"]) == len(row["round"]) == 2
        shares = [1 - a / b for a, b in zip(row["passes"], row["round"], strict=True)]
        assert row["bookkeeping"] == pytest.approx(sum(shares) / 2)
        assert shown["ms a round"] == pytest.approx(500 * sum(row["round"]))
    assert "bookkeeping" in capsys.readouterr().out


def test_a_bad_destination_is_one_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out.txt")]) == 2
    assert "must be a .json file" in capsys.readouterr().err
