"""Whole generations on tiny models: texts are those of plain decoding, caches those of prefill."""

import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import chex
import jax
import numpy as np
import pytest
import torch

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.decode import compiled
from easyspec_jax.decode.lookup import Lookup
from easyspec_jax.decode.loop import Batch, decode
from easyspec_jax.decode.pace import Drafting
from easyspec_jax.decode.prefilling import first_tokens, prefill_all
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.decode.threshold import ThresholdChoice
from easyspec_jax.decode.tiers import RoundTimes, TierChoice
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.verify import Coupled, Greedy, Rejection
from tests.support.models import LAYERS, load_target, loader, save_model, some_refit

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(4, 300, size).tolist() for size in (148, 3, 60)]  # of two chunks, and less
LIMITS = [60, 90, 75]
GREEDY = RoundConfig(levels=4, calibration=True, verifier=Greedy(), stop_ids=())
PLAIN = replace(GREEDY, levels=0)
LOOKUP = replace(GREEDY, calibration=False, lookup=Lookup(longest=4, shortest=1))
JOINED = replace(LOOKUP, calibration=True)
ONE_DEVICE = MeshShape(1, 1)
MESHES = [pytest.param(ONE_DEVICE, marks=pytest.mark.exhaustive), MeshShape(2, 4)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target; a draft, which is a noisy copy of it; and the target in transformers."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    reference = save_model(target, "smollm2")
    noisy = save_model(draft, "smollm2")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    noisy.save_pretrained(draft)
    return open_checkpoint(target), open_checkpoint(draft), reference


@pytest.fixture(scope="module")
def plain(pair):
    """Greedy texts of transformers."""
    texts = []
    for prompt, limit in zip(PROMPTS, LIMITS, strict=True):
        ids = torch.tensor([prompt])
        generated = pair[2].generate(
            ids, max_new_tokens=limit, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        texts.append(generated[0, len(prompt) :].tolist())
    return texts


def programs(
    pair,
    config,
    mesh=ONE_DEVICE,
    axes=ALL_AXES,
    lp_size=3,
    own_draft=False,
    refit=False,
    kv_dtype="auto",
) -> Programs:
    target, draft, _ = pair
    from_ = replace(loader(target, mesh), kv_dtype=kv_dtype)
    if config.levels == 0 or (config.lookup and not config.calibration):
        return Programs(from_.mesh, load_target(from_), None, config)
    layout = Layout.uniform(paper_groups(LAYERS, lp_size), 2 if refit else 1)
    chosen = target if own_draft else draft
    refitted = some_refit(chosen, layout) if refit else None
    return Programs(
        from_.mesh,
        load_target(from_),
        load_draft(replace(loader(chosen, mesh, axes), kv_dtype=kv_dtype), layout, refitted),
        config,
    )


def texts(programs, prompts=PROMPTS, limits=LIMITS, sampling=SamplingParams()):  # noqa: B008
    """Decode; return each row's tokens, and how many levels were drafted and accepted in all."""
    rows: list[list[int]] = [[] for _ in prompts]
    drafted = accepted = 0
    for report in decode(programs, prompts, limits, sampling):
        for row, tokens in enumerate(rows):
            tokens += report.tokens[row, : report.num_tokens[row]].tolist()
        drafted, accepted = drafted + report.drafted.sum(), accepted + report.accepted.sum()
    return rows, int(drafted), int(accepted)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "levels, calibration, lp_size, refit",
    [
        (0, False, 1, False),
        pytest.param(4, False, 1, False, marks=pytest.mark.exhaustive),
        (4, True, 3, False),
        pytest.param(1, False, 3, False, marks=pytest.mark.exhaustive),
        pytest.param(4, True, 3, True, marks=pytest.mark.exhaustive),
    ],
)
def test_greedy_text_is_plain_decoding(pair, plain, mesh, levels, calibration, lp_size, refit):
    config = replace(GREEDY, levels=levels, calibration=calibration)
    assert texts(programs(pair, config, mesh, lp_size=lp_size, refit=refit))[0] == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, levels, width, nodes, calibration, refit",
    [
        (MeshShape(2, 4), 4, 3, 7, True, False),
        pytest.param(MeshShape(1, 1), 2, 5, None, False, False, marks=pytest.mark.exhaustive),
        pytest.param(MeshShape(1, 1), 16, 1, None, True, False, marks=pytest.mark.exhaustive),
        pytest.param(MeshShape(2, 4), 1, 12, None, True, False, marks=pytest.mark.exhaustive),
        pytest.param(MeshShape(2, 4), 4, 3, None, True, True, marks=pytest.mark.exhaustive),
        (MeshShape(1, 1), 3, 4, 6, False, True),
    ],
    ids=str,
)
def test_greedy_text_by_trees_is_plain_decoding(
    pair, plain, mesh, levels, width, nodes, calibration, refit
):
    config = replace(GREEDY, levels=levels, width=width, nodes=nodes, calibration=calibration)
    assert texts(programs(pair, config, mesh, refit=refit))[0] == plain


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "levels", [4, *(pytest.param(levels, marks=pytest.mark.exhaustive) for levels in (1, 16))]
)
def test_greedy_text_by_lookups_is_plain_decoding(pair, plain, mesh, levels):
    rows, drafted, accepted = texts(programs(pair, replace(LOOKUP, levels=levels), mesh))
    assert rows == plain
    assert drafted > accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, width, nodes, lp_size, axes",
    [
        pytest.param(MeshShape(1, 1), 1, None, 1, ALL_AXES, marks=pytest.mark.exhaustive),
        pytest.param(MeshShape(2, 4), 1, None, 3, ALL_AXES, marks=pytest.mark.exhaustive),
        (MeshShape(2, 2), 3, 7, 3, ()),
    ],
    ids=str,
)
def test_greedy_text_by_lookups_next_to_a_draft(pair, plain, mesh, width, nodes, lp_size, axes):
    run = programs(
        pair, replace(JOINED, width=width, nodes=nodes), mesh, axes=axes, lp_size=lp_size
    )
    assert texts(run)[0] == plain


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.slow
def test_greedy_text_with_a_replicated_draft(pair, plain, refit):
    assert (
        texts(programs(pair, replace(GREEDY, width=3), MeshShape(2, 2), axes=(), refit=refit))[0]
        == plain
    )


@pytest.mark.slow
def test_a_wider_tree_accepts_more(pair):
    def rate(width, nodes=None):
        _, drafted, accepted = texts(programs(pair, replace(GREEDY, width=width, nodes=nodes)))
        return accepted / drafted

    assert rate(1) < rate(4, nodes=8) < rate(4)


@pytest.mark.slow
def test_acceptance_falls_from_exact_to_fuzzy_and_without_calibration(pair):
    """With the target as its own draft, everything an exact draft proposes is accepted."""

    def rate(lp_size, calibration):
        _, drafted, accepted = texts(
            programs(
                pair, replace(GREEDY, calibration=calibration), lp_size=lp_size, own_draft=True
            )
        )
        return accepted / drafted

    assert rate(1, calibration=False) == rate(1, calibration=True) == 1.0
    assert 1.0 > rate(3, calibration=True) > rate(3, calibration=False) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("calibration", [True, False])
def test_drafting_that_ends_early_loses_no_cache_entry(pair, plain, calibration):
    """An exact draft of the target itself: all is accepted, unless keys or values are missing."""
    config = replace(GREEDY, calibration=calibration)
    run, early = (
        programs(pair, replace(config, confidence_threshold=least), lp_size=1, own_draft=True)
        for least in (0.0, 0.1)
    )
    rows, drafted, accepted = texts(early)
    assert rows == plain
    assert texts(run)[1] > drafted == accepted > 0


@pytest.mark.parametrize("rounds", [6, 40])
def test_a_draft_that_has_caught_up_goes_on_from_the_root(pair, rounds):
    """An exact draft of the target itself: all is accepted after any number of plain rounds.

    The draft takes in what 6 rounds add in one pass, and what 40 add in two.
    """
    run = programs(pair, replace(GREEDY, tiers=(0, 2)), own_draft=True, lp_size=1)
    state = run.start(SamplingParams(), [200] * 3, run.sizes.capacity(400))
    state, _ = prefill_all(run, state, PROMPTS)
    for levels in (4, *[0] * rounds, 4, 2):
        if levels == 4:
            state = run.catch_up(state)
        state, report = run.round(state, levels)
        assert report.accepted.tolist() == [levels] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, mesh, axes",
    [
        (replace(GREEDY, width=3, nodes=7), MeshShape(2, 4), ALL_AXES),
        (replace(JOINED, width=3), MeshShape(2, 2), ()),
    ],
    ids=str,
)
def test_greedy_text_is_plain_where_drafting_ends_early(pair, plain, config, mesh, axes):
    run = programs(pair, replace(config, confidence_threshold=0.05), mesh, axes=axes)
    assert texts(run)[0] == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, mesh, axes",
    [
        (GREEDY, ONE_DEVICE, ALL_AXES),
        (replace(GREEDY, width=3, nodes=7, tiers=(0, 2)), MeshShape(2, 4), ALL_AXES),
        (replace(JOINED, width=3), MeshShape(2, 2), ()),
    ],
    ids=str,
)
def test_greedy_text_is_plain_whatever_thresholds_are_learned(
    pair, plain, config, mesh, axes, monkeypatch
):
    """Thresholds, and tiers where there are some, change at random from round to round."""
    random = np.random.default_rng(0)
    given: list[float] = []

    def next_threshold(_):
        given.append(float(random.choice([0.0, 0.01, 0.05, 1.0])))
        return given[-1]

    monkeypatch.setattr(ThresholdChoice, "next", next_threshold)
    monkeypatch.setattr(
        TierChoice, "next", lambda self, unread: int(random.choice((*self.tiers, self.tiers[-1])))
    )
    run = programs(pair, replace(config, learns_threshold=True), mesh, axes=axes)
    rows: list[list[int]] = [[] for _ in PROMPTS]
    seen, live = [], np.ones(len(PROMPTS), bool)
    for report in decode(run, PROMPTS, LIMITS, SamplingParams()):
        for row, tokens in enumerate(rows):
            tokens += report.tokens[row, : report.num_tokens[row]].tolist()
        if report.confidence is not None:
            seen.append(np.asarray(report.confidence)[live])
        live = ~np.asarray(report.done)
    assert rows == plain
    # Reports come in the order of the rounds that drafted.
    assert len(given) >= len(seen) > 10
    for threshold, confidence in zip(given, seen, strict=False):
        for own in confidence:
            count = int((own > 0).sum())
            assert np.all(own[: max(0, count - 1)] >= threshold)
            assert count in (0, len(own)) or own[count - 1] < threshold


@pytest.mark.slow
def test_a_batch_that_is_refilled_keeps_what_it_has_learned(pair, plain):
    """Texts enter rows that others have left; what is learned outlives a batch."""
    run = programs(pair, replace(GREEDY, learns_threshold=True))
    assert texts(run)[0] == plain
    choice = run.threshold_choice(len(PROMPTS))
    assert choice is not None
    learned = choice._rounds
    assert learned > 0
    batch = Batch.empty(run, 2, capacity=512)
    batch.enter(0, PROMPTS[1], LIMITS[1], SamplingParams())
    text, entered = [], False
    while len(text) < LIMITS[1]:
        for read in batch.step():
            if 0 in read.rows[read.current]:
                at = read.rows.tolist().index(0)
                text += read.report.tokens[at, : read.report.num_tokens[at]].tolist()
        if not entered:
            batch.enter(1, PROMPTS[2], 10, SamplingParams())
            entered = True
    batch.close()
    assert text == plain[1]
    assert run.threshold_choice(len(PROMPTS)) is choice


def test_a_text_that_leaves_is_not_gone_on_with(pair, plain):
    """No report about it counts any more, so nothing is drafted for it."""
    run = programs(pair, replace(GREEDY, confidence_threshold=0.05))
    batch = Batch.empty(run, 2, capacity=512)
    for row in range(2):
        batch.enter(row, PROMPTS[1], LIMITS[1], SamplingParams())
    text, drafted = [], []
    while len(text) < LIMITS[1]:
        for read in batch.step():
            drafted += read.report.drafted[read.rows == 0].tolist()
            if 1 in read.rows[read.current]:
                at = read.rows.tolist().index(1)
                text += read.report.tokens[at, : read.report.num_tokens[at]].tolist()
        if len(drafted) == 2:
            batch.leave(0)
            assert batch._state.remaining.tolist()[0] == 0
    batch.close()
    assert text == plain[1]
    # One round was on its way when the text left.
    assert len(drafted) > 4 and not any(drafted[3:])


@pytest.mark.parametrize("calibration, refit", [(True, False), (False, False), (True, True)])
def test_a_stop_token_ends_its_row_alone(pair, plain, calibration, refit):
    """With a token of one text as stop token, each row ends right after its first occurrence."""
    stop = plain[1][30]
    config = replace(GREEDY, stop_ids=(stop, 299), calibration=calibration)
    ended = [text[: text.index(stop) + 1] if stop in text else text for text in plain]
    assert len(ended[1]) < len(plain[1])
    assert texts(programs(pair, config, refit=refit))[0] == ended


@pytest.mark.parametrize("limit", [1, 2, 5, 6])
def test_limits_are_kept_to_the_token(pair, plain, limit):
    rows, drafted, accepted = texts(
        programs(pair, GREEDY, own_draft=True, lp_size=1), limits=[limit] * 3
    )
    assert rows == [text[:limit] for text in plain]
    assert drafted == accepted


def test_limits_are_kept_to_the_token_with_a_refit(pair, plain):
    limits = [1, 2, 6]
    rows, _, _ = texts(programs(pair, GREEDY, refit=True), limits=limits)
    assert rows == [text[:limit] for text, limit in zip(plain, limits, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, verifier, width, nodes, lp_size, refit, kv_dtype, lookup",
    [
        (MeshShape(1, 1), Rejection(), 1, None, 3, False, "auto", None),
        pytest.param(
            MeshShape(4, 2), Greedy(), 1, None, 3, False, "auto", None, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            MeshShape(1, 1), Rejection(), 4, 6, 1, False, "auto", None, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            MeshShape(4, 2),
            Rejection(),
            4,
            None,
            3,
            True,
            "auto",
            None,
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            MeshShape(1, 1), Coupled(), 4, 9, 3, True, "auto", None, marks=pytest.mark.exhaustive
        ),
        (MeshShape(1, 1), Coupled(), 4, 9, 3, True, "int8", None),
        (MeshShape(1, 1), Rejection(), 1, None, 3, False, "auto", Lookup(2, 1)),
        pytest.param(
            MeshShape(4, 2),
            Coupled(),
            4,
            9,
            1,
            False,
            "auto",
            Lookup(2, 1),
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=str,
)
def test_after_many_rounds_caches_equal_a_fresh_prefill(
    pair, mesh, verifier, width, nodes, lp_size, refit, kv_dtype, lookup
):
    """Run 30 rounds and more with mixed acceptance; one row finishes early and stays.

    Caches of fuzzy drafts are calibrated, and where texts are looked up; others are not.
    """
    calibration = lp_size > 1 or lookup is not None
    config = RoundConfig(4, calibration, verifier, (), width, nodes, lookup=lookup)
    run = programs(pair, config, mesh, lp_size=lp_size, refit=refit, kv_dtype=kv_dtype)
    sampling, limits = SamplingParams(temperature=0.8), [60, 9, 150]
    state = run.start(sampling, limits, capacity := run.sizes.capacity(128 + 150))
    state, chunks = prefill_all(run, state, PROMPTS)
    report = first_tokens(chunks)
    rows = [list(prompt) for prompt in PROMPTS]
    rounds, accepted = 0, set()
    while True:
        for row, tokens in enumerate(rows):
            tokens += np.asarray(report.tokens)[row, : report.num_tokens[row]].tolist()
        if np.asarray(report.done).all():
            break
        state, report = run.round(state)
        rounds, accepted = rounds + 1, accepted | set(np.asarray(report.accepted).tolist())
    state, _ = run.round(state)  # a surplus round must change nothing
    assert rounds >= 30
    assert len(accepted) > 2
    assert np.asarray(state.length).tolist() == [len(row) - 1 for row in rows]

    fresh, _ = prefill_all(run, run.start(sampling, limits, capacity), rows)
    for caches, expected, lengths in (
        (state.target, fresh.target, state.length),
        (state.draft, fresh.draft, state.draft_length),
    ):
        for leaf, reference in zip(jax.tree.leaves(caches), jax.tree.leaves(expected), strict=True):
            for shards in zip(leaf.addressable_shards, reference.addressable_shards, strict=True):
                parts = [np.asarray(shard.data) for shard in shards]
                parts = [x.reshape(*x.shape[:-3], len(rows), -1, *x.shape[-2:]) for x in parts]
                for row, length in enumerate(np.asarray(lengths)):
                    assert_same_entries(*(x[..., row, :, :length, :] for x in parts))


def assert_same_entries(found, expected):
    """Compare entries; a few integers may differ by one step.

    Passes sum in different orders, so a number between two integers may be rounded either way. What
    deeper layers make of it then differs a little too.
    """
    if found.dtype != np.int8:
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    else:
        steps = np.abs(found.astype(np.int32) - expected)
        assert steps.max() <= 1
        assert steps.mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "width, refit",
    [(1, False), pytest.param(1, True, marks=pytest.mark.exhaustive), (3, True)],
)
def test_coupled_text_is_plain_sampling_with_the_same_noise(pair, mesh, width, refit):
    sampling = SamplingParams(temperature=0.9, seed=3)
    config = replace(GREEDY, verifier=Coupled(), width=width)
    plain = texts(programs(pair, replace(PLAIN, verifier=Coupled())), sampling=sampling)[0]
    assert texts(programs(pair, config, mesh, refit=refit), sampling=sampling)[0] == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "temperature, refit",
    [
        pytest.param(0.0, False, marks=pytest.mark.exhaustive),
        pytest.param(0.9, False, marks=pytest.mark.exhaustive),
        (0.9, True),
    ],
)
def test_a_row_does_not_depend_on_its_neighbours(pair, temperature, refit):
    """Alone, with the seed that it had in the batch, each row becomes the same text."""
    run = programs(
        pair, replace(GREEDY, verifier=Rejection() if temperature else Greedy()), refit=refit
    )
    sampling = SamplingParams(temperature=temperature, seed=7)
    together = texts(run, sampling=sampling)[0]
    for row in range(3):
        alone = texts(run, [PROMPTS[row]], [LIMITS[row]], replace(sampling, seed=7 + row))[0]
        assert alone == [together[row]]


@pytest.mark.slow
@pytest.mark.parametrize("refit", [False, True])
def test_sampled_text_depends_on_the_seed_alone(pair, refit):
    run = programs(pair, replace(GREEDY, verifier=Rejection()), MeshShape(2, 2), refit=refit)
    first, again, other = (
        texts(run, sampling=SamplingParams(temperature=1.0, seed=seed))[0] for seed in (1, 1, 9)
    )
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
def test_one_program_whose_state_is_donated(pair, x64, monkeypatch):
    """Each step compiles once, and its old state is deleted.

    x64: a process may have made 64 bits JAX's default; if that changed the types of the state, the
    round would compile a second time.
    """
    chex.clear_trace_counter()
    monkeypatch.setattr(
        compiled, "speculative_round", chex.assert_max_traces(compiled.speculative_round, n=1)
    )
    with jax.enable_x64(x64):
        check_one_program(pair, replace(GREEDY, width=2 if x64 else 1))


def check_one_program(pair, config):
    run = programs(pair, config, MeshShape(4, 2))
    state, _ = prefill_all(run, run.start(SamplingParams(), [200, 150, 100], 512), PROMPTS)
    accepted = set()
    for _ in range(50):
        before = jax.tree.leaves((state.target, state.draft))
        state, report = run.round(state)
        assert all(leaf.is_deleted() for leaf in before)
        accepted |= set(np.asarray(report.accepted).tolist())
    assert len(accepted) > 2
    # A batch whose longest prompt has 148 tokens is prefilled in chunks of 128 and 32.
    steps: Any = run.compiled
    times = {steps.start: 1, steps.prefill: 2, steps.prefill_draft: 2, steps.round: 1}
    assert [step._cache_size() for step in times] == list(times.values())


@pytest.mark.parametrize("refills", [False, True])
def test_a_first_token_does_not_wait_for_the_draft(pair, refills):
    """The target reads all chunks of a prompt before the draft reads any."""
    run, read = programs(pair, GREEDY), []

    def spied(step, own):
        def call(*args):
            read.append(own)
            return step(*args)

        return call

    names = ("enter", "enter_draft") if refills else ("prefill", "prefill_draft")
    for name, own in zip(names, ("target", "draft"), strict=True):
        vars(run.compiled)[name] = spied(getattr(run.compiled, name), own)
    if refills:
        batch = Batch.empty(run, 2, capacity=512)
        batch.enter(1, PROMPTS[0], LIMITS[0], SamplingParams())
    else:
        batch = Batch.filled(run, PROMPTS, LIMITS, SamplingParams())
    assert read == ["target", "target"]
    list(batch.step())
    batch.close()
    assert read == ["target", "target", "draft", "draft"]


@pytest.mark.parametrize("refills", [False, True])
def test_the_draft_reads_a_prompt_before_the_first_round_that_drafts(pair, refills, monkeypatch):
    """Whatever rounds without it have added by then, its caches are those of a prefill."""
    run, read, chosen = programs(pair, replace(GREEDY, tiers=(0,))), [], [0] * 3 + [4]
    monkeypatch.setattr(TierChoice, "next", lambda choice, unread: chosen[0])
    step = run.compiled.enter_draft if refills else run.compiled.prefill_draft
    name = "enter_draft" if refills else "prefill_draft"
    vars(run.compiled)[name] = lambda *args: read.append(None) or step(*args)
    if refills:
        batch = Batch.empty(run, 2, capacity=512)
        for row in range(2):
            batch.enter(row, PROMPTS[row + 1], 50, SamplingParams())
    else:
        batch = Batch.filled(run, PROMPTS[1:], [50, 50], SamplingParams())
    while len(chosen) > 1:
        list(batch.step())
        assert not read
        chosen.pop(0)
    for _ in range(3):
        list(batch.step())
    assert len(read) == (2 if refills else 1)
    jax.block_until_ready(state := batch._state)
    lengths = np.asarray(state.draft_length)
    assert (lengths >= [6, 63]).all()
    rows = [row[: n + 1].tolist() for row, n in zip(np.asarray(state.text), lengths, strict=True)]
    fresh, _ = prefill_all(run, run.start(SamplingParams(), [9] * 2, state.capacity), rows)
    for found, wanted in zip(
        jax.tree.leaves(state.draft), jax.tree.leaves(fresh.draft), strict=True
    ):
        x, y = (np.asarray(z).reshape(*z.shape[:-3], 2, -1, *z.shape[-2:]) for z in (found, wanted))
        for row, length in enumerate(lengths):
            assert_same_entries(x[..., row, :, :length, :], y[..., row, :, :length, :])
    batch.close()


def test_the_draft_does_not_read_prompts_of_texts_that_have_left(pair, monkeypatch):
    run, read, levels = programs(pair, replace(GREEDY, tiers=(0,))), [], [0]
    monkeypatch.setattr(TierChoice, "next", lambda choice, unread: levels[0])
    step = run.compiled.enter_draft
    vars(run.compiled)["enter_draft"] = lambda *args: read.append(args[2]) or step(*args)
    batch = Batch.empty(run, 2, capacity=512)
    for row in range(2):
        batch.enter(row, PROMPTS[1], 20, SamplingParams())
    list(batch.step())
    batch.leave(0)
    levels[0] = 4
    list(batch.step())
    batch.close()
    assert [int(row) for row in read] == [1]


@pytest.mark.parametrize(
    ("config", "shortens"), [(LOOKUP, False), (JOINED, True), (JOINED, False)], ids=str
)
def test_where_nothing_repeats_lookups_lengthen_no_pass(pair, config, shortens):
    """The target's caches show which nodes a pass was over; a finished row counts for nothing."""
    settings = PlatformSettings(shortens_passes=shortens)
    run = replace(programs(pair, config), settings=settings)
    always = run.config.grafts and not shortens
    fresh, repeating = list(range(4, 24)), list(range(300))  # has every token that may come next
    few = 5 if run.config.grafts else 1
    for prompts, limits, repeats in (
        ([fresh, fresh], [9, 9], False),
        ([fresh, repeating], [9, 9], True),
        ([fresh, repeating], [9, 0], False),
    ):
        state = run.start(SamplingParams(), limits, capacity := 512)
        state, _ = prefill_all(run, state, prompts)
        before = [np.asarray(x) for x in jax.tree.leaves(state.target)]
        state, _ = run.round(state)
        written = np.zeros(capacity, bool)
        for old, new in zip(before, jax.tree.leaves(state.target), strict=True):
            changed = (old != np.asarray(new)).any(axis=-1)
            rows = changed.reshape(*changed.shape[:-2], 2, -1, capacity)
            written |= rows[..., 0, :, :].reshape(-1, capacity).any(axis=0)
        assert written[20 : 20 + few].all()
        assert written[20 + few : 21 + run.config.verified].all() == (repeats or always)
        assert written[20 + few :].any() == (repeats or always)


@pytest.mark.parametrize("rows", [1, 2])
def test_where_lookups_join_a_draft_rounds_without_it_come_first(pair, rows):
    """Unless a text of the batch has been drafted for, or the draft has nothing to read."""
    run, read = programs(pair, replace(JOINED, tiers=(0,))), []
    step = run.compiled.enter_draft
    vars(run.compiled)["enter_draft"] = lambda *args: read.append(args[2]) or step(*args)
    times = run.tier_choice(rows).times
    for levels in (4, 0):
        for _ in range(3):
            times.add(levels, 1.0)
    times.add_reading(1, 1000.0)
    batch = Batch.empty(run, rows, capacity=512)
    for row in range(rows):
        batch.enter(row, PROMPTS[2], 20, SamplingParams())
        list(batch.step())
    assert not read and batch._pace.levels == 0
    times._reading.clear()
    list(batch.step())
    assert len(read) == rows and batch._pace.levels == 4
    times.add_reading(1, 1000.0)
    if rows == 2:
        batch.leave(1)
        batch.enter(1, PROMPTS[2], 20, SamplingParams())
        list(batch.step())
        assert len(read) == 3
    batch.close()


def test_batches_of_one_pair_share_what_their_texts_accept(pair):
    run = programs(pair, replace(GREEDY, tiers=(0,)))
    before = run.tier_choice(1)
    before.enter(0)
    before.read(4, np.zeros(1, int), np.ones(1, bool), np.zeros(1, bool))
    after, fresh = run.tier_choice(2), programs(pair, run.config).tier_choice(2)
    for choice in (after, fresh):
        choice.enter(0)
    known, unknown = (choice._acceptance.expected()[0, 4] for choice in (after, fresh))
    assert known < unknown


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("refills", [False, True])
def test_rounds_are_timed_without_the_draft_reading_a_prompt(pair, refills, is_early, monkeypatch):
    """The first token is out before that, and read_at says when it was done.

    What was done before anybody waited for it tells no times: neither its own nor the next round's.
    """
    timed, waited, reading, run = [], [], [], programs(pair, GREEDY)
    list(decode(run, PROMPTS[1:2], [20], SamplingParams()))  # compiles
    plain = jax.block_until_ready

    def slow(array):
        if reports:
            waited.append(time.perf_counter())
            time.sleep(1)
        return plain(array)

    def drafting(rows, texts, tokens, done):
        late: Any = SimpleNamespace(is_ready=lambda: is_early)
        return Drafting(rows, texts, tokens, late)

    monkeypatch.setattr("easyspec_jax.decode.loop.Drafting", drafting)
    monkeypatch.setattr(RoundTimes, "add", lambda *args, **_: timed.append(args[2]))
    monkeypatch.setattr(RoundTimes, "add_reading", lambda self, *args: reading.append(args))
    if refills:
        batch = Batch.empty(run, 1, capacity=256)
        batch.enter(0, PROMPTS[1], 20, SamplingParams())
    else:
        batch = Batch.filled(run, PROMPTS[1:2], [20], SamplingParams())
    reports: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(jax, "block_until_ready", slow)
        while len(reports) < 3:
            reports += list(batch.step())
    batch.close()
    assert len(waited) == 1
    assert batch.read_at[0] >= waited[0] + 1
    assert len(timed) == (1 if is_early else 2) and max(timed) < 1
    if is_early:
        assert not reading
        return
    ((tokens, seconds),) = reading
    assert tokens >= len(PROMPTS[1]) and seconds >= 1


@pytest.mark.parametrize(
    "config", [PLAIN, GREEDY, replace(GREEDY, width=3, calibration=False), LOOKUP, JOINED], ids=str
)
def test_no_round_of_one_stream_copies_a_cache(pair, config):
    """Entries are written into the donated buffers, so a step does not copy the text."""
    run = programs(pair, config)
    state = run.start(SamplingParams(), [9], capacity := 256)
    text = run.compiled.round.lower(run.leaves, state).compile().as_text()  # pyright: ignore[reportFunctionMemberAccess]
    head_dim = pair[0].config.head_dim
    assert f",{capacity},{head_dim}]" in text
    assert re.findall(rf"= (f32\[[\d,]*,{capacity},{head_dim}\])\S* copy\(", text) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "levels, width, refit",
    [
        pytest.param(0, 1, False, marks=pytest.mark.exhaustive),
        pytest.param(4, 1, False, marks=pytest.mark.exhaustive),
        pytest.param(3, 3, False, marks=pytest.mark.exhaustive),
        (3, 3, True),
    ],
)
def test_caches_that_grow_change_no_token(pair, levels, width, refit, monkeypatch):
    """Caches that grow several times give the texts of caches that are large from the start."""
    config = replace(GREEDY, levels=levels, width=width, verifier=Rejection())
    sampling, limits = SamplingParams(temperature=0.8, seed=5), [150, 300, 200]
    run = programs(pair, config, refit=refit)
    expected = texts(run, limits=limits, sampling=sampling)[0]
    monkeypatch.setattr("easyspec_jax.decode.sizes.AHEAD", 1)
    grown = programs(pair, config, refit=refit)
    assert texts(grown, limits=limits, sampling=sampling)[0] == expected
    assert grown.compiled.extend._cache_size() >= 1  # pyright: ignore[reportFunctionMemberAccess]


def test_no_cache_is_larger_than_the_longest_text_needs(pair):
    run = programs(pair, GREEDY)
    assert run.sizes.capacity(1000) == 1024 == replace(run, max_length=1024).sizes.capacity(600)
    assert replace(run, max_length=1024).sizes.capacity(1024) == 1152
    assert run.sizes.capacities(100, 1000) == (512, 1024, 2048)
    assert replace(run, max_length=1100).sizes.capacities(100, 1000) == (512, 1024, 1152)


class Clock:
    """Stands in for the module `time`: rounds take 1, 2, 3, … seconds, everything else none."""

    def __init__(self) -> None:
        self.now, self.rounds = 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def run(self, round):
        def timed(*args):
            self.rounds += 1
            self.now += self.rounds
            return round(*args)

        return timed


def test_where_calls_wait_a_round_has_its_own_time(pair, monkeypatch):
    """The report that is read after a call is that of the round before it."""
    run, clock, timed = programs(pair, GREEDY), Clock(), []
    monkeypatch.setattr("easyspec_jax.decode.loop.time", clock)
    monkeypatch.setattr("easyspec_jax.decode.pace.time", clock)
    monkeypatch.setattr("easyspec_jax.parallel.hosts.calls_wait", lambda platform: True)
    monkeypatch.setattr(Programs, "round", clock.run(Programs.round))
    monkeypatch.setattr(RoundTimes, "add", lambda self, levels, took, **kind: timed.append(took))
    texts(run)
    assert timed == list(range(1, len(timed) + 1))
    assert len(timed) > 5
