"""Bundled models have their published sizes, others are found on disk, bad pairs are refused."""

import json

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.plan.configurations import bundled, check_pair, find_config, parameter_count
from tests.support.models import family_config

PUBLISHED = {
    "Llama-3.3-70B": 70.55,
    "Llama-3.1-8B": 8.03,
    "Llama-3.2-3B": 3.21,
    "Llama-3.2-1B": 1.24,
    "Qwen2.5-72B": 72.7,
    "Qwen2.5-32B": 32.8,
    "Qwen2.5-7B": 7.62,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-0.5B": 0.494,
    "Qwen3-235B-A22B": 235,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-32B": 32.8,
    "Qwen3-8B": 8.19,
    "Qwen3-0.6B": 0.596,
    "gpt-oss-120b": 116.83,
    "gpt-oss-20b": 20.91,
}
"""Billions of parameters, from the model cards."""


def test_all_bundled_models_have_a_published_size():
    assert set(bundled()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert parameter_count(bundled()[name]) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize(
    "text", ["Llama-3.3-70B", "llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct"]
)
def test_names_may_be_spelled_as_on_the_hub(text):
    assert find_config(text, "target") == ("Llama-3.3-70B", bundled()["Llama-3.3-70B"])


def test_files_and_directories(tmp_path):
    fields = family_config("qwen3").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "tiny.json").write_text(json.dumps(fields))
    name, config = find_config(tmp_path, "draft")
    assert (name, config.num_hidden_layers) == (tmp_path.name, fields["num_hidden_layers"])
    assert find_config(str(tmp_path / "tiny.json"), "draft") == ("tiny", config)


def test_an_unknown_name_lists_the_known_ones():
    message = r"`draft` 'Llama-4' is not a file.*Llama-3\.1-8B.*Qwen3-0\.6B"
    with pytest.raises(EasySpecError, match=message):
        find_config("Llama-4", "draft")


def test_pairs_must_be_able_to_share_ids():
    check_pair(bundled()["Qwen2.5-72B"], bundled()["Qwen2.5-0.5B"])  # 152064 and 151936 rows
    with pytest.raises(EasySpecError, match=r"128256 embedding rows and the draft 151936"):
        check_pair(bundled()["Llama-3.3-70B"], bundled()["Qwen3-0.6B"])
