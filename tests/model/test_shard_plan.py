"""Plans copy every stored element once for each replica, and are data that can be printed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import ModelConfig, model_config
from easyspec_jax.checkpoint.tensors import TensorSource
from easyspec_jax.engine.abstract import Shapes, absent_mesh
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.shard_plan import ArrayPlan, Copy, matrix
from easyspec_jax.model.sharding import even_entries, head_entries, head_layout, padded_vocab_size
from easyspec_jax.parallel.mesh import ALL_AXES, LAYER, TENSOR, Axes, MeshShape, open_mesh
from tests.support.models import FAMILIES, family_config, load_target

MESHES = [MeshShape(*sizes) for sizes in [(1, 1), (4, 2), (2, 4), (8, 1), (1, 3), (16, 4)]]

PRINTED = """\
[4, 12] as a [2, 1] grid of [2, 12] shards
model.layers.3.input_layernorm.weight[0:12] -> [0, 0:12] of shard 0
model.layers.4.input_layernorm.weight[0:12] -> [1, 0:12] of shard 0
model.layers.5.input_layernorm.weight[0:12] -> [0, 0:12] of shard 1
[4, 20, 12] as a [2, 1, 1] grid of [2, 20, 12] shards
model.layers.3.self_attn.q_proj.weight[0:12, 0:12] -> [0, 0:12, 0:12] of shard 0
model.layers.3.self_attn.k_proj.weight[0:4, 0:12] -> [0, 12:16, 0:12] of shard 0
model.layers.3.self_attn.v_proj.weight[0:4, 0:12] -> [0, 16:20, 0:12] of shard 0
model.layers.4.self_attn.q_proj.weight[0:12, 0:12] -> [1, 0:12, 0:12] of shard 0
model.layers.4.self_attn.k_proj.weight[0:4, 0:12] -> [1, 12:16, 0:12] of shard 0
model.layers.4.self_attn.v_proj.weight[0:4, 0:12] -> [1, 16:20, 0:12] of shard 0
model.layers.5.self_attn.q_proj.weight[0:12, 0:12] -> [0, 0:12, 0:12] of shard 1
model.layers.5.self_attn.k_proj.weight[0:4, 0:12] -> [0, 12:16, 0:12] of shard 1
model.layers.5.self_attn.v_proj.weight[0:4, 0:12] -> [0, 16:20, 0:12] of shard 1
[12] as a [1] grid of [12] shards
model.layers.0.post_attention_layernorm.weight[0:12] -> [0:12] of shard 0
[12, 12] as a [2, 1] grid of [6, 12] shards
model.layers.0.mlp.gate_proj.weight[0:3, 0:12] -> [0:3, 0:12] of shard 0
model.layers.0.mlp.up_proj.weight[0:3, 0:12] -> [3:6, 0:12] of shard 0
model.layers.0.mlp.gate_proj.weight[3:5, 0:12] -> [0:2, 0:12] of shard 1
model.layers.0.mlp.up_proj.weight[3:5, 0:12] -> [3:5, 0:12] of shard 1
[12, 6] as a [1, 2] grid of [12, 3] shards
model.layers.0.mlp.down_proj.weight[0:12, 0:3] -> [0:12, 0:3] of shard 0
model.layers.0.mlp.down_proj.weight[0:12, 3:5] -> [0:12, 0:2] of shard 1
"""


@dataclass(frozen=True)
class Recorder(Loader):
    """A Loader that notes the plans of its arrays and carries out none of them."""

    plans: list[ArrayPlan] = field(default_factory=list)

    def load(
        self, plan: ArrayPlan, dtype: np.dtype | None = None, source: TensorSource | None = None
    ) -> Any:
        self.plans.append(plan)
        return jax.ShapeDtypeStruct(plan.shape, self.dtype)


def recorder(config: ModelConfig, shape: MeshShape, axes: Axes = ALL_AXES) -> Recorder:
    mesh = absent_mesh(shape, "cpu")
    rows = padded_vocab_size(mesh, config)
    source = Shapes(expected_shapes(config))
    return Recorder(
        source=source,
        config=config,
        mesh=mesh,
        axes=axes,
        dtype=np.dtype(np.float32),
        vocab_rows=rows,
        num_ids=config.vocab_size,
    )


def read_config(family: str, **options: Any) -> ModelConfig:
    return model_config(family_config(family, **options).to_dict())


def times_copied(
    plans: Sequence[ArrayPlan], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """How often each stored element is copied; checks that copies fit and do not overlap."""
    counts: dict[str, np.ndarray] = {}
    for plan in plans:
        for copies in plan.by_shard():
            filled = np.zeros(plan.shard_shape, int)
            for copy in copies:
                read = counts.setdefault(copy.tensor, np.zeros(shapes[copy.tensor], int))
                source, target = read[copy.source], filled[copy.target]
                assert source.size and source.shape == target.shape
                source += 1
                target += 1
            assert filled.max(initial=0) <= 1
    return counts


def expected_times(
    config: ModelConfig, name: str, shape: tuple[int, ...], shards: int
) -> np.ndarray:
    """Once, or as often as head_layout() copies a key-value head."""
    times = np.ones(shape, int)
    full_norm = "k_norm" in name and config.qk_norm == "full"
    if full_norm or "k_proj" in name or "v_proj" in name:
        layout = head_layout(config.num_attention_heads, config.num_key_value_heads, shards)
        copies = Counter(layout.kv_index.flat)
        for head, own in enumerate(np.split(times, config.num_key_value_heads)):
            own[...] = copies[head]
    return times


def carried_out(plan: ArrayPlan, tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The shards of a plan."""
    shards = []
    for copies in plan.by_shard():
        shard = np.zeros(plan.shard_shape)
        for copy in copies:
            shard[copy.target] = tensors[copy.tensor][copy.source]
        shards.append(shard)
    return shards


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_stored_element_is_copied_once(family, tied, mesh):
    config = read_config(family, tie_word_embeddings=tied, intermediate_size=61, vocab_size=301)
    loader, stored = recorder(config, mesh), expected_shapes(config)
    load_target(loader)
    counts = times_copied(loader.plans, stored)
    assert counts.keys() == stored.keys()
    for name, shape in stored.items():
        expected = expected_times(config, name, shape, mesh.size)
        np.testing.assert_array_equal(counts[name], expected, err_msg=name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_replicated_parts_have_one_shard(family):
    config = read_config(family)
    loader = recorder(config, MeshShape(4, 2), axes=())
    load_target(loader)
    assert all(prod(plan.grid) == 1 for plan in loader.plans)
    counts = times_copied(loader.plans, expected_shapes(config))
    assert all((times == 1).all() for times in counts.values())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_stack_copies_its_layers_once_and_leaves_other_slots_empty(family, mesh):
    config, layers = read_config(family), [1, 2, 4]
    loader, stored = recorder(config, mesh), expected_shapes(config)
    slots = mesh.layer * (1 + len(layers) // mesh.layer)
    loader.stacked_attention(layers, slots)
    counts = times_copied(loader.plans, stored)
    assert {name.split(".")[2] for name in counts} == {"1", "2", "4"}
    for name, times in counts.items():
        expected = expected_times(config, name, stored[name], mesh.tensor)
        np.testing.assert_array_equal(times, expected, err_msg=name)
    for plan in loader.plans:
        assert plan.shape[0] == slots
        for copy in plan.copies:
            device, slot = copy.shard // prod(plan.grid[1:]), copy.target[0]
            assert isinstance(slot, int)
            layer = layers[device * plan.shard_shape[0] + slot]
            assert copy.tensor.startswith(f"model.layers.{layer}.")


def test_biases_of_some_layers_leave_those_of_the_others_zero():
    config = read_config("llama3")
    loader = recorder(config, MeshShape(2, 1))
    assert loader.stacked_qkv([1, 2, 3], slots=4).bias is None
    shapes = dict(expected_shapes(config))
    for name in "qkv":
        prefix = f"model.layers.2.self_attn.{name}_proj"
        shapes[f"{prefix}.bias"] = shapes[f"{prefix}.weight"][:1]
    loader = replace(loader, source=Shapes(shapes), plans=[])
    assert loader.stacked_qkv([1, 2, 3], slots=4).bias is not None
    (bias,) = [plan for plan in loader.plans if plan.copies[0].tensor.endswith("bias")]
    assert {(copy.shard, copy.target[0]) for copy in bias.copies} == {(0, 1)}
    counts = times_copied([bias], shapes)
    assert len(counts) == 3
    assert all((times == 1).all() for times in counts.values())


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3))
def test_heads_are_put_where_attention_finds_them(group, kv_heads, shards, head_dim):
    layout = head_layout(group * kv_heads, kv_heads, shards)
    q = np.random.default_rng(0).normal(size=(group * kv_heads * head_dim, 3))
    k = np.random.default_rng(1).normal(size=(kv_heads * head_dim, 3))
    entries = {
        "q": head_entries(layout.query_index, head_dim),
        "k": head_entries(layout.kv_index, head_dim),
    }
    plan = matrix(entries, 3, (TENSOR,), dimension=0)
    for shard, values in enumerate(carried_out(plan, {"q": q, "k": k})):
        rows = []
        for tensor, heads in ((q, layout.query_index[shard]), (k, layout.kv_index[shard])):
            for head in heads:
                stored = tensor[head * head_dim : (head + 1) * head_dim]
                rows.append(np.zeros((head_dim, 3)) if head < 0 else stored)
        np.testing.assert_array_equal(values, np.concatenate(rows))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_rows_and_columns_are_dealt_out_evenly(size, shards, surplus, columns):
    width = -(-size // shards) + surplus
    stored = np.random.default_rng(0).normal(size=(size, 4))
    whole = np.pad(stored, [(0, shards * width - size), (0, 0)])
    if columns:
        stored, whole = stored.T, whole.T
    plan = matrix({"w": even_entries(size, width, shards)}, 4, ALL_AXES, dimension=int(columns))
    assert plan.shape == whole.shape
    parts = carried_out(plan, {"w": stored})
    np.testing.assert_array_equal(np.concatenate(parts, axis=int(columns)), whole)


def test_runs_are_copied_at_once():
    entries = np.array([[4, 5, -1, 7], [-1, 0, 1, 2], [-1, -1, -1, -1]])
    plan = matrix({"w": entries}, 2, (TENSOR,), dimension=0)
    assert plan.copies == (
        Copy("w", (slice(4, 6), slice(0, 2)), 0, (slice(0, 2), slice(0, 2))),
        Copy("w", (slice(7, 8), slice(0, 2)), 0, (slice(3, 4), slice(0, 2))),
        Copy("w", (slice(0, 3), slice(0, 2)), 1, (slice(1, 4), slice(0, 2))),
    )


def test_shards_are_numbered_as_jax_places_them():
    plan = matrix({"w": even_entries(5, 2, 4)}, 3, (TENSOR,), dimension=1).stacked([0, 1], 4, 2)
    sharding = NamedSharding(open_mesh(MeshShape(2, 4)), plan.spec)
    assert plan.spec == P(LAYER, None, (TENSOR,))
    assert sharding.shard_shape(plan.shape) == plan.shard_shape
    numbers = {}
    for device, bounds in sharding.devices_indices_map(plan.shape).items():
        numbers[device] = plan.shard_at(bounds or ())
    expected = np.arange(8).reshape(2, 4)
    for place, device in np.ndenumerate(sharding.mesh.devices):
        assert numbers[device] == expected[place]


def test_a_plan_prints_a_line_for_each_copy():
    config = read_config("smollm2", hidden_size=12, num_attention_heads=3, num_key_value_heads=1)
    loader = recorder(replace(config, intermediate_size=5), MeshShape(2, 1))
    loader.stacked_qkv([3, 4, 5], slots=4)
    loader.mlp(0)
    printed = "\n".join(map(str, loader.plans))
    assert f"{printed}\n" == PRINTED
