"""Rounding to int4 that makes up for its errors: GPTQ (arXiv 2210.17323).

A matrix W is fed inputs x. Its integers Q, times their scales, are to keep the outputs rather than
the numbers:

    least  Σ |(W - Q) x|² = tr (W - Q) H (W - Q)ᵀ,   H = Σ x xᵀ

Columns are rounded one after another, and each error is made up for in the columns that are still
floats. With H = R D Rᵀ, where R is upper triangular with ones on its diagonal, the sum is

    Σ_j D_j |E_j + Σ_{i<j} E_i R_ij|²,   E = W - Q

so column j rounds W_j + Σ_{i<j} E_i R_ij, and D says how much an error there costs. This form needs
no inverse of H; QuIP (arXiv 2307.13304) shows that its integers are GPTQ's.

GPTQ never returns to a column. Here sweeps follow: integers move, one column at a time, to where
the sum is least with all others as they are (as in QuantEase, arXiv 2309.01885), and scales are
fitted to the integers by least squares.
"""

import numpy as np
from jaxtyping import Float, Int

from easyspec_jax.checkpoint.rounding import INTEGERS, scales_for

DAMPING = 0.1
"""Share of the mean diagonal of H that is added to its diagonal. GPTQ's authors take 0.01, but have
more tokens; docs/conversion.md has the figures.
"""

SWEEPS = 3
"""Sweeps over all columns after GPTQ's own."""

_BLOCK = 128
"""Columns that are rounded before their errors are passed on to all others."""

_FLOATS = 8 << 20
"""Numbers of an array that is computed for as many rows at a time as fit."""

_LEAST, _MOST = INTEGERS["int4"]


def gptq(
    weight: Float[np.ndarray, "out inner"],
    hessian: Float[np.ndarray, "inner inner"],
    group: int,
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> tuple[Int[np.ndarray, "out inner"], Float[np.ndarray, "out groups"]]:
    """Round a matrix to int4 so that its outputs change little.

    Args:
        weight: The matrix.
        hessian: Σ x xᵀ over inputs x, in any unit.
        group: Columns that share a scale; divides `inner`.
        damping: Share of the mean of the hessian's diagonal that is added to it.
        sweeps: Sweeps after GPTQ's own.

    Returns:
        Values of int4 and float32 scales, as from `rounding.quantize`.

    Raises:
        numpy.linalg.LinAlgError: The hessian has numbers that are not finite.

    Examples:
        Two inputs that are always equal: only the sum of a row's numbers matters. The row (1, 0.3,
        0.3) rounds to (7, 2, 2) sevenths, and the sum's error of 0.03 is made smaller where it can.

        >>> weight = np.array([[1.0, 0.3, 0.3]], np.float32)
        >>> hessian = np.ones((3, 3)) + 0.01 * np.eye(3)
        >>> values, scale = gptq(weight, hessian, group=3)
        >>> abs(float((values.astype(np.float32) * scale).sum()) - 1.6) < 0.01
        True
    """
    inner = weight.shape[1]
    weight = weight.astype(np.float32, copy=False)
    damped = damp(hessian, damping)
    # Columns whose inputs are largest come first, while there are others to make up for them.
    order = np.argsort(-np.diag(damped), kind="stable")
    feedback, costs = _decomposed(damped[np.ix_(order, order)])
    importance = np.empty(inner)
    importance[order] = costs
    scale = scales_for(weight, "int4", group, importance)
    # [out, inner] -> [inner, out], as the loops over columns want it.
    columns = np.ascontiguousarray(weight.T)
    values = np.empty_like(columns)
    values[order] = _rounded_in_order(columns[order], _steps(scale, inner)[order], feedback)
    metric = damped.astype(np.float32)
    for _ in range(sweeps):
        scale = _fitted_scales(weight, values.T, scale, metric)
        values = _descended(columns, values, _steps(scale, inner), metric)
    return values.T.astype(np.int8, order="C").astype("int4"), scale


def damp(
    hessian: Float[np.ndarray, "inner inner"], damping: float
) -> Float[np.ndarray, "inner inner"]:
    """Add to the diagonal, in float64; inputs that are all zero leave ones there.

    Examples:
        >>> damp(np.diag([1.0, 3.0]), 0.5).tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    mean = np.diag(hessian).mean()
    return hessian + (damping * mean if mean > 0 else 1.0) * np.eye(len(hessian))


def _steps(scale: Float[np.ndarray, "out groups"], inner: int) -> Float[np.ndarray, "inner out"]:
    """Return the scale of every number, transposed."""
    return np.ascontiguousarray(scale.T).repeat(inner // scale.shape[1], axis=0)


def _decomposed(
    hessian: Float[np.ndarray, "inner inner"],
) -> tuple[Float[np.ndarray, "inner inner"], Float[np.ndarray, " inner"]]:
    """Return R (float32) and D, where R D Rᵀ is the hessian and R is upper triangular."""
    # Cholesky's factor is lower triangular. Of the hessian backwards, read backwards, it is upper.
    upper = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    diagonal = np.diag(upper)
    return (upper / diagonal[None, :]).astype(np.float32), diagonal**2


def _rounded_in_order(
    weight: Float[np.ndarray, "inner out"],
    steps: Float[np.ndarray, "inner out"],
    feedback: Float[np.ndarray, "inner inner"],
) -> Float[np.ndarray, "inner out"]:
    """Round column by column, each with the feedback of the errors of those before it.

    Columns of the matrix are rows here, so that each is contiguous.
    """
    values, errors = np.empty_like(weight), np.empty_like(weight)
    inner = len(weight)
    for start in range(0, inner, _BLOCK):
        stop = min(start + _BLOCK, inner)
        wanted = weight[start:stop] + feedback[:start, start:stop].T @ errors[:start]
        for column in range(start, stop):
            within = feedback[start:column, column] @ errors[start:column]
            exact = (wanted[column - start] + within) / steps[column]
            values[column] = np.clip(np.rint(exact), _LEAST, _MOST)
            errors[column] = weight[column] - values[column] * steps[column]
    return values


def _descended(
    weight: Float[np.ndarray, "inner out"],
    values: Float[np.ndarray, "inner out"],
    steps: Float[np.ndarray, "inner out"],
    hessian: Float[np.ndarray, "inner inner"],
) -> Float[np.ndarray, "inner out"]:
    """Move each column in order to the integers that are best with the others as they are.

    Columns of the matrix are rows here, so that each is contiguous.
    """
    values, inner = values.copy(), len(weight)
    # H Eᵀ, kept up to date for the columns to come: the least along column j is where (H Eᵀ)_j is
    # zero.
    slope = hessian @ (weight - values * steps)
    for start in range(0, inner, _BLOCK):
        stop = min(start + _BLOCK, inner)
        within, moved = hessian[start:stop, start:stop], np.zeros_like(slope[start:stop])
        for column in range(start, stop):
            at = column - start
            # What the columns of this block that moved before have changed.
            own = slope[column] - within[at, :at] @ moved[:at]
            wanted = values[column] + own / (within[at, at] * steps[column])
            better = np.clip(np.rint(wanted), _LEAST, _MOST)
            moved[at] = (better - values[column]) * steps[column]
            values[column] = better
        slope[stop:] -= hessian[stop:, start:stop] @ moved
    return values


def _fitted_scales(
    weight: Float[np.ndarray, "out inner"],
    values: Float[np.ndarray, "out inner"],
    scale: Float[np.ndarray, "out groups"],
    hessian: Float[np.ndarray, "inner inner"],
) -> Float[np.ndarray, "out groups"]:
    """Fit all scales of a row at once to its integers; groups of zeros keep theirs."""
    (out, inner), groups = weight.shape, scale.shape[1]
    group = inner // groups
    # Row by row, with q_g the integers of group g and zeros elsewhere: A s = b, where
    # A_gk = q_g H q_kᵀ and b_g = q_g H wᵀ.
    wanted = (weight @ hessian).reshape(out, groups, group)
    fitted = np.empty_like(scale)
    rows = max(1, _FLOATS // max(groups * groups, inner))
    for start in range(0, out, rows):
        own = slice(start, start + rows)
        q = values[own].reshape(-1, groups, group)
        a = np.empty((len(q), groups, groups))
        for number in range(groups):
            # [rows, group] @ [group, columns from this group on] -> [rows, groups left, group]
            columns = slice(number * group, inner)
            products = q[:, number] @ hessian[columns.start : columns.start + group, columns]
            products = products.reshape(len(q), -1, group)
            a[:, number, number:] = np.einsum("rkj,rkj->rk", products, q[:, number:])
            a[:, number:, number] = a[:, number, number:]
        b = np.einsum("rgi,rgi->rg", q, wanted[own]).astype(np.float64)
        empty = ~q.any(axis=2)
        # A group of zeros has no equation: its scale stays.
        diagonal = np.arange(groups)
        a[:, diagonal, diagonal] += np.where(empty, 1.0, 1e-6 * a[:, diagonal, diagonal])
        b = np.where(empty, scale[own], b)
        fitted[own] = np.linalg.solve(a, b[:, :, None])[:, :, 0]
    # A scale of zero would divide by zero.
    return np.where(fitted == 0, scale, fitted)
