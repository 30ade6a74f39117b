"""Converting needs memory for buffers only, and opening little more than the weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from easyspec_jax.checkpoint.directory import open_checkpoint
from experiments.bench.bench_checkpoints import (
    SHAPES,
    convert,
    measured,
    weights_in,
    write_random,
)

ROOT = Path(__file__).parents[2]

# What the process has before it reads a weight, and at most.
OPEN = """
import sys, jax, numpy as np
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, open_mesh
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.sharding import padded_vocab_size

def resident(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

opened, mesh = open_checkpoint(sys.argv[1]), open_mesh(MeshShape(4, 2), "cpu")
rows, ids = padded_vocab_size(mesh, opened.config), opened.config.vocab_size
loader = Loader(
    source=opened.source,
    config=opened.config,
    mesh=mesh,
    axes=ALL_AXES,
    dtype=np.dtype("bfloat16"),
    vocab_rows=rows,
    num_ids=ids,
)
jax.block_until_ready(loader.place(np.zeros(8), jax.sharding.PartitionSpec(ALL_AXES)))
before = resident("VmRSS")
model = loader.decoder([loader.layer(index) for index in range(opened.config.num_hidden_layers)])
jax.block_until_ready(jax.tree.leaves(model))
print(before, resident("VmHWM"))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]


def _opening(directory: Path) -> int:
    """Return the most bytes that opening a checkpoint on eight virtual devices takes."""
    command = [sys.executable, "-c", OPEN, directory]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, most = map(int, printed.split())
    return most - before


def test_a_sixth_of_a_billion_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    size = write_random(tmp_path / "hf", SHAPES["0.17b"], 3)
    forwards = convert(tmp_path / "hf", tmp_path / "orbax", "--memory", "300MiB", "--verify")
    back = [
        sys.executable,
        "-m",
        "convert",
        "--to-hf",
        tmp_path / "orbax",
        "--out",
        tmp_path / "out",
    ]
    backwards = measured([*back, "--memory", "300MiB", "--verify"])
    # Less than the tensors alone, although most of it is libraries (JAX and Orbax among them).
    assert max(forwards.peak_bytes, backwards.peak_bytes) < size
    assert (
        open_checkpoint(tmp_path / "out").source.shapes()
        == open_checkpoint(tmp_path / "hf").source.shapes()
    )
    for directory in ("hf", "orbax"):
        assert _opening(tmp_path / directory) < 1.15 * size + (32 << 20)  # buffers


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantizing_needs_memory_for_buffers_only(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(ROOT)
    size = write_random(tmp_path / "hf", SHAPES["0.17b"], 3)
    limit = ["--memory", "300MiB", "--weights", weights]
    assert convert(tmp_path / "hf", tmp_path / "out", *limit).peak_bytes < size
    if weights == "int8":
        assert _opening(tmp_path / "out") < 1.15 * weights_in(tmp_path / "out") + (32 << 20)


@pytest.mark.skipif(not os.environ.get("CI"), reason="takes 5 GB of disk; for CI")
def test_a_billion_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_random(tmp_path / "hf", SHAPES["1b"], 3)
    assert convert(tmp_path / "hf", tmp_path / "orbax").peak_bytes <= 700_000_000
