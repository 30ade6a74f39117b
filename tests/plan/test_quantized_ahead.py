"""Compiled for an H100 and a TPU that need not be there: no float copy of a quantized matrix."""

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.quantized import Integers, is_matrix
from easyspec_jax.decode.timing import alone, pass_program
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.engine.abstract import abstract_pair, abstract_state
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.transformer import Decoder, run_exact
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.plan.ahead import topology_mesh
from easyspec_jax.plan.compiled_text import LARGE, CompiledText, Kernel
from easyspec_jax.plan.configurations import bundled
from easyspec_jax.plan.machines import parse_topology

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
MESHES = {
    "h100:1": (MeshShape(1, 1), PLUGINS),
    "v5e:2x2": (MeshShape(1, 4), ("libtpu",)),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.parametrize(
        "machine",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    not any(map(find_spec, modules)), reason=f"no compiler for {name}"
                ),
            )
            for name, (_, modules) in MESHES.items()
        ],
    ),
]

# A few layers stand for all, because every layer of a pass is compiled to the same kernels.
TARGET = replace(bundled()["Llama-3.1-8B"], num_hidden_layers=2)
DRAFT = replace(bundled()["Llama-3.2-1B"], num_hidden_layers=6)
CAPACITY = 512
KINDS = ("int8", "int4", "int4 with offsets")
"""Types of the matrices; the last is that of AWQ files and the like."""


@pytest.fixture
def mesh(machine, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask the network for a TPU
    return topology_mesh(parse_topology(machine), MESHES[machine][0])


def with_offsets(config: ModelConfig) -> Integers:
    """Say that a checkpoint has int4 in groups of 128 with offsets, and an int8 embedding."""
    found = []
    for name, shape in expected_shapes(config).items():
        if is_matrix(name, shape):
            of_layer = ".layers." in name
            dtype, groups = ("int4", shape[1] // 128) if of_layer else ("int8", 1)
            found.append((name, dtype, groups, of_layer))
    return tuple(found)


def models(mesh: Any, kind: str, lp_size: int) -> tuple[Decoder, Decoder]:
    """Return target and draft without weights, in bfloat16 but for their matrices."""
    layout = Layout.uniform(paper_groups(DRAFT.num_hidden_layers, lp_size))
    weights: Any = None if kind == KINDS[2] else kind
    stored = (with_offsets(TARGET), with_offsets(DRAFT)) if weights is None else ((), ())
    pair = abstract_pair(
        TARGET,
        DRAFT,
        mesh,
        layout,
        False,
        ALL_AXES,
        np.dtype("bfloat16"),
        weights=(weights, weights),
        stored=stored,
    )
    assert pair[1] is not None
    return pair[0], pair[1]


def compiled(mesh: Any, model: Decoder, tokens: int, run: Any) -> Any:
    """Compile a pass of some tokens."""
    programs = alone(mesh, model)
    state = abstract_state(programs, 1, CAPACITY)
    everywhere = NamedSharding(mesh, P())
    ids, at = (
        jax.ShapeDtypeStruct(shape, np.int32, sharding=everywhere) for shape in ((1, tokens), (1,))
    )
    step = pass_program(programs, tokens, run)
    return step.trace(programs.leaves, (state.target, ids), at).lower().compile()


def sizes(model: Decoder) -> dict[int, int]:
    """Return the sums of groups that a product writes for one token, by a matrix's numbers.

    Both are those of one device. On a GPU a kernel keeps the sums in registers.
    """
    found = {}
    for _, matrix in nnx.iter_modules(model):
        if isinstance(matrix, Matrix):
            assert matrix.scale is not None
            values, scale = (
                array.sharding.shard_shape(array.shape) for array in (matrix.values, matrix.scale)
            )
            kept = matrix.fused or scale[-1] == 1
            found[prod(values)] = 0 if kept else prod(scale)
    return found


def has_offsets(model: Decoder) -> bool:
    """Return whether any matrix has offsets."""
    matrices = (module for _, module in nnx.iter_modules(model) if isinstance(module, Matrix))
    return any(matrix.offset is not None for matrix in matrices)


def float_copies(text: CompiledText, matrices: set[int]) -> list[Kernel]:
    """List the kernels that write as many floats as a matrix has numbers, converts among them."""
    found = []
    for kernel in text.kernels:
        if kernel.shape.startswith(("bf16", "f32", "f16")) and prod(kernel.dimensions) in matrices:
            found.append(kernel)
    return found


def check(mesh: Any, model: Decoder, tokens: int, run: Callable[..., Any]) -> None:
    """Check a pass: no kernel writes a matrix, and the temporaries have no room for one."""
    program, matrices = compiled(mesh, model, tokens, run), sizes(model)
    assert not float_copies(CompiledText.read(program.as_text()), set(matrices))
    temporaries = program.memory_analysis().temp_size_in_bytes
    # In fuzzy steps libtpu also keeps cache entries there, as it does in bfloat16.
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    others = 1 << 20 if on_tpu and run is run_fuzzy else 0
    # And it writes inputs as floats of 32 bits, whose sums multiply offsets.
    others += 1 << 19 if on_tpu and has_offsets(model) else 0
    assert temporaries < others + 2 * min(matrices) + 4 * tokens * max(matrices.values())


@pytest.mark.parametrize("tokens", [1, 6, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_of_the_target_copies_no_matrix(machine, mesh, kind, tokens):
    target, _ = models(mesh, kind, lp_size=1)
    check(mesh, target, tokens, run_exact)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fuzzy_draft_step_copies_no_matrix(machine, mesh, kind):
    _, draft = models(mesh, kind, lp_size=4)
    check(mesh, draft, 1, run_fuzzy)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_pass_through_groups_cuts_no_matrix_out(machine, mesh, kind):
    """The kernel gets the number of a slot. Without it, XLA cuts out all slots at once."""
    if machine.startswith("v5e"):
        pytest.skip("the kernel is for GPUs")
    _, draft = models(mesh, kind, lp_size=4)
    program = compiled(mesh, draft, 6, run_exact)
    kernels = CompiledText.read(program.as_text()).kernels
    slots = [kernel for kernel in kernels if re.search(r"(s4|s8|bf16)\[1,\d+,\d+\]", kernel.shape)]
    assert not [kernel for kernel in slots if kernel.bytes >= LARGE]


def test_offsets_take_no_kernels_of_their_own(machine, mesh):
    if machine.startswith("v5e"):
        pytest.skip("the kernel is for GPUs")
    counts = []
    for kind in KINDS[1:]:
        text = compiled(mesh, models(mesh, kind, lp_size=1)[0], 6, run_exact).as_text()
        counts.append(len(CompiledText.read(text).kernels))
    assert counts[0] == counts[1]


def test_a_copy_would_be_found(mesh):
    """A barrier between conversion and product makes XLA write the floats."""
    numbers = 4096 * 1024

    def product(values: jax.Array, x: jax.Array) -> jax.Array:
        floats = jax.lax.optimization_barrier(values.astype(jnp.bfloat16))
        return jnp.einsum("oi,ti->ot", floats, x, preferred_element_type=jnp.float32)

    everywhere = NamedSharding(mesh, P())
    values = jax.ShapeDtypeStruct((4096, 1024), jnp.int8, sharding=everywhere)
    x = jax.ShapeDtypeStruct((6, 1024), jnp.bfloat16, sharding=everywhere)
    program = jax.jit(product).trace(values, x).lower().compile()
    text = program.as_text()
    assert text is not None
    assert float_copies(CompiledText.read(text), {numbers})
