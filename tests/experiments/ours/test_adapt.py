"""The adaptive speed is compared with the best fixed one of each kind of prompts."""

import json

import pytest

from experiments.ours.adapt import main, over_best
from tests.support.models import save_model


def test_each_kind_has_its_own_best():
    speeds = {
        "prose": {"plain": [1.0, 1.0], "5 levels": [0.5, 0.6], "adaptive": [0.98, 0.98]},
        "code": {"plain": [1.0, 1.0], "5 levels": [2.0, 2.0], "adaptive": [1.9, 1.9]},
    }
    rows = [
        {"way": way, "kind": kind, "over_plain": ratios}
        for kind, ways in speeds.items()
        for way, ratios in ways.items()
    ]
    assert over_best(rows) == {"": "adaptive over the best fixed", "prose": "0.98", "code": "0.95"}


@pytest.mark.slow
def test_every_way_gives_the_same_texts(tmp_path):
    save_model(tmp_path / "model", "smollm2", num_hidden_layers=2)
    question = {"question_id": 1, "category": "copies", "turns": ["one two one two"]}
    (tmp_path / "questions").write_text(json.dumps(question))
    out = tmp_path / "adapt.json"
    words = ["--target", str(tmp_path / "model"), "--questions", str(tmp_path / "questions")]
    words += ["--method", "ngram", "--levels", "3", "--max-new-tokens", "30", "--out", str(out)]
    assert main([*words, "--repeats", "1", "--temperature", "0.8"]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["way"] for row in rows] == ["plain", "3 levels", "adaptive"]
    assert all(row["same_tokens"] for row in rows)
    assert main([*words, "--repeats", "0"]) == 2
    assert main([*words, "--processes", "2"]) == 2
    assert main([*words, "--prompt-lookup"]) == 2


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path):
    """Each has its own clock; texts would part, or one would wait forever, if they did not."""
    for role, layers in (("target", 2), ("draft", 4)):
        save_model(tmp_path / role, "smollm2", num_hidden_layers=layers)
    question = {"question_id": 1, "category": "copies", "turns": ["one two one two"]}
    (tmp_path / "questions").write_text(json.dumps(question))
    out = tmp_path / "adapt.json"
    words = [f"--{role}={tmp_path / role}" for role in ("target", "draft")]
    words += ["--questions", str(tmp_path / "questions"), "--method", "easyspec", "--lp-size", "2"]
    words += ["--levels", "6", "--max-new-tokens", "60", "--confidence-threshold", "auto"]
    words += ["--prompt-lookup", "--prompt-lookup-min", "1"]
    words += ["--repeats", "2", "--mesh", "2", "--processes", "2", "--out", str(out)]
    assert main(words) == 0
    measured = json.loads(out.read_text())
    assert all(row["same_tokens"] for row in measured["results"])
    ways = [row["way"] for row in measured["results"]]
    assert ways == ["plain", "6 levels", "lookups alone", "adaptive"]
    assert measured["processes"] == 2 and measured["confidence_threshold"] == "auto"
    assert "core" not in measured
