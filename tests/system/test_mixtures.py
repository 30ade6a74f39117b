"""A mixture of experts under speculation says what it says alone, and what transformers says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.engine.abstract import bytes_per_device
from easyspec_jax.engine.engine import Engine
from easyspec_jax.model.experts import Experts
from easyspec_jax.refit import RefitConfig, refit
from tests.support.models import save_model

VANILLA = SpeculativeConfig(method="vanilla")
PROMPTS = ["a quick brown fox", "the"]
GREEDY = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module", params=[("qwen3_moe", "qwen3"), ("gpt_oss", "gpt_oss")], ids=str)
def pair(tmp_path_factory, request):
    """A mixture, its dense sibling or another mixture, and transformers' greedy tokens."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    model = save_model(target, request.param[0], num_hidden_layers=3)
    save_model(draft, request.param[1], num_hidden_layers=4)
    return target, draft, greedy_texts(model, target, PROMPTS, tokens=24)


def greedy_texts(model: Any, directory: Path, prompts: list[str], tokens: int) -> list[list[int]]:
    """Return what transformers says after each prompt."""
    tokenizer, texts = open_model(directory, speculative=VANILLA).tokenizer, []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        made = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        texts.append(made[0, len(ids) :].tolist())
    return texts


@pytest.mark.parametrize("mesh", ["1", "layer=2,tensor=4"])
@pytest.mark.parametrize("method", ["vanilla", "easyspec"])
def test_texts_are_those_of_transformers(pair, method, mesh):
    target, draft, expected = pair
    speculative = SpeculativeConfig(method=method, num_speculative_tokens=3, lp_size=2)
    models = (target,) if method == "vanilla" else (target, draft)
    engine = open_model(*models, mesh=mesh, speculative=speculative)
    done = engine.generate(PROMPTS, GREEDY, batch_size=2)
    assert [text.token_ids for text in done] == expected


def first_mixture(engine: Engine) -> Experts:
    block: Any = engine.load()[0].blocks[0]
    return block.mlp


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def uneven(tmp_path_factory, request):
    """A mixture of ten experts of four channels each, and transformers' greedy tokens."""
    directory = tmp_path_factory.mktemp("uneven")
    sizes: dict[str, Any] = {"num_experts_per_tok": 2}
    if request.param == "gpt_oss":
        sizes |= {"intermediate_size": 4, "num_local_experts": 10}
    else:
        sizes |= {"moe_intermediate_size": 4, "num_experts": 10}
    model = save_model(directory, request.param, num_hidden_layers=2, **sizes)
    prompts = ["a quick brown fox " * 9, "the"]
    return directory, prompts, greedy_texts(model, directory, prompts, tokens=12)


@pytest.mark.parametrize("mesh", ["8", "layer=2,tensor=4"])
def test_devices_have_whole_experts_where_shares_would_be_padded(uneven, mesh):
    """Three of the eight devices get no expert. The longer prompt is sorted by expert."""
    directory, prompts, expected = uneven
    pair, speculative = (directory, directory), SpeculativeConfig(method="sd")
    engine = open_model(*pair, mesh=mesh, speculative=speculative)
    experts = first_mixture(engine)
    assert experts.axes and experts.parts.down.shape[2] == 4
    options = replace(GREEDY, max_new_tokens=12)
    done = engine.generate(prompts, options, batch_size=2)
    assert [text.token_ids for text in done] == expected
    rounded = [
        [
            text.token_ids
            for text in open_model(
                *pair, mesh=devices, speculative=speculative, weights="int4"
            ).generate(prompts, options, batch_size=2)
        ]
        for devices in (mesh, "1")
    ]
    assert rounded[0] == rounded[1]
    # Plain steps read less of shares, and rounds that adapt or look up may be plain steps.
    for other in (VANILLA, replace(speculative, adapt=True), SpeculativeConfig(method="ngram")):
        assert not first_mixture(open_model(*pair, mesh=mesh, speculative=other)).axes


@pytest.mark.slow
def test_bit_stable_texts_have_the_same_bits_however_they_are_drafted(uneven):
    directory, prompts, _ = uneven
    made = []
    for method in ("vanilla", "sd"):
        speculative = SpeculativeConfig(
            method=method, num_speculative_tokens=3, bit_stable=True, verifier="coupled"
        )
        engine = open_model(directory, directory, mesh="8", speculative=speculative)
        options = SamplingParams(max_new_tokens=12, logprobs=2)
        made.append([text.logprobs for text in engine.generate(prompts, options, batch_size=2)])
    assert made[0] == made[1]


def test_experts_are_rounded_and_the_router_is_not(pair):
    target, _, _ = pair

    def mixture(**options: Any) -> Any:
        return open_model(target, speculative=VANILLA, **options).load()[0].blocks[0]

    experts = mixture(weights="int8").mlp
    assert experts.parts.gate_up.dtype == experts.parts.down.dtype == "int8"
    assert experts.router.weight.dtype == "float32"
    assert bytes_per_device(experts) < 0.5 * bytes_per_device(mixture().mlp)


def test_a_mixture_is_not_refitted(pair):
    target, _, _ = pair
    engine = open_model(target, speculative=VANILLA)
    with pytest.raises(EasySpecError, match="a mixture of experts cannot be refitted"):
        refit(engine, RefitConfig(lp_size=2))
