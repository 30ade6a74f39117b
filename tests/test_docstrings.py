"""Examples in docstrings run, and print what they say they print."""

import doctest
import importlib
import sys
from pathlib import Path

import jax
import pytest

import easyspec_jax

ROOT = Path(easyspec_jax.__file__).parent
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules_with_examples() -> list[str]:
    """Names of the modules of the package whose text contains a doctest prompt."""
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>>" in path.read_text():
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            names.append(".".join(parts).removesuffix(".__init__"))
    return names


MODULES = modules_with_examples()


def run_examples(name: str) -> tuple[int, str]:
    """Run a module's examples; return their number and doctest's report of failures."""
    module = importlib.import_module(name)
    runner, report = doctest.DocTestRunner(verbose=False, optionflags=FLAGS), []
    attempted = 0
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        attempted += len(test.examples)
        runner.run(test, out=report.append)
    return attempted, "".join(report)


def test_some_modules_have_examples():
    assert MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    attempted, report = run_examples(name)
    assert attempted, f"{name} contains '>>>' where doctest finds no example"
    assert not report, report


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MODULES)
def test_examples_run_under_jaxs_own_settings_too(name):
    """A user's process promotes types and ranks as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        attempted, report = run_examples(name)
    assert attempted
    assert not report, report


@pytest.mark.parametrize("printed, fails", [("4", False), ("5", True)])
def test_a_wrong_example_is_noticed(printed, fails, tmp_path, monkeypatch):
    name = f"planted_{printed}"
    (tmp_path / f"{name}.py").write_text(f'"""\n>>> 2 + 2\n{printed}\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    attempted, report = run_examples(name)
    del sys.modules[name]
    assert attempted == 1
    assert bool(report) == fails
