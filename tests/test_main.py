"""`easyspec` finds its commands wherever it is called."""

import subprocess
import sys
from pathlib import Path

import pytest

from easyspec_jax import __version__
from easyspec_jax.__main__ import COMMANDS, main
from tests.support.models import save_model


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_found(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(argv, capsys):
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"easyspec_jax {__version__}\n"


def test_an_unknown_command_is_one_line(capsys):
    assert main(["chat"]) == 2
    assert capsys.readouterr().err.startswith(
        "easyspec: error: unknown command 'chat'; choose from generate, "
    )


def test_a_file_of_the_name_of_a_package_is_not_run(tmp_path):
    """`python -m convert` in a folder with a convert.py runs that file."""
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong one')")
    save_model(tmp_path / "model", "smollm2")
    command = Path(sys.executable).with_name("easyspec")
    ran = subprocess.run(
        [command, "convert", "--hf", "model", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (tmp_path / "out" / "config.json").is_file()
