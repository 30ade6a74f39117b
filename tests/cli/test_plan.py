"""The command line is a contract: what it prints, what it refuses, and with which exit code."""

import io
import json
import os
import re
from contextlib import redirect_stdout
from copy import deepcopy
from unittest import mock

import pytest
from rich.console import Console

from easyspec_jax.plan import ahead
from easyspec_jax.plan.__main__ import main
from easyspec_jax.plan.report import RATES, print_plan


@pytest.fixture
def arguments(configs, environment):
    models = ["--target-config", str(configs["target"]), "--draft-config", str(configs["draft"])]
    return [*models, "--max-length", "400"]


@pytest.fixture(scope="module")
def printed(configs):
    models = ["--target-config", str(configs["target"]), "--draft-config", str(configs["draft"])]
    with mock.patch.dict(os.environ), redirect_stdout(io.StringIO()) as output:
        options = ["--topology", "v5p:2x2x2", "--no-compile", "--json", "--max-length", "400"]
        assert main([*options, *models]) == 0
    return json.loads(output.getvalue())


def rows(printed: dict) -> list[list[str]]:
    """Print the tables and cut their lines into cells."""
    stream = io.StringIO()
    print_plan(printed, Console(file=stream, width=160, highlight=False))
    return [re.split(r"\s{2,}", line.strip()) for line in stream.getvalue().splitlines()]


@pytest.mark.slow
def test_json_is_what_the_tables_show(printed):
    assert printed["estimates"] is True
    assert (printed["topology"], printed["devices"], printed["dtype"]) == (
        "v5p:2x2x2",
        8,
        "bfloat16",
    )
    assert [way["lp_size"] for way in printed["ways"]] == [1, 1, 1, 2, 2, 4, 4, 7, 7]
    assert printed["kv_dtype"] == "auto"
    assert "int8 caches of" in rows(printed | {"kv_dtype": "int8"})[0][0]
    lines = rows(printed)
    for way in printed["ways"]:
        mine = [line[1:] for line in lines if line[0] == way["label"]]
        for step in filter(None, way["steps"].values()):
            if way["method"] == "vanilla" and step is way["steps"]["step"]:
                continue  # the plain step has a row of its own
            start = [str(step["kernels"]), str(step["collectives"])]
            time = f"{step['seconds'] * 1e3:.3g} ms"
            assert any(cells[:2] == start and cells[-1] == time for cells in mine)
        speeds = [f"{way['tokens_per_second'][str(rate)]:.1f}" for rate in RATES]
        assert any([cell.removeprefix("*") for cell in cells] == speeds for cells in mine)
        assert any(cells[1] == f"{way['memory']['target'] / 2**30:.2f} GiB" for cells in mine)


@pytest.mark.slow
def test_the_best_of_every_column_is_marked(printed):
    speeds = [line for line in rows(printed) if any(cell.startswith("*") for cell in line[1:])]
    marked = [
        [float(cell[1:]) for cell in column if cell.startswith("*")]
        for column in zip(*(line[1:] for line in speeds), strict=True)
    ]
    best = [max(way["tokens_per_second"][str(rate)] for way in printed["ways"]) for rate in RATES]
    assert [column[0] for column in marked] == [float(f"{speed:.1f}") for speed in best]


@pytest.mark.slow
def test_what_does_not_fit_is_not_the_best(printed):
    found = deepcopy(printed)
    best = max(found["ways"], key=lambda way: way["tokens_per_second"][str(RATES[0])])
    best["memory"]["fits"] = False
    marked = [line[0] for line in rows(found) if any(cell.startswith("*") for cell in line[1:])]
    assert marked and best["label"] not in marked


def test_speeds_follow_from_rounds(printed):
    for way in printed["ways"]:
        levels = 0 if way["method"] == "vanilla" else printed["num_speculative_tokens"]
        for rate, speed in way["tokens_per_second"].items():
            assert speed == pytest.approx(
                (1 + float(rate) * levels) / way["steps"]["round"]["seconds"]
            )
        both = way["steps"]["prefill"]["seconds"]
        # A first token does not wait for the draft to read the prompt.
        assert (
            way["time_to_first_token"] == both if levels == 0 else way["time_to_first_token"] < both
        )


@pytest.mark.slow
def test_without_a_compiler_the_counting_still_answers(arguments, capsys, monkeypatch):
    monkeypatch.setattr(ahead, "find_spec", lambda name: None)
    assert main(["--topology", "v5e:2x4", "--lp-size", "2", *arguments]) == 0
    output = capsys.readouterr().out
    assert "easyspec N=2, draft TP all not compiled: " in output
    assert "pip install '.[plan]'" in output
    assert "estimated tokens/s" in output


@pytest.mark.slow
def test_a_compiled_cpu_round_stands_beside_its_trace(arguments, capsys):
    assert main(["--topology", "cpu:4", "--json", *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    compiled = printed["compiled"]
    assert printed["dtype"] == "float32"
    assert compiled["way"] == "easyspec N=4, draft TP all"
    assert compiled["collectives"] == compiled["traced_collectives"]
    assert compiled["fits"] is None  # the table has no memory of a CPU


@pytest.fixture(scope="module")
def acceptance(tmp_path_factory):
    """Acceptance of an ordinary draft, and of groups that the draft has and that it has not."""
    shared = {"temperature": 0.0, "calibration": True, "refit": False, "groups": "0,1"}
    shared |= {"tree_width": 1, "rounds": 100}
    rows = [
        shared | {"lp_size": 1, "accepted_per_position": [90, 81]},
        shared | {"lp_size": 2, "accepted_per_position": [80, 64, 50, 39, 30, 23]},
        shared | {"lp_size": 7, "accepted_per_position": [10, 1]},
    ]
    path = tmp_path_factory.mktemp("acceptance") / "measured.json"
    path.write_text(json.dumps({"target": "T[b]", "draft": "T[b]", "results": rows}))
    return path


@pytest.fixture(scope="module")
def with_best(configs, acceptance):
    models = ["--target-config", str(configs["target"]), "--draft-config", str(configs["draft"])]
    options = ["--topology", "v5p:2x2x2", "--no-compile", "--json", "--max-length", "400"]
    options += ["--acceptance", str(acceptance), "--num-speculative-tokens", "4"]
    with mock.patch.dict(os.environ), redirect_stdout(io.StringIO()) as output:
        assert main([*options, *models]) == 0
    return json.loads(output.getvalue())


@pytest.mark.slow
def test_the_best_is_found_by_measured_acceptance(with_best, printed):
    assert printed["best"] is None
    assert set(with_best) == set(printed)
    best = with_best["best"]
    assert (best["file"], best["target"], best["draft"]) == ("measured.json", "T[b]", "T[b]")
    assert (best["drafts"], best["left_out"]) == (["exact", "N=2"], ["N=7"])
    assert best["tree_widths"] == [1]
    assert len(best["ways"]) == 4
    speeds = [way["tokens_per_second"] for way in best["ways"]]
    assert speeds == sorted(speeds, reverse=True)
    assert best["gain"] == pytest.approx(speeds[0] / best["at_levels"]["tokens_per_second"])
    assert best["at_levels"]["num_speculative_tokens"] == 4
    assert best["at_levels"]["tokens_per_second"] == max(way["at_levels"] for way in best["ways"])
    for way in best["ways"]:
        by_levels, levels = way["tokens_per_second_by_levels"], way["num_speculative_tokens"]
        assert len(by_levels) == 16
        assert by_levels[levels - 1] == way["tokens_per_second"] == max(by_levels)
        assert by_levels[3] == way["at_levels"]
        assert way["extrapolated"] == (levels > {"sd": 2, "easyspec": 6}[way["method"]])
        speed = way["tokens_per_round"] / way["round_seconds"]
        assert way["tokens_per_second"] == pytest.approx(speed)


@pytest.mark.slow
def test_the_best_at_the_plans_levels_agrees_with_its_other_tables(with_best):
    plain = with_best["ways"][0]["steps"]["round"]["seconds"]
    assert with_best["best"]["plain_tokens_per_second"] == pytest.approx(1 / plain)
    traced = {way["label"]: way["steps"]["round"]["seconds"] for way in with_best["ways"]}
    for way in with_best["best"]["ways"]:
        if way["method"] == "easyspec":
            # As measured for four levels; the round is interpolated.
            expected = (1 + 0.8 + 0.64 + 0.5 + 0.39) / traced[way["label"]]
            assert way["at_levels"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_the_table_of_the_best_says_what_is_an_estimate(with_best):
    best = with_best["best"] | {"plain_tokens_per_second": 1.0}
    printed = rows(with_best | {"best": best})
    lines = [line for line in printed if len(line) > 5 and line[1] == "1"]
    assert [line[0] for line in lines] == [way["label"] for way in best["ways"]]
    for line, way in zip(lines, best["ways"], strict=True):
        star = "*" if way["extrapolated"] else ""
        assert line[2] == f"{star}{way['num_speculative_tokens']}"
        assert line[-2:] == [f"{way['tokens_per_second']:.1f}", f"{way['at_levels']:.1f}"]
    text = " ".join(cell for line in printed for cell in line)
    assert "best by estimate" in text
    assert "acceptance is extrapolated" in text
    speed = best["ways"][0]["tokens_per_second"]
    assert f"by estimate {speed:.1f} tokens/s: {best['gain']:.2f} × the best of 4 levels" in text
    assert f"and {speed:.2f} × plain decoding" in text
    assert "Acceptance of T[b] as measured with T[b] (measured.json): exact, N=2; width 1." in text
    assert "A model that drafts for itself: its exact draft is accepted nearly always." in text
    assert "Left out, as the draft has fewer layers: N=7" in text


@pytest.mark.slow
def test_no_draft_may_be_worth_it(with_best):
    """Two layers decode faster than any draft of six."""
    best = with_best["best"]
    assert best["ways"][0]["tokens_per_second"] < best["plain_tokens_per_second"]
    text = [line[0] for line in rows(with_best)]
    assert "Best: plain decoding; by estimate no draft is faster" in text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        ("[]", "must hold a JSON object"),
        ('{"results": []}', "is neither the JSON of experiments.acceptance nor"),
    ],
)
def test_files_that_are_no_acceptance(content, message, arguments, tmp_path, capsys):
    path = tmp_path / "acceptance.json"
    if content is not None:
        path.write_text(content)
    assert main(["--topology", "v5e:2x4", *arguments, "--acceptance", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert re.match(rf"easyspec_jax\.plan: error: (--acceptance )?\S+ {message}", output.err)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--topology", "v9:2x4"], "--topology 'v9:2x4': no machine 'v9'; there are v5e"),
        (["--target-config", "Llama-9"], "--target-config 'Llama-9' is not a file.*Llama-3.3-70B"),
        (["--draft-config", "OTHER"], "the target has 300 embedding rows and the draft 400"),
        (
            ["--mesh", "layer=2,tensor=2"],
            "--mesh layer=2,tensor=2 has 4 devices, but v5e:2x4 has 8",
        ),
        (["--mesh", "eight"], "--mesh 'eight' is neither"),
        (["--lp-size", "7"], "--lp-size 7 must be from 1 to the draft's 6 layers"),
        (["--lp-size", "0"], "--lp-size 0 must be at least 1"),
        (["--num-speculative-tokens", "17"], "must be from 1 to 16"),
        (["--tree-width", "65"], "must be from 1 to 64"),
        (["--max-length", "5000"], "--max-length 5000 must be from 2 to the 1024 positions"),
        (["--max-length", "1"], "must be from 2"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--kv-dtype", "int4"], "invalid choice: 'int4'"),
        (["--topology", "h100:2", "--measure"], "`platform` gpu: JAX finds no such device here"),
    ],
)
def test_refusals(options, message, arguments, configs, capsys):
    options = [str(configs["other"]) if option == "OTHER" else option for option in options]
    assert main(["--topology", "v5e:2x4", "--no-compile", *arguments, *options]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert re.match(rf"easyspec_jax\.plan: error: .*{message}", output.err), output.err


def test_the_topology_is_required(arguments, capsys):
    assert main(arguments) == 2
    assert "--topology" in capsys.readouterr().err
