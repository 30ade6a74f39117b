"""Tiers pay from where their tokens make up for their time."""

import pytest

from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.steps import Way, rounds
from easyspec_jax.plan.tiers import tiers, tiers_of
from tests.support.plans import UNIT, absent, pair


def tokens(levels: int, likely: float) -> float:
    return sum(likely**level for level in range(levels + 1))


def test_neighbours_are_as_fast_where_one_takes_over():
    seconds = {0: 1.0, 2: 1.3, 5: 1.9}
    plain, short, long = tiers_of(seconds)
    assert (plain.levels, short.levels, long.levels) == (0, 2, 5)
    assert plain.pays_from == 0
    assert short.pays_from is not None and long.pays_from is not None
    assert 0 < short.pays_from < long.pays_from < 1
    for below, above in ((plain, short), (short, long)):
        at = above.pays_from
        assert at is not None
        for likely, faster, slower in ((at + 1e-9, above, below), (at - 2e-3, below, above)):
            speeds = [tokens(own.levels, likely) / own.seconds for own in (faster, slower)]
            assert speeds[0] >= speeds[1]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({0: 1.0, 2: 3.1, 5: 6.1}, [0.0, None, None]),  # dearer than all tokens that it may yield
        ({0: 1.0, 5: 1.0}, [0.0, 0.001]),  # free
        ({0: 1.0, 2: 1.9, 5: 2.0}, [0.0, None, 0.509]),  # the longer one costs hardly more
    ],
)
def test_a_tier_may_never_pay(seconds, expected):
    assert [tier.pays_from for tier in tiers_of(seconds)] == expected


@pytest.mark.slow
def test_rounds_are_counted():
    own, way, plain = pair(), Way("easyspec", 2, "all"), Cost(kernels=5)
    most = own.num_speculative_tokens
    counted = rounds(own, way, absent, most)
    drafted = [counted[levels - 1].cost for levels in (2, most)]
    found = tiers(own, way, plain, absent, UNIT)
    assert [tier.levels for tier in found] == [0, 2, most]
    assert [tier.seconds for tier in found] == [cost.seconds(UNIT) for cost in (plain, *drafted)]
