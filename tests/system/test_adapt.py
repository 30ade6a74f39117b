"""Texts do not depend on how many levels a round drafts, whatever the order of such rounds."""

import json
import random
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode import compiled, programs, sizes
from easyspec_jax.decode.prefilling import prefill_all
from easyspec_jax.decode.state import State
from easyspec_jax.decode.tiers import TierChoice
from easyspec_jax.engine.engine import Engine
from easyspec_jax.generate import main
from tests.support.models import save_noisy_pair

PROMPTS = ["one two three one two", "x", "def add(a, b): return a + b", "to be or not to be"]
"""The last two take over rows of a batch of two."""

GREEDY = SamplingParams(max_new_tokens=60)
SAMPLED = SamplingParams(max_new_tokens=60, temperature=0.7, seed=3)
SAMPLINGS = {"greedy": GREEDY, "coupled": SAMPLED}
LOOKING_UP = {"prompt_lookup": True, "prompt_lookup_min": 1}
STRETCH = 12
"""Most rounds of one tier. Plain ones then leave the draft more behind than a round takes in."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    save_noisy_pair(target, draft, "smollm2", num_hidden_layers=3)
    return target, draft


def opened(pair: Any, mesh: str = "1", **options: Any) -> Engine:
    options = {"lp_size": 2, "adapt": True} | options
    memory = {"prefix_cache": options.pop("prefix_cache", 0)}
    method = options.get("method", "easyspec")
    draft = None if method in ("vanilla", "ngram") else pair[1]
    speculative = SpeculativeConfig(**options)
    return open_model(
        pair[0],
        draft,
        mesh=mesh,
        platform="cpu",
        speculative=speculative,
        dtype="float32",
        **memory,
    )


def refilled(engine: Engine, sampling: SamplingParams, rows: int = 2) -> list[list[int]]:
    """Complete all prompts in a batch whose rows are refilled."""
    waiting = [engine.row(prompt, sampling) for prompt in PROMPTS]
    completions = dict(engine.complete_each(waiting, rows))
    return [completions[number].token_ids for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def plain(pair):
    engine = opened(pair, method="vanilla", adapt=False, verifier="coupled")
    return {name: refilled(engine, sampling) for name, sampling in SAMPLINGS.items()}


@pytest.fixture
def forced(monkeypatch):
    """Take tiers at random, in stretches; return the list of what is taken."""
    drawn, taken, left = random.Random(1), [], [0]

    def draw(choice: TierChoice, unread: int) -> int:
        if not left[0]:
            choice._now, left[0] = drawn.choice(choice.tiers), drawn.randint(1, STRETCH)
        left[0] -= 1
        taken.append(choice._now)
        return choice._now

    monkeypatch.setattr(TierChoice, "next", draw)
    return taken


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "mesh, sampling, options",
    [
        ("2", "coupled", {}),
        ("layer=2,tensor=2", "greedy", {"tree_width": 3, "tree_nodes": 9}),
        ("1", "coupled", {"tree_width": 3, "calibration": False}),
        ("1", "greedy", {"method": "sd"}),
        ("1", "greedy", LOOKING_UP),
        ("2", "coupled", LOOKING_UP | {"tree_width": 3}),
        ("2", "coupled", {"method": "ngram", "prompt_lookup_min": 1}),
    ],
    ids=str,
)
def test_tiers_change_no_token(pair, plain, forced, mesh, sampling, options):
    """Rows are refilled, so that one may catch up while its neighbor begins."""
    assert refilled(opened(pair, mesh, **options), SAMPLINGS[sampling]) == plain[sampling]
    assert set(forced) == {0, 2, 5}


@pytest.mark.exhaustive
def test_caches_that_grow_keep_what_tiers_have_left(pair, plain, forced, monkeypatch):
    monkeypatch.setattr(sizes, "AHEAD", 1)
    monkeypatch.setattr(sizes, "CAPACITY_UNIT", 32)
    engine = opened(pair)
    assert refilled(engine, GREEDY) == plain["greedy"]
    assert engine.programs(GREEDY).compiled.extend._cache_size() >= 1  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.exhaustive
def test_bit_stable_texts_stay_those_of_plain_decoding(pair, forced):
    speculative = SpeculativeConfig(lp_size=2, adapt=True, bit_stable=True)
    engine = open_model(*pair, mesh="1", platform="cpu", speculative=speculative, dtype="bfloat16")
    plain = [c.token_ids for c in engine.baseline().generate(PROMPTS, SAMPLED, batch_size=4)]
    found = engine.generate(PROMPTS, SAMPLED, batch_size=4)
    assert [c.token_ids for c in found] == plain
    assert set(forced) == {0, 2, 5}


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{}, {"method": "tree"}, LOOKING_UP], ids=str)
def test_after_any_tiers_caches_equal_a_fresh_prefill(pair, options):
    assert max(differences(opened(pair, **options))) < 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{}, LOOKING_UP], ids=str)
def test_a_draft_that_does_not_catch_up_would_be_found(pair, monkeypatch, options):
    """A planted fault: rounds without the draft count as if it had run."""

    def stale(target: Any, draft: Any, state: State, finished: Any, config: Any) -> State:
        return replace(state, draft_length=jnp.where(state.remaining > 0, state.length, 0))

    monkeypatch.setattr(compiled, "catch_up", stale)
    of_target, of_draft = differences(opened(pair, **options))
    assert of_target < 1e-4 < of_draft


def test_a_plain_round_is_not_given_the_draft(pair):
    run = opened(pair).programs(GREEDY)
    ids = [[5, 6, 7]]
    state, _ = prefill_all(run, run.start(GREEDY, [9], 128, ids), ids)
    after, report = run.round(state, levels=0)
    assert int(report.num_tokens[0]) == 1
    # The very arrays, although rounds donate what they are given.
    before = jax.tree.leaves(state.draft)
    assert all(a is b for a, b in zip(jax.tree.leaves(after.draft), before, strict=True))
    assert state.length.is_deleted() and not any(cache.is_deleted() for cache in before)


def differences(engine: Engine) -> tuple[float, float]:
    """Run rounds of all tiers; return how far each model's caches are from a fresh prefill's."""
    run, drawn = engine.programs(GREEDY), random.Random(2)
    ids = [engine.encode(prompt) for prompt in PROMPTS]
    state, _ = prefill_all(run, run.start(GREEDY, [400] * 4, capacity := 512, ids), ids)
    before, taken = 5, set()
    while int(state.remaining.min()) > 12:  # so all rows go on
        levels = drawn.choice((0, 0, 2, 5))
        for _ in range(drawn.randint(1, STRETCH) if levels == 0 else 1):
            if int(state.remaining.min()) <= 12:
                break
            if before == 0 < levels:
                state = run.catch_up(state)
            state, _ = run.round(state, levels)
            before = levels
        taken.add(levels)
    assert taken == {0, 2, 5}
    state = run.catch_up(state)
    lengths = np.asarray(state.length)
    assert (np.asarray(state.draft_length) + run.config.pending_size > lengths).all()
    texts = [row[: n + 1].tolist() for row, n in zip(np.asarray(state.text), lengths, strict=True)]
    fresh, _ = prefill_all(run, run.start(GREEDY, [400] * 4, capacity, texts), texts)
    found = []
    for caches, expected, counts in (
        (state.target, fresh.target, state.length),
        (state.draft, fresh.draft, state.draft_length),
    ):
        worst = 0.0
        for x, y in zip(jax.tree.leaves(caches), jax.tree.leaves(expected), strict=True):
            x, y = (z.reshape(*z.shape[:-3], 4, -1, *z.shape[-2:]) for z in map(np.asarray, (x, y)))
            for row, count in enumerate(np.asarray(counts)):
                both = x[..., row, :, :count, :], y[..., row, :, :count, :]
                worst = max(worst, float(np.abs(both[0] - both[1]).max()))
        found.append(worst)
    return found[0], found[1]


def test_lookups_alone_add_what_repeats_and_leave_the_draft_alone(pair):
    run: Any = opened(pair, **LOOKING_UP).programs(GREEDY)
    ids = [[5, 6, 7] * 20]
    state, _ = prefill_all(run, run.start(GREEDY, [200], 512, ids), ids)
    drafted, reports = int(state.draft_length[0]), []
    for _ in range(12):
        state, report = run.round(state, levels=0)
        assert int(report.repeated[0]) == int(report.accepted[0])
        reports.append(report)
    assert int(state.draft_length[0]) == drafted
    assert {int(report.levels) for report in reports} == {0}
    assert max(int(report.accepted[0]) for report in reports) == 5
    # With the draft, reports say what the lookups would have added without it.
    state = run.catch_up(state)
    _, alone = run.round(jax.tree.map(jnp.copy, state), levels=0)
    _, beside = run.round(state)
    assert int(beside.repeated[0]) == int(alone.repeated[0]) > 0


@pytest.mark.exhaustive
def test_kept_prefixes_hold_what_the_draft_has(pair, forced):
    """A second turn begins with what the first has left, whichever rounds wrote it."""
    texts = []
    for prefix_cache in (0, 1 << 26):
        engine = opened(pair, prefix_cache=prefix_cache)
        prompt, answers = PROMPTS[2], []
        for _ in range(2):
            (completion,) = engine.generate([prompt], GREEDY)
            prompt, answers = prompt + completion.text + " and", [*answers, completion]
        texts.append([completion.token_ids for completion in answers])
        drafts = sum(completion.stats.accepted for completion in answers)
        assert drafts > 0
        assert (answers[-1].stats.cached_tokens > 0) == (prefix_cache > 0)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("options", [{}, LOOKING_UP], ids=str)
def test_what_rounds_without_the_draft_write_is_kept_for_both_models(
    pair, monkeypatch, options, grows
):
    """The draft catches up first, whether its row is finished or another text goes on."""
    monkeypatch.setattr(TierChoice, "next", lambda choice, unread: 0)
    if grows:
        monkeypatch.setattr(sizes, "AHEAD", 1)
        monkeypatch.setattr(sizes, "CAPACITY_UNIT", 32)
    engine = opened(pair, prefix_cache=1 << 26, **options)
    run: Any = engine.programs(GREEDY)
    waiting = [engine.row(prompt, GREEDY) for prompt in PROMPTS]
    completions = dict(engine.complete_each(waiting, 2))
    store: Any = engine.prefixes
    for number, prompt in enumerate(PROMPTS):
        text = [*engine.encode(prompt), *completions[number].token_ids]
        found, prefix = store.find(text)
        assert found >= len(text) - run.config.pending_size
        fresh, _ = prefill_all(run, run.start(GREEDY, [1], 256, [text]), [text])
        wanted = run.copy_row(fresh, 0, prefix.size)
        for own, other in zip(jax.tree.leaves(prefix.caches), jax.tree.leaves(wanted), strict=True):
            if own.ndim > 2:  # [..., entries, head_dim]; the other one has the ids
                np.testing.assert_allclose(own[..., :found, :], other[..., :found, :], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("1", {"adapt": False}),
        ("layer=2,tensor=4", {"tree_width": 3}),
        ("2", {"prompt_lookup": True}),
    ],
    ids=str,
)
def test_a_learned_threshold_changes_no_text(pair, plain, name, mesh, options):
    """With tiers or without; clocks decide where drafts end, so two runs may differ there."""
    wide = {"num_speculative_tokens": 9, "confidence_threshold": "auto"}
    engine = opened(pair, mesh, **wide, **options)
    assert refilled(engine, SAMPLINGS[name]) == plain[name]


@pytest.mark.exhaustive
def test_each_tier_is_counted(pair, capsys):
    words = ["--target", str(pair[0]), "--draft", str(pair[1]), "--prompt", PROMPTS[0]]
    words += ["--max-new-tokens", "60", "--lp-size", "2", "--adapt", "on"]
    assert main([*words, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    tiers = stats["tiers"]
    assert [tier["num_speculative_tokens"] for tier in tiers] == [0, 2, 5]
    for name in ("rounds", "drafted", "accepted"):
        assert sum(tier[name] for tier in tiers) == stats[name]
    # Each is timed at first.
    assert min(tier["rounds"] for tier in tiers) > 0 == tiers[0]["accepted"]
    assert main(words) == 0
    assert " rounds of 0/2/5 levels" in capsys.readouterr().err


def test_one_tier_alone_is_not_counted(pair):
    (completion,) = opened(pair, adapt=False).generate(PROMPTS[:1], GREEDY)
    assert completion.stats.tiers == ()


def test_a_batch_runs_the_tier_that_is_chosen(pair, monkeypatch):
    """The draft catches up before it drafts again, and only then."""
    asked, order = iter([5, 0, 0, 2, 0, 5]), []
    monkeypatch.setattr(TierChoice, "next", lambda choice, unread: next(asked, 0))
    real = programs.Programs.catch_up
    monkeypatch.setattr(
        programs.Programs,
        "catch_up",
        lambda run, state: order.append("catch up") or real(run, state),
    )
    monkeypatch.setattr(TierChoice, "read", lambda choice, levels, *rest: order.append(levels))
    engine = opened(pair)
    list(engine.generate(PROMPTS[:1], replace(GREEDY, max_new_tokens=30)))
    assert [step for step in order if step != "catch up"][:6] == [5, 0, 0, 2, 0, 5]
    assert order.count("catch up") == 2
