"""Each expert of gpt-oss has tensors of its own, whatever the file stacks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.errors import EasySpecError
from tests.support.models import save_model

EXPERTS = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("gpt_oss")
    save_model(directory, "gpt_oss", num_hidden_layers=2)
    return directory, load_file(directory / "model.safetensors")


def changed(saved, directory: Path, tensors: dict[str, torch.Tensor | None]) -> Path:
    """Copy the checkpoint with other tensors; None removes one."""
    source, stored = saved
    kept = {name: own for name, own in (stored | tensors).items() if own is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


def test_gate_and_up_take_turns_and_matrices_are_transposed(saved):
    directory, stored = saved
    source = open_checkpoint(directory).source
    gate_up, down = stored[EXPERTS + "gate_up_proj"], stored[EXPERTS + "down_proj"]
    bias, down_bias = stored[EXPERTS + "gate_up_proj_bias"], stored[EXPERTS + "down_proj_bias"]
    for expert in range(6):
        expected = {
            "gate_proj.weight": gate_up[expert, :, 0::2].T,
            "up_proj.weight": gate_up[expert, :, 1::2].T,
            "down_proj.weight": down[expert].T,
            "gate_proj.bias": bias[expert, 0::2],
            "up_proj.bias": bias[expert, 1::2],
            "down_proj.bias": down_bias[expert],
        }
        for part, values in expected.items():
            name = f"{EXPERTS}{expert}.{part}"
            assert source.shapes()[name] == tuple(values.shape)
            np.testing.assert_array_equal(source.read(name), values.numpy())


@pytest.mark.parametrize("part", ["gate_proj.weight", "up_proj.weight", "down_proj.weight"])
def test_windows_are_those_of_the_whole(saved, part):
    source, name = open_checkpoint(saved[0]).source, f"{EXPERTS}4.{part}"
    whole = source.read(name)
    for window in ((slice(3, 11),), (slice(3, 11), slice(5, 30)), (slice(7, 7), slice(0, 36))):
        np.testing.assert_array_equal(source.read(name, window), whole[window])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"down_proj": torch.zeros(5, 36, 64)}, r"experts\.5\.down_proj\.weight is missing"),
        ({"gate_up_proj": None}, r"experts\.0\.gate_proj\.weight is missing"),
        (
            {"gate_up_proj": torch.zeros(6, 72)},
            r"experts\.0\.gate_proj\.weight is missing.*gate_up_proj is unknown",
        ),
        ({"gate_up_proj_bias": torch.zeros(6, 70)}, r"has shape \(35,\) instead of \(36,\)"),
    ],
)
def test_stacks_that_do_not_fit_are_reported(saved, tmp_path, tensors, message):
    directory = changed(saved, tmp_path, {EXPERTS + name: own for name, own in tensors.items()})
    with pytest.raises(EasySpecError, match=message):
        open_checkpoint(directory)


def test_other_families_stack_nothing(tmp_path):
    """Their gate and up would be halves of a stack; read as alternating rows, they are wrong."""
    save_model(tmp_path, "qwen3_moe", num_hidden_layers=1, mlp_only_layers=[])
    file = tmp_path / "model.safetensors"
    stored, prefix = load_file(file), "model.layers.0.mlp.experts."
    kept = {name: own for name, own in stored.items() if "experts" not in name}
    kept[prefix + "gate_up_proj"] = torch.zeros(10, 48, 40)
    kept[prefix + "down_proj"] = torch.zeros(10, 20, 48)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(EasySpecError, match=r"experts\.0\.gate_proj\.weight is missing"):
        open_checkpoint(tmp_path)
