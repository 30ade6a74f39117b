"""SmolLM2-135M-Instruct end to end: converted from GGUF, drafting for itself.

The reference is transformers, with its own GGUF loader.
"""

from functools import cache, lru_cache
from typing import Any

import pytest
import torch
import transformers

from convert.__main__ import main as convert
from easyspec_jax import Engine, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode.loop import decode
from easyspec_jax.options import Method
from easyspec_jax.refit.__main__ import main as refit
from tests.support.models import add_refit

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
    """Open the model as its own draft. The same call twice in a row opens it once."""

    @lru_cache(maxsize=1)  # one pair of models in memory at a time
    def open_(mesh: str, method: Method, calibration: bool = True, refit: str = "none") -> Engine:
        speculative = SpeculativeConfig(
            method=method, lp_size=4, calibration=calibration, refit=refit
        )
        return open_model(
            checkpoint, checkpoint, mesh=mesh, platform="cpu", speculative=speculative
        )

    return open_


@pytest.fixture(scope="module")
def plain(checkpoint, smollm2_gguf):
    """Prompt ids and greedy tokens of transformers, which reads the GGUF file by its own code."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids, texts = [], []
    for prompt in PROMPTS:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        generated = model.generate(**encoded, max_new_tokens=NEW_TOKENS, do_sample=False)
        ids.append(encoded.input_ids[0].tolist())
        texts.append(generated[0, len(ids[-1]) :].tolist())
    return ids, texts


@pytest.fixture(scope="module")
def batch(open_engine, plain):
    """Decode all prompts as one batch; return the rows' tokens, and levels drafted and accepted."""

    @cache
    def generate(
        mesh: str, method: Method, calibration: bool = True, refit: str = "none"
    ) -> tuple[list[list[int]], int, int]:
        rows: list[list[int]] = [[] for _ in PROMPTS]
        drafted = accepted = 0
        programs = open_engine(mesh, method, calibration, refit).programs(SamplingParams())
        for report in decode(programs, plain[0], [NEW_TOKENS] * len(PROMPTS), SamplingParams()):
            for row, tokens in enumerate(rows):
                tokens += report.tokens[row, : report.num_tokens[row]].tolist()
            drafted, accepted = drafted + report.drafted.sum(), accepted + report.accepted.sum()
        return rows, int(drafted), int(accepted)

    return generate


@pytest.mark.parametrize(
    ("mesh", "method"),
    [
        ("1", "vanilla"),
        ("8", "easyspec"),
        pytest.param("8", "vanilla", marks=pytest.mark.exhaustive),
        pytest.param("1", "sd", marks=pytest.mark.exhaustive),
        pytest.param("8", "sd", marks=pytest.mark.exhaustive),
        pytest.param("1", "easyspec", marks=pytest.mark.exhaustive),
    ],
)
def test_greedy_tokens_are_those_of_transformers(batch, plain, mesh, method):
    rows, drafted, accepted = batch(mesh, method)
    assert rows == plain[1]
    if method == "sd":
        assert accepted == drafted > 0, "an exact draft of the target itself is accepted whole"


@pytest.mark.exhaustive
def test_greedy_tokens_are_those_of_transformers_with_a_refit(batch, plain, checkpoint, tmp_path):
    """The refit is noise: least squares would take a minute."""
    rows, drafted, accepted = batch(
        "8", "easyspec", refit=add_refit(checkpoint, 4, tmp_path, noise=0.05)
    )
    assert rows == plain[1]
    assert 0 < accepted < drafted


@pytest.mark.slow
def test_a_single_request_through_the_public_interface(open_engine, plain):
    streamed: list[str] = []
    completions = open_engine("8", "easyspec").generate(
        PROMPTS[:1], SamplingParams(max_new_tokens=NEW_TOKENS), chat=True, on_text=streamed.append
    )
    (completion,) = completions
    assert (completion.prompt_ids, completion.token_ids) == (plain[0][0], plain[1][0])
    assert "".join(streamed) == completion.text
    assert completion.stats.mean_acceptance_length > 2


@pytest.mark.exhaustive
def test_calibration_lifts_the_acceptance_of_fuzzy_drafts(batch, plain):
    _, drafted, accepted = batch("1", "easyspec")
    rows, drafted_without, accepted_without = batch("1", "easyspec", calibration=False)
    assert rows == plain[1]
    assert 0.9 > accepted / drafted > accepted_without / drafted_without + 0.05


@pytest.fixture(scope="module")
def drafts(checkpoint, tmp_path_factory):
    """The target itself, its first 20 layers, and the target with noise in its weights."""
    directory = tmp_path_factory.mktemp("drafts")
    assert convert(["--to-hf", str(checkpoint), "--out", str(directory / "whole")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    for name in ("shallow", "noisy"):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory / "whole", dtype=torch.float32
        )
        if name == "shallow":
            model.model.layers = model.model.layers[:20]
            model.config.num_hidden_layers = 20
        else:
            torch.manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return {"itself": checkpoint, "shallow": directory / "shallow", "noisy": directory / "noisy"}


WAYS: dict[str, dict[str, Any]] = {  # refit: what fixture refit_of() makes
    "sd": {"method": "sd"},
    "tree-4": {"method": "tree", "tree_width": 4},
    "tree-8": {"method": "tree", "tree_width": 8},
    "N=2": {"lp_size": 2},
    "N=4": {"lp_size": 4},
    "N=6-tree-4": {"lp_size": 6, "tree_width": 4},
    "N=4-refit": {"lp_size": 4, "refit": True},
    "N=4-tree-8-refit": {"lp_size": 4, "tree_width": 8, "refit": True},
}
EVERY_WAY = (
    [("noisy", "1", way, temperature) for way in WAYS for temperature in (0.0, 0.8, 1.0)]
    + [(draft, "1", way, 1.0) for draft in ("itself", "shallow") for way in WAYS]
    + [("noisy", mesh, way, 0.8) for mesh in ("2", "8") for way in WAYS]
)


def texts(engine: Engine, temperature: float, batch_size: int) -> list[list[int]]:
    """Decode every prompt, when sampling under three seeds, each row with its own noise."""
    prompts = (3 if temperature else 1) * PROMPTS
    sampling = SamplingParams(temperature=temperature, seed=11, max_new_tokens=NEW_TOKENS)
    completions = engine.generate(prompts, sampling, chat=True, batch_size=batch_size)
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def plainly(checkpoint):
    """Plain decoding, one prompt after another."""
    engine = open_model(
        checkpoint,
        platform="cpu",
        speculative=SpeculativeConfig(method="vanilla", verifier="coupled"),
    )
    return cache(lambda temperature: texts(engine, temperature, batch_size=1))


@pytest.fixture(scope="module")
def refit_of(drafts, tmp_path_factory):
    """Fit a draft to a few texts, too few to be good; return the directory."""

    @cache
    def fit(name: str) -> str:
        out = str(tmp_path_factory.mktemp("refit"))
        few = ["--lp-size", "4", "--borders", "paper", "--tokens", "2400", "--platform", "cpu"]
        assert refit(["--draft", str(drafts[name]), "--out", out, *few]) == 0
        return out

    return fit


@pytest.mark.exhaustive
@pytest.mark.parametrize("draft, mesh, way, temperature", EVERY_WAY)
def test_one_seed_is_one_text(checkpoint, drafts, refit_of, plainly, draft, mesh, way, temperature):
    """With any draft, and in batches of mixed lengths."""
    chosen = dict(WAYS[way])
    if chosen.get("refit"):
        chosen["refit"] = refit_of(draft)
    speculative = SpeculativeConfig(**chosen, verifier="coupled")
    engine = open_model(
        checkpoint, drafts[draft], mesh=mesh, platform="cpu", speculative=speculative
    )
    assert texts(engine, temperature, batch_size=5) == plainly(temperature)


EVERY_OPTION = SamplingParams(
    temperature=0.9,
    top_p=0.97,
    min_p=0.02,
    seed=11,
    max_new_tokens=32,
    logit_bias={284: 2.0, 30: -100.0},
    min_new_tokens=20,
    ignore_eos=True,
    stop_token_ids=(198,),
    presence_penalty=0.3,
    frequency_penalty=0.4,
    repetition_penalty=1.1,
    bad_words=("the", "it is"),
    n=3,
    logprobs=2,
)


def with_every_option(engine: Engine, batch_size: int) -> list[list[int]]:
    """Decode two prompts, each under three seeds, with every option of sampling in use."""
    made = engine.generate(PROMPTS[:2], EVERY_OPTION, chat=True, batch_size=batch_size)
    return [completion.token_ids for completion in made]


@pytest.fixture(scope="module")
def plainly_with_every_option(checkpoint):
    """Plain decoding, one text after another."""
    engine = open_model(
        checkpoint,
        platform="cpu",
        speculative=SpeculativeConfig(method="vanilla", verifier="coupled"),
    )
    return with_every_option(engine, batch_size=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["1", "2", "8"])
@pytest.mark.parametrize("way", [way for way in WAYS if not WAYS[way].get("refit")])
def test_every_option_at_once_leaves_one_seed_one_text(
    checkpoint, drafts, plainly_with_every_option, mesh, way
):
    """In batches, against plain decoding one after another."""
    engine = open_model(
        checkpoint,
        drafts["noisy"],
        mesh=mesh,
        platform="cpu",
        speculative=SpeculativeConfig(**WAYS[way], verifier="coupled"),
    )
    assert with_every_option(engine, batch_size=3) == plainly_with_every_option
    assert all(30 not in text for text in plainly_with_every_option)
