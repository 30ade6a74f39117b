"""Blocks of GGUF files that are kept as integers stand for the numbers that gguf reads."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from convert.gguf import open_gguf
from convert.gguf_tensors import KeptBlocks
from convert.stream import convert
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING
from easyspec_jax.checkpoint.quantized import Dequantized, is_matrix, offset_name, scale_name
from easyspec_jax.errors import EasySpecError

EXACT = {
    Type.Q8_0: ("int8", 32),
    Type.Q4_0: ("int4", 32),
    Type.Q5_0: ("int8", 32),
    Type.Q6_K: ("int8", 16),
    Type.Q3_K: ("int4", 16),
    Type.IQ4_NL: ("int8", 32),
    Type.IQ4_XS: ("int8", 32),
}
WITH_OFFSETS = {
    Type.Q4_1: ("int4", 32),
    Type.Q4_K: ("int4", 32),
    Type.Q5_1: ("int8", 32),
    Type.Q5_K: ("int8", 32),
    Type.Q2_K: ("int4", 16),
}
ROUNDED = (Type.IQ3_XXS, Type.IQ2_S)
ROWS, COLUMNS = 5, 512
# Bytes of a block that hold a float16.
SCALES = {
    Type.Q8_0: [0],
    Type.Q4_0: [0],
    Type.Q5_0: [0],
    Type.Q6_K: [208],
    Type.Q4_1: [0, 2],
    Type.Q5_1: [0, 2],
    Type.Q2_K: [80, 82],
    Type.Q3_K: [108],
    Type.Q4_K: [0, 2],
    Type.Q5_K: [0, 2],
    Type.IQ4_NL: [0],
    Type.IQ4_XS: [0],
    Type.IQ3_XXS: [0],
    Type.IQ2_S: [0],
}


def some_blocks(
    kind: Type, rows: int = ROWS, columns: int = COLUMNS, size: float = 1
) -> np.ndarray:
    """Random bits are valid blocks of every kind, once their float16 numbers are finite.

    size: standard deviation of these numbers.
    """
    random = np.random.default_rng(kind.value)
    numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows * columns // numbers, nbytes), np.uint8)
    for place in SCALES[kind]:
        scales = random.normal(scale=size, size=(len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.fixture
def opened(tiny_model, write_gguf):
    """Opens a model whose embedding has given blocks."""

    def make(blocks: np.ndarray, kind: Type, **options: bool):
        model = tiny_model(
            hidden_size=COLUMNS,
            intermediate_size=64,
            vocab_size=len(blocks),
            tie_word_embeddings=True,
        )
        path = write_gguf(model, Type.Q8_0, tensors={"token_embd.weight": (blocks, kind)})
        return open_gguf(path, **options)

    return make


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_blocks_of_integers_are_kept_bit_for_bit(opened, kind):
    dtype, group = EXACT[kind]
    blocks = some_blocks(kind)
    source = opened(blocks, kind, keep_blocks=True).source
    assert source.dtypes()[EMBEDDING] == dtype
    assert source.shapes()[scale_name(EMBEDDING)] == (ROWS, COLUMNS // group)
    values = source.read(EMBEDDING)
    assert values.dtype == dtype
    np.testing.assert_array_equal(Dequantized(source).read(EMBEDDING), dequantize(blocks, kind))


@pytest.mark.parametrize("kind", WITH_OFFSETS, ids=lambda kind: kind.name)
def test_a_least_number_becomes_an_offset(opened, kind):
    dtype, group = WITH_OFFSETS[kind]
    blocks = some_blocks(kind)
    source = opened(blocks, kind, keep_blocks=True).source
    assert source.dtypes()[EMBEDDING] == dtype
    assert source.shapes()[offset_name(EMBEDDING)] == (ROWS, COLUMNS // group)
    found, exact = Dequantized(source).read(EMBEDDING), dequantize(blocks, kind)
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ROUNDED, ids=lambda kind: kind.name)
def test_other_blocks_are_rounded_to_half_a_step(opened, kind):
    blocks = some_blocks(kind)
    source = opened(blocks, kind, keep_blocks=True).source
    assert source.dtypes()[EMBEDDING] == "int8"
    exact, scale = dequantize(blocks, kind), source.read(scale_name(EMBEDDING))
    error = np.abs(Dequantized(source).read(EMBEDDING) - exact).reshape(ROWS, -1, 32)
    assert (error <= 0.5001 * scale[:, :, None]).all()
    np.testing.assert_allclose(scale * 127, np.abs(exact).reshape(ROWS, -1, 32).max(2), rtol=1e-6)


@pytest.mark.parametrize("kind", [*EXACT, *WITH_OFFSETS, *ROUNDED], ids=lambda kind: kind.name)
def test_windows_are_parts_of_the_whole(opened, kind):
    source = opened(some_blocks(kind), kind, keep_blocks=True).source
    for name in (EMBEDDING, scale_name(EMBEDDING)):
        whole = source.read(name)
        for window in [(slice(1, 4),), (slice(2, 3), slice(3, 14)), (slice(4, 4), slice(0, 9))]:
            np.testing.assert_array_equal(source.read(name, window), whole[window])


def test_scales_of_permuted_rows_are_permuted_with_them(tiny_model, write_gguf):
    path = write_gguf(tiny_model("llama"), Type.Q8_0)
    kept, exact = open_gguf(path, keep_blocks=True).source, open_gguf(path).source
    for name in exact.shapes():
        np.testing.assert_array_equal(Dequantized(kept).read(name), exact.read(name), err_msg=name)


def test_a_file_of_several_kinds_is_converted_and_measured(tiny_model, write_gguf, tmp_path):
    kinds = {
        "token_embd.weight": (Type.Q6_K, 269),
        "blk.0.attn_v.weight": (Type.Q6_K, 128),
        "blk.0.attn_output.weight": (Type.IQ3_XXS, 256),
        "blk.1.ffn_down.weight": (Type.IQ3_XXS, 256),
    }
    model = tiny_model("qwen2", hidden_size=256, intermediate_size=256, tie_word_embeddings=True)
    assert model.config.vocab_size == kinds["token_embd.weight"][1]
    tensors = {name: (some_blocks(kind, rows, 256), kind) for name, (kind, rows) in kinds.items()}
    path = write_gguf(model, Type.Q4_0, tensors=tensors)
    kept, exact = open_gguf(path, keep_blocks=True), open_gguf(path)
    result = convert(kept, tmp_path / "out", "float32", verify=True)
    rounded = ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight")
    for name, error in result.errors.items():
        assert (error > 0) == (name in rounded), name
        assert error < 0.01
    matrices = {name for name, shape in exact.source.shapes().items() if is_matrix(name, shape)}
    assert result.errors.keys() == matrices
    assert result.integers == ("int4", "int8")
    found = Dequantized(open_checkpoint(tmp_path / "out").source)
    for name in exact.source.shapes():
        if name not in rounded:
            np.testing.assert_array_equal(found.read(name), exact.source.read(name), err_msg=name)


def test_floats_stay_floats(tiny_model, write_gguf):
    source = open_gguf(write_gguf(tiny_model("llama"), Type.F16), keep_blocks=True).source
    assert set(source.dtypes().values()) == {"float32"}


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K, Type.IQ3_XXS], ids=lambda kind: kind.name)
def test_scales_that_are_not_finite_are_refused(opened, kind):
    blocks = some_blocks(kind)
    blocks[2, :2] = np.array([np.inf], np.float16).view(np.uint8)
    source = opened(blocks, kind, keep_blocks=True).source
    source.read(EMBEDDING, (slice(0, 2),))
    with pytest.raises(EasySpecError, match=r"token_embd\.weight has scales that are NaN or infin"):
        source.read(EMBEDDING)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K, Type.IQ3_XXS], ids=lambda kind: kind.name)
def test_scales_are_read_a_block_of_rows_at_a_time(opened, kind, monkeypatch):
    """A row of scales is a few bytes; reading it unpacks the whole row of the matrix."""
    source = opened(some_blocks(kind), kind, keep_blocks=True).source
    parts = [scale_name(EMBEDDING), *([offset_name(EMBEDDING)] if kind == Type.Q4_K else [])]
    whole = [source.read(name) for name in parts]
    unpacked, parts_of = [], KeptBlocks._parts
    note = lambda self, name, rows: unpacked.append(rows) or parts_of(self, name, rows)  # noqa: E731
    monkeypatch.setattr(KeptBlocks, "_parts", note)
    columns = source.shapes()[EMBEDDING][1]
    monkeypatch.setattr("easyspec_jax.checkpoint.tensors._BLOCK", 2 * 4 * columns)
    for name, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(source.read(name, (slice(1, 5),)), expected[1:5])
    assert unpacked == [slice(1, 3), slice(3, 5)] * len(parts)
