"""A section of the page of results is what its file says."""

import json

import pytest

from experiments.lib.sections import machine_line, section, sections, subject


def test_a_file_that_is_not_listed_has_a_section_too(tmp_path):
    machine = {"platform": "cpu", "device_kind": "cpu", "devices": 8, "cores": 2}
    row = {"way": "sd", "tokens_per_second": 12.5, "parts": [1, 2]}
    held = {"command": "python -m experiments.other", "machine": machine, "results": [row]}
    (tmp_path / "other.json").write_text(json.dumps(held))
    text = sections(tmp_path)
    head = "### other\n\n`python -m experiments.other`; 2-core CPU, 8 virtual devices; [JSON]("
    assert text.startswith(head)
    assert "| way | tokens_per_second |\n| - | - |\n| sd | 12.50 |" in text
    assert "png" not in text


def test_accelerators_are_named():
    machine = {"platform": "gpu", "device_kind": "NVIDIA H100", "devices": 8, "cores": 64}
    assert machine_line(machine) == "8 × NVIDIA H100"


def test_parts_may_be_of_several_commands(tmp_path):
    machine = {"platform": "cpu", "device_kind": "cpu", "devices": 1, "cores": 2}
    row = {
        "name": "plain step",
        "seconds": 0.004,
        "floor_seconds": 0.001,
        "share_of_bandwidth": 0.25,
    }
    parts = {
        name: {"command": f"measure --only {name}", "machine": machine, "results": [row]}
        for name in ("target", "draft")
    }
    path = tmp_path / "bench_roofline_h200-8b-1b.json"
    path.write_text(json.dumps({"shape": "h200-8b-1b", "parts": parts}))
    text = section(path)
    assert text.startswith("### Passes and rounds against the machine's bandwidth: h200-8b-1b\n")
    assert "`measure --only target`; `measure --only draft`; 2-core CPU; [JSON](" in text
    assert "| target | plain step | 4.00 | 1.00 | 0.250 |" in text


@pytest.mark.parametrize("fields", [{"devices": 8}, {}])
def test_a_machine_half_known_is_not_named(tmp_path, fields):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"machine": fields, "results": []}))
    assert section(path) == "### other\n\n[JSON](results/other.json).\n"


def test_a_heading_may_name_the_pair():
    rows = [{"refit": True}, {}]
    assert subject({"target": "A", "draft": "B", "results": rows}) == "A, drafted by B"
    alone = subject({"target": "A", "draft": "A", "results": rows})
    assert alone == "A as its own exact draft against fuzzy and refit drafts"
