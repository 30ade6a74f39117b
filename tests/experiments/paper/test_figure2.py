"""Rounds of small models under the profiler; the same figures are the same picture."""

import json

import pytest

from experiments import draw
from experiments.lib import sections
from experiments.paper.figure2 import main
from tests.support.models import save_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("figure2")
    save_model(directory / "model", "llama3")
    model, out = str(directory / "model"), directory / "figure2.json"
    arguments = [
        "--target",
        model,
        "--draft",
        model,
        "--platform",
        "cpu",
        "--mesh",
        "2",
        "--lp-size",
        "2",
    ]
    arguments += ["--max-new-tokens", "4", "--rounds", "2", "--repeats", "1", "--out", str(out)]
    assert main(arguments) == 0
    return out


@pytest.mark.exhaustive
def test_every_way_has_a_lane_for_every_device(measured):
    rows = json.loads(measured.read_text())["results"]
    assert [row["way"] for row in rows] == ["TP", "+sd", "EasySpec, N = 2"]
    assert rows[0]["tokens_per_round"] == 1
    for row in rows:
        assert list(row["lanes"]) == list(row["by_device"]) == ["0", "1"]
        assert row["computing"] + row["in_collectives"] + row["idle"] == pytest.approx(1)
        assert min(row["computing"], row["in_collectives"], row["idle"]) > 0
        for letters in row["lanes"].values():
            assert len(letters) * row["bin_seconds"] == pytest.approx(
                row["traced_round_seconds"], abs=row["bin_seconds"]
            )
            assert set(letters) <= set("cx.")


@pytest.mark.exhaustive
def test_the_picture_and_the_page_are_of_the_file(measured, tmp_path):
    again = tmp_path / "again.png"
    assert draw.main([str(measured), "--out", str(again)]) == 0
    assert again.read_bytes() == measured.with_suffix(".png").read_bytes()
    page = sections.section(measured)
    assert "A lane is a device" in page
    assert "| EasySpec, N = 2 |" in page


def test_no_rounds_are_refused(capsys):
    assert main(["--rounds", "0"]) == 2
    assert "--rounds 0 must be at least 1" in capsys.readouterr().err
