"""What an engine is asked for and cannot do is refused before it does anything."""

import pytest

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from tests.models import save_model

PLAIN = SpeculativeConfig(method="vanilla")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3)
    return directory


@pytest.fixture(scope="module")
def engine(directory):
    return open_model(directory, speculative=PLAIN)


def test_speculation_needs_a_draft(directory, engine):
    with pytest.raises(EasySpecError, match="--method tree needs --draft DIR"):
        open_model(directory, speculative=SpeculativeConfig(method="tree"))
    with pytest.raises(EasySpecError, match="--method easyspec needs --draft DIR"):
        engine.variant(SpeculativeConfig())


@pytest.mark.parametrize(
    ("prompts", "options", "complaint"),
    [
        ("one", {}, "takes a list of prompts, not one string"),
        ([{"role": "user", "content": "one"}], {}, "put one conversation into a list"),
        (
            ["one", "two"],
            {"batch_size": 2, "on_text": print},
            "texts of one batch cannot be streamed at once",
        ),
    ],
)
def test_prompts_that_are_none(engine, prompts, options, complaint):
    with pytest.raises(EasySpecError, match=complaint):
        engine.generate(prompts, **options)


def test_a_batch_has_rows(engine):
    with pytest.raises(EasySpecError, match="--batch-size 0 must be at least 1"):
        next(engine.complete_each([engine.row("one", SamplingParams())], 0))


def test_a_token_that_the_target_does_not_know(tmp_path):
    save_model(tmp_path, "llama3", vocab_size=80, eos_token_id=3)
    engine = open_model(tmp_path, speculative=PLAIN)
    with pytest.raises(
        EasySpecError, match=r"the tokenizer gives id \d+, for which the target has no embedding"
    ):
        engine.encode("one")
