"""8-bit floats with scales are read as the bfloat16 that they stand for."""

import ml_dtypes
import numpy as np
import pytest

from easyspec_jax.checkpoint.quantized import Dequantized, Quantized
from easyspec_jax.errors import EasySpecError
from tests.support.quantized_files import UP, assert_stands_for, quantized_model, write

BLOCKS = [40, 24]  # divides neither rows nor columns
SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCKS}
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}


def model(blocks=True, scale_dtype=np.float32):
    def parts(random, module, shape):
        rows, inner = shape
        codes = random.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
        scale = random.uniform(0.1, 2, (-(-rows // BLOCKS[0]), -(-inner // BLOCKS[1])))
        scale = (scale if blocks else scale[0, 0]).astype(scale_dtype)
        exact = np.zeros(shape, np.float32)
        for row in range(rows):
            for column in range(inner):
                factor = scale[row // BLOCKS[0], column // BLOCKS[1]] if blocks else scale
                exact[row, column] = np.float32(codes[row, column]) * np.float32(factor)
        stored = {module + "weight": codes, module + "weight_scale_inv": np.asarray(scale)}
        return stored, exact.astype(ml_dtypes.bfloat16)

    return quantized_model(parts)


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
def test_blocks_are_multiplied_by_their_scales(tmp_path, scale_dtype):
    stored, exact = model(scale_dtype=scale_dtype)
    assert_stands_for(write(tmp_path, stored, SETTINGS), exact, "bfloat16")


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_one_scale_for_a_matrix(tmp_path, name):
    stored, exact = model(blocks=False)
    renamed = {key.replace("weight_scale_inv", name): each for key, each in stored.items()}
    renamed[UP + "input_scale"] = np.ones((), np.float32)
    assert_stands_for(write(tmp_path, renamed, PER_TENSOR), exact, "bfloat16")


def test_it_can_be_quantized_anew(tmp_path):
    stored, exact = model()
    source = Quantized(write(tmp_path, stored, SETTINGS), "int8")
    weight = exact[UP + "weight"].astype(np.float32)
    error = np.abs(Dequantized(source).read(UP + "weight") - weight)
    assert (error <= 0.501 * source.read(UP + "weight_scale")).all()


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, r"up_proj\.weight_scale_inv is missing"),
        (np.ones((3, 2), np.float32), r"weight_scale_inv has shape \(3, 2\); expected scales of"),
        (np.ones((96, 5), np.float32), r"weight_scale_inv has shape \(96, 5\); expected scales of"),
        (np.ones((3, 3), np.int32), "weight_scale_inv is stored as I32"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_opening(tmp_path, scale, message):
    stored, _ = model()
    stored[UP + "weight_scale_inv"] = scale
    kept = {name: values for name, values in stored.items() if values is not None}
    with pytest.raises(EasySpecError, match=message):
        write(tmp_path, kept, SETTINGS)


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_numbers_that_are_not_finite_are_refused_when_reading(tmp_path, part):
    stored, _ = model()
    stored[UP + part][2, 1] = np.nan
    source = write(tmp_path, stored, SETTINGS)
    with pytest.raises(EasySpecError, match=rf"{part} holds NaN or"):
        source.read(UP + "weight")


def test_products_that_overflow_are_refused_when_reading(tmp_path):
    stored, _ = model()
    stored[UP + "weight_scale_inv"][0, 0] = 3e38
    source = write(tmp_path, stored, SETTINGS)
    with pytest.raises(EasySpecError, match=r"up_proj\.weight holds NaN or values that overflow"):
        source.read(UP + "weight")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fmt", "e5m2"),
        ("weight_block_size", [128]),
        ("weight_block_size", [0, 128]),
        ("weight_block_size", "128"),
        ("weight_block_size", [True, 128]),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, field, value):
    with pytest.raises(EasySpecError, match=f"fp8 with {field}=.* is not supported"):
        write(tmp_path, model()[0], SETTINGS | {field: value})
