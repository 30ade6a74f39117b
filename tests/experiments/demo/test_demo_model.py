"""The function that is trained is the model that is exported."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from experiments.demo.demo_model import QUERY_BLOCK, Shape, checkpoint, init, logits

model = jax.jit(logits, static_argnums=0)
SHAPE = Shape(48, 3, 80, 4, 2, 16, vocab_size=90)


@pytest.fixture(scope="module")
def params():
    """Random parameters whose norms are not at their neutral values."""
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32),
        init(SHAPE, jax.random.key(0)),
    )


@pytest.mark.parametrize("length", [1, QUERY_BLOCK, QUERY_BLOCK + 72])
def test_transformers_agrees(params, tmp_path, length):
    save_file(checkpoint(SHAPE, params), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(SHAPE.config(512)))
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    reference, faults = loaded
    assert not any(faults.values())
    tokens = np.random.default_rng(1).integers(0, SHAPE.vocab_size, (2, length))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(SHAPE, params, tokens), expected, atol=1e-4)


def test_no_token_sees_a_later_one(params):
    tokens = np.random.default_rng(1).integers(0, SHAPE.vocab_size, (1, QUERY_BLOCK + 8))
    changed = tokens.copy()
    changed[0, QUERY_BLOCK + 2 :] = 5
    before, after = (np.asarray(model(SHAPE, params, t))[0] for t in (tokens, changed))
    np.testing.assert_array_equal(before[: QUERY_BLOCK + 2], after[: QUERY_BLOCK + 2])
    assert np.abs(before - after)[QUERY_BLOCK + 2].max() > 0.01


def test_the_stream_starts_as_the_embedding():
    """Small output projections: an untrained model's logits are those of its embedding, nearly."""
    params = init(SHAPE, jax.random.key(0))
    sizes = {name: float(np.std(weight)) for name, weight in params["layers"].items()}
    assert sizes["o"] < 0.2 * sizes["q"]
    assert sizes["down"] < 0.2 * sizes["gate"]
