"""What the experiment makes is a checkpoint, and what it measures is a whole tree of processes."""

import json
import sys

import pytest

from easyspec_jax import EasySpecError
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.safetensors import INDEX
from experiments.bench import bench_checkpoints as bench
from tests.convert.test_faults import FIELDS


def test_random_checkpoints_open(tmp_path):
    size = bench.write_random(tmp_path / "hf", FIELDS, 3)
    source = open_checkpoint(tmp_path / "hf").source
    assert size == sum(2 * source.read(name).size for name in source.shapes())
    assert len(set(json.loads((tmp_path / "hf" / INDEX).read_text())["weight_map"].values())) in (
        3,
        4,
    )


@pytest.mark.slow
def test_children_count(tmp_path):
    takes = "import time; held = bytearray(b'1') * 100_000_000; time.sleep(4)"
    alone = bench.measured([sys.executable, "-c", takes])
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {takes!r}])"
    assert bench.measured([sys.executable, "-c", child]).peak_bytes > alone.peak_bytes > 100_000_000


def test_a_command_that_fails_is_quoted():
    with pytest.raises(EasySpecError, match=r"failed \(1\): .*no such thing"):
        bench.measured([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_ways_take_turns_and_leave_room(tmp_path):
    def way(name):
        def run(source, out):
            out.mkdir()
            ran.append(name)
            return bench.Run(float(len(ran)), 0)

        return run

    ran: list[str] = []
    runs = bench.alternately(2, tmp_path / "hf", tmp_path / "out", way("a"), way("b"))
    assert ran == ["a", "b", "a", "b"]
    assert [[run.seconds for run in done] for done in runs] == [[1, 3], [2, 4]]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_figures_of_a_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"7b": FIELDS})
    monkeypatch.setattr(bench, "open_", lambda directory, mesh: bench.Run(1.0, 500_000))
    arguments = [
        "--rounds",
        "1",
        "--mesh",
        "1",
        "8",
        "--directory",
        str(tmp_path),
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert bench.main(arguments) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["open"]) == [
        f"{kind}, mesh {mesh}" for kind in ("huggingface", "orbax") for mesh in (1, 8)
    ]
    assert report["open"]["orbax, mesh 8"]["over_weights"] == 500_000 / report["bytes"]
    assert (
        report["convert_peak_bytes"]
        == report["convert"][0]["peak_bytes"]
        > report["copy"][0]["peak_bytes"]
        > 0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.slow
def test_opened_integers_are_compared_with_their_own_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"7b": FIELDS})
    monkeypatch.setattr(bench, "open_", lambda directory, mesh: bench.Run(1.0, 500_000))
    words = ["--rounds", "1", "--mesh", "1", "--weights", "int8", "--directory", str(tmp_path)]
    assert bench.main([*words, "--out", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    floats, integers = (report["open"][f"{kind}, mesh 1"] for kind in ("huggingface", "orbax"))
    # Of two bytes, one is left, and four for every row.
    share = floats["over_weights"] / integers["over_weights"]
    assert 0.5 < share < 0.6
    assert report["weights"] == "int8"


def test_a_bad_destination_is_one_line(tmp_path, capsys):
    assert bench.main(["--out", str(tmp_path / "r.txt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_of_several_runs_the_median_and_the_most_memory():
    def runs(*seconds):
        return [{"seconds": taken, "peak_bytes": taken * 2**30} for taken in seconds]

    measured = {
        "bytes": 5e8,
        "convert": runs(1, 4, 2),
        "copy": runs(1),
        "open": {"orbax, mesh 8": runs(3)[0]},
    }
    rows = bench.tabulate(measured)
    labels = [row["what"] for row in rows]
    assert labels == ["conversion", "copy of the files", "opening, orbax, mesh 8"]
    assert (rows[0]["GB"], rows[0]["seconds"], rows[0]["GiB held at most"]) == (0.5, 2, 4)
