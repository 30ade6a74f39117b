"""The time until a server is ready, with and without compiled programs."""

import json

import pytest

from experiments.endurance.ready import main, tabulate

ROWS = [
    {"cache": cache, "seconds": seconds, "loading_seconds": 1.0, "compiling_seconds": seconds - 3}
    for cache, seconds in (("empty", 30.0), ("full", 8.0), ("empty", 34.0), ("full", 10.0))
]


def test_medians_of_each_cache():
    empty, full = tabulate({"results": ROWS})
    assert (empty["ready after, s"], empty["compiling, s"], empty["starts"]) == (32, 29, 2)
    assert (full["ready after, s"], full["loading, s"]) == (9, 1)


def test_a_bad_destination_is_one_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out.txt")]) == 2
    assert "must be a .json file" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_full_cache_saves_compilation(tmp_path):
    out = tmp_path / "ready.json"
    assert main(["--repeats", "1", "--batch-size", "1", "--out", str(out)]) == 0
    empty, full = json.loads(out.read_text())["results"]
    assert full["compiling_seconds"] < empty["compiling_seconds"] < empty["seconds"]
