"""Scripts are where the registry says, and run by their short names."""

import importlib
import pickle
import subprocess
import sys

import pytest

from experiments import registry
from experiments.lib.output import RESULTS
from experiments.registry import FORMER, HOME, SCRIPTS, known, named


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_has_what_the_registry_says(script):
    module = importlib.import_module(script.module)
    assert module.__file__ == str(script.path)
    assert callable(script.function("main"))
    assert callable(getattr(module, "tabulate", None)) == bool(script.results or script.by_shape)
    assert callable(getattr(module, "draw", None)) == (
        script.draws or script.name == "round_picture"
    )


def test_every_script_is_listed():
    commands = {
        path.stem for path in HOME.rglob("*.py") if 'if __name__ == "__main__":' in path.read_text()
    }
    assert commands == {script.name for script in SCRIPTS}


def test_every_result_is_listed_once():
    names = [result.name for script in SCRIPTS for result in script.results]
    assert len(names) == len(set(names))
    for path in RESULTS.glob("*.json"):
        assert known(path.stem) is not None
    for path in RESULTS.glob("*.png"):
        found = known(path.stem)
        assert found is not None and found[0].draws


def test_a_short_name_is_the_module_at_its_place():
    short = importlib.import_module("experiments.table4")
    assert short is importlib.import_module("experiments.paper.table4")
    assert short.__spec__ is not None
    assert short.__spec__.name == short.__name__ == "experiments.paper.table4"
    way = importlib.import_module("experiments.table2").Way("plain", None)
    assert pickle.loads(pickle.dumps(way)) == way


@pytest.mark.parametrize("name", ["table5000", "draw_soap", "lib.nothing"])
def test_other_names_are_not_found(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"experiments.{name}")


@pytest.mark.parametrize("name", ["run", "kill_check", *list(FORMER)[:1]])
def test_a_short_name_is_a_command(name):
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HOME.parent)
    script = named(name)
    assert script is not None
    assert ran.stdout.startswith(f"usage: python -m experiments.{script.name} ")


def test_processes_of_a_command_find_its_functions(tmp_path, monkeypatch):
    """A child that multiprocessing spawns imports the main module by its short name."""
    (tmp_path / "experiments").mkdir()
    for name in ("__init__.py", "registry.py"):
        (tmp_path / "experiments" / name).write_bytes((HOME / name).read_bytes())
    (tmp_path / "experiments" / "bench").mkdir()
    (tmp_path / "experiments" / "bench" / "__init__.py").touch()
    (tmp_path / "experiments" / "bench" / "bench_round.py").write_text(
        "import multiprocessing\n"
        "def double(x):\n"
        "    return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(double, [1, 2]))\n"
    )
    command = [sys.executable, "-m", "experiments.bench_round"]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert ran.stdout == "[2, 4]\n"


def test_names_that_scripts_had_still_work():
    assert named("readme") is named("page")
    assert named("draw_table4") is named("draw")
    assert named("draw_round") is named("round_picture")
    assert registry.named("draw_bench_round") is None
