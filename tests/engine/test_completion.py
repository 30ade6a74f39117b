"""A text counts what rounds added to it, up to where it ends."""

import jax
import jax.numpy as jnp
import pytest

from easyspec_jax import SamplingParams, demo
from easyspec_jax.decode.state import Report
from easyspec_jax.decode.stats import Stats
from easyspec_jax.engine.completion import Gain, Generation
from easyspec_jax.tokenizer import encode, load_tokenizer
from easyspec_jax.tokenizer.stream import TextStream


def report(tokens: list[int], drafted: int = 0, accepted: int = 0, forced: int = 0) -> Report:
    """Return a report of one row that goes on, as the host reads it."""
    none = jnp.zeros(1, jnp.int32)
    found = Report(
        tokens=jnp.array([tokens], jnp.int32),
        num_tokens=none + len(tokens),
        drafted=none + drafted,
        accepted=none + accepted,
        done=jnp.zeros(1, bool),
        fault=none,
        lookup_drafted=none,
        lookup_accepted=none,
        forced=none + forced,
        levels=jnp.int32(5),
    )
    return jax.device_get(found)


@pytest.mark.parametrize(
    ("stop", "pieces", "counts"),
    [
        ("?", [" b", " c", " d", " e", " f", " g"], (5, 3, 2)),
        # Two forced tokens, then two drafted ones.
        (" e", [" b", " c", " d", ""], (2, 2, 2)),
        (" b", [""], (0, 0, 1)),
    ],
)
def test_a_round_counts_up_to_a_stop_string(stop, pieces, counts):
    tokenizer = load_tokenizer(demo.TARGET)
    first, *others = encode(tokenizer, "a b c d e f g", chat=False)
    text, stats = TextStream(tokenizer, [stop]), Stats(accepted_per_position=(0,) * 5)
    generation = Generation("a", [first], text, stats, SamplingParams(), limit=50)
    generation.take(report([first]), row=0)
    generation.take(report(others, drafted=5, accepted=3, forced=2), row=0)
    assert generation.latest == Gain(pieces, *counts)
    stats = generation.stats
    assert (stats.drafted, stats.accepted, stats.forced) == counts
    assert generation.tokens_per_round == [len(pieces)]
