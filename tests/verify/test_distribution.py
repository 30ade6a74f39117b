"""Texts follow the target's joint distribution, enumerated exactly; planted faults are noticed.

Models are tables, and whole rounds run on them: drafted, pruned, verified, committed. By default
each width, verifier, temperature, truncation and draft comes up in some case, with 40,000 draws;
`pytest -m exhaustive` takes every case, with 400,000.
"""

import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.decode import drafting
from easyspec_jax.decode import round as round_
from easyspec_jax.decode.drafting import Candidates, Level
from easyspec_jax.decode.lookup import Found, Lookup
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.sampling.noise import Purpose
from easyspec_jax.verify import Block, Coupled, Rejection, RowSampling, block, rejection
from easyspec_jax.verify.rejection import Trial
from easyspec_jax.verify.tree import Tree
from tests.support.helpers import goodness_of_fit
from tests.verify.markov import (
    NO_TRUNCATION,
    TOKENS,
    Pair,
    Truncation,
    count,
    draw_texts,
    joint,
    make_pairs,
    make_prompt,
    make_request,
    program,
)

ONE, EIGHT = MeshShape(1, 1), MeshShape(4, 2)
CHUNK = 20_000
LEVELS = 2
PAIRS = make_pairs()
TRUNCATIONS = (NO_TRUNCATION, Truncation(6, 0.9))
LOOKUP = Lookup(longest=3, shortest=1)
SURE = 0.3
"""Probability that a chain's first token must have to be followed by a second one, in some cases.
About half have it."""
NEVER = 1.0
"""Probability that no draft reaches, so that no row of a batch drafts a second level."""
PROMPT = make_prompt(PAIRS["good"].target)
"""Prompt of cases with lookups: the target's own words, most of which come again."""


@dataclass(frozen=True)
class Case:
    """Texts to draw, and how.

    nodes: None verifies the whole tree. lookup: drafts are looked up in a longer prompt, "alone" or
    to join what the draft drafts.
    """

    verifier: type[Rejection] | type[Coupled] | type[Block]
    width: int
    temperature: float
    truncation: Truncation
    pair: str
    nodes: int | None = None
    lookup: Literal["", "alone", "joined"] = ""
    threshold: float = 0.0

    def __str__(self) -> str:
        tree = f"{self.width}" + (f"of{self.nodes}" if self.nodes else "")
        cut = "whole" if self.truncation == NO_TRUNCATION else "cut"
        tree += self.lookup + (f"over{self.threshold}" if self.threshold else "")
        return f"{self.verifier.__name__.lower()}-{tree}-{self.temperature}-{cut}-{self.pair}"

    def counts(self, chunks: int) -> np.ndarray:
        """Count each text after each chunk of draws: [chunks, *texts], cumulative.

        The case's name decides its seeds.
        """
        start = zlib.crc32(str(self).encode())
        verifier = self.verifier(self.truncation != NO_TRUNCATION)
        run = compiled(
            verifier, self.width, self.nodes, lookup=self.lookup, threshold=self.threshold
        )
        requests = (self.request(start + i * CHUNK) for i in range(chunks))
        return np.cumsum([count(self.texts(run, request)) for request in requests], axis=0)

    def texts(self, run: Any, request: RowSampling, fault: int = 0) -> np.ndarray:
        prompt = PROMPT if self.lookup else (0,)
        return draw_texts(run, PAIRS[self.pair], request, fault=fault, prompt=prompt)

    def request(self, start: int) -> RowSampling:
        return make_request(np.arange(start, start + CHUNK), self.temperature, self.truncation)

    def probabilities(self) -> np.ndarray:
        return joint(PAIRS[self.pair], self.temperature, self.truncation)


@cache
def compiled(
    verifier: Any,
    width: int,
    nodes: int | None,
    mesh: MeshShape = ONE,
    draft_axes: Axes = ALL_AXES,
    lookup: str = "",
    threshold: float = 0.0,
) -> Any:
    config = config_of(verifier, width, nodes, lookup, threshold)
    return program(config, mesh, draft_axes, drafting=lookup != "alone")


def config_of(
    verifier: Any, width: int, nodes: int | None, lookup: str, threshold: float = 0.0
) -> RoundConfig:
    """Return the configuration of a round; one that only looks up calibrates no draft."""
    return RoundConfig(
        LEVELS,
        lookup != "alone",
        verifier,
        (),
        width,
        nodes,
        lookup=LOOKUP if lookup else None,
        confidence_threshold=threshold,
    )


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    return goodness_of_fit(counts.reshape(1, -1), probabilities.reshape(1, -1))


def every_case() -> Iterator[Case]:
    """List chains with every draft; and trees, which take longer, with one draft each."""
    turn = itertools.count()
    for verifier, temperature, truncation in itertools.product(
        (Rejection, Coupled, Block), (0.7, 1.0), TRUNCATIONS
    ):
        # Truncated, the other drafts have too few tokens in common with the target.
        pairs = list(PAIRS) if truncation == NO_TRUNCATION else ["good", "bad"]
        for pair in pairs:
            yield Case(verifier, 1, temperature, truncation, pair)
        yield Case(verifier, 1, temperature, truncation, "good", lookup="alone")
        yield Case(verifier, 1, temperature, truncation, "bad", threshold=SURE)
        if verifier is Block:
            continue  # for chains, of nothing but draws
        for width, nodes, pair in ((1, None, "bad"), (1, None, "good"), (4, 5, "bad")):
            yield Case(verifier, width, temperature, truncation, pair, nodes, "joined")
        yield Case(verifier, 4, temperature, truncation, "bad", 5, "joined", SURE / 2)
        yield Case(verifier, 1, temperature, truncation, "good", None, "joined", NEVER)
        for nodes in (None, 5):
            yield Case(verifier, 4, temperature, truncation, "bad", nodes, threshold=SURE / 2)
        for width, nodes in ((4, None), (4, 5), (8, None), (12, None)):
            yield Case(
                verifier, width, temperature, truncation, pairs[next(turn) % len(pairs)], nodes
            )
        next(turn)  # otherwise each tree would always meet the same draft


EVERY_CASE = list(every_case())
# The smallest p-value must be below this for Holm's procedure at 1 % to reject anything.
ALPHA = 0.01 / len(EVERY_CASE)

_FEW = [
    *itertools.product((Rejection,), (1,), (0.7, 1.0), (0,), PAIRS),
    *itertools.product((Rejection,), (4,), (0.7, 1.0), (1,), ("good", "bad")),
    *[(Rejection, 8, 1.0, 0, "blind"), (Rejection, 12, 0.7, 0, "wishful")],
    *itertools.product((Coupled,), (1,), (0.7, 1.0), (0,), ("good", "bad")),
    *[(Coupled, 4, 0.7, 1, "good"), (Coupled, 4, 1.0, 1, "bad")],
    *[(Block, 1, 0.7, 0, "bad"), (Block, 1, 1.0, 0, "wishful"), (Block, 1, 1.0, 1, "good")],
]
FEW_CASES = [Case(v, width, t, TRUNCATIONS[cut], pair) for v, width, t, cut, pair in _FEW]
FEW_CASES += [
    Case(verifier, 1, temperature, truncation, "good", lookup="alone")
    for verifier in (Rejection, Coupled)
    for temperature, truncation in zip((0.7, 1.0), TRUNCATIONS, strict=True)
]
FEW_CASES += [Case(Block, 1, 0.7, NO_TRUNCATION, "good", lookup="alone")]
FEW_CASES += [
    Case(Rejection, 1, 0.7, NO_TRUNCATION, "bad", lookup="joined"),
    Case(Rejection, 1, 1.0, TRUNCATIONS[1], "good", lookup="joined"),
    Case(Rejection, 4, 1.0, NO_TRUNCATION, "bad", 5, "joined"),
    Case(Coupled, 4, 0.7, NO_TRUNCATION, "bad", lookup="joined"),
]
FEW_CASES += [
    Case(Rejection, 1, 0.7, NO_TRUNCATION, "bad", threshold=SURE),
    Case(Rejection, 4, 1.0, NO_TRUNCATION, "bad", 5, threshold=SURE / 2),
    Case(Coupled, 4, 0.7, TRUNCATIONS[1], "bad", threshold=SURE / 2),
    Case(Block, 1, 0.7, NO_TRUNCATION, "bad", threshold=SURE),
    Case(Rejection, 1, 1.0, NO_TRUNCATION, "good", None, "joined", NEVER),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_texts_follow_the_target(case):
    assert p_value(case.counts(2)[-1], case.probabilities()) > ALPHA


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_texts_follow_the_target_closer_and_closer(case):
    """The total variation distance is what that many draws of the target itself would have.

    So it shrinks with the square root of the number of draws.
    """
    counts, probabilities = case.counts(20), case.probabilities()
    assert p_value(counts[-1], probabilities) > ALPHA
    random = np.random.default_rng(0)
    for some in counts[[0, 4, 19]]:
        draws = some.sum()
        samples = random.multinomial(draws, probabilities.reshape(-1), size=200).reshape(
            -1, *some.shape
        )
        usual = [distance(sample, probabilities) for sample in samples]
        assert abs(distance(some, probabilities) - np.mean(usual)) < 5 * np.std(usual), (
            f"{draws} draws"
        )


def distance(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the total variation distance."""
    return float(np.abs(counts / counts.sum() - probabilities).sum()) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verifier", "width"),
    [pytest.param(Rejection(), 4, marks=pytest.mark.exhaustive), (Block(), 1)],
    ids=["rejection-4", "block-1"],
)
def test_the_mesh_changes_nothing(verifier, width):
    """The draft is split in one case and replicated in the other."""
    request = make_request(np.arange(1000), 0.7)
    one, *others = (
        draw_texts(
            compiled(verifier, width, None, *layout),
            PAIRS["good"],
            request,
            EIGHT.size * 16,
            layout[1],
        )
        for layout in ((ONE, ALL_AXES), (EIGHT, ALL_AXES), (EIGHT, ()))
    )
    for other in others:
        np.testing.assert_array_equal(other, one)


@pytest.mark.slow
def test_a_coupled_text_does_not_depend_on_the_draft():
    """Drafted by a model, looked up, or decoded plainly."""
    request = make_request(np.arange(2000), 0.7)
    plain = program(RoundConfig(0, False, Coupled(), ()), ONE, drafting=False)
    runs = [plain, compiled(Coupled(), 1, None), compiled(Coupled(), 1, None, lookup="alone")]
    runs.append(compiled(Coupled(), 4, 5, lookup="joined"))
    expected, *others = (draw_texts(run, PAIRS["good"], request, prompt=PROMPT) for run in runs)
    for texts in others:
        np.testing.assert_array_equal(texts, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verifier", "width"),
    [(Rejection(), 4), pytest.param(Coupled(), 4, marks=pytest.mark.exhaustive), (Block(), 1)],
    ids=["rejection-4", "coupled-4", "block-1"],
)
def test_a_text_depends_on_its_own_request_alone(verifier, width):
    """Its place in the batch and its neighbours' requests do not matter."""
    run = compiled(replace(verifier, truncates=True), width, None)
    seeds, pair = np.arange(CHUNK), PAIRS["bad"]
    alone = [make_request(seeds, *how) for how in ((0.7, TRUNCATIONS[0]), (1.0, TRUNCATIONS[1]))]
    texts = [draw_texts(run, pair, request) for request in alone]
    even = seeds % 2 == 0
    mixed = jax.tree.map(lambda a, b: np.where(even, a, b)[::-1], *alone)
    expected = np.where(even[:, None], *texts)
    np.testing.assert_array_equal(draw_texts(run, pair, mixed)[::-1], expected)
    assert (texts[0] != texts[1]).any()


@pytest.mark.parametrize(
    ("verifier", "width"), [(Rejection(), 4), (Block(), 1)], ids=["rejection-4", "block-1"]
)
def test_a_draft_equal_to_the_target_is_never_rejected(verifier, width):
    """So one round makes the whole text."""
    pair = Pair(PAIRS["good"].target, PAIRS["good"].target)
    run = program(RoundConfig(LEVELS, True, verifier, (), width=width), ONE, rounds=1)
    assert (draw_texts(run, pair, make_request(np.arange(CHUNK), 0.7)) >= 0).all()


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_a_sure_draft_that_is_wrong_does_no_harm(width, temperature):
    """At low temperature, probabilities of the draft's other tokens underflow float32."""
    target, draft = np.zeros((2, TOKENS, TOKENS))
    target[:, 7], target[:, 3], draft[:, 3] = 10, -5, 10
    texts = draw_texts(
        compiled(Rejection(), width, None),
        Pair(target, draft),
        make_request(np.arange(200), temperature),
    )
    assert (texts == 7).all()


FAULTS = (
    "none",
    "what is left of the target is not normalised",
    "what is left of the draft is all of it",
    "children are the likeliest",
    "children are pruned by probability",
    "probabilities are those of another node",
    "requests share their noise",
    "positions share their noise",
    "a rejected token is replaced by one of the target",
    "no dice",
    "lookups know the noise",
    "lookups are taken for draws",
)
IN_DRAFTS = FAULTS[:-2]
IN_LOOKUPS = {
    "alone": ("none", "requests share their noise", *FAULTS[-4:-1]),
    "joined": ("none", *FAULTS[-4:]),
}
# A chain has no siblings, and the "bad" draft gets too few pairs of tokens accepted in a chain.
IN_TREES = {
    "what is left of the target is not normalised",
    "what is left of the draft is all of it",
    "children are pruned by probability",
    "positions share their noise",
}


@contextmanager
def planting(fault: jax.Array) -> Iterator[None]:
    """Plant a fault in the verifier.

    Its number is an array, so one program serves all faults.
    """
    real_look_up = round_._look_up
    names = ("target_left", "draft_left", "gumbel", "noise_keys", "uniform", "accept_children")
    real = {name: getattr(rejection, name) for name in names}
    real_prune = round_.prune

    def has(name: str) -> jax.Array:
        return fault == FAULTS.index(name)

    def target_left(p: jax.Array, q: jax.Array, trial: Trial) -> tuple[jax.Array, jax.Array]:
        rest, norm = real["target_left"](p, q, trial)
        return rest, jnp.where(has("what is left of the target is not normalised"), 1.0, norm)

    def draft_left(q: jax.Array, trial: Trial) -> tuple[jax.Array, jax.Array]:
        here = has("what is left of the draft is all of it")
        return tuple(
            jnp.where(here, x, y)
            for x, y in zip((q, 1.0), real["draft_left"](q, trial), strict=True)
        )  # pyright: ignore[reportReturnType]

    def gumbel(keys: jax.Array, ids: jax.Array) -> jax.Array:
        drafting = ids.ndim == 3
        return jnp.where(
            has("children are the likeliest") & drafting, 0.0, real["gumbel"](keys, ids)
        )

    def accept_children(p: jax.Array, tree: Tree, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        other = jnp.where(
            has("probabilities are those of another node"), jnp.roll(tree.q, 1, axis=1), tree.q
        )
        sure = tree.sure
        if sure is not None:
            sure &= ~has("lookups are taken for draws")
        accept, rest = real["accept_children"](p, replace(tree, q=other, sure=sure), u)
        return accept, jnp.where(has("a rejected token is replaced by one of the target"), p, rest)

    def prune(tree: Tree, nodes: int) -> Tree:
        of_parent = jnp.take_along_axis(tree.q, tree.parent[:, :, None], axis=1)
        own = (
            jnp.take_along_axis(of_parent, tree.rank[:, :, None], axis=2)[:, :, 0].at[:, 0].set(1.0)
        )
        path = jnp.sum(jnp.where(tree.ancestors, jnp.log(own)[:, None, :], 0.0), axis=2)
        wrong = has("children are pruned by probability") & tree.exists
        return real_prune(replace(tree, score=jnp.where(wrong, path, tree.score)), nodes)

    def noise_keys(
        seeds: jax.Array, positions: jax.Array, rounds: jax.Array, purpose: Purpose
    ) -> jax.Array:
        seeds = jnp.where(has("requests share their noise"), seeds % 500, seeds)
        positions = jnp.where(has("positions share their noise"), 0, positions)
        return real["noise_keys"](seeds, positions, rounds, purpose)

    def uniform(keys: jax.Array) -> jax.Array:
        return jnp.where(has("no dice"), 0.0, real["uniform"](keys))

    def look_up(state: State, config: RoundConfig) -> Found:
        # The first token is the one that the noise of a rejection favours.
        position, request = (state.length + 1)[:, None], state.request
        keys = real["noise_keys"](request.seed, position, request.round, Purpose.RESIDUAL)[:, 0]
        ids = jnp.arange(TOKENS, dtype=jnp.int32)
        noise = real["gumbel"](keys, jnp.broadcast_to(ids, (position.shape[0], TOKENS)))
        favoured = jnp.argmax(noise, axis=1, keepdims=True).astype(jnp.int32)
        found = real_look_up(state, config)
        other = jnp.concatenate([favoured, found.tokens[:, 1:]], axis=1)
        tokens = jnp.where(has("lookups know the noise"), other, found.tokens)
        return found._replace(tokens=tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_, "_look_up", look_up)
        for function in (target_left, draft_left, gumbel, accept_children, noise_keys, uniform):
            patch.setattr(rejection, function.__name__, function)
        patch.setattr(round_, "prune", prune)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "width, nodes, lookup, fault",
    [(1, 1, "", fault) for fault in IN_DRAFTS if fault not in IN_TREES]
    + [(4, 5, "", fault) for fault in IN_DRAFTS]
    + [(1, 1, lookup, fault) for lookup, faults in IN_LOOKUPS.items() for fault in faults],
)
def test_planted_faults_are_noticed(width, nodes, lookup, fault):
    run = with_faults(width, nodes, lookup)
    case = Case(Rejection, width, 0.7, NO_TRUNCATION, "bad", nodes, lookup)
    requests = (case.request(3 * 10**9 + i * CHUNK) for i in range(3))
    try:
        texts = [case.texts(run, request, FAULTS.index(fault)) for request in requests]
    except AssertionError:
        # Some texts end early, because the fault leaves nothing to choose from.
        assert fault != "none"
        return
    noticed = p_value(count(np.concatenate(texts)), case.probabilities())
    assert noticed > ALPHA if fault == "none" else noticed < 1e-9


@cache
def with_faults(width: int, nodes: int, lookup: str) -> Any:
    config = config_of(Rejection(), width, nodes, lookup)
    return program(config, ONE, planting=planting, drafting=lookup != "alone")


BLOCK_FAULTS = (
    "none",
    "tokens count by themselves",
    "no dice",
    "a rejected token is replaced by one of the target",
)


@contextmanager
def planting_in_blocks(fault: jax.Array) -> Iterator[None]:
    """Plant a fault in block verification; see planting()."""
    real = {name: getattr(block, name) for name in ("path_weight", "uniform", "accept_path")}

    def has(name: str) -> jax.Array:
        return fault == BLOCK_FAULTS.index(name)

    def path_weight(weight: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
        return real["path_weight"](jnp.where(has("tokens count by themselves"), 1.0, weight), p, q)

    def uniform(keys: jax.Array) -> jax.Array:
        return jnp.where(has("no dice"), 0.0, real["uniform"](keys))

    def accept_path(p: jax.Array, tree: Tree, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaf, rest = real["accept_path"](p, tree, u)
        whole = jnp.take_along_axis(p, leaf[:, None, None], axis=1)[:, 0]
        return leaf, jnp.where(
            has("a rejected token is replaced by one of the target"), whole, rest
        )

    with pytest.MonkeyPatch.context() as patch:
        for function in (path_weight, uniform, accept_path):
            patch.setattr(block, function.__name__, function)
        yield


@cache
def blocks_with_faults() -> Any:
    return program(config_of(Block(), 1, None, ""), ONE, planting=planting_in_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_planted_faults_of_blocks_are_noticed(fault):
    case = Case(Block, 1, 0.7, NO_TRUNCATION, "bad")
    requests = (case.request(3 * 10**9 + i * CHUNK) for i in range(3))
    run = blocks_with_faults()
    texts = [case.texts(run, request, BLOCK_FAULTS.index(fault)) for request in requests]
    noticed = p_value(count(np.concatenate(texts)), case.probabilities())
    assert noticed > ALPHA if fault == "none" else noticed < 1e-9


@contextmanager
def planting_foresight(fault: jax.Array) -> Iterator[None]:
    """Let a level's existence depend on its own tokens, and not on those above alone."""
    real = drafting._of_rows

    def of_rows(rows: jax.Array, level: Level, candidates: Candidates) -> tuple[Level, Candidates]:
        level, candidates = real(rows, level, candidates)
        unlikely = (fault > 0) & (level.log_prob < np.log(np.float32(SURE / 2)))
        return level._replace(score=jnp.where(unlikely, -jnp.inf, level.score)), candidates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "_of_rows", of_rows)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("verifier", [Rejection, Block])
def test_a_level_that_depends_on_its_own_tokens_is_noticed(verifier):
    case = Case(verifier, 1, 0.7, NO_TRUNCATION, "good", threshold=SURE)
    run = program(config_of(verifier(), 1, None, "", SURE), ONE, planting=planting_foresight)
    requests = [case.request(3 * 10**9 + i * CHUNK) for i in range(3)]
    for fault in (0, 1):
        texts = [case.texts(run, request, fault) for request in requests]
        noticed = p_value(count(np.concatenate(texts)), case.probabilities())
        assert noticed < 1e-9 if fault else noticed > ALPHA


@contextmanager
def planting_siblings(fault: jax.Array) -> Iterator[None]:
    """Let drafts go on by the likeliest of a level's nodes, which is not always the first."""
    real = drafting._confidence

    def confidence(level: Level) -> jax.Array:
        likeliest = jnp.max(jnp.where(level.score > -jnp.inf, level.log_prob, -jnp.inf), axis=-1)
        return jnp.where(fault > 0, likeliest, real(level))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "_confidence", confidence)
        yield


@pytest.mark.slow
def test_a_node_that_is_pruned_because_of_its_own_token_is_noticed():
    """Token 3 is the only likely one: as a second sibling, it makes the draft go on.

    Then the nodes of the next level push it out.
    """
    q = np.full(TOKENS, 0.07)
    q[3] = 0.3
    p = np.full(TOKENS, 1e-9)
    p[:6], p[3] = 0.08, 0.6
    pair = Pair(*(np.log(np.tile(x, (TOKENS, 1))) for x in (p, q)))
    config = config_of(Rejection(), 2, 2, "", threshold=0.25)
    run = program(config, ONE, planting=planting_siblings)
    requests = [make_request(np.arange(i * CHUNK, (i + 1) * CHUNK), 1.0) for i in range(6)]
    for fault in (0, 1):
        texts = [draw_texts(run, pair, request, fault=fault) for request in requests]
        noticed = p_value(count(np.concatenate(texts)), joint(pair, 1.0))
        assert noticed < 1e-7 if fault else noticed > ALPHA


def test_a_block_accepts_more_of_a_chain_than_rejection():
    """By more than four standard errors of the difference."""
    lengths = []
    for verifier in (Rejection(), Block()):
        run = program(RoundConfig(LEVELS, True, verifier, ()), ONE, rounds=1)
        request = make_request(np.arange(CHUNK), 1.0)
        texts = draw_texts(run, PAIRS["bad"], request, may_end=True)
        lengths.append((texts < TOKENS).sum(axis=1))
    gain = lengths[1].mean() - lengths[0].mean()
    assert gain > 4 * np.hypot(*(own.std() for own in lengths)) / CHUNK**0.5
