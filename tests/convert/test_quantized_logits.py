"""Logits of whole models out of quantized files are transformers', which computes in floats."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from convert.converting import ConvertConfig, convert
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.parallel.mesh import MeshShape
from tests.checkpoint import test_awq, test_compressed_tensors, test_fp8, test_gptq
from tests.convert.conftest import TOKENS
from tests.convert.test_gguf_tensors import EXACT, some_blocks
from tests.support.models import forward, load_target, loader
from tests.support.quantized_files import CONFIG, GROUP, write

_INT8 = {"num_bits": 8, "strategy": "channel"}
STORED = {
    "awq": (test_awq.model(), test_awq.SETTINGS),
    "gptq": (test_gptq.model(), test_gptq.SETTINGS),
    "gptq, zero points": (test_gptq.model(symmetric=False), test_gptq.SETTINGS | {"sym": False}),
    "gptq, 8 bits": (test_gptq.model(bits=8), test_gptq.SETTINGS | {"bits": 8}),
    "w4a16": (
        test_compressed_tensors.model(),
        test_compressed_tensors.settings(group_size=GROUP),
    ),
    "w4a16, zero points": (
        test_compressed_tensors.model(symmetric=False),
        test_compressed_tensors.settings(group_size=GROUP, symmetric=False),
    ),
    "w8a16": (
        test_compressed_tensors.model(bits=8, group=-1, is_packed=False),
        test_compressed_tensors.settings("int-quantized", **_INT8),
    ),
    "fp8, blocks": (test_fp8.model(), test_fp8.SETTINGS),
    "fp8, one scale": (test_fp8.model(blocks=False), test_fp8.PER_TENSOR),
}
"""Tensors to store, those that the format's formula makes of them, and the file's settings."""


ONE = MeshShape(1, 1)


def logits_of(directory: Path, ids: np.ndarray, shape: MeshShape = ONE) -> np.ndarray:
    """Compute logits in float32."""
    from_ = loader(open_checkpoint(directory), shape)
    return forward(load_target(from_), from_.mesh, ids)


def reference_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compare logits, relative to the largest."""
    found = found[..., : expected.shape[-1]]
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("converted", [False, True], ids=["opened", "converted"])
@pytest.mark.parametrize("kind", STORED)
def test_hugging_face_directories(tmp_path, kind, converted):
    (stored, exact), settings = STORED[kind]
    write(tmp_path / "hf", stored, settings)
    if converted:
        convert(tmp_path / "hf", tmp_path / "out", ConvertConfig(dtype="float32"))
    fields = {name: value for name, value in CONFIG.items() if name != "torch_dtype"}
    reference = LlamaForCausalLM(LlamaConfig(**fields))
    tensors = {name: torch.from_numpy(values.astype(np.float32)) for name, values in exact.items()}
    reference.load_state_dict(tensors)
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 20))
    found = logits_of(tmp_path / ("out" if converted else "hf"), ids)
    assert_close(found, reference_logits(reference, ids), 1e-3)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("kind", ["awq", "gptq, zero points", "w4a16, zero points"])
def test_offsets_on_several_devices(tmp_path, kind, devices):
    """Shares of 12 columns cut groups of 32, whose offsets then come several times."""
    (stored, _), settings = STORED[kind]
    write(tmp_path, stored, settings)
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 20))
    one = logits_of(tmp_path, ids)[..., : CONFIG["vocab_size"]]
    assert_close(logits_of(tmp_path, ids, MeshShape(1, devices)), one, 1e-4)


@pytest.mark.parametrize("keep_blocks", [False, True], ids=["floats", "kept"])
@pytest.mark.parametrize(
    "kind",
    [*EXACT, Type.Q4_1, Type.Q5_1, Type.Q2_K, Type.Q4_K, Type.Q5_K],
    ids=lambda kind: kind.name,
)
def test_gguf_files(tiny_model, write_gguf, tmp_path, kind, keep_blocks):
    """Transformers dequantizes these files by its own loader."""
    model = tiny_model(hidden_size=256, intermediate_size=256, rms_norm_eps=1e-5)
    shapes = {"attn_q": 256, "attn_k": 128, "attn_v": 128, "attn_output": 256}
    shapes |= {"ffn_gate": 256, "ffn_up": 256, "ffn_down": 256}
    tensors = {
        f"blk.{layer}.{name}.weight": (some_blocks(kind, rows, 256, 0.001), kind)
        for layer in range(2)
        for name, rows in shapes.items()
    }
    path = write_gguf(model, tensors=tensors)
    config = ConvertConfig(dtype="float32", keep_blocks=keep_blocks)
    result = convert(path, tmp_path / "out", config)
    assert bool(result.integers) == keep_blocks
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ids = np.random.default_rng(0).integers(0, len(TOKENS), (2, 20))
    assert_close(logits_of(tmp_path / "out", ids), reference_logits(reference, ids), 1e-3)
