"""Steps are timed at every length that fits, both ways, and memory is what was predicted."""

import json

import pytest

from easyspec_jax.decode.programs import Programs
from experiments.ours import context_length
from tests.support.helpers import sizes_read


@pytest.mark.slow
def test_every_length_is_timed_both_ways(tmp_path, capsys, monkeypatch):
    sizes = sizes_read(monkeypatch)
    out = tmp_path / "lengths.json"
    words = ["--capacities", "1024", "--lengths", "100", "5000", "--repeats", "2"]
    assert context_length.main([*words, "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    rows = measured["results"]
    # 5000 tokens do not fit; the longest text that does is always there.
    assert [(row["kind"], row["tokens"]) for row in rows] == [
        *(("step", tokens) for tokens in (100, 1022)),
        *(("round", tokens) for tokens in (100, 1017)),
    ]
    assert all(len(row[way]) == 2 for row in rows for way in ("parts", "whole"))
    assert sizes == {512, 1024}
    for memory in measured["memory"]:
        assert 1 <= memory["predicted"] / memory["bytes"] < 1.1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "over reading all" in capsys.readouterr().out


def test_a_text_has_the_length_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(Programs, "round", lambda self, state: (state, None))
    own = context_length.bench(levels=0, capacity=256)
    state = context_length.at_length(own.parts, 256, 77)
    assert state.length.tolist() == state.draft_length.tolist() == [77]
    assert own.job.tokens == 254
