"""Each part of attention agrees with transformers' module of the same name."""

from dataclasses import replace
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Phi3Config
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_to_part

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.model.attention import Attention, attention_weights, rotate
from easyspec_jax.model.cache import KVCache, quantize
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.windows import chain_windows
from tests.kernels.cases import Case
from tests.support.models import (
    FAMILIES,
    family_config,
)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma2", "gemma3", "gpt_oss"}))
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
    (window,) = chain_windows(jnp.asarray(start), 7, 1024, config)
    np.testing.assert_allclose(
        rotate(jnp.asarray(x.numpy()), window), expected.numpy(), atol=2e-4, rtol=0
    )


def test_rotation_of_a_part_of_each_head():
    options = {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 1e4}
    config = model_config(family_config("qwen3").to_dict() | {"rope_parameters": options})
    reference = Phi3Config(hidden_size=64, num_attention_heads=4, rope_parameters=options)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 7, 16)).astype(np.float32))
    cos, sin = Phi3RotaryEmbedding(reference)(x, torch.arange(5, 12)[None])
    expected, _ = apply_to_part(x, x, cos, sin)
    (window,) = chain_windows(jnp.array([5]), 7, 1024, config)
    assert window.cos.shape == (1, 7, 4)
    found = rotate(jnp.asarray(x.numpy()), window)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6, rtol=0)
    np.testing.assert_array_equal(found[..., 8:], x[..., 8:])


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


@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "int8"])
def test_attention_reads_a_cut_as_the_whole_cache(quantized):
    """Keys, values and scales of the same entries are cut, for every row, head and slot."""
    case = Case(starts=(40, 7), tokens=6, tree=True, head_dim=16, capacity=64, sliding=9)
    window, q, cache = case.window(), case.normal(9, *queries(case)), case.cache()
    cut = replace(window, first=jnp.array([40 - 8, 0]), size=8 + 6)
    if quantized:
        (k, k_scale), (v, v_scale) = map(quantize, cache[:2])
        cache = KVCache(k, v, k_scale, v_scale)
    for slot in range(case.slots):
        own = jax.tree.map(lambda x, slot=slot: x[slot], case.attention())
        case.assert_close(own.attend(q, cache, cut, slot), own.attend(q, cache, window, slot))


@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "int8"])
def test_attention_reads_a_part_as_the_whole_cache(quantized):
    """Nothing past the part is read: a weight of 0 would not hide the NaNs there."""
    case = Case(starts=(20, 7), tokens=6, tree=True, head_dim=16, capacity=64)
    window, q, cache = case.window(), case.normal(9, *queries(case)), case.cache()
    part = replace(window, part=jnp.array(1), parts=(16, 32, 64))
    scratch = jax.tree.map(lambda x: x.at[..., 32:, :].set(jnp.nan), cache)
    if quantized:
        (k, k_scale), (v, v_scale) = map(quantize, cache[:2])
        cache = KVCache(k, v, k_scale, v_scale)
        scales = (x.at[..., 32:, :].set(jnp.nan) for x in (k_scale, v_scale))
        scratch = KVCache(k, v, *scales)
    for slot in range(case.slots):
        own = jax.tree.map(lambda x, slot=slot: x[slot], case.attention())
        expected = own.attend(q, cache, window, slot)
        case.assert_close(own.attend(q, scratch, part, slot), expected)
        alone = jax.tree.map(lambda x, slot=slot: x[slot], scratch)
        case.assert_close(own.attend(q, alone, part), expected)
        short = replace(part, part=jnp.array(0))
        assert np.abs(own.attend(q, cache, short, slot) - expected).max() > 0.01


def test_a_sink_takes_its_part_of_the_weights():
    """It is one more score in the softmax, of an entry that has no value."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(2, 3, 2, 4, 7)).astype(np.float32)
    scores[:, :, :, 1, 3:] = -np.inf
    sinks = random.normal(scale=3, size=(3, 2)).astype(np.float32)
    column = np.broadcast_to(sinks[None, :, :, None, None], (2, 3, 2, 4, 1))
    expected = torch.softmax(torch.from_numpy(np.concatenate([scores, column], -1)), -1)[..., :-1]
    found = attention_weights(jnp.asarray(scores), jnp.asarray(sinks))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    # Far above all scores, where a softmax that subtracts only theirs would overflow.
    assert not attention_weights(jnp.asarray(scores), jnp.full((3, 2), 200.0)).any()


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


@pytest.mark.parametrize(
    "name, value",
    [("sinks", nnx.data(nnx.Param(jnp.zeros(4)))), ("scale", 0.2), ("soft_cap", 30.0)],
)
def test_kernels_know_only_plain_scores(name, value):
    attention = attention_of_kernels()
    setattr(attention, name, value)
    assert not attention.can_fuse()
    assert not attention._splits_keys(attention.init_cache(1, 512))


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("qkv.norm", "offset", 1.0),
        ("head_norms.query", "offset", 1.0),
        ("head_norms.key", "offset", 1.0),
        ("out", "multiplier", 0.2),
    ],
)
def test_kernels_know_no_offsets_and_no_multiplier(part, name, value):
    attention = attention_of_kernels()
    setattr(attrgetter(part)(attention), name, value)
    assert not attention.can_fuse()


@pytest.mark.parametrize("name", ["qkv", "out"])
def test_kernels_take_matrices_of_one_type(name):
    attention = attention_of_kernels()
    product = getattr(attention, name)
    product.weight = Matrix(product.weight.values[...].astype(jnp.bfloat16))
    assert not attention.can_fuse()


def attention_of_kernels() -> Attention:
    """Return an attention that is fused and whose keys are split."""
    attention = Case(hidden=128, capacity=512, head_norms=True).attention()
    attention.split_keys_from = 256
    assert attention.can_fuse() and attention._splits_keys(attention.init_cache(1, 512))
    return attention
