"""Every step is a command that its script takes."""

import importlib

import pytest

from experiments.run import STEPS, arguments, chosen, main


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_step_is_a_command_that_writes_its_file(step, tmp_path, capsys):
    for size in ("full", "quick", "smoke"):
        _, _, module, *flags = arguments(step, tmp_path / "absent", size)
        # It fails only because there is no such directory.
        assert importlib.import_module(module).main(flags) == 2
        printed = capsys.readouterr().err
        assert f"--out {tmp_path / 'absent' / step.name}.json must be a .json file" in printed


def test_steps_are_chosen_by_name(capsys):
    assert [step.name for step in chosen(["table5", "table2"], smoke=False)] == ["table2", "table5"]
    assert 0 < len(chosen(None, smoke=True)) < len(STEPS)
    assert main(["--only", "table3"]) == 2
    assert "--only table3: choose from table2," in capsys.readouterr().err
