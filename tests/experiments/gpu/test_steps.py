"""Every step is a command that its script takes, and its headline reads what that writes."""

import argparse
import shlex

import pytest

from easyspec_jax.cli import tune
from experiments.bench import bench_roofline
from experiments.gpu import gpu_correctness, gpu_environment, headlines
from experiments.gpu.steps import OUT, STEPS, named

CHECKS = {
    "experiments.bench_roofline": (bench_roofline, bench_roofline.check),
    "experiments.gpu_correctness": (gpu_correctness, None),
    "experiments.gpu_environment": (gpu_environment, None),
    "easyspec_jax.tune": (tune, None),
}


@pytest.mark.parametrize("rehearse", [False, True], ids=["gpu", "rehearsal"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_step_is_a_command(step, rehearse, tmp_path, monkeypatch, environment):
    out = tmp_path / f"{step.name}.json"
    _, flag, program, *words = step.words(rehearse, out)
    assert flag == "-m"
    module, check = CHECKS[program]
    parsed: list[argparse.Namespace] = []

    def take(name, parser, run, argv, *others):
        parsed.append(parser.parse_args(argv))
        return 0

    for name in ("run_experiment", "run_command"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, take)
    assert module.main(words) == 0
    if check is not None:
        check(parsed[0])
    if OUT in shlex.split(step.template(rehearse)):
        assert parsed[0].out == out
    else:
        assert parsed[0].json and parsed[0].no_store


def test_names_are_files():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name != "summary" for name in names)
    assert [step.name for step in named(["tune", "passes"])] == ["passes", "tune"]


def roofline(**parts):
    return {"parts": {name: {"results": rows} for name, rows in parts.items()}}


def test_headlines():
    """Of parts that were not reached, nothing is shown."""
    target = [
        {"name": "plain step", "share_of_bandwidth": 0.8},
        {"name": "32 tokens", "over_plain": 1.1},
    ]
    assert headlines.passes(roofline(target=target)) == {
        "share of bandwidth": 0.8,
        "32 tokens over plain": 1.1,
    }
    assert headlines.passes(roofline(bandwidth=[{"name": "copy", "GB_per_second": 3e3}])) == {
        "GB/s": 3e3
    }
    draft = [{"name": "fuzzy, N = 4", "gap_over_exact": 0.5}]
    assert headlines.drafts(roofline(draft=draft)) == {"gap at N = 4": 0.5}
    peers = [{"name": "easyspec", "over_plain": 2.0, "over_assisted": 1.5}]
    assert headlines.peers(roofline(peers=peers)) == {"over plain": 2.0, "over assisted": 1.5}
    rows = [{"name": "slow", "over_default": 1.1}, {"name": "misspelt", "failed": "unknown"}]
    assert headlines.options(roofline(options=rows)) == {
        "best options": "slow",
        "over default": 1.1,
    }
    assert headlines.options(roofline()) == {}
    checks = [{"check": "a", "passed": True}, {"check": "b", "passed": False}]
    assert headlines.correctness({"results": checks}) == {"passed": "1 of 2", "failed": "b"}
    whole = roofline(
        round=[{"name": "round, width 1", "over_parts": 1.2}],
        synthetic=[
            {"name": "plain", "over_plain": 1.0},
            {"name": "acceptance 0.8", "over_plain": 2},
        ],
    )
    assert headlines.large(whole) == {"round over parts": 1.2, "acceptance 0.8": 2}
    profile = [{"name": "round, N = 4", "kernels": 900, "busy_share": 0.7}]
    assert headlines.profile(roofline(profile=profile)) == {"kernels a round": 900, "busy": 0.7}
