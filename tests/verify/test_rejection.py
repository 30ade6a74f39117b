"""Rejection sampling along a chain gives exactly the target's distribution, and these tests would notice if not.

On a vocabulary small enough to enumerate, with drafts of two levels: the first emitted token must follow the target; so
must the second given the first, where the first draft was accepted, and the third given the second, where both were.
With the acceptance rate these are four chi-square tests a case.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.sampling import noise
from easyspec_jax.sampling.noise import Purpose
from easyspec_jax.verify import Rejection, Request, Verdict, Verifier, rejection
from tests.helpers import goodness_of_fit, on_mesh

BLOCK = 16
TOKENS, LEVELS = 11, 2
POSITION = 7
ONE, EIGHT = MeshShape(1, 1), MeshShape(4, 2)
CHAINS = {ONE: 60_000, EIGHT: 10_000}


@pytest.fixture(scope="module", autouse=True)
def small_noise_blocks() -> Iterator[None]:
    """Each chain draws noise for the whole vocabulary: in blocks of 16 ids it is eleven ids' worth, not 128."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "VOCAB_BLOCK", BLOCK)
        yield


class Pair(NamedTuple):
    """Logits by level and by the token before (before level 0 there is token 0); the target has one level more."""

    target: np.ndarray
    draft: np.ndarray


def make_pairs() -> dict[str, Pair]:
    random = np.random.default_rng(0)
    target = random.normal(size=(LEVELS + 1, TOKENS, TOKENS)) * 1.5
    other = random.normal(size=(LEVELS, TOKENS, TOKENS)) * 1.5
    drafted = target[:LEVELS]
    likes_most = target >= np.sort(target, axis=-1)[..., -2:-1]
    draft_likes = np.zeros_like(likes_most)
    draft_likes[:LEVELS] = other >= np.sort(other, axis=-1)[..., -2:-1]
    return {
        "good": Pair(target, drafted + 0.3 * other),
        "bad": Pair(target, other),
        "blind": Pair(target, np.where(likes_most[:LEVELS], -np.inf, drafted)),
        "wishful": Pair(np.where(draft_likes, -np.inf, target), other),
    }


class Truncation(NamedTuple):
    """What sampling keeps."""

    top_k: int
    top_p: float


NONE = Truncation(0, 1.0)
TRUNCATIONS = (Truncation(3, 1.0), Truncation(0, 0.8), Truncation(6, 0.9))
REJECTION = Rejection()
PAIRS = make_pairs()
TEMPERATURES = (0.7, 1.0)
CASES = [(mesh, name, temperature) for mesh in CHAINS for name in PAIRS for temperature in TEMPERATURES]
# Holm's procedure at 1 % rejects anything at all only if the smallest p-value is below this.
ALPHA = 0.01 / (len(CASES) * (LEVELS + 2))


class Chains(NamedTuple):
    """tokens: [chains, levels + 1]; a chain emits those up to and including the one after its accepted drafts."""

    tokens: np.ndarray
    accepted: np.ndarray


@cache
def program(mesh: MeshShape, draft_axes: Axes, planted: bool = False, verifier: Verifier = REJECTION) -> Any:
    """Drafts and verifies one chain per request; with planted, under one of FAULTS by number."""

    def body(pair: Pair, ids: jax.Array, request: Request, fault: jax.Array) -> tuple[jax.Array, Verdict]:
        batch = request.seed.shape
        start = jnp.full(batch, POSITION, jnp.int32)
        tokens = [jnp.full(batch, ids[0])]
        p, q = [], []
        for level in range(LEVELS + 1):
            before = jnp.searchsorted(ids, tokens[-1])
            p.append(pair.target[level][before])
            if level < LEVELS:
                q.append(pair.draft[level][before])
                tokens.append(verifier.propose(q[-1], start + level, request, draft_axes))
        drafted = jnp.stack(tokens[1:], axis=1)
        verdict = verifier.verify(jnp.stack(p, axis=1), jnp.stack(q, axis=1), drafted, start, request, draft_axes)
        return drafted, verdict

    def faulty(*args: jax.Array) -> tuple[jax.Array, Verdict]:
        with planting(fault=args[-1], temperature=args[2].temperature[0]):  # pyright: ignore[reportAttributeAccessIssue]
            return body(*args)  # pyright: ignore[reportArgumentType]

    specs = (Pair(P(None, None, ALL_AXES), P(None, None, draft_axes or None)), P(), P(), P())  # pyright: ignore[reportArgumentType]
    return on_mesh(mesh, faulty if planted else body, specs, P())


def draw(
    program: Any,
    pair: Pair,
    temperature: float | np.ndarray,
    seeds: np.ndarray,
    devices: int = 1,
    fault: int = 0,
    truncation: Truncation = NONE,
) -> Chains:
    """Chains over the ids of a vocabulary for that many devices, in which the tokens are spread out."""
    vocab = devices * BLOCK
    ids = np.arange(TOKENS, dtype=np.int32) * (vocab // TOKENS)
    spread = Pair(*(np.full((*logits.shape[:-1], vocab), -np.inf, np.float32) for logits in pair))
    for wide, logits in zip(spread, pair, strict=True):
        wide[..., ids] = logits
    request = make_request(seeds, temperature, truncation)
    drafted, verdict = jax.device_get(program(spread, ids, request, np.int32(fault)))
    accepted = np.cumprod(verdict.accept, axis=1).sum(axis=1)
    columns = np.arange(LEVELS + 1)
    tokens = np.where(columns < accepted[:, None], np.pad(drafted, [(0, 0), (0, 1)]), verdict.token)
    assert np.isin(tokens, ids).all(), "a token without probability under the target"
    return Chains(np.searchsorted(ids, tokens), accepted)


def make_request(seeds: np.ndarray, temperature: float | np.ndarray, truncation: Truncation = NONE) -> Request:
    """Rows of their own seeds, and of one or their own temperatures."""
    return jax.tree.map(
        lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), seeds.shape),
        Request(seeds, 0, temperature, *truncation),  # pyright: ignore[reportArgumentType]
        Request(np.uint32, np.int32, np.float32, np.int32, np.float32),  # pyright: ignore[reportArgumentType]
    )


def p_values(chains: Chains, pair: Pair, temperature: float, truncation: Truncation = NONE) -> list[float]:
    """Of the acceptance rate of the first draft, and of each level's tokens given the token before."""
    p, q = (truncated(softmax(logits / temperature), truncation) for logits in pair)
    overlap = np.minimum(p[0, 0], q[0, 0]).sum()
    result = [goodness_of_fit(np.bincount(chains.accepted > 0, minlength=2)[None], np.array([[1 - overlap, overlap]]))]
    before = np.zeros(len(chains.tokens), int)
    for level in range(LEVELS + 1):
        counts = np.zeros((TOKENS, TOKENS), int)
        emitted = chains.accepted >= level
        np.add.at(counts, (before[emitted], chains.tokens[emitted, level]), 1)
        result.append(goodness_of_fit(counts, p[level]))
        before = chains.tokens[:, level]
    return result


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def truncated(probabilities: np.ndarray, truncation: Truncation) -> np.ndarray:
    """Top-k and then top-p, spelled out row by row."""
    result = np.zeros_like(probabilities)
    for row in np.ndindex(*probabilities.shape[:-1]):
        order = np.argsort(-probabilities[row], kind="stable")[: truncation.top_k or None]
        among = probabilities[row][order] / probabilities[row][order].sum()
        kept = order[: 1 + np.searchsorted(np.cumsum(among), truncation.top_p)]
        result[row][kept] = probabilities[row][kept]
    return result / result.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("mesh", "name", "temperature"), CASES, ids=lambda x: f"{x.layer}x{x.tensor}" if isinstance(x, MeshShape) else None
)
def test_emitted_tokens_follow_the_target(mesh, name, temperature):
    seeds = np.arange(CHAINS[mesh]) + CASES.index((mesh, name, temperature)) * 10**6
    chains = draw(program(mesh, ALL_AXES), PAIRS[name], temperature, seeds, mesh.size)
    assert min(p_values(chains, PAIRS[name], temperature)) > ALPHA


@pytest.mark.parametrize("mesh", CHAINS, ids=str)
@pytest.mark.parametrize("name", ["good", "bad"])  # cut, the other drafts share too few ids with the target to go on
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_truncated_tokens_follow_the_truncated_target(mesh, name, truncation):
    """-inf logits and all; draft and target are cut each by its own probabilities."""
    seeds = np.arange(CHAINS[mesh]) + 10**8
    cutting = program(mesh, ALL_AXES, verifier=Rejection(truncates=True))
    chains = draw(cutting, PAIRS[name], 1.0, seeds, mesh.size, truncation=truncation)
    assert min(p_values(chains, PAIRS[name], 1.0, truncation)) > ALPHA
    whole = truncated(softmax(PAIRS[name].target), NONE)
    assert (truncated(whole, truncation) == 0).sum() > (whole == 0).sum()


def test_plain_decoding_follows_the_target():
    """Without a draft the verifier samples the target."""
    pair, temperature = PAIRS["good"], 0.7
    logits = np.full(BLOCK, -np.inf, np.float32)
    logits[:TOKENS] = pair.target[0, 0]

    def body(logits: jax.Array, request: Request) -> Verdict:
        batch = len(request.seed)
        row = jnp.broadcast_to(logits, (batch, 1, *logits.shape))
        zeros = jnp.zeros(batch, jnp.int32)
        return Rejection().verify(row, row[:, :0], jnp.zeros((batch, 0), jnp.int32), zeros, request, ALL_AXES)

    request = make_request(np.arange(CHAINS[ONE]), temperature)
    verdict = on_mesh(ONE, body, (P(ALL_AXES), P()), P())(logits, request)
    assert verdict.accept.shape == (CHAINS[ONE], 0)
    counts = np.bincount(verdict.token[:, 0], minlength=TOKENS)[None]
    assert goodness_of_fit(counts, softmax(pair.target[:1, 0] / temperature)) > ALPHA


def test_the_mesh_changes_nothing():
    """Neither for a split draft nor for one that every device has whole."""
    seeds = np.arange(CHAINS[EIGHT])
    split = draw(program(EIGHT, ALL_AXES), PAIRS["good"], 0.7, seeds, EIGHT.size)
    for layout in ((ONE, ALL_AXES), (EIGHT, ())):
        other = draw(program(*layout), PAIRS["good"], 0.7, seeds[:2000], EIGHT.size)
        np.testing.assert_array_equal(other.tokens, split.tokens[:2000])
        np.testing.assert_array_equal(other.accepted, split.accepted[:2000])


def test_a_chain_does_not_depend_on_its_place_in_the_batch():
    seeds = np.arange(CHAINS[ONE])
    chains, backwards = (draw(program(ONE, ALL_AXES), PAIRS["bad"], 1.0, s) for s in (seeds, seeds[::-1]))
    np.testing.assert_array_equal(chains.tokens, backwards.tokens[::-1])


def test_each_chain_has_its_own_temperature():
    seeds = np.arange(CHAINS[EIGHT])
    temperatures = np.where(seeds % 3 == 0, *TEMPERATURES)
    mixed, *each = (
        draw(program(EIGHT, ALL_AXES), PAIRS["bad"], t, seeds, EIGHT.size) for t in (temperatures, *TEMPERATURES)
    )
    for temperature, chains in zip(TEMPERATURES, each, strict=True):
        rows = temperatures == temperature
        np.testing.assert_array_equal(mixed.tokens[rows], chains.tokens[rows])


def test_a_draft_equal_to_the_target_is_always_accepted():
    pair = PAIRS["good"]
    chains = draw(program(ONE, ALL_AXES), Pair(pair.target, pair.target[:LEVELS]), 0.7, np.arange(CHAINS[ONE]))
    assert (chains.accepted == LEVELS).all()


FAULTS = (
    "none",
    "residual is the target",
    "token of another row",
    "no dice",
    "draft not warped",
    "one noise for all purposes",
    "one noise for all positions",
)


@contextmanager
def planting(fault: jax.Array, temperature: jax.Array) -> Iterator[None]:
    """The verifier with the fault of that number, an array: so that all of them compile once."""
    real = {name: getattr(rejection, name) for name in ("accept", "residual", "noise_keys")}

    def has(name: str) -> jax.Array:
        return fault == FAULTS.index(name)

    def unwarped(q: jax.Array) -> jax.Array:
        powers = q**temperature
        return jnp.where(has("draft not warped"), powers / jnp.maximum(powers.sum(-1, keepdims=True), 1e-9), q)

    def accept(p: jax.Array, q: jax.Array, token: jax.Array, u: jax.Array) -> jax.Array:
        token = jnp.where(has("token of another row"), jnp.roll(token, LEVELS + 1), token)
        return real["accept"](p, unwarped(q), token, jnp.where(has("no dice"), 0.0, u))

    def residual(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.where(has("residual is the target"), p, real["residual"](p, unwarped(q)))

    def noise_keys(seeds: jax.Array, positions: jax.Array, rounds: jax.Array, purpose: Purpose) -> jax.Array:
        positions = jnp.where(has("one noise for all positions"), 0, positions)
        keys, same = (real["noise_keys"](seeds, positions, rounds, p) for p in (purpose, Purpose.DRAFT))
        return jnp.where(has("one noise for all purposes"), same, keys)

    with pytest.MonkeyPatch.context() as patch:
        for function in (accept, residual, noise_keys):
            patch.setattr(rejection, function.__name__, function)
        yield


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault):
    pair, temperature = PAIRS["bad"], 0.7
    seeds = np.arange(CHAINS[ONE]) + 10**9
    chains = draw(program(ONE, ALL_AXES, True), pair, temperature, seeds, fault=FAULTS.index(fault))
    smallest = min(p_values(chains, pair, temperature)[1:])  # of the tokens: the text itself must give it away
    assert smallest > ALPHA if fault == "none" else smallest < 1e-9


def test_accept_is_the_ratio_of_probabilities():
    p = jnp.asarray([[0.2, 0.8], [0.2, 0.8], [0.2, 0.8], [0.0, 1.0], [0.5, 0.5]])
    q = jnp.asarray([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [1.0, 0.0], [0.5, 0.5]])
    u = jnp.asarray([0.24, 0.26, 1 - 2**-24, 0.0, 1 - 2**-24])
    accepted = rejection.accept(p, q, jnp.asarray([0, 0, 1, 0, 1]), u)
    assert accepted.tolist() == [True, False, True, False, True]


def test_residual_is_what_the_draft_left_over_or_the_target():
    p = jnp.asarray([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    q = jnp.asarray([[0.25, 0.5, 0.25], [0.5, 0.3, 0.2], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(rejection.residual(p, q), [[0.25, 0, 0], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])


def test_sample_never_takes_what_has_no_weight():
    weights = jnp.asarray([[0.0, 1e-30, 0.0], [3.0, 0.0, 0.0]])
    assert rejection.sample(weights, jnp.asarray([[50.0, -5.0, 50.0], [-5.0, 50.0, 0.0]])).tolist() == [1, 0]
