"""Models small enough to enumerate all texts: the next token depends on the last one alone."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from easyspec_jax.decode.lookup import append
from easyspec_jax.decode.round import speculative_round
from easyspec_jax.decode.state import Report, RoundConfig, State, init_state
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.sampling.adjustments import RowAdjustments, adjustment_specs
from easyspec_jax.verify import RowSampling
from tests.support.helpers import on_mesh

TOKENS, LENGTH = 11, 3
"""Size of the vocabulary, and tokens of the texts that are counted."""


@partial(jax.tree_util.register_dataclass, data_fields=["logits_after"], meta_fields=["axes"])
@dataclass(frozen=True)
class Markov:
    """Stand-in for a Decoder. Its hidden state is the last token, so it needs no cache."""

    logits_after: Any
    axes: Axes = ALL_AXES

    def __call__(
        self,
        tokens: jax.Array,
        caches: tuple[()],
        where: Any,
        run: Any = None,
        committed: Any = None,
    ) -> tuple[jax.Array, tuple[()]]:
        return tokens[..., None].astype(jnp.float32), caches

    def logits(self, h: jax.Array) -> jax.Array:
        return self.logits_after[h[..., 0].astype(jnp.int32)]

    def init_caches(self, batch: int, capacity: int) -> tuple[()]:
        return ()

    @property
    def kept_windows(self) -> tuple[()]:
        return ()


class Pair(NamedTuple):
    """Logits of target and draft after each token: [TOKENS, TOKENS]."""

    target: np.ndarray
    draft: np.ndarray


def make_pairs() -> dict[str, Pair]:
    """Make a target and drafts.

    "good" is near the target and "bad" is not; "blind" never proposes what the target likes most;
    "wishful" likes what the target never says.
    """
    random = np.random.default_rng(0)
    target, other = random.normal(size=(2, TOKENS, TOKENS)) * 1.5
    target_likes, draft_likes = (x >= np.sort(x, axis=-1)[:, -2:-1] for x in (target, other))
    return {
        "good": Pair(target, target + 0.3 * other),
        "bad": Pair(target, other),
        "blind": Pair(target, np.where(target_likes, -np.inf, target)),
        "wishful": Pair(np.where(draft_likes, -np.inf, target), other),
    }


def make_prompt(target: np.ndarray, length: int = 24) -> tuple[int, ...]:
    """Write a prompt as a target would; its last token is 0, as everywhere."""
    random, prompt = np.random.default_rng(2), [0]
    while len(prompt) < length - 1:
        prompt.append(int(random.choice(TOKENS, p=softmax(target[prompt[-1]]))))
    return (*prompt, 0)


class Truncation(NamedTuple):
    """Top-k and top-p."""

    top_k: int
    top_p: float


NO_TRUNCATION = Truncation(0, 1.0)


def make_request(
    seeds: np.ndarray, temperature: float, truncation: Truncation = NO_TRUNCATION
) -> RowSampling:
    """Make rows that differ in their seeds."""
    values = (
        (0, np.int32),
        (temperature, np.float32),
        (truncation.top_k, np.int32),
        (truncation.top_p, np.float32),
    )
    fields: list[Any] = [np.full(seeds.shape, x, dtype) for x, dtype in values]
    return RowSampling(jnp.asarray(seeds.astype(np.uint32)), *fields)


def program(
    config: RoundConfig,
    mesh: MeshShape,
    draft_axes: Axes = ALL_AXES,
    rounds: int = LENGTH,
    planting: Callable[[jax.Array], AbstractContextManager[None]] = nullcontext,
    drafting: bool = True,
    step: Callable[..., tuple[State, Report]] = speculative_round,
) -> Callable[..., jax.Array]:
    """Compile whole rounds that write texts of up to LENGTH tokens after a prompt.

    The program returns int32 [rows, LENGTH], a row per seed, -1 where a text is shorter. Its last
    argument is the number of a fault, which `planting` plants. drafting: whether the draft drafts.
    step: a round.
    """

    def body(
        target: Markov,
        draft: Markov,
        request: RowSampling,
        adjustments: RowAdjustments | None,
        prompt: jax.Array,
        fault: jax.Array,
    ) -> jax.Array:
        with planting(fault):
            return texts(target, draft if drafting else None, request, adjustments, prompt)

    def texts(
        target: Markov,
        draft: Markov | None,
        request: RowSampling,
        adjustments: RowAdjustments | None,
        prompt: jax.Array,
    ) -> jax.Array:
        limit = jnp.full(request.seed.shape, LENGTH, jnp.int32)
        begun = prompt.size - 1
        models: dict[str, Any] = {"target": target, "draft": draft}
        state = init_state(
            **models,
            request=request,
            limit=limit,
            adjustments=adjustments,
            capacity=prompt.size + LENGTH,
        )
        rows = jnp.broadcast_to(prompt, (limit.size, prompt.size))
        state = replace(
            state,
            length=jnp.full_like(limit, begun),
            draft_length=jnp.full_like(limit, begun),
            text=append(state.text, rows, 0 * limit, jnp.full_like(limit, prompt.size)),
        )

        def write(carry: tuple[State, jax.Array], _: None) -> tuple[tuple[State, jax.Array], None]:
            state, texts = carry
            state, report = step(target, draft, state, config)  # pyright: ignore[reportArgumentType]
            columns = jnp.arange(report.tokens.shape[1], dtype=jnp.int32)[None, :]
            places = (state.length - begun - report.num_tokens)[:, None] + columns
            places = jnp.where(columns < report.num_tokens[:, None], places, LENGTH)
            put = jax.vmap(lambda text, place, tokens: text.at[place].set(tokens, mode="drop"))
            return (state, put(texts, places, report.tokens)), None

        empty = jnp.full((*limit.shape, LENGTH), -1, jnp.int32)
        (_, written), _ = jax.lax.scan(write, (state, empty), None, length=rounds)
        return written

    specs = tuple(Markov(P(None, axes or None), axes) for axes in (ALL_AXES, draft_axes))
    in_specs = *specs, P(), adjustment_specs(config.kinds), P(), P()
    return on_mesh(mesh, body, in_specs, P())


def draw_texts(
    run: Callable[..., jax.Array],
    pair: Pair,
    request: RowSampling,
    vocab: int = 16,
    draft_axes: Axes = ALL_AXES,
    fault: int = 0,
    prompt: Sequence[int] = (0,),
    adjustments: RowAdjustments | None = None,
    may_end: bool = False,
) -> np.ndarray:
    """Draw a text for each row of a request, in tokens from 0 to TOKENS - 1.

    The program sees them spread over the ids of a vocabulary, which adjustments are for. prompt:
    ends with token 0. may_end: texts may be shorter than LENGTH; TOKENS fills them up.
    """
    ids = np.arange(TOKENS, dtype=np.int32) * (vocab // TOKENS)
    tables = np.full((2, vocab, vocab), -np.inf, np.float32)
    tables[:, ids[:, None], ids[None, :]] = np.stack(pair)
    models = (
        Markov(table, axes) for table, axes in zip(tables, (ALL_AXES, draft_axes), strict=True)
    )
    texts = np.asarray(run(*models, request, adjustments, ids[list(prompt)], np.int32(fault)))
    ended = (texts == -1) & may_end
    assert (np.isin(texts, ids) | ended).all(), (
        "a token without probability under the target, or too few tokens"
    )
    return np.where(ended, TOKENS, np.searchsorted(ids, texts))


def count(texts: np.ndarray) -> np.ndarray:
    """Count how often each text came: [TOKENS] * LENGTH."""
    counts = np.zeros((TOKENS,) * LENGTH, int)
    np.add.at(counts, tuple(texts.T), 1)
    return counts


def joint(pair: Pair, temperature: float, truncation: Truncation = NO_TRUNCATION) -> np.ndarray:
    """Enumerate the target's probability of every text: [TOKENS] * LENGTH."""
    after = truncated(softmax(pair.target / temperature), truncation)
    texts = after[0]
    for _ in range(LENGTH - 1):
        texts = texts[..., None] * after
    return texts


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def truncated(probabilities: np.ndarray, truncation: Truncation) -> np.ndarray:
    """Apply top-k and then top-p, row by row."""
    result = np.zeros_like(probabilities)
    for row, whole in enumerate(probabilities):
        order = np.argsort(-whole, kind="stable")[: truncation.top_k or None]
        among = whole[order] / whole[order].sum()
        kept = order[: 1 + np.searchsorted(np.cumsum(among), truncation.top_p)]
        result[row][kept] = whole[kept]
    return result / result.sum(axis=-1, keepdims=True)
