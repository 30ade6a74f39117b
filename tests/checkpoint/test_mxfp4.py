"""Experts in MXFP4 stand for exactly the numbers that transformers makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from convert.huggingface import open_huggingface
from convert.stream import convert
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.quantized import Dequantized
from easyspec_jax.errors import EasySpecError
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.models import forward, load_target, loader, save_model

LAYERS, EXPERTS = 2, "model.layers.1.mlp.experts."
SIZES = {"gate_up_proj": (128, 2), "down_proj": (64, 2)}  # outputs, and groups of 32 inputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor], torch.nn.Module]:
    """Return a checkpoint, its tensors, and transformers' model of the same numbers."""
    directory = tmp_path_factory.mktemp("mxfp4")
    model = save_model(directory, "gpt_oss", num_hidden_layers=LAYERS, intermediate_size=64)
    file, generator = directory / "model.safetensors", torch.Generator().manual_seed(3)
    stored = load_file(file)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        outputs, groups = SIZES[name.split(".")[-1]]
        blocks = torch.randint(0, 256, (6, outputs, groups, 16), generator=generator)
        scales = torch.randint(121, 126, (6, outputs, groups), generator=generator)
        del stored[name]
        stored |= {f"{name}_blocks": blocks.byte(), f"{name}_scales": scales.byte()}
        floats = convert_moe_packed_tensors(blocks.byte(), scales.byte(), dtype=torch.float32)
        model.get_parameter(name).data.copy_(floats)
    write(directory, stored, json.loads((directory / "config.json").read_text()))
    return directory, stored, model


def write(directory: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_matrices_are_exactly_those_of_transformers(saved):
    directory, _, model = saved
    source = open_checkpoint(directory).source
    floats = Dequantized(source)
    gate_up = model.get_parameter(EXPERTS + "gate_up_proj").detach().numpy()
    down = model.get_parameter(EXPERTS + "down_proj").detach().numpy()
    for expert in range(6):
        for part, expected in (
            ("gate_proj", gate_up[expert, :, 0::2].T),
            ("up_proj", gate_up[expert, :, 1::2].T),
            ("down_proj", down[expert].T),
        ):
            name = f"{EXPERTS}{expert}.{part}.weight"
            assert source.dtypes()[name] == "int8"
            np.testing.assert_array_equal(floats.read(name), expected)
            whole = source.read(name)
            for columns in (slice(21, 60), slice(33, 60)):
                window = slice(3, 50), columns
                np.testing.assert_array_equal(source.read(name, window), whole[window])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MeshShape(1, 1), MeshShape(2, 4)], ids=str)
def test_logits_are_those_of_transformers(saved, shape):
    """On eight devices the borders of shards cut groups of 32."""
    directory, _, model = saved
    ids = np.random.default_rng(0).integers(4, 300, (1, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    own = loader(open_checkpoint(directory), shape)
    found = forward(load_target(own), own.mesh, ids)[..., :300]
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_conversion_keeps_the_integers(saved, tmp_path):
    directory, *_ = saved
    model = open_huggingface(directory)
    convert(model, tmp_path / "out", "float32")
    converted = open_checkpoint(tmp_path / "out").source
    name = f"{EXPERTS}5.up_proj.weight"
    assert converted.dtypes()[name] == "int8"
    for own in (name, f"{name}_scale"):
        np.testing.assert_array_equal(converted.read(own), model.source.read(own))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("down_proj_scales", lambda x: x[:, :-1], r"has shape .*; expected \(6, 64, 2\)"),
        ("down_proj_scales", lambda x: x.int(), "is stored as I32"),
        ("gate_up_proj_blocks", lambda x: x[..., :8], "expected .experts, rows, columns / 32, 16"),
        ("gate_up_proj_blocks", lambda x: x[:, 1:], "expected .experts, rows, columns"),
        ("gate_up_proj_blocks", lambda x: x[:5], r"scales has shape .*; expected \(5, 128, 2\)"),
        ("gate_up_proj_blocks", lambda x: x[:, :, :1], "has shape"),
    ],
)
def test_parts_that_do_not_fit_are_reported(saved, tmp_path, part, change, message):
    source, stored, _ = saved
    config = json.loads((source / "config.json").read_text())
    tensors = stored | {EXPERTS + part: change(stored[EXPERTS + part]).contiguous()}
    with pytest.raises(EasySpecError, match=message):
        open_checkpoint(write(tmp_path, tensors, config))


def test_too_few_experts_are_reported(saved, tmp_path):
    source, stored, _ = saved
    config = json.loads((source / "config.json").read_text())
    names = (EXPERTS + "down_proj_blocks", EXPERTS + "down_proj_scales")
    short = {name: stored[name][:5].contiguous() for name in names}
    with pytest.raises(EasySpecError, match=r"down_proj_blocks has shape .*expected more than 5"):
        open_checkpoint(write(tmp_path, stored | short, config))


def test_scales_that_are_nan_are_reported(saved, tmp_path):
    source, stored, _ = saved
    config = json.loads((source / "config.json").read_text())
    scales = stored[EXPERTS + "down_proj_scales"].clone()
    scales[2, 7, 1] = 255
    opened = open_checkpoint(
        write(tmp_path, stored | {EXPERTS + "down_proj_scales": scales}, config)
    )
    with pytest.raises(EasySpecError, match=r"down_proj_scales holds NaN; fetch it again"):
        opened.source.read(f"{EXPERTS}2.down_proj.weight_scale")
