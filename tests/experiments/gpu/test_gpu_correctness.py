"""The check passes on the machine that it was stored for, and finds what is wrong."""

import json
from typing import Any

import numpy as np
import pytest

from easyspec_jax.parallel.mesh import MeshShape, open_mesh
from experiments.gpu import gpu_correctness, tiny_families
from experiments.gpu.gpu_correctness import EXPECTED, LARGEST_DIFFERENCE, WAYS, main


@pytest.fixture
def expected():
    return json.loads(EXPECTED.read_text())


@pytest.fixture
def check(tmp_path, monkeypatch, environment):
    """Return a function that compares plain decoding with given expectations."""

    def run(expected):
        path, out = tmp_path / "expected.json", tmp_path / "out.json"
        path.write_text(json.dumps(expected))
        monkeypatch.setattr(gpu_correctness, "EXPECTED", path)
        code = main(["--out", str(out), "--ways", "vanilla", "--max-new-tokens", "4"])
        return code, {row["check"]: row for row in json.loads(out.read_text())["results"]}

    return run


@pytest.mark.slow
def test_what_is_wrong_is_found(check, expected, capsys):
    expected["families"] = {"qwen3": expected["families"]["qwen3"]}
    code, rows = check(expected)
    assert code == 0
    assert all(row["passed"] for row in rows.values())
    assert rows["vanilla, greedy"]["equal"] == 3

    # No two logits tie where the text has a token that is unlikely.
    expected["texts"]["vanilla"]["greedy"][1][2] = 0
    expected["texts"]["vanilla"]["coupled"][0][3] = 0
    expected["families"]["qwen3"]["fuzzy"][0][0] += 2 * LARGEST_DIFFERENCE
    code, rows = check(expected)
    assert code == 1
    failed = {name for name, row in rows.items() if not row["passed"]}
    assert failed == {"vanilla, greedy", "vanilla, coupled", "qwen3, fuzzy"}
    (found,) = rows["vanilla, greedy"]["differences"]
    assert (found["prompt"], found["place"]) == (1, 2)
    assert found["logit_gap"] > gpu_correctness.LARGEST_GAP
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(("gap", "verifier", "passed"), [(5e-4, 0, True), (5e-4, 1, False)])
def test_only_greedy_texts_may_part_at_a_tie(gap, verifier, passed, monkeypatch):
    verifiers = ("greedy", "coupled")
    difference = {"prompt": 0, "place": 1, "logit_gap": gap}
    monkeypatch.setattr(
        gpu_correctness, "compared", lambda *_: {"texts": 1, "differences": [difference]}
    )
    name = verifiers[verifier]
    texts = {"vanilla": {name: [[1, 2, 3]]}}
    made = [("vanilla", name, [[1, 2]])]
    monkeypatch.setattr(gpu_correctness, "all_texts", lambda *_: made)
    pair: Any = None  # it is not asked for anything
    (row,) = gpu_correctness.check_texts(pair, texts, ["vanilla"], 2)
    assert row["passed"] == passed


def test_every_way_and_family_is_stored(expected):
    assert set(expected["texts"]) == set(WAYS)
    assert set(expected["families"]) == set(tiny_families.FAMILIES)
    for name, way in WAYS.items():
        assert tuple(expected["texts"][name]) == gpu_correctness.verifiers(way)
    # Drafts change neither greedy texts nor, by the coupled verifier, sampled ones.
    for verifier in ("greedy", "coupled"):
        texts = [own[verifier] for own in expected["texts"].values()]
        assert all(own == texts[0] for own in texts)
    for stored in expected["families"].values():
        assert np.shape(stored["exact"]) == (tiny_families.IDS.size, tiny_families.VOCAB)
        assert np.std(stored["exact"]) > 100 * LARGEST_DIFFERENCE
        # Groups change what the model computes, and by far more than rounding.
        difference = np.subtract(stored["exact"], stored["fuzzy"])
        assert np.max(np.abs(difference)) > 10 * LARGEST_DIFFERENCE


def test_a_tiny_family_has_the_stored_logits(expected):
    found = tiny_families.logits("smollm2", open_mesh(MeshShape(1, 1)))
    np.testing.assert_allclose(found["exact"], expected["families"]["smollm2"]["exact"], atol=1e-4)
