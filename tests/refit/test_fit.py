"""The fit is the least-squares answer, and brings a fuzzy draft nearer to itself."""

from functools import cache

import numpy as np
import pytest
import torch

from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.refit.fidelity import fidelity
from easyspec_jax.refit.fit import fit
from tests.refit.conftest import LAYERS, TEXTS
from tests.support.models import loader

pytestmark = pytest.mark.slow

RIDGE = 1e-2
ONE = MeshShape(1, 1)
GROUPS = paper_groups(LAYERS, 4)  # 0 | 1-3 | 4-6 | 7


@pytest.fixture(scope="module")
def fitted(draft):
    """The tensors by mesh and MLPs at once, each fitted once."""

    @cache
    def tensors(mesh: MeshShape = ONE, mlp_lp_size: int = 1):
        return fit(loader(draft[0], mesh), Layout.uniform(GROUPS, mlp_lp_size), TEXTS, RIDGE)

    return tensors


@torch.no_grad()
def _layer_inputs(reference) -> list[np.ndarray]:
    states = reference.model(
        torch.from_numpy(TEXTS).long(), output_hidden_states=True
    ).hidden_states
    return [state.double().numpy().reshape(-1, state.shape[-1]) for state in states]


def test_first_group_is_ridge_regression_on_transformers_states(draft, fitted):
    """Nothing before it is fuzzy, so its inputs are transformers' hidden states."""
    checkpoint, reference = draft
    states, eps = _layer_inputs(reference), checkpoint.config.rms_norm_eps

    def normed(h: np.ndarray) -> np.ndarray:
        return h / np.sqrt(np.square(h).mean(axis=-1, keepdims=True) + eps)

    x = np.concatenate([normed(states[1]), np.ones((len(states[1]), 1))], axis=1)
    penalty = np.sqrt(RIDGE * len(x)) * np.eye(x.shape[1])
    for layer in (2, 3):
        norm = checkpoint.source.read(f"model.layers.{layer}.input_layernorm.weight")
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = (
                checkpoint.source.read(f"model.layers.{layer}.self_attn.{name}.weight").T
                * norm[:, None]
            )
            prior = np.concatenate([weight, np.zeros((1, weight.shape[1]))])
            rows = np.concatenate([x, penalty])
            targets = np.concatenate([normed(states[layer]) @ weight, penalty @ prior])
            expected = np.linalg.lstsq(rows, targets)[0]
            tensors = fitted()
            np.testing.assert_allclose(
                tensors[f"model.layers.{layer}.self_attn.{name}.weight"], expected[:-1].T, atol=2e-4
            )
            np.testing.assert_allclose(
                tensors[f"model.layers.{layer}.self_attn.{name}.bias"], expected[-1], atol=2e-4
            )
            assert np.abs(expected - prior).max() > 0.05, "the plain projection would pass too"


def test_only_stale_projections_are_replaced(fitted):
    layers = {int(name.split(".")[2]) for name in fitted()}
    assert layers == {2, 3, 5, 6}
    assert not any("mlp" in name for name in fitted())
    stale = {name.split(".")[2] for name in fitted(mlp_lp_size=2) if "gate_proj" in name}
    assert stale == {"2", "5"}, "each pair's second MLP, and no other"


@pytest.mark.parametrize("mlp_lp_size", [1, 2])
def test_the_mesh_does_not_matter(fitted, mlp_lp_size):
    one, many = fitted(mlp_lp_size=mlp_lp_size), fitted(MeshShape(4, 2), mlp_lp_size)
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(many[name], tensor, atol=5e-3, err_msg=name)


@pytest.mark.parametrize("mlp_lp_size", [1, 2, 3])
def test_a_refit_draft_is_nearer_to_itself(draft, fitted, mlp_lp_size):
    from_ = loader(draft[0], MeshShape(1, 1), ALL_AXES)
    layout, everywhere = Layout.uniform(GROUPS, mlp_lp_size), np.ones(TEXTS.shape, bool)
    plain, _ = fidelity(load_draft(from_, layout), from_.mesh, TEXTS, everywhere)
    refit = Held(fitted(mlp_lp_size=mlp_lp_size))
    better, _ = fidelity(load_draft(from_, layout, refit), from_.mesh, TEXTS, everywhere)
    assert all(after > before + 0.02 for before, after in zip(plain, better, strict=True)), (
        plain,
        better,
    )
    assert max(better) <= 1
