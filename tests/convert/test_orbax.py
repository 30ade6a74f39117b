"""Orbax restores what was written in pieces, whole or sharded; interrupted commits go on."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from convert.huggingface import open_huggingface
from convert.orbax import OrbaxStore
from convert.stream import convert
from easyspec_jax.checkpoint import families
from easyspec_jax.checkpoint.orbax import OrbaxSource
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, open_mesh
from tests.support.models import FAMILIES, family_config, save_model

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
    assert_restored(tmp_path / "weights", tensors)


def assert_restored(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(directory)
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


def test_version_1_of_orbax_restores_it(tensors, tmp_path):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    write(tmp_path, tensors).finish()
    sharding = NamedSharding(open_mesh(MeshShape(4, 2)), P(ALL_AXES))
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in tensors.items()
    }
    restored = v1.load(tmp_path / "weights", wanted)
    for name, values in tensors.items():
        assert restored[name].sharding == sharding
        np.testing.assert_array_equal(bits(restored[name]), bits(values))


def test_orbax_notices_a_bit_that_flips(tmp_path):
    """Chunks that Orbax writes carry no checksum: there, the bit restores as another number.

    One tensor only. After an error Orbax closes its event loop, and where it reads several, those
    that come later complain from the background.
    """
    store = OrbaxStore(tmp_path, {"w": (512, 1024)}, "float32")
    store.write("w", 0, np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32))
    store.finish()
    largest = max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with ocp.StandardCheckpointer() as checkpointer, pytest.raises(ValueError, match="Digest"):
        checkpointer.restore(tmp_path / "weights")


def test_the_families_below_are_all_that_are_supported():
    assert {family_config(family).model_type for family in FAMILIES} == set(families.FAMILIES)


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        *(pytest.param(own, marks=pytest.mark.exhaustive) for own in ("float32", "float16")),
    ],
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_orbax_restores_every_family_onto_eight_devices(tmp_path, family, dtype):
    save_model(tmp_path / "hf", family)
    model = open_huggingface(tmp_path / "hf")
    convert(model, tmp_path / "out", dtype)
    mesh = open_mesh(MeshShape(4, 2))
    wanted = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=spread(shape, mesh))
        for name, shape in OrbaxSource(tmp_path / "out" / "weights").shapes().items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "weights", wanted)
    assert restored.keys() == wanted.keys()
    assert len(jax.tree.leaves(restored)) >= 6 * 9  # layers, and tensors of a layer
    for name, array in restored.items():
        assert array.sharding == wanted[name].sharding
        assert len(array.sharding.device_set) == 8
        expected = model.source.read(name).astype(dtype)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(bits(array), bits(expected))
    split = [array for array in restored.values() if not array.is_fully_replicated]
    assert len(split) == len(restored)


def spread(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Split the first dimension that divides, over as many of the eight devices as possible."""
    for axes in (ALL_AXES, "layer", "tensor"):
        parts = np.prod([mesh.shape[axis] for axis in np.atleast_1d(axes)])
        for dimension, size in enumerate(shape):
            if size % parts == 0:
                return NamedSharding(mesh, P(*[None] * dimension, axes))
    raise AssertionError(f"{shape} splits over no axis of {mesh}")


def bits(values: Any) -> np.ndarray:
    array = np.asarray(values)
    return array.view(f"u{array.itemsize}")


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
    (tmp_path / "ocdbt.process_0" / "manifest.ocdbt.__lock").touch()
    written = sum(path.stat().st_size for path in tmp_path.rglob("*"))
    store.finish()
    size = sum(values.nbytes for values in tensors.values())
    kept = sum(path.stat().st_size for path in (tmp_path / "weights").rglob("*") if path.is_file())
    assert written > 3 * size
    assert kept < 1.1 * size
    assert not list(tmp_path.rglob("*.__lock"))
    store.finish()  # a second time, as after an interruption
    source = OrbaxSource(tmp_path / "weights")
    for name, values in tensors.items():
        np.testing.assert_array_equal(source.read(name), values)


@pytest.mark.parametrize("name", ["weights", "weights.orbax-checkpoint-tmp"])
def test_a_commit_that_was_interrupted_loses_no_piece(tensors, tmp_path, name):
    write(tmp_path, tensors).finish()
    (tmp_path / "weights" / "manifest.ocdbt").unlink()  # Orbax writes it after the pieces are moved
    (tmp_path / "weights").rename(tmp_path / name)
    store = OrbaxStore(tmp_path, SHAPES, next(iter(tensors.values())).dtype.name)
    for tensor, values in tensors.items():
        np.testing.assert_array_equal(store.read(tensor, 0, len(values)), values)
    store.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert_restored(tmp_path / "weights", tensors)


def test_zeros_are_stored_too(tmp_path):
    """Otherwise a chunk that was lost would read as zeros."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    write(tmp_path, tensors).finish()
    kept = sum(path.stat().st_size for path in (tmp_path / "weights").rglob("d/*"))
    assert kept > sum(values.nbytes for values in tensors.values())
