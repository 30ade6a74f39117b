"""What tune chooses beside everything that it could have chosen."""

import json

import pytest

from experiments.ours.tune_check import draw, main
from tests.support.models import save_model


@pytest.mark.exhaustive
def test_the_choice_is_run_beside_the_best_of_the_sweep(tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "found.json"
    save_model(model, "llama3", vocab_size=260, eos_token_id=3, num_hidden_layers=4)
    small = [
        "--lp-sizes",
        "1",
        "3",
        "--tree-widths",
        "1",
        "--levels",
        "2",
        "--mlp-lp-sizes",
        "1",
        "--times",
        "1",
    ]
    flags = [
        "--target",
        str(model),
        "--draft",
        str(model),
        "--meshes",
        "2",
        "--best",
        "1",
        "--max-new-tokens",
        "8",
    ]
    assert main([*flags, *small, "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    (row,) = measured["results"]
    assert (
        row["candidates"] == len(row["gains"]) == 6
    )  # drafts in order and in groups, on each split, shared or not
    assert row["choice"] in row["speeds"] and row["fastest"] in row["speeds"]
    assert 1 < len(row["speeds"]) <= 3
    assert row["speeds"][row["fastest"]] == max(row["speeds"].values())
    assert (
        row["share_of_fastest"] == row["speeds"][row["choice"]] / row["speeds"][row["fastest"]] <= 1
    )
    assert (
        row["choice_over_plain"] == row["speeds"][row["choice"]] / row["speeds"]["plain decoding"]
    )
    assert out.with_suffix(".png").read_bytes() == draw(measured)
    assert f"{row['share_of_fastest']:.2f}" in capsys.readouterr().out
