"""Tensors of compressed-tensors become integers, or floats, that stand for the same numbers."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from easyspec_jax.checkpoint.quantized import Dequantized
from easyspec_jax.errors import EasySpecError
from tests.support.quantized_files import (
    GROUP,
    UP,
    Tensors,
    assert_stands_for,
    quantized_model,
    words,
    write,
)


def settings(format="pack-quantized", **weights):
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
    }


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    return words(values + (1 << (bits - 1)), bits)


def model(bits=4, symmetric=True, group=GROUP, is_packed=True, dtype: Any = np.float16):
    """Make integers around zero, whose zero points are integers as well."""
    least, most = -(1 << (bits - 1)), 1 << (bits - 1)

    def parts(random, module, shape):
        rows, inner = shape
        size = inner if group == -1 else group
        values = random.integers(least, most, shape)
        zeros = np.zeros((rows, inner // size), int)
        if not symmetric:
            zeros = random.integers(least, most, zeros.shape)
        scale = random.uniform(0.001, 1, zeros.shape).astype(dtype)
        stored: Tensors = {module + "weight_scale": scale}
        if is_packed:
            stored[module + "weight_packed"] = packed(values, bits)
            stored[module + "weight_shape"] = np.array(shape)
            point = packed(zeros.T, bits).T
        else:
            stored[module + "weight"] = values.astype(np.int8)
            point = zeros.astype(np.int8)
        if not symmetric:
            stored[module + "weight_zero_point"] = point
        exact = (values - zeros.repeat(size, 1)).astype(np.float32)
        return stored, exact * scale.astype(np.float32).repeat(size, 1)

    return quantized_model(parts)


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(("bits", "dtype"), [(4, "int4"), (8, "int8")])
def test_packed_integers_stand_for_the_same_numbers(tmp_path, bits, dtype, group, scale_dtype):
    stored, exact = model(bits, group=group, dtype=scale_dtype)
    assert_stands_for(write(tmp_path, stored, settings(num_bits=bits)), exact, dtype)


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize(("bits", "is_packed"), [(4, True), (8, True), (8, False)])
def test_zero_points_become_offsets(tmp_path, bits, is_packed, group):
    stored, exact = model(bits, symmetric=False, group=group, is_packed=is_packed)
    format = "pack-quantized" if is_packed else "int-quantized"
    source = write(tmp_path, stored, settings(format, num_bits=bits, symmetric=False))
    assert_stands_for(source, exact, f"int{bits}", has_offsets=True)


def test_zero_points_that_are_not_packed(tmp_path):
    """Early versions stored them as int8; a number beyond four bits is damage."""
    stored, exact = model(symmetric=False)
    points = stored[UP + "weight_zero_point"].T.copy().view(np.uint8)
    # [groups, words * 4] -> [groups, rows]
    points = np.stack([points & 15, points >> 4], -1).reshape(2, 96).astype(np.int8) - 8
    stored[UP + "weight_zero_point"] = points.T
    source = write(tmp_path, stored, settings(symmetric=False))
    assert_stands_for(source, exact, "int4", has_offsets=True)
    points[1, 5] = 8
    stored[UP + "weight_zero_point"] = points.T
    source = write(tmp_path, stored, settings(symmetric=False))
    with pytest.raises(EasySpecError, match=r"weight_zero_point holds numbers of more than 4 bits"):
        source.read(UP + "weight_offset")


@pytest.mark.parametrize("format", ["int-quantized", "naive-quantized", "mixed-precision"])
@pytest.mark.parametrize("group", [GROUP, -1])
def test_plain_integers_stand_for_the_same_numbers(tmp_path, format, group):
    stored, exact = model(8, group=group, is_packed=False)
    stored[UP + "input_scale"] = np.ones(1, np.float32)
    assert_stands_for(write(tmp_path, stored, settings(format, num_bits=8)), exact, "int8")


def test_scales_of_blocks_of_integers(tmp_path):
    stored, exact = model(8, is_packed=False)
    scale = np.array([[1.0, 0.5], [0.25, 3.0], [2.0, 0.125]], np.float32)
    values = stored[UP + "weight"].astype(np.float32)
    stored[UP + "weight_scale"] = scale
    exact[UP + "weight"] = values * scale.repeat(32, 0).repeat(32, 1)
    source = write(
        tmp_path, stored, settings("int-quantized", num_bits=8, block_structure=[32, 32])
    )
    assert_stands_for(source, exact, "int8")


@pytest.mark.parametrize("scale_shape", [(), (1,), (96,), (96, 1), (3, 2)])
def test_floats_of_eight_bits(tmp_path, scale_shape):
    stored, exact = model(8, is_packed=False)
    random = np.random.default_rng(0)
    codes = random.normal(size=(96, 64)).astype(ml_dtypes.float8_e4m3fn)
    scale = random.uniform(0.1, 2, scale_shape).astype(np.float32)
    stored |= {UP + "weight": codes, UP + "weight_scale": scale}
    whole = scale.reshape(-1, 1) if len(scale_shape) < 2 else scale
    whole = whole.repeat(96 // whole.shape[0], 0).repeat(64 // whole.shape[1], 1)
    exact[UP + "weight"] = (codes.astype(np.float32) * whole).astype(ml_dtypes.bfloat16)
    scheme = settings("float-quantized", num_bits=8, type="float", block_structure=[32, 32])
    source = write(tmp_path, stored, scheme)
    assert source.dtypes()[UP + "weight"] == "bfloat16"
    np.testing.assert_array_equal(source.read(UP + "weight"), exact[UP + "weight"])
    window = slice(33, 70), slice(7, 50)
    np.testing.assert_array_equal(source.read(UP + "weight", window), exact[UP + "weight"][window])


def test_modules_that_are_left_out_stay_floats(tmp_path):
    stored, exact = model()
    for part in ("weight_packed", "weight_shape", "weight_scale"):
        del stored[UP + part]
    stored[UP + "weight"] = exact[UP + "weight"].astype(np.float16)
    source = write(tmp_path, stored, settings())
    assert source.dtypes()[UP + "weight"] == "float16"
    np.testing.assert_array_equal(source.read(UP + "weight"), stored[UP + "weight"])
    with pytest.raises(EasySpecError, match=r"up_proj\.weight_scale is unknown"):
        write(tmp_path, stored | {UP + "weight_scale": np.ones((96, 1), np.float32)}, settings())


@pytest.mark.parametrize("is_packed", [True, False])
def test_zero_points_of_zero_are_ignored(tmp_path, is_packed):
    stored, exact = model(8, is_packed=is_packed)
    zeros = np.zeros((2, 96), int)
    point = packed(zeros, 8).T if is_packed else zeros.T.astype(np.int8)
    stored[UP + "weight_zero_point"] = point
    scheme = settings("mixed-precision", num_bits=8)
    assert_stands_for(write(tmp_path, stored, scheme), exact, "int8")
    stored[UP + "weight_zero_point"] = point + np.ones_like(point)
    with pytest.raises(EasySpecError, match="is not zero, though the format is symmetric"):
        write(tmp_path, stored, scheme)


def test_an_index_of_groups_must_be_in_order(tmp_path):
    stored, exact = model()
    for index in (np.arange(64) // GROUP, np.full(64, -1)):
        stored[UP + "weight_g_idx"] = index.astype(np.int32)
        assert_stands_for(write(tmp_path, stored, settings()), exact, "int4")
    stored[UP + "weight_g_idx"] = (np.arange(64) % 2).astype(np.int32)
    with pytest.raises(EasySpecError, match=r"weight_g_idx reorders columns \(actorder\), which"):
        write(tmp_path, stored, settings())


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("weight_scale", None, r"up_proj\.weight_scale is missing"),
        ("weight_shape", None, r"up_proj\.weight_shape is missing"),
        ("weight_zero_point", None, r"up_proj\.weight_zero_point is missing"),
        ("weight_shape", np.array([96]), r"weight_shape has shape \(1,\); expected \(2,\)"),
        ("weight_shape", np.array([95, 64]), r"weight_packed has shape \(96, 8\); expected codes"),
        ("weight_shape", np.array([96, -64]), r"weight_packed has shape \(96, 8\); expected codes"),
        ("weight_shape", np.array([96, 1 << 60]), r"weight_packed has shape \(96, 8\); expected"),
        ("weight_packed", np.zeros((96, 9), np.int32), r"weight_packed has shape \(96, 9\); exp"),
        ("weight_packed", np.zeros((96, 8), np.float32), "weight_packed is stored as F|is stored"),
        ("weight_scale", np.ones((96, 3), np.float32), r"weight_scale has shape \(96, 3\); expec"),
        ("weight_scale", np.ones((96, 0), np.float32), r"weight_scale has shape \(96, 0\); expec"),
        ("weight_scale", np.ones((95, 2), np.float32), r"weight_scale has shape \(95, 2\); expec"),
        (
            "weight_zero_point",
            np.zeros((11, 2), np.int32),
            r"weight_zero_point has shape \(11, 2\); expected zero points of 2 groups in 96 rows",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_opening(tmp_path, part, values, message):
    stored, _ = model(symmetric=False)
    if values is None:
        del stored[UP + part]
    else:
        stored[UP + part] = values
    with pytest.raises(EasySpecError, match=message) as error:
        write(tmp_path, stored, settings(symmetric=False))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not supported"),
        ({"format": "marlin-24"}, "format 'marlin-24' is not supported; supported: pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not supported"),
        ({"transform_config": {"config_groups": {"a": {}}}}, "transform_config is not supported"),
        ({"transform_config": 3}, "transform_config is not supported"),
        ({"weights": {"num_bits": 3}}, "weights of 3 bits and type 'int' are not supported"),
        ({"weights": {"num_bits": 4, "type": "float"}}, "weights of 4 bits and type 'float'"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changed, message):
    scheme = settings(**changed.pop("weights", {})) | changed
    with pytest.raises(EasySpecError, match=message):
        write(tmp_path, model()[0], scheme)


def test_scales_that_are_not_finite_are_refused_when_reading(tmp_path):
    stored, _ = model()
    stored[UP + "weight_scale"][5, 1] = np.inf
    source = write(tmp_path, stored, settings())
    source.read(UP + "weight_scale", (slice(0, 5),))
    with pytest.raises(EasySpecError, match=r"up_proj\.weight_scale holds NaN or infinity"):
        Dequantized(source).read(UP + "weight")


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_the_library_reads_the_same_numbers(tmp_path, bits, symmetric):
    """Their own decompression is compared where the package is installed."""
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    torch = pytest.importorskip("torch")
    stored, _ = model(bits, symmetric, dtype=np.float32)
    source = write(tmp_path, stored, settings(num_bits=bits, symmetric=symmetric))
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP
        ),
    )
    parts = {
        name.removeprefix(UP): torch.from_numpy(np.ascontiguousarray(values))
        for name, values in stored.items()
        if name.startswith(UP)
    }
    theirs = compressors.PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    # An offset is a product of its own, which float32 rounds.
    atol = 0 if symmetric else 2**-20
    ours = Dequantized(source).read(UP + "weight")
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=atol)
