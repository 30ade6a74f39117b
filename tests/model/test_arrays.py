"""Each shard is read by itself: no tensor whole, nothing twice, into memory the device keeps."""

from collections import Counter
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import numpy as np
import pytest

from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.checkpoint.tensors import Slices, TensorSource
from easyspec_jax.model import arrays as module
from easyspec_jax.model.shard_plan import Copy
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.models import FAMILIES, load_target, loader, save_model


class Recorder:
    """A source that counts how often each element is read, and notes the largest window.

    Several shards read it at the same time.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source, self.reads, self.largest, self._lock = (
            source,
            dict[str, np.ndarray](),
            0,
            Lock(),
        )

    def shapes(self) -> Any:
        return self._source.shapes()

    def dtypes(self) -> Any:
        return self._source.dtypes()

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        values = self._source.read(name, window)
        with self._lock:
            self.reads.setdefault(name, np.zeros(self.shapes()[name], int))[window] += 1
            self.largest = max(self.largest, values.size)
        return values


def recorded(directory: Path, mesh: MeshShape) -> tuple[Recorder, Any]:
    opened = open_checkpoint(directory)
    source = Recorder(opened.source)
    return source, loader(Checkpoint(directory, opened.config, source), mesh)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(4, 2)])
def test_every_element_is_read_once_for_each_shard_that_has_it(tmp_path, family, mesh):
    save_model(tmp_path, family)
    source, from_ = recorded(tmp_path, mesh)
    load_target(from_)
    assert source.reads.keys() == source.shapes().keys()
    layout = from_._head_layout(from_.axes)
    for name, counts in source.reads.items():
        expected = np.ones_like(counts)
        # Those of a key head are copied where its queries are split.
        full_norm = "k_norm" in name and from_.config.qk_norm == "full"
        if full_norm or "k_proj" in name or "v_proj" in name:
            copies = Counter(layout.kv_index.flat)
            per_head = [copies[head] for head in range(from_.config.num_key_value_heads)]
            expected *= np.repeat(per_head, from_.config.head_dim).reshape(
                -1, *[1] * (counts.ndim - 1)
            )
        np.testing.assert_array_equal(counts, expected, err_msg=name)


def test_a_stack_reads_a_layer_for_its_own_devices_only(tmp_path):
    save_model(tmp_path, "llama3")
    source, from_ = recorded(tmp_path, MeshShape(4, 2))
    from_.stacked_attention([1, 2, 3], slots=4)
    weights = [name for name in source.reads if "proj" in name]
    assert {name.split(".")[2] for name in weights} == {"1", "2", "3"}
    assert all((source.reads[name] == 1).all() for name in weights)


@pytest.mark.parametrize("stored", ["safetensors", "orbax"])
def test_blocks_on_the_way_are_bounded(tmp_path, stored, monkeypatch):
    from convert.huggingface import open_huggingface
    from convert.stream import convert

    monkeypatch.setattr("easyspec_jax.checkpoint.tensors._BLOCK", 4096)
    save_model(tmp_path / "hf", "llama3")
    directory = tmp_path / "hf"
    if stored == "orbax":
        convert(open_huggingface(directory), tmp_path / "orbax")
        directory = tmp_path / "orbax"
    source, from_ = recorded(directory, MeshShape(1, 1))
    down = from_.mlp(3).down.weight.values[...]
    assert source.largest * 4 <= 4096
    whole = open_checkpoint(directory).source.read("model.layers.3.mlp.down_proj.weight")
    np.testing.assert_array_equal(np.asarray(down)[:, : whole.shape[1]], whole)


def test_devices_take_the_memory_that_was_filled(tmp_path, monkeypatch):
    """Otherwise a CPU would hold every weight twice for a while."""
    made: list[int] = []

    def noted(shape, dtype):
        array = aligned(shape, dtype)
        made.append(array.ctypes.data)
        return array

    aligned = module._aligned_zeros
    monkeypatch.setattr(module, "_aligned_zeros", noted)
    save_model(tmp_path, "smollm2")
    layer = loader(open_checkpoint(tmp_path), MeshShape(2, 2)).mlp(0)
    used = {
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(layer)
        for shard in x.addressable_shards
    }
    assert used == set(made)


def test_a_host_array_is_placed_shard_by_shard(tmp_path):
    save_model(tmp_path, "llama3")
    from_ = loader(open_checkpoint(tmp_path), MeshShape(2, 4))
    array = np.arange(16.0 * 3).reshape(16, 3)
    placed = from_.place(array, jax.sharding.PartitionSpec(from_.axes))
    assert placed.dtype == np.float32
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(np.asarray(placed), array)


def test_blocks_fill_any_layout(monkeypatch):
    monkeypatch.setattr("easyspec_jax.checkpoint.tensors._BLOCK", 1024)
    whole = np.arange(2100.0).reshape(300, 7)
    shards = {1: np.zeros((7, 40), np.float16).T, 2: np.zeros((8, 14), np.float32)}
    copies = (
        Copy("w", (slice(0, 300), slice(0, 7)), 0, (slice(0, 300), slice(0, 7))),  # elsewhere
        Copy("w", (slice(200, 240), slice(0, 7)), 1, (slice(0, 40), slice(0, 7))),
        Copy("w", (slice(5, 9), slice(3, 5)), 2, (slice(2, 6), slice(6, 8))),
    )
    blocks = list(module._blocks(copies, shards))
    for out, tensor, window in blocks:
        assert tensor == "w" and 4 * 7 * (window[0].stop - window[0].start) <= 1024
        out[...] = whole[window]
    assert len(blocks) == 2 + 1
    np.testing.assert_array_equal(shards[1], whole[200:240])
    np.testing.assert_array_equal(shards[2][2:6, 6:8], whole[5:9, 3:5])
    assert shards[2].sum() == whole[5:9, 3:5].sum()
