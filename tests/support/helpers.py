"""Shared by test modules: run a body on a mesh, test counts, and see what attentions read."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from easyspec_jax.model.attention import Attention
from easyspec_jax.parallel.mesh import MeshShape, open_mesh


def on_mesh(
    shape: MeshShape, body: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Jit a body inside `shard_map`, as the engine runs it; every call compiles anew."""
    mapped = jax.shard_map(
        body, mesh=open_mesh(shape), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped)


def goodness_of_fit(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the chi-square p-value of counts [rows, cells] under each row's own distribution.

    Cells of a row with an expectation under 5 are pooled. Counts in impossible cells give 0.
    """
    if counts[probabilities == 0].any():
        return 0.0
    statistic, freedom = 0.0, 0
    for observed, expected in zip(
        counts, counts.sum(axis=1, keepdims=True) * probabilities, strict=True
    ):
        order = np.argsort(expected)
        # Pooled from the rarest cell upwards, until the pool is large enough too.
        pool = max(
            int(np.sum(expected < 5)), int(np.searchsorted(np.cumsum(expected[order]), 5)) + 1
        )
        starts = np.concatenate([[0], np.arange(pool, len(order))])
        observed, expected = (np.add.reduceat(x[order], starts) for x in (observed, expected))
        if expected[0] >= 5:
            statistic += float(np.sum((observed - expected) ** 2 / expected))
            freedom += len(expected) - 1
    assert freedom > 0, "too few counts to say anything"
    return float(stats.chi2.sf(statistic, freedom))


def sizes_read(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Collect the sizes of the parts of caches that attentions are traced to read from now on."""
    read, real = set[int](), Attention._mix_part

    def noted(self: Attention, *args: Any, size: int, slot: int | None) -> jax.Array:
        read.add(size)
        return real(self, *args, size=size, slot=slot)

    monkeypatch.setattr(Attention, "_mix_part", noted)
    return read
