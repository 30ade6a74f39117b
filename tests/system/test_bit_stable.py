"""With `bit_stable`, texts in narrow types are those of plain decoding in the same mode."""

from dataclasses import replace

import pytest

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode.state import RoundConfig
from tests.support.models import save_model

PROMPTS = ["a fox", "the quick brown fox jumps over", "1 2 3 4", "lazy dogs and foxes, and a dog"]
STABLE = SpeculativeConfig(lp_size=2, bit_stable=True, verifier="coupled", refit="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a random model, which drafts for itself."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3")
    return str(directory)


def texts(engine, temperature, batch_size):
    sampling = SamplingParams(temperature=temperature, seed=3, max_new_tokens=60)
    made = engine.generate(PROMPTS, sampling, batch_size=batch_size)
    return [completion.token_ids for completion in made]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "dtype", "batch_size", "method"),
    [
        pytest.param("1", "bfloat16", 1, "sd", marks=pytest.mark.exhaustive),
        pytest.param("1", "float16", 4, "easyspec", marks=pytest.mark.exhaustive),
        ("8", "bfloat16", 4, "easyspec"),
    ],
)
def test_texts_are_those_of_plain_decoding(model, mesh, dtype, batch_size, method):
    speculative = replace(STABLE, method=method)
    engine = open_model(model, model, mesh=mesh, dtype=dtype, speculative=speculative)
    plain = engine.baseline()
    assert plain.speculative.stable_rows == engine.speculative.stable_rows == 8
    for temperature in (0.0, 1.0):
        expected = texts(plain, temperature, batch_size)
        assert texts(engine, temperature, batch_size) == expected


def test_every_pass_has_as_many_tokens_whatever_is_drafted():
    for levels, rows in ((1, 8), (7, 8), (8, 16), (16, 32)):
        own = replace(STABLE, num_speculative_tokens=levels)
        plain = replace(own, method="vanilla")
        for speculative in (own, plain):
            config = RoundConfig.of(speculative, SamplingParams(), stop_ids=())
            assert config.rows == rows
            assert config.scratch >= rows
    assert RoundConfig.of(SpeculativeConfig(), SamplingParams(), stop_ids=()).rows is None


@pytest.mark.parametrize("tree", [{"tree_width": 2}, {"method": "tree"}, {"prompt_lookup": True}])
def test_trees_are_refused(tree):
    with pytest.raises(EasySpecError, match="`bit_stable` needs a chain"):
        SpeculativeConfig(bit_stable=True, **tree)
