"""Results are drawn again by the script that measured them."""

import json
import shutil

import pytest

from experiments import draw
from experiments.lib.output import RESULTS


@pytest.mark.parametrize("name", ["table4_smollm2", "acceptance_demo"])
def test_a_picture_is_drawn_again(name, tmp_path):
    """By the command in the file, or by the file's name: acceptance_demo.json has no command."""
    pytest.importorskip("matplotlib")
    path = tmp_path / f"{name}.json"
    shutil.copy(RESULTS / path.name, path)
    assert draw.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "held", "complaint"),
    [
        ("other", {"results": []}, "no script draws such results"),
        ("kill_check", {"results": []}, "no script draws such results"),
        (
            "any",
            {"command": "python -m experiments.soak"},
            "is not a results file of an experiment",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(name, held, complaint, tmp_path, capsys):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(held))
    assert draw.main([str(path)]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
