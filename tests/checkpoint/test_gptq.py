"""GPTQ's words, scales and zero points become integers that stand for the same numbers."""

import numpy as np
import pytest

from easyspec_jax.checkpoint.quantized import Dequantized
from easyspec_jax.errors import EasySpecError
from tests.support.quantized_files import (
    GROUP,
    UP,
    assert_stands_for,
    quantized_model,
    words,
    write,
)

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}


def model(bits=4, symmetric=True, group=GROUP, less=1):
    """Weight [o, i] = (code - zero) * scale; zeros are stored less 1 in the first version."""

    def parts(random, module, shape):
        rows, inner = shape
        size = inner if group == -1 else group
        groups = inner // size
        codes = random.integers(0, 1 << bits, shape)
        half = 1 << (bits - 1)
        zeros = np.full((rows, groups), half)
        if not symmetric:
            zeros = random.integers(1, 1 << bits, (rows, groups))
        scale = random.normal(size=(rows, groups)).astype(np.float16)
        stored = {
            module + "qweight": words(codes, bits).T,
            module + "qzeros": words(zeros.T - less, bits),
            module + "scales": scale.T,
            module + "g_idx": (np.arange(inner) // size).astype(np.int32),
        }
        exact = (codes - zeros.repeat(size, 1)).astype(np.float32)
        return stored, exact * scale.astype(np.float32).repeat(size, 1)

    return quantized_model(parts)


@pytest.mark.parametrize("group", [GROUP, 16, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_stand_for_the_same_numbers(tmp_path, bits, symmetric, group):
    stored, exact = model(bits, symmetric, group)
    settings = SETTINGS | {"bits": bits, "sym": symmetric, "group_size": group}
    source = write(tmp_path, stored, settings)
    assert_stands_for(source, exact, f"int{bits}", has_offsets=not symmetric)


def test_the_second_version_stores_zero_points_as_they_are(tmp_path):
    stored, exact = model(less=0)
    settings = SETTINGS | {"checkpoint_format": "gptq_v2"}
    assert_stands_for(write(tmp_path, stored, settings), exact, "int4")
    # Read as the first version, every zero point would be 9.
    source = write(tmp_path, stored, SETTINGS)
    with pytest.raises(EasySpecError, match=r"qzeros is not symmetric, though the format says so"):
        source.read(UP + "weight")


def test_an_index_of_groups_is_not_needed(tmp_path):
    stored, exact = model()
    without = {name: values for name, values in stored.items() if not name.endswith("g_idx")}
    assert_stands_for(write(tmp_path, without, SETTINGS), exact, "int4")


def test_biases_of_zeros_are_ignored(tmp_path):
    stored, exact = model()
    bias = {UP + "bias": np.zeros(96, np.float16)}
    assert_stands_for(write(tmp_path, stored | bias, SETTINGS), exact, "int4")
    bias[UP + "bias"][3] = 1
    with pytest.raises(EasySpecError, match="bias is not zero, and the model has no such bias"):
        write(tmp_path, stored | bias, SETTINGS)


def test_a_copy_of_the_head_may_be_quantized(tmp_path):
    stored, exact = model()
    del exact["lm_head.weight"], stored["lm_head.weight"]
    head = {name.replace(UP, "lm_head."): each for name, each in stored.items() if UP in name}
    head = {
        "lm_head.qweight": head["lm_head.qweight"][:, :24],
        "lm_head.qzeros": head["lm_head.qzeros"][:, :3],
        "lm_head.scales": head["lm_head.scales"][:, :24],
    }
    source = write(tmp_path, stored | head, SETTINGS)
    read = Dequantized(source).read("lm_head.weight")
    np.testing.assert_array_equal(read, exact[UP + "weight"][:24])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qzeros": None}, r"up_proj\.qzeros is missing"),
        ({"scales": None}, r"up_proj\.scales is missing"),
        ({"qweight": None}, r"up_proj\.weight is missing"),
        (
            {"qzeros": np.zeros((2, 11), np.int32)},
            r"qzeros has shape \(2, 11\); expected \(2, 12\)",
        ),
        ({"scales": np.ones((4, 96), np.float16)}, r"scales has shape \(4, 96\); expected \(2, 96"),
        ({"scales": np.ones((2, 96), np.int32)}, "scales is stored as I32, and only float32 and"),
        ({"qweight": np.zeros((8, 96), np.int8)}, "qweight is stored as I8, and only I32 can"),
        ({"qweight": np.zeros((0, 96), np.int32)}, r"qweight has shape \(0, 96\); expected a mat"),
        ({"qweight": np.zeros(96, np.int32)}, r"qweight has shape \(96,\); expected a matrix"),
        ({"qweight": np.zeros((9, 96), np.int32)}, "72 columns, not a multiple of group_size=32"),
        ({"g_idx": np.zeros(63, np.int32)}, r"g_idx has shape \(63,\); expected \(64,\)"),
        (
            {"g_idx": (np.arange(64) % 2).astype(np.int32)},
            r"g_idx reorders columns \(desc_act\), which is not supported; quantize with desc_act=",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_opening(tmp_path, changed, message):
    stored, _ = model()
    stored |= {UP + part: values for part, values in changed.items()}
    kept = {name: values for name, values in stored.items() if values is not None}
    if "qweight" in changed and changed["qweight"] is None:
        for part in ("qzeros", "scales", "g_idx"):
            del kept[UP + part]
    with pytest.raises(EasySpecError, match=message) as error:
        write(tmp_path, kept, SETTINGS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_refused_when_reading(tmp_path, value):
    stored, _ = model()
    stored[UP + "scales"][1, 40] = value
    source = write(tmp_path, stored, SETTINGS)
    source.read(UP + "weight_scale", (slice(0, 40),))
    with pytest.raises(EasySpecError, match=r"up_proj\.scales holds NaN or infinity"):
        source.read(UP + "weight_scale")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 3),
        ("bits", "4"),
        ("bits", [4]),
        ("checkpoint_format", "marlin"),
        ("dynamic", {"a": {}}),
        ("group_size", 0),
        ("group_size", 32.0),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, field, value):
    shown = field.removeprefix("checkpoint_")
    with pytest.raises(EasySpecError, match=f"GPTQ with {shown}=.* is not supported"):
        write(tmp_path, model()[0], SETTINGS | {field: value})
