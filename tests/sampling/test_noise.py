"""Noise is a function of request, position, round and purpose alone, and it has the distribution it claims."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from easyspec_jax.model.sharding import VOCAB_BLOCK
from easyspec_jax.sampling.noise import Purpose, gumbel, noise_keys, uniform

# A batch of every seed in every round, and always the same number of positions: each new shape would compile anew.
BATCH = list(itertools.product((0, 1, 2, 3, 7, 8, 1000, 2**32 - 1), range(8)))
POSITIONS = (*range(14), 1000, 100_000)
SHARDS = 8
ALPHA = 0.01 / 2  # two Kolmogorov-Smirnov tests at 1 % together


def keys(
    purpose: Purpose = Purpose.DRAFT, batch: Sequence[tuple[int, int]] = BATCH, positions: Sequence[int] = POSITIONS
) -> jax.Array:
    seeds, rounds = zip(*batch, strict=True)
    return noise_keys(
        jnp.asarray(seeds, jnp.uint32),
        jnp.asarray([positions] * len(batch), jnp.int32),
        jnp.asarray(rounds, jnp.int32),
        purpose,
    )


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    """A million Gumbel draws: whole rows of a vocabulary, a row per key."""
    return np.asarray(gumbel(keys().reshape(-1), 0, SHARDS * VOCAB_BLOCK))


def test_every_seed_position_round_and_purpose_has_its_own_key():
    words = np.stack([jax.random.key_data(keys(purpose)) for purpose in Purpose])
    assert len(np.unique(words.reshape(-1, words.shape[-1]), axis=0)) == len(Purpose) * len(BATCH) * len(POSITIONS)


def test_a_key_does_not_depend_on_its_place_in_the_batch():
    data, backwards = map(jax.random.key_data, (keys(), keys(batch=BATCH[::-1], positions=POSITIONS[::-1])))
    np.testing.assert_array_equal(data, backwards[::-1, ::-1])


def test_the_noise_of_shards_is_the_noise_of_the_row(draws):
    shard = jax.jit(gumbel, static_argnums=2)  # the first id is an array, as on a mesh
    parts = [shard(keys().reshape(-1), i * VOCAB_BLOCK, VOCAB_BLOCK) for i in range(SHARDS)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), draws)


def test_no_block_and_no_row_repeats_another(draws):
    blocks = draws.reshape(-1, VOCAB_BLOCK)
    assert len(np.unique(blocks, axis=0)) == len(blocks)


def test_gumbel_draws_follow_the_gumbel_distribution(draws):
    assert draws.dtype == np.float32
    assert stats.kstest(draws.reshape(-1), "gumbel_r").pvalue > ALPHA


def test_uniform_draws_follow_the_uniform_distribution():
    made = np.concatenate(
        [uniform(keys(Purpose.ACCEPT, positions=range(16 * i, 16 * i + 16)).reshape(-1)) for i in range(32)]
    )
    assert 0 <= made.min() <= made.max() < 1
    assert stats.kstest(made, "uniform").pvalue > ALPHA


def test_the_upper_tail_is_fine_grained(draws):
    """JAX's default mode rounds its uniforms to multiples of 2^-23 below 1: the tail falls on few values and ends."""
    coarse = np.asarray(jax.random.gumbel(jax.random.key(0), draws.shape, jnp.float32, mode="low"))

    def repeats(x: np.ndarray) -> int:
        tail = x[x > 7]
        return len(tail) - len(np.unique(tail))

    assert np.sum(draws > 7) == pytest.approx(draws.size * stats.gumbel_r.sf(7), rel=0.15)
    assert repeats(draws) < 5 < 20 < repeats(coarse)
