"""The family that docs/families.md adds loads, converts and comes back as built-in ones do."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from convert.huggingface import open_huggingface
from convert.shards import HUGGING_FACE
from convert.stream import convert
from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import FAMILIES
from easyspec_jax.errors import EasySpecError
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.models import forward, load_target, loader

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture
def phi3(monkeypatch) -> transformers.Phi3Config:
    """A configuration of the family that the page adds."""
    scope: dict[str, Any] = {}
    monkeypatch.setitem(FAMILIES, "phi3", None)  # taken out again after the test
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, scope)
    return transformers.Phi3Config(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def test_the_page_adds_a_family(phi3, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(phi3, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "hf")
    ids = np.arange(24).reshape(2, 12)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    convert(open_huggingface(tmp_path / "hf"), tmp_path / "orbax", verify=True)
    convert(
        open_huggingface(tmp_path / "orbax"), tmp_path / "out", format=HUGGING_FACE, verify=True
    )
    for directory, mesh in (
        ("hf", MeshShape(1, 1)),
        ("orbax", MeshShape(2, 4)),
        ("out", MeshShape(1, 2)),
    ):
        from_ = loader(open_checkpoint(tmp_path / directory), mesh)
        ours = forward(load_target(from_), from_.mesh, ids)[:, :, :100]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(stored[name], values) for name, values in model.named_parameters())


def test_the_page_refuses_what_it_says_it_refuses(phi3):
    config = phi3.to_dict()
    assert model_config(config).head_dim == 12
    with pytest.raises(EasySpecError, match="partial_rotary_factor"):
        model_config(config | {"partial_rotary_factor": 0.5})
    with pytest.raises(EasySpecError, match="sliding-window"):
        model_config(config | {"sliding_window": 63})


def test_joined_tensors_are_checked_as_they_are_stored(phi3, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(phi3)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_key_value_heads": 2', '"num_key_value_heads": 4')
    )
    with pytest.raises(
        EasySpecError, match=r"qkv_proj\.weight has shape \(96, 48\) instead of \(144, 48\)"
    ):
        open_checkpoint(tmp_path)
