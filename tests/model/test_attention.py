"""Each part of attention against transformers' module of the same name."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from easyspec_jax.config import model_config
from easyspec_jax.model.attention import chain_window, rope_frequencies, rotate
from easyspec_jax.model.norm import rms_norm
from tests.models import FAMILIES, family_config


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rotation(family):
    reference = family_config(family)
    config = model_config(reference.to_dict())
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 7, config.head_dim)).astype(np.float32))
    start = np.array([5, 900], np.int32)
    positions = torch.from_numpy(start[:, None] + np.arange(7)[None])
    cos, sin = LlamaRotaryEmbedding(reference)(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    window = chain_window(jnp.asarray(start), 7, 1024, config)
    np.testing.assert_allclose(rotate(jnp.asarray(x.numpy()), window), expected.numpy(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_frequencies(family):
    reference = family_config(family)
    expected = LlamaRotaryEmbedding(reference).inv_freq.numpy()
    np.testing.assert_allclose(rope_frequencies(model_config(reference.to_dict())), expected, rtol=1e-6)


def test_a_token_reads_itself_and_what_came_before():
    window = chain_window(jnp.array([0, 3]), 2, 6, model_config(family_config("smollm2").to_dict()))
    assert window.mask.astype(int).tolist() == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    ]


def test_norm():
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    reference = LlamaRMSNorm(16, eps=1e-5)
    torch.nn.init.normal_(reference.weight)
    expected = reference(torch.from_numpy(x)).detach().numpy()
    actual = rms_norm(jnp.asarray(x), jnp.asarray(reference.weight.detach().numpy()), 1e-5)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
