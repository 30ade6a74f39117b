"""Gates act as those of transformers do."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from easyspec_jax.model.activation import gated

GATE, UP = (np.random.default_rng(n).normal(scale=6, size=(5, 40)).astype("f4") for n in (0, 1))


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_a_function_of_the_gate_times_the_other_half(activation):
    expected = ACT2FN[activation](torch.from_numpy(GATE)).numpy() * UP
    found = gated(activation, jnp.asarray(GATE), jnp.asarray(UP))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_both_halves_are_clamped(dtype, rtol):
    assert GATE.max() > 7 and UP.max() > 7 and UP.min() < -7
    both = np.stack([GATE, UP], axis=-1).reshape(5, -1)  # rows in turn, as gpt-oss has them
    settings = SimpleNamespace(alpha=1.702, limit=7.0)
    expected = GptOssExperts._apply_gate(settings, torch.from_numpy(both)).numpy()  # pyright: ignore
    found = gated("clamped_swiglu", jnp.asarray(GATE, dtype), jnp.asarray(UP, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype("float32"), expected, atol=3e-2, rtol=rtol)
