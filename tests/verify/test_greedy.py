"""At temperature 0 a drafted token passes if it is the target's arg-max, on any mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.config import SamplingParams
from easyspec_jax.mesh import ALL_AXES, MeshShape
from easyspec_jax.verify import Coupled, Greedy, Rejection, Request, Verdict, choose
from tests.helpers import on_mesh

BATCH, VOCAB = 32, 48


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(4, 2)])
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("draft_axes", [(), ALL_AXES])
def test_a_token_passes_if_it_is_the_targets_argmax(mesh, levels, draft_axes):
    random = np.random.default_rng(levels)
    target = random.integers(-9, 3, size=(BATCH, levels + 1, VOCAB)).astype(np.float32)  # many ties
    draft = target[:, :levels] + random.integers(0, 2, size=(BATCH, levels, VOCAB)).astype(np.float32)
    zeros = np.zeros(BATCH, np.int32)
    request = Request(zeros.astype(np.uint32), zeros, zeros.astype(np.float32), zeros, zeros.astype(np.float32))  # pyright: ignore[reportArgumentType]

    def body(target: jax.Array, draft: jax.Array, request: Request) -> tuple[jax.Array, Verdict]:
        verifier, position = Greedy(), request.round
        columns = [verifier.propose(draft[:, level], position, request, draft_axes) for level in range(levels)]
        drafted = jax.numpy.stack(columns, axis=1) if levels else jax.numpy.zeros((BATCH, 0), np.int32)
        return drafted, verifier.verify(target, draft, drafted, position, request, draft_axes)

    specs = (P(None, None, ALL_AXES), P(None, None, draft_axes or None), P())
    drafted, verdict = on_mesh(mesh, body, specs, P())(target, draft, request)
    best = np.argmax(target, axis=-1)
    np.testing.assert_array_equal(drafted, np.argmax(draft, axis=-1))
    np.testing.assert_array_equal(verdict.token, best)
    np.testing.assert_array_equal(verdict.accept, drafted == best[:, :levels])
    if levels:
        assert 0 < np.sum(verdict.accept) < verdict.accept.size


def test_name_and_sampling_choose_the_verifier():
    for name, sampled in (("rejection", Rejection), ("coupled", Coupled)):
        assert choose(name, SamplingParams(top_k=5)) == Greedy()
        assert choose(name, SamplingParams(temperature=0.7)) == choose(name, SamplingParams(temperature=1)) == sampled()
        assert choose(name, SamplingParams(temperature=1, top_k=5)) == sampled(truncates=True)
        assert choose(name, SamplingParams(temperature=1, top_p=0.5)) == sampled(truncates=True)
    # As static arguments they must not recompile, and must not be taken for one another.
    assert len({Greedy(), Greedy(), Rejection(), Rejection(), Coupled(), Coupled(True), Rejection(True)}) == 5
