"""Texts with int8 caches: however they are drafted, they are those of plain decoding with them."""

from typing import Any

import jax
import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode import accepting
from easyspec_jax.engine.engine import Engine
from easyspec_jax.model.cache import KVCache, move
from easyspec_jax.options import KVDType, Method
from tests.support.models import save_noisy_pair

LAYERS, PAIRS, FOUR = 5, "0,1-2,3-4", "0,1-4"
"""Layers of both models, and groups of two and of four of the draft's."""

PROMPTS = ["def add(a, b):", "one two three four five six seven", "x"]
"""The third takes over the row of whichever text of the other two ends first."""

GREEDY = SamplingParams(max_new_tokens=110)
SAMPLED = SamplingParams(max_new_tokens=30, temperature=0.9, seed=3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of a target and of a draft, which is a noisy copy of it."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    save_noisy_pair(target, draft, "smollm2", num_hidden_layers=LAYERS)
    return target, draft


def opened(
    pair: Any,
    mesh: str = "1",
    method: Method = "vanilla",
    kv_dtype: KVDType = "int8",
    **options: Any,
) -> Engine:
    target, draft = pair
    return open_model(
        target,
        None if method == "vanilla" else draft,
        mesh=mesh,
        platform="cpu",
        speculative=SpeculativeConfig(method=method, verifier="coupled", **options),
        dtype="float32",
        kv_dtype=kv_dtype,
    )


def texts(engine: Engine) -> tuple[list[list[int]], list[list[int]]]:
    """Decode greedily, in two rows; and one text with the coupled verifier's noise."""
    greedy = engine.generate(PROMPTS, GREEDY, batch_size=2)
    sampled = engine.generate(PROMPTS[:1], SAMPLED)
    return [c.token_ids for c in greedy], [c.token_ids for c in sampled]


@pytest.fixture(scope="module")
def plain(pair):
    return texts(opened(pair))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "mesh, method, options",
    [
        ("1", "sd", {}),
        ("1", "tree", {}),
        ("1", "easyspec", {"lp_strategy": PAIRS}),
        ("1", "easyspec", {"lp_strategy": FOUR, "tree_width": 3, "calibration": False}),
        ("layer=2,tensor=1", "easyspec", {"lp_strategy": FOUR}),
        ("layer=2,tensor=1", "tree", {"tree_nodes": 8}),
        ("8", "vanilla", {}),
        ("8", "sd", {}),
        ("8", "easyspec", {"lp_strategy": PAIRS, "tree_width": 3}),
        ("8", "easyspec", {"lp_strategy": FOUR}),
    ],
    ids=str,
)
def test_speculation_changes_no_token(pair, plain, mesh, method, options, monkeypatch):
    """The greedy texts outgrow their caches."""
    monkeypatch.setattr("easyspec_jax.decode.sizes.AHEAD", 1)
    engine = opened(pair, mesh, method, **options)
    assert texts(engine) == plain
    assert engine.programs(GREEDY).compiled.extend._cache_size() >= 1  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.exhaustive
def test_scales_that_stay_behind_would_be_found(pair, plain, monkeypatch):
    """A planted fault: accepted entries move, and their scales do not."""

    def values_only(cache: KVCache, source: jax.Array, start: jax.Array) -> KVCache:
        moved = move(KVCache(cache.k, cache.v), source, start)
        return moved._replace(k_scale=cache.k_scale, v_scale=cache.v_scale)

    monkeypatch.setattr(accepting, "move", values_only)
    found = opened(pair, method="tree").generate(PROMPTS[:1], GREEDY)
    assert [completion.token_ids for completion in found] != plain[0][:1]


KEPT: dict[KVDType, set[str]] = {"auto": {"float32"}, "int8": {"int8", "float32"}}


def test_both_models_keep_int8(pair):
    """And the weights stay floats."""
    for kv_dtype, types in KEPT.items():
        programs = opened(pair, method="sd", kv_dtype=kv_dtype).programs(GREEDY)
        state = programs.start(GREEDY, [1], 256)
        for caches in (state.target, state.draft):
            assert {leaf.dtype.name for leaf in jax.tree.leaves(caches)} == types
        assert {leaf.dtype.name for leaf in programs.leaves} == {"float32"}
