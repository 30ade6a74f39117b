"""SmolLM2-135M-Instruct end to end: converted from GGUF, its own draft, against transformers' own GGUF loader."""

from functools import cache, lru_cache
from typing import Any

import pytest
import torch
import transformers

from convert.__main__ import main as convert
from easyspec_jax import Engine, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.config import Method
from easyspec_jax.decode.loop import decode

PROMPTS = [
    "Write a Python function that checks whether a number is prime.",
    "Explain why the sky is blue.",
    "What is 12 times 17? Think step by step.",
    "Translate to French: the cat is on the table.",
    "List five tips for healthy living.",
]
NEW_TOKENS = 64

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "converted"
    assert convert(["--gguf", str(smollm2_gguf), "--out", str(out), "--dtype", "float32"]) == 0
    return out


@pytest.fixture(scope="module")
def open_engine(checkpoint):
    """Opens the model as its own draft; asked twice in a row for the same, it opens once."""

    @lru_cache(maxsize=1)  # one pair of models in memory at a time
    def open_(mesh: str, method: Method, calibration: bool = True) -> Engine:
        speculative = SpeculativeConfig(method=method, lp_size=4, calibration=calibration)
        return open_model(checkpoint, checkpoint, mesh=mesh, platform="cpu", speculative=speculative)

    return open_


@pytest.fixture(scope="module")
def plain(checkpoint, smollm2_gguf):
    """Prompt ids and greedy tokens of transformers on torch, which reads the GGUF file by code of its own."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids, texts = [], []
    for prompt in PROMPTS:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        generated = model.generate(**encoded, max_new_tokens=NEW_TOKENS, do_sample=False)
        ids.append(encoded.input_ids[0].tolist())
        texts.append(generated[0, len(ids[-1]) :].tolist())
    return ids, texts


@pytest.fixture(scope="module")
def batch(open_engine, plain):
    """All prompts as one batch: the rows' tokens, and the totals of drafted and accepted levels."""

    @cache
    def generate(mesh: str, method: Method, calibration: bool = True) -> tuple[list[list[int]], int, int]:
        rows: list[list[int]] = [[] for _ in PROMPTS]
        drafted = accepted = 0
        programs = open_engine(mesh, method, calibration).programs(SamplingParams())
        for report in decode(programs, plain[0], [NEW_TOKENS] * len(PROMPTS), SamplingParams()):
            for row, tokens in enumerate(rows):
                tokens += report.tokens[row, : report.num_tokens[row]].tolist()
            drafted, accepted = drafted + report.drafted.sum(), accepted + report.accepted.sum()
        return rows, int(drafted), int(accepted)

    return generate


@pytest.mark.parametrize("mesh", ["1", "8"])
@pytest.mark.parametrize("method", ["vanilla", "sd", "easyspec"])
def test_greedy_tokens_are_those_of_transformers(batch, plain, mesh, method):
    rows, drafted, accepted = batch(mesh, method)
    assert rows == plain[1]
    if method == "sd":
        assert accepted == drafted > 0, "an exact draft of the target itself is accepted whole"


def test_a_single_request_through_the_public_interface(open_engine, plain):
    streamed: list[str] = []
    completions = open_engine("8", "easyspec").generate(
        PROMPTS[:1], SamplingParams(max_new_tokens=NEW_TOKENS), chat=True, on_text=streamed.append
    )
    (completion,) = completions
    assert (completion.prompt_ids, completion.token_ids) == (plain[0][0], plain[1][0])
    assert "".join(streamed) == completion.text
    assert completion.stats.mean_acceptance_length > 2


def test_calibration_lifts_the_acceptance_of_fuzzy_drafts(batch, plain):
    _, drafted, accepted = batch("1", "easyspec")
    rows, drafted_without, accepted_without = batch("1", "easyspec", calibration=False)
    assert rows == plain[1]
    assert 0.9 > accepted / drafted > accepted_without / drafted_without + 0.05
