"""What is written is what our own reader of GGUF files reads: the same weights, bit by bit."""

import numpy as np
import pytest

from convert.gguf import open_gguf
from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.directory import open_checkpoint
from experiments.ours.gguf_file import write_gguf
from tests.support.models import save_model


@pytest.mark.parametrize("family", ["smollm2", "qwen2", "qwen3", "mistral"])
def test_weights_survive(tmp_path, family, monkeypatch):
    monkeypatch.setattr("convert.gguf.build_tokenizer", lambda *_: None)  # there is none
    save_model(tmp_path / "model", family)
    checkpoint = open_checkpoint(tmp_path / "model")
    write_gguf(checkpoint, tmp_path / "model.gguf")
    read = open_gguf(tmp_path / "model.gguf").source
    for name in expected_shapes(checkpoint.config):
        np.testing.assert_array_equal(read.read(name), checkpoint.source.read(name))
