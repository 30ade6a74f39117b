"""Estimated speeds count tokens and draft steps of a round; texts stay those of plain decoding."""

import json

import pytest

from experiments.ours.early_end import main, speed, tabulate
from tests.support.models import save_model


def row(levels: int, threshold: float, length: float, steps: float) -> dict[str, float]:
    counts = {"mean_acceptance_length": length, "acceptance_rate": 0.5}
    counts |= {"drafted": 10 * (steps + 1), "rounds": 10}
    return {"temperature": 0.0, "levels": levels, "confidence_threshold": threshold} | counts


def test_speeds_are_over_the_best_fixed_number_of_levels():
    rows = [row(2, 0.0, 2.0, 1.0), row(9, 0.0, 4.0, 8.0), row(9, 0.3, 3.0, 2.0)]
    assert speed(rows[2], 0.1) == 3.0 / 1.2
    cells = [each["estimate, step = 0.2"] for each in tabulate({"results": rows})]
    # 2 / 1.2, 4 / 2.6 and 3 / 1.4, over the first of them
    assert cells == ["1.00", "0.92", "1.29"]


@pytest.mark.slow
def test_drafts_end_early_and_leave_the_text_alone(tmp_path):
    save_model(tmp_path / "model", "smollm2", num_hidden_layers=2)
    out = tmp_path / "early_end.json"
    words = ["--target", str(tmp_path / "model"), "--draft", str(tmp_path / "model")]
    words += ["--levels", "4", "--lp-size", "1", "--prompts", "2", "--max-new-tokens", "30"]
    words += ["--batch-size", "2", "--out", str(out)]
    assert main([*words, "--thresholds", "0.2"]) == 0
    whole, early = json.loads(out.read_text())["results"]
    assert whole["equals_plain"] and early["equals_plain"]
    assert early["steps"] < whole["steps"] == 3
    assert early["acceptance_rate"] == whole["acceptance_rate"] == 1.0
    assert main([*words, "--thresholds", "0"]) == 2
