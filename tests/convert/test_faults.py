"""Every failure is one clear line and leaves nothing behind; interruptions are resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import stream
from convert.__main__ import main
from convert.huggingface import open_huggingface
from convert.pieces import is_finite
from convert.shards import SafetensorsStore
from convert.stores import Format
from convert.workplace import workplace
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.safetensors import INDEX
from experiments.bench.bench_checkpoints import write_random

ROOT = Path(__file__).parents[2]
FIELDS = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 200,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@pytest.fixture
def source(tmp_path) -> Path:
    """Write a directory of three shards."""
    write_random(tmp_path / "hf", FIELDS, 3)
    assert (tmp_path / "hf" / INDEX).exists()
    return tmp_path / "hf"


@pytest.fixture
def fails(tmp_path, capsys) -> Callable[..., str]:
    """Run a command that must fail with one line and change nothing, and return that line."""

    def run(source: Path, *options: str, flag: str = "--hf") -> str:
        before = contents(tmp_path)
        assert main([flag, str(source), "--out", str(tmp_path / "out"), *options]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("convert: error: ")
        assert printed.err.count("\n") == 1
        assert contents(tmp_path) == before
        return printed.err

    return run


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")}


def rewrite(source: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    shard = source / json.loads((source / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    save_file(tensors | {name: change(tensors[name])}, shard, metadata={"format": "pt"})


def configure(source: Path, **fields: object) -> None:
    (source / "config.json").write_text(json.dumps(FIELDS | fields))


def test_a_truncated_shard(source, fails):
    shard = max(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert f"{shard.name} is truncated or damaged" in fails(source)


def test_a_missing_shard(source, fails):
    shard = max(source.glob("*.safetensors"))
    shard.unlink()
    assert f"{shard.name} is missing" in fails(source)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite(source, fails, value, dtype):
    name = "model.layers.1.mlp.up_proj.weight"

    def damaged(values: np.ndarray) -> np.ndarray:
        values[40, 3] = value
        return values

    rewrite(source, name, damaged)
    assert f"{name} holds NaN or infinity" in fails(source, "--dtype", dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_pattern_of_bits_is_judged_as_numpy_judges_it(dtype):
    values = np.array([0, -0.0, 1, -1, 1e-8, -1e-8], dtype)
    values = np.concatenate(
        [values, [ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min]]
    ).astype(dtype)
    assert is_finite(values)
    assert is_finite(values[:0])
    for wrong in (np.nan, -np.nan, np.inf, -np.inf):
        assert not is_finite(np.append(values, wrong).astype(dtype))
    if np.dtype(dtype).itemsize == 2:
        for bits in np.arange(2**16, dtype=np.uint16):
            value = np.array([bits]).view(dtype)
            assert is_finite(value) == bool(np.isfinite(value.astype(np.float32))[0])


def test_a_tensor_of_the_wrong_shape_or_type(source, fails):
    rewrite(source, "model.norm.weight", lambda values: values[:-1])
    rewrite(source, "lm_head.weight", lambda values: values.astype(np.int8))
    line = fails(source)
    assert "model.norm.weight has shape (63,) instead of (64,)" in line
    assert "lm_head.weight is stored as I8, which is not supported" in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size=64 does not divide into 5 heads"),
        ({"num_key_value_heads": 3}, "4 query heads do not divide into 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"num_hidden_layers": 9999}, "more"),
        ({"vocab_size": 2**31 - 1}, "instead of (2147483647, 64)"),
    ],
)
def test_an_absurd_configuration(source, fails, fields, message):
    configure(source, **fields)
    assert message in fails(source)


def test_a_path_that_is_a_file(source, fails):
    assert "not a directory" in fails(source / "config.json")
    assert "not a directory" in fails(source / "config.json", flag="--to-hf")
    assert "not a GGUF file" in fails(source / "config.json", flag="--gguf")


def test_too_little_memory(source, fails):
    assert "needs more memory; give --memory of at least" in fails(source, "--memory", "256MiB")


def test_two_converters_on_one_output(source, fails, tmp_path):
    with workplace(tmp_path / "out", "another"):
        assert "another conversion is writing" in fails(source)


def test_a_disk_that_is_too_small(source, fails, monkeypatch):
    usage = stream.shutil.disk_usage
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: usage(path)._replace(free=10_000))
    assert "needs 0.2 MB of free space and has 0.0 MB" in fails(source)


@pytest.fixture
def small_disk(tmp_path, monkeypatch) -> Iterator[Path]:
    """Mount a file system of 100 kB that claims to have more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    usage = stream.shutil.disk_usage
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: usage(path)._replace(free=10**9))
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def convert_fails(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("flag", ["--hf", "--to-hf"])
def test_a_disk_that_fills(source, small_disk, capsys, flag):
    (source / "tokenizer.json").unlink()  # larger than all the rest
    line = convert_fails([flag, str(source), "--out", str(small_disk / "out")], capsys)
    assert "cannot be written: " in line
    assert not list(small_disk.iterdir())


SMALL_FILES = """
import resource, sys
from convert.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("flag", ["--hf", "--to-hf"])
def test_files_that_may_not_grow(source, tmp_path, flag):
    """A limit on file sizes acts like a full disk, for machines where none can be mounted."""
    (source / "tokenizer.json").unlink()
    command = [sys.executable, "-c", SMALL_FILES, flag, source, "--out", tmp_path / "out"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith(
        f"convert: error: {tmp_path}/.out.partial cannot be written: "
    )
    assert finished.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("flag", ["--hf", "--to-hf"])
def test_a_flipped_byte_is_found(source, tmp_path, capsys, flag):
    arguments = [flag, str(source), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main([*arguments, "--verify"]) == 0
    assert capsys.readouterr().out.count(", verified") == 1
    data = [*(tmp_path / "out").glob("weights/**/d/*"), *(tmp_path / "out").glob("*.safetensors")]
    largest = max(data, key=lambda path: path.stat().st_size)
    flip(largest)
    line = convert_fails([*arguments, "--verify"], capsys)
    assert (
        "not a readable Orbax checkpoint" if flag == "--hf" else f"differs from {source}"
    ) in line
    flip(largest)
    assert main([*arguments, "--verify"]) == 0
    flip(max(source.glob("*.safetensors")), -1)
    assert f" differs from {source}; convert again" in convert_fails(
        [*arguments, "--verify"], capsys
    )


def flip(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


def test_a_byte_that_flips_on_the_way_to_the_disk_is_found(source, tmp_path):
    class Flipping(SafetensorsStore):
        def finish(self) -> None:
            super().finish()
            flip(self._directory / "model.safetensors", -1)

    format = Format("flipping", lambda directory, config, *_: Flipping(directory, config))
    with pytest.raises(stream.EasySpecError, match=r"differs from .*; convert again"):
        stream.convert(open_huggingface(source), tmp_path / "out", format=format, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


SMALL_PIECES = """
import sys
from convert import orbax, pieces
from convert.__main__ import main
pieces._PIECE = orbax._CHUNK = 1 << 16
orbax._TILE = (64, 512)
sys.exit(main(sys.argv[1:]))
"""

WITHOUT_END = f"""
import time
from convert import shards
from convert.orbax import OrbaxStore
OrbaxStore.finish = shards.SafetensorsStore.finish = lambda self: time.sleep(600)
{SMALL_PIECES}
"""
"""Makes a conversion wait at its end, so that it is still running when it is killed."""


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--hf", "--to-hf"])
def test_killed_at_random_moments_it_goes_on(tmp_path, flag):
    write_random(
        tmp_path / "hf",
        FIELDS | {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 8000},
        3,
    )
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "journal"
    arguments = [flag, tmp_path / "hf", "--out", out]
    moment, done = random.Random(0), 0
    for _ in range(5):  # ten with both formats
        process = subprocess.Popen([sys.executable, "-c", WITHOUT_END, *arguments], cwd=ROOT)
        until = min(done + moment.randrange(1, 40), 500)  # of some 600
        while process.poll() is None and pieces(journal) < until:
            time.sleep(0.001)
        time.sleep(moment.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
        done = pieces(journal)
    assert done > 5
    command = [sys.executable, "-c", SMALL_PIECES, *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert " MB of it from an interrupted run" in finished.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    before, after = open_checkpoint(tmp_path / "hf").source, open_checkpoint(out).source
    assert before.shapes() == after.shapes()
    for name in before.shapes():
        np.testing.assert_array_equal(after.read(name), before.read(name))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert size < 1.05 * sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())


def pieces(journal: Path) -> int:
    return journal.read_text().count("\n") if journal.exists() else 0


def test_what_an_interruption_damaged_is_written_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.pieces._PIECE", 4096)
    model, record, count = open_huggingface(source), stream.Workplace.record, 0

    def interrupt(self, *piece):
        nonlocal count
        record(self, *piece)
        count += 1
        if count == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stream.Workplace, "record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream.convert(model, tmp_path / "out")
    written = {
        path: path.read_bytes()
        for path in (tmp_path / ".out.partial" / "ocdbt.process_0").rglob("d/*")
    }
    data = [
        path for path, held in written.items() if len(held) > 3000 and b"zarr_format" not in held
    ]
    assert data
    for path in data[::2]:
        flip(path)
    result = stream.convert(model, tmp_path / "out", verify=True)
    assert 0 < result.reused < result.size


def interrupt_at_the_end(model, out: Path) -> None:
    """Convert a model, but for the last step."""

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("convert.orbax.OrbaxStore.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream.convert(model, out)


def test_another_conversion_of_the_same_files_begins_anew(source, tmp_path):
    """Even where types and shapes are the same, the numbers may not be."""
    model = open_huggingface(source)
    interrupt_at_the_end(model, tmp_path / "out")
    assert stream.convert(model, tmp_path / "out", weights="bfloat16").reused == 0


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_what_cannot_be_gone_on_with_is_begun_anew(source, tmp_path, damage):
    """After a power failure, files of the interrupted run may be there but empty."""
    model = open_huggingface(source)
    interrupt_at_the_end(model, tmp_path / "out")
    for path in (tmp_path / ".out.partial" / "ocdbt.process_0").rglob("d/*"):
        os.truncate(path, 0) if damage == "truncate" else path.unlink()
    assert stream.convert(model, tmp_path / "out", verify=True).reused == 0


def test_an_output_that_shrinks_before_it_is_read_again_is_found(source, tmp_path):
    opened = open_checkpoint(source)
    store = SafetensorsStore(tmp_path, opened.config)
    name = next(iter(opened.source.shapes()))
    store.write(name, 0, opened.source.read(name))
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(
        stream.EasySpecError,
        match=r"model\.safetensors is damaged \(it ends too early\); convert again",
    ):
        store.read(name, 0, opened.source.shapes()[name][0])
