"""The cosines are those that transformers' hidden states have."""

import json

import pytest
import torch
import transformers

from experiments.ours import fidelity
from tests.support.models import save_model


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """Save a draft of four layers whose middle ones may run at once, with transformers' model."""
    directory = tmp_path_factory.mktemp("fidelity")
    reference = save_model(directory / "draft", "smollm2", num_hidden_layers=4)
    (directory / "prompts.txt").write_text("a fox\n")
    return directory, reference


def flags(directory) -> list[str]:
    prompts = ["--prompts", str(directory / "prompts.txt"), "--max-new-tokens", "10"]
    return ["--draft", str(directory / "draft"), *prompts]


def test_cosines_are_those_of_transformers(draft, capsys):
    directory, reference = draft
    assert fidelity.main([*flags(directory), "--lp-size", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["groups"], found["refit"]) == ("0,1-2,3", False)
    assert found["positions"] == 10
    assert 1 > found["overlap"][0] > found["overlap"][-1] > 0
    cosines = expected_cosines(directory, reference)
    assert {name: found["cosine"][name] for name in cosines} == pytest.approx(cosines, abs=1e-5)
    assert min(cosines.values()) < 0.999, "what is not stale would prove nothing"


def expected_cosines(directory, reference) -> dict[str, float]:
    """Only layer 2 is stale at depth 1: it sees what layer 1 sees, which is still exact."""
    ids = transformers.AutoTokenizer.from_pretrained(directory / "draft")(
        "a fox", return_tensors="pt"
    ).input_ids
    texts = reference.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        states = reference(texts, output_hidden_states=True).hidden_states
        layer = reference.model.layers[2]
        fed = {"h": (states[2], states[1])}
        for name in "qkv":
            project = getattr(layer.self_attn, f"{name}_proj")
            fed[name] = tuple(project(layer.input_layernorm(h)) for h in fed["h"])
        counted = slice(ids.shape[1] - 1, texts.shape[1] - 1)
        return {
            name: torch.cosine_similarity(*pair, dim=-1)[0, counted].mean().item()
            for name, pair in fed.items()
        }


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--lp-size", "1"], "in groups of one layer nothing is fuzzy"),
        (["--lp-size", "3", "--refit", "nowhere"], "--refit nowhere has no lp3.safetensors"),
    ],
)
def test_bad_arguments_are_one_line(draft, arguments, complaint, capsys):
    assert fidelity.main([*flags(draft[0]), *arguments]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
