"""Ridge regression from sums, against least squares over all rows."""

import numpy as np

from easyspec_jax.refit.equations import NormalEquations


def _filled(x: np.ndarray, y: np.ndarray, batches: int) -> NormalEquations:
    equations = NormalEquations(x.shape[1], y.shape[1])
    for part in np.array_split(np.arange(len(x)), batches):
        equations.add(x[part].T @ x[part], x[part].T @ y[part], len(part))
    return equations


def test_solution_minimises_the_penalised_error():
    random = np.random.default_rng(0)
    x, y, prior = (random.normal(size=shape) for shape in ((200, 7), (200, 3), (7, 3)))
    ridge = 0.1
    # The penalty is that of further rows: weight · I as inputs, weight · prior as targets.
    weight = np.sqrt(ridge * len(x))
    rows, targets = np.concatenate([x, weight * np.eye(7)]), np.concatenate([y, weight * prior])
    expected = np.linalg.lstsq(rows, targets)[0]
    for batches in (1, 9):
        np.testing.assert_allclose(_filled(x, y, batches).solve(prior, ridge), expected, rtol=1e-9)


def test_a_strong_ridge_leaves_the_prior():
    random = np.random.default_rng(1)
    x, y, prior = (random.normal(size=shape) for shape in ((50, 4), (50, 2), (4, 2)))
    solved = _filled(x, y, 2)
    np.testing.assert_allclose(solved.solve(prior, 1e9), prior, atol=1e-6)
    assert np.abs(solved.solve(prior, 1e-9) - prior).max() > 0.1


def test_sums_of_float32_do_not_lose_small_terms():
    """A million ones on top of 2²⁴ vanish in float32."""
    equations = NormalEquations(1, 1)
    equations.add(np.full((1, 1), 2.0**24, np.float32), np.full((1, 1), 2.0**24, np.float32), 1)
    for _ in range(1000):
        equations.add(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32), 1)
    expected = 2.0**24 / (2.0**24 + 1000)
    np.testing.assert_allclose(equations.solve(np.zeros((1, 1)), 1e-12), expected, rtol=1e-9)
