"""The engine runs without its leaves, such as plan: delete one, and text is still generated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import easyspec_jax

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("leaf", "module"),
    [
        ("plan", "plan"),
        ("tune", "tune"),
        ("refit", "refit"),
        ("calibrate", None),
        ("server", "serve"),
    ],
)
def test_the_engine_needs_no_leaf(leaf, module, tmp_path):
    source = Path(easyspec_jax.__file__).parent
    shutil.copytree(source, tmp_path / "easyspec_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "easyspec_jax" / leaf)
    if module is not None:
        (tmp_path / "easyspec_jax" / "cli" / f"{module}.py").unlink()
    command = [sys.executable, "-m", "easyspec_jax.generate"]
    command += ["--platform", "cpu", "--max-new-tokens", "2"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
