"""Prefixes hold what a fresh prefill would write, within their budget, and nothing else."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.decode.chunks import PASS_OVERHEAD, PREFILL_SIZES
from easyspec_jax.decode.loop import Batch
from easyspec_jax.decode.prefilling import prefill_all
from easyspec_jax.decode.prefixes import SHORTEST, PrefixStore, Spared, spared
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.refill import RowCaches
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.decode.tiers import TierChoice
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.sampling.adjustments import Kinds
from easyspec_jax.verify import Coupled, Greedy, Rejection
from tests.support.models import LAYERS, load_target, loader, save_model

ENTRY = 10  # bytes of a cache entry in tests of the store alone
GREEDY = RoundConfig(levels=4, calibration=True, verifier=Greedy(), stop_ids=())
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(4, 300, size).tolist() for size in (148, 20, 60)]


def store(entries: int) -> PrefixStore:
    return PrefixStore(entries * ENTRY, ENTRY)


def keep(prefixes: PrefixStore, ids, size=128) -> bool:
    """Keep a text; return whether it was copied."""
    copies = []

    def copy():
        copies.append(size)
        return RowCaches((), (), ())  # pyright: ignore[reportArgumentType]

    prefixes.keep(ids, size, copy)
    assert prefixes.bytes <= prefixes.limit
    return bool(copies)


def text(*parts: int) -> list[int]:
    """A text of 20 tokens for each part."""
    return [token for part in parts for token in range(100 * part, 100 * part + 20)]


def test_the_longest_common_beginning_is_found():
    prefixes = store(1000)
    for ids in (text(1), text(1, 2, 3), text(4)):
        assert keep(prefixes, ids)
    assert prefixes.find(text(1, 2, 9))[0] == 40
    assert prefixes.find(text(1, 9))[0] == 20
    assert prefixes.find(text(9)) == (0, None)
    assert prefixes.find([7]) == (0, None)


def test_the_last_token_of_a_prompt_is_never_found():
    prefixes = store(1000)
    keep(prefixes, text(1, 2))
    assert prefixes.find(text(1, 2))[0] == 39
    assert prefixes.find(text(1))[0] == 19


def test_a_text_takes_the_place_of_its_own_beginning():
    prefixes = store(1000)
    assert keep(prefixes, text(1))
    assert keep(prefixes, text(1, 2))
    assert prefixes.bytes == 128 * ENTRY
    assert not keep(prefixes, text(1))
    assert not keep(prefixes, text(1, 2))
    assert prefixes.bytes == 128 * ENTRY


def test_what_was_used_least_recently_goes():
    prefixes = store(3 * 128)
    for part in (1, 2, 3):
        keep(prefixes, text(part))
    _, found = prefixes.find(text(1, 9))
    assert found is not None
    prefixes.touch(found)
    assert not keep(prefixes, text(2))  # held already, which is a use too
    keep(prefixes, text(4))
    found = [prefixes.find(text(part, 9))[0] for part in (1, 2, 3, 4)]
    assert found == [20, 20, 0, 20]
    keep(prefixes, text(5), size=256)
    assert [prefixes.find(text(part, 9))[0] for part in (1, 2, 4, 5)] == [0, 0, 20, 20]


def test_of_two_equals_the_more_recent_is_used():
    """So that the other one goes first."""
    prefixes = store(2 * 128)
    keep(prefixes, text(1, 2))
    keep(prefixes, text(1, 3))
    _, found = prefixes.find(text(1, 9))
    assert found is not None and found.ids.tolist() == text(1, 3)


def test_short_texts_are_not_kept():
    prefixes = store(1000)
    assert not keep(prefixes, range(SHORTEST - 1))
    assert keep(prefixes, range(SHORTEST))


@pytest.mark.parametrize(("entries", "most"), [(0, 0), (1, 1), (127, 64), (128, 128), (1000, 512)])
def test_no_prefix_is_larger_than_the_store(entries, most):
    assert store(entries).most == most


@given(
    st.sampled_from(["cpu", "gpu"]),
    st.integers(1, 1500),
    st.integers(0, 2000),
    st.integers(0, 3),
    st.sampled_from([1, 2, 8]),
)
def test_what_is_left_of_a_prompt_fits_behind_its_prefix(platform, prompt, cached, spare, rows):
    run = programs_of(platform)
    capacity = -(-prompt // 128) * 128 + spare * 128
    start = run.sizes.prefill_from(prompt, cached, capacity, rows)
    assert 0 <= start <= min(cached, prompt - 1)
    chunks = run.sizes.chunks(prompt - start, capacity - start, rows)
    assert prompt <= start + sum(chunks) <= capacity
    # A prefix is taken only if the rest costs less than the whole prompt.
    whole, overhead = run.sizes.chunks(prompt, capacity, rows), PASS_OVERHEAD[platform] / rows
    costs = [sum(sizes) + len(sizes) * overhead for sizes in (chunks, whole)]
    assert start == 0 or costs[0] < costs[1]


def programs_of(platform):
    """Programs that know their platform and nothing else."""
    devices = np.array([SimpleNamespace(platform=platform)], object)
    return Programs(SimpleNamespace(devices=devices), None, None, GREEDY)  # pyright: ignore[reportArgumentType]


def test_a_prefix_that_spares_nothing_is_not_taken():
    run = programs_of("gpu")
    assert PREFILL_SIZES["gpu"] == (128, 512)
    assert run.sizes.prefill_from(120, 90, 512) == 0
    assert run.sizes.prefill_from(150, 90, 512) == 90
    # 20 tokens are left, and no chunk of 128 fits behind the 1000 that are cached.
    assert run.sizes.prefill_from(1020, 1000, 1024) == 896


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target and a draft, which is a noisy copy of it."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    save_model(target, "smollm2")
    noisy = save_model(draft, "smollm2")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    noisy.save_pretrained(draft)
    return open_checkpoint(target), open_checkpoint(draft)


def programs(pair, config, mesh=MeshShape(1, 1), lp_size=3, kv_dtype="auto") -> Programs:  # noqa: B008
    target, draft = pair
    of_target = replace(loader(target, mesh), kv_dtype=kv_dtype)
    if config.levels == 0:
        return Programs(of_target.mesh, load_target(of_target), None, config)
    layout = Layout.uniform(paper_groups(LAYERS, lp_size), 1)
    of_draft = replace(loader(draft, mesh), kv_dtype=kv_dtype)
    return Programs(of_target.mesh, load_target(of_target), load_draft(of_draft, layout), config)


def rows_of(array, rows):
    """Split every device's part of a cache into rows: [..., rows, heads, entries, channels]."""
    for shard in array.addressable_shards:
        part = np.asarray(shard.data)
        yield part.reshape(*part.shape[:-3], rows, -1, *part.shape[-2:])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(2, 4)], ids=str)
def test_a_row_comes_back_as_it_was_with_zeros_behind(pair, mesh, kv_dtype):
    """From one cache size into another, into another row; the other rows keep what they had."""
    run = programs(pair, GREEDY, mesh, kv_dtype=kv_dtype)
    state, _ = prefill_all(run, run.start(SamplingParams(), [9] * 3, 256), PROMPTS)
    kept = run.copy_row(state, 2, 128)
    other, _ = prefill_all(run, run.start(SamplingParams(), [9] * 3, 512), PROMPTS)
    before = jax.device_get((other.target, other.draft))
    restored = run.restore(run.extend(other, 512), 1, kept, 50)
    assert restored.length.tolist() == [148, 50, 60] == restored.draft_length.tolist()
    for caches, old, source in zip(
        (restored.target, restored.draft), before, (state.target, state.draft), strict=True
    ):
        leaves = map(jax.tree.leaves, (caches, source))
        for new, first in zip(*leaves, strict=True):
            for found, expected in zip(rows_of(new, 3), rows_of(first, 3), strict=True):
                mine, its = found[..., 1, :, :, :], expected[..., 2, :, :, :]
                np.testing.assert_array_equal(mine[..., :50, :], its[..., :50, :])
                assert not mine[..., 50:, :].any()
        for new, was in zip(jax.tree.leaves(caches), jax.tree.leaves(old), strict=True):
            for row in (0, 2):
                heads = new.shape[-3] // 3
                own = np.s_[..., row * heads : (row + 1) * heads, :, :]
                if mesh.size == 1:
                    np.testing.assert_array_equal(np.asarray(new)[own], was[own])


def test_nothing_behind_a_prefix_comes_back(pair):
    """NaNs that another text left behind would poison the attention, whatever the mask says."""
    run = programs(pair, GREEDY)
    state, _ = prefill_all(run, run.start(SamplingParams(), [9], 256), PROMPTS[:1])
    kept = run.copy_row(state, 0, 256)
    caches = kept.target, kept.draft
    target, draft = jax.tree.map(lambda x: x.at[..., 100:, :].set(jnp.nan), caches)
    poisoned = kept._replace(target=target, draft=draft)
    fresh = run.start(SamplingParams(), [9], 256)
    restored = run.restore(fresh, 0, poisoned, 100)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.target))


def test_a_copy_survives_the_state_that_it_was_made_from(pair):
    """Also a copy of a whole cache, which XLA could have made the same buffer."""
    run = programs(pair, replace(GREEDY, levels=0))
    state, _ = prefill_all(run, run.start(SamplingParams(), [9], 256), PROMPTS[:1])
    kept = run.copy_row(state, 0, 256)
    before = jax.device_get(kept)
    for _ in range(3):
        state, _ = run.round(state)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))


def check_kept_entries(pair, config, mesh, lp_size, kv_dtype="auto"):
    """Run a batch to its end; whatever it keeps must be what a fresh prefill writes."""
    run = programs(pair, config, mesh, lp_size, kv_dtype)
    prefixes, sampling = PrefixStore(1 << 30, 1), SamplingParams(temperature=0.8)
    batch = Batch.filled(run, PROMPTS, [60, 9, 90], sampling, prefixes=prefixes)
    for _ in batch.reports():
        pass
    batch.close()
    assert len(prefixes._held) == 3
    for prefix in prefixes._held:
        assert_kept(run, prefix)
    return [len(prefix.ids) for prefix in prefixes._held]


def assert_kept(run, prefix):
    """Compare what is kept with a fresh prefill."""
    fresh = run.start(SamplingParams(), [9], run.sizes.capacity(prefix.size))
    fresh, _ = prefill_all(run, fresh, [[*prefix.ids.tolist(), 5]])
    expected = run.copy_row(fresh, 0, prefix.size)
    ours, theirs = ((kept.target, kept.draft) for kept in (prefix.caches, expected))
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        x, y = (np.asarray(a)[..., : len(prefix.ids), :] for a in (found, wanted))
        if x.dtype == np.int8:
            assert np.abs(x.astype(np.int32) - y).max() <= 1
        else:
            np.testing.assert_allclose(x, y, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, levels, width, lp_size, calibration, kv_dtype",
    [
        pytest.param(MeshShape(1, 1), 0, 1, 1, False, "auto", marks=pytest.mark.exhaustive),
        (MeshShape(1, 1), 4, 1, 1, False, "auto"),
        pytest.param(MeshShape(1, 1), 3, 4, 1, False, "auto", marks=pytest.mark.exhaustive),
        pytest.param(MeshShape(1, 1), 4, 1, 3, True, "auto", marks=pytest.mark.exhaustive),
        (MeshShape(2, 4), 4, 3, 3, True, "auto"),
        pytest.param(MeshShape(1, 1), 4, 3, 3, True, "int8", marks=pytest.mark.exhaustive),
        pytest.param(MeshShape(2, 1), 4, 1, 3, False, "auto", marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_what_is_kept_is_what_a_prefill_writes(
    pair, mesh, levels, width, lp_size, calibration, kv_dtype
):
    config = RoundConfig(levels, calibration, Coupled(), (), width)
    kept = check_kept_entries(pair, config, mesh, lp_size, kv_dtype)
    prompts = [len(prompt) for prompt in PROMPTS]
    if levels and lp_size > 1 and not calibration:
        assert kept == prompts  # answers have inexact entries in the draft's caches
    else:
        texts = [prompt + limit for prompt, limit in zip(prompts, [60, 9, 90], strict=True)]
        # All but the tokens of the last round.
        assert all(
            text - levels - 1 <= tokens < text for tokens, text in zip(kept, texts, strict=True)
        )


@pytest.mark.slow
def test_inexact_entries_that_are_kept_would_be_found(pair, monkeypatch):
    monkeypatch.setattr(Programs, "keeps_exact_draft", True)
    with pytest.raises(AssertionError):
        check_kept_entries(pair, replace(GREEDY, calibration=False), MeshShape(1, 1), 3)


def test_a_failed_state_leaves_nothing_behind(pair, monkeypatch):
    run, prefixes = programs(pair, replace(GREEDY, levels=0)), PrefixStore(1 << 30, 1)
    keep(prefixes, text(1))
    batch = Batch.filled(run, PROMPTS[:1], [3], SamplingParams(), prefixes=prefixes)

    def failed(state):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("easyspec_jax.decode.loop.settle", failed)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        batch.close()
    assert prefixes.bytes == 0


def test_a_prompt_that_was_interrupted_is_not_kept(pair, monkeypatch):
    """Its row holds only part of it."""
    run, prefixes = programs(pair, replace(GREEDY, levels=0)), PrefixStore(1 << 30, 1)
    batch = Batch.empty(run, 2, 256, prefixes)
    batch.enter(0, PROMPTS[2], 9, SamplingParams())

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Programs, "enter_target", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.enter(1, PROMPTS[0], 9, SamplingParams())
    batch.close()
    assert [prefix.ids.tolist() for prefix in prefixes._held] == [PROMPTS[2]]


def test_after_an_interrupted_call_there_is_nothing_to_keep(pair):
    run, prefixes = programs(pair, replace(GREEDY, levels=0)), PrefixStore(1 << 30, 1)
    batch = Batch.filled(run, PROMPTS[:1], [9], SamplingParams(), prefixes=prefixes)
    run.round(batch._state)  # donates the state, and its result never arrives
    batch.close()
    assert prefixes.bytes == 0


def test_few_programs_copy_and_restore(pair):
    """One for each pair of a cache's size and a prefix's size, whatever the texts."""
    run, prefixes = programs(pair, replace(GREEDY, levels=0)), PrefixStore(1 << 30, 1)
    rng, sizes = np.random.default_rng(3), set()
    shared = rng.integers(4, 300, 100).tolist()
    for tokens in (1, 30, 90, 130, 200, 290, 31, 133, 291, 2):
        prompt = shared + rng.integers(4, 300, tokens).tolist()
        batch = Batch.filled(run, [prompt], [4], SamplingParams(), prefixes=prefixes)
        for _ in batch.reports():
            pass
        batch.close()
        capacity = batch._growth.capacity
        sizes.add((capacity, run.sizes.prefix_size(len(prompt), capacity)))
    assert prefixes.bytes
    assert run.compiled.copy_row._cache_size() <= len(sizes) == 3  # pyright: ignore[reportFunctionMemberAccess]
    found = {prefix.size for prefix in prefixes._held}
    capacities = {capacity for capacity, _ in sizes}
    assert run.compiled.restore._cache_size() <= len(found) * len(capacities)  # pyright: ignore[reportFunctionMemberAccess]


def test_rows_are_kept_when_they_are_left_and_shared_while_they_run(pair):
    run = programs(pair, replace(GREEDY, verifier=Rejection()))
    prefixes = PrefixStore(1 << 30, 1)
    batch = Batch.empty(run, 2, 256, prefixes)
    batch.enter(0, PROMPTS[1], 30, SamplingParams(temperature=0.8))
    batch.enter(1, PROMPTS[2], 30, SamplingParams(temperature=0.8, seed=1))
    for _ in range(3):
        list(batch.step())
    batch.leave(0)
    assert prefixes.find([*PROMPTS[1], 5])[0] == 20
    assert prefixes.find([*PROMPTS[2], 5])[0] == 0
    # A prompt that begins like a running text finds what that text holds.
    batch.enter(0, [*PROMPTS[2], 5, 6], 30, SamplingParams())
    assert batch.cached.tolist() == [60, 0]
    batch.close()


def test_a_prompt_that_no_round_has_drafted_for_is_kept_for_both_models(pair, monkeypatch):
    """The draft reads it first, when its text ends or while it goes on."""
    run = programs(pair, replace(GREEDY, tiers=(0,)))
    monkeypatch.setattr(TierChoice, "next", lambda choice, unread: 0)
    prefixes = PrefixStore(1 << 30, 1)
    batch = Batch.empty(run, 3, 256, prefixes)
    batch.enter(0, PROMPTS[2], 30, SamplingParams())
    list(batch.step())
    batch.enter(1, [*PROMPTS[2][:50], 5, 6], 30, SamplingParams())  # keeps what they share
    assert [len(prefix.ids) for prefix in prefixes._held] == [50]
    batch.enter(2, [8, 8, 8], 30, SamplingParams())  # shares nothing
    assert batch._reading.rows.tolist() == [1, 2]
    list(batch.step())
    batch.leave(1)
    batch.close()
    assert len(prefixes._held) > 1
    for prefix in prefixes._held:
        assert_kept(run, prefix)


@pytest.mark.parametrize(
    "mesh",
    [MeshShape(1, 1), pytest.param(MeshShape(2, 4), marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_rows_with_one_prompt_prefill_it_once(pair, mesh, monkeypatch):
    """Their texts are what they are alone, other rows' too, and a wrong copy is noticed."""
    run = programs(pair, replace(GREEDY, verifier=Rejection()), mesh)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    sampling, prefilled = SamplingParams(temperature=0.8, seed=5), []
    prefill, enter, restore = Programs.prefill, Programs.enter, Programs.restore

    def counted(self, state, tokens, count, last):
        prefilled.append(count)
        return prefill(self, state, tokens, count, last)

    def entered(self, state, row, prompt, limit, sampling, start, end):
        prefilled.append(np.eye(4, dtype=int)[row] * (end - start))
        return enter(self, state, row, prompt, limit, sampling, start, end)

    def texts(prompts, sampling=sampling):
        batch = Batch.filled(run, prompts, [9] * len(prompts), sampling)
        found = [[] for _ in prompts]
        for report in batch.reports():
            for row, count in enumerate(report.num_tokens):
                found[row] += report.tokens[row, :count].tolist()
        return found, batch.cached.tolist()

    monkeypatch.setattr(Programs, "prefill", counted)
    monkeypatch.setattr(Programs, "enter", entered)
    together, cached = texts(prompts)
    assert np.sum(prefilled, axis=0).tolist() == [148, 20, 1, 1]
    assert cached == [0, 0, 147, 147]
    seeds = [replace(sampling, seed=5 + row) for row in range(4)]
    alone = [texts([prompt], own)[0][0] for prompt, own in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert len(set(map(tuple, together))) == 4

    def too_few(self, state, row, kept, count):
        return restore(self, state, row, kept, count // 2)

    monkeypatch.setattr(Programs, "restore", too_few)
    assert texts(prompts)[0] != alone


@pytest.mark.parametrize(
    "config",
    [replace(GREEDY, rows=8), replace(GREEDY, kinds=Kinds(prompt_logprobs=True))],
    ids=["bit-stable", "log-probabilities"],
)
def test_rows_that_need_the_same_passes_share_nothing(pair, config):
    run = programs(pair, config)
    found = spared(run, None, dict(enumerate([PROMPTS[0]] * 2)), 256, 2)
    assert found == Spared(0, {}, [])
    (repeat,) = spared(
        programs(pair, GREEDY), None, {0: PROMPTS[0], 2: PROMPTS[0], 3: PROMPTS[1]}, 256, 4
    ).repeats
    assert repeat == ((0, 2), 147)


@pytest.mark.parametrize("alone", [60, 90, 110, 140])
def test_long_prompts_fit_behind_what_others_share(pair, alone):
    """If they do not, nothing is shared; every text is what it is alone."""
    run, rng = programs(pair, replace(GREEDY, levels=0)), np.random.default_rng(4)
    long = rng.integers(4, 300, alone).tolist()
    prompts = [PROMPTS[0], long, PROMPTS[0]]
    found = spared(run, None, dict(enumerate(prompts)), 256, 3)
    assert bool(found.repeats) == (147 + -(-alone // 16) * 16 <= 256)

    def first_tokens(prompts):
        batch = Batch.filled(run, prompts, [9] * len(prompts), SamplingParams())
        assert batch._growth.capacity == 256
        report = next(iter(batch.reports()))
        batch.close()
        return report.tokens[:, 0].tolist()

    assert first_tokens(prompts) == first_tokens([PROMPTS[0], long]) + first_tokens([PROMPTS[0]])
