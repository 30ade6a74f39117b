"""Estimates agree with the cost model and each other, and have the paper's figures next to them."""

import json

import pytest

from experiments import draw
from experiments.paper import published as paper
from experiments.paper import simulate
from experiments.paper.simulate import REFIT, SHAPES, main, share_lost, tabulate, ways_of
from tests.support.models import save_model


def grid(temperature, verifier, exact, plain, refit):
    """Rows of experiments.acceptance."""
    common = {
        "temperature": temperature,
        "verifier": verifier,
        "tree_width": 2,
        "calibration": True,
    }
    rates = ((1, False, exact), (2, False, plain), (2, True, refit))
    return [
        common | {"lp_size": size, "refit": fit, "acceptance_rate": rate}
        for size, fit, rate in rates
    ] + [common | {"lp_size": 2, "calibration": False, "refit": False, "acceptance_rate": 0.0}]


GREEDY = grid(0, "greedy", 0.75, 0.25, 0.5)
ROWS = [*GREEDY, *grid(0.8, "rejection", 0.9, 0.5, 0.1), *grid(0.8, "coupled", 1.0, 0.5, 0.875)]


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    """The directory with estimates for tiny models in the places of the paper's."""
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("simulate")
    save_model(directory / "model", "llama3")
    (directory / "acceptance.json").write_text(json.dumps({"results": ROWS}))
    pairs = [pair._replace(lp_size=2) for pair in paper.pairs() if pair.target == "Llama-3-70B"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "SHAPES", dict.fromkeys(SHAPES, str(directory / "model")))
        patch.setattr(paper, "pairs", lambda: pairs)
        assert (
            main(
                [
                    "--topologies",
                    "a100:8",
                    "v5p:2x1x1",
                    "--prompt-length",
                    "8",
                    "--max-new-tokens",
                    "8",
                    "--num-speculative-tokens",
                    "2",
                    "--tree-width",
                    "2",
                    "--acceptance",
                    str(directory / "acceptance.json"),
                    "--out",
                    str(directory / "simulate.json"),
                ]
            )
            == 0
        )
    return directory


def test_rows_agree_with_themselves(estimated):
    measured = json.loads((estimated / "simulate.json").read_text())
    rows = measured["results"]
    assert list(dict.fromkeys(row["machine"] for row in rows)) == [
        "a100:8",
        "a100:8, fitted",
        "v5p:2x1x1",
    ]
    assert list(dict.fromkeys(row["way"] for row in rows)) == [
        "TP",
        "+sd",
        "+tree",
        "EasySpec",
        REFIT,
    ]
    for row in rows:
        tokens = 1 + 2 * (row["acceptance_rate"] or 0)
        assert row["tokens_per_second"] * row["round_seconds"] == pytest.approx(tokens)
        if row["way"] != "TP":
            assert row["drafting"] + row["verification"] == pytest.approx(
                100 / row["tokens_per_second"]
            )
            assert row["drafting"] > 0 < row["verification"]
        if row["way"] == REFIT:
            assert row["paper_speedup"] is None
        if row["machine"] == "a100:8, fitted" and row["way"] == "TP":
            assert row["speedup"] == pytest.approx(row["paper_speedup"])
            assert row["tokens_per_second"] == pytest.approx(row["paper_tokens_per_second"])
    assert any("v5p: 2765 GB/s" in line for line in measured["assumptions"])
    assert {"a100:8", "v5p:2x1x1", "the paper, 8×A100"} <= set(tabulate(measured)[0])


def test_the_same_results_are_the_same_picture(estimated, tmp_path):
    again = tmp_path / "again.png"
    assert draw.main([str(estimated / "simulate.json"), "--out", str(again)]) == 0
    assert again.read_bytes() == (estimated / "simulate.png").read_bytes()


def test_a_refit_loses_the_share_that_was_measured():
    assert share_lost({"results": ROWS}, 0, 2, 2) == 0.5
    assert share_lost({"results": ROWS}, 0.8, 2, 2) == 0.25
    assert share_lost({"results": ROWS}, 0, 2, 3) is None
    assert share_lost({"results": GREEDY[:2]}, 0, 2, 2) is None
    assert share_lost({"results": GREEDY}, 0.8, 2, 2) is None
    assert share_lost({"results": grid(0, "greedy", 0.5, 0.5, 0.5)}, 0, 2, 2) is None


def test_a_refit_lies_between_the_exact_draft_and_plain_groups():
    llama = paper.pairs()[0]
    (rate,) = {rate for name, rate, _ in ways_of(llama, 0.25) if name == REFIT}
    assert rate == pytest.approx(0.92 - 0.25 * (0.92 - 0.87))
    assert REFIT not in {name for name, _, _ in ways_of(llama, None)}


def test_the_papers_pairs():
    llama, qwen, warm, warm_qwen, small, _ = pairs = paper.pairs()
    assert [(pair.draft, pair.temperature) for pair in pairs] == [
        ("Llama-3-8B", 0),
        ("Qwen2-7B", 0),
        ("Llama-3-8B", 0.8),
        ("Qwen2-7B", 0.8),
        ("Llama-3-1B", 0),
        ("Qwen2-1.5B", 0),
    ]
    assert warm_qwen.ways["EasySpec"].acceptance_rate == pytest.approx(
        (0.93 + 0.97 + 0.98 + 0.87 + 0.94) / 5
    )
    assert warm.ways["+sd"].acceptance_rate == pytest.approx((0.67 + 0.73 + 0.78 + 0.67 + 0.84) / 5)
    assert llama.ways["EasySpec"].speedup == pytest.approx((3.38 + 3.64 + 3.68 + 3.39 + 3.80) / 5)
    assert 12.9 < qwen.ways["TP"].tokens_per_second < 13.4  # 7.5 to 7.7 seconds for 100 tokens
    assert (small.lp_size, small.ways["EasySpec"].tokens_per_second) == (2, 34.37)
    assert small.ways["EasySpec"].speedup == pytest.approx(34.37 * 3.38 * (1.70 + 1.73) / 100)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--topologies", "abacus:8"], "no machine 'abacus'"),
        (["--prompt-length", "0"], "--prompt-length and --max-new-tokens must be at least 1"),
        (["--tree-width", "0"], "--tree-width 0 must be"),
        (["--acceptance", "absent.json"], "absent.json"),
        (["--out", "absent/simulate.json"], "--out absent/simulate.json must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "simulate.json"), *arguments]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
