"""Logits equal transformers' beyond the original length of a scaled RoPE, and beyond windows."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.engine.pair import at_length
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.models import forward, load_target, loader, save_model

TOKENS = np.random.default_rng(0).integers(3, 300, (2, 48))
ORIGINAL = 16
LAYERS = 3

_ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}
_LONGROPE = _ROPE | {
    "rope_type": "longrope",
    "short_factor": list(np.linspace(1, 2, 4)),
    "long_factor": list(np.linspace(2, 20, 4)),
}
_KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama3", {"rope_parameters": _ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "dynamic": (
        "llama3",
        {
            "rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 4.0},
            "max_position_embeddings": ORIGINAL,
        },
    ),
    "yarn": ("qwen3", {"rope_parameters": _ROPE | {"rope_type": "yarn", "factor": 4.0}}),
    "longrope": ("llama3", {"rope_parameters": _LONGROPE, "max_position_embeddings": 64}),
    "window of every layer": ("mistral", {"sliding_window": 7}),
    "window of the upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "windows and yarn": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": _KINDS,
            "rope_parameters": _ROPE | {"rope_type": "yarn", "factor": 4.0},
        },
    ),
}


@pytest.fixture(params=MODELS)
def model(request, tmp_path) -> tuple[Checkpoint, Any]:
    """A checkpoint, and its model in transformers."""
    family, options = MODELS[request.param]
    options = copy.deepcopy(options) | {"num_hidden_layers": LAYERS}  # transformers writes in it
    reference = save_model(tmp_path, family, **options)
    return open_checkpoint(tmp_path), reference


def logits_of(checkpoint: Checkpoint, mesh: MeshShape, ids: np.ndarray) -> np.ndarray:
    from_ = loader(at_length(checkpoint, ids.shape[1]), mesh)
    return forward(load_target(from_), from_.mesh, ids)[:, :, :300]


def test_logits(model):
    """On three meshes, and for a text within the original length as well."""
    checkpoint, reference = model
    one, meshes = MeshShape(1, 1), (MeshShape(1, 1), MeshShape(1, 2), MeshShape(4, 2))
    for length, mesh in ((12, one), *((48, mesh) for mesh in meshes)):
        ids = TOKENS[:, :length]
        with torch.no_grad():
            expected = reference(torch.from_numpy(ids)).logits.numpy()
        found = logits_of(checkpoint, mesh, ids)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
