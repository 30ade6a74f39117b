"""RoPE frequencies and amplitudes equal transformers', for every family and every scaling."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.layer_kinds import LayerKind
from easyspec_jax.checkpoint.rope import LinearScaling, Rope
from tests.support.models import FAMILIES, family_config

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.5, 2.0, 6.0, 20.0],
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": YARN,
    "yarn, bounds": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn, amplitude": YARN | {"attention_factor": 0.5},
    "yarn, scales": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, from lengths": YARN | {"factor": None},
    "yarn, long original": YARN | {"original_max_position_embeddings": 2**17},
    "yarn, no original length": {k: v for k, v in YARN.items() if k[0] != "o"},
    "longrope": LONGROPE,
    "longrope, amplitude": LONGROPE | {"attention_factor": 1.25},
    "longrope, factor": LONGROPE | {"factor": 32.0},
}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma2", "gemma3"}))
def test_frequencies(family):
    reference = family_config(family)
    expected = LlamaRotaryEmbedding(reference).inv_freq.numpy()
    config = model_config(reference.to_dict())
    assert len(config.layers) == config.num_hidden_layers
    for kind in config.kinds:
        np.testing.assert_allclose(kind.rope.frequencies(), expected, rtol=1e-6)


def test_frequencies_of_each_type_of_layer():
    reference = family_config("gemma3")
    rotary = Gemma3RotaryEmbedding(reference)
    config = model_config(reference.to_dict())
    for name, kind in zip(reference.layer_types, config.layers, strict=True):
        expected = getattr(rotary, f"{name}_inv_freq").numpy()
        np.testing.assert_allclose(kind.rope.frequencies(), expected, rtol=1e-6)
    assert [kind.window for kind in config.layers] == [20, 20, None] * 2


@pytest.mark.parametrize("tokens", [40, 64, 1024, 1500])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_at_a_length(name, tokens):
    """Lengths are below, at and beyond most original ones: 64, or 1024 for scalings without any."""
    reference = family_config("llama3", rope_parameters=dict(SCALINGS[name]))
    rotary = LlamaRotaryEmbedding(reference)
    rotary(torch.zeros(1), torch.arange(tokens)[None])  # updates what depends on the length
    rope = model_config(reference.to_dict()).at_length(tokens).kinds[0].rope
    np.testing.assert_allclose(rope.frequencies(), rotary.inv_freq.numpy(), rtol=2e-6)
    np.testing.assert_allclose(rope.amplitude, rotary.attention_scaling, rtol=1e-6)


@pytest.mark.parametrize(
    "name, ordinary, longest",
    [
        ("linear", 1024, 4096),
        ("dynamic", 1024, 4096),
        ("yarn", 1024, 1024),
        ("yarn, no original length", 1024, 4096),
        ("longrope", 64, 1024),
    ],
)
def test_lengths_of_texts(name, ordinary, longest):
    config = model_config(family_config("llama3", rope_parameters=dict(SCALINGS[name])).to_dict())
    assert (config.ordinary_length, config.longest_text) == (ordinary, longest)
    assert config.at_length(65).ordinary_length == 1024
    assert config.at_length(65) == config.at_length(65).at_length(65)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_scaling_by_one_scales_nothing(kind):
    reference = family_config(
        "llama3", rope_parameters={"rope_type": kind, "rope_theta": 5e5, "factor": 1.0}
    )
    rotary = LlamaRotaryEmbedding(reference)
    plain = model_config(
        family_config(
            "llama3", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
        ).to_dict()
    )
    frequencies = plain.kinds[0].rope.frequencies()
    np.testing.assert_allclose(rotary.inv_freq.numpy(), frequencies, rtol=1e-6)
    assert rotary.attention_scaling == 1
    assert model_config(reference.to_dict()) == plain


def test_an_original_length_next_to_the_scaling_counts():
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    fields = {"rope_parameters": scaling, "original_max_position_embeddings": 64}
    reference = family_config("llama3", **fields)
    config = model_config(reference.to_dict() | fields)
    expected = LlamaRotaryEmbedding(reference).inv_freq.numpy()
    np.testing.assert_allclose(config.kinds[0].rope.frequencies(), expected, rtol=1e-6)


def test_layers_of_two_types_rotate_and_read_differently():
    """As transformers 5 writes it for Gemma 3."""
    config = family_config("qwen3").to_dict() | {
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    ours = model_config(config)
    sliding, full = ours.kinds
    assert sliding == LayerKind(Rope(1e4, 16), 32)
    assert full == LayerKind(Rope(1e6, 16, LinearScaling(8.0)))
    assert [ours.kind_of(layer) for layer in range(6)] == [0] * 5 + [1]
    assert ours.longest_text == 1024  # the sliding layers' rotation is not scaled
