"""Noise depends on request, position, round and purpose alone, and is distributed as it claims."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from easyspec_jax.sampling.noise import Purpose, gumbel, noise_keys, numbered, uniform

# Every seed in every round. Tests keep the number of positions: each new shape would compile again.
BATCH = list(itertools.product((0, 1, 2, 3, 7, 8, 1000, 2**32 - 1), range(8)))
POSITIONS = (*range(14), 1000, 100_000)
VOCAB = 1024
ALPHA = 0.01 / 2  # two Kolmogorov-Smirnov tests at 1 % together

make_children = jax.jit(numbered, static_argnums=1)


def keys(
    purpose: Purpose = Purpose.DRAFT,
    batch: Sequence[tuple[int, int]] = BATCH,
    positions: Sequence[int] = POSITIONS,
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
    """A million Gumbel draws: [keys, vocabulary]."""
    rows = keys().reshape(-1)
    ids = jnp.arange(VOCAB, dtype=jnp.int32)
    return np.asarray(gumbel(rows, jnp.broadcast_to(ids, (*rows.shape, VOCAB))))


def test_every_seed_position_round_and_purpose_has_its_own_key():
    words = np.stack([jax.random.key_data(keys(purpose)) for purpose in Purpose])
    assert len(np.unique(words.reshape(-1, words.shape[-1]), axis=0)) == len(Purpose) * len(
        BATCH
    ) * len(POSITIONS)


def test_a_key_does_not_depend_on_its_place_in_the_batch():
    data, backwards = map(
        jax.random.key_data, (keys(), keys(batch=BATCH[::-1], positions=POSITIONS[::-1]))
    )
    np.testing.assert_array_equal(data, backwards[::-1, ::-1])


@pytest.mark.parametrize("count", [1, 64, VOCAB])
def test_an_id_has_its_noise_in_whatever_company(draws, count):
    """A few likely ids, a vocabulary shard and the whole row agree. Jitted, as in decoding."""
    rows = keys().reshape(-1)[::8]
    ids = np.random.default_rng(count).permuted(
        np.tile(np.arange(VOCAB, dtype=np.int32), (len(rows), 1)), axis=1
    )
    found = jax.jit(gumbel)(rows, jnp.asarray(ids[:, :count]))
    np.testing.assert_array_equal(found, np.take_along_axis(draws[::8], ids[:, :count], axis=1))


def test_rows_of_ids_may_have_any_shape(draws):
    ids = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (len(BATCH), len(POSITIONS), 4))
    np.testing.assert_array_equal(gumbel(keys(), ids), draws[:, :4].reshape(ids.shape))


def test_no_id_and_no_key_repeats_another(draws):
    """Compare stretches of eight draws: single draws may coincide in float32."""
    assert len(np.unique(draws.reshape(-1, 8), axis=0)) == draws.size // 8
    assert len(np.unique(draws[:8], axis=1).T) == VOCAB


def test_numbered_keys_are_all_different():
    parents = keys()
    children = make_children(parents, 5)
    assert children.shape == (*parents.shape, 5)
    words = np.concatenate(
        [np.asarray(jax.random.key_data(x)).reshape(-1, 2) for x in (parents, children)]
    )
    assert len(np.unique(words, axis=0)) == parents.size * 6


def test_a_numbered_key_depends_on_its_parent_and_number_alone():
    """Its parent's place in the batch and the number of keys do not matter."""
    data = jax.random.key_data(make_children(keys(), 5))
    fewer = make_children(keys(batch=BATCH[::-1], positions=POSITIONS[::-1]).reshape(-1), 3)
    np.testing.assert_array_equal(
        jax.random.key_data(fewer), data[::-1, ::-1, :3].reshape(-1, 3, 2)
    )


def test_gumbel_draws_follow_the_gumbel_distribution(draws):
    assert draws.dtype == np.float32
    assert stats.kstest(draws.reshape(-1), "gumbel_r").pvalue > ALPHA


def test_uniform_draws_follow_the_uniform_distribution():
    made = np.concatenate(
        [
            uniform(keys(Purpose.ACCEPT, positions=range(16 * i, 16 * i + 16)).reshape(-1))
            for i in range(32)
        ]
    )
    assert 0 <= made.min() <= made.max() < 1
    assert stats.kstest(made, "uniform").pvalue > ALPHA


def test_the_upper_tail_is_fine_grained(draws):
    """JAX's default draws from multiples of 2^-23, so that its upper tail repeats few values."""
    coarse = np.asarray(jax.random.gumbel(jax.random.key(0), draws.shape, jnp.float32, mode="low"))

    def repeats(x: np.ndarray) -> int:
        tail = x[x > 7]
        return len(tail) - len(np.unique(tail))

    assert np.sum(draws > 7) == pytest.approx(draws.size * stats.gumbel_r.sf(7), rel=0.15)
    assert repeats(draws) < 5 < 20 < repeats(coarse)


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_the_ends_are_finite_and_the_upper_one_goes_on_behind_32_bits(monkeypatch, word):
    """Plant what happens once in four billion draws: the first 32 bits are all equal."""
    real = jax.random.key_data
    monkeypatch.setattr(
        jax.random, "key_data", lambda keys: real(keys).at[..., 0].set(jnp.uint32(word))
    )
    noise = np.asarray(gumbel(keys()[:1, :1], jnp.arange(64, dtype=jnp.int32)[None, None]))
    assert np.isfinite(noise).all()
    if word == 0:
        assert noise.min() > -np.log(2.0**-32)
        assert len(np.unique(noise)) > 60
