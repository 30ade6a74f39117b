"""The verdict finds planted leaks, retraces, slowdowns and mismatches; a tiny pair soaks."""

import json

import jax
import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from experiments import draw
from experiments.endurance import soak
from experiments.endurance.soak import Soak, mismatches, verdict
from experiments.lib.requests import RowSampling
from tests.support.models import save_model


def windows(**planted):
    """Return forty windows of a run that is flat but for noise; planted: other values by number."""
    flat = {
        "rounds": lambda i: 100 * (i + 1),
        "resident_bytes": lambda i: 10**9 + 10**5 * (i % 3),
        "compilations": lambda i: min(i, 3),
        "tokens_per_cpu_second": lambda i: 100 + i * 7 % 5,
        "tokens_per_second": lambda i: 100.0,
    }
    return [{name: value(i) for name, value in (flat | planted).items()} for i in range(40)]


def test_what_is_flat_is_called_so():
    found = verdict(windows(), 400, 9, 0)
    assert found["flat"] and found["compilations_after_warm_up"] == 0
    assert abs(found["memory_growth_percent"]) < 0.1


@pytest.mark.parametrize(
    "planted",
    [
        {"resident_bytes": lambda i: 10**9 + i * 10**6},
        {"compilations": lambda i: 3 + (i > 20)},
        {"tokens_per_cpu_second": lambda i: 100 + i * 7 % 5 - i},
    ],
)
def test_planted_faults_are_found(planted):
    assert not verdict(windows(**planted), 400, 9, 0)["flat"]


def test_a_mismatch_and_a_check_of_nothing_are_found():
    assert not verdict(windows(), 400, 9, 1)["flat"]
    assert not verdict(windows(), 400, 0, 0)["flat"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3)
    speculative = SpeculativeConfig(num_speculative_tokens=3, lp_size=3, verifier="coupled")
    return open_model(directory, directory, platform="cpu", speculative=speculative)


def test_another_token_is_a_mismatch(engine):
    request = RowSampling("def f(", SamplingParams(temperature=0.8, max_new_tokens=6, seed=5))
    (made,) = engine.generate([request.prompt], request.sampling)
    wrong = [*made.token_ids[:-1], made.token_ids[-1] ^ 1]
    assert mismatches(engine, [(request, made.token_ids)]) == 0
    assert mismatches(engine, [(request, made.token_ids), (request, wrong)]) == 1


def test_windows_count_rounds_and_keep_texts_to_check(engine):
    soaked = Soak(engine, batch_size=2, check_every=3, seed=0)
    rows = list(soaked.windows(60, 20, 600))
    assert [row["rounds"] // 20 for row in rows] == [1, 2, 3]
    assert rows[-1]["texts"] // 3 == len(soaked.kept) > 0
    assert rows[0]["compilations"] > 0 and all(row["resident_bytes"] > 10**7 for row in rows)
    assert mismatches(engine, soaked.kept) == 0


def test_time_ends_a_soak(engine):
    assert len(list(Soak(engine, 2, 3, 0).windows(10**9, 5, 0.0))) == 1


def test_a_program_that_is_made_anew_is_counted():
    compilations = soak.Compilations()
    double = jax.jit(lambda x: x + x)
    for x in (1.0, 2.0, 3.0):
        double(x)
    assert compilations.count == 1
    double(1)
    assert compilations.count == 2


def test_the_same_figures_are_the_same_picture(tmp_path):
    pytest.importorskip("matplotlib")
    measured = {"batch_size": 2, "warm_up": 400, "results": windows()} | verdict(
        windows(), 400, 9, 0
    )
    path = tmp_path / "soak.json"
    path.write_text(json.dumps(measured))
    assert draw.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes() == soak.draw(measured)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--rounds", "3000"], "must be at least --warm-up 3000 and four windows"),
        (["--out", "absent/soak.json"], "--out absent/soak.json must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, capsys):
    assert soak.main(arguments) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
