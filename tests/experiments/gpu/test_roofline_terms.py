"""Terms add up to the planner's own estimate."""

import json

import pytest

from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.machines import parse_topology
from experiments.gpu.roofline_terms import main, tabulate, terms


def test_terms_are_those_of_the_cost_model():
    machine = parse_topology("h100:8").machine
    cost = Cost(kernels=100, collectives=10, wire_bytes=1e6, bytes=10**9, flops=1)
    own = terms(cost, machine)
    assert own["memory_ms"] == pytest.approx(1e12 / machine.bandwidth)
    assert own["launch_ms"] == pytest.approx(1e5 * machine.launch)
    parts = own["memory_ms"] + own["collectives_ms"] + own["launch_ms"]
    assert own["total_ms"] == pytest.approx(parts)


@pytest.mark.slow
def test_every_pass_of_a_round_is_listed(configs, tmp_path):
    out = tmp_path / "terms.json"
    pair = ["--target", str(configs["target"]), "--draft", str(configs["draft"])]
    size = ["--lp-size", "3", "--max-length", "400"]
    assert main(["--topologies", "h100:2", *pair, *size, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert len(tabulate({"results": rows})) == len(rows) == 6
    step, fuzzy = (row["collectives"] for row in rows[1:3])
    assert step > fuzzy > 0


def test_a_missing_directory_is_noticed_before_anything_is_counted(capsys):
    assert main(["--out", "absent/terms.json"]) == 2
    assert "must be a .json file" in capsys.readouterr().err
