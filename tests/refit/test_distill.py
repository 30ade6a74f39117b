"""Distillation brings a draft nearer to itself, on any mesh, and moves nothing else."""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.draft.sites import joined, named, stale_sites
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.refit.distill import RATE, distill
from easyspec_jax.refit.fidelity import fidelity
from easyspec_jax.refit.fit import fit
from tests.refit.conftest import LAYERS, TEXTS
from tests.support.models import loader

pytestmark = pytest.mark.slow

LAYOUT = Layout.uniform(paper_groups(LAYERS, 4), mlp_lp_size=2)  # 0 | 1-3x2 | 4-6x2 | 7
ONE = MeshShape(1, 1)


@pytest.fixture(scope="module")
def fitted(draft):
    return fit(loader(draft[0], ONE), LAYOUT, TEXTS, 1e-2)


@pytest.fixture(scope="module")
def distilled(draft, fitted):
    """The tensors by mesh and steps, each distilled once."""

    @cache
    def tensors(mesh: MeshShape, steps: int):
        return distill(loader(draft[0], mesh), LAYOUT, fitted, TEXTS, steps)

    return tensors


def test_more_tokens_are_kept(draft, fitted, distilled):
    from_, everywhere = loader(draft[0], ONE, ALL_AXES), np.ones(TEXTS.shape, bool)
    before, after = (
        fidelity(load_draft(from_, LAYOUT, Held(tensors)), from_.mesh, TEXTS, everywhere)[0]
        for tensors in (fitted, distilled(ONE, 80))
    )
    assert all(1 - new < 0.85 * (1 - old) for old, new in zip(before, after, strict=True)), (
        before,
        after,
    )


@pytest.mark.parametrize("mesh", [MeshShape(4, 2), MeshShape(1, 8)], ids=str)
def test_the_mesh_does_not_matter(fitted, distilled, mesh):
    """Directions agree, not each sign: Adam's first steps are as long for tiny gradients."""
    one, many = distilled(ONE, 2), distilled(mesh, 2)
    assert one.keys() == many.keys() == fitted.keys()
    for name, tensor in fitted.items():
        if not name.endswith("norm.weight"):
            moved, expected = (x[name].ravel() - tensor.ravel() for x in (many, one))
            assert np.abs(expected).max() > RATE / 2
            assert moved @ expected > 0.99 * np.linalg.norm(moved) * np.linalg.norm(expected), name


def test_a_draft_in_bfloat16_is_trained_in_float32(draft, fitted, distilled):
    from_ = replace(loader(draft[0], ONE), dtype=np.dtype(jnp.bfloat16))
    rough = distill(from_, LAYOUT, fitted, TEXTS, 2)
    steps = ((x[name] - fitted[name] for name in fitted) for x in (rough, distilled(ONE, 2)))
    moved, expected = (np.concatenate([x.ravel() for x in own]) for own in steps)
    assert moved.dtype == np.float32 and np.abs(moved).max() < 3 * RATE, (
        "nothing was rounded to bfloat16"
    )
    assert moved @ expected > 0.5 * np.linalg.norm(moved) * np.linalg.norm(expected)


def test_every_stale_projection_moves_and_its_norm_does_not(fitted, distilled):
    for name, tensor in distilled(ONE, 2).items():
        assert tensor.shape == fitted[name].shape and tensor.dtype == np.float32
        assert np.array_equal(tensor, fitted[name]) == name.endswith("norm.weight"), name


def test_projections_are_taken_apart_and_joined_alike(draft, fitted):
    from_ = loader(draft[0], ONE)
    for site in stale_sites(LAYOUT):
        again = named(from_, site, joined(fitted, site))
        for name, tensor in again.items():
            np.testing.assert_array_equal(tensor, fitted[name])
