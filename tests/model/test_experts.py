"""Every way through a mixture of experts sends each token through the experts of its softmax."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easyspec_jax.checkpoint.config import MixtureConfig
from easyspec_jax.model import experts as module
from easyspec_jax.model.experts import (
    Experts,
    FeedForward,
    Routes,
    block_size,
    blocks_of,
    numbers_in_memory,
)
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm
from easyspec_jax.model.projection import Projection

HIDDEN, INNER, EXPERTS, CHOSEN = 12, 6, 8, 2


def made(normalizes: bool = True, sorts: bool = True) -> Experts:
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> Matrix:
        return Matrix(jnp.asarray(random.normal(size=shape), jnp.float32))

    norm = RMSNorm(jnp.ones(HIDDEN), eps=1e-6)
    router = Projection(norm, matrix(EXPERTS, HIDDEN), None, dtype=jnp.float32)
    parts = FeedForward(matrix(EXPERTS, 2 * INNER, HIDDEN), matrix(EXPERTS, HIDDEN, INNER))
    return Experts(
        router,
        parts,
        per_token=CHOSEN,
        normalizes=normalizes,
        activation="silu",
        sorts=sorts,
    )


def hidden(tokens: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(1, tokens, HIDDEN)), jnp.float32)


def by_hand(model: Experts, h: jax.Array) -> np.ndarray:
    """Send one token at a time through one expert at a time, in NumPy."""
    gate_up, down = (np.asarray(each.values[...]) for each in model.parts[:2])
    router, result = np.asarray(model.router.weight.values[...]), []
    for token in np.asarray(h[0]):
        x = token / np.sqrt(np.mean(token**2) + 1e-6)
        scores = np.exp(router @ x)
        chosen = np.argsort(-scores)[:CHOSEN]
        total = scores[chosen].sum() if model.normalizes else scores.sum()
        y = np.zeros(HIDDEN)
        for expert in chosen:
            gate, up = np.split(gate_up[expert] @ x, 2)
            y += scores[expert] / total * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
        result.append(y)
    return np.stack(result)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(
    ("tokens", "sorts"),
    [(1, True), (5, True), (150, True), (600, False)],
    ids=["taken out", "all experts", "blocks", "slices"],
)
def test_every_way_sends_each_token_through_its_experts(tokens, sorts, normalizes):
    model, h = made(normalizes, sorts), hidden(tokens)
    np.testing.assert_allclose(model(h)[0], by_hand(model, h), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 150, 600])
@pytest.mark.parametrize("sorts", [True, False])
def test_whole_experts_of_all_devices_add_up(monkeypatch, tokens, sorts):
    """Two devices have four experts each, and add what their own say."""
    model, h = made(sorts=sorts), hidden(tokens)
    found = np.zeros((tokens, HIDDEN))
    for device in range(2):
        own = slice(4 * device, 4 * device + 4)
        part = made(sorts=sorts)
        part.parts = nnx.data(jax.tree.map(lambda w, own=own: w[own], model.parts))
        part.axes = ("tensor",)
        monkeypatch.setattr(module, "shard_index", lambda _, device=device: jnp.array(device))
        monkeypatch.setattr(module, "shard_count", lambda _: 2)
        found += np.asarray(part(h)[0])
    np.testing.assert_allclose(found, by_hand(model, h), atol=2e-4, rtol=1e-4)


def test_the_number_of_tokens_decides_the_way(monkeypatch):
    taken = []
    for name in ("_through_chosen", "_through_all", "_through_blocks", "_through_slices"):
        own = getattr(Experts, name)
        monkeypatch.setattr(
            Experts, name, lambda self, *args, o=own, n=name: (taken.append(n), o(self, *args))[1]
        )
    for tokens in (1, 2, 64, 65):
        made()(hidden(tokens))
    assert taken == ["_through_chosen", "_through_all", "_through_all", "_through_blocks"]
    taken.clear()
    for tokens in (1, 65, 513):
        made(sorts=False)(hidden(tokens))
    assert taken == ["_through_chosen", "_through_all", "_through_slices", "_through_all"]


@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_blocks_hold_every_choice_once(tokens):
    random = np.random.default_rng(tokens)
    # Most tokens want the same experts, so that some experts fill several blocks and some none.
    scores = random.normal(size=(tokens, EXPERTS)) + 3 * (np.arange(EXPERTS) < 2)
    chosen = np.argsort(-scores)[:, :CHOSEN]
    weights = random.uniform(1, 2, chosen.shape)
    routes = Routes(jnp.asarray(chosen, jnp.int32), jnp.asarray(weights, jnp.float32))
    blocks = jax.tree.map(np.asarray, blocks_of(routes, EXPERTS))
    found = np.zeros((tokens, EXPERTS), np.float32)
    for expert, rows, factors in zip(*blocks, strict=True):
        np.add.at(found, (rows, expert), factors)
    expected = np.zeros((tokens, EXPERTS), np.float32)
    np.put_along_axis(expected, chosen, weights.astype(np.float32), axis=1)
    np.testing.assert_array_equal(found, expected)
    assert blocks.tokens.shape[1] == block_size(tokens, tokens * CHOSEN, EXPERTS)


def test_a_block_too_few_is_noticed(monkeypatch):
    model, h = made(), hidden(150)

    def all_but_the_last(routes: Routes, experts: int, every: int) -> module.Blocks:
        blocks = blocks_of(routes, experts, every)
        used = int(np.flatnonzero(np.asarray(blocks.weights).any(axis=1))[-1])
        return blocks._replace(weights=blocks.weights.at[used].set(0))

    monkeypatch.setattr(module, "blocks_of", all_but_the_last)
    assert np.abs(model(h)[0] - by_hand(model, h)).max() > 0.1


def test_estimates_follow_the_way():
    mixture = MixtureConfig(128, 8, 1536, True, ())

    def estimate(tokens: int, sorts: bool = False) -> int:
        return numbers_in_memory(mixture, 4096, 192, tokens, sorts)

    matrices, results = 3 * 192 * 4096, 3 * 192 + 4096
    assert estimate(1) == 8 * (matrices + results)
    assert estimate(21) == 128 * 21 * results
    assert estimate(2048) == estimate(512) == 128 * 512 * results
    assert estimate(512, sorts=True) == matrices + 32 * results
    # With few experts, none is worth taking out.
    few = replace(mixture, num_experts=8)
    assert numbers_in_memory(few, 4096, 192, 1, sorts=True) == 8 * results
