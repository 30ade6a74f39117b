"""The refit command from end to end on a tiny draft, and its errors."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from easyspec_jax import SpeculativeConfig, generate
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.draft.grouping import paper_groups, parse_layout
from easyspec_jax.draft.refit_file import choose_layout
from easyspec_jax.refit.__main__ import main
from tests.refit.conftest import LAYERS

pytestmark = pytest.mark.slow


@pytest.fixture
def directory(draft, tmp_path):
    copy = tmp_path / "draft"
    shutil.copytree(draft[0].directory, copy)
    return copy


def test_a_refit_is_written_and_then_drafted_with(directory, capsys):
    """A few texts are enough to measure borders on."""
    (directory / "text.txt").write_text("a much shorter fox " * 60)
    asked = ["--draft", str(directory), "--text", str(directory / "text.txt")]
    assert main([*asked, "--lp-size", "3", "--mesh", "2", "--tokens", "1000"]) == 0
    shown = capsys.readouterr().err
    assert "as it was" in shown and str(directory / "refit" / "lp3.safetensors") in shown
    rates = {}
    for extra in ("--lp-size 3", "--lp-size 3 --no-refit", "--method vanilla"):
        models = ["--target", str(directory), "--draft", str(directory)]
        asked = ["--prompt", "a fox", "--json", "--max-new-tokens", "24", *extra.split()]
        assert generate.main([*models, *asked]) == 0
        rates[extra] = json.loads(capsys.readouterr().out)
    texts = {extra: result["token_ids"] for extra, result in rates.items()}
    assert texts["--lp-size 3"] == texts["--lp-size 3 --no-refit"] == texts["--method vanilla"]
    accepted = {extra: result["stats"]["acceptance_rate"] for extra, result in rates.items()}
    assert accepted["--lp-size 3"] != accepted["--lp-size 3 --no-refit"], "the refit was not used"


def test_measured_borders_stay_within_the_turns_that_were_asked_for(directory, capsys):
    (directory / "text.txt").write_text("a much shorter fox " * 60)
    asked = ["--draft", str(directory), "--lp-size", "3", "--mlp-lp-size", "2", "--tokens", "1000"]
    assert main([*asked, "--text", str(directory / "text.txt")]) == 0
    chosen = capsys.readouterr().err.split(", now ")[1].split()[0]
    layout = parse_layout(chosen, LAYERS)
    assert layout.sequential_mlps <= LAYERS / 2
    assert layout.collectives <= LAYERS / 2 + len(paper_groups(LAYERS, 3))
    found, refit = choose_layout(
        SpeculativeConfig(lp_size=3, mlp_lp_size=2), open_checkpoint(directory)
    )
    assert found == layout and refit is not None


@pytest.mark.exhaustive
def test_text_of_its_own(directory, capsys):
    asked = ["--draft", str(directory), "--tokens", "1000"]
    asked += ["--borders", "paper", "--mlp-lp-size", "2"]
    assert main(asked) == 0
    refit = directory / "refit" / "lp4_mlp2.safetensors"
    closed, shown = load_file(refit), capsys.readouterr().err
    assert "0,1-3x2,4-6x2,7" in shown and "distilled" not in shown
    assert main([*asked, "--distill", "2"]) == 0
    assert "distilled" in capsys.readouterr().err
    distilled = load_file(refit)
    assert distilled.keys() == closed.keys()
    assert any(not np.array_equal(tensor, closed[name]) for name, tensor in distilled.items())
    assert main([*asked, "--distill", "2", "--resume", "--seed", "1"]) == 0
    assert "distilled" in capsys.readouterr().err
    moved, again = (
        {name: own[name] - closed[name] for name in closed} for own in (distilled, load_file(refit))
    )
    assert not any(np.array_equal(moved[name], again[name]) for name in moved if "norm" not in name)
    # Two more steps from there, not two from the fit.
    assert sum(np.abs(x).max() for x in again.values()) > 1.2 * sum(
        np.abs(x).max() for x in moved.values()
    )


@pytest.mark.exhaustive
def test_prompts_through_the_command(directory):
    (directory / "prompts.txt").write_text("a fox\na much shorter fox\n")
    asked = ["--draft", str(directory), "--tokens", "1000", "--borders", "paper", "--lp-size", "3"]
    assert main([*asked, "--prompt-file", str(directory / "prompts.txt")]) == 0
    answered = load_file(directory / "refit" / "lp3.safetensors")
    assert main(asked) == 0
    own = load_file(directory / "refit" / "lp3.safetensors")
    assert any(not np.array_equal(tensor, own[name]) for name, tensor in answered.items())


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--lp-size", "1"], "--lp-size of at least 2"),
        (["--lp-size", "zero"], "--lp-size"),
        (["--lp-strategy", "0-3"], "leaves out layer 4"),
        (["--ridge", "0"], "--ridge 0.0 must be"),
        (["--tokens", "3"], "--tokens 3 must be at least"),
        (["--distill", "-1"], "--distill -1 must be at least 0"),
        (["--resume"], "give --distill STEPS"),
        (["--resume", "--distill", "2"], "so there is nothing to resume; leave out --resume"),
        (["--text", "missing.txt"], "--text missing.txt cannot be read"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt cannot be read"),
        (["--text", "a.txt", "--prompt-file", "b.txt"], "not allowed with argument --text"),
        (["--chat"], "--chat needs --prompt-file FILE"),
        (["--target", "absent"], "--target needs --prompt-file FILE"),
        (["--mesh", "0"], "--mesh '0'"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line(directory, capsys, arguments, complaint):
    assert main(["--draft", str(directory), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("easyspec_jax.refit: error: ") and complaint in shown.err
    assert shown.err.count("\n") == 1 and not shown.out
    assert not list((directory / "refit").glob("*")) if (directory / "refit").exists() else True
