"""The command line is a contract; and what it stores, generate --lp-strategy auto follows."""

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console

from easyspec_jax import EasySpecError
from easyspec_jax.cli import generate
from easyspec_jax.cli.generate_flags import generate_parser
from easyspec_jax.engine import tuned_file
from easyspec_jax.engine.models import Models
from easyspec_jax.engine.tuned_file import FILE, Choice
from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.plan.acceptance import read_acceptance
from easyspec_jax.tune import tuning
from easyspec_jax.tune.__main__ import main
from easyspec_jax.tune.predict import Figures
from easyspec_jax.tune.report import print_tuned
from easyspec_jax.tune.tuning import open_pair
from tests.support.models import save_model

NO_FIGURES = Figures(plain=1.0, overhead=0.0, verification={})
pytestmark = pytest.mark.slow

FEW = [
    "--lp-sizes",
    "1",
    "3",
    "--tree-widths",
    "1",
    "--max-levels",
    "2",
    "--max-new-tokens",
    "10",
    "--confirm",
    "1",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3, num_hidden_layers=4)
    return directory


@pytest.fixture
def pair(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (model / FILE).unlink(missing_ok=True)
    return ["--target", str(model), "--draft", str(model)]


@pytest.fixture(scope="module")
def printed(model, tmp_path_factory):
    """What one run printed, and the picture it drew."""
    plot = tmp_path_factory.mktemp("plot") / "plot.png"
    with redirect_stdout(io.StringIO()) as output:
        assert (
            main(
                [
                    "--target",
                    str(model),
                    "--draft",
                    str(model),
                    "--mesh",
                    "2",
                    "--json",
                    "--seconds",
                    "1000",
                    "--no-store",
                    "--plot",
                    str(plot),
                    *FEW,
                ]
            )
            == 0
        )
    assert not (model / FILE).exists()
    return json.loads(output.getvalue()), plot.read_bytes()


def test_one_object_has_everything(printed):
    found, plot = printed
    assert (found["mesh"], found["platform"], found["dtype"]) == ("2", "cpu", "float32")
    assert (found["weights"], found["kv_dtype"]) == ("", "auto")
    assert found["drafts_not_reached"] == 0
    # Placements of the ordinary draft, of the fuzzy one, and of that with pairs of MLPs.
    assert len(found["candidates"]) == 2 + 2 * 2 + 2
    for candidate in found["candidates"]:
        rounds = candidate["speculative"]["num_speculative_tokens"]
        seconds = (
            candidate["first"]
            + (rounds - 1) * candidate["step"]
            + candidate["verification"]
            + found["overhead"]
        )
        tokens = 1 + candidate["acceptance_rate"] * rounds
        assert candidate["predicted_tokens_per_second"] == pytest.approx(tokens / seconds)
        assert not candidate["frontier"] or candidate["deepest_acceptance_rate"] is not None
        accepted = candidate["accepted_by_levels"]
        assert (accepted is None) == (candidate["deepest_acceptance_rate"] is None)
        if accepted is not None:
            assert candidate["deepest_acceptance_rate"] == pytest.approx(accepted[-1] / 2)
            assert accepted[rounds - 1] == pytest.approx(candidate["acceptance_rate"] * rounds)
    speeds = [
        found["plain_tokens_per_second"],
        *(c["confirmed_tokens_per_second"] or 0 for c in found["candidates"]),
    ]
    assert found["choice"]["tokens_per_second"] == max(speeds)
    assert plot.startswith(b"\x89PNG")


def test_plan_reads_what_was_printed(printed, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(printed[0]))
    found = read_acceptance(path, num_layers=4)
    measured = [c for c in printed[0]["candidates"] if c["accepted_by_levels"] is not None]
    assert {curve.accepted for curve in found.curves.values()} == {
        tuple(candidate["accepted_by_levels"]) for candidate in measured
    }
    assert found.tree_widths == [1]


def test_the_table_shows_the_object(printed):
    found, _ = printed
    stream = io.StringIO()
    print_tuned(found, Console(file=stream, width=160, highlight=False))
    lines = [
        re.split(r"\s{2,}", line.strip().removeprefix("* "))
        for line in stream.getvalue().splitlines()
    ]
    for candidate in found["candidates"]:
        speed = candidate["predicted_tokens_per_second"]
        bound = "≤ " if candidate["missing"] else ""
        mine = [cells for cells in lines if cells[0] == candidate["label"]]
        assert any(cells[-2] == f"{bound}{speed:.1f}" for cells in mine)
    assert lines[-1][0].startswith("Best: ")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lp-sizes", "7"], "--lp-sizes 7 must be from 1 to 4, the draft's layers"),
        (["--tree-widths", "0"], "--tree-widths 0 must be from 1 to 64"),
        (["--max-levels", "17"], "--max-levels 17 must be from 1 to 16"),
        (["--draft-tensor-parallel-sizes", "2"], "invalid choice: '2'"),
        (["--mesh", "many"], "--mesh 'many' is neither"),
        (["--confirm", "0"], "--confirm 0 must be at least 1"),
        (["--seconds", "0"], "--seconds 0.0 must be a number above 0"),
        (["--seconds", "nan"], "--seconds nan must be a number above 0"),
        (["--chat"], "--chat needs --prompt-file"),
        (["--prompt-file", "absent"], "cannot be read"),
        (["--plot", "absent/plot.png"], "No such file or directory"),
        (["--max-length", "5"], "leaves no room within --max-length 5"),
        (["--max-new-tokens", "8"], "--max-new-tokens 8 must be more than --max-levels 8"),
    ],
)
def test_refusals(pair, capsys, options, message):
    assert main([*pair, *options]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert re.match(rf"easyspec_jax\.tune: error: .*{message}", output.err), output.err


def test_texts_that_end_at_once_are_no_measure(model, tmp_path, capsys):
    ended = tmp_path / "ended"
    shutil.copytree(model, ended)
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(260)]}))
    assert main(["--target", str(ended), "--draft", str(ended), *FEW]) == 2
    assert "ends each of these texts within 2 tokens; give other" in capsys.readouterr().err


def test_a_draft_is_needed(pair, capsys):
    assert main(pair[:2]) == 2
    assert "nothing to choose without --draft" in capsys.readouterr().err


def text_of(arguments, capsys) -> tuple[dict[str, Any], str]:
    """The object of one text, and what generate says beside it."""
    flags = ["--lp-strategy", "auto", "--prompt", "Hello", "--max-new-tokens", "8", "--json"]
    assert generate.main([*arguments, *flags]) == 0
    output = capsys.readouterr()
    return json.loads(output.out), output.err


def test_auto_follows_the_stored_choice(pair, model, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "tune_over", lambda *_, **__: pytest.fail("measured again"))
    key = tuned_file.key_of(open_pair(model, model, "2", None, None, "auto"), "2")
    chosen = SpeculativeConfig(lp_size=3, refit="none", num_speculative_tokens=3)
    tuned_file.keep(key, Choice("layer=2,tensor=1", chosen, 3.0, 2.0), model)
    printed, notes = text_of([*pair, "--mesh", "2"], capsys)
    assert len(printed["stats"]["accepted_per_position"]) == 3
    assert "N = 3, TP all, chain, 3 levels on layer=2,tensor=1, 1.50 × plain decoding" in notes
    assert notes.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "adapts", "looks_up"),
    [
        ([], True, True),
        (["--adapt", "off"], False, True),
        (["--adapt", "auto", "--verifier", "rejection"], "auto", True),
        (["--verifier", "rejection"], False, True),
        (["--verifier", "block"], False, False),
        (["--bit-stable"], True, False),
    ],
)
def test_what_was_tuned_gives_way_to_the_flags(flags, adapts, looks_up):
    tuned = SpeculativeConfig(adapt=True, prompt_lookup=True, confidence_threshold=0.1)
    args = generate_parser("generate", "").parse_args(["--lp-strategy", "auto", *flags])
    followed = generate.as_tuned(args, tuned)
    assert (followed.adapt, followed.prompt_lookup) == (adapts, looks_up)
    assert followed.confidence_threshold == 0.1


@pytest.mark.parametrize("flags", [["--bit-stable"], ["--verifier", "block"]])
def test_a_tuned_tree_is_no_chain(flags):
    args = generate_parser("generate", "").parse_args(["--lp-strategy", "auto", *flags])
    message = f"auto drafts trees for this pair, and {' '.join(flags)} needs a chain"
    with pytest.raises(EasySpecError, match=message):
        generate.as_tuned(args, SpeculativeConfig(tree_width=4))


def test_auto_asks_for_memory_before_it_reads_weights(pair, capsys, monkeypatch):
    monkeypatch.setattr(Models, "free_memory", lambda self: 1000)
    monkeypatch.setattr(Models, "_load_target", lambda *_: pytest.fail("weights were read"))
    assert generate.main([*pair, "--lp-strategy", "auto", "--prompt", "x"]) == 2
    assert "GiB" in capsys.readouterr().err
    assert main(pair) == 2
    assert "GiB" in capsys.readouterr().err


def test_a_pair_whose_drafts_never_fit_has_a_table(printed):
    found, _ = printed
    stream = io.StringIO()
    print_tuned(found | {"candidates": []}, Console(file=stream, width=160, highlight=False))
    assert "plain decoding" in stream.getvalue()


def test_auto_measures_once_where_nothing_is_stored(pair, model, capsys, monkeypatch):
    calls = []

    def tune_over(engine, mesh, *_, **__):
        calls.append(mesh)
        choice = Choice("layer=1,tensor=1", SpeculativeConfig(method="vanilla"), 2.0, 2.0)
        return tuning.Tuned(engine, mesh, NO_FIGURES, [], 0, 2.0, choice, 1.0)

    monkeypatch.setattr(tuning, "tune_over", tune_over)
    _, first = text_of(pair, capsys)
    assert "measuring for about 2.5 minutes" in first
    assert f"stored in {model / FILE}" in first
    printed, second = text_of(pair, capsys)
    assert printed["stats"]["drafted"] == 0
    assert "measuring" not in second
    assert calls == ["1"]
    held = json.loads((model / FILE).read_text())["choices"][0]
    assert held["speculative"] == asdict(SpeculativeConfig(method="vanilla"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--lp-size", "4"],
        ["--lp-size=2"],
        ["--method", "sd"],
        ["--tree-width", "4"],
        ["--no-calibration"],
        ["--confidence-threshold", "0.1"],
    ],
)
def test_what_auto_chooses_nobody_else_may(pair, capsys, flags):
    assert generate.main([*pair, "--lp-strategy", "auto", "--prompt", "x", *flags]) == 2
    name = flags[0].partition("=")[0]
    assert (
        f"--lp-strategy auto chooses {name} itself: leave out one of the two"
        in capsys.readouterr().err
    )
