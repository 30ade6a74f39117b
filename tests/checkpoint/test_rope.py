"""RoPE frequencies equal transformers', for every family and with Llama 3's scaling."""

import numpy as np
import pytest
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.rope import rope_frequencies
from tests.support.models import FAMILIES, family_config


@pytest.mark.parametrize("family", list(FAMILIES))
def test_frequencies(family):
    reference = family_config(family)
    expected = LlamaRotaryEmbedding(reference).inv_freq.numpy()
    np.testing.assert_allclose(
        rope_frequencies(model_config(reference.to_dict())), expected, rtol=1e-6
    )


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
    np.testing.assert_allclose(rotary.inv_freq.numpy(), rope_frequencies(plain), rtol=1e-6)
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
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)
