"""A pair that does not fit is refused before anything is read, with options that would help."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from easyspec_jax.engine import fits
from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.fits import GIB, check_memory, free_memory
from easyspec_jax.engine.pair import open_model
from easyspec_jax.errors import EasySpecError
from easyspec_jax.generate import main
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.workloads import large

PROMPT, TOKENS, ROWS = 120, 512, 2


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_model(mesh="4", platform="cpu")


@pytest.mark.parametrize(
    ("job", "free", "flags"),
    [
        (large(), 12.0, {"`mesh`", "`weights`"}),
        (large(dtype="float32"), 20.0, {"`mesh`", "`dtype`", "`weights`"}),
        (large(tokens=100_000), 18.0, {"`mesh`", "`weights`", "`max_length`"}),
        (large(tokens=100_000, prompt=99_000), 18.0, {"`mesh`"}),
        (large(rows=64), 20.0, {"`mesh`", "`max_length`", "`batch_size`"}),
        (large(rows=64, tokens=100_000), 1.0, set()),
        (large(prefixes=4 * GIB), 18.0, {"`mesh`", "`weights`", "`prefix_cache`"}),
    ],
)
def test_the_flags_that_are_named_make_it_fit(job, free, flags):
    with pytest.raises(EasySpecError, match="GiB on each device") as refusal:
        check_memory(job, int(free * GIB))
    line = str(refusal.value)
    assert "\n" not in line
    assert f"and {free} GiB are free; " in line
    assert "weights " in line and "caches " in line
    named = dict(re.findall(r"(`[a-z_]+`) (\w+)", line))
    assert set(named) == flags
    if not flags:
        assert line.endswith("use a machine with more memory, or smaller models")
    changed = {
        "`mesh`": lambda value: {"mesh": absent_mesh(MeshShape(4, int(value) // 4), "tpu")},
        "`dtype`": lambda value: {"dtype": value},
        "`weights`": lambda value: {"target_weights": value},
        "`max_length`": lambda value: {"tokens": int(value), "max_length": int(value)},
        "`batch_size`": lambda value: {"rows": int(value)},
        "`prefix_cache`": lambda value: {"prefixes": int(value)},
    }
    for flag, value in named.items():
        check_memory(replace(job, **changed[flag](value)), int(free * GIB))
    for flag in {"`max_length`", "`batch_size`"} & flags:
        with pytest.raises(EasySpecError):
            check_memory(replace(job, **changed[flag](int(named[flag]) + 1)), int(free * GIB))


def test_what_the_store_holds_is_not_counted_again(monkeypatch):
    engine = open_model(mesh="1", platform="cpu", prefix_cache=64 * 2**20)
    sampling, checked = SamplingParams(max_new_tokens=4), []
    list(engine.generate(["def add(a, b):" * 20], sampling))
    assert engine.prefixes is not None
    monkeypatch.setattr("easyspec_jax.engine.models.free_memory", lambda mesh: 1000)
    monkeypatch.setattr(
        "easyspec_jax.engine.models.check_memory", lambda job, free: checked.append(free)
    )
    engine.check_memory(TOKENS, PROMPT, ROWS, sampling)
    engine.check_memory(TOKENS, PROMPT, ROWS, sampling, free=500)
    assert checked == [1000 + engine.prefixes.bytes, 500]


def test_nothing_is_read_where_memory_will_not_suffice(engine, monkeypatch, capsys):
    monkeypatch.setattr("easyspec_jax.engine.models.free_memory", lambda mesh: 30 * 2**20)
    monkeypatch.setattr(Engine, "load", lambda self, bar: pytest.fail("weights were loaded"))
    assert main(["--platform", "cpu", "--max-new-tokens", "8"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "of this machine's memory" in output.err
    assert "it would fit with --dtype bfloat16" in output.err


def test_what_is_free():
    """The machine's on a CPU, and of accelerators that of the fullest one, if they tell."""

    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    def devices(*stats: dict[str, int] | None) -> Any:
        held = [Device(each) for each in stats]
        return SimpleNamespace(local_devices=held, devices=np.array(held, object))

    assert free_memory(devices({"bytes_limit": 10, "bytes_in_use": 3}, {"bytes_limit": 8})) == 7
    assert free_memory(devices(None, {})) is None
    check_memory(large(), None)
    told = free_memory(open_model(mesh="1", platform="cpu").mesh)
    assert told is not None and 2**20 < told < 2**50


def test_a_host_without_meminfo(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "MemFree: 3 kB")
    assert fits._free_on_host()
    monkeypatch.setattr(fits.os, "sysconf", lambda name: int("x"))
    assert fits._free_on_host() is None
