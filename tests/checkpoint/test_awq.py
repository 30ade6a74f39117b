"""AWQ's words, scales and zero points become integers that stand for the same numbers."""

import numpy as np
import pytest

from easyspec_jax.errors import EasySpecError
from tests.support.quantized_files import (
    GROUP,
    UP,
    assert_stands_for,
    quantized_model,
    words,
    write,
)

SETTINGS = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "version": "gemm",
    "zero_point": True,
}
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def packed(codes: np.ndarray) -> np.ndarray:
    """Pack neighbours of the last axis; nibble j of a word is neighbour ORDER[j]."""
    eights = codes.reshape(len(codes), -1, 8)[:, :, ORDER]
    return words(eights.reshape(codes.shape), 4)


def model(group=GROUP):
    def parts(random, module, shape):
        rows, inner = shape
        size = inner if group == -1 else group
        codes = random.integers(0, 16, shape)
        zeros = random.integers(0, 16, (rows, inner // size))
        scale = random.uniform(0.001, 1, zeros.shape).astype(np.float16)
        stored = {
            module + "qweight": packed(codes.T),
            module + "qzeros": packed(zeros.T),
            module + "scales": scale.T,
        }
        exact = (codes - zeros.repeat(size, 1)).astype(np.float32)
        return stored, exact * scale.astype(np.float32).repeat(size, 1)

    return quantized_model(parts)


@pytest.mark.parametrize("group", [GROUP, 16, -1])
def test_integers_stand_for_the_same_numbers(tmp_path, group):
    stored, exact = model(group)
    source = write(tmp_path, stored, SETTINGS | {"group_size": group})
    assert_stands_for(source, exact, "int4", has_offsets=True)


def test_older_names_of_settings(tmp_path):
    stored, exact = model()
    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP, "version": "GEMM"}
    assert_stands_for(write(tmp_path, stored, settings), exact, "int4", has_offsets=True)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("qzeros", None, r"up_proj\.qzeros is missing"),
        ("scales", None, r"up_proj\.scales is missing"),
        ("qzeros", np.zeros((2, 13), np.int32), r"qzeros has shape \(2, 13\); expected \(2, 12"),
        ("scales", np.ones((1, 96), np.float16), r"scales has shape \(1, 96\); expected \(2, 96"),
        ("qweight", np.zeros((64, 13), np.int32), r"scales has shape \(2, 96\); expected \(2, 104"),
        ("qweight", np.zeros((63, 12), np.int32), "63 columns, not a multiple of group_size=32"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_opening(tmp_path, part, values, message):
    stored, _ = model()
    if values is None:
        del stored[UP + part]
    else:
        stored[UP + part] = values
    with pytest.raises(EasySpecError, match=message):
        write(tmp_path, stored, SETTINGS)


def test_a_matrix_of_another_model_is_refused(tmp_path):
    stored, _ = model()
    for part in ("qweight", "qzeros", "scales"):
        values = stored[UP + part]
        stored[UP + part] = values[:, : values.shape[1] // 2]
    with pytest.raises(EasySpecError, match=r"up_proj\.weight has shape \(48, 64\) instead of"):
        write(tmp_path, stored, SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 8), ("version", "gemv"), ("group_size", -2), ("group_size", None)]
)
def test_other_settings_are_refused_by_name(tmp_path, field, value):
    with pytest.raises(EasySpecError, match=f"AWQ with {field}=.* is not supported"):
        write(tmp_path, model()[0], SETTINGS | {field: value})
