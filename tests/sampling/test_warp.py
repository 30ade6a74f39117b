"""Truncation keeps what transformers keeps, on vocabulary shards and on whole rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.sampling.warp import min_p_cutoff, shard_cutoff, warp
from tests.support.helpers import on_mesh

ROWS, VOCAB = 9, 64
ONE = MeshShape(1, 1)


def warped(logits, temperature, top_k, top_p, mesh=ONE, axes: Axes = ALL_AXES):
    """Warp rows on vocabulary shards, each row with its own numbers."""

    def body(
        logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
    ) -> jax.Array:
        return warp(logits, temperature, shard_cutoff(logits, temperature, top_k, top_p, axes))

    numbers = (
        np.broadcast_to(np.asarray(x, dtype), len(logits))
        for x, dtype in ((temperature, np.float32), (top_k, np.int32), (top_p, np.float32))
    )
    split = P(None, axes or None)
    return np.asarray(on_mesh(mesh, body, (split, P(), P(), P()), split)(logits, *numbers))


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32) * 2


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(4, 2)], ids=str)
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (64, 1.0), (99, 1.0), (0, 0.9), (7, 0.5)]
)
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_transformers_keeps_the_same(logits, mesh, temperature, top_k, top_p):
    warpers: list[Any] = [
        TemperatureLogitsWarper(temperature),
        *([TopKLogitsWarper(top_k)] if top_k else []),
    ]
    expected = torch.tensor(logits)
    for warper in [*warpers, TopPLogitsWarper(top_p)]:
        expected = warper(None, expected)
    np.testing.assert_allclose(
        warped(logits, temperature, top_k, top_p, mesh), expected.numpy(), rtol=1e-6
    )


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(4, 2)], ids=str)
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (20, 0.7)])
def test_min_p_comes_before_top_k_and_top_p(logits, mesh, min_p, top_k, top_p):
    """The order is vLLM's; transformers applies min-p last, which keeps other tokens."""
    warpers: list[Any] = [
        TemperatureLogitsWarper(1.3),
        MinPLogitsWarper(min_p),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        TopPLogitsWarper(top_p),
    ]
    expected = torch.tensor(logits)
    for warper in warpers:
        expected = warper(None, expected)

    def body(logits: jax.Array) -> jax.Array:
        temperature, p, k, m = (
            jnp.full(ROWS, x, dtype)
            for x, dtype in (
                (1.3, jnp.float32),
                (top_p, jnp.float32),
                (top_k, jnp.int32),
                (min_p, jnp.float32),
            )
        )
        if top_k or top_p < 1:
            cut = shard_cutoff(logits, temperature, k, p, ALL_AXES, m)
        else:
            cut = min_p_cutoff(logits, temperature, m, ALL_AXES)
        return warp(logits, temperature, cut)

    split = P(None, ALL_AXES)
    found = np.asarray(on_mesh(mesh, body, (split,), split)(logits))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_a_draft_that_every_device_has_whole_is_cut_alike(logits):
    split, whole = (warped(logits, 0.7, 9, 0.8, MeshShape(4, 2), axes) for axes in (ALL_AXES, ()))
    np.testing.assert_array_equal(split, whole)


def test_each_row_has_its_own_numbers(logits):
    rows = [(0.5, 0, 1.0), (0.7, 3, 1.0), (1.0, 0, 0.6), (2.0, 10, 0.9)]
    temperature, top_k, top_p = zip(*rows, strict=True)
    together = warped(logits[:4], temperature, top_k, top_p)
    for row, numbers in enumerate(rows):
        np.testing.assert_array_equal(together[row], warped(logits[row : row + 1], *numbers)[0])


def test_equal_logits_stay_together_and_one_is_always_kept():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 0.0], [9.0, 0.0, 0.0, -jnp.inf]])
    assert np.isfinite(warped(logits, 1.0, 1, 1.0)).tolist() == [
        [False, True, True, False],
        [True, False, False, False],
    ]
    assert np.isfinite(warped(logits, 1.0, 0, 1e-9)).sum(axis=1).tolist() == [2, 1]
    assert np.isfinite(warped(logits, 1.0, 0, 1.0)).sum(axis=1).tolist() == [4, 3]
