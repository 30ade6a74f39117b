"""Compiled for an H100 that need not be there: few kernels, no copies, caches written in place."""

import re
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.draft.layer_group import LayerGroup, load_block
from easyspec_jax.engine.abstract import ShapeLoader, Shapes
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.windows import Window
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.parallel.spmd import partition_specs, spmd
from easyspec_jax.plan.ahead import topology_mesh
from easyspec_jax.plan.compiled_text import CompiledText
from easyspec_jax.plan.configurations import bundled
from easyspec_jax.plan.machines import parse_topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
        reason="no compiler for GPUs",
    ),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

LLAMA = bundled()["Llama-3.2-1B"]
LAYERS = range(1, 5)
# In "  %fusion.1 = bf16[4,2048]{1,0} fusion(…)" the operation is the word before the parenthesis.
OPERATION = re.compile(r"^ +(?:ROOT )?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(")
LAUNCH_NOTHING = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant"}


def compiled(run: Any, settings: PlatformSettings, tokens: int, capacity: int) -> Any:
    """Compile a pass through a group of Llama-3.2-1B, in bfloat16, for one H100."""
    mesh = topology_mesh(parse_topology("h100:1"), MeshShape(1, 1))
    shapes = Shapes(expected_shapes(LLAMA))
    dtype = np.dtype("bfloat16")
    loader = ShapeLoader(
        source=shapes,
        config=LLAMA,
        mesh=mesh,  # pyright: ignore[reportArgumentType]
        axes=ALL_AXES,
        dtype=dtype,
        vocab_rows=LLAMA.vocab_size,
        num_ids=LLAMA.vocab_size,
        settings=settings,
    )
    group = load_block(loader, LAYERS)
    assert isinstance(group, LayerGroup)

    def shape(*sizes: int, dtype: Any = np.float32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

    rotation = shape(1, tokens, LLAMA.head_dim // 2)
    mask = shape(1, tokens, capacity, dtype=np.bool_)
    window = Window(shape(1, dtype=np.int32), mask, rotation, rotation)
    stack = len(LAYERS), LLAMA.num_key_value_heads, capacity, LLAMA.head_dim
    cache = KVCache(shape(*stack, dtype=dtype), shape(*stack, dtype=dtype))
    h = shape(1, tokens, LLAMA.hidden_size, dtype=dtype)
    arguments = group, h, cache, (window,)
    step = spmd(run, mesh, partition_specs(arguments), (P(), P()))
    return jax.jit(step, donate_argnums=2).trace(*arguments).lower().compile()


def launched(text: str) -> list[str]:
    """List the operations of a compiled program that are kernels or copies."""
    lines = text[text.index("\nENTRY ") :].splitlines()
    operations = [found[1] for found in map(OPERATION.match, lines) if found]
    return [operation for operation in operations if operation not in LAUNCH_NOTHING]


def cache_bytes(capacity: int) -> int:
    """Return the bytes of the group's keys and values, in bfloat16."""
    return 2 * 2 * len(LAYERS) * LLAMA.num_key_value_heads * capacity * LLAMA.head_dim


@pytest.mark.parametrize("capacity", [512, 8192])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_group_in_a_fuzzy_pass(tokens, capacity):
    run = LayerGroup._attend_at_once
    program = compiled(run, PlatformSettings(fused_attention=True), tokens, capacity)
    kernels = launched(program.as_text())
    # project_and_write, attend, combine and project_out. The others find the last entry to read,
    # once for all groups of a pass.
    assert kernels.count("custom-call") == 4
    assert len(kernels) <= 6
    assert "copy" not in kernels
    assert len(kernels) < len(
        launched(compiled(run, PlatformSettings(), tokens, capacity).as_text())
    )
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes(capacity)
    # Partial results of 8 stretches of keys in float32, and little else.
    assert memory.temp_size_in_bytes < 2 * 8 * 4 * len(LAYERS) * tokens * LLAMA.hidden_size


def test_whole_layers():
    """Each layer's feed-forward part needs one kernel before its down projection."""
    run = LayerGroup.fuzzy
    fused = compiled(run, PlatformSettings(fused_attention=True, fused_mlp=True), 1, 512)
    kernels = launched(fused.as_text())
    assert kernels.count("custom-call") == 4 + len(LAYERS)
    assert "copy" not in kernels
    without = compiled(run, PlatformSettings(fused_attention=True), 1, 512)
    assert len(kernels) <= len(launched(without.as_text())) - 2 * len(LAYERS)


def written(fused: bool, out: int, groups: int, tokens: int) -> list[int]:
    """List the bytes that each kernel of a product by an int4 matrix of one slot of two writes."""
    mesh = topology_mesh(parse_topology("h100:1"), MeshShape(1, 1))

    def shape(*sizes: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

    def product(values: jax.Array, scale: jax.Array, x: jax.Array) -> jax.Array:
        return Matrix(values, scale, fused=fused).at(1)(x)

    arguments = (
        shape(2, out, 128 * groups, dtype=jnp.int4),
        shape(2, out, groups, dtype=np.float32),
        shape(1, tokens, 128 * groups, dtype=jnp.bfloat16),
    )
    text = jax.jit(product).trace(*arguments).lower().compile().as_text()
    assert text is not None
    return [kernel.bytes for kernel in CompiledText.read(text).kernels]


@pytest.mark.parametrize("out, groups", [(28672, 32), (4096, 112)], ids=["gate_up", "down"])
@pytest.mark.parametrize("tokens", [1, 6, 21, 64])
def test_a_product_writes_no_sums_of_groups(tokens, out, groups):
    """Products of Llama-3.1-8B in int4 write nothing else: neither sums nor a matrix."""
    assert max(written(True, out, groups, tokens)) <= 4 * out * tokens
    if tokens == 6:
        assert max(written(False, out, groups, tokens)) >= 4 * out * groups * tokens


@pytest.mark.parametrize("run", [LayerGroup.__call__, LayerGroup._attend_at_once])
def test_split_keys(run):
    """In an exact pass the kernel takes one slot out of the stack, without a copy of it."""
    program = compiled(run, PlatformSettings(split_keys_from=4096), tokens=6, capacity=8192)
    kernels = launched(program.as_text())
    calls = 2 * (len(LAYERS) if run is LayerGroup.__call__ else 1)
    assert kernels.count("custom-call") == calls  # attend and combine
    assert "copy" not in kernels
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes(8192)
    assert memory.temp_size_in_bytes < cache_bytes(8192) / len(LAYERS) / 2
