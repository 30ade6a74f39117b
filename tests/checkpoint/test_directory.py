"""Checkpoints of both kinds are read bit for bit, and any damage gives one clear line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.orbax import OrbaxStore
from easyspec_jax.checkpoint.canonical import CanonicalSource, check_tensors, expected_shapes
from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD
from easyspec_jax.checkpoint.orbax import WEIGHTS, OrbaxSource
from easyspec_jax.checkpoint.quantized import offset_name, scale_name
from easyspec_jax.checkpoint.safetensors import (
    INDEX,
    SAFETENSORS,
    SafetensorsSource,
    write_safetensors,
)
from easyspec_jax.checkpoint.tensors import Slices
from easyspec_jax.errors import EasySpecError

CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "max_position_embeddings": 32,
}
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def make_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = expected_shapes(model_config(CONFIG))
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_huggingface(directory: Path, shards: int = 1, dtype=np.float32) -> dict[str, np.ndarray]:
    tensors = make_tensors(dtype)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return tensors
    files = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file(
            {name: tensors[name] for name in tensors if files[name] == file}, directory / file
        )
    (directory / INDEX).write_text(json.dumps({"weight_map": files}))
    return tensors


def write_converted(directory: Path, dtype=np.float32) -> dict[str, np.ndarray]:
    tensors = make_tensors(dtype)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write_orbax(directory, tensors)
    return tensors


def write_orbax(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    dtypes = {values.dtype.name for values in tensors.values()}
    store = OrbaxStore(directory, {name: values.shape for name, values in tensors.items()}, *dtypes)
    for name, values in tensors.items():
        store.write(name, 0, values)
    store.finish()


def assert_holds(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    source = open_checkpoint(directory).source
    assert source.shapes() == {name: values.shape for name, values in tensors.items()}
    for name, values in tensors.items():
        read = source.read(name)
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_are_read_bit_for_bit(tmp_path, shards, dtype):
    assert_holds(tmp_path, write_huggingface(tmp_path, shards, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_is_read_bit_for_bit(tmp_path, dtype):
    assert_holds(tmp_path, write_converted(tmp_path, dtype))


def test_orbax_comes_before_safetensors(tmp_path):
    write_huggingface(tmp_path)
    write_converted(tmp_path)
    source = open_checkpoint(tmp_path).source
    assert isinstance(source, CanonicalSource)
    assert isinstance(source.stored, OrbaxSource)


def test_no_directory_and_no_weights(tmp_path):
    with pytest.raises(EasySpecError, match="is not a directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(EasySpecError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(EasySpecError, match="holds no weights"):
        open_checkpoint(tmp_path)


def test_missing_shard(tmp_path):
    write_huggingface(tmp_path, shards=3)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(EasySpecError, match=r"model-1\.safetensors is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_shard(tmp_path, kept):
    write_huggingface(tmp_path, shards=3)
    shard = tmp_path / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(EasySpecError, match=r"model-2\.safetensors is truncated or damaged"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "place", ["../model-0.safetensors", "/etc/passwd", "deep/model-0.safetensors", "."]
)
def test_index_that_leads_out(tmp_path, place):
    write_huggingface(tmp_path, shards=3)
    edit_index(tmp_path, {EMBEDDING: place})
    with pytest.raises(EasySpecError, match="points outside the checkpoint directory"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["..", ""])
def test_index_that_names_a_directory(tmp_path, place):
    write_huggingface(tmp_path, shards=3)
    edit_index(tmp_path, {EMBEDDING: place})
    with pytest.raises(EasySpecError, match="truncated or damaged"):
        open_checkpoint(tmp_path)


def test_stale_entries_of_the_index_are_ignored(tmp_path):
    tensors = write_huggingface(tmp_path, shards=3)
    stale = "model.layers.9.mlp.up_proj.weight"
    for place in ("model-0.safetensors", "model-of-old.safetensors"):
        edit_index(tmp_path, {stale: place})
        assert_holds(tmp_path, tensors)


def test_an_index_that_places_a_tensor_in_another_of_its_files(tmp_path):
    """transformers reads all tensors of the files that the index lists."""
    tensors = write_huggingface(tmp_path, shards=3)
    edit_index(tmp_path, {EMBEDDING: "model-1.safetensors"})
    assert_holds(tmp_path, tensors)


def test_an_index_that_omits_a_file(tmp_path):
    write_huggingface(tmp_path, shards=3)
    index = json.loads((tmp_path / INDEX).read_text())
    kept = {
        name: file for name, file in index["weight_map"].items() if file != "model-1.safetensors"
    }
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(EasySpecError, match="is missing"):
        open_checkpoint(tmp_path)


def test_the_last_file_counts_where_two_hold_a_tensor(tmp_path):
    tensors = write_huggingface(tmp_path, shards=3)
    first, last = shard_of(tensors, 0, 3), shard_of(tensors, 2, 3)
    (name, values) = next(iter(first.items()))
    save_file(last | {name: values + 1}, tmp_path / "model-2.safetensors")
    assert_holds(tmp_path, tensors | {name: values + 1})


def test_one_file_comes_before_an_index(tmp_path):
    """A directory saved first in shards and then again in one file, whose index is stale."""
    write_huggingface(tmp_path, shards=3)
    tensors = {name: values + 1 for name, values in make_tensors().items()}
    save_file(tensors, tmp_path / SAFETENSORS)
    assert_holds(tmp_path, tensors)


def test_copies_in_other_formats_are_not_read(tmp_path):
    tensors = write_huggingface(tmp_path, shards=3)
    save_file({"layers.0.wq": np.zeros(3, np.float32)}, tmp_path / "consolidated.safetensors")
    assert_holds(tmp_path, tensors)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_configuration_may_name_its_weights(tmp_path, shards):
    tensors = write_huggingface(tmp_path, shards)
    name, other = (
        (SAFETENSORS, "other.safetensors")
        if shards == 1
        else (INDEX, "other.safetensors.index.json")
    )
    (tmp_path / name).rename(tmp_path / other)
    save_file({"stray": np.zeros(1, np.float32)}, tmp_path / SAFETENSORS)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": other}))
    assert_holds(tmp_path, tensors)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("../model.safetensors", "points outside the checkpoint directory"),
        ("pytorch_model.bin", "must name a safetensors file or an index"),
        (7, "must name a safetensors file or an index"),
    ],
)
def test_weights_that_cannot_be_named(tmp_path, named, message):
    write_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": named}))
    with pytest.raises(EasySpecError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_index_without_a_map(tmp_path, content):
    write_huggingface(tmp_path, shards=3)
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(EasySpecError, match="has no weight_map"):
        open_checkpoint(tmp_path)


def test_no_tensor_is_dropped_because_the_index_omits_it(tmp_path):
    tensors = write_huggingface(tmp_path, shards=3)
    save_file(
        {**shard_of(tensors, 0, 3), "stray": np.zeros(1, np.float32)},
        tmp_path / "model-0.safetensors",
    )
    with pytest.raises(EasySpecError, match="stray is unknown"):
        open_checkpoint(tmp_path)


def test_other_types_are_named(tmp_path):
    header = json.dumps(
        {"odd": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(4)
    )
    source = SafetensorsSource(tmp_path)
    assert source.dtypes() == {"odd": "F8_E5M2"}
    with pytest.raises(EasySpecError, match="odd is stored as F8_E5M2, which is not supported"):
        source.read("odd")


@dataclass(frozen=True)
class Described:
    """A source with shapes and dtypes but no values."""

    present: Mapping[str, tuple[int, ...]]
    others: Mapping[str, str] = field(default_factory=dict)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.present

    def dtypes(self) -> Mapping[str, str]:
        return {**dict.fromkeys(self.present, "float32"), **self.others}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        raise NotImplementedError


def test_every_fault_of_the_tensors_is_listed():
    config = model_config(CONFIG)
    shapes = expected_shapes(config)
    faulty = {name: shape for name, shape in shapes.items() if name != HEAD} | {
        "extra": (1,),
        EMBEDDING: (3, 3),
    }
    with pytest.raises(EasySpecError) as error:
        check_tensors(config, Described(faulty, {FINAL_NORM: "I8"}), "here")
    assert str(error.value) == (
        "here: tensors do not match the configuration: lm_head.weight is missing; "
        "extra is unknown; model.embed_tokens.weight has shape (3, 3) instead of (10, 8); "
        "model.norm.weight is stored as I8, which is not supported"
    )
    with pytest.raises(
        EasySpecError, match=r"model\.norm\.weight is missing; .* and 12 more; extra is unknown$"
    ):
        check_tensors(config, Described({"extra": (1,)}), "here")


def test_every_fault_of_scales_is_listed():
    """Integers without scales, with scales of unequal groups, and scales of another type."""
    config = model_config(CONFIG)
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
    integers = dict.fromkeys(names, "int8")
    shapes = expected_shapes(config) | {scale_name(names[1]): (12, 3), scale_name(names[2]): (8, 1)}
    others = integers | {scale_name(names[2]): "float16", FINAL_NORM: "int8"}
    with pytest.raises(EasySpecError) as error:
        check_tensors(config, Described(shapes, others), "here")
    gate, up, down = map(scale_name, names)
    assert str(error.value) == (
        f"here: tensors do not match the configuration: {gate} is missing; "
        f"{up} has shape (12, 3) for a matrix of (12, 8); "
        f"model.norm.weight is stored as int8, which is not supported; "
        f"{down} is stored as float16 instead of float32"
    )


def test_every_fault_of_offsets_is_listed():
    """Offsets of fewer groups than the scales have, and of another type."""
    config = model_config(CONFIG)
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
    shapes = expected_shapes(config)
    dtypes = dict.fromkeys(names, "int4")
    for name in names:
        shapes |= {scale_name(name): (12, 2), offset_name(name): (12, 2)}
    shapes[offset_name(names[0])] = (12, 1)
    dtypes[offset_name(names[1])] = "float16"
    with pytest.raises(EasySpecError) as error:
        check_tensors(config, Described(shapes, dtypes), "here")
    gate, up = map(offset_name, names)
    assert str(error.value) == (
        f"here: tensors do not match the configuration: {gate} has shape (12, 1) unlike its "
        f"scales; {up} is stored as float16 instead of float32"
    )


TIED = CONFIG | {"tie_word_embeddings": True}


def write_tied(directory: Path, layout: str, head: np.ndarray | None) -> dict[str, np.ndarray]:
    """Write a checkpoint of either kind that has a head although its configuration ties it."""
    tensors = make_tensors()
    del tensors[HEAD]
    if head is not None:
        tensors[HEAD] = head
    (directory / "config.json").write_text(json.dumps(TIED))
    if layout == "orbax":
        write_orbax(directory, tensors)
    else:
        save_file(tensors, directory / SAFETENSORS)
    return tensors


@pytest.mark.parametrize("layout", ["orbax", "hf"])
def test_a_stored_head_counts_where_it_differs_from_the_embedding(tmp_path, layout):
    head = make_tensors()[EMBEDDING].copy()
    head[-1, -1] += 1e-3
    tensors = write_tied(tmp_path, layout, head)
    opened = open_checkpoint(tmp_path)
    assert not opened.config.tie_word_embeddings
    np.testing.assert_array_equal(opened.source.read(HEAD), tensors[HEAD])


@pytest.mark.parametrize("layout", ["orbax", "hf"])
@pytest.mark.parametrize("stored", [True, False])
def test_a_copy_of_the_embedding_is_no_head(tmp_path, layout, stored):
    write_tied(tmp_path, layout, make_tensors()[EMBEDDING] if stored else None)
    opened = open_checkpoint(tmp_path)
    assert opened.config.tie_word_embeddings
    assert HEAD not in opened.source.shapes()


def test_a_copy_in_another_type_is_one_if_its_numbers_are(tmp_path):
    tensors = write_tied(tmp_path, "hf", None)
    narrow = tensors[EMBEDDING].astype(ml_dtypes.bfloat16)
    save_file(
        tensors | {EMBEDDING: narrow, HEAD: narrow.astype(np.float32)}, tmp_path / SAFETENSORS
    )
    assert open_checkpoint(tmp_path).config.tie_word_embeddings
    save_file(tensors | {HEAD: narrow.astype(np.float32)}, tmp_path / SAFETENSORS)
    assert not open_checkpoint(tmp_path).config.tie_word_embeddings


def test_a_stored_head_of_another_shape_is_refused(tmp_path):
    write_tied(tmp_path, "hf", np.zeros((11, 8), np.float32))
    with pytest.raises(
        EasySpecError, match=r"lm_head\.weight has shape \(11, 8\) instead of \(10, 8\)"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_frequencies_are_compared(tmp_path, dtype):
    """Old exports keep them next to the weights; in half precision they are rounded."""
    tensors, name = write_huggingface(tmp_path), "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = model_config(CONFIG).kinds[0].rope.frequencies()
    save_file(tensors | {name: frequencies.astype(dtype)}, tmp_path / SAFETENSORS)
    assert_holds(tmp_path, tensors)
    for wrong in (frequencies / 2, frequencies[:1]):
        save_file(tensors | {name: wrong.astype(dtype)}, tmp_path / SAFETENSORS)
        with pytest.raises(
            EasySpecError, match="RoPE frequencies that do not match the configuration"
        ):
            open_checkpoint(tmp_path)


def test_damaged_orbax_tree(tmp_path):
    write_converted(tmp_path)
    (tmp_path / WEIGHTS / "_METADATA").write_text("{")
    with pytest.raises(EasySpecError, match="is not a readable Orbax checkpoint"):
        open_checkpoint(tmp_path)


def test_empty_orbax_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(EasySpecError, match="is not a readable Orbax checkpoint"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("opened", [False, True])
def test_damaged_orbax_data_is_noticed(tmp_path, damage, opened):
    # Large enough that the data is not kept inside the index of the store.
    write_orbax(tmp_path, {"large": np.random.default_rng(0).normal(size=(256, 256))})
    source = OrbaxSource(tmp_path / WEIGHTS) if opened else None
    for path in list((tmp_path / WEIGHTS).glob("**/d/*")):
        data = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(
                data[:-20] if damage == "truncate" else bytes(byte ^ 255 for byte in data)
            )
    with pytest.raises(EasySpecError, match="is not a readable Orbax checkpoint") as error:
        (source or OrbaxSource(tmp_path / WEIGHTS)).read("large")
    assert "\n" not in str(error.value)


def test_safetensors_are_written_as_they_index_and_for_all_to_read(tmp_path):
    (tmp_path / "other").touch()
    by_columns = np.arange(6.0).reshape(2, 3).T
    write_safetensors(tmp_path / SAFETENSORS, [("w", by_columns)])
    np.testing.assert_array_equal(load_file(tmp_path / SAFETENSORS)["w"], by_columns)
    assert (tmp_path / SAFETENSORS).stat().st_mode == (tmp_path / "other").stat().st_mode


def edit_index(directory: Path, places: dict[str, str]) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= places
    (directory / INDEX).write_text(json.dumps(index))


def shard_of(tensors: dict[str, np.ndarray], number: int, shards: int) -> dict[str, np.ndarray]:
    return {
        name: values
        for place, (name, values) in enumerate(tensors.items())
        if place % shards == number
    }


def test_safetensors_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EasySpecError, match=r"file cannot be written: "):
        write_safetensors(tmp_path / "file" / SAFETENSORS, [("w", np.zeros(2))])


def test_an_adapter_is_not_left_out(tmp_path):
    write_huggingface(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(EasySpecError, match=r"holds an adapter .*; merge it into the model first"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("allow_links", [False, True])
def test_a_link_to_itself_is_one_line(tmp_path, allow_links):
    write_huggingface(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(EasySpecError, match="loop is a link that leads"):
        open_checkpoint(tmp_path, allow_links=allow_links)
