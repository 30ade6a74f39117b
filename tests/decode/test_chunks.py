"""Chunks cover a prompt, fit into its cache, and cost the least."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyspec_jax.decode import prefilling
from easyspec_jax.decode.chunks import PASS_OVERHEAD, PREFILL_SIZES, chunks
from easyspec_jax.decode.sizes import CAPACITY_UNIT
from easyspec_jax.engine.completion import EncodedPrompt
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.pair import open_model
from easyspec_jax.options import SamplingParams

PLATFORMS = st.sampled_from(sorted(PREFILL_SIZES))


@pytest.mark.parametrize("platform", PREFILL_SIZES)
def test_there_is_always_a_size_that_fits(platform):
    sizes = PREFILL_SIZES[platform]
    assert list(sizes) == sorted(set(sizes))
    assert all(size % sizes[0] == 0 for size in (*sizes, CAPACITY_UNIT))
    assert PREFILL_SIZES.keys() == PASS_OVERHEAD.keys()


@given(PLATFORMS, st.integers(1, 5000), st.integers(0, 40), st.sampled_from([1, 2, 8]))
def test_prompts_are_covered_with_little_waste(platform, tokens, spare, rows):
    sizes, overhead = PREFILL_SIZES[platform], PASS_OVERHEAD[platform] / rows
    room = -(-tokens // CAPACITY_UNIT) * CAPACITY_UNIT + spare * CAPACITY_UNIT
    found = chunks(tokens, sizes, overhead, room)
    assert set(found) <= set(sizes)
    assert list(found) == sorted(found, reverse=True)
    assert tokens <= sum(found) <= room
    assert sum(found[:-1]) < tokens, "the last chunk has a token"
    # Neither the least padding nor a single size would cost less.
    assert cost(found, overhead) <= cost(least_padding(tokens, sizes), overhead)
    one_size = -(-tokens // CAPACITY_UNIT)
    assert cost(found, overhead) <= one_size * (overhead + CAPACITY_UNIT)


def least_padding(tokens, sizes):
    """Take as many of every size as go in, and pad what is left to the smallest."""
    found = []
    for size in reversed(sizes):
        found += [size] * (tokens // size)
        tokens %= size
    return found + [sizes[0]] * (tokens > 0)


@given(st.integers(1, 20), st.integers(0, 6), st.integers(0, 40))
def test_no_other_chunks_cost_less(tokens, spare, overhead):
    sizes, room = (4, 8, 24), -(-tokens // 4) * 4 + 4 * spare
    every = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(sizes, count) for count in range(1, 6)
    )
    least = min(cost(found, overhead) for found in every if tokens <= sum(found) <= room)
    assert cost(chunks(tokens, sizes, overhead, room), overhead) == least


def cost(found, overhead):
    return sum(found) + overhead * len(found)


@pytest.fixture
def engine() -> Engine:
    return open_model(mesh="1", platform="cpu")


def test_rows_share_the_working_memory_of_a_long_chunk(engine, monkeypatch):
    run = engine.programs(SamplingParams())
    monkeypatch.setitem(PREFILL_SIZES, "cpu", (128, 512))
    monkeypatch.setitem(PASS_OVERHEAD, "cpu", 256)
    assert run.sizes.chunks(500, 1024) == (512,)
    assert run.sizes.chunks(500, 512, rows=2) == (128,) * 4
    assert run.sizes.chunks(500, 1024, rows=8) == (128,) * 4


def prompt(tokens):
    return np.random.default_rng(0).integers(4, 300, tokens).tolist()


@pytest.mark.parametrize("tokens", [39, 130, pytest.param(300, marks=pytest.mark.exhaustive)])
def test_no_more_programs_are_compiled_than_sizes(engine, tokens):
    """Neither model has more."""
    sampling = SamplingParams(max_new_tokens=4)
    run = engine.programs(sampling)
    row = EncodedPrompt("", prompt(tokens))
    engine.compile([row], sampling)
    sizes = set(run.sizes.chunks(tokens, run.sizes.capacities(tokens, 4)[0]))
    compiled: list[Any] = [run.compiled.prefill, run.compiled.prefill_draft]
    assert [step._cache_size() for step in compiled] == [len(sizes)] * 2
    list(engine.generate([row], sampling))
    engine.compile([row], sampling)
    assert [step._cache_size() for step in compiled] == [len(sizes)] * 2
    assert run.compiled.round._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize("rows", [1, 2])
def test_sizes_do_not_change_what_is_in_the_caches(engine, rows, monkeypatch):
    run = engine.programs(SamplingParams())
    prompts = [prompt(150), prompt(21)][:rows]

    def prefilled(sizes):
        monkeypatch.setitem(PREFILL_SIZES, "cpu", sizes)
        state = run.start(SamplingParams(), [9] * rows, 256)
        state, chunks = prefilling.prefill_all(run, state, prompts)
        return state, prefilling.first_tokens(chunks), len(chunks)

    (state, first, count), (other, second, fewer) = prefilled((16, 32)), prefilled((128,))
    assert (count, fewer) == (5, 2)
    np.testing.assert_array_equal(first.tokens[:, 0], second.tokens[:, 0])
    np.testing.assert_array_equal(first.num_tokens, [1] * rows)
    np.testing.assert_array_equal(state.length, [len(ids) for ids in prompts])
    for ours, theirs in zip(
        jax.tree.leaves((state.target, state.draft)),
        jax.tree.leaves((other.target, other.draft)),
        strict=True,
    ):
        # [..., batch * heads, capacity, head_dim]: what follows a row's length is scratch.
        for row, ids in enumerate(prompts):
            x, y = (np.split(np.asarray(leaf), rows, axis=-3)[row] for leaf in (ours, theirs))
            length = len(ids)
            np.testing.assert_allclose(x[..., :length, :], y[..., :length, :], atol=2e-4)


def test_only_long_prompts_show_a_bar(engine, terminal):
    from easyspec_jax.progress import bar

    run = engine.programs(SamplingParams())
    for tokens, shown in ((500, False), (600, True)):
        state = run.start(SamplingParams(), [9], 1024)
        prefilling.prefill_all(run, state, [prompt(tokens)], bar)
        assert ("Reading the prompt" in terminal.readouterr().err) == shown
