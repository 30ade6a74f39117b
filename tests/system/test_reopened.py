"""A checkpoint gives the same text on any mesh."""

import pytest

from convert.huggingface import open_huggingface
from convert.stream import convert
from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from tests.support.models import save_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    save_model(directory / "hf", "smollm2", seed=0)
    convert(open_huggingface(directory / "hf"), directory / "orbax")
    return directory


def test_another_split_and_one_device_say_the_same(pair):
    speculative = SpeculativeConfig(num_speculative_tokens=2, lp_size=4)
    texts = []
    for place, mesh in (("orbax", "layer=4,tensor=2"), ("orbax", "layer=2,tensor=4"), ("hf", "1")):
        engine = open_model(
            pair / place, pair / place, mesh=mesh, speculative=speculative, max_length=64
        )
        (completion,) = engine.generate(["the same text"], SamplingParams(max_new_tokens=16))
        texts.append(completion.token_ids)
    assert len(texts[0]) > 4
    assert texts[1:] == texts[:1] * 2
