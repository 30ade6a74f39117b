"""Group borders: the search against brute force, the measure against a whole model."""

import itertools

import numpy as np
import pytest

from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.refit.borders import EVERY, best_layout, measure_groups, sizes_to_try
from easyspec_jax.refit.fidelity import DEPTHS, fidelity
from tests.refit.conftest import LAYERS, TEXTS
from tests.support.models import loader

pytestmark = pytest.mark.slow


def _groupings(layers: int, lp_size: int):
    """Yield every way to cut layers into groups of at most lp_size."""
    for count in range(layers):
        for inner in itertools.combinations(range(1, layers), count):
            groups = tuple(range(a, b) for a, b in itertools.pairwise((0, *inner, layers)))
            if max(map(len, groups)) <= lp_size:
                yield groups


@pytest.mark.parametrize(
    "layers, lp_size, mlp_lp_size",
    [
        (9, 2, 1),
        (9, 4, 1),
        (7, 7, 1),
        (3, 4, 1),
        (8, 4, 2),
        (8, 3, 2),
        (7, 4, 4),
        (8, 3, 3),
        (5, 2, 3),
    ],
)
def test_search_finds_the_best_of_all_layouts(layers, lp_size, mlp_lp_size):
    random = np.random.default_rng(layers * lp_size)
    together = {
        n: sorted({min(n, m) for m in sizes_to_try(lp_size, mlp_lp_size)})
        for n in range(1, lp_size + 1)
    }
    overlaps = {
        (range(a, a + n), mlps): random.uniform(0.5, 1) ** (n + mlps)
        for n in range(2, lp_size + 1)
        for a in range(layers - n + 1)
        for mlps in together[n]
    }

    def kept(layout: Layout) -> float:
        return float(np.prod([overlaps.get(part, 1.0) for part in layout]))

    most = -(-layers // min(mlp_lp_size, lp_size))
    layouts = (
        Layout(groups, sizes)
        for groups in _groupings(layers, lp_size)
        for sizes in itertools.product(*(together[len(group)] for group in groups))
    )
    collectives = most + len(paper_groups(layers, lp_size))
    allowed = [
        own for own in layouts if own.sequential_mlps <= most and own.collectives <= collectives
    ]
    found = best_layout(overlaps, layers, lp_size, mlp_lp_size)
    assert found in allowed
    assert kept(found) == pytest.approx(kept(max(allowed, key=kept)))


@pytest.mark.parametrize(
    "mesh, sizes",
    [
        pytest.param(MeshShape(1, 1), (1, 2, 3), marks=pytest.mark.exhaustive),
        (MeshShape(2, 4), (1,)),
    ],
    ids=str,
)
def test_overlap_of_a_candidate_is_that_of_a_draft_with_this_group_alone(draft, mesh, sizes):
    """With a ridge that leaves nothing refit, the plain draft is the reference."""
    from_ = loader(draft[0], mesh)
    overlaps = measure_groups(from_, 3, sizes, TEXTS, ridge=1e9)
    every = {
        (range(a, a + n), m) for n in (2, 3) for a in range(LAYERS - n + 1) for m in sizes if m <= n
    }
    assert set(overlaps) == every
    compared, starts = TEXTS[-3:], range(0, TEXTS.shape[1] - DEPTHS + 1, EVERY)
    checked = (
        (range(0, 2), 2),
        (range(3, 6), 1),
        (range(3, 6), 2),
        (range(5, 8), 3),
        (range(5, 8), 1),
    )
    for group, mlps in filter(every.__contains__, checked):
        before, behind = (
            [range(i, i + 1) for i in part]
            for part in (range(group.start), range(group.stop, LAYERS))
        )
        model = load_draft(from_, Layout.uniform((*before, group, *behind), mlps))
        of_depths = []
        for depth in range(DEPTHS):
            counted = np.zeros(compared.shape, bool)
            counted[:, [start + depth for start in starts]] = True
            of_depths.append(fidelity(model, from_.mesh, compared, counted)[0][depth])
        expected = np.exp(np.average(np.log(of_depths), weights=[4, 3, 2, 1]))
        assert overlaps[group, mlps] == pytest.approx(expected, abs=1e-4)
    assert min(overlaps.values()) < 0.9, "candidates that lose nothing would prove nothing"
