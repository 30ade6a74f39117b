"""Log-probabilities found on vocabulary shards are those of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax

from easyspec_jax.options import MAX_LOGPROBS
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.sampling.logprobs import BLOCK, Logprobs, logprobs_of, prompt_logprobs
from tests.support.helpers import on_mesh

BATCH, VOCAB, HIDDEN = 2, 128, 8
RNG = np.random.default_rng(0)
SPLIT = P(None, None, ALL_AXES)


def check(found: Logprobs, logits: np.ndarray, tokens: np.ndarray) -> None:
    expected = log_softmax(logits.astype(np.float64), axis=-1)
    chosen = np.take_along_axis(expected, tokens[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(found.chosen, chosen, rtol=1e-5, atol=1e-5)
    order = np.argsort(-expected, axis=-1, kind="stable")[:, :, :MAX_LOGPROBS]
    np.testing.assert_array_equal(found.ids, order)
    best = np.take_along_axis(expected, order, axis=-1)
    np.testing.assert_allclose(found.best, best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(4, 2)], ids=str)
def test_shards_give_the_log_softmax_of_whole_rows(mesh):
    logits = (RNG.normal(size=(BATCH, 5, VOCAB)) * 4 + 30).astype(np.float32)
    tokens = RNG.integers(VOCAB, size=(BATCH, 5)).astype(np.int32)

    def body(logits: jax.Array, tokens: jax.Array) -> Logprobs:
        return logprobs_of(logits, tokens, ALL_AXES)

    check(on_mesh(mesh, body, (SPLIT, P()), P())(logits, tokens), logits, tokens)


@pytest.mark.parametrize("count", [1, BLOCK, 2 * BLOCK + 3])
def test_a_prompt_is_cut_into_blocks(count):
    head = RNG.normal(size=(HIDDEN, VOCAB)).astype(np.float32)
    h = RNG.normal(size=(BATCH, count, HIDDEN)).astype(np.float32)
    tokens = RNG.integers(VOCAB, size=(BATCH, count)).astype(np.int32)
    found = prompt_logprobs(lambda x: x @ head, jnp.asarray(h), jnp.asarray(tokens), ())
    check(found, h @ head, tokens)
