"""Each part of attention agrees with transformers' module of the same name."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.model.attention import Attention, Nodes, chain_window, rotate, tree_window
from easyspec_jax.model.cache import KVCache, quantize
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from tests.kernels.cases import Case
from tests.support.helpers import on_mesh
from tests.support.models import (
    FAMILIES,
    family_config,
    forward,
    load_target,
    loader,
    partition_specs,
    save_model,
)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rotation(family):
    reference = family_config(family)
    config = model_config(reference.to_dict())
    x = torch.from_numpy(
        np.random.default_rng(0).normal(size=(2, 3, 7, config.head_dim)).astype(np.float32)
    )
    start = np.array([5, 900], np.int32)
    positions = torch.from_numpy(start[:, None] + np.arange(7)[None])
    cos, sin = LlamaRotaryEmbedding(reference)(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    window = chain_window(jnp.asarray(start), 7, 1024, config)
    np.testing.assert_allclose(
        rotate(jnp.asarray(x.numpy()), window), expected.numpy(), atol=2e-4, rtol=0
    )


def test_a_token_reads_itself_and_what_came_before():
    window = chain_window(jnp.array([0, 3]), 2, 6, model_config(family_config("smollm2").to_dict()))
    assert window.mask.astype(int).tolist() == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    ]


@pytest.mark.parametrize("first", [0, 2])
def test_a_chain_of_nodes_stands_where_a_chain_does(first):
    """Rows have different lengths, and the nodes from `first` on make the pass."""
    config, text, nodes = (
        model_config(family_config("llama3").to_dict()),
        np.array([0, 5], np.int32),
        4,
    )
    depth = np.tile(np.arange(nodes, dtype=np.int32), (2, 1))[:, first:]
    ancestors = np.tile(np.tri(nodes, dtype=bool), (2, 1, 1))[:, first:]
    nodes_of_rows = Nodes(*map(jnp.asarray, (text + first, text, depth, ancestors)))
    window = tree_window(nodes_of_rows, 12, config)
    expected = chain_window(jnp.asarray(text + first), nodes - first, 12, config)
    jax.tree.map(np.testing.assert_array_equal, window, expected)


def test_a_node_reads_the_text_and_its_own_path():
    ancestors = jnp.asarray([[[True, False, False], [True, True, False], [True, False, True]]])
    nodes = Nodes(jnp.array([2]), jnp.array([2]), jnp.array([[0, 1, 1]]), ancestors)
    window = tree_window(nodes, 6, model_config(family_config("smollm2").to_dict()))
    assert window.mask.astype(int).tolist() == [
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]]
    ]


PATHS = ((0,), (0, 1), (0, 2), (0, 2, 3), (0, 1, 4), (0, 2, 5), (0, 2, 5, 6))
"""Path from the root to each node of a tree, in the order of the nodes."""


def test_a_node_of_a_tree_is_the_end_of_a_chain(tmp_path):
    """Logits after a node are those after its path as plain text.

    All nodes in one pass, as verified, or level by level, as drafted.
    """
    save_model(tmp_path, "smollm2", num_hidden_layers=2)
    from_ = loader(open_checkpoint(tmp_path), MeshShape(1, 1))
    model, random = load_target(from_), np.random.default_rng(0)
    lengths, size = np.array([9, 5], np.int32), len(PATHS)
    text, tokens = (random.integers(0, 300, size=(2, n)).astype(np.int32) for n in (9, size))
    depth = np.array([len(path) - 1 for path in PATHS], np.int32)
    ancestors = np.array([[node in path for node in range(size)] for path in PATHS])

    def body(
        model: Decoder, text: jax.Array, tokens: jax.Array, lengths: jax.Array
    ) -> list[jax.Array]:
        def in_passes(*counts: int) -> jax.Array:
            _, caches = model(text, model.init_caches(2, 9 + size), jnp.zeros(2, jnp.int32))
            logits, first = [], 0
            for count in counts:
                here = slice(first, first + count)
                own = (jnp.broadcast_to(x[here], (2, *x[here].shape)) for x in (depth, ancestors))
                h, caches = model(tokens[:, here], caches, Nodes(lengths + first, lengths, *own))
                logits.append(model.logits(h))
                first += count
            return jnp.concatenate(logits, axis=1)

        return [in_passes(7), in_passes(1, 2, 3, 1)]

    specs = (partition_specs(model), P(), P(), P())
    results = on_mesh(MeshShape(1, 1), body, specs, P(None, None, ALL_AXES))(
        model, text, tokens, lengths
    )

    chains = np.zeros((2, size, 9 + max(map(len, PATHS))), np.int32)
    for row, length in enumerate(lengths):
        for node, path in enumerate(PATHS):
            chains[row, node, : length + len(path)] = [
                *text[row, :length],
                *tokens[row, list(path)],
            ]
    expected = forward(model, from_.mesh, chains.reshape(2 * size, -1)).reshape(
        2, size, chains.shape[2], -1
    )
    expected = expected[np.arange(2)[:, None], np.arange(size), lengths[:, None] + depth]
    for logits in results:
        np.testing.assert_allclose(logits[..., :300], expected[..., :300], atol=1e-4, rtol=0)


def test_norm():
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    reference = LlamaRMSNorm(16, eps=1e-5)
    torch.nn.init.normal_(reference.weight)
    expected = reference(torch.from_numpy(x)).detach().numpy()
    actual = rms_norm(jnp.asarray(x), jnp.asarray(reference.weight.detach().numpy()), 1e-5)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("starts, tokens, tree", [((5,), 1, False), ((40, 7), 6, True)])
def test_attention_reads_what_a_quantized_cache_stands_for(starts, tokens, tree, dtype):
    """Scales that multiply scores and weights give what floats, made of the cache first, would."""
    case = Case(starts=starts, tokens=tokens, tree=tree, head_dim=16, capacity=64, dtype=dtype)
    attention, window, q = case.attention(), case.window(), case.normal(9, *queries(case))
    (k, k_scale), (v, v_scale) = map(quantize, case.cache()[:2])
    stored = KVCache(k, v, k_scale, v_scale)
    # In float32, because bfloat16 would round the products of integers and scales once more.
    wide = replace(case, dtype="float32")
    floats = KVCache(k.astype(jnp.float32) * k_scale, v.astype(jnp.float32) * v_scale)
    for slot in range(case.slots):
        own = jax.tree.map(lambda x, slot=slot: x[slot], attention)
        plain = jax.tree.map(lambda x, slot=slot: x[slot], wide.attention())
        expected = plain.attend(q.astype(jnp.float32), floats, window, slot)
        found = own.attend(q, stored, window, slot)
        assert found.dtype == q.dtype
        case.assert_close(found.astype(jnp.float32), expected)
        alone = own.attend(q, jax.tree.map(lambda x, slot=slot: x[slot], stored), window)
        np.testing.assert_array_equal(found, alone)


def queries(case: Case) -> tuple[int, ...]:
    return len(case.starts), case.kv_heads * case.group, case.tokens, case.head_dim


def test_kernels_take_no_quantized_cache():
    """They are chosen for the same shapes with caches of floats."""
    case = Case(hidden=128, capacity=512)

    def int8(attention: Attention) -> Attention:
        attention.kv_dtype = "int8"
        return attention

    assert case.attention().can_fuse() and not int8(case.attention()).can_fuse()
    for attention, splits in ((case.attention(), True), (int8(case.attention()), False)):
        attention.split_keys_from = 256
        assert attention._splits_keys(attention.init_cache(1, 512)) == splits
