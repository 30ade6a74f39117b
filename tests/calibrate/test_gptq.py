"""GPTQ keeps a matrix's outputs, on inputs that are correlated, much nearer than rounding does."""

import numpy as np
import pytest

from easyspec_jax.calibrate import gptq as module
from easyspec_jax.calibrate.gptq import DAMPING, damp, gptq
from easyspec_jax.checkpoint.rounding import dequantize, of_columns, quantize, scales_for

OUT, INNER, GROUP = 48, 192, 64
RNG = np.random.default_rng(0)
WEIGHT = 0.05 * RNG.standard_t(5, size=(OUT, INNER)).astype(np.float32)
# Few directions have most of the inputs' energy, as in a model.
INPUTS = RNG.normal(size=(1000, INNER)) * np.exp(-np.arange(INNER) / 40)
INPUTS = INPUTS @ np.linalg.qr(RNG.normal(size=(INNER, INNER)))[0]
INPUTS += 0.05 * RNG.normal(size=INPUTS.shape)
HESSIAN = INPUTS.T @ INPUTS


def output_error(found, hessian=HESSIAN, weight=WEIGHT) -> float:
    """Return tr (W - Q) H (W - Q)ᵀ."""
    error = dequantize(*found) - weight
    return float(np.einsum("oi,oi->", error @ hessian, error))


def relative_error(**options) -> float:
    return output_error(gptq(WEIGHT, HESSIAN, GROUP, **options)) / output_error(
        quantize(WEIGHT, "int4", GROUP)
    )


def test_outputs_are_much_nearer_than_those_of_the_nearest_integers():
    assert relative_error(sweeps=0) < 0.3
    assert relative_error() < 0.9 * relative_error(sweeps=0)


def test_inputs_without_correlation_leave_nothing_to_make_up_for():
    identity = np.eye(INNER)
    plain = quantize(WEIGHT, "int4", GROUP)
    found = gptq(WEIGHT, identity, GROUP, sweeps=0)
    np.testing.assert_array_equal(found[0], plain[0])
    np.testing.assert_array_equal(found[1], plain[1])
    swept = gptq(WEIGHT, identity, GROUP)
    assert output_error(swept, identity) <= output_error(plain, identity)


def test_types_and_shapes_are_those_of_rounding():
    plain, found = quantize(WEIGHT, "int4", GROUP), gptq(WEIGHT, HESSIAN, GROUP)
    for one, other in zip(plain, found, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
    assert found[0].astype(int).min() >= -8 and found[0].astype(int).max() <= 7


def test_the_unit_of_the_inputs_does_not_matter():
    one, other = gptq(WEIGHT, HESSIAN, GROUP), gptq(WEIGHT, 2.0**20 * HESSIAN, GROUP)
    assert (one[0] == other[0]).mean() > 0.99


def test_integers_are_those_of_the_papers_algorithm():
    """Algorithm 1 of arXiv 2210.17323: Cholesky's factor of the inverse, and updates of W."""
    hessian = damp(HESSIAN, DAMPING)
    order = np.argsort(-np.diag(hessian))
    hessian = hessian[np.ix_(order, order)]
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    importance = np.empty(INNER)
    importance[order] = np.diag(factor) ** -2
    scale = scales_for(WEIGHT, "int4", GROUP, importance)
    steps = of_columns(scale, slice(0, INNER), GROUP)[:, order]
    left, expected = WEIGHT[:, order].astype(np.float64), np.empty((OUT, INNER))
    for j in range(INNER):
        expected[:, j] = np.clip(np.rint(left[:, j] / steps[:, j]), -8, 7)
        error = (left[:, j] - expected[:, j] * steps[:, j]) / factor[j, j]
        left[:, j:] -= error[:, None] * factor[j, j:]
    values, found = gptq(WEIGHT, HESSIAN, GROUP, sweeps=0)
    np.testing.assert_allclose(found, scale, rtol=1e-5)
    # In float32 a number in the middle between two integers may go either way.
    assert (values[:, order].astype(float) == expected).mean() > 0.99


def test_in_the_end_no_single_integer_can_be_better():
    values, scale = gptq(WEIGHT[:4], HESSIAN, GROUP, sweeps=30)
    hessian, weight = damp(HESSIAN, DAMPING), WEIGHT[:4]
    least = output_error((values, scale), hessian, weight)
    for row, column in zip(*RNG.integers([[4], [INNER]], size=(2, 200), dtype=int), strict=True):
        for step in (-1, 1):
            other = values.astype(np.int8)
            other[row, column] = np.clip(other[row, column] + step, -8, 7)
            assert output_error((other, scale), hessian, weight) > least * (1 - 1e-5)


def test_scales_are_the_best_for_their_integers():
    """48 groups make more pairs than a row has numbers."""
    values, scale = quantize(WEIGHT[:9], "int4", 4)
    hessian, weight = damp(HESSIAN, DAMPING), WEIGHT[:9]
    fitted = module._fitted_scales(weight, values.astype(np.float32), scale, hessian)
    least = output_error((values, fitted), hessian, weight)
    assert least < output_error((values, scale), hessian, weight)
    for row, number in zip(*RNG.integers([[9], [48]], size=(2, 60), dtype=int), strict=True):
        for factor in (0.97, 1.03):
            other = fitted.copy()
            other[row, number] *= factor
            assert output_error((values, other), hessian, weight) > least


@pytest.mark.parametrize("fault", ["no feedback", "feedback of other columns", "wrong sign"])
def test_faults_would_be_noticed(monkeypatch, fault):
    plain = module._decomposed

    def faulty(hessian):
        feedback, costs = plain(hessian)
        kinds = {
            "no feedback": np.eye(INNER, dtype=np.float32),
            "feedback of other columns": np.triu(np.roll(feedback, 1, axis=1)),
            "wrong sign": -feedback,
        }
        return kinds[fault], costs

    monkeypatch.setattr(module, "_decomposed", faulty)
    assert relative_error(sweeps=0) > 0.5


def test_inputs_and_groups_of_zeros():
    weight, hessian = WEIGHT.copy(), HESSIAN.copy()
    weight[:, :GROUP] = 0
    hessian[5], hessian[:, 5] = 0, 0
    values, scale = gptq(weight, hessian, GROUP)
    assert np.isfinite(scale).all() and (scale != 0).all()
    assert output_error((values, scale), hessian, weight) < output_error(
        quantize(weight, "int4", GROUP), hessian, weight
    )
    nothing = gptq(weight, np.zeros((INNER, INNER)), GROUP, sweeps=0)
    np.testing.assert_array_equal(nothing[0], quantize(weight, "int4", GROUP)[0])


def test_rows_do_not_depend_on_how_many_are_fitted_at_a_time(monkeypatch):
    weight = WEIGHT.copy()
    weight[::5, :GROUP] = 0  # groups that keep their scale
    whole = gptq(weight, HESSIAN, GROUP)
    monkeypatch.setattr(module, "_FLOATS", 7 * INNER)  # seven rows
    values, scale = gptq(weight, HESSIAN, GROUP)
    np.testing.assert_array_equal(values, whole[0])
    np.testing.assert_allclose(scale, whole[1], rtol=1e-5)
