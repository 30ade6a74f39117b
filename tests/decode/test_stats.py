"""Statistics are those that serving engines report, and they add up."""

import json
from dataclasses import replace

import pytest

from easyspec_jax.decode.stats import Stats, TierStats

THREE_ROUNDS = Stats(accepted_per_position=(0, 0, 0), prefill_seconds=0.5, decode_seconds=2.0)
# The last round is cut short by the limit.
for _tokens, _drafted, _accepted in ((4, 3, 3), (1, 3, 0), (2, 2, 1)):
    THREE_ROUNDS = THREE_ROUNDS.with_round(_tokens, _drafted, _accepted)

KEYS = {
    *(
        "rounds",
        "drafted",
        "accepted",
        "acceptance_rate",
        "mean_acceptance_length",
        "accepted_per_position",
    ),
    *("prefill_seconds", "decode_seconds", "tokens_per_second", "cached_tokens"),
    *("lookup_drafted", "lookup_accepted", "forced", "tiers"),
}


def test_rounds_are_counted_by_position():
    assert THREE_ROUNDS.rounds == 3
    assert THREE_ROUNDS.drafted == 8
    assert THREE_ROUNDS.accepted == 4
    assert THREE_ROUNDS.accepted_per_position == (2, 1, 1)
    assert sum(THREE_ROUNDS.accepted_per_position) == THREE_ROUNDS.accepted
    assert THREE_ROUNDS.decoded_tokens == 7


def test_rates_are_quotients_of_the_counts():
    assert THREE_ROUNDS.acceptance_rate == 4 / 8
    assert THREE_ROUNDS.mean_acceptance_length == pytest.approx(1 + 4 / 3)
    assert THREE_ROUNDS.tokens_per_second == 7 / 2.0


def test_without_rounds_or_drafts_there_is_nothing_to_divide_by():
    nothing = Stats()
    assert (nothing.acceptance_rate, nothing.mean_acceptance_length, nothing.tokens_per_second) == (
        0.0,
        1.0,
        0.0,
    )
    plain = Stats(decode_seconds=0.5).with_round(1, 0, 0).with_round(1, 0, 0)
    assert (plain.acceptance_rate, plain.mean_acceptance_length, plain.tokens_per_second) == (
        0.0,
        1.0,
        4.0,
    )
    assert plain.accepted_per_position == ()


def test_lookups_are_counted_apart():
    stats = THREE_ROUNDS.with_round(3, 3, 2, lookup_drafted=2, lookup_accepted=1)
    both = stats + THREE_ROUNDS.with_round(4, 3, 3, 3, 3)
    assert (stats.lookup_drafted, stats.lookup_accepted) == (2, 1)
    assert (both.lookup_drafted, both.lookup_accepted) == (5, 4)
    assert both.accepted == 2 * THREE_ROUNDS.accepted + 5


def test_cached_tokens_add_up_however_requests_ran():
    one = replace(THREE_ROUNDS, cached_tokens=5)
    other = replace(THREE_ROUNDS, cached_tokens=2)
    assert (one + other).cached_tokens == one.in_parallel(other).cached_tokens == 7


def test_a_sum_is_as_if_one_request_followed_the_other():
    one_round = Stats(
        accepted_per_position=(0, 0, 0), prefill_seconds=0.25, decode_seconds=1.0
    ).with_round(3, 3, 2)
    longer = replace(THREE_ROUNDS, prefill_seconds=0.75, decode_seconds=3.0).with_round(3, 3, 2)
    assert THREE_ROUNDS + one_round == one_round + THREE_ROUNDS == longer
    assert longer.acceptance_rate == 6 / 11


def test_different_draft_lengths_do_not_add():
    with pytest.raises(ValueError):
        THREE_ROUNDS + Stats(accepted_per_position=(0, 0))  # pyright: ignore[reportUnusedExpression]


@pytest.mark.parametrize("stats", [Stats(), THREE_ROUNDS])
def test_as_dict_has_every_figure_by_its_name_and_is_json(stats):
    figures = stats.as_dict()
    assert set(figures) == KEYS
    assert figures == {name: getattr(stats, name) for name in KEYS}
    assert json.loads(json.dumps(figures)) == figures | {
        "accepted_per_position": list(stats.accepted_per_position),
        "tiers": [],
    }


def test_what_ran_at_once_takes_as_long_as_the_longer_one():
    quick = replace(THREE_ROUNDS, prefill_seconds=0.7, decode_seconds=1.0)
    both = THREE_ROUNDS.in_parallel(quick)
    assert both == replace(THREE_ROUNDS + quick, prefill_seconds=0.7, decode_seconds=2.0)
    assert both.tokens_per_second == 14 / 2.0


def test_tiers_are_counted_apart():
    tiers = tuple(map(TierStats, (0, 2, 3)))
    one = Stats(accepted_per_position=(0, 0, 0), tiers=tiers)
    one = one.with_round(3, 2, 2, levels=2).with_round(1, 0, 0, levels=0)
    assert one.tiers == (TierStats(0, 1), TierStats(2, 1, 2, 2), TierStats(3))
    both = one + one.with_round(1, 3, 0, levels=3)
    assert both.tiers == (TierStats(0, 2), TierStats(2, 2, 4, 4), TierStats(3, 1, 3, 0))
    assert one.as_dict()["tiers"][1] == {
        "num_speculative_tokens": 2,
        "rounds": 1,
        "drafted": 2,
        "accepted": 2,
    }
