"""Rounding to integers: errors within half a step, and in int4 no more than they have to be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyspec_jax.checkpoint import rounding as module
from easyspec_jax.checkpoint.rounding import quantize, scales_for


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
    least, most = {"int8": (-127, 127), "int4": (-8, 7)}[dtype]
    inside = (1.0001 * least <= weight / steps) & (weight / steps <= 1.0001 * most)
    assert (error <= 0.5001 * np.abs(steps))[inside].all()
    assert dtype == "int4" or inside.all()


def test_an_int4_scale_costs_no_more_than_one_that_reaches_the_largest_value():
    weight = np.random.default_rng(0).standard_t(3, size=(50, 32)).astype(np.float32)
    values, scale = quantize(weight, "int4", 32)
    reach = np.abs(weight).max(axis=1, keepdims=True) / 7
    plain = np.clip(np.rint(weight / reach), -7, 7) * reach
    own, theirs = (np.square(x - weight).sum() for x in (values.astype(np.float32) * scale, plain))
    assert own < 0.95 * theirs


def test_int4_uses_its_longer_side_for_numbers_of_either_sign():
    weight = np.random.default_rng(0).normal(size=(60, 128)).astype(np.float32)
    values, scale = quantize(weight, "int4", 128)
    assert 10 < (scale < 0).sum() < 50 and values.min() == -8
    floats = values.astype(np.float32)
    lost, without = (np.linalg.norm(v * scale - weight) for v in (floats, floats.clip(min=-7)))
    assert lost < 0.92 * without


def test_scales_fit_the_columns_that_matter():
    random = np.random.default_rng(0)
    weight = random.standard_t(3, size=(70, 128)).astype(np.float32)
    importance = np.exp(random.normal(size=128, scale=2))

    def lost(scale):
        steps = np.repeat(scale, 32, axis=1)
        error = np.clip(np.rint(weight / steps), -8, 7) * steps - weight
        return (importance * np.square(error)).sum()

    assert lost(scales_for(weight, "int4", 32, importance)) < 0.8 * lost(
        scales_for(weight, "int4", 32)
    )
    alike = scales_for(weight, "int4", 32, np.full(128, 3.0))
    np.testing.assert_allclose(alike, scales_for(weight, "int4", 32), rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_scales_do_not_depend_on_how_many_are_tried_at_a_time(weighted, monkeypatch):
    random = np.random.default_rng(0)
    weight = random.standard_t(5, size=(48, 192)).astype(np.float32)
    importance = random.uniform(0.01, 1, 192) if weighted else None
    whole = scales_for(weight, "int4", 64, importance)
    monkeypatch.setattr(module, "_CACHED", 4 * 64)  # four groups, while a row has three
    np.testing.assert_array_equal(scales_for(weight, "int4", 64, importance), whole)


def test_zeros_stay_zeros():
    values, scale = quantize(np.zeros((2, 8), np.float32), "int8", 8)
    assert not values.any() and (scale == 1).all()
