"""A second turn is answered with and without the store of prefixes."""

import json

import pytest

from experiments.ours.second_turn import main, tabulate


@pytest.mark.exhaustive
def test_the_store_has_the_first_turn(tmp_path, capsys):
    out = tmp_path / "second_turn.json"
    flags = ["--tokens", "200", "--max-new-tokens", "8", "--repeats", "2", "--out", str(out)]
    flags += ["--temperatures", "0", "1"]
    assert main(flags) == 0
    measured = json.loads(out.read_text())
    assert [row["temperature"] for row in measured["results"]] == [0, 1, 0, 1]
    for row in measured["results"]:
        assert row["same_tokens"]
        assert 150 < row["cached_tokens"] < row["tokens"] < 300
    for shown, temperature in zip(tabulate(measured), "01", strict=True):
        assert (shown["temperature"], shown["same tokens"]) == (temperature, "2 of 2")
        assert shown["of them cached"] > 150
    assert "share" in capsys.readouterr().out


def test_a_bad_destination_is_one_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out.txt")]) == 2
    assert "must be a .json file" in capsys.readouterr().err
