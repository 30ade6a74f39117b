"""The comparison finds planted faults; a small job survives a kill."""

import json
from random import Random

import pytest

from easyspec_jax import SamplingParams
from easyspec_jax.cli.job_lines import read_items
from experiments.endurance.kill_check import differences, main, moments, waits, write_job

IDS = ["a", "b", "c"]


def records(texts, seconds=1.0):
    lines = [
        {"id": name, "text": text, "stats": {"rounds": 2, "decode_seconds": seconds}}
        for name, text in texts
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


WHOLE = [("b", "two"), ("a", "one"), ("c", "three")]


def test_order_and_timings_are_no_difference():
    found = differences(IDS, records(WHOLE), records(WHOLE[::-1], seconds=2.0))
    assert found == {"lost": 0, "doubled": 0, "different": 0, "equal": True}


@pytest.mark.parametrize(
    ("fault", "killed"),
    [
        ("lost", WHOLE[:-1]),
        ("doubled", [*WHOLE, WHOLE[0]]),
        ("different", [*WHOLE[:-1], ("c", "tree")]),
        ("different", [*WHOLE, ("d", "four")]),
    ],
)
def test_planted_faults_are_found(fault, killed):
    found = differences(IDS, records(WHOLE), records(killed))
    assert found[fault] > 0
    assert not found["equal"]


def test_a_line_that_both_lost_is_missed():
    found = differences(IDS, records(WHOLE[1:]), records(WHOLE[1:]))
    assert found["lost"] == 1
    assert not found["equal"]


def test_the_job_is_varied_and_without_errors(tmp_path):
    ids = write_job(tmp_path / "in.jsonl", 60, Random(1))
    items = read_items((tmp_path / "in.jsonl").read_bytes(), SamplingParams())
    assert [item.id for item in items] == ids
    samplings = [
        item.sampling for item in items if item.sampling is not None and item.error is None
    ]
    assert len(samplings) == len(items)
    assert all(8 <= sampling.max_new_tokens <= 24 for sampling in samplings)
    assert {sampling.temperature for sampling in samplings} == {0.0, 0.8, 1.0}
    assert len({len(str(item.prompt)) for item in items}) > 20


def test_moments_lie_in_both_phases_and_leave_work():
    kills = moments(20, Random(0))
    assert sum(growing for _, growing in kills) == 15
    left = [500]
    for (_, growing), wait in zip(kills, waits(kills, 5.0, lambda: left[-1]), strict=True):
        assert wait < (left[-1] if growing else 5.0)
        left.append(left[-1] - growing * (int(wait) + 3))  # a batch may add more before the kill
    assert 0 < left[-1] < 350


@pytest.mark.exhaustive
def test_a_small_job_survives_a_kill(tmp_path, capsys):
    out = tmp_path / "kill_check.json"
    command = ["--lines", "12", "--kills", "1", "--batch-size", "2", "--out", str(out)]
    codes = (main(command) for _ in range(3))
    # 2: the kill came too late, after the job was done. 1: the outputs differ; never tried again.
    assert next((code for code in codes if code != 2), 2) == 0, capsys.readouterr().err
    measured = json.loads(out.read_text())
    assert measured["equal"] and len(measured["results"]) == 2
    assert sum(row["added"] for row in measured["results"]) == 12
    assert main(["--kills", "0", "--out", str(out)]) == 2
    assert "--kills 0 must be at least 1" in capsys.readouterr().err
