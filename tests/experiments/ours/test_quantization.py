"""Perplexity agrees with transformers', and the rows say what was rounded."""

import json

import numpy as np
import pytest
import torch

from convert.converting import ConvertConfig, convert
from easyspec_jax import SpeculativeConfig, open_model
from experiments.ours import quantization
from experiments.ours.quantization import CHUNK, Types, main, perplexity
from tests.support.models import save_model

VANILLA = SpeculativeConfig(method="vanilla")


def test_perplexity_is_that_of_transformers(tmp_path):
    reference = save_model(tmp_path, "smollm2")
    ids = np.random.default_rng(0).integers(0, 300, 2 * CHUNK + 1).astype(np.int32)
    with torch.no_grad():
        logits = reference(torch.from_numpy(ids[None, :-1]).long()).logits[0]
        following = torch.from_numpy(ids[1:]).long()
        expected = torch.exp(torch.nn.functional.cross_entropy(logits, following)).item()
    assert perplexity(open_model(tmp_path, speculative=VANILLA), ids) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.exhaustive
def test_every_kind_of_types_has_a_row(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model", "smollm2")
    (tmp_path / "text").write_text("a quick brown fox " * 20)
    (tmp_path / "prompts").write_text("a fox\nthe\n")
    kinds = [Types(), Types("int4"), Types("int4", calibrated=True), Types("int4", "int8")]
    monkeypatch.setattr(quantization, "KINDS", kinds)
    model = str(tmp_path / "model")
    words = ["--target", model, "--draft", model, "--text", str(tmp_path / "text")]
    words += ["--prompt-file", str(tmp_path / "prompts"), "--max-new-tokens", "8"]
    out = tmp_path / "quantization.json"
    assert main([*words, "--out", str(out), "--lp-size", "2"]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["label"] for row in rows] == ["as they are", "int4", "int4, int8 caches"]
    assert rows[0]["over_floats"] == 1 and rows[1]["perplexity"] != rows[0]["perplexity"]
    for row in rows:
        assert row["equals_plain"] and row.get("both_equals_plain", True)
        assert 0 <= row["draft_acceptance_rate"] <= 1
    assert "int4, int8 caches" in capsys.readouterr().out
    assert main([*words, "--out", str(out), "--lp-size", "2", "--only", "int4"]) == 0
    again = json.loads(out.read_text())["results"]
    assert [row["label"] for row in again] == [row["label"] for row in rows]
    assert again[0] == rows[0] and again[1]["over_floats"] == pytest.approx(rows[1]["over_floats"])
    floats = tmp_path / "floats.json"
    own = ["--out", str(floats), "--lp-size", "2", "--dequantize", "--only", "int4"]
    assert main([*words, *own]) == 0
    (row,) = json.loads(floats.read_text())["results"]
    assert row["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-4)
    assert row["both_acceptance_rate"] == rows[1]["both_acceptance_rate"]
    convert(tmp_path / "model", tmp_path / "int4", ConvertConfig(weights="int4"))
    calibrated = ["--calibrated", *2 * [str(tmp_path / "int4")], "--lp-size", "2"]
    assert main([*words, "--out", str(out), *calibrated, "--only", "int4, calibrated"]) == 0
    again = {row["label"]: row for row in json.loads(out.read_text())["results"]}
    assert list(again) == ["as they are", "int4", "int4, calibrated", "int4, int8 caches"]
    found, plain = again["int4, calibrated"], again["int4"]
    assert found["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert found["both_acceptance_rate"] == plain["both_acceptance_rate"]
    assert found["draft_acceptance_rate"] == plain["draft_acceptance_rate"]
    assert main([*words, "--out", str(out), "--only", "int4, calibrated"]) == 2
    assert "--only 'int4, calibrated' needs --calibrated" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--lp-size", "1", "--only", "int4"]) == 2
    assert "was measured with lp_size 2, not 1; give another --out" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--tokens", "5"]) == 2
    assert "give more than 128" in capsys.readouterr().err
