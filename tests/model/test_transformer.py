"""Logits are those of transformers, for every family, on meshes that the heads do not divide."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm
from easyspec_jax.model.projection import Output, Projection
from easyspec_jax.model.transformer import MLP
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from tests.kernels.cases import EPS, Case
from tests.support.models import (
    FAMILIES,
    LAYERS,
    forward,
    load_target,
    loader,
    partition_specs,
    save_model,
)

MESHES = [
    *(MeshShape(1, 1), MeshShape(4, 2)),
    *(pytest.param(MeshShape(1, size), marks=pytest.mark.exhaustive) for size in (2, 8)),
]
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 90))


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    reference = save_model(directory, request.param)
    with torch.no_grad():
        logits = reference(torch.from_numpy(TOKENS)).logits.numpy()
    return open_checkpoint(directory), logits


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_target_logits(model, mesh):
    checkpoint, expected = model
    from_ = loader(checkpoint, mesh)
    logits = forward(load_target(from_), from_.mesh, TOKENS)
    np.testing.assert_allclose(logits[..., :300], expected, atol=1e-4, rtol=0)
    assert np.all(logits[..., 300:] == -np.inf)


@pytest.mark.parametrize(
    "axes",
    [ALL_AXES, pytest.param((), marks=pytest.mark.exhaustive)],
    ids=["split", "replicated"],
)
def test_exact_pass_of_layer_groups(model, axes):
    checkpoint, expected = model
    from_ = loader(checkpoint, MeshShape(4, 2), axes)
    draft = load_draft(from_, Layout.uniform(paper_groups(LAYERS, 4)))
    np.testing.assert_allclose(
        forward(draft, from_.mesh, TOKENS)[..., :300], expected, atol=1e-4, rtol=0
    )


def test_a_multiplier_is_not_rounded_to_bfloat16():
    weight = Matrix(jnp.eye(8, dtype=jnp.bfloat16))
    x = jnp.linspace(1, 2, 8, dtype=jnp.bfloat16)[None, None]
    found = Output(weight, multiplier=0.22)(x)
    exact = np.asarray(x, np.float32) * np.float32(0.22)
    np.testing.assert_array_equal(found, jnp.asarray(exact).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "activation, offset, fused",
    [("silu", 0.0, True), ("gelu_pytorch_tanh", 0.0, False), ("silu", 1.0, False)],
)
def test_an_mlp_is_fused_where_the_kernel_knows_its_activation_and_norm(activation, offset, fused):
    case, hidden, inner = Case(), 96, 64
    norm = RMSNorm(case.normal(0, hidden, scale=0.1), eps=EPS, offset=offset)
    matrix = Matrix(case.normal(1, 2 * inner, hidden, scale=hidden**-0.5))
    parts = Projection(norm, matrix, None, dtype=case.dtype), Output(Matrix(jnp.eye(inner)))
    plain, asked = (
        MLP(*parts, activation=activation, fused=on, interpret=True) for on in (False, True)
    )
    h = case.normal(2, 1, 3, hidden)
    assert ("pallas_call" in str(jax.make_jaxpr(asked)(h))) == fused
    case.assert_close(asked(h), plain(h))


def test_rows_of_different_lengths_continue_where_each_one_is(tmp_path):
    """A chunk appended after different lengths gives the logits of the whole text."""
    save_model(tmp_path, "smollm2")
    from_ = loader(open_checkpoint(tmp_path), MeshShape(2, 4))
    target = load_target(from_)
    whole = forward(target, from_.mesh, TOKENS)
    lengths = np.array([70, 40], np.int32)

    @partial(
        jax.shard_map,
        mesh=from_.mesh,
        in_specs=(partition_specs(target), P()),
        out_specs=P(None, None, ALL_AXES),
        check_vma=False,
    )
    def in_two_parts(target, lengths):
        tokens = jnp.asarray(TOKENS, jnp.int32)
        _, caches = target(tokens[:, :70], target.init_caches(2, 90), jnp.zeros(2, jnp.int32))
        rest = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, 20))(tokens, lengths)
        return target.logits(target(rest, caches, lengths)[0])

    parts = np.asarray(jax.jit(in_two_parts)(target, lengths))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            parts[row, :, :300], whole[row, length : length + 20, :300], atol=1e-4, rtol=0
        )


def test_a_pair_whose_embedding_rows_differ(tmp_path):
    """Ids that a model lacks get no probability and embed as zero; surplus ids get none either."""
    save_model(tmp_path / "target", "qwen2", vocab_size=300)
    reference = save_model(tmp_path / "draft", "qwen2", vocab_size=290)
    save_model(tmp_path / "larger", "qwen2", vocab_size=400)
    target, draft, larger = (
        open_checkpoint(tmp_path / name) for name in ("target", "draft", "larger")
    )
    mesh = MeshShape(2, 2)
    from_ = loader(draft, mesh, ALL_AXES, target)
    logits = forward(load_target(from_), from_.mesh, np.minimum(TOKENS, 289))
    with torch.no_grad():
        expected = reference(torch.from_numpy(np.minimum(TOKENS, 289))).logits.numpy()
    np.testing.assert_allclose(logits[..., :290], expected, atol=1e-4, rtol=0)
    assert np.all(logits[..., 290:] == -np.inf)

    with torch.no_grad():
        embedded = reference.model.embed_tokens(torch.from_numpy(np.minimum(TOKENS, 289)))
        embedded[torch.from_numpy(TOKENS >= 290)] = 0
        expected = reference(inputs_embeds=embedded).logits.numpy()
    logits = forward(load_target(from_), from_.mesh, TOKENS)
    np.testing.assert_allclose(logits[..., :290], expected, atol=1e-4, rtol=0)

    surplus = loader(larger, mesh, ALL_AXES, target)
    logits = forward(load_target(surplus), surplus.mesh, TOKENS)
    assert np.all(np.isfinite(logits[..., :300]))
    assert np.all(logits[..., 300:] == -np.inf)
