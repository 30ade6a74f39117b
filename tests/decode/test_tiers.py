"""The tier that is chosen is near the best one, in simulated texts whose best tier is known."""

from dataclasses import replace

import numpy as np
import pytest

from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.decode.tiers import SAMPLES, Acceptance, RoundTimes, TierChoice, no_common
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.verify import Coupled, Greedy, Rejection

TIERS = (0, 2, 5)
COSTS = {
    "cheap": {0: 1.0, 2: 1.15, 5: 1.4},
    "usual": {0: 1.0, 2: 1.4, 5: 1.9},
    "dear": {0: 1.0, 2: 1.8, 5: 3.0},
}
"""Times of a round by its levels."""

CATCHING_UP = 0.15
"""Time of what follows plain rounds before a draft can go on."""


def tokens_of(levels: int, acceptance: float) -> float:
    """Expected tokens of a round."""
    return sum(acceptance**depth for depth in range(levels + 1))


def measured(costs: dict[int, float]) -> RoundTimes:
    times = RoundTimes(TIERS)
    for levels in costs:
        for _ in range(SAMPLES):
            times.add(levels, costs[levels])
    return times


Stretches = list[tuple[int, float]]
"""Tokens of a text, and how likely a level is accepted there."""


def simulate(costs: dict[int, float], stretches: Stretches, seed: int, noisy: bool) -> float:
    """Write a text; return the time that it took, over that of an oracle.

    Reports are read, and rounds timed, one round late. noisy: the machine changes its speed now and
    then, and some rounds are interrupted; times here do not count that. The oracle knows the
    acceptance, and so which tier is best for each stretch.
    """
    random, ends = np.random.default_rng(seed), np.cumsum([size for size, _ in stretches])
    choice = TierChoice(TIERS, 1, RoundTimes(TIERS) if noisy else measured(costs))
    choice.enter(0)
    speed, tokens, spent = 1.0, 0, 0.0
    before, unread = TIERS[-1], (0, np.zeros(1, int), False)
    while tokens < ends[-1]:
        levels = choice.next()
        acceptance = stretches[int(np.searchsorted(ends, tokens, side="right"))][1]
        missed = np.flatnonzero(random.random(levels) >= acceptance)
        accepted = int(missed[0]) if len(missed) else levels
        tokens += accepted + 1
        lags = before == 0 < levels
        spent += costs[levels] + CATCHING_UP * lags
        before = levels
        if noisy and random.random() < 0.02:
            speed = random.uniform(1, 3)
        late, of_late, timed = unread
        if timed:
            stall = 3.0 if noisy and random.random() < 0.1 else 1.0
            choice.times.add(late, speed * stall * costs[late])
        choice.read(late, of_late, np.ones(1, bool), np.zeros(1, bool))
        unread = levels, np.array([accepted]), not lags
    best = [max(tokens_of(n, acceptance) / costs[n] for n in TIERS) for _, acceptance in stretches]
    return spent / sum(size / speed for (size, _), speed in zip(stretches, best, strict=True))


KINDS = {"code": 0.78, "text": 0.65, "prose": 0.5}
"""How likely a level is accepted on average in three kinds of texts."""


def simulate_short_texts(
    costs: dict[int, float], seed: int, fixed: int | None = None
) -> list[float]:
    """Write texts of 64 tokens, three of each kind; return the tokens per time of each kind.

    fixed: levels of all rounds, by default those that are chosen.
    """
    random, speeds = np.random.default_rng(seed), []
    choice, one, none = TierChoice(TIERS, 1, RoundTimes(TIERS)), np.ones(1, bool), np.zeros(1, bool)
    for mean in KINDS.values():
        tokens = spent = 0.0
        for acceptance in random.uniform(mean - 0.08, mean + 0.08, 3):
            choice.enter(0)
            end = tokens + 64
            while tokens < end:
                levels = choice.next() if fixed is None else fixed
                missed = np.flatnonzero(random.random(levels) >= acceptance)
                accepted = int(missed[0]) if len(missed) else levels
                tokens, spent = tokens + accepted + 1, spent + costs[levels]
                if fixed is None:
                    choice.times.add(levels, costs[levels])
                    choice.read(levels, np.array([accepted]), one, none)
            choice.leave(0)
        speeds.append(tokens / spent)
    return speeds


@pytest.mark.parametrize("costs", [COSTS["usual"], COSTS["dear"]], ids=["usual", "dear"])
def test_short_texts_of_changing_kinds_lose_little(costs):
    """Against plain decoding, and against the best fixed levels of each kind."""
    seeds = range(40)
    adaptive = np.mean([simulate_short_texts(costs, seed) for seed in seeds], axis=0)
    fixed = [
        np.mean([simulate_short_texts(costs, seed, levels) for seed in seeds], axis=0)
        for levels in TIERS
    ]
    assert (adaptive > 0.97 * fixed[0]).all()
    assert (adaptive / np.max(fixed, axis=0)).mean() > 0.97


def simulate_lookups(share: float, acceptance: float, seed: int, told: bool = True) -> float:
    """Write a text of 600 rounds by lookups; return its tokens per time, over the oracle's.

    share: how many rounds find something. The others take as long as plain ones, whatever the tier.
    told: whether times say which rounds these are.
    """
    costs, random = COSTS["dear"], np.random.default_rng(seed)
    choice = TierChoice(TIERS, 1, RoundTimes(TIERS))
    choice.enter(0)
    tokens = spent = 0.0
    for _ in range(600):
        levels = choice.next()
        found = bool(levels and random.random() < share)
        missed = np.flatnonzero(random.random(levels) >= acceptance)
        accepted = (int(missed[0]) if len(missed) else levels) if found else 0
        seconds = costs[levels] if found else costs[0]
        tokens, spent = tokens + accepted + 1, spent + seconds
        choice.times.add(levels, seconds, found=found if levels and told else None)
        choice.read(levels, np.array([accepted]), np.ones(1, bool), np.zeros(1, bool))
    best = max(
        (1 + share * (tokens_of(n, acceptance) - 1)) / (1 + share * (costs[n] - 1)) for n in TIERS
    )
    return tokens / spent / best


@pytest.mark.parametrize(
    ("share", "acceptance"), [(0.2, 0.5), (0.2, 0.9), (0.6, 0.4), (0.9, 0.95), (0.05, 0.8)]
)
def test_lookups_that_find_nothing_hide_no_costs(share, acceptance):
    """With a median over all rounds, drafts in a fifth of them would look free."""
    speeds = [simulate_lookups(share, acceptance, seed) for seed in range(5)]
    assert np.mean(speeds) > 0.95


def test_hidden_costs_of_lookups_would_be_found():
    speeds = [simulate_lookups(0.2, 0.5, seed, told=False) for seed in range(5)]
    assert np.mean(speeds) < 0.9


COPIED = 0.97
"""How likely a looked-up token is accepted where a text repeats."""


def simulate_both(
    costs: dict[int, float], looked_up: float, acceptance: float, seed: int, told: bool = True
) -> float:
    """Write a text that repeats every other 300 tokens, with a draft model and with lookups.

    Where it does not repeat, one lookup in five finds something, which is never right.

    Args:
        costs: Times of rounds by the levels that the model drafts.
        looked_up: The time of one whose tokens are all looked up.
        acceptance: That of the model's tokens.
        seed: Of the text.
        told: Whether reports say what lookups alone would have added.

    Returns:
        The tokens per time, over those of an oracle that knows which tier is best for each stretch.
    """
    random, choice = np.random.default_rng(seed), TierChoice(TIERS, 1, RoundTimes(TIERS))
    choice.enter(0)

    def accepted(levels: int, likely: float) -> int:
        missed = np.flatnonzero(random.random(levels) >= likely)
        return int(missed[0]) if len(missed) else levels

    tokens, spent = 0, 0.0
    while tokens < 3000:
        levels, repeats = choice.next(), tokens // 300 % 2 == 1
        found = repeats or random.random() < 0.2
        repeated = accepted(levels or TIERS[-1], COPIED) if repeats else 0
        gained = max(repeated, accepted(levels, acceptance))
        seconds = looked_up if found and levels == 0 else costs[levels]
        tokens, spent = tokens + gained + 1, spent + seconds
        choice.times.add(levels, seconds, found=None if levels else found)
        telling = np.array([repeated]) if told else None
        choice.read(levels, np.array([gained]), np.ones(1, bool), np.zeros(1, bool), telling)
    plain = 0.8 * costs[0] + 0.2 * looked_up
    free = max(1 / plain, *(tokens_of(n, acceptance) / costs[n] for n in TIERS[1:]))
    copying = max(tokens_of(TIERS[-1], COPIED) / looked_up, tokens_of(5, COPIED) / costs[5])
    return tokens / spent / (2 / (1 / free + 1 / copying))


@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(
    ("costs", "looked_up"), [(COSTS["cheap"], 1.1), (COSTS["usual"], 1.3), (COSTS["dear"], 1.6)]
)
def test_where_a_text_repeats_lookups_need_no_draft_model(costs, looked_up, acceptance):
    speeds = [simulate_both(costs, looked_up, acceptance, seed) for seed in range(5)]
    assert np.mean(speeds) > 0.9


def test_repeats_that_are_not_reported_would_cost():
    speeds = [simulate_both(COSTS["dear"], 1.6, 0.5, seed, told=False) for seed in range(5)]
    assert np.mean(speeds) < 0.85


READING = 0.02
"""Time in which the draft reads a token of a prompt."""


def simulate_reading(prompt: int, size: int, repeats: bool, seed: int, waits: bool) -> float:
    """Write a text with a draft model and lookups; return the time that it took.

    prompt: tokens that the draft has to read before it drafts. size: tokens to write. repeats:
    whether all of the text repeats the prompt, so that lookups alone are best, or nothing of it.
    """
    costs, looked_up, acceptance = COSTS["usual"], 1.3, 0.8
    random, times = np.random.default_rng(seed), measured(costs)
    times.add_reading(prompt, prompt * READING)
    choice = TierChoice(TIERS, 1, times, waits=waits)
    choice.enter(0)

    def accepted(levels: int, likely: float) -> int:
        missed = np.flatnonzero(random.random(levels) >= likely)
        return int(missed[0]) if len(missed) else levels

    tokens, spent, unread = 0, 0.0, prompt
    while tokens < size:
        levels = choice.next(unread)
        if levels and unread:
            spent, unread = spent + READING * unread, 0
        repeated = accepted(levels or TIERS[-1], COPIED) if repeats else 0
        gained = max(repeated, accepted(levels, acceptance))
        seconds = looked_up if repeats and levels == 0 else costs[levels]
        tokens, spent = tokens + gained + 1, spent + seconds
        choice.times.add(levels, seconds, found=None if levels else repeats)
        one, none = np.ones(1, bool), np.zeros(1, bool)
        choice.read(levels, np.array([gained]), one, none, np.array([repeated]))
    return spent


@pytest.mark.parametrize("prompt", [100, 800])
@pytest.mark.parametrize("repeats", [False, True])
def test_the_draft_reads_a_prompt_once_that_would_have_paid(prompt, repeats):
    """It never reads where the text repeats; elsewhere the wait costs as much as the reading."""
    waited, read = (
        np.mean([simulate_reading(prompt, 128, repeats, seed, waits) for seed in range(20)])
        for waits in (True, False)
    )
    reading = READING * prompt
    if repeats:
        assert waited < read - 0.9 * reading
    else:
        assert read < waited < read + 1.1 * reading + COSTS["usual"][0]


@pytest.mark.parametrize("costs", COSTS.values(), ids=list(COSTS))
@pytest.mark.parametrize(
    ("stretches", "most"),
    [
        ([(400, 0.0)], 1.04),
        ([(400, 0.3)], 1.04),
        ([(400, 0.6)], 1.09),
        ([(400, 0.95)], 1.05),
        ([(300, 0.95), (300, 0.0)] * 3, 1.10),
        ([(300, 0.0), (300, 0.95)] * 3, 1.10),
    ],
    ids=["never", "seldom", "often", "mostly", "falls and rises", "rises and falls"],
)
def test_the_loss_against_an_oracle_is_small(costs, stretches, most):
    assert np.mean([simulate(costs, stretches, seed, noisy=False) for seed in range(10)]) < most


@pytest.mark.parametrize("costs", COSTS.values(), ids=list(COSTS))
@pytest.mark.parametrize("acceptance", [0.0, 0.95])
def test_a_machine_that_changes_its_speed_does_not_mislead(costs, acceptance):
    """Times from a slow phase of the machine are not compared with later ones.

    A change of speed in the middle of the first rounds can mislead for some hundreds of them.
    """
    ratios = [simulate(costs, [(1500, acceptance)], seed, noisy=True) for seed in range(10)]
    assert np.median(ratios) < 1.05
    assert max(ratios) < 1.5


def test_every_tier_is_timed_before_they_are_compared():
    times = RoundTimes(TIERS)
    choice = TierChoice(TIERS, 1, times)
    choice.enter(0)
    taken = []
    for _ in range(3 * SAMPLES):
        taken.append(choice.next())
        times.add(taken[-1], 1.0)
    assert taken == [5] * SAMPLES + [2] * SAMPLES + [0] * SAMPLES
    # All cost the same, so the longest is best.
    assert choice.next() == 5


def test_processes_choose_alike_whatever_their_clocks_say():
    """Process 0 says what rounds take, every few rounds."""
    said: list[list[float | None]] = []
    heard = iter(said)
    first = TierChoice(TIERS, 1, RoundTimes(TIERS), lambda own: said.append(own) or own, every=4)
    other = TierChoice(TIERS, 1, RoundTimes(TIERS), lambda own: next(heard), every=4)
    random, taken = np.random.default_rng(0), set()
    for choice in (first, other):
        choice.enter(0)
    for _ in range(100):
        levels = first.next()
        assert levels == other.next()
        accepted = random.integers(0, levels + 1, 1)
        for choice, speed in ((first, 1.0), (other, 0.1)):
            choice.times.add(levels, random.random() + speed * levels)
            choice.read(levels, accepted, np.ones(1, bool), np.zeros(1, bool))
        taken.add(levels)
    assert taken == set(TIERS)
    assert len(said) == 25


def test_the_batch_has_one_tier_by_the_sum_of_its_rows():
    """Rows that are done, or free, do not count."""
    choice = TierChoice(TIERS, 3, measured(COSTS["dear"]))
    for row in range(3):
        choice.enter(row)
    good, bad = 5, 0
    everyone, none = np.ones(3, bool), np.zeros(3, bool)
    for _ in range(10):
        choice.read(5, np.array([good, bad, bad]), everyone, none)
    assert choice.next() == 0
    choice.read(0, np.zeros(3, int), everyone, np.array([False, True, False]))
    choice.leave(2)
    assert choice.next() == 5


def test_a_text_that_ends_says_nothing_about_acceptance():
    choice = TierChoice(TIERS, 1, measured(COSTS["usual"]))
    choice.enter(0)
    for _ in range(10):
        choice.read(5, np.array([0]), np.ones(1, bool), np.ones(1, bool))
    choice.enter(0)
    assert choice.next() == 5


def test_a_new_text_begins_with_some_of_what_others_have_shown():
    seen = Acceptance(rows=2, levels=2)
    seen.enter(0)
    fresh = seen.expected()[0, 2]
    for _ in range(20):
        seen.add(2, np.array([0, 0]), np.array([True, False]))
    seen.enter(1)
    known, new = seen.expected()[:, 2]
    assert known < new < fresh


def test_batches_share_what_texts_have_shown():
    common, bad = no_common(TIERS[-1]), np.array([0])
    before, after, alone = (
        TierChoice(TIERS, 1, measured(COSTS["dear"]), common=own) for own in (common, common, None)
    )
    before.enter(0)
    for _ in range(20):
        before.read(5, bad, np.ones(1, bool), np.zeros(1, bool))
    for choice in (after, alone):
        choice.enter(0)
    assert after.next() == 0 < alone.next()


@pytest.mark.parametrize(
    ("options", "tiers"),
    [
        ({}, ()),
        ({"adapt": True}, (0, 2)),
        ({"adapt": True, "num_speculative_tokens": 2}, (0,)),
        ({"adapt": True, "num_speculative_tokens": 8, "method": "tree"}, (0, 2, 5)),
        ({"adapt": True, "method": "ngram"}, (0, 2)),
        ({"adapt": True, "method": "vanilla"}, ()),
    ],
    ids=str,
)
def test_tiers_draft_less_than_what_was_configured(options, tiers):
    config = RoundConfig.of(SpeculativeConfig(**options), SamplingParams(), ())
    assert config.tiers == tiers
    for levels in tiers:
        tier = config.tier(levels)
        assert tier.levels == levels
        assert tier.scratch <= config.scratch
        assert tier.pending_size == config.pending_size
        assert (tier.lookup is None) == (levels == 0 or config.lookup is None)


def test_where_lookups_join_a_draft_the_lowest_tier_has_them_alone():
    options = {"prompt_lookup": True, "tree_width": 4, "tree_nodes": 12, "adapt": True}
    config = RoundConfig.of(SpeculativeConfig(**options), SamplingParams(), ())
    alone = config.tier(0)
    assert (alone.levels, alone.width, alone.nodes) == (config.levels, 1, None)
    assert alone.lookup == config.lookup and not alone.calibration and not alone.tiers
    assert alone.scratch <= config.scratch and alone.pending_size == config.pending_size


def test_samples_are_coupled():
    """Then texts do not depend on the tier."""
    adapting, sampling = SpeculativeConfig(adapt=True), SamplingParams(temperature=0.8)
    assert RoundConfig.of(adapting, sampling, ()).verifier == Coupled()
    assert RoundConfig.of(adapting, SamplingParams(), ()).verifier == Greedy()


@pytest.mark.parametrize(
    ("options", "temperature", "tiers"),
    [
        ({}, 0.0, (0, 2)),
        ({}, 0.8, ()),
        ({"verifier": "block"}, 0.0, (0, 2)),
        ({"verifier": "block"}, 0.8, ()),
        ({"verifier": "coupled"}, 0.8, (0, 2)),
        ({"method": "tree"}, 0.8, (0, 2)),
        ({"method": "tree", "verifier": "rejection"}, 0.8, ()),
        ({"method": "ngram"}, 0.8, (0, 2)),
        ({"method": "vanilla"}, 0.8, ()),
        ({"verifier": Coupled()}, 0.8, (0, 2)),
        ({"verifier": Rejection()}, 0.8, ()),
    ],
    ids=str,
)
def test_only_texts_that_stay_the_same_adapt_by_themselves(options, temperature, tiers):
    speculative = SpeculativeConfig(**options, adapt="auto")
    sampling = SamplingParams(temperature=temperature)
    config, fixed = (
        RoundConfig.of(own, sampling, ())
        for own in (speculative, replace(speculative, adapt=False))
    )
    assert config.tiers == tiers
    assert config.verifier == fixed.verifier


def test_fixed_rows_leave_caches_their_size():
    """A cache of another size could be summed in another order than plain decoding's."""
    adapting = SpeculativeConfig(adapt=True, bit_stable=True)
    fixed = SpeculativeConfig(bit_stable=True)
    scratch = [RoundConfig.of(s, SamplingParams(), ()).scratch for s in (adapting, fixed)]
    assert scratch[0] == scratch[1] == adapting.stable_rows
