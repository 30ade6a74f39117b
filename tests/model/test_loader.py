"""Parts are dealt out so that a device reads as little as it can."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.engine.abstract import ShapeLoader, Shapes, absent_mesh
from easyspec_jax.model.experts import Experts
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import MLP
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.plan.configurations import bundled
from tests.support.models import loader, save_model


@pytest.mark.parametrize(
    ("inner", "devices", "width", "groups"),
    # Whole groups of 128, unless that pads much or leaves a device without any; in the last case a
    # row has one scale.
    [(1920, 2, 1024, 8), (640, 2, 320, 5), (640, 4, 160, 5), (384, 8, 48, 3), (80, 2, 40, 1)],
)
def test_shards_end_where_groups_of_columns_end(tmp_path, inner, devices, width, groups):
    save_model(tmp_path, "llama3", intermediate_size=inner, num_hidden_layers=1)
    whole = loader(open_checkpoint(tmp_path), MeshShape(1, devices))
    mlp, floats = replace(whole, weights="int4").mlp(0), whole.mlp(0)
    assert isinstance(mlp, MLP) and isinstance(floats, MLP) and mlp.down.weight.scale is not None
    assert mlp.down.weight.shape[1] == devices * width
    assert mlp.gate_up.weight.shape[0] == 2 * devices * width
    assert mlp.down.weight.scale.shape[1] == devices * groups
    # Floats have no groups.
    assert floats.down.weight.shape[1] == devices * -(-inner // devices)


@pytest.mark.parametrize(
    ("weights", "tokens", "dealt"),
    [("int4", 6, True), ("int4", 1, False), ("int4", None, False), (None, 6, False)],
)
def test_whole_experts_are_dealt_out_where_shares_would_take_more(weights, tokens, dealt):
    """Qwen3-30B-A3B on eight devices: shares of 96 channels cut groups of 128 into parts of 32."""
    config, mesh = bundled()["Qwen3-30B-A3B"], absent_mesh(MeshShape(1, 8), "gpu")
    shapes = Shapes(expected_shapes(config), ())
    from_ = ShapeLoader(
        source=shapes,
        config=config,
        mesh=mesh,
        axes=ALL_AXES,
        dtype=np.dtype("bfloat16"),
        vocab_rows=padded_vocab_size(mesh, config),
        num_ids=config.vocab_size,
        weights=weights,
        tokens=tokens,
    )
    experts = from_.mlp(0)
    assert isinstance(experts, Experts)
    down: Any = experts.parts.down.values.get_value()
    shard = (16, 2048, 768) if dealt else (128, 2048, 96)
    assert bool(experts.axes) == dealt and down.sharding.shard_shape(down.shape) == shard
