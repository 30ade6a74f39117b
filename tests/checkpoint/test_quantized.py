"""Quantized sources: rounding within bounds, windows as parts of the whole, errors as measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyspec_jax.checkpoint.quantized import (
    Dequantized,
    Quantized,
    quantize,
    scale_name,
)
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.errors import EasySpecError

NAME = "model.layers.0.mlp.down_proj.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


def _held(inner: int = 256) -> Held:
    random = np.random.default_rng(0)
    return Held(
        {
            NAME: random.normal(size=(10, inner)).astype(np.float32),
            HEAD: random.normal(size=(7, inner)).astype(np.float32),
            NORM: np.ones(inner, np.float32),
        }
    )


@given(
    dtype=st.sampled_from(["int8", "int4"]),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    group=st.sampled_from([1, 4, 32]),
    magnitude=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_an_error_is_at_most_half_a_step(dtype, rows, groups, group, magnitude, seed):
    weight = np.random.default_rng(seed).normal(size=(rows, groups * group)) * magnitude
    weight = weight.astype(np.float32)
    values, scale = quantize(weight, dtype, group)
    steps = np.repeat(scale, group, axis=1)
    error = np.abs(values.astype(np.float32) * steps - weight)
    most = {"int8": 127, "int4": 7}[dtype]
    inside = np.abs(weight) <= 1.0001 * most * steps
    assert (error <= 0.5001 * steps)[inside].all()
    assert dtype == "int4" or inside.all()


def test_an_int4_scale_costs_no_more_than_one_that_reaches_the_largest_value():
    weight = np.random.default_rng(0).standard_t(3, size=(50, 32)).astype(np.float32)
    values, scale = quantize(weight, "int4", 32)
    reach = np.abs(weight).max(axis=1, keepdims=True) / 7
    plain = np.clip(np.rint(weight / reach), -7, 7) * reach
    own, theirs = (np.square(x - weight).sum() for x in (values.astype(np.float32) * scale, plain))
    assert own < 0.95 * theirs


def test_zeros_stay_zeros():
    values, scale = quantize(np.zeros((2, 8), np.float32), "int8", 8)
    assert not values.any() and (scale == 1).all()


@pytest.mark.parametrize("inner, group", [(256, 128), (320, 64), (96, 32), (40, 40)])
def test_int4_takes_the_largest_group_that_divides_a_row(inner, group):
    source = Quantized(_held(inner), "int4")
    assert source.shapes()[scale_name(NAME)] == (10, inner // group)
    assert source.dtypes()[NAME] == "int4" and source.dtypes()[HEAD] == "int8"
    assert source.shapes()[scale_name(HEAD)] == (7, 1)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    "window",
    [(), (slice(2, 5),), (slice(0, 10), slice(100, 200)), (slice(4, 5), slice(128, 256))],
    ids=str,
)
def test_a_window_is_a_part_of_the_whole(weights, window):
    held = _held()
    source = Quantized(held, weights)
    group = 256 // source.shapes()[scale_name(NAME)][1]
    values, scale = quantize(held.tensors[NAME], weights, group)
    np.testing.assert_array_equal(source.read(NAME, window), values[window])
    np.testing.assert_array_equal(source.read(scale_name(NAME), window[:1]), scale[window[:1]])
    floats = values.astype(np.float32) * np.repeat(scale, group, axis=1)
    np.testing.assert_array_equal(Dequantized(source).read(NAME, window), floats[window])


def test_scales_are_measured_in_blocks_and_norms_stay(monkeypatch):
    monkeypatch.setattr("easyspec_jax.checkpoint.tensors._BLOCK", 4096)
    held = _held()
    source = Quantized(held, "int8")
    expected = quantize(held.tensors[NAME], "int8", 256)[1]
    np.testing.assert_array_equal(source.read(scale_name(NAME)), expected)
    assert source.read(NORM) is held.tensors[NORM] or (source.read(NORM) == 1).all()
    assert scale_name(NORM) not in source.shapes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_values_that_are_not_finite_are_refused_by_name(weights, value):
    held = _held()
    held.tensors[NAME][3, 5] = value
    with pytest.raises(EasySpecError, match=f"{NAME} has values that are not finite"):
        Quantized(held, weights).read(NAME)


def test_a_source_that_is_quantized_already_stays_as_it_is():
    stored = Quantized(_held(), "int4")
    again = Quantized(stored, "int8")
    assert again.dtypes() == stored.dtypes() and again.shapes() == stored.shapes()
    np.testing.assert_array_equal(again.read(NAME), stored.read(NAME))


def test_rounding_loses_little():
    """Relative to the matrix: about a tenth in int4, less than a fiftieth in int8."""
    held, errors = _held(), {}
    rounded = Dequantized(Quantized(held, "int4"))
    for name in (NAME, HEAD):
        exact = held.tensors[name]
        errors[name] = np.linalg.norm(rounded.read(name) - exact) / np.linalg.norm(exact)
    assert 0.05 < errors[NAME] < 0.15
    assert 0.002 < errors[HEAD] < 0.02
