"""Gemma 3 270M end to end: converted from GGUF, drafting for itself.

The reference is transformers. One prompt is longer than the window of most layers, 512 tokens.
"""

import gc
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.gguf import open_gguf
from convert.shards import HUGGING_FACE
from convert.stream import convert
from easyspec_jax import SamplingParams, SpeculativeConfig, open_model

COUNTING = "".join(f"{number}, " for number in range(100, 260))
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    ", COUNTING]
NEW_TOKENS = 24

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(gemma3_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("gemma3") / "converted"
    convert(open_gguf(gemma3_gguf), out, "float32", HUGGING_FACE)
    return out


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[list[int]]:
    """Return transformers' greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert (ids.shape[1] > 512) == (prompt == COUNTING)
        mask = torch.ones_like(ids)
        text = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(text[0, ids.shape[1] :].tolist())
    del model
    gc.collect()
    return found


@pytest.mark.parametrize(
    "speculative",
    [
        pytest.param(SpeculativeConfig(method="vanilla"), marks=pytest.mark.exhaustive),
        SpeculativeConfig(lp_size=4),
        pytest.param(SpeculativeConfig(method="sd"), marks=pytest.mark.exhaustive),
        pytest.param(SpeculativeConfig(lp_size=4, tree_width=3), marks=pytest.mark.exhaustive),
    ],
    ids=["vanilla", "easyspec", "sd", "tree"],
)
def test_greedy_tokens_are_those_of_transformers(checkpoint, expected, speculative):
    draft = None if speculative.method == "vanilla" else checkpoint
    engine = open_model(checkpoint, draft, dtype="float32", speculative=speculative, mesh="1")
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
    found = [completion.token_ids for completion in engine.generate(PROMPTS, sampling)]
    assert found == expected
