"""Steps by number of devices, estimated and timed; the same figures are the same picture."""

import json

import pytest

from experiments import draw
from experiments.paper.table6 import PLAIN, main
from tests.support.models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("table6") / "model"
    save_model(directory, "llama3")
    return directory


def rows_of(model, out, *arguments):
    assert (
        main(
            [
                "--devices",
                "1",
                "2",
                "--lp-sizes",
                "2",
                "--context",
                "16",
                "--out",
                str(out),
                *arguments,
            ]
        )
        == 0
    )
    return json.loads(out.read_text())["results"]


def test_estimates_and_their_picture(model, tmp_path):
    out = tmp_path / "table6.json"
    here = str(model)
    rows = rows_of(
        model, out, "--no-measure", "--machines", "h100", "--models", here, "--drafts", here
    )
    split = {row["way"]: row for row in rows if row["devices"] == 2}
    assert list(split) == [PLAIN, "a copy on each", "TP", "N = 2, a copy on each", "N = 2, TP"]
    assert [row["way"] for row in rows if row["devices"] == 1] == [PLAIN, "TP"]
    assert (
        split["a copy on each"]["collectives"]
        == 0
        < split["N = 2, TP"]["collectives"]
        < split["TP"]["collectives"]
    )
    assert all(
        row["fits"] and row["steps_per_second"] * row["step_seconds"] == pytest.approx(1)
        for row in rows
    )
    again = tmp_path / "again.png"
    assert draw.main([str(out), "--out", str(again)]) == 0
    assert again.read_bytes() == out.with_suffix(".png").read_bytes()


def test_steps_are_timed_on_the_devices_that_are_here(model, tmp_path):
    arguments = [
        "--target",
        str(model),
        "--draft",
        str(model),
        "--platform",
        "cpu",
        "--repeats",
        "2",
        "--calls",
        "1",
    ]
    rows = rows_of(model, tmp_path / "table6.json", "--measure", *arguments)
    assert [row["way"] for row in rows if row["devices"] == 2][:3] == [
        PLAIN,
        "a copy on each",
        "TP",
    ]
    assert all(row["step_seconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--machines", "abacus"], "--machines abacus: there are"),
        (["--context", "0"], "--context must be at least 1"),
        (["--out", "absent/table6.json"], "--out absent/table6.json must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, capsys):
    assert main(["--no-measure", *arguments]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
