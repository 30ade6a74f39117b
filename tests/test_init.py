"""The package exports its public names, and has one version."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import easyspec_jax


@pytest.mark.parametrize("name", easyspec_jax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(easyspec_jax, name) is not None


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = easyspec_jax.nonsense


def test_the_version_is_the_distributions_and_the_citations():
    assert metadata.version("easyspec_jax") == easyspec_jax.__version__
    citation = Path(__file__).parents[1] / "CITATION.cff"
    assert f"\nversion: {easyspec_jax.__version__}\n" in citation.read_text(encoding="utf-8")


def test_the_package_imports_without_jax():
    command = "import sys, easyspec_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
