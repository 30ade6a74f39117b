"""Teacher-forced passes equal drafting one position at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import load_draft, run_fuzzy
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.refit.teacher import drafted_window, exact_window
from tests.refit.conftest import LAYERS, TEXTS
from tests.support.helpers import on_mesh
from tests.support.models import loader, partition_specs

DEPTHS = 3


def _teacher_forced(draft, ids):
    """Final hidden states at each depth: [depths, texts, tokens, hidden]."""
    batch, tokens = ids.shape
    capacity = (DEPTHS + 1) * tokens
    _, caches = draft(
        ids, draft.init_caches(batch, capacity), exact_window(batch, tokens, capacity, draft.config)
    )
    states = []
    for depth in range(1, DEPTHS + 1):
        h, caches = draft(
            ids, caches, drafted_window(depth, batch, tokens, capacity, draft.config), run_fuzzy
        )
        states.append(h)
    return jnp.stack(states)


def _drafted(draft, ids, last: int, depth: int):
    """Draft `depth` tokens fuzzily after an exact text; return the state of the last, `last`."""
    batch = ids.shape[0]
    start = jnp.zeros((batch,), jnp.int32)
    _, caches = draft(ids[:, : last - depth + 1], draft.init_caches(batch, last + 1), start)
    states = []
    for position in range(last - depth + 1, last + 1):
        h, caches = draft(ids[:, position : position + 1], caches, start + position, run_fuzzy)
        states.append(h[:, 0])
    return states[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [pytest.param(MeshShape(1, 1), marks=pytest.mark.exhaustive), MeshShape(4, 2)],
    ids=str,
)
def test_every_position_is_as_if_drafted(draft, mesh):
    from_ = loader(draft[0], mesh)
    model = load_draft(from_, Layout.uniform(paper_groups(LAYERS, 4)))
    specs = partition_specs(model), P()
    states = np.asarray(on_mesh(mesh, _teacher_forced, specs, P())(model, TEXTS[:2]))
    for depth, last in ((1, 9), (1, 23), (2, 9), (3, 23)):
        one = on_mesh(
            mesh, lambda m, x, last=last, depth=depth: _drafted(m, x, last, depth), specs, P()
        )
        expected = np.asarray(one(model, TEXTS[:2]))
        np.testing.assert_allclose(states[depth - 1][:, last], expected, atol=1e-5)
    assert np.abs(states[0] - states[1]).max() > 1e-3, (
        "depths that do not differ would prove nothing"
    )


def test_an_exact_draft_is_exact_at_every_depth(draft):
    mesh = MeshShape(1, 1)
    from_ = loader(draft[0], mesh)
    model = load_draft(from_, Layout.uniform(paper_groups(LAYERS, 1)))
    states = on_mesh(mesh, _teacher_forced, (partition_specs(model), P()), P())(model, TEXTS[:2])
    states = np.asarray(jax.device_get(states))
    np.testing.assert_allclose(states, np.broadcast_to(states[:1], states.shape), atol=1e-5)
