"""A checkpoint that is written piece by piece can be restored by Orbax, whole or sharded."""

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from convert.orbax import OrbaxStore
from easyspec_jax.checkpoint.orbax import OrbaxSource
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, open_mesh

SHAPES = {
    "model.layers.0.mlp.down_proj.weight": (1024, 768),
    "model.layers.0.mlp.up_proj.weight": (512, 1024),
    "model.norm.weight": (1024,),
}


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def tensors(request) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(request.param) for name, shape in SHAPES.items()}


def write(directory, tensors) -> OrbaxStore:
    store = OrbaxStore(directory, SHAPES, next(iter(tensors.values())).dtype.name)
    for name, values in tensors.items():
        step = store.rows(name)
        for start in range(0, len(values), step):
            store.write(name, start, values[start : start + step])
    return store


def test_orbax_restores_it(tensors, tmp_path):
    write(tmp_path, tensors).finish()
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "weights")
    assert restored.keys() == tensors.keys()
    for name, values in tensors.items():
        assert restored[name].dtype == values.dtype
        np.testing.assert_array_equal(restored[name], values)


@pytest.mark.parametrize("spec", [P(ALL_AXES), P("tensor"), P()])
def test_orbax_restores_it_onto_a_mesh(tensors, tmp_path, spec):
    write(tmp_path, tensors).finish()
    sharding = NamedSharding(open_mesh(MeshShape(4, 2)), spec)
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in tensors.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "weights", wanted)
    for name, values in tensors.items():
        assert restored[name].sharding == sharding
        np.testing.assert_array_equal(np.asarray(restored[name]), values)


def test_chunks_are_small_and_lie_along_the_axis_that_is_split(tmp_path):
    wide = {
        "model.layers.0.mlp.down_proj.weight": (8192, 28672),
        "model.layers.0.mlp.up_proj.weight": (28672, 8192),
        "model.norm.weight": (8192,),
    }
    store = OrbaxStore(tmp_path, wide, "bfloat16")
    chunks = {name: store._arrays[name].chunk_layout.read_chunk.shape for name in wide}
    assert list(chunks.values()) == [(512, 256), (64, 8192), (8192,)]


def test_what_earlier_runs_left_is_dropped(tmp_path):
    tensors = {name: np.full(shape, 3, ml_dtypes.bfloat16) for name, shape in SHAPES.items()}
    for _ in range(2):
        write(tmp_path, tensors)
    store = write(tmp_path, tensors)  # everything anew
    (tmp_path / "weights" / "ocdbt.process_0" / "manifest.ocdbt.__lock").touch()
    written = sum(path.stat().st_size for path in tmp_path.rglob("*"))
    store.finish()
    size = sum(values.nbytes for values in tensors.values())
    kept = sum(path.stat().st_size for path in (tmp_path / "weights").rglob("*") if path.is_file())
    assert written > 3 * size
    assert kept < 1.1 * size
    assert not list(tmp_path.rglob("*.__lock"))
    store.finish()  # as after an interruption
    source = OrbaxSource(tmp_path / "weights")
    for name, values in tensors.items():
        np.testing.assert_array_equal(source.read(name), values)


def test_zeros_are_stored_too(tmp_path):
    """Otherwise a chunk that was lost would read as zeros."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    write(tmp_path, tensors).finish()
    kept = sum(path.stat().st_size for path in (tmp_path / "weights").rglob("d/*"))
    assert kept > sum(values.nbytes for values in tensors.values())
