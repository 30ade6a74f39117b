"""The page of results is what the results say."""

import json

from experiments.output import RESULTS
from experiments.readme import losses, machine_line, main, page


def test_the_page_is_what_the_results_make():
    assert (RESULTS.parent / "README.md").read_text(encoding="utf-8") == page(RESULTS)


def test_losses_are_against_the_exact_draft():
    common = {"temperature": 0.0, "tree_width": 1}
    rows = [
        common | {"lp_size": 1, "calibration": True, "refit": False, "acceptance_rate": 0.75},
        common | {"lp_size": 2, "calibration": True, "refit": False, "acceptance_rate": 0.5},
        common | {"lp_size": 2, "calibration": True, "refit": True, "acceptance_rate": 0.625},
        common | {"lp_size": 2, "calibration": True, "acceptance_rate": 0.1, "temperature": 0.8},
    ]
    exact, pair = losses({"results": rows})
    assert exact["α, calibrated"] == 0.75 and exact["α, refit"] is None
    assert (pair["loss, calibrated"], pair["loss, refit"]) == (0.25, 0.125)


def test_a_file_that_nobody_knows_has_a_section_too(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    machine = {"platform": "cpu", "device_kind": "cpu", "devices": 8, "cores": 2}
    row = {"way": "sd", "tokens_per_second": 12.5, "parts": [1, 2]}
    held = {"command": "python -m experiments.other", "machine": machine, "results": [row]}
    (results / "other.json").write_text(json.dumps(held))
    assert main(["--results", str(results)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "## other\n\n`python -m experiments.other`; 2-core CPU, 8 virtual devices; [JSON](" in text
    assert "| way | tokens_per_second |\n| - | - |\n| sd | 12.50 |" in text
    assert "png" not in text


def test_accelerators_are_named():
    machine = {"platform": "gpu", "device_kind": "NVIDIA H100", "devices": 8, "cores": 64}
    assert machine_line(machine) == "8 × NVIDIA H100"
