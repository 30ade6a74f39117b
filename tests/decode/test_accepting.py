"""Reports count the accepted tokens that lookups had found."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from easyspec_jax.decode.accepting import accept
from easyspec_jax.decode.state import Drafted, RoundConfig
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.sampling.vocabulary import NO_TOKEN
from easyspec_jax.verify import Verdict
from easyspec_jax.verify.tree import sure_chain

LEVELS = 4


@pytest.mark.parametrize(
    ("forced", "looked_up", "leaf", "repeated"),
    [
        (0, [11, 12, 13, 14], 4, 4),
        (0, [11, 12, 99, 14], 4, 2),
        (0, [99, 12, 13, 14], 4, 0),
        (0, [11, 12, 13, 14], 2, 2),  # what comes after the accepted tokens does not count
        (0, [NO_TOKEN] * 4, 4, 0),
        (1, [12, 13, 99, 99], 4, 2),  # the first new token is forced
        (2, [11, 12, 13, 14], 4, 0),
    ],
)
def test_a_report_says_how_many_accepted_tokens_a_lookup_had_found(
    forced, looked_up, leaf, repeated
):
    tree = sure_chain(jnp.array([10]), jnp.array([[11, 12, 13, 14]]), jnp.array([True]))
    drafted = Drafted(
        tree,
        levels=jnp.array([LEVELS - forced]),
        is_finite=jnp.array([True]),
        forced=jnp.array([forced]),
        looked_up=jnp.array([looked_up]),
    )
    state: Any = SimpleNamespace(remaining=jnp.array([100]), adjustments=None)
    config = RoundConfig.of(SpeculativeConfig(num_speculative_tokens=LEVELS), SamplingParams(), ())
    verdict = Verdict(jnp.array([leaf]), jnp.array([50]))
    report, _, _ = accept(verdict, drafted, state, jnp.array([True]), config, LEVELS)
    assert report.accepted.tolist() == [leaf - forced]
    assert report.repeated is not None
    assert report.repeated.tolist() == [repeated]
